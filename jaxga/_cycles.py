"""Cycles from a stream of micro-batches."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ._agreement import agree, check_shares, surplus_error
from ._checks import PyTree, check_count, check_flag, describe, name_of_type
from ._cycle_reader import CycleReader
from ._parallel import DataParallel


def cycles(
    iterable: Iterable[PyTree],
    accum_steps: int | tuple[Callable[[int], int], int],
    *,
    parallel: DataParallel | None = None,
    drop_last: bool = False,
) -> "Cycles":
    """Groups a stream of micro-batches into cycles, and prepares them ahead.

    The stream may have any length: the micro-batches that remain at its end are a short
    cycle, which is exact. While one cycle computes, a thread reads the next from the
    stream and moves it to the devices.

    Args:
        iterable: yields micro-batches: pytrees of arrays, each of shape
            `(rows, ...)`, alike within a cycle. NumPy arrays are copied once, into the
            cycle's batch; arrays on a device are put together there. The stream
            belongs to the cycles: they read ahead of what they hand out.
        accum_steps: micro-batches per cycle, the number that the step has too. Or
            `(function, maximum)`, for a batch size that grows: a cycle then has
            `function(updates)` micro-batches, where `updates` counts the cycles before
            it (also those that a step skips), and the batch has room for `maximum`,
            the step's number.
        parallel: the `DataParallel` over whose devices the batch is divided; by default
            it is put on JAX's default device.
        drop_last: leave out a last cycle that is short.

    Returns:
        An iterator of `(batch, num_microbatches)`, for
        `step(state, batch, num_microbatches=num_microbatches)`. `batch` has leaves of
        shape `(rows * accum_steps, ...)`, the same for every cycle: row `r` of
        micro-batch `i` is row `r * accum_steps + i`, and micro-batches that are not
        there are copies of the first, never computed. `num_microbatches` is an
        `np.int32`, so that a short cycle recompiles nothing.

        Its `get_state()` is the position after the last cycle that was handed out, and
        its `set_state(state)` goes on from there, whatever was read ahead. The source
        must have both methods itself, as Grain's iterators do.

        An error that the stream raises is raised in place of the cycle it belongs to.
        What had been read of that cycle is kept: the next call goes on with it.

        With several processes each reads its own rows, equally many per micro-batch,
        and asks for cycles in the same order among its steps. They agree on every cycle
        before it is handed out, so that all end together. A process whose stream is
        shorter ends the last cycle for all; if others then have micro-batches left,
        each process raises, after that cycle, an error that counts them: they cannot be
        computed without it. `drop_last=True` says that they may be lost.

    Raises:
        TypeError: no iterable, or one that is a single batch; `accum_steps` is no
            integer, or a function without a maximum; `parallel` is no `DataParallel`;
            leaves that are no arrays; a source without a position when asked for it.
        ValueError: a number of micro-batches below 1 or above the maximum;
            micro-batches of one cycle that are not alike, or do not divide over the
            devices; processes that disagree.
        RuntimeError: another process failed to read its part.

    Example:
        >>> import jaxga
        >>> import numpy as np
        >>> stream = ({"x": np.array([i, 10 * i])} for i in range(1, 6))
        >>> for batch, num_microbatches in jaxga.cycles(stream, 3):
        ...     print(batch["x"], num_microbatches)
        [ 1  2  3 10 20 30] 3
        [ 4  5  4 40 50 40] 2

        With a batch size that grows, from one micro-batch to three:

        >>> stream = (np.array([i]) for i in range(1, 7))
        >>> for batch, n in jaxga.cycles(stream, (lambda n: min(n + 1, 3), 3)):
        ...     print(batch, n)
        [1 1 1] 1
        [2 3 2] 2
        [4 5 6] 3
    """
    plan, maximum = _check_plan(accum_steps)
    if parallel is not None and not isinstance(parallel, DataParallel):
        raise TypeError(
            f"parallel is {describe(parallel)}; it must be a jaxga.DataParallel."
        )
    check_flag("drop_last", drop_last)
    reader = CycleReader(_check_stream(iterable), plan, maximum, parallel)
    return Cycles(reader, bool(drop_last))


class Cycles(Iterator):
    """The iterator that `jaxga.cycles` returns."""

    def __init__(self, reader: CycleReader, drop_last: bool):
        self._reader = reader
        self._drop_last = drop_last
        self._restart(updates=0)
        # The reader itself takes care of the exit of the interpreter.
        weakref.finalize(self, reader.stop).atexit = False

    def _restart(self, updates):
        self._updates = updates
        self._begun = self._ended = False
        self._position = self._surplus = None

    def __next__(self) -> tuple[PyTree, np.int32]:
        if self._ended:
            self._end()
        if not self._begun:
            self._position, self._begun = self._reader.position(), True
        share, error = self._reader.wait(self._updates)
        shares = agree(share)  # also by a process that has failed, or has no more
        if error is not None:
            _reraise(error)
        check_shares(shares)
        cycle, count = self._reader.take(), min(s.count for s in shares.values())
        if count < cycle.planned:
            self._ended = True
            self._surplus = None if self._drop_last else surplus_error(shares)
            if self._drop_last or not count:
                self._end()
        self._position = cycle.positions[count - 1]
        self._updates += 1
        if not self._ended:
            self._reader.start(self._updates)
        return cycle.batch, np.int32(count)

    def _end(self):
        surplus, self._surplus = self._surplus, None
        raise surplus or StopIteration

    def get_state(self) -> dict[str, Any]:
        """The position after the last cycle that was handed out.

        Returns:
            A dict: `"source"`, the state of the source, and `"updates"`, the cycles
            handed out, from which `accum_steps` goes on if it is a function.

        Raises:
            TypeError: the source has no `get_state` and `set_state`.
        """
        self._check_position("get_state")
        position = self._position if self._begun else self._reader.position()
        if isinstance(position, Exception):
            raise position
        return {"source": position, "updates": self._updates}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a position; what was read ahead is discarded.

        Args:
            state: what `get_state` returned, here or in an earlier run.

        Raises:
            TypeError: the source has no `get_state` and `set_state`.
            ValueError: the state of something else.
        """
        self._check_position("set_state")
        if not isinstance(state, Mapping) or set(state) != {"source", "updates"}:
            raise ValueError(
                f"set_state: the state is {describe(state)}; it must be a dict of "
                '"source" and "updates", as get_state of jaxga.cycles returns it.'
            )
        updates = check_count('state["updates"]', state["updates"], at_least=0)
        self._reader.reset(state["source"])
        self._restart(updates)

    def _check_position(self, method):
        if not self._reader.has_position:
            raise TypeError(
                f"{method}: the source of the cycles, of type "
                f"{name_of_type(self._reader.source)}, has no get_state and set_state. "
                "Give jaxga.cycles an iterator that has both, as Grain's have."
            )


