"""A sum of weights as two float32: what the first rounds off, the second holds.

Over many calls a float32 alone stops counting at 16.8 million tokens, and an int32 at
2.1 billion; and the dtype has to be chosen before the first weight is seen. As a pair,
whole numbers are exact to 2^48, fractions to 48 bits, and both parts ride in the
all-reduce of a float32 gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_COARSE = 4096.0


def pair_of(number: Any) -> jax.Array:
    """A real number as a pair, shape `(2,)`; exact for integers to 2^40."""
    if isinstance(number, np.generic | np.ndarray):
        number = number.item()  # as an array of JAX, an int64 would be cut off
    if isinstance(number, int | float):
        high = np.float32(number)
        return jnp.stack([high, np.float32(number - float(high))])
    if jnp.issubdtype(number.dtype, jnp.floating):
        high = number.astype(jnp.float32)
        low = number - high.astype(number.dtype)
    else:
        if number.dtype.itemsize < 4:
            number = number.astype(jnp.int32)
        low = number & 0xFFFF
        high = number - low  # whole multiples of 2^16
    return jnp.stack([high.astype(jnp.float32), low.astype(jnp.float32)])


def add_pairs(a: jax.Array, b: jax.Array) -> jax.Array:
    """Knuth's two-sum of the high parts; its error goes to the low ones."""
    high = a[..., 0] + b[..., 0]
    part = high - a[..., 0]
    error = (a[..., 0] - (high - part)) + (b[..., 0] - part)
    low = a[..., 1] + b[..., 1] + error
    total = high + low
    return jnp.stack([total, low - (total - high)], axis=-1)


def value_of(pair: jax.Array) -> jax.Array:
    """The nearest float32."""
    return pair[..., 0] + pair[..., 1]


def has_reached(pair: jax.Array, threshold: jax.Array) -> jax.Array:
    """Whether a pair is at least another; also if it is not a number."""
    return ~(value_of(add_pairs(pair, -threshold)) < 0)


def before_all_reduce(pair: jax.Array) -> jax.Array:
    """Multiples of 4096, and the rest.

    Each of the two then adds up over devices without rounding, as long as whole numbers
    below 2^36 come from fewer than 8,192 devices; high parts as they are would not.
    """
    coarse = jnp.round(pair[..., 0] / _COARSE) * _COARSE
    return jnp.stack([coarse, (pair[..., 0] - coarse) + pair[..., 1]], axis=-1)


def after_all_reduce(parts: jax.Array) -> jax.Array:
    """The pair again."""
    zero = jnp.zeros_like(parts[..., 0])
    coarse, rest = (jnp.stack([parts[..., i], zero], axis=-1) for i in (0, 1))
    return add_pairs(coarse, rest)


def all_reduce(pair: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over devices."""
    return after_all_reduce(lax.psum(before_all_reduce(pair), axes))
