"""One audit: the truth, the comparisons, and the causes of what differs."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._checks import PyTree
from .._loss import words_for
from .causes import Loss, weights_that_do_not_add_up, why_it_does_not_add_up
from .compare import WHOLE, Yardstick, along_itself, make_yardstick, norm
from .cycles import Settings, run_cycle
from .pieces import Pieces, split
from .problem import Problem, like
from .report import Cause, Entry
from .state import why_states_differ

# How near two float64 computations of one gradient are (random draws are made in
# float32), and what of a gradient counts as zero beside the rest of it.
_EXACT, _ZERO = 1e-6, 1e-12

# The full batch's gradient is rounded anew when it is multiplied by these on its way.
_SCALES = (1.0, 1.125, 1.25, 1.375, 1.625, 1.75, 1.875)

# If rounding hides so much of the gradient, faults too; and how much is said.
_BLIND, _HAZY = 0.5, 1e-3

# Of the model state there is but one sample.
_STATE_NOISE = 16


class Study:
    """A loss function on a batch, and what is true of it.

    Attributes:
        problem: the loss function with its arguments.
        full: its sums over the full batch, in higher precision.
        yardstick: the true gradient, and how far off a right one may be.
        exact: the same for what is computed in higher precision.
        states: the same as `yardstick` for the model state.
        notes: what was not examined, and why.
    """

    def __init__(self, problem: Problem, tolerance: float):
        self.problem, self.notes = problem, []
        self.full = full = problem.sums()
        eps = float(jnp.finfo(jnp.float32).eps)
        self._options = {"tolerance": tolerance, "floor": eps}
        self.yardstick = self._measure_rounding()
        self.states = make_yardstick(
            list(full.state),
            list(full.state.values()),
            [list(problem.sums(wide=False).state.values())],
            factor=_STATE_NOISE,
            **self._options,
        )
        self.exact, self.precision = self.yardstick, problem.precision
        if problem.is_wide:
            exact = {"tolerance": _EXACT, "floor": _ZERO}
            self.exact = self._measure(_SCALES if problem.kept else (), True, **exact)
            self.precision = "float64"
        self._note_of_precision()

    def _measure_rounding(self, **rows: Any) -> Yardstick:
        """The true gradient of some rows, and how it is rounded."""
        weight = max(self.full.weights.values())
        scales = (*_SCALES, *([1 / weight] if weight else []))
        return self._measure(scales, False, rows, **self._options)

    def _measure(self, scales, wide, rows=None, **options):
        problem, rows = self.problem, rows or {}
        full = problem.sums(**rows)
        sums = [problem.sums(wide=wide, scale=scale, **rows) for scale in scales]
        samples = [one.mean_gradient() for one in sums]
        made = make_yardstick(problem.paths, full.mean_gradient(), samples, **options)
        return along_itself(made, list(full.grads.values())) if samples else made

    def describe(self) -> str:
        """A line about the truth."""
        problem, full = self.problem, self.full
        count = sum(leaf.size for leaf in self.yardstick.truth)
        weights = ", ".join(f"{words_for(n)} {w:g}" for n, w in full.weights.items())
        return (
            f"the full batch of {problem.rows} rows at once, in {self.precision}; "
            f"objective {full.loss():.6g}; weight of {weights}; {count} parameters in "
            f"{len(problem.paths)} leaves"
        )

    def nothing_to_compare(self) -> list[Cause]:
        """Why agreement would prove nothing, if it would not."""
        truth, full = self.yardstick.truth, self.full
        if not any(full.weights.values()):
            text = "Every weight is 0: all rows are masked, and any gradient is right."
            return [Cause("nothing", "the batch", text, 0.0)]
        if not np.isfinite(full.loss()):
            text = (
                f"The loss of the full batch is {full.loss()}, whatever its gradient "
                "is. Mask before the division or the logarithm, not after it."
            )
            return [Cause("nan", "the loss", text, full.loss())]
        for path, leaf in zip(self.problem.paths, truth, strict=True):
            if not np.isfinite(leaf).all():
                text = (
                    f"The gradient of the full batch is not finite at {path}: there is "
                    "no truth to compare with. Mask before the division or the "
                    "logarithm, not after it."
                )
                return [Cause("nan", path, text, float("nan"))]
        if not self.yardstick.samples:
            text = (
                "The gradient of the full batch overflows in the dtype that the model "
                "computes in, and not in float64. Audit a loss scaled down."
            )
            return [Cause("nan", WHOLE, text, float("nan"))]
        noise = np.linalg.norm(self.yardstick.noise)
        if norm(truth) <= noise or self.yardstick.accuracy > _BLIND:
            text = (
                "The gradient of the full batch is zero in all leaves, or nothing but "
                f"rounding (norm {norm(truth):.2g}): any accumulation of it is right."
            )
            return [Cause("nothing", "the whole gradient", text, norm(truth))]
        return self._unchanged()

    def _unchanged(self):
        for other in self._others():
            if not self.exact.agrees(self.problem.sums(**other).mean_gradient()):
                self._other = other
                return []
        text = (
            "The gradient is the same for another batch: it does not depend on the "
            "rows, or all rows are the same. Nothing that could be accumulated wrongly "
            "is in it."
        )
        return [Cause("unchanged", "the whole gradient", text, 0.0)]

    def _others(self) -> list[dict[str, Any]]:
        """Other batches: of some rows twice, and of other numbers."""
        rows = np.arange(self.problem.rows) // 2
        return [{"which": rows}, {"which": rows, "stretch": True}]

    def other_batch(self) -> tuple[Yardstick, PyTree]:
        """Another batch with another gradient."""
        leaves = self.problem.take(**self._other)
        return self._measure_rounding(**self._other), like(self.problem.batch, leaves)

    def note_what_is_hidden(self) -> None:
        """Says of which leaves nothing was proved, and what rounding hides."""
        yardstick = self.yardstick
        if yardstick.accuracy > _HAZY:
            self.notes.append(
                "the full batch's own rounding hides a wrong factor nearer to 1 than "
                f"{yardstick.accuracy:.2g}"
            )
        triples = zip(yardstick.paths, yardstick.truth, yardstick.noise, strict=True)
        zero = [path for path, t, noise in triples if norm([t]) <= noise]
        if zero:
            more = f" and {len(zero) - 4} more" if len(zero) > 4 else ""
            self.notes.append(
                f"the true gradient is zero, or nothing but rounding, in {len(zero)} "
                f"of {len(yardstick.paths)} leaves, about which nothing is proved: "
                f"{', '.join(zero[:4])}{more}"
            )

    def loss_at(self, accum_steps: int, num_devices: int = 1) -> Loss:
        pieces = split(self.problem, accum_steps, num_devices)
        return Loss(self.problem, self.full, self.exact, pieces)

    def look_along(self, pieces: Pieces) -> None:
        """Where rounding may hide faults: along sums of the micro-batches too."""
        if self.yardstick.is_loose:
            path = f"{WHOLE}, of {pieces.words}"
            self.yardstick = self.yardstick.spanned(path, pieces.grads())

    def _note_of_precision(self):
        kept = ", ".join(sorted(self.problem.kept))
        if kept:
            self.notes.append(f"not all is computed in float64: {kept} know no other")
        elif not self.problem.is_wide:
            self.notes.append(f"compared in {self.precision}, not in float64")


def study_cycles(
    study: Study, settings: Settings, runs: list[tuple[int, int]]
) -> tuple[list[Entry], list[Cause]]:
    """Compares jaxga's cycles, `(accum_steps, num_devices)`, with the truth."""
    finest = sorted({n: steps for steps, n in sorted(runs) if steps * n > 1}.items())
    losses = [study.loss_at(steps, n) for n, steps in finest]
    for loss in losses:
        study.look_along(loss.pieces)
    entries = [_exact_entry(study, loss) for loss in losses]
    entries += [run_entry(study, settings, *run) for run in runs]
    failed = [entry for entry in entries if not entry.passed]
    if failed and all(loss.adds_up() for loss in losses):
        losses.append(study.loss_at(failed[-1].accum_steps, failed[-1].num_devices))
    for loss in losses:
        if not loss.adds_up():
            return entries, why_it_does_not_add_up(loss)
    causes = weights_that_do_not_add_up(losses[0])
    if failed and not causes:
        causes = _why_the_loop_differs(study, settings, failed[-1])
    return entries, causes


