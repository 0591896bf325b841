"""The micro-batches of a split, one by one, in higher precision."""

import dataclasses

import numpy as np

from ._audit_compare import Leaves, add
from ._audit_problem import Problem, Sums


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The sums of each micro-batch of a split.

    Attributes:
        layout: `strided` (rows i, i + k, ...) or `contiguous` (the i-th part).
        parts: the micro-batches.
    """

    layout: str
    parts: list[Sums]

    @property
    def count(self) -> int:
        return len(self.parts)

    def weights(self) -> dict[str, float]:
        """The weight of each term, added over the micro-batches."""
        names = self.parts[0].weights
        return {name: sum(part.weights[name] for part in self.parts) for name in names}

    def summed(self, weights: dict[str, float] | None = None) -> Leaves:
        """What exact accumulation of this loss comes to."""
        weights = self.weights() if weights is None else weights
        return add([part.mean_gradient(weights) for part in self.parts])


def split(problem: Problem, count: int, layout: str = "strided") -> Pieces:
    """All micro-batches of one way to cut the rows."""
    rows = np.arange(problem.rows)
    if layout == "strided":
        whiches = [rows[i::count] for i in range(count)]
    else:
        whiches = np.split(rows, count)
    parts = [problem.sums(which, index=i) for i, which in enumerate(whiches)]
    return Pieces(layout, parts)
