"""Metrics that are no mean: how each merges over micro-batches and devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from ._axes import AxisNames, full_of_type
from ._dtypes import as_sum
from ._merge import MergeType, check_same_kind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Elementwise(MergeType):
    value: ArrayLike

    _prepare = staticmethod(jnp.asarray)

    def merge(self, other):
        """Joins two parts of the data."""
        check_same_kind(self, other)
        return type(self)(self._join(self.finalize(), other.finalize()))

    def all_reduce(self, axis_name: AxisNames):
        """The merge over all devices of the mesh axis or axes `axis_name`."""
        return type(self)(self._collective(self.finalize(), axis_name))

    def finalize(self) -> jax.Array:
        """The merged value."""
        return self._prepare(self.value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(_Elementwise):
    """A metric that adds up: tokens seen, sequences truncated.

    Attributes:
        value: array of numbers. Integers and booleans are summed in at least int32,
            floats in at least float32.

    Example:
        >>> import jaxga
        >>> print(jaxga.Sum(3).merge(jaxga.Sum(4)).finalize())
        7
    """

    _prepare = staticmethod(as_sum)
    _join = staticmethod(jnp.add)
    _collective = staticmethod(lax.psum)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max(_Elementwise):
    """A metric of which the largest counts, entry by entry: a peak activation.

    Attributes:
        value: array of real numbers.

    Example:
        >>> import jaxga
        >>> print(jaxga.Max(3).merge(jaxga.Max(4)).finalize())
        4
    """

    _join = staticmethod(jnp.maximum)
    _collective = staticmethod(lax.pmax)

    def empty(self, accum_steps: int) -> "Max":
        return Max(full_of_type(self.value, _bounds(self.value.dtype)[0]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Min(_Elementwise):
    """A metric of which the smallest counts, entry by entry: a smallest margin.

    Attributes:
        value: array of real numbers.

    Example:
        >>> import jaxga
        >>> print(jaxga.Min(3).merge(jaxga.Min(4)).finalize())
        3
    """

    _join = staticmethod(jnp.minimum)
    _collective = staticmethod(lax.pmin)

    def empty(self, accum_steps: int) -> "Min":
        return Min(full_of_type(self.value, _bounds(self.value.dtype)[1]))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["stacked"]
)
@dataclasses.dataclass(frozen=True)
class Stack(MergeType):
    """A metric kept for every micro-batch, along a new leading axis.

    A cycle gives an array of shape `(accum_steps, *value.shape)`, on several devices
    `(num_devices * accum_steps, *value.shape)`, device by device. Where a cycle is
    short, the entries of the micro-batches that it lacks are NaN, or 0 for integers
    and booleans.

    Attributes:
        value: array of numbers, of one micro-batch.
        stacked: whether `value` has the leading axis already.

    Example:
        >>> import jaxga
        >>> print(jaxga.Stack(3.0).merge(jaxga.Stack(4.0)).finalize())
        [3. 4.]
    """

    value: ArrayLike
    stacked: bool = False

    def merge(self, other: "Stack") -> "Stack":
        """Joins two parts of the data, this one first."""
        check_same_kind(Stack(self.finalize()[0]), Stack(other.finalize()[0]))
        return Stack(jnp.concatenate([self.finalize(), other.finalize()]), True)

    def all_reduce(self, axis_name: AxisNames) -> "Stack":
        """The merge over all devices of `axis_name`, in the order of their index."""
        mine = self.finalize()
        size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
        # A sum of slots, not an all-gather: its result is known to be the same on
        # every device, so that `shard_map` lets it out unsharded.
        slots = jnp.zeros((size, *mine.shape), as_sum(mine).dtype)
        slots = lax.psum(slots.at[index].set(mine.astype(slots.dtype)), axis_name)
        return Stack(slots.astype(mine.dtype).reshape(-1, *mine.shape[1:]), True)

    def finalize(self) -> jax.Array:
        """The array with its leading axis of micro-batches."""
        value = jnp.asarray(self.value)
        return value if self.stacked else value[None]

    def empty(self, accum_steps: int) -> "Stack":
        one = self.value
        missing = jnp.nan if jnp.issubdtype(one.dtype, jnp.inexact) else 0
        filled = full_of_type(one, missing)[None]
        return Stack(jnp.broadcast_to(filled, (accum_steps, *one.shape)), True)

    def put(self, new: "Stack", index) -> "Stack":
        return Stack(
            lax.dynamic_update_index_in_dim(self.value, new.value, index, 0), True
        )


def _bounds(dtype):
    if dtype == jnp.bool_:
        return False, True
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
    if not np.isinf(np.asarray(np.inf).astype(dtype)):  # float8_e4m3fn has no infinity
        return jnp.finfo(dtype).min, jnp.finfo(dtype).max
    return -jnp.inf, jnp.inf
