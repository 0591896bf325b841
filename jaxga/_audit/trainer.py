"""Why another trainer's gradient is not the true one.

Each fault that trainers have shipped is a gradient that can be made here, up to a
factor: of the micro-batches' sums with other coefficients, of the terms over other
weights. The one that fits is the cause.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from .._loss import words_for
from .compare import (
    Leaves,
    Yardstick,
    add,
    norm,
    project,
    relative_error,
    times,
)
from .factors import Numbers, explain_factor
from .pieces import Pieces
from .problem import Sums
from .report import Cause


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What is known of a gradient that a trainer returned.

    Attributes:
        got: the gradient.
        dtypes: the dtypes that its leaves came in.
        params: the parameters.
        yardstick: the truth, and how far off a right gradient may be.
        full: the sums over the full batch.
        splits: the micro-batches of the splits to think of.
        numbers: what it may have divided by.
        rows: makes the sums of every row by itself; None if there are too many.
    """

    got: Leaves
    dtypes: list[str]
    params: Leaves
    yardstick: Yardstick
    full: Sums
    splits: list[Pieces]
    numbers: Numbers
    rows: Callable[[], Pieces] | None

    @property
    def size(self) -> float:
        return relative_error(self.got, self.yardstick.truth)

    @property
    def where(self) -> str:
        return self.yardstick.worst(self.got).path

    def worst(self) -> str:
        return self.yardstick.worst(self.got).words


def why_it_differs(trainer: Trainer) -> list[Cause]:
    """The first of the known faults that makes this gradient."""
    looks = (_factor, _denominators, _coefficients, _parts, _rows, _penalty, _precision)
    for look in looks:
        cause = look(trainer)
        if cause is not None:
            text = f"{cause.text} Furthest out: {trainer.worst()}."
            return [dataclasses.replace(cause, text=text)]
    return [_unknown(trainer)]


def _fits(trainer, candidate: Leaves) -> float | None:
    """The factor with which a candidate is the trainer's gradient, if it is."""
    factor = project(trainer.got, candidate)
    if not factor or norm(times(factor, candidate)) < 0.5 * norm(trainer.got):
        return None
    made = times(factor, candidate)
    return factor if trainer.yardstick.agrees(trainer.got, made) else None


def _accuracy(trainer):
    yardstick = trainer.yardstick
    return max(1e-4, 4 * yardstick.tolerance, yardstick.accuracy)


def _factor(trainer):
    factor = _fits(trainer, trainer.yardstick.truth)
    if factor is None or abs(factor - 1) <= trainer.yardstick.accuracy:
        return None
    names = list(trainer.full.weights)
    readings = explain_factor(factor, names[0], trainer.numbers, _accuracy(trainer))
    text = (
        f"The gradient is {factor:.6g} times the true one, in every leaf: {readings}."
    )
    return Cause("factor", "the whole gradient", text, factor)


def _denominators(trainer):
    """Of several terms, each multiplied by a factor of its own."""
    full = trainer.full
    names = [name for name, weight in full.weights.items() if weight]
    if len(names) < 2:
        return None
    terms = [times(1 / full.weights[name], full.grads[name]) for name in names]
    factors = _combination(trainer, terms)
    accuracy = max(1e-3, _accuracy(trainer))
    if factors is None:
        return None
    wrong = [
        (n, f) for n, f in zip(names, factors, strict=True) if abs(f - 1) > accuracy
    ]
    if not wrong:
        return None
    text = " ".join(
        f"The term {n!r} counts {f:.5g} times, "
        f"{explain_factor(f, n, trainer.numbers, accuracy)}."
        if abs(f) > accuracy
        else f"The term {n!r} is missing from the gradient."
        for n, f in wrong
    )
    return Cause("denominator", words_for(wrong[0][0]), text, float(wrong[0][1]))


