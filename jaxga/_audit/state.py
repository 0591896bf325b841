"""Model state that is not what the full batch would have left."""

from collections.abc import Callable

from .._model_state import RULES
from .cycles import Settings
from .problem import Problem
from .report import Cause, Entry


def why_states_differ(
    problem: Problem,
    settings: Settings,
    failed: Entry,
    rerun: Callable[..., Entry],
) -> list[Cause]:
    """The cause, if another rule for the model state changes what fails.

    Args:
        problem: the loss function with its arguments.
        settings: of the cycle that failed.
        failed: what it came to.
        rerun: the same cycle with some settings changed.
    """
    rule = settings.model_state_merge
    others = [other for other in RULES if other != rule]
    tried = {other: _try(rerun, other) for other in others}
    better = [other for other, entry in tried.items() if entry and entry.passed]
    mend = (
        f"model_state_merge={better[0]!r} agrees with the full batch."
        if better
        else "No rule for the model state agrees with the full batch."
    )
    grads, states = _failing(failed, "params"), _failing(failed, "model_state")
    if grads and tried.get("mean") and not _failing(tried["mean"], "params"):
        worst = max(grads, key=lambda leaf: leaf.excess)
        text = (
            f"Later micro-batches compute with a model state that earlier ones changed "
            f"(model_state_merge={rule!r}): the gradient of {worst.path} is off by "
            f"{worst.error:.2g} of its norm. If each starts from the cycle's first "
            f"state ('mean'), the gradient is right. {mend}"
        )
        return [Cause("model_state", worst.path, text, worst.error)]
    if states and not grads:
        worst = max(states, key=lambda leaf: leaf.excess)
        text = (
            f"The gradient agrees, but {worst.path} is not what the full batch leaves: "
            f"off by {worst.error:.2g} of its norm after {failed.accum_steps} "
            f"micro-batches, model_state_merge={rule!r}. {mend}"
        )
        return [Cause("model_state", worst.path, text, worst.error)]
    return []


def _failing(entry, prefix):
    return [
        leaf
        for leaf in entry.leaves
        if leaf.path.startswith(prefix) and not leaf.passed
    ]


def _try(rerun, rule):
    try:
        return rerun(model_state_merge=rule)
    except ValueError as error:
        # No batch normalisation: that rule is no remedy.
        if rule != "batch_norm":
            raise error
        return None
