"""The dtypes in which things are summed."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def at_least_float32(dtype) -> jnp.dtype:
    """float32 for the narrow floats, integers and booleans; wider types as they are."""
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)  # float8 has no promotion of its own
    return jnp.promote_types(dtype, jnp.float32)


def as_total(total: ArrayLike) -> jax.Array:
    """A total in the dtype it is summed in: float32 at least."""
    total = jnp.asarray(total)
    return total.astype(at_least_float32(total.dtype))


def as_weight(weight: ArrayLike) -> jax.Array:
    """A weight in the dtype it is summed in: counts in int32, floats in float32.

    Not counts in float32: those stop being exact at 16.8 million.
    """
    weight = jnp.asarray(weight)
    if jnp.issubdtype(weight.dtype, jnp.floating):
        return as_total(weight)
    return weight.astype(jnp.int32)


def as_sum(value: ArrayLike) -> jax.Array:
    """A plain sum in the dtype it is summed in: int32 at least, float32 at least."""
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return as_total(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.int32))
