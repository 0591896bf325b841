"""Two ways to hold the gradient's sum while micro-batches are computed.

In place: the backward pass adds each cotangent into its accumulator as soon as there is
one (`with_refs`). A model that scans over its layers then never holds a micro-batch's
whole gradient: one buffer of the parameters' size instead of two. As a loop carry: the
gradient of a micro-batch is made, then added. Both give the same numbers.

In place is for parameters that go into a scan. Elsewhere XLA adds each gradient as soon
as it exists anyway, and a table in which rows are looked up would be slow in place: JAX
0.12 adds into it one number at a time.
"""

import logging
from collections.abc import Callable

import jax
import numpy as np
from jax import lax

from ._checks import PyTree
from ._forward import Forward

_log = logging.getLogger("jaxga")

# Of one micro-batch: its index and the other sums so far, to its backward pass. That
# takes where each gradient goes, as `with_refs` does, and returns the gradients and the
# other sums with it.
Microbatch = Callable[[jax.Array, PyTree], Callable[[list], tuple[list, PyTree]]]


def accumulate_gradients(
    microbatch: Microbatch,
    num_microbatches: int | jax.Array,
    make_zeros: Callable[[], list[jax.Array]],
    others: PyTree,
    in_place: list[bool],
) -> tuple[list[jax.Array], PyTree]:
    """Sums gradients over micro-batches, in place where that is asked and possible.

    Args:
        microbatch: computes one micro-batch.
        num_microbatches: how many; may be traced.
        make_zeros: makes the accumulators, one per parameter.
        others: what else is summed: losses, weights, metrics, model state.
        in_place: for each parameter, whether to try it in place. Its gradient must
            come in the dtype of its accumulator.

    Returns:
        The summed gradients and `others` after the last micro-batch.
    """

    def run(in_place):
        return _loop(microbatch, num_microbatches, make_zeros(), others, in_place)

    if any(in_place):
        try:
            # The loss itself has been traced before: what fails here is with_refs,
            # which some versions of JAX cannot transpose some programs into.
            traced = Forward(lambda: run(in_place))
        except Exception as error:
            _log.debug("Gradients are carried, not summed in place: %r", error)
        else:
            return traced()
    return run([False for _ in in_place])


def is_vmapped(inputs: PyTree) -> bool:
    """Whether they are inside vmap, which has no rule for what is in place."""
    # JAX does not export the class by which it can be seen.
    kinds = {type(leaf).__name__ for leaf in jax.tree.leaves(inputs)}
    return "BatchTracer" in kinds


def add_gradients(
    microbatch: Microbatch, index: jax.Array, sums: list[jax.Array], others: PyTree
) -> tuple[list[jax.Array], PyTree]:
    """One micro-batch more, outside the loop."""
    grads, others = microbatch(index, others)([jax.ad.GradValue() for _ in sums])
    pairs = zip(sums, grads, strict=True)
    return [total + grad.astype(total.dtype) for total, grad in pairs], others


def for_each_microbatch(num_microbatches: int | jax.Array, body, carry: PyTree):
    """`carry = body(index, carry)` for each; a scan if their number is known."""

    def in_int32(index, carry):
        return body(lax.convert_element_type(index, np.int32), carry)  # x64 gives int64

    return lax.fori_loop(np.int32(0), num_microbatches, in_int32, carry)


def _loop(microbatch, num_microbatches, zeros, others, in_place):
    targets = [
        jax.new_ref(zero) if in_ref else jax.ad.GradValue()
        for zero, in_ref in zip(zeros, in_place, strict=True)
    ]
    carried = [i for i, in_ref in enumerate(in_place) if not in_ref]

    def body(index, carry):
        sums, others = carry
        grads, others = microbatch(index, others)(targets)
        sums = {i: total + grads[i].astype(total.dtype) for i, total in sums.items()}
        return sums, others

    carry = ({i: zeros[i] for i in carried}, others)
    sums, others = for_each_microbatch(num_microbatches, body, carry)
    for i, target in enumerate(targets):
        if in_place[i]:
            sums[i] = target[...]
    return [sums[i] for i in range(len(targets))], others