def _combination(trainer, parts: list[Leaves]) -> np.ndarray | None:
    """The factors with which parts add up to the gradient, if only those do."""
    matrix = np.stack(list(map(_flat, parts)), axis=1)
    scales = np.linalg.norm(matrix, axis=0)
    if not scales.all():
        return None
    matrix /= scales
    # In float32 the gradient does not tell parts apart that are nearly alike.
    if np.linalg.matrix_rank(matrix, tol=1e-3) < len(parts):
        return None
    factors = np.linalg.lstsq(matrix, _flat(trainer.got), rcond=None)[0] / scales
    made = add([times(f, part) for f, part in zip(factors, parts, strict=True)])
    return factors if trainer.yardstick.agrees(trainer.got, made) else None


def _parts(trainer):
    """What each micro-batch counts, where they do not count alike."""
    for pieces in trainer.splits:
        parts = [part.mean_gradient(trainer.full.weights) for part in pieces.parts]
        factors = _combination(trainer, parts)
        if factors is None:
            continue
        furthest = int(np.argmax(np.abs(factors - 1)))
        text = (
            f"Of {pieces.words}, not all count alike: from {min(factors):.4g} times to "
            f"{max(factors):.4g} times; part {furthest + 1} counts "
            f"{factors[furthest]:.4g} times."
        )
        return Cause("means", f"part {furthest + 1}", text, float(factors[furthest]))
    return None


def _rows(trainer):
    """What each row counts, where the gradient tells the rows apart."""
    if trainer.rows is None or trainer.yardstick.is_loose:
        return None
    weights = trainer.full.weights
    parts = {
        i: part.mean_gradient(weights)
        for i, part in enumerate(trainer.rows().parts)
        if any(part.weights.values())
    }
    parts = {i: part for i, part in parts.items() if norm(part)}
    factors = _combination(trainer, list(parts.values()))
    if factors is None:
        return None
    counts = dict(zip(parts, factors, strict=True))
    missing = [row for row, count in counts.items() if abs(count) < 1e-2]
    if missing:
        kept = np.mean([count for count in counts.values() if abs(count) >= 1e-2])
        text = (
            f"{len(missing)} of {len(counts)} rows that have a weight count nothing "
            f"({_list(missing)}); the others count {kept:.4g} times on average."
        )
        return Cause("missing", f"row {missing[0]}", text, len(missing) / len(counts))
    furthest = max(counts, key=lambda row: abs(counts[row] - 1))
    text = (
        f"The rows do not count alike: from {min(counts.values()):.4g} times to "
        f"{max(counts.values()):.4g} times; row {furthest} counts "
        f"{counts[furthest]:.4g} times."
    )
    return Cause("means", f"row {furthest}", text, float(counts[furthest]))


def _list(rows):
    more = ", ..." if len(rows) > 8 else ""
    return "rows " + ", ".join(map(str, rows[:8])) + more


def _coefficients(trainer):
    """Sums of micro-batches with other coefficients than the right ones."""
    for pieces in trainer.splits:
        for kind, words, candidate in _candidates(pieces, trainer.full.weights):
            factor = _fits(trainer, candidate)
            if factor is None:
                continue
            text = f"The gradient is {words}, of {pieces.words}"
            if abs(factor - 1) > _accuracy(trainer):
                text += f", times {factor:.6g}"
            return Cause(kind, f"the sum of {pieces.count} parts", text + ".", factor)
    return None


