"""Which micro-batches fit: a few sizes compiled, the others predicted."""

import math
from collections.abc import Callable, Sequence

# The least, a guess, one or two by lines, and the next as a proof: four as a rule. More
# where memory does not grow as described below, or predictions may be far off.
MOST_COMPILES = 6
_FAR = 0.025  # of a peak
# The next size is at most so many times the largest that was compiled.
_FURTHER = 16


class Search:
    """The largest of some sizes whose peak stays within a limit.

    A peak is the largest of several needs (the backward pass's, the update's), each of
    which grows evenly with the micro-batch, or not at all: over the sizes it never
    bends down. So the line through two sizes is too low beyond them, and too high
    between them. The last size, a single micro-batch, is apart: its program has no
    loop, and needs no accumulator.

    Attributes:
        sizes: rows of a micro-batch, ascending.
        limit: bytes.
        peaks: by size, what was found by compiling, in bytes; infinite if the compiler
            itself ran out of memory.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        limit: int,
        measure: Callable[[int], tuple[float, float]],
    ):
        """`measure(size)` compiles: the peak, and the temporaries in it."""
        self.sizes, self.limit, self._measure = list(sizes), limit, measure
        self.peaks, self._temporaries = {}, {}

    def run(self) -> int | None:
        """The largest size that fits, compiled; None if the least does not."""
        self._compile(self.sizes[0])
        while self.fitting and len(self.peaks) < MOST_COMPILES:
            size = self._next()
            if size is None:
                break
            self._compile(size)
        return self.fitting[-1] if self.fitting else None

    def refine(self) -> None:
        """Compiles what is left in doubt."""
        while len(self.peaks) < MOST_COMPILES:
            size = self._most_doubtful()
            if size is None:
                break
            self._compile(size)

    def predict(self, size: int) -> float:
        """The peak of a size, from those that were compiled; infinite beyond such."""
        if size in self.peaks:
            return self.peaks[size]
        if any(s < size and peak == math.inf for s, peak in self.peaks.items()):
            return math.inf
        return sum(self._bounds(size)) / 2

    def _bounds(self, size):
        """The least and the most that a size needs; beyond all others, the least."""
        known = self._known()
        below = [k for k in known if k < size]
        above = [k for k in known if k > size]
        pairs = [pair for pair in (below[-2:], above[:2]) if len(pair) == 2]
        least = max([self._line(*p, size) for p in pairs] + [self.peaks[below[-1]]])
        if not above:
            return least, least
        most = self._line(below[-1], above[0], size)
        return min(least, most), most

    def _most_doubtful(self):
        """The size whose prediction may be furthest off; None if all are good."""
        known = self._known()
        between = [s for s in self.sizes if known[0] < s < known[-1]]
        unsure = [s for s in between if s not in known and self._doubt(s) > _FAR]
        return max(unsure, key=self._doubt, default=None)

    def _doubt(self, size):
        """How far a prediction may be off, as a part of it."""
        least, most = self._bounds(size)
        return (most - least) / (most + least)

    @property
    def fitting(self) -> list[int]:
        """The sizes that were compiled and fit."""
        return sorted(size for size, peak in self.peaks.items() if peak <= self.limit)

    def _compile(self, size):
        self.peaks[size], self._temporaries[size] = self._measure(size)

    def _known(self):
        """Compiled sizes that lie on one curve."""
        alone = self.sizes[-1] if len(self.sizes) > 1 else None
        return sorted(s for s, p in self.peaks.items() if s != alone and p < math.inf)

    def _line(self, a, b, size):
        slope = (self.peaks[b] - self.peaks[a]) / (b - a)
        return self.peaks[a] + slope * (size - a)

    def _next(self):
        """The largest size that may fit yet, or else the next, to prove that it does
        not; None if that is proved."""
        best = self.fitting[-1]
        ceiling = min((s for s in self.peaks if s > best), default=math.inf)
        untried = [size for size in self.sizes if best < size < ceiling]
        if not untried:
            return None
        if self.peaks.get(ceiling) == math.inf:
            return untried[len(untried) // 2]
        known = self._known()
        if len(known) < 2:
            return self._guess(untried)
        may = [s for s in untried if self._bounds(s)[0] <= self.limit]
        likely = [s for s in may if self.predict(s) <= self.limit]
        within = [s for s in likely if s <= _FURTHER * known[-1]]
        return max(within, default=(may or untried)[len(may) // 2])

    def _guess(self, untried):
        """As if every temporary grew with the micro-batch: such a size does fit."""
        least = self.sizes[0]
        temporaries = max(self._temporaries[least], 1)
        kept = self.peaks[least] - self._temporaries[least]
        most = (self.limit - kept) / temporaries * least
        within = [s for s in untried if s <= most and s != self.sizes[-1]]
        return max(within, default=untried[0])
