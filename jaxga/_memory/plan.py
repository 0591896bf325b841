"""What a plan of memory says: one row for each size of the micro-batch, as data."""

import dataclasses

from .._batch_sizes import BatchSizes


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """What a micro-batch needs on each device, in bytes.

    Attributes:
        microbatch_size: rows per device and forward pass.
        accum_steps: micro-batches per update.
        peak_bytes: `argument_bytes + result_bytes + temp_bytes`; None if the compiler
            itself ran out of memory.
        argument_bytes: the state, the batch, and what else is passed.
        result_bytes: results that do not take the place of a donated argument.
        temp_bytes: all between: activations, sums, the optimizer's work.
        compiled: whether this was read off the compiled step, or predicted.
        fits: whether the peak stays within the plan's `usable_bytes`.
        flops: operations of all matrix products and convolutions of an update, over all
            devices; None where the step was not compiled, or cannot be traced
            (`.trace`), or has products in a loop whose length only the run decides.
    """

    microbatch_size: int
    accum_steps: int
    peak_bytes: int | None
    argument_bytes: int | None
    result_bytes: int | None
    temp_bytes: int | None
    compiled: bool
    fits: bool
    flops: int | None = None


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The micro-batch to take, and what the others need. Prints as a table.

    Attributes:
        microbatch_size: the largest that fits.
        accum_steps: micro-batches per update with it.
        peak_bytes: what the compiled step needs on each device with it.
        global_batch_size: examples per update, the same for all sizes.
        num_devices: over which the batch is divided.
        device_kind: what they are.
        budget_bytes: memory of one device.
        margin: the part of the budget that is kept free.
        rows: one `MemoryRow` for each size up to the largest that was compiled.
    """

    microbatch_size: int
    accum_steps: int
    peak_bytes: int
    global_batch_size: int
    num_devices: int
    device_kind: str
    budget_bytes: int
    margin: float
    rows: tuple[MemoryRow, ...]

    @property
    def usable_bytes(self) -> int:
        """The budget less the margin."""
        return usable(self.budget_bytes, self.margin)

    def __repr__(self):
        table = [_HEADER, *map(self._line, self.rows)]
        return "\n".join([*self._head(), *_aligned(table)])

    def _head(self):
        sizes = BatchSizes(
            microbatch_size=self.microbatch_size,
            accum_steps=self.accum_steps,
            num_devices=self.num_devices,
        )
        peak, most, budget = map(
            in_words, (self.peak_bytes, self.usable_bytes, self.budget_bytes)
        )
        yield f"{sizes} ({self.device_kind})"
        yield f"{peak} per device, of {most} ({budget} less {self.margin:.0%})"

    def _line(self, row):
        if row.peak_bytes is None:
            numbers = ("", "", "", "over")
        else:
            numbers = map(
                in_words,
                (row.argument_bytes, row.result_bytes, row.temp_bytes, row.peak_bytes),
            )
        chosen = row.microbatch_size == self.microbatch_size
        verdict = "chosen" if chosen else "fits" if row.fits else "too large"
        return (
            str(row.microbatch_size),
            str(row.accum_steps),
            *numbers,
            "compiled" if row.compiled else "predicted",
            "" if row.flops is None else f"{row.flops:.3g}",
            verdict,
        )


def usable(budget_bytes: int, margin: float) -> int:
    """The budget less the margin."""
    return int(budget_bytes * (1 - margin))


def in_words(number: int) -> str:
    """Bytes as people read them."""
    if number < 1024:
        return f"{number} B"
    power = 1 + (number >= 1024**2) + (number >= 1024**3)
    return f"{number / 1024**power:.2f} {'KMG'[power - 1]}iB"


_HEADER = (
    "micro-batch",
    "accum_steps",
    "arguments",
    "results",
    "temporaries",
    "peak",
    "",
    "flops",
    "",
)


def _aligned(table):
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = zip(line, widths, strict=True)
        yield "  ".join(cell.rjust(width) for cell, width in cells).rstrip()
