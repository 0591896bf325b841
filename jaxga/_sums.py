"""Sums with their weights: sums merge, means do not."""

import dataclasses
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from ._axes import AxisNames
from ._checks import PyTree, check_numbers, check_real, describe
from ._dtypes import as_weight, at_least_float32
from ._merge import MergeType, check_same_kind

_MAX_COUNT = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum(MergeType):
    """A sum that has not been divided yet, and what it will be divided by.

    This is what a loss function returns, and what a metric is that ends as a mean.

    Attributes:
        total: the sum. A scalar for a loss, any array for a metric, a pytree for
            gradients.
        weight: scalar, what the sum is averaged over: valid tokens, examples,
            sequences. Integers count, floats weigh.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> losses = jnp.array([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
        >>> mask = jnp.array([[True, True, False], [True, False, False]])
        >>> total = jaxga.WeightedSum.of(losses, where=mask)
        >>> print(total.total, total.weight, total.mean())
        6.0 3 2.0
    """

    total: PyTree
    weight: ArrayLike

    # NumPy would otherwise take `np.float32(2) * a` apart by itself.
    __array_ufunc__ = None

    @classmethod
    def of(
        cls,
        values: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> "WeightedSum":
        """Sums unreduced values, and what they weigh.

        Args:
            values: array of rank 1 or more, one entry per token or per example.
            where: booleans that broadcast to the shape of `values`. Entries where it
                is false are left out: a NaN there does no harm to the sum.
            weights: numbers that broadcast to the shape of `values`. Each value is
                multiplied by its weight.

        Returns:
            `total`, a scalar of at least float32, and `weight`, a scalar: the number
            of entries, or the sum of their weights. int32 if it counts, at least
            float32 if `weights` are floats.

        Raises:
            TypeError: `where` is not boolean; `values` or `weights` are no numbers.
            ValueError: `values` is a scalar; `where` or `weights` do not broadcast to
                the shape of `values`, or could mean its rows and its columns alike;
                more than 2^31 - 1 entries.

        Example:
            >>> import jax.numpy as jnp
            >>> import jaxga
            >>> print(jaxga.WeightedSum.of(jnp.array([1.0, 5.0]),
            ...                            weights=jnp.array([0.5, 0.25])).mean())
            2.3333333
        """
        values = check_numbers("values", values)
        if values.ndim == 0:
            raise ValueError(
                "WeightedSum.of: values is a scalar: it is a mean already, or a sum of "
                "unknown weight. Pass the losses before they are reduced, one entry "
                "per token or example; or write WeightedSum.from_mean(mean, weight), "
                "or WeightedSum(total, weight)."
            )
        where = _broadcast_where(where, values.shape)
        weights = _broadcast("weights", weights, values.shape)
        weight = _sum_of_weights(values.shape, where, weights)
        dtype = at_least_float32(values.dtype)
        if weights is not None:
            values = values.astype(dtype) * weights
        if where is not None:
            values = jnp.where(where, values, jnp.zeros_like(values))
        return cls(jnp.sum(values, dtype=at_least_float32(values.dtype)), weight)

    @classmethod
    def from_mean(cls, mean: ArrayLike, weight: ArrayLike) -> "WeightedSum":
        """Undoes a division: for a loss that comes as a mean.

        Args:
            mean: scalar, or array for a metric.
            weight: scalar, exactly what the mean was divided by. Where it can be 0,
                guard your division, `total / jnp.maximum(count, 1)`: the gradient of
                0 / 0 is NaN.

        Returns:
            `total` is `mean * weight`; 0 where the weight is 0, even if the mean is NaN
            there.

        Raises:
            TypeError: `mean` or `weight` is no number.
            ValueError: `weight` is not a scalar.

        Example:
            >>> import jaxga
            >>> print(jaxga.WeightedSum.from_mean(2.5, 4).total)
            10.0
        """
        mean, weight = check_numbers("mean", mean), check_real("weight", weight)
        if weight.ndim:
            raise ValueError(
                f"WeightedSum.from_mean: weight has shape {weight.shape}; it must be "
                "a scalar, the number that the mean was divided by."
            )
        dtype = at_least_float32(mean.dtype)
        empty = weight == 0
        # The mean of nothing is usually NaN, and so would be its gradient: select
        # before the product, not after it.
        mean = jnp.where(empty, jnp.zeros_like(mean), mean).astype(dtype)
        return cls(mean * weight.astype(dtype), as_weight(weight))

    def merge(self, other: "WeightedSum") -> "WeightedSum":
        """Joins two parts of the data: totals add, and so do weights."""
        check_same_kind(self, other)
        total = jax.tree.map(jnp.add, self.total, other.total)
        return WeightedSum(total, jnp.add(self.weight, other.weight))

    def all_reduce(self, axis_name: AxisNames) -> "WeightedSum":
        """The merge over all devices of the mesh axis or axes `axis_name`."""
        return lax.psum(self, axis_name)

    def mean(self) -> PyTree:
        """Divides, once. 0 where the weight is 0; NaN where it is negative."""
        weight = jnp.asarray(self.weight)

        def divide(total):
            total = jnp.asarray(total)
            real = jnp.finfo(at_least_float32(total.dtype)).dtype
            safe = jnp.where(weight > 0, weight, 1).astype(real)
            return jnp.where(weight > 0, total / safe, _without_weight(weight, safe))

        return jax.tree.map(divide, self.total)

    def finalize(self) -> PyTree:
        """The mean."""
        return self.mean()

    def __mul__(self, factor) -> "WeightedSum":
        """Scales a term of a loss: the total, not the weight."""
        vectors = list | tuple | np.ndarray | jax.Array
        if isinstance(factor, vectors) and np.shape(factor):
            raise TypeError(
                "A WeightedSum can be scaled by a scalar only; the factor has shape "
                f"{np.shape(factor)}. To weigh entries one by one, use "
                "WeightedSum.of(values, weights=...)."
            )
        if not isinstance(factor, int | float | np.generic | np.ndarray | jax.Array):
            raise TypeError(
                "A WeightedSum can be scaled by a scalar only. The factor is "
                f"{describe(factor)}; it must be an array of numbers."
            )
        scaled = jax.tree.map(lambda total: factor * total, self.total)
        return WeightedSum(scaled, self.weight)

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        raise TypeError(
            "A WeightedSum is divided once, by its own weight, at the end of the "
            "cycle. Do not divide a loss by the number of micro-batches, tokens or "
            "devices. To scale a term, multiply: 0.5 * a."
        )

    __floordiv__ = __rtruediv__ = __truediv__


def inverse(weight: jax.Array, dtype) -> jax.Array:
    """`1 / weight`; 0 for a weight of 0, NaN for a negative one."""
    safe = jnp.where(weight > 0, weight, 1).astype(dtype)
    return jnp.where(weight > 0, 1 / safe, _without_weight(weight, safe))


def divide_gradient(grads: WeightedSum | dict[str, WeightedSum]) -> PyTree:
    """The mean gradient, in the dtypes in which it was summed.

    Each leaf is multiplied by the inverse: a division by a traced number costs XLA:CPU
    more than all the rest of an optimizer's update.

    Args:
        grads: the summed gradient; or one for each term, whose means are added.
    """
    if isinstance(grads, dict):
        means = map(divide_gradient, grads.values())
        return functools.reduce(partial(jax.tree.map, jnp.add), means)

    def divide(total):
        real = jnp.finfo(at_least_float32(total.dtype)).dtype
        return (total * inverse(grads.weight, real)).astype(total.dtype)

    return jax.tree.map(divide, grads.total)


def _without_weight(weight, like):
    # A count of more than 2^31 turns negative: not a mean that anyone should use.
    return jnp.where(weight == 0, 0.0, jnp.nan).astype(like.dtype)


def _sum_of_weights(shape, where, weights):
    counts = weights is None or not jnp.issubdtype(weights.dtype, jnp.floating)
    size = math.prod(shape)
    if counts and size > _MAX_COUNT:
        raise ValueError(
            f"WeightedSum.of: values of shape {shape} have {size} entries, more than "
            f"the {_MAX_COUNT} that an int32 counts. Use smaller micro-batches."
        )
    if weights is None:
        return jnp.asarray(size, jnp.int32) if where is None else _sum_as_weight(where)
    if where is not None:
        weights = jnp.where(where, weights, jnp.zeros_like(weights))
    return _sum_as_weight(weights)


def _sum_as_weight(weights):
    weights = as_weight(weights)
    return jnp.sum(weights, dtype=weights.dtype)


def _broadcast_where(where, shape):
    where = _broadcast("where", where, shape)
    if where is not None and where.dtype != jnp.bool_:
        raise TypeError(
            f"WeightedSum.of: where is of dtype {where.dtype}; it must be boolean. For "
            "numbers, use weights=; for a mask of zeros and ones, where=mask == 1."
        )
    return where


def _broadcast(name, array, shape):
    if array is None:
        return None
    array = check_real(name, array)
    try:
        broadcast = jnp.broadcast_to(array, shape)
    except ValueError as error:
        raise ValueError(
            f"WeightedSum.of: {name} has shape {array.shape}, which does not broadcast "
            f"to the shape {tuple(shape)} of values. Give one entry per value, or one "
            "per row with trailing axes of length 1."
        ) from error
    if 0 < array.ndim < len(shape) and array.shape == shape[: array.ndim]:
        raise ValueError(
            f"WeightedSum.of: {name} has shape {array.shape} and values {shape}: it is "
            "not clear which axes are meant. For one entry per row, add trailing axes, "
            f"{name}[:, None]; for one entry per column, leading ones, {name}[None]."
        )
    return broadcast