def _candidates(pieces: Pieces, weights) -> Iterator[tuple[str, str, Leaves]]:
    own = [part.mean_gradient() for part in pieces.parts]
    shared = [part.mean_gradient(weights) for part in pieces.parts]
    count, total = pieces.count, add(shared)
    per_weight = [f"{sum(part.weights.values()):g}" for part in pieces.parts[:4]]
    means = (
        "the mean of the micro-batches' own means, which weighs every micro-batch the "
        f"same though they weigh {', '.join(per_weight)}"
        + (", ..." if count > 4 else "")
    )
    yield "means", means, times(1 / count, add(own))
    yield "coupling", "what this loss function's micro-batches sum up to", total
    for i in (count - 1, *range(count - 1)):
        place = {0: "first", count - 1: "last"}.get(i, f"{i + 1}th")
        only = f"that of the {place} part alone: the others were overwritten"
        yield "missing", only, shared[i]
        yield "missing", only + ", and it was divided by its own weight", own[i]
        if count > 2:
            lacking = f"the sum without the {place} part, which was left out"
            yield "missing", lacking, add(shared[:i] + shared[i + 1 :])
            lacking = f"the mean of means without the {place} part, which was left out"
            yield "missing", lacking, times(1 / count, add(own[:i] + own[i + 1 :]))
    for i in range(count):
        twice = add([*shared, shared[i]])
        yield "missing", f"the sum with part {i + 1} counted twice", twice


def _precision(trainer):
    """An error that the rounding of a narrow accumulator explains, entry by entry."""
    yardstick = trainer.yardstick
    errors = [g - t for g, t in zip(trainer.got, yardstick.truth, strict=True)]
    leaves = yardstick.compare(trainer.got)[: len(errors)]
    sizes = [
        (pieces.count + 2, add([_sizes(part, trainer) for part in pieces.parts]))
        for pieces in trainer.splits
    ]
    dtypes = [
        dtype
        for dtype, unit in (("bfloat16", 2.0**-9), ("float16", 2.0**-11))
        if any(
            _is_rounding(errors, times(steps * unit, size), leaves)
            for steps, size in sizes
        )
    ]
    return _rounded(trainer, dtypes) if dtypes else None


def _sizes(part, trainer):
    return [np.abs(leaf) for leaf in part.mean_gradient(trainer.full.weights)]


def _is_rounding(errors, sizes, leaves):
    """Whether errors are as small as that in every entry, and of either sign."""
    triples = list(zip(errors, sizes, leaves, strict=True))
    if not all((np.abs(e) <= s + leaf.allowed).all() for e, s, leaf in triples):
        return False
    ratios = _flat([e / np.where(s, s, 1) for e, s, _ in triples])
    return abs(ratios.sum()) <= 4 * norm([ratios])


def _penalty(trainer):
    """The parameters themselves in the gradient."""
    truth, params = trainer.yardstick.truth, trainer.params
    factor = project([g - t for g, t in zip(trainer.got, truth, strict=True)], params)
    if not trainer.yardstick.agrees(trainer.got, add([truth, times(factor, params)])):
        return None
    text = (
        f"The gradient is the true one and {factor:.4g} times the parameters: a "
        "penalty on them (weight decay) that loss_fn does not have."
    )
    return Cause("penalty", "the whole gradient", text, factor)


def _rounded(trainer, dtypes):
    narrow = sorted({d for d in trainer.dtypes if d in ("bfloat16", "float16")})
    came = f" (it comes in {' and '.join(narrow)})" if narrow else ""
    text = (
        f"The error, {trainer.size:.2g} of the gradient's norm, is what summing or "
        f"rounding in {' or '.join(narrow or dtypes)} makes{came}: in every entry a "
        "small part of what was added up. Sum micro-batches' gradients in float32."
    )
    return Cause("precision", trainer.where, text, trainer.size)


def _unknown(trainer):
    factor = project(trainer.got, trainer.yardstick.truth)
    text = (
        f"The gradient is {trainer.size:.2g} of its norm away from the true one "
        f"(nearest to {factor:.6g} times it), and is no sum of micro-batches with "
        "coefficients that are known as a fault. If its forward pass is another than "
        "loss_fn's (dropout, batch statistics), the two cannot agree. Furthest out: "
        f"{trainer.worst()}."
    )
    return Cause("unknown", trainer.where, text, trainer.size)


def _flat(leaves):
    flat = np.concatenate([leaf.ravel() for leaf in leaves])
    return np.concatenate([flat.real, flat.imag]) if np.iscomplexobj(flat) else flat
