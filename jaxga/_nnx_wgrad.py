"""Layers of nnx whose weights get their gradient in float32."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from ._wgrad import (
    float32_wgrad_dot_general,
    float32_wgrad_einsum,
    keywords_of,
    leave_wide,
)


def float32_wgrad(layer: Callable[..., Any] = nnx.Linear) -> dict[str, Any]:
    """Keyword arguments for a layer whose weights get their gradient in float32.

    See `jaxga.linen.float32_wgrad`, which says what for.

    Args:
        layer: the class of the layer: `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`,
            `nnx.MultiHeadAttention`, or your own with arguments of their names.

    Returns:
        The arguments, to be passed as `nnx.Linear(..., **jaxga.nnx.float32_wgrad())`,
        or as `nnx.Einsum(..., **jaxga.nnx.float32_wgrad(nnx.Einsum))`.

    Raises:
        TypeError: as for `jaxga.linen.float32_wgrad`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga.nnx
        >>> from flax import nnx
        >>> model = nnx.MultiHeadAttention(
        ...     num_heads=2, in_features=4, dtype=jnp.bfloat16, decode=False,
        ...     rngs=nnx.Rngs(0), **jaxga.nnx.float32_wgrad(nnx.MultiHeadAttention))
        >>> x = jnp.linspace(-1, 1, 24).reshape(2, 3, 4)
        >>> grads = nnx.grad(lambda model: model(x).sum())(model)
        >>> kernel = grads["value"]["kernel"][...]
        >>> print((kernel == kernel.astype(jnp.bfloat16)).all())
        False
    """
    products = {
        "dot_general": float32_wgrad_dot_general,
        "einsum_op": float32_wgrad_einsum,
    }
    return keywords_of(layer, products, _promote)


def _promote(args, /, *, dtype=None, inexact=True):
    promoted = nnx.nn.dtypes.promote_dtype(args, dtype=dtype, inexact=inexact)
    return leave_wide(args, promoted)