def _reraise(error):
    if isinstance(error, StopIteration):  # would end the consumer's loop in silence
        raise RuntimeError("accum_steps raised StopIteration.") from error
    raise error


def _check_plan(accum_steps):
    """The micro-batches of each cycle, by its number, and the most of them."""
    if callable(accum_steps):
        raise TypeError(
            "accum_steps is a function without a maximum; give (function, maximum), "
            "the maximum being the accum_steps of the step."
        )
    if not isinstance(accum_steps, tuple):
        fixed = check_count("accum_steps", accum_steps)
        return lambda updates: fixed, fixed
    if len(accum_steps) != 2 or not callable(accum_steps[0]):
        raise TypeError(
            f"accum_steps={accum_steps!r} must be an integer or (function, maximum), "
            "the function from the number of updates to that of micro-batches."
        )
    function = accum_steps[0]
    maximum = check_count("the maximum of accum_steps", accum_steps[1])

    def plan(updates):
        name = f"accum_steps: the function's value for update {updates}, "
        planned = check_count(f"{name}function({updates})", function(updates))
        if planned > maximum:
            raise ValueError(
                f"{name}function({updates})={planned}, is more than the {maximum=}."
            )
        return planned

    return plan, maximum


def _check_stream(iterable):
    is_array = isinstance(iterable, np.ndarray | jax.Array)
    is_tuple_of_arrays = isinstance(iterable, tuple) and any(
        hasattr(item, "shape") for item in iterable
    )
    if isinstance(iterable, Mapping | str | bytes) or is_array or is_tuple_of_arrays:
        raise TypeError(
            f"The iterable is {describe(iterable)}: one batch, or none. Give "
            "jaxga.cycles an iterable of batches: a data loader, a generator, a list."
        )
    try:
        return iter(iterable)
    except TypeError as error:
        raise TypeError(
            f"The iterable is {describe(iterable)}, which cannot be iterated over. "
            "Give jaxga.cycles an iterable of micro-batches, a data loader say."
        ) from error
