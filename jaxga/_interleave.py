"""The micro-batches of one cycle, laid out as the rows of one batch.

Row `r` of micro-batch `i` becomes row `r * accum_steps + i`: the step takes rows
`i, i + accum_steps, ...` for micro-batch `i`, on any number of devices.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._batches import count_rows
from ._checks import PyTree, check_array, describe, place


class Interleaver:
    """Takes the micro-batches of a cycle one by one, and copies each row once.

    Attributes:
        count: the micro-batches taken so far.
        signature: a number that two cycles share if their micro-batches are alike.
    """

    def __init__(self, accum_steps: int, cycle: int, num_devices: int):
        self.count = 0
        self.signature = 0
        self._accum_steps = accum_steps
        self._cycle = cycle
        self._num_devices = num_devices
        self._columns = []

    def add(self, microbatch: PyTree) -> None:
        """Takes a micro-batch, or refuses it and stays as it was."""
        name = f"cycle {self._cycle}: microbatch[{self.count}]"
        if self.count == 0:
            self._check_first(name, microbatch)
        paths, structure = jax.tree.flatten_with_path(microbatch)
        leaves = [_as_array(f"{name}{place(path)}", leaf) for path, leaf in paths]
        if self.count == 0:
            self._make_columns(name, leaves, paths, structure)
        elif structure != self._structure:
            raise ValueError(
                f"{name} has the structure {structure}, but microbatch[0] has "
                f"{self._structure}: all micro-batches of a cycle must be alike."
            )
        for column, leaf, (path, _) in zip(self._columns, leaves, paths, strict=True):
            column.check(f"{name}{place(path)}", leaf)
        for column, leaf in zip(self._columns, leaves, strict=True):
            column.add(leaf)
        self.count += 1

    def finish(self) -> PyTree:
        """The batch. Room that is left over is filled with copies of micro-batch 0.

        Rows of zeros could give NaN to whoever computes them nevertheless.
        """
        leaves = [column.finish(self._accum_steps) for column in self._columns]
        return jax.tree.unflatten(self._structure, leaves)

    def _check_first(self, name, microbatch):
        if isinstance(microbatch, str | bytes):
            raise TypeError(
                f"{name} is the string {microbatch!r}: is the iterable one batch? Give "
                "jaxga.cycles an iterable of batches, a data loader say."
            )
        rows = count_rows(microbatch, name)
        if rows % self._num_devices:
            above = -(-rows // self._num_devices) * self._num_devices
            raise ValueError(
                f"{name} has {rows} rows, which do not divide over this process's "
                f"{self._num_devices} devices. Use a multiple of {self._num_devices}, "
                f"or {_advice(above)}."
            )

    def _make_columns(self, name, leaves, paths, structure):
        self._structure = structure
        self._columns = [
            _HostColumn(f"{name}{place(path)}", leaf, self._accum_steps)
            if isinstance(leaf, np.ndarray)
            else _DeviceColumn(leaf)
            for leaf, (path, _) in zip(leaves, paths, strict=True)
        ]
        kinds = [(column.shape, str(column.dtype)) for column in self._columns]
        words = f"{self._accum_steps} {self._structure} {kinds}"
        self.signature = zlib.crc32(words.encode()) >> 1  # as int32


class _Column:
    """One leaf of all micro-batches of the cycle."""

    def __init__(self, leaf):
        self.shape, self.dtype = leaf.shape, leaf.dtype

    def check(self, name, leaf):
        if (leaf.shape, leaf.dtype) == (self.shape, self.dtype):
            return
        rows, *rest = self.shape
        problem = (
            f"{name} has shape {leaf.shape} and dtype {leaf.dtype}, but in "
            f"microbatch[0] it has {self.shape} and {self.dtype}: all micro-batches of "
            "a cycle must be alike."
        )
        if [*leaf.shape[1:]] == rest and leaf.shape and leaf.shape[0] < rows:
            problem += f" If it is a loader's shorter last batch, {_advice(rows)}."
        raise ValueError(problem)


class _HostColumn(_Column):
    def __init__(self, name, leaf, accum_steps):
        super().__init__(leaf)
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            raise TypeError(f"{name} is {describe(leaf)}, not an array of JAX.")
        # The dtype that it will have on the device: int32 for NumPy's int64.
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        self.rows = np.empty((leaf.shape[0], accum_steps, *leaf.shape[1:]), dtype)
        self.count = 0

    def add(self, leaf):
        self.rows[:, self.count] = leaf  # at once: loaders reuse their buffers
        self.count += 1

    def finish(self, accum_steps):
        self.rows[:, self.count :] = self.rows[:, :1]
        return self.rows.reshape(-1, *self.shape[1:])


class _DeviceColumn(_Column):
    """Arrays that lie on a device stay there."""

    def __init__(self, leaf):
        super().__init__(leaf)
        self.leaves = []

    def add(self, leaf):
        # What else comes is copied at once, too.
        self.leaves.append(leaf if isinstance(leaf, jax.Array) else jnp.array(leaf))

    def finish(self, accum_steps):
        missing = accum_steps - len(self.leaves)
        return _interleave([*self.leaves, *self.leaves[:1] * missing])


@jax.jit
def _interleave(leaves):
    return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])


def _as_array(name: str, leaf: Any) -> np.ndarray | jax.Array:
    """A leaf as an array of the host, or of this process's devices."""
    if isinstance(leaf, np.ndarray):
        return leaf
    array = check_array(name, leaf)
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not array.is_fully_addressable:
        raise ValueError(
            f"{name} is an array over several processes. Give each process's own rows, "
            "and let parallel= divide them."
        )
    return array


def _advice(rows):
    return (
        "pad it, and every other micro-batch likewise, as `batch, mask = "
        f"jaxga.pad_batch(batch, {rows}, accum_steps=1)`, and give the mask to the "
        "loss function as part of the batch"
    )
