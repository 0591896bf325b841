"""How a call of an open cycle ends: in an update, if the cycle closes and is good.

The conditional that runs the optimizer returns parameters and optimizer state. The sums
are only read in it: handed through it they would need a second buffer, and a call in
mid-cycle would cost more than the addition.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._accumulate_state import AccumulateState
from ._axes import full_of_type
from ._checks import PyTree
from ._compensated import after_all_reduce, before_all_reduce, value_of
from ._merge import is_merge_type
from ._norms import norm_over_shards
from ._optimizer import run_transformation
from ._sums import WeightedSum, divide_gradient, inverse


@dataclasses.dataclass(frozen=True)
class Closing:
    """What closes a cycle: the inner transformation, the axes, the policy."""

    inner: optax.GradientTransformation
    axes: tuple[str, ...]
    nonfinite: str

    def end_call(
        self,
        state: AccumulateState,
        closes: jax.Array,
        params: PyTree,
        extra_args: dict[str, Any],
        finish: Callable[[PyTree, PyTree], PyTree],
        nothing: Callable[[PyTree, Callable[[], PyTree]], PyTree],
    ) -> tuple[PyTree, AccumulateState]:
        """Ends a call: with an update if the cycle closes and its gradient is good.

        Args:
            state: with this call's micro-batch in its sums.
            closes: whether the cycle ends with this call.
            params: the parameters.
            extra_args: those of this call, for the inner transformation.
            finish: makes what the call returns, of parameters and inner updates.
            nothing: makes what it returns without an update, of parameters and a
                function that gives the types of inner updates.
        """

        run = functools.partial(self._run, finish, extra_args)

        @functools.cache
        def types():
            def whole(inner_state, params):
                return run(*self._reduce(state), inner_state, params)

            return jax.eval_shape(whole, state.inner_state, params)[0]

        def close(inner_state, params):
            sums, mean_value = self._reduce(state)
            weight = jax.tree.map(lambda x: x.weight, sums, is_leaf=is_merge_type)
            norm = _norm_of_mean(sums)
            good = self._is_good(weight, norm, mean_value)
            new = lax.cond(
                good,
                functools.partial(run, sums, mean_value),
                lambda inner_state, params: (nothing(params, types), inner_state),
                *(inner_state, params),
            )
            return *new, norm.astype(jnp.float32), weight, good

        def stay(inner_state, params):
            last = state.grad_norm, state.weight, jnp.zeros((), bool)
            return nothing(params, types), inner_state, *last

        new, inner_state, norm, weight, good = lax.cond(
            closes, close, stay, state.inner_state, params
        )
        return new, state._replace(
            num_microbatches=jnp.where(closes, 0, state.num_microbatches),
            inner_state=inner_state,
            update=state.update + good.astype(jnp.int32),
            skipped=state.skipped + (closes & ~good).astype(jnp.int32),
            grad_norm=norm,
            weight=weight,
            updated=good,
        )

    def _run(self, finish, extra_args, sums, mean_value, inner_state, params):
        """The inner transformation, on the mean gradient.

        Divided in the branch that needs it: as its operand the mean would be a tree.
        """
        if "value" in extra_args:
            dtype = jnp.result_type(*jax.tree.leaves(extra_args["value"]))
            extra_args = extra_args | {"value": mean_value.astype(dtype)}
        mean = divide_gradient(sums)
        updates, inner_state = run_transformation(
            self.inner, mean, inner_state, params, extra_args
        )
        return finish(params, updates), inner_state

    def _reduce(self, state):
        """The sums of the cycle over all devices, in one reduction; the mean value."""
        sums, weight, value = state.sums, state.sum_weight, state.sum_value
        if self.axes:
            parts = sums, jax.tree.map(before_all_reduce, weight), value
            sums, weight, value = jax.tree.map(
                lambda x: x[0], lax.psum(parts, self.axes)
            )
            weight = jax.tree.map(after_all_reduce, weight)
        weight = jax.tree.map(value_of, weight)
        mean_value = sum(x[0] * inverse(x[1], x.dtype) for x in jax.tree.leaves(value))
        if isinstance(weight, dict):
            return {t: WeightedSum(sums[t], weight[t]) for t in weight}, mean_value
        return WeightedSum(sums, weight), mean_value

    def _is_good(self, weight, norm, mean_value):
        """Whether a cycle is applied. NaN compares false."""
        weight = jnp.stack(jax.tree.leaves(weight))
        if self.nonfinite == "propagate":
            return (weight != 0).any()
        finite = jnp.isfinite(norm) & jnp.isfinite(mean_value)
        right = jnp.isfinite(weight) & (weight >= 0)
        return finite & right.all() & (weight > 0).any()


def _norm_of_mean(sums):
    """The norm of the divided gradient.

    Of one sum without dividing it; of several, their means are added as they are read.
    """
    if isinstance(sums, dict):
        return norm_over_shards(divide_gradient(sums), ())
    norm = norm_over_shards(sums.total, ())
    return norm * inverse(sums.weight, norm.dtype)


def give_updates(params, updates):
    return updates


def zeros(params, types):
    """Updates that change nothing, in the dtypes that the inner ones have."""
    return jax.tree.map(lambda typ: full_of_type(typ, 0), types())


def unchanged(params, types):
    return params
