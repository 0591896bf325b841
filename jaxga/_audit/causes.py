"""Why a loss function's accumulated gradient is not that of the full batch."""

import dataclasses

import numpy as np

from .._loss import words_for
from .compare import Span, Yardstick, add, norm, project, relative_error, times
from .coupling import Meeting, find_meeting, places_of
from .pieces import Pieces
from .problem import Problem, Sums
from .report import Cause


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is known of a loss function on this batch.

    Attributes:
        problem: the loss function with its arguments.
        full: its sums over the full batch.
        exact: how near two exact computations of the same gradient are.
        pieces: its sums over the micro-batches of the finest split.
    """

    problem: Problem
    full: Sums
    exact: Yardstick
    pieces: Pieces

    def adds_up(self) -> bool:
        """Whether exact accumulation gives the full batch's gradient."""
        return self.exact.agrees(self.pieces.summed())

    @property
    def size(self) -> float:
        return relative_error(self.pieces.summed(), self.exact.truth)

    def worst(self) -> str:
        """The parameter whose gradient is furthest out, and by how much."""
        return self.exact.worst(self.pieces.summed()).words


def weights_that_do_not_add_up(loss: Loss) -> list[Cause]:
    """Terms whose weight is not a sum over the rows, though their mean depends on them.

    A term that is the same for all rows (a penalty on the parameters) may count once
    per micro-batch.
    """
    causes = []
    summed, count = loss.pieces.weights(), loss.pieces.count
    for name, weight in loss.full.weights.items():
        if np.isclose(summed[name], weight, rtol=1e-6) or _is_constant(loss, name):
            continue
        factor = summed[name] / weight if weight else np.inf
        text = (
            f"The weight of {words_for(name)} does not add up: it is {weight:g} over "
            f"the full batch, and {count} micro-batches' weights add up to "
            f"{summed[name]:g}, {factor:.4g} times as much. A weight is what the rows "
            "at hand count, and a mean is to be given with the number that it was "
            "divided by: jaxga.WeightedSum.of(losses, where=mask), or "
            "jaxga.WeightedSum.from_mean(mean, mask.sum()). "
        )
        if loss.adds_up():
            text += (
                "The gradient is right here because these micro-batches weigh the "
                "same; it is wrong as soon as they do not. "
            )
        text += f"Furthest out: {loss.worst()}."
        causes.append(Cause("weight", words_for(name), text, factor))
    return causes


def means_that_are_not_sums(loss: Loss) -> list[Cause]:
    """Terms whose total does not grow with the rows, though their weight does."""
    causes = []
    count, summed = loss.pieces.count, loss.pieces.weights()
    for name, grads in loss.full.grads.items():
        parts = [part.grads[name] for part in loss.pieces.parts]
        factor = project([sum(leaves) for leaves in zip(*parts, strict=True)], grads)
        has_sum = np.isclose(summed[name], loss.full.weights[name], rtol=1e-6)
        if not has_sum or not abs(factor / count - 1) < 0.3 or count == 1:
            continue
        text = (
            f"The total of {words_for(name)} is a mean where a sum belongs: over "
            f"{count} micro-batches its gradient adds up to {factor:.4g} times that of "
            f"the full batch, while its weight, {summed[name]:g}, adds up. It has been "
            "divided already, and is divided again at the end of the cycle. Give the "
            "losses before they are reduced, jaxga.WeightedSum.of(losses, where=mask). "
            f"Furthest out: {loss.worst()}."
        )
        causes.append(Cause("mean", words_for(name), text, factor))
    return causes


def means_of_another_weight(loss: Loss) -> list[Cause]:
    """Terms that each micro-batch makes rightly but for a factor of its own."""
    causes = []
    for name, grads in loss.full.grads.items():
        parts = [part.grads[name] for part in loss.pieces.parts]
        parts, size = [part for part in parts if norm(part)], norm(grads)
        if not 1 < len(parts) < sum(map(np.size, grads)):
            continue
        is_made = Span(name, slice(None), parts).share(grads) > (1 - 1e-9) * size
        error = relative_error(add(parts), grads)
        if not is_made or error < 1e-6:
            continue
        text = (
            f"The total of {words_for(name)} is a mean times another number than it "
            "was divided by: micro-batches' gradients are those of their rows but for "
            "a factor, another one for each, and do not add up. A mean is to be given "
            "with the number that it was divided by: jaxga.WeightedSum.of(losses, "
            "where=mask), or jaxga.WeightedSum.from_mean(mean, mask.sum()). Furthest "
            f"out: {loss.worst()}."
        )
        causes.append(Cause("denominator", words_for(name), text, error))
    return causes


