"""What a clean factor between two gradients says."""

import dataclasses
import fractions

import numpy as np

from .problem import Problem


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The numbers that a trainer may divide or multiply by.

    Attributes:
        rows: of the batch.
        splits: numbers of micro-batches.
        devices: numbers of devices.
        sizes: the entries of each leaf of the batch, by path.
        weights: the weight of each term over the full batch.
    """

    rows: int
    splits: tuple[int, ...]
    devices: tuple[int, ...]
    sizes: dict[str, int]
    weights: dict[str, float]


def numbers_of(problem: Problem, weights, splits, devices) -> Numbers:
    return Numbers(problem.rows, splits, devices, problem.sizes(), weights)


def explain_factor(factor: float, name: str, numbers: Numbers, accuracy: float) -> str:
    """What may have multiplied the gradient of a term by a factor.

    Args:
        factor: of the gradient over the true one.
        name: the term.
        numbers: what there is to choose from.
        accuracy: how well the factor is known, relative to itself.
    """
    weight = numbers.weights[name]
    denominator = weight / factor if factor else np.inf
    readings = [
        text
        for value, text in [*_denominators(name, numbers), *_counts(weight, numbers)]
        if value and abs(denominator / value - 1) <= accuracy
    ]
    said = f"as if its weight were {denominator:.6g} and not {weight:.6g}"
    readings = list(dict.fromkeys(readings)) or _ratio(factor, accuracy)
    return f"{said}: {'; or '.join(readings[:3])}" if readings else said


def _ratio(factor, accuracy):
    """What a ratio of small integers says."""
    if factor <= 0:
        return ["its sign is the opposite"] if factor else []
    ratio = fractions.Fraction(factor).limit_denominator(64)
    top, bottom = ratio.numerator, ratio.denominator
    if not top or abs(factor * bottom / top - 1) > accuracy:
        return []
    if bottom == 1:
        return [f"it was counted {top} times"]
    if top == 1:
        return [f"it was divided by {bottom} once too often"]
    return [
        f"{top}/{bottom} of it, as where {top} micro-batches are there and their sum "
        f"is divided as if there were {bottom}"
    ]


def _denominators(name, numbers):
    """Numbers that may stand in place of the weight."""
    rows, weight = numbers.rows, numbers.weights[name]
    yield 1.0, "it was not divided at all: a sum where a mean belongs"
    for other, value in numbers.weights.items():
        if other != name:
            yield value, f"it was divided by the weight of the term {other!r}"
    yield (
        weight + rows,
        f"the weight counts one more for each of the {rows} rows, as tokens counted "
        "before the shift do",
    )
    yield weight - rows, f"the weight counts one less for each of the {rows} rows"
    yield rows, f"it was divided by the {rows} rows"
    by_size = {size: path for path, size in reversed(numbers.sizes.items())}
    for size, path in by_size.items():
        yield size, f"it was divided by all {size} entries of {path}, masked ones too"
        yield (
            size + rows,
            f"it was divided by the {size} entries of {path} and one more for each row",
        )


def _counts(weight, numbers):
    """The weight times a number of micro-batches or of devices."""
    for n in numbers.splits:
        yield weight / n, f"{n} micro-batches' means were added and not averaged"
        yield weight * n, f"it was divided by {n} micro-batches once too often"
    for n in numbers.devices:
        yield (
            weight / n,
            f"it was summed over {n} devices once too often (a psum of what has been "
            "summed already; JAX sums the gradients of replicated parameters by itself "
            "inside shard_map)",
        )
        yield (
            weight * n,
            f"it was divided by {n} devices once too often (a mean over devices where "
            "a sum belongs)",
        )
