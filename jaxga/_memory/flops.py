"""Counts the arithmetic of a traced function, loops as often as they run.

XLA's own count (`cost_analysis`) takes the body of a loop once, and compilers for
devices that are not there have none.
"""

import math
from typing import Any

from jax.interpreters import partial_eval


def count_flops(closed: Any) -> int | None:
    """Operations of all matrix products and convolutions, over all devices.

    A multiplication and an addition are two. Kernels of other libraries, and those
    written in Pallas, are not looked into.

    Returns:
        None if a product stands in a loop whose length only the run decides.
    """
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    count = _count(needed)
    return None if math.isnan(count) else int(count)


def _count(jaxpr):
    return sum(map(_count_equation, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _count_equation(equation):
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS:
        return _PRODUCTS[name](equation)
    if name == "pallas_call":
        return 0
    counts = [_count(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(counts)
    if name == "while" and sum(counts):
        return math.nan
    return sum(counts) * _times(name, params)


def _inner(params):
    """The jaxprs among an equation's parameters."""
    for param in params.values():
        for value in param if isinstance(param, tuple | list) else (param,):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield value


def _times(name, params):
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        # Its name changed in JAX 0.10.
        axes = params.get("newly_manual_axes", params.get("manual_axes"))
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1


def _of_dot(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _of_convolution(equation):
    # Each output is a sum over a kernel's window and its input features.
    kernel = equation.invars[1].aval
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * equation.outvars[0].aval.size * (kernel.size // features)


_PRODUCTS = {"dot_general": _of_dot, "conv_general_dilated": _of_convolution}
