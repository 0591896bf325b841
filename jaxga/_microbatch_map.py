"""A function mapped over micro-batches, of which only the outputs are stored.

For losses over a whole batch: in-batch negatives, batch covariances, scores normalised
over a group. Such a loss needs all outputs at once, but not all activations. The
backward pass computes each micro-batch once more, from the cotangent of its outputs,
and adds its gradient to one buffer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.typing import DTypeLike

from ._axes import varying, varying_axes
from ._batches import (
    as_arrays,
    as_rows,
    check_sizes,
    count_microbatches,
    take_microbatch,
)
from ._checks import PyTree, describe, is_key, place
from ._keys import check_key, microbatch_key
from ._microbatch_map_rule import MicrobatchMap
from ._params import check_accum_dtype, check_params, warn_of_swamping


def microbatch_map(
    fn: Callable[..., PyTree],
    *,
    accum_steps: int | None = None,
    microbatch_size: int | None = None,
    accum_dtype: DTypeLike | None = None,
) -> Callable[..., PyTree]:
    """Maps a function over micro-batches, at the memory of one, differentiably.

    A loss that compares examples with each other (in-batch negatives, a covariance over
    the batch, scores normalised over a group) cannot be summed over micro-batches: each
    would only see itself. Map the encoder instead, and take the loss of all its
    outputs: outputs and gradients are those of the full batch, to rounding. Only the
    outputs are stored. The backward pass computes each micro-batch once more, with the
    same keys, and sums the gradient in one buffer, once per micro-batch and call: map
    two views of an example by one call, which returns both their outputs.

    `fn` must treat the rows of a micro-batch one by one: batch norm inside it sees a
    micro-batch. What it changes elsewhere is lost; for Flax nnx, split the model, pass
    its parameters as `params` and the rest as a further argument, and merge inside.

    Over devices, call it in a loss given to `make_train_step(..., accum_steps=1,
    parallel=...)`, or inside `pmap` or `shard_map`: gather what must be seen with
    `lax.all_gather`, and return the sum over this device's own rows. A term of the
    whole batch, such as a covariance, is counted on one device:
    `jnp.where(lax.axis_index(axis) == 0, term, 0)`. (Under plain `jit`, with a batch
    that is sharded over devices, results are right too, but the compiler may reduce
    the gradient over devices in every micro-batch.)

    Args:
        fn: `fn(params, microbatch, *args)`, with `key=` added where the call was given
            one. Returns a pytree of arrays, each with a leading axis of the
            micro-batch's rows.
        accum_steps: micro-batches that the batch is cut into. Must divide its rows.
            Give this or `microbatch_size`.
        microbatch_size: rows per micro-batch, of the array that the call sees: one
            device's inside `pmap` and `shard_map`, all devices' under plain `jit`.
        accum_dtype: dtype in which gradients are summed over micro-batches; by default
            float32, or a leaf's own dtype where that is wider. The sum is then rounded
            to the leaf's dtype, once.

    Returns:
        `mapped(params, batch, *args, key=None)`, which returns what `fn` would of the
        whole batch, rows in the batch's order. Micro-batch `i` holds rows
        `i, i + accum_steps, ...`. `key` is one key, which is folded with the
        micro-batch's index; or an array of one key per row, as `per_example_keys=True`
        hands it to a loss function, of which `fn` gets those of its rows: the result
        then does not depend on how the batch is cut. (One key that is the same on all
        devices gives them all the same numbers: fold it with `lax.axis_index` first.)
        `mapped` can be differentiated in reverse mode, with respect to floating-point
        arrays in `params`, `batch` and `args`, and those that `fn` closes over (over
        devices pass them as `args`: closed over, their gradients may be summed in every
        micro-batch). `jax.jvp` of it is an error; that of its gradient is not. For an
        ensemble, wrap its gradient in `jax.vmap`, and that in `jax.jit`.

    Raises:
        TypeError: `fn` is no function, or returns what is no array; a size is no
            integer; parameters that are no floating-point arrays; `key` is no key.
        ValueError: neither or both sizes; leaves of the batch that disagree or do not
            divide; an output without the micro-batch's leading axis.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> def encode(params, microbatch):
        ...     return jnp.tanh(microbatch @ params)
        >>> mapped = jaxga.microbatch_map(encode, microbatch_size=2)
        >>> def loss(params, batch):
        ...     z = mapped(params, batch)
        ...     return jnp.mean((z - z.mean(0)) ** 2)  # of the whole batch
        >>> batch = jnp.arange(12.0).reshape(6, 2) / 12
        >>> grads = jax.jit(jax.grad(loss))(jnp.ones(2) / 2, batch)
        >>> print(grads.round(4))
        [0.0681 0.0616]
    """
    if not callable(fn):
        raise TypeError(f"fn is {describe(fn)}, not a function.")
    sizes = check_sizes(accum_steps, microbatch_size, "batch")
    accum_dtype = check_accum_dtype(accum_dtype)

    def mapped(
        params: PyTree, batch: PyTree, *args: Any, key: jax.Array | None = None
    ) -> PyTree:
        steps = count_microbatches(batch, *sizes)
        warn_of_swamping(accum_dtype, steps)
        rows = {"batch": as_rows(batch)}
        if key is not None and _is_key_per_row(key, jax.tree.leaves(batch)[0]):
            rows["key"], key = jnp.asarray(key), None
        check_key(key, per_example=False)
        leaves, treedef = check_params(params), jax.tree.structure(params)
        args = as_arrays(args)

        def call(leaves, args, rows, index):
            params, key_of_call = jax.tree.unflatten(treedef, leaves), rows.get("key")
            if key is not None:
                key_of_call = microbatch_key(key, index, ())
            keywords = {} if key_of_call is None else {"key": key_of_call}
            return _check_outputs(fn(params, rows["batch"], *args, **keywords), rows)

        whole, function = _hoist(call, leaves, args, rows, steps)
        return MicrobatchMap(function, whole, rows, steps, accum_dtype)(whole, rows)

    return mapped


def _hoist(call, leaves, args, rows, steps):
    """Traces `call` on one micro-batch, and makes explicit all that it depends on.

    Returns:
        The arrays that every micro-batch uses, the leaves of the parameters first; and
        a function of these, the micro-batch's rows and its index, which closes over
        nothing that is traced or differentiated.
    """
    types = jax.eval_shape(lambda rows: take_microbatch(rows, steps, 0), rows)

    def trace(leaves, args):
        closed, shapes = jax.make_jaxpr(
            lambda leaves, *inputs: call(leaves, args, *inputs), return_shape=True
        )(leaves, types, jnp.int32(0))
        return leaves, closed, shapes

    leaves, closed, shapes = trace(leaves, args)
    if axes := _axes_of(shapes):
        # Marked out here, gradients are summed over the devices once, and not in every
        # micro-batch. Not over axes over which some output is the same: it would not
        # be known to be any more.
        args = jax.tree.map(lambda x: varying(x, axes) if _is_array(x) else x, args)
        leaves, closed, shapes = trace(varying(leaves, axes), args)
    # Tracers among what is closed over: the arguments, the key, what fn closes over.
    # They would outlive their trace in the rule for the gradient.
    consts, jaxpr, num = list(closed.consts), closed.jaxpr, len(leaves)
    traced = [i for i, x in enumerate(consts) if isinstance(x, jax.core.Tracer)]
    whole = [*leaves, *(consts[i] for i in traced)]
    for i in traced:
        consts[i] = None

    def function(whole, rows, index):
        given = list(consts)
        for i, x in zip(traced, whole[num:], strict=True):
            given[i] = x
        run = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, given))
        outputs = run(*whole[:num], *jax.tree.leaves((rows, index)))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return whole, function


def _is_key_per_row(key, leaf):
    """Whether it is an array of keys; refuses one of another length than the batch."""
    if not _is_array(key) or (key.ndim if is_key(key) else key.ndim - 1) != 1:
        return False
    if len(key) != len(leaf):
        raise ValueError(
            f"key is {describe(key)}, but the batch has {len(leaf)} rows: give one "
            "key, or one for each row."
        )
    check_key(key[0], per_example=True)
    return True


def _check_outputs(outputs, rows):
    """Refuses outputs that are not rows of the micro-batch."""
    size = len(jax.tree.leaves(rows)[0])
    leaves = jax.tree.leaves_with_path(outputs)
    if not leaves:
        raise TypeError(f"fn returned {outputs!r}, which holds no arrays.")
    for path, leaf in leaves:
        words = f"fn's output{place(path)}"
        if not _is_array(leaf):
            raise TypeError(f"{words} is {describe(leaf)}, not an array.")
        if not leaf.shape or leaf.shape[0] != size:
            raise ValueError(
                f"{words} has shape {leaf.shape}; it must have a leading axis of the "
                f"micro-batch's {size} rows. Return what belongs to each row, and sum "
                "over rows outside, where all of them are."
            )
    return outputs


def _axes_of(types):
    """The axes over which all of them are known to vary."""
    return frozenset.intersection(*map(varying_axes, jax.tree.leaves(types)))


def _is_array(x):
    return isinstance(x, jax.Array | np.ndarray)
