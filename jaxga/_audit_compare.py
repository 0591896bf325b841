"""How far a gradient may be from the truth before it counts as wrong."""

import dataclasses

import numpy as np

from ._audit_report import Entry, LeafError

Leaves = list[np.ndarray]

# The rounding of an accumulated gradient is not that of the full batch's, only alike.
_NOISE = 16


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """The truth, and what may lie between it and a right gradient.

    A leaf may differ by `tolerance` of its norm; by several times as much as the full
    batch's own gradient does in the user's precision (some leaves are nothing but
    rounding: the key bias of an attention has a gradient of zero); and by `floor` of
    the norm of the whole gradient.

    Attributes:
        paths: where the leaves stand.
        truth: the leaves.
        noise: for each leaf, how far the full batch's own gradient is from the truth.
        tolerance: relative to each leaf.
        floor: relative to the whole.
    """

    paths: list[str]
    truth: Leaves
    noise: list[float]
    tolerance: float
    floor: float

    def compare(self, got: Leaves, truth: Leaves | None = None) -> list[LeafError]:
        """The error of each leaf, against another truth if one is given."""
        truth = self.truth if truth is None else truth
        whole = norm(truth)
        errors = []
        for path, g, t, noise in zip(self.paths, got, truth, self.noise, strict=True):
            size = norm([t])
            allowed = self.tolerance * size + _NOISE * noise + self.floor * whole
            errors.append(LeafError(path, norm([g - t]), size, allowed))
        return errors

    def agrees(self, got: Leaves, truth: Leaves | None = None) -> bool:
        return all(error.passed for error in self.compare(got, truth))

    def entry(self, got: Leaves, name: str, **kwargs) -> Entry:
        error = relative_error(got, self.truth)
        return Entry(name, error=error, leaves=tuple(self.compare(got)), **kwargs)


def make_yardstick(
    paths: list[str], truth: Leaves, samples: list[Leaves], tolerance: float, eps: float
) -> Yardstick:
    """`samples`: the gradient of the full batch, computed in the user's precision."""
    noise = [
        max([norm([one[i] - truth[i]]) for one in samples], default=0.0)
        for i in range(len(truth))
    ]
    return Yardstick(paths, truth, noise, tolerance, eps)


def norm(leaves: Leaves) -> float:
    return float(np.sqrt(sum(float((np.abs(leaf) ** 2).sum()) for leaf in leaves)))


def relative_error(got: Leaves, truth: Leaves) -> float:
    difference = norm([g - t for g, t in zip(got, truth, strict=True)])
    size = norm(truth)
    return difference / size if size else float("nan")


def project(got: Leaves, onto: Leaves) -> float:
    """The factor that brings `onto` nearest to `got`."""
    product = sum(float(np.vdot(o, g).real) for g, o in zip(got, onto, strict=True))
    size = norm(onto) ** 2
    return product / size if size else 0.0


def add(trees: list[Leaves]) -> Leaves:
    return [sum(leaves) for leaves in zip(*trees, strict=True)]


def times(factor: float, leaves: Leaves) -> Leaves:
    return [factor * leaf for leaf in leaves]
