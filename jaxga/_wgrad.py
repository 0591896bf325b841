"""Products whose weights get their gradient in float32, though it computes in less.

Where a layer casts float32 weights to bfloat16, JAX gives the matrix product that makes
their gradient a bfloat16 result: each micro-batch's gradient is rounded to 8 bits
before it is added, and on a GPU it is written, read and converted on its way. Here the
cast is part of the product, and the gradient leaves it in float32.

The product has three arguments: what the weights are multiplied with; the weights cast,
for the forward pass and for the gradient of the former; and the weights as they are,
for their own gradient. Nothing reads the values of the third: where a device holds a
shard of them, what is gathered is what is cast. The rule is that of a derivative, not
of a backward pass, which under `vmap` would make a gradient for every row.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from ._checks import describe


def float32_wgrad_dot_general(
    lhs: ArrayLike,
    rhs: ArrayLike,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    cast_weights: ArrayLike | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` of bfloat16 or float16 with float32 weights.

    Computes what `lax.dot_general(x, weights.astype(x.dtype), ...)` would, bit for bit,
    and the same gradient of `x`. The gradient of the weights comes out of its matrix
    product in float32, not rounded to the dtype of `x`. Where both come in the same
    dtype, float32 or wider, it is `lax.dot_general` itself.

    For Flax there are `jaxga.linen.float32_wgrad` and `jaxga.nnx.float32_wgrad`.

    On an NVIDIA GPU XLA can add such a gradient to the sum of the micro-batches inside
    the matrix product, where layers are not scanned. So it can, without rounding and
    without any change to the model, if it is told to leave matrix products to cuBLAS:
    `jax.jit(step, donate_argnums=0, compiler_options={"xla_gpu_enable_triton_gemm":
    False})`, where `step` is what `make_train_step` returns, or for a whole process,
    and for steps of nnx, `XLA_FLAGS=--xla_gpu_enable_triton_gemm=false`. Where layers
    are scanned it takes both. Other platforms ignore the option.

    Args:
        lhs: the weights or what they are multiplied with. The weights are the operand
            of the wider dtype.
        rhs: the other one.
        dimension_numbers: as for `lax.dot_general`.
        precision: as for `lax.dot_general`.
        preferred_element_type: as for `lax.dot_general`; of the result, not of the
            gradient.
        out_sharding: as for `lax.dot_general`.
        cast_weights: the weights in the dtype of the other operand, where they have
            been cast before: once per cycle, say, and handed to the loss function as a
            further argument. Then the loop over the micro-batches does not read the
            float32 weights at all. The gradient is still that of the weights.

    Returns:
        The product, in the narrower of the two dtypes or `preferred_element_type`.

    Raises:
        ValueError: `cast_weights` is not of the weights' shape and `x`'s dtype.
        TypeError: two dtypes of which not one is float32 or wider, and the other a
            narrower real floating point one; or the product is differentiated and
            both are narrower than float32.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> def loss_fn(w, x):
        ...     dims = ((1,), (0,)), ((), ())
        ...     y = jaxga.float32_wgrad_dot_general(x, w, dims)
        ...     return jaxga.WeightedSum.of(y.astype(jnp.float32))
        >>> x = jnp.full((8, 2), 1.01, jnp.bfloat16)
        >>> cycle = jaxga.value_and_grad(loss_fn, accum_steps=2)
        >>> _, grads = cycle(jnp.ones((2, 3)), x)
        >>> print(grads.dtype)
        float32
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    _check_dtypes(lhs, rhs)
    swapped = lhs.dtype != rhs.dtype and _bits(lhs) > _bits(rhs)
    x, weights = (rhs, lhs) if swapped else (lhs, rhs)
    rest = precision, preferred_element_type, out_sharding
    how = _How(swapped, _as_tuples(dimension_numbers), *rest)
    cast = weights.astype(x.dtype)
    if cast_weights is not None:
        _check_cast(cast_weights, cast)
    if x.dtype not in _ALGORITHMS:
        return _multiply(x, cast, how)
    if weights.dtype == x.dtype:
        return _undifferentiated(x, weights, how)
    low = cast if cast_weights is None else jnp.asarray(cast_weights)
    return _product(x, low, weights, how)


def float32_wgrad_einsum(
    subscripts: str, *operands: ArrayLike, **keywords: Any
) -> jax.Array:
    """`jnp.einsum` of two operands, with that product in place of its own."""
    dtype = jnp.result_type(min(map(jnp.asarray, operands), key=_bits))
    preferred = keywords.pop("preferred_element_type", None)
    return jnp.einsum(
        subscripts,
        *operands,
        preferred_element_type=dtype if preferred is None else preferred,
        _dot_general=float32_wgrad_dot_general,
        **keywords,
    )


def leave_wide(given: Sequence, promoted: Sequence) -> tuple:
    """What Flax promoted, but the weights as they were where they were wider.

    Args:
        given: inputs, weights and what else a layer has promoted.
        promoted: the same, promoted.
    """
    inputs, weights, *rest = promoted
    uncast = jnp.asarray(given[1])
    are_floats = _is_float(uncast) and _is_float(weights)
    if are_floats and _bits(uncast) > _bits(weights):
        weights = uncast
    return inputs, weights, *rest


def keywords_of(
    layer: Callable, products: Mapping[str, Callable], promote: Callable
) -> dict[str, Any]:
    """The keyword arguments that give a layer these functions.

    Args:
        layer: a class of Flax layers.
        products: by the name of the argument, what takes the place of a product.
        promote: takes the place of `promote_dtype`.
    """
    # Of nnx's classes the signature is that of their metaclass.
    made_by = layer.__init__ if isinstance(layer, type) else layer
    names = list(inspect.signature(made_by).parameters)
    found = {}
    for name in names:
        prefix = name.removesuffix("promote_dtype")
        inner = [p for p in products if name != prefix and prefix + p in names]
        if inner:
            found |= {name: promote} | {prefix + p: products[p] for p in inner}
        # Flax prefers this one, with which these weights would not be cast at all: said
        # here, Python refuses it where it is given as well.
        if inner and prefix + "dot_general_cls" in names:
            found[prefix + "dot_general_cls"] = None
    if not found:
        raise TypeError(
            f"float32_wgrad: {getattr(layer, '__name__', layer)} does not take "
            f"promote_dtype together with {' or '.join(products)} for the same "
            "weights: it casts them, or multiplies them, itself. Build it of dense "
            "layers that do, or use the compiler's option, "
            'jax.jit(..., compiler_options={"xla_gpu_enable_triton_gemm": False}).'
        )
    return found


# Products of numbers of these dtypes, summed up in float32 and left in it.
_ALGORITHMS = {
    jnp.dtype(jnp.bfloat16): lax.DotAlgorithmPreset.BF16_BF16_F32,
    jnp.dtype(jnp.float16): lax.DotAlgorithmPreset.F16_F16_F32,
}


class _How(NamedTuple):
    """How the operands are multiplied; `swapped`: the weights are the first of them."""

    swapped: bool
    dims: tuple
    precision: Any
    preferred: Any
    out_sharding: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _product(x, low, weights, how):
    return _multiply(x, low, how)


@_product.defjvp
def _derivative(how, primals, tangents):
    x, low, weights = primals
    of_x, _, of_weights = tangents
    product = _product(x, low, weights, how)
    by_weights = _multiply_wide(x, of_weights.astype(jnp.float32), how, product.dtype)
    return product, _multiply(of_x, low, how) + by_weights.astype(product.dtype)


def _multiply_wide(x, weights, how, dtype):
    """The product by float32 weights, in float32; its transpose is what counts here.

    That multiplies `x` with a cotangent of the product, which is of `dtype`.
    """
    how = how._replace(preferred=jnp.float32)
    if dtype != x.dtype:  # a cotangent in float32, that no algorithm may round
        return _multiply(x, weights, how)

    def with_algorithm(x, weights):
        return _multiply(x, weights, how._replace(precision=_ALGORITHMS[x.dtype]))

    # On a CPU XLA has not all of these, and multiplies in float32 in any case.
    def on_cpu(x, weights):
        return _multiply(x.astype(jnp.float32), weights, how)

    return lax.platform_dependent(x, weights, cpu=on_cpu, default=with_algorithm)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _undifferentiated(x, low, how):
    return _multiply(x, low, how)


@_undifferentiated.defjvp
def _refuse(how, primals, tangents):
    raise TypeError(
        f"float32_wgrad: the weights are {describe(primals[1])} where they are "
        "multiplied, and JAX gives them a gradient of that dtype. Keep parameters in "
        "float32 (param_dtype=jnp.float32), and leave their cast to the product: a "
        "layer needs promote_dtype together with dot_general. Layers that take no "
        "promote_dtype, as Flax linen's attention, cast their weights themselves; "
        "frozen weights need no float32_wgrad."
    )


def _multiply(x, weights, how):
    lhs, rhs = (weights, x) if how.swapped else (x, weights)
    return lax.dot_general(
        lhs,
        rhs,
        how.dims,
        precision=how.precision,
        preferred_element_type=how.preferred,
        out_sharding=how.out_sharding,
    )


def _as_tuples(dims):
    return tuple(tuple(tuple(map(int, side)) for side in pair) for pair in dims)


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _bits(x):
    return jnp.finfo(x.dtype).bits


def _check_cast(cast, like):
    cast = jnp.asarray(cast)
    if (cast.shape, cast.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"float32_wgrad: cast_weights is {describe(cast)}, but must be the weights "
            f"cast to the dtype of what they are multiplied with: {describe(like)}."
        )


def _check_dtypes(lhs, rhs):
    if lhs.dtype == rhs.dtype:
        return
    are_floats = _is_float(lhs) and _is_float(rhs)
    narrow, wide = sorted(map(_bits, (lhs, rhs))) if are_floats else (0, 0)
    if narrow not in (16, 32) or wide < 32 or narrow == wide:
        raise TypeError(
            f"float32_wgrad: the operands are {describe(lhs)} and {describe(rhs)}. Of "
            "two dtypes the wider must be the weights', float32 or float64, and the "
            "other bfloat16, float16 or float32. Cast the operands."
        )
