"""The loop of `microbatch_map`, and the rule for its gradient."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from ._accumulators import accumulate_gradients, is_vmapped
from ._batches import take_microbatch
from ._checks import PyTree
from ._forward import Forward
from ._params import dtype_of_gradient, dtype_of_sum


class MicrobatchMap:
    """The loop over micro-batches, and the rule for its gradient.

    Attributes:
        forward: the function, traced on one micro-batch.
        in_place: which gradients to sum in place, for the reasons in `_accumulators`.
    """

    def __init__(self, function, whole, rows, steps, accum_dtype):
        self.steps, self.rows_treedef = steps, jax.tree.structure(rows)
        self.dtypes = [leaf.dtype for leaf in whole]
        self.sum_dtypes, self.grad_dtypes, self.in_place = [], [], []
        for leaf in whole:
            inexact = _is_inexact(leaf)
            of_sum = dtype_of_sum(leaf, accum_dtype) if inexact else leaf.dtype
            of_grad = dtype_of_gradient(leaf, of_sum) if inexact else leaf.dtype
            self.sum_dtypes.append(of_sum)
            self.grad_dtypes.append(of_grad)
        types = jax.eval_shape(lambda rows: take_microbatch(rows, steps, 0), rows)
        self.forward = Forward(
            lambda wide, rows, index: function(
                self._cast(wide, self.dtypes), rows, index
            ),
            self._cast(whole, self.grad_dtypes),
            types,
            jnp.int32(0),
        )
        pairs = zip(self.sum_dtypes, self.grad_dtypes, strict=True)
        same = [of_sum == of_grad for of_sum, of_grad in pairs]
        uses = zip(self.forward.uses(), same, strict=True)
        self.in_place = [use == {"scan"} and same for use, same in uses]

    def __call__(self, whole: list[jax.Array], rows: PyTree) -> PyTree:
        """The outputs for all rows, in the batch's order."""
        run = jax.custom_vjp(self._outputs)
        run.defvjp(self._forward_pass, self._backward_pass, symbolic_zeros=True)
        outputs = run(whole, jax.tree.leaves(rows))
        return jax.tree.unflatten(jax.tree.structure(self.forward.shapes), outputs)

    def _outputs(self, whole, rows):
        def one(index):
            wide = self._cast(whole, self.grad_dtypes)
            microbatch = take_microbatch(rows, self.steps, index)
            return jax.tree.leaves(self._run(wide, microbatch, index))

        stacked = lax.map(one, jnp.arange(self.steps, dtype=jnp.int32))
        return [_join(jnp.swapaxes(leaf, 0, 1)) for leaf in stacked]

    def _forward_pass(self, whole, rows):
        whole_values, rows_values = ([x.value for x in part] for part in (whole, rows))
        wanted = _Wanted(_perturbed(whole), _perturbed(rows))
        outputs = self._outputs(whole_values, rows_values)
        return outputs, (whole_values, rows_values, wanted)

    def _backward_pass(self, saved, cotangents):
        whole, rows, wanted = saved
        given = {
            i: cotangent
            for i, cotangent in enumerate(cotangents)
            if not isinstance(cotangent, SymbolicZero) and _is_inexact(cotangent)
        }

        def microbatch(index, buffers):
            return self._pull_back(whole, rows, wanted, given, index, buffers)

        sums, buffers = accumulate_gradients(
            microbatch,
            np.int32(self.steps),
            lambda: [
                jnp.zeros_like(whole[i], dtype=self.sum_dtypes[i])
                for i in wanted.of_whole
            ],
            [jnp.zeros_like(_cut(rows[i], self.steps)) for i in wanted.of_rows],
            in_place=self._in_place(saved, cotangents),
        )
        of_whole, of_rows = [None] * len(whole), [None] * len(rows)
        for i, total in zip(wanted.of_whole, sums, strict=True):
            of_whole[i] = total.astype(self.dtypes[i])
        for i, buffer in zip(wanted.of_rows, buffers, strict=True):
            of_rows[i] = _join(buffer)
        return of_whole, of_rows

    def _pull_back(self, whole, rows, wanted, given, index, buffers):
        """One micro-batch's forward pass; and its backward pass, as a function."""
        wide = self._cast(whole, self.grad_dtypes)
        taken = take_microbatch(rows, self.steps, index)

        def outputs(some_wide, some_rows):
            new_wide = _put(wide, wanted.of_whole, some_wide)
            new_rows = _put(taken, wanted.of_rows, some_rows)
            all_outputs = jax.tree.leaves(self._run(new_wide, new_rows, index))
            return [all_outputs[i] for i in given]

        _, pullback = jax.vjp(
            outputs,
            [wide[i] for i in wanted.of_whole],
            [taken[i] for i in wanted.of_rows],
        )
        cotangents = take_microbatch(list(given.values()), self.steps, index)

        def backward(targets):
            values = [jax.ad.GradValue() for _ in buffers]
            grads, of_rows = pullback.with_refs(targets, values)(cotangents)
            put = partial(lax.dynamic_update_index_in_dim, index=index, axis=1)
            return grads, [put(*pair) for pair in zip(buffers, of_rows, strict=True)]

        return backward

    def _in_place(self, saved, cotangents):
        whole, rows, wanted = saved
        if is_vmapped((whole, rows, cotangents)):
            return [False for _ in wanted.of_whole]
        return [self.in_place[i] for i in wanted.of_whole]

    def _run(self, wide, rows, index):
        return self.forward(wide, jax.tree.unflatten(self.rows_treedef, rows), index)

    @staticmethod
    def _cast(leaves, dtypes):
        return [
            leaf.astype(dtype) if _is_inexact(leaf) else leaf
            for leaf, dtype in zip(leaves, dtypes, strict=True)
        ]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Of which arrays, by index, the gradient is wanted."""

    of_whole: tuple[int, ...]
    of_rows: tuple[int, ...]


def _is_inexact(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _perturbed(primals):
    """Of which arrays, by index, the gradient is wanted and exists."""
    pairs = enumerate(primals)
    return tuple(i for i, x in pairs if x.perturbed and _is_inexact(x.value))


def _put(leaves, places, values):
    new = list(leaves)
    for i, value in zip(places, values, strict=True):
        new[i] = value
    return new


def _cut(leaf, steps):
    return jnp.reshape(leaf, (-1, steps, *leaf.shape[1:]))


def _join(leaf):
    return jnp.reshape(leaf, (-1, *leaf.shape[2:]))
