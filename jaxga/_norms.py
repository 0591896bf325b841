"""The norm of a gradient of which each device may hold a shard."""

import jax
import jax.numpy as jnp
from jax import lax

from ._axes import varying_axes
from ._checks import PyTree
from ._dtypes import as_total


def norm_over_shards(grads: PyTree, own_axes: tuple[str, ...]) -> jax.Array:
    """The norm of all leaves, in float32 at least; 0 for a tree without leaves.

    Args:
        grads: arrays. One that is known to vary over further axes than `own_axes` is a
            shard there (tensor parallelism), and its squares are summed over them, so
            that all devices of these axes agree on the norm.
        own_axes: axes along which each device has a gradient of its own.
    """
    squares: dict[tuple[str, ...], list[jax.Array]] = {}
    for leaf in jax.tree.leaves(grads):
        leaf = as_total(leaf)
        axes = tuple(sorted(varying_axes(leaf) - set(own_axes)))
        square = jnp.sum(jnp.real(leaf * jnp.conj(leaf)))
        squares.setdefault(axes, []).append(square)
    total = jnp.zeros((), jnp.float32)
    for axes, parts in squares.items():
        total += lax.psum(sum(parts), axes) if axes else sum(parts)
    return jnp.sqrt(total)