def _exact_entry(study, loss):
    pieces = loss.pieces
    return study.exact.entry(
        pieces.summed(),
        "exact sums",
        accum_steps=pieces.accum_steps,
        num_devices=pieces.num_devices,
        precision=study.precision,
    )


def run_entry(
    study: Study, settings: Settings, accum_steps: int, num_devices: int
) -> Entry:
    """One cycle, compared."""
    problem = study.problem
    found = run_cycle(problem, settings, accum_steps, num_devices)
    entry = study.yardstick.entry(
        found.grads,
        "jaxga",
        accum_steps=accum_steps,
        num_devices=num_devices,
        precision=problem.precision,
    )
    states = study.states.compare(list(found.state.values()))
    return dataclasses.replace(entry, leaves=(*entry.leaves, *states))


def _why_the_loop_differs(study, settings, failed):
    """The loss adds up, and the cycle does not: its state, or its precision."""

    def rerun(**changes):
        changed = dataclasses.replace(settings, **changes)
        return run_entry(study, changed, failed.accum_steps, failed.num_devices)

    worst = failed.worst
    if not np.isfinite(failed.error):
        text = (
            f"The gradient of {worst.path} overflows in the cycle, which sums before "
            "it divides, and the true one is finite. Scale the loss down, or compute "
            "in bfloat16 or float32."
        )
        return [Cause("nan", worst.path, text, failed.error)]
    if study.problem.model_state is not None:
        causes = why_states_differ(study.problem, settings, failed, rerun)
        if causes:
            return causes
    if settings.accum_dtype is not None and rerun(accum_dtype=None).passed:
        text = (
            f"Summing the gradients in accum_dtype={jnp.dtype(settings.accum_dtype)} "
            f"rounds them: the error is {failed.error:.2g} with {failed.accum_steps} "
            "micro-batches, and within bounds with the default, float32. Furthest out: "
            f"{worst.words}."
        )
        return [Cause("precision", worst.path, text, failed.error)]
    text = (
        f"In {study.precision} the micro-batches add up to the full batch, but the "
        f"cycle is {failed.error:.2g} away from it, more than the full batch's own "
        f"gradient in the same precision. Furthest out: {worst.words}."
    )
    return [Cause("precision", worst.path, text, failed.error)]
