"""The micro-batches of a split, one by one, in higher precision."""

import dataclasses

import numpy as np

from .compare import Leaves, add
from .problem import Problem, Sums


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The sums of each micro-batch of a split.

    Attributes:
        accum_steps: micro-batches of each device, of rows i, i + k, ... of its own.
        num_devices: devices, which hold consecutive rows.
        parts: the micro-batches of all devices.
    """

    accum_steps: int
    num_devices: int
    parts: list[Sums]

    @property
    def count(self) -> int:
        return len(self.parts)

    @property
    def words(self) -> str:
        steps, devices = self.accum_steps, self.num_devices
        if devices == 1:
            return f"{steps} micro-batches of rows i, i + {steps}, ..."
        if steps == 1:
            return f"{devices} parts of consecutive rows (micro-batches, or devices)"
        return f"{steps} micro-batches on each of {devices} devices"

    def grads(self) -> list[Leaves]:
        """The gradient of each term of each micro-batch."""
        return [grads for part in self.parts for grads in part.grads.values()]

    def weights(self) -> dict[str, float]:
        """The weight of each term, added over the micro-batches."""
        names = self.parts[0].weights
        return {name: sum(part.weights[name] for part in self.parts) for name in names}

    def summed(self, weights: dict[str, float] | None = None) -> Leaves:
        """What exact accumulation of this loss comes to."""
        weights = self.weights() if weights is None else weights
        return add([part.mean_gradient(weights) for part in self.parts])


def split(problem: Problem, accum_steps: int, num_devices: int = 1) -> Pieces:
    """All micro-batches of one way to cut the rows, as jaxga's cycle cuts them."""
    parts = [
        problem.sums(own[i::accum_steps], index=i)
        for own in np.split(np.arange(problem.rows), num_devices)
        for i in range(accum_steps)
    ]
    return Pieces(accum_steps, num_devices, parts)
