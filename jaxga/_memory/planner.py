"""Compiles a step for some micro-batches, and makes a plan of what it needs."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from .._batch_sizes import BatchSizes
from .budget import largest_everywhere
from .flops import count_flops
from .plan import MemoryPlan, MemoryRow, in_words, usable
from .search import Search

# Of the budget, for what no compiled program knows of: see `plan_memory`.
MARGIN = 0.08

# A peak beyond everything: that of a program too large for its compiler.
_BOUNDLESS = 2**61


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step that can be compiled, and its arithmetic."""

    lowered: jax.stages.Lowered
    flops: int | None

    @classmethod
    def of(cls, step: Any, *args: Any, **keywords: Any) -> "Lowered":
        if not hasattr(step, "trace"):
            return cls(step.lower(*args, **keywords), None)
        traced = step.trace(*args, **keywords)
        return cls(traced.lower(), count_flops(traced.jaxpr))


class Planner:
    """Finds the largest micro-batch that fits."""

    def __init__(
        self,
        lower: Callable[[BatchSizes], Lowered],
        global_batch_size: int,
        num_devices: int,
        devices: Iterable[Any],
        budget_bytes: int,
    ):
        self._lower, self._devices, self._budget = lower, list(devices), budget_bytes
        self._least = BatchSizes(
            global_batch_size=global_batch_size,
            microbatch_size=1,
            num_devices=num_devices,
        )
        self._rows = {}
        limit = usable(budget_bytes, MARGIN)
        sizes = _divisors(self._least.accum_steps)
        self._search = Search(sizes, limit, self._measure)

    def run(self, *, refine: bool) -> MemoryPlan:
        """`refine`: compiles what makes predictions better, too.

        Raises:
            ValueError: nothing fits.
        """
        best = self._search.run()
        if best is None:
            raise ValueError(self._refusal())
        if refine:
            self._search.refine()
            best = self._search.fitting[-1]
        largest = max(self._rows)
        shown = [size for size in self._search.sizes if size <= largest]
        chosen = self._rows[best]
        return MemoryPlan(
            microbatch_size=best,
            accum_steps=chosen.accum_steps,
            peak_bytes=chosen.peak_bytes,
            global_batch_size=self._least.global_batch_size,
            num_devices=self._least.num_devices,
            device_kind=self._devices[0].device_kind,
            budget_bytes=self._budget,
            margin=MARGIN,
            rows=tuple(map(self._row, shown)),
        )

    def _measure(self, size):
        sizes = self._sizes(size)
        row = _compile(self._lower(sizes), sizes)
        own = _BOUNDLESS if row is None else row.peak_bytes
        peak = largest_everywhere(own, self._devices)
        if row is None or peak == _BOUNDLESS:
            self._rows[size] = _boundless(sizes, compiled=True)
            return math.inf, math.inf
        # Where processes find different peaks, the largest is everyone's.
        temp = row.temp_bytes + peak - row.peak_bytes
        fits = peak <= self._search.limit
        self._rows[size] = dataclasses.replace(
            row, peak_bytes=peak, temp_bytes=temp, fits=fits
        )
        return peak, temp

    def _sizes(self, size):
        steps = self._least.accum_steps // size
        return dataclasses.replace(self._least, microbatch_size=size, accum_steps=steps)

    def _row(self, size):
        if size in self._rows:
            return self._rows[size]
        sizes, peak = self._sizes(size), self._search.predict(size)
        if peak == math.inf:
            return _boundless(sizes, compiled=False)
        like, peak = self._rows[self._search.fitting[-1]], round(peak)
        return MemoryRow(
            microbatch_size=size,
            accum_steps=sizes.accum_steps,
            peak_bytes=peak,
            argument_bytes=like.argument_bytes,
            result_bytes=like.result_bytes,
            temp_bytes=peak - like.argument_bytes - like.result_bytes,
            compiled=False,
            fits=peak <= self._search.limit,
        )

    def _refusal(self):
        (row,) = self._rows.values()
        needs = "more memory than the compiler itself had"
        if row.peak_bytes is not None:
            parts = {
                "arguments": row.argument_bytes,
                "results that replace no argument": row.result_bytes,
                "temporaries": row.temp_bytes,
            }
            parts = ", ".join(f"{in_words(n)} of {name}" for name, n in parts.items())
            needs = f"{in_words(row.peak_bytes)} on each device ({parts})"
        return (
            f"Not even a micro-batch of 1 fits. It needs {needs}; of the budget of "
            f"{in_words(self._budget)}, {in_words(self._search.limit)} may be used "
            f"({MARGIN:.0%} are kept free). Smaller temporaries: jax.checkpoint around "
            "the layers, scanned layers, shorter rows. Smaller arguments: "
            "DataParallel(mesh, zero=1), 2 or 3 over more devices, an optimizer with "
            "less state. Smaller results: donate=True."
        )


def _boundless(sizes, compiled):
    size, steps = sizes.microbatch_size, sizes.accum_steps
    return MemoryRow(size, steps, None, None, None, None, compiled, fits=False)


def _compile(made, sizes):
    """What the compiled step needs; None if the compiler ran out of memory."""
    try:
        memory = made.lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        # Some compilers (TPU's) refuse what does not fit; others never do.
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return None
    if memory is None:
        raise ValueError("This backend does not say how much memory a program needs.")
    # Not peak_memory_in_bytes, which on a CPU leaves the temporaries out.
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return MemoryRow(
        microbatch_size=sizes.microbatch_size,
        accum_steps=sizes.accum_steps,
        peak_bytes=arguments + results + temporaries,
        argument_bytes=arguments,
        result_bytes=results,
        temp_bytes=temporaries,
        compiled=True,
        fits=True,
        flops=made.flops,
    )


def _divisors(number):
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
