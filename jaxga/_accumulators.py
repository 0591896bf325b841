"""Two ways to hold the gradient's sum while micro-batches are computed.

In place: the backward pass adds each cotangent into its accumulator as soon as there is
one (`with_refs`). A model that scans over its layers then never holds a micro-batch's
whole gradient: one buffer of the parameters' size instead of two. As a loop carry: the
gradient of a micro-batch is made, then added. Both give the same numbers, bit for bit.
"""

import logging
from collections.abc import Callable

import jax
import numpy as np
from jax import lax

from ._checks import PyTree
from ._forward import Forward

_log = logging.getLogger("jaxga")

# Of one micro-batch: its index and the other sums so far, to the pullback of its loss,
# the cotangents to pull back, and the other sums with it.
Microbatch = Callable[[jax.Array, PyTree], tuple[Callable, PyTree, PyTree]]


def accumulate_gradients(
    microbatch: Microbatch,
    num_microbatches: int | jax.Array,
    make_zeros: Callable[[], list[jax.Array]],
    others: PyTree,
    same_dtypes: bool,
) -> tuple[list[jax.Array], PyTree]:
    """Sums gradients over micro-batches, in place where JAX can trace that.

    Args:
        microbatch: computes one micro-batch.
        num_microbatches: how many; may be traced.
        make_zeros: makes the accumulators, one per parameter.
        others: what else is summed: losses, weights, metrics, model state.
        same_dtypes: whether gradients come in the dtypes of their accumulators, as in
            place they must.

    Returns:
        The summed gradients and `others` after the last micro-batch.
    """

    def run(in_place):
        return _loop(microbatch, num_microbatches, make_zeros(), others, in_place)

    if same_dtypes:
        try:
            # The loss itself has been traced before: what fails here is with_refs,
            # which some versions of JAX cannot transpose some programs into.
            in_place = Forward(lambda: run(in_place=True))
        except Exception as error:
            _log.debug("Gradients are carried, not summed in place: %r", error)
        else:
            return in_place()
    return run(in_place=False)


def for_each_microbatch(num_microbatches: int | jax.Array, body, carry: PyTree):
    """`carry = body(index, carry)` for each; a scan if their number is known."""

    def in_int32(index, carry):
        return body(lax.convert_element_type(index, np.int32), carry)  # x64 gives int64

    return lax.fori_loop(np.int32(0), num_microbatches, in_int32, carry)


def _loop(microbatch, num_microbatches, zeros, others, in_place):
    refs = [jax.new_ref(zero) for zero in zeros] if in_place else []

    def body(index, carry):
        sums, others = carry
        pullback, cotangents, others = microbatch(index, others)
        if in_place:
            pullback.with_refs(refs)(cotangents)
        else:
            (grads,) = pullback(cotangents)
            pairs = zip(sums, grads, strict=True)
            sums = [total + grad.astype(total.dtype) for total, grad in pairs]
        return sums, others

    carry = ([] if in_place else zeros, others)
    sums, others = for_each_microbatch(num_microbatches, body, carry)
    return [ref[...] for ref in refs] if in_place else sums, others