def examples_that_meet(loss: Loss) -> tuple[Cause, Meeting] | None:
    """Where two examples' values are computed together, if anywhere."""
    meeting = find_meeting(loss.problem)
    if meeting is None:
        return None
    terms = " and ".join(map(words_for, meeting.terms)) or "what follows"
    text = (
        f"Examples see each other: {meeting.text} computes something from two of them "
        f"together ({meeting.size:.2g} of the change is not the sum of the changes "
        f"that each makes alone), and {terms} depends on it. A micro-batch, or a "
        "device, sees fewer examples than the full batch, and gets another gradient: "
        f"with {loss.pieces.words} off by "
        f"{loss.size:.2g}; furthest {loss.worst()}. Normalise each example by itself "
        "(LayerNorm, GroupNorm); for a loss over all examples there is "
        "jaxga.microbatch_map."
    )
    return Cause("coupling", meeting.where, text, meeting.size), meeting


def draws_that_depend_on_the_split(loss: Loss) -> list[Cause]:
    """Random numbers, or anything else, that belong to a row's place in the batch."""
    problem = loss.problem
    draws = _draw_places(problem)
    truth = loss.exact.truth
    as_second = problem.sums(index=1).mean_gradient()
    if not loss.exact.agrees(as_second):
        return [_randomness(loss, relative_error(as_second, truth))]
    moved = _moved(problem)
    if draws and not loss.exact.agrees(moved):
        return [_randomness(loss, relative_error(moved, truth))]
    if problem.per_example_keys and find_meeting(problem) is None:
        meeting = find_meeting(problem, with_keys=True)
        if meeting is not None:
            text = (
                f"An example's random key is used for other examples: {meeting.text}. "
                "Use each key for its own row only, jax.vmap over rows and keys; for "
                "modules of Flax there are jaxga.linen.per_example and "
                f"jaxga.nnx.per_example. Furthest out: {loss.worst()}."
            )
            return [Cause("randomness", meeting.where, text, loss.size)]
    return []


def rows_that_know_their_place(loss: Loss) -> list[Cause]:
    """What depends on the order of the rows, though no two of them meet."""
    moved = _moved(loss.problem)
    if loss.exact.agrees(moved):
        return []
    size = relative_error(moved, loss.exact.truth)
    text = (
        "The loss depends on where in the batch a row stands: with the same rows in "
        f"another order the gradient is another, by {size:.2g} of its norm. Furthest "
        f"out: {loss.worst()}. Give what belongs to a row with the row, as a leaf of "
        "the batch."
    )
    return [Cause("position", "the batch", text, size)]


def _moved(problem):
    order = np.random.default_rng(0).permutation(problem.rows)
    return problem.sums(order).mean_gradient()


def why_it_does_not_add_up(loss: Loss) -> list[Cause]:
    """The causes that lie in the loss function, for a gradient that is not a sum."""
    draws = draws_that_depend_on_the_split(loss)
    scales = weights_that_do_not_add_up(loss) + means_that_are_not_sums(loss)
    scales = scales or means_of_another_weight(loss)
    found = None if draws else examples_that_meet(loss)
    if found is None:
        places = [] if draws else rows_that_know_their_place(loss)
        return draws + places + scales or [_unknown(loss)]
    cause, meeting = found
    # A mean over a number of tokens couples examples too; that is said already.
    return scales if scales and meeting.is_division else [cause, *scales]


def _is_constant(loss, name):
    """Whether a term's mean and gradient are the same for all micro-batches."""
    full = loss.full
    if not full.weights[name]:
        return False
    mean = times(1 / full.weights[name], full.grads[name])
    scale = norm(mean) or 1.0
    for part in loss.pieces.parts:
        if not part.weights[name]:
            return False
        own = times(1 / part.weights[name], part.grads[name])
        if norm([a - b for a, b in zip(own, mean, strict=True)]) > 1e-6 * scale:
            return False
    return True


def _randomness(loss, size):
    problem = loss.problem
    if problem.per_example_keys:
        mend = (
            "although per_example_keys=True: the loss draws with keys that are not its "
            "rows' own. Use each key for its own row only, jax.vmap over rows and keys."
        )
    elif problem.key is not None:
        mend = (
            "one key per micro-batch draws other numbers for the same rows when the "
            "batch is cut otherwise. per_example_keys=True gives one key per row, and "
            "the same numbers however it is cut; or audit without dropout."
        )
    else:
        mend = (
            "they are drawn for a whole micro-batch at once. Draw them with key= and "
            "per_example_keys=True, one key per row; or audit without dropout."
        )
    text = (
        f"Random numbers depend on the split: {mend} Drawn anew, the gradient moves by "
        f"{size:.2g} of its norm. Furthest out: {loss.worst()}."
    )
    where = next(iter(_draw_places(problem)), "the loss")
    return Cause("randomness", where, text, size)


def _unknown(loss):
    parts, full = loss.pieces.summed(), loss.exact.truth
    factor = project(parts, full)
    text = (
        f"The gradients of {loss.pieces.count} micro-batches do not add up to that of "
        f"the full batch: they are {loss.size:.2g} of its norm away (nearest to "
        f"{factor:.6g} times it), and none of the causes looked for was found. "
        f"Furthest out: {loss.worst()}."
    )
    where = loss.exact.worst(parts).path
    return Cause("unknown", where, text, loss.size)


_DRAWS = ("random_bits", "rng_bit_generator", "threefry2x32", "rng_uniform")


def _draw_places(problem):
    return places_of(problem, _DRAWS)
