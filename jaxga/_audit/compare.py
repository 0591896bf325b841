"""How far a gradient may be from the truth before it counts as wrong."""

import dataclasses
import functools

import numpy as np

from .report import Entry, LeafError

Leaves = list[np.ndarray]

WHOLE = "the whole gradient"

# The rounding of an accumulated gradient is not that of the full batch's, only alike:
# in 400 small problems of bfloat16 and float16 at most 3.1 times as large.
_NOISE = 5


@dataclasses.dataclass(frozen=True)
class Span:
    """Gradients of which an error may be made up: the truth, micro-batches, terms.

    Rounding is nearly at right angles to them: in the few numbers that say how much of
    each is in an error, the rounding of many entries averages out.

    Attributes:
        path: what they are, in words.
        leaves: which leaves they are of.
        parts: the gradients.
        noise: how much of a right gradient's rounding is made up of them.
    """

    path: str
    leaves: slice
    parts: list[Leaves]
    noise: float = 0.0

    def within(self, samples: list[Leaves]) -> "Span":
        noise = max(map(self.share, samples), default=0.0)
        return dataclasses.replace(self, noise=noise)

    def share(self, error: Leaves) -> float:
        """The norm of what of an error is made up of the parts."""
        if not np.isfinite(norm(error)):
            return float("nan")
        products = np.array([_dot(part, error[self.leaves]) for part in self.parts])
        return float(np.sqrt(max(products @ self._inverse @ products, 0.0)))

    @functools.cached_property
    def _inverse(self):
        gram = np.array([[_dot(a, b) for b in self.parts] for a in self.parts])
        scale = np.sqrt(gram.diagonal())
        scale = np.outer(scale, scale)
        return np.linalg.pinv(gram / scale, rcond=1e-6, hermitian=True) / scale


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """The truth, and what may lie between it and a right gradient.

    A leaf may differ by `tolerance` of its norm; by several times as much as the full
    batch's own gradient does in the user's precision (some leaves are nothing but
    rounding: the key bias of an attention has a gradient of zero); and by `floor` of
    the norm of the whole gradient. So may what of the difference is made up of a span.

    Attributes:
        paths: where the leaves stand.
        truth: the leaves.
        samples: what the full batch's own gradient differs by, rounded in several ways.
        tolerance: relative to each leaf.
        floor: relative to the whole.
        factor: how many times as large as the samples' a right gradient's rounding may
            be.
        spans: what errors may be made up of.
    """

    paths: list[str]
    truth: Leaves
    samples: list[Leaves]
    tolerance: float
    floor: float
    factor: float = _NOISE
    spans: tuple[Span, ...] = ()

    @functools.cached_property
    def noise(self) -> list[float]:
        """For each leaf, how far the full batch's own gradient is from the truth."""
        return [
            max((norm([sample[i]]) for sample in self.samples), default=0.0)
            for i in range(len(self.truth))
        ]

    @property
    def is_loose(self) -> bool:
        """Whether rounding may hide faults, unless one looks along what they are."""
        noise = self.factor * np.linalg.norm(self.noise)
        return bool(noise > self.tolerance * norm(self.truth))

    def spanned(self, path: str, parts: list[Leaves], leaves=slice(None)):
        """With another span to look along."""
        parts = [part for part in parts if norm(part)]
        if not parts:
            return self
        span = Span(path, leaves, parts).within(self.samples)
        return dataclasses.replace(self, spans=(*self.spans, span))

    @property
    def accuracy(self) -> float:
        """How well a factor of the whole gradient is known."""
        along = max((one.noise for one in self.spans if one.path == WHOLE), default=0.0)
        return self.tolerance + self.factor * along / (norm(self.truth) or 1.0)

    def compare(self, got: Leaves, truth: Leaves | None = None) -> list[LeafError]:
        """The error of each leaf and along each span, against another truth if given.

        What of a leaf's error is made up of the leaf stands in place of the whole error
        where that alone is too large.
        """
        truth = self.truth if truth is None else truth
        difference = [g - t for g, t in zip(got, truth, strict=True)]
        whole = norm(truth)

        def error(path, difference, size, noise):
            allowed = self.tolerance * size + self.factor * noise + self.floor * whole
            return LeafError(path, difference, size, allowed)

        leaves = zip(self.paths, difference, truth, self.noise, strict=True)
        errors = {p: error(p, norm([d]), norm([t]), noise) for p, d, t, noise in leaves}
        for span in self.spans:
            size = norm(truth[span.leaves])
            along = error(span.path, span.share(difference), size, span.noise)
            if span.path not in errors or errors[span.path].passed > along.passed:
                errors[span.path] = along
        return list(errors.values())

    def worst(self, got: Leaves) -> LeafError:
        """The leaf that is furthest out."""
        leaves = self.compare(got)[: len(self.paths)]
        return max(leaves, key=lambda error: error.excess)

    def agrees(self, got: Leaves, truth: Leaves | None = None) -> bool:
        return all(error.passed for error in self.compare(got, truth))

    def entry(self, got: Leaves, name: str, **kwargs) -> Entry:
        error = relative_error(got, self.truth)
        return Entry(name, error=error, leaves=tuple(self.compare(got)), **kwargs)


def make_yardstick(
    paths: list[str], truth: Leaves, samples: list[Leaves], **options
) -> Yardstick:
    """`samples`: the truth's leaves, computed in the user's precision."""
    finite = [one for one in samples if all(np.isfinite(leaf).all() for leaf in one)]
    samples = [[s - t for s, t in zip(one, truth, strict=True)] for one in finite]
    return Yardstick(paths, truth, samples, **options)


def along_itself(yardstick: Yardstick, terms: list[Leaves]) -> Yardstick:
    """The yardstick of a gradient, with the spans that every gradient has."""
    paths, truth = yardstick.paths, yardstick.truth
    for i, (path, leaf) in enumerate(zip(paths, truth, strict=True)):
        yardstick = yardstick.spanned(path, [[leaf]], slice(i, i + 1))
    yardstick = yardstick.spanned(WHOLE, [truth])
    several = len(terms) > 1
    return yardstick.spanned("the terms", terms) if several else yardstick


def norm(leaves: Leaves) -> float:
    return float(np.sqrt(sum(float((np.abs(leaf) ** 2).sum()) for leaf in leaves)))


def relative_error(got: Leaves, truth: Leaves) -> float:
    difference = norm([g - t for g, t in zip(got, truth, strict=True)])
    size = norm(truth)
    return difference / size if size else float("nan")


def project(got: Leaves, onto: Leaves) -> float:
    """The factor that brings `onto` nearest to `got`."""
    size = norm(onto) ** 2
    return _dot(got, onto) / size if size else 0.0


def _dot(a: Leaves, b: Leaves) -> float:
    return sum(float(np.vdot(x, y).real) for x, y in zip(a, b, strict=True))


def add(trees: list[Leaves]) -> Leaves:
    return [sum(leaves) for leaves in zip(*trees, strict=True)]


def times(factor: float, leaves: Leaves) -> Leaves:
    return [factor * leaf for leaf in leaves]
