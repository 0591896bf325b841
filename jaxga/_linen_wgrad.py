"""Linen layers whose weights get their gradient in float32."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from ._wgrad import float32_wgrad_dot_general, keywords_of, leave_wide


def float32_wgrad(layer: Callable[..., Any] = nn.Dense) -> dict[str, Any]:
    """Keyword arguments for a layer whose weights get their gradient in float32.

    For layers that compute in bfloat16 or float16 (`dtype=`) with float32 parameters.
    Flax casts the weights to that dtype, and each micro-batch's gradient of them is
    rounded to it before it is added. With these arguments the gradient leaves its
    matrix product in float32. The forward pass and all other gradients are what they
    were, bit for bit (that of the bias is rounded still). In a layer that computes in
    float32 nothing changes.

    On an NVIDIA GPU it can save memory traffic too: see
    `jaxga.float32_wgrad_dot_general`, which is the product itself, for an option of the
    compiler that goes with it, or takes its place where layers are not scanned.

    Args:
        layer: the class of the layer: one with a `promote_dtype` and a `dot_general`
            (`nn.Dense`, `nn.DenseGeneral`, or your own).

    Returns:
        The arguments, to be passed as `nn.Dense(..., **jaxga.linen.float32_wgrad())`.

    Raises:
        TypeError: `layer` casts its weights itself (`nn.Einsum`, convolutions, Flax's
            attention); when it is differentiated, a layer whose parameters are not
            float32 (`param_dtype`); by Python, a `dot_general_cls` beside it.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxga.linen
        >>> x = jnp.linspace(-1, 1, 24).reshape(8, 3)
        >>> def gradient(**keywords):
        ...     model = nn.Dense(1, dtype=jnp.bfloat16, **keywords)
        ...     params = model.init(jax.random.key(0), x)
        ...     grads = jax.grad(lambda p: model.apply(p, x).sum())(params)
        ...     return grads["params"]["kernel"]
        >>> rounded, exact = gradient(), gradient(**jaxga.linen.float32_wgrad())
        >>> print((rounded == rounded.astype(jnp.bfloat16)).all())
        True
        >>> print((exact == exact.astype(jnp.bfloat16)).all())
        False
    """
    return keywords_of(layer, {"dot_general": float32_wgrad_dot_general}, _promote)


def _promote(*args, dtype=None, inexact=True):
    promoted = nn.dtypes.promote_dtype(*args, dtype=dtype, inexact=inexact)
    return list(leave_wide(args, promoted))
