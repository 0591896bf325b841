"""A cycle that stays open over several calls: each adds a micro-batch to its sums."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ._accumulate_state import AccumulateState, holds_accumulator
from ._axes import axes_in_scope, varying
from ._checks import PyTree, name_of_type
from ._closing import Closing, give_updates, unchanged, zeros
from ._compensated import add_pairs, all_reduce
from ._contribution import check_flush, read_contribution, read_terms
from ._cycle_end import CycleEnd
from ._dtypes import at_least_float32
from ._optimizer import settled
from ._params import dtype_of_sum

# Of a call: of one gradient, or of each term's.
Weight = ArrayLike | Mapping[str, ArrayLike] | None


@dataclasses.dataclass(frozen=True, eq=False)
class OpenCycle:
    """What `accumulate` was given, checked, and what it does.

    Attributes:
        inner: the transformation that runs once per cycle.
        end: when a cycle is complete.
        axes: the axes over which sums stay apart until then; None if none was named,
            () if it was said that there is none.
        accum_dtype: the dtype of the sums; None for float32 at least.
        nonfinite: what becomes of a gradient that is not finite.
        terms: the terms that have sums and weights of their own; None if there is one.
    """

    inner: optax.GradientTransformation
    end: CycleEnd
    axes: tuple[str, ...] | None
    accum_dtype: Any
    nonfinite: str
    terms: tuple[str, ...] | None = None

    def init(self, params: PyTree) -> AccumulateState:
        """The state before the first call."""
        axes = self._axes_of_init()
        self._check_planned_steps()
        inner_state = settled(self.inner.init(params), params)
        if holds_accumulator(inner_state):
            raise ValueError(
                "inner accumulates gradients already, by jaxga.accumulate or "
                "optax.MultiSteps: its cycles would be cycles of cycles. Use one, "
                "around everything that runs once per update."
            )

        def empty(like, dtype):
            # A buffer for each: one that stood in the state twice could not be donated.
            like = jnp.asarray(like)
            like = like[None] if axes else like
            return varying(jnp.zeros_like(like, dtype=dtype), axes)

        def sum_of(param):
            return empty(param, dtype_of_sum(jnp.asarray(param), self.accum_dtype))

        def of_terms(make: Callable[[], PyTree]):
            return {t: make() for t in self.terms} if self.terms else make()

        return AccumulateState(
            sums=of_terms(lambda: jax.tree.map(sum_of, params)),
            sum_weight=of_terms(lambda: empty(jnp.zeros(2), jnp.float32)),
            sum_value=of_terms(lambda: empty(jnp.zeros(2), _value_dtype(params))),
            num_microbatches=jnp.zeros((), jnp.int32),
            inner_state=inner_state,
            update=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            grad_norm=jnp.zeros((), jnp.float32),
            weight=of_terms(lambda: jnp.zeros((), jnp.float32)),
            updated=jnp.zeros((), bool),
        )

    def update(
        self,
        grad_sums: PyTree,
        state: AccumulateState,
        params: PyTree = None,
        weight: Weight = None,
        flush: ArrayLike = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AccumulateState]:
        """The protocol of optax: returns updates, which are zeros in mid-cycle."""
        state, closes = self._add(grad_sums, state, weight, flush, extra_args)
        return self._closing.end_call(
            state, closes, params, extra_args, give_updates, zeros
        )

    def step(
        self,
        params: PyTree,
        state: AccumulateState,
        grad_sums: PyTree,
        weight: Weight = None,
        flush: ArrayLike = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AccumulateState]:
        """`update` and `optax.apply_updates` in one: nothing is made in mid-cycle."""
        state, closes = self._add(grad_sums, state, weight, flush, extra_args)
        self._check_params(params, state)
        return self._closing.end_call(
            state, closes, params, extra_args, optax.apply_updates, unchanged
        )

    def flush(
        self, params: PyTree, state: AccumulateState, **extra_args: Any
    ) -> tuple[PyTree, AccumulateState]:
        """Closes a cycle that has begun."""
        _check_state(state)
        self._check_params(params, state)
        axes_in_scope(self.axes)
        # Whether inner takes a value= is not known; one that does gets the mean so far.
        extra_args = {"value": jax.tree.leaves(state.sum_value)[0]} | extra_args
        closes = state.num_microbatches > 0
        return self._closing.end_call(
            state, closes, params, extra_args, optax.apply_updates, unchanged
        )

    def _check_params(self, params, state):
        sums = state.sums[self.terms[0]] if self.terms else state.sums
        structures = [jax.tree.structure(tree) for tree in (params, sums)]
        if structures[0] != structures[1]:
            raise ValueError(
                f"params has the structure {structures[0]}, but those that init was "
                f"given have {structures[1]}."
            )

    @property
    def _closing(self):
        return Closing(self.inner, self.axes or (), self.nonfinite)

    def _axes_of_init(self):
        try:
            return axes_in_scope(self.axes)
        except ValueError as error:
            if self.axes:
                raise ValueError(
                    f"accumulate was given axis_name={self.axes}, so that each device "
                    "keeps sums of its own, but tx.init was called where that axis is "
                    "not in scope. Call it inside the same jax.pmap or jax.shard_map "
                    "as tx.update: jax.shard_map(tx.init, mesh=mesh, in_specs=P(), "
                    "out_specs=jaxga.state_specs(tx, params, axis_name))."
                ) from error
            raise

    def _check_planned_steps(self):
        """What the function of updates returns, before the first call."""
        if callable(self.end.accum_steps):
            updates = jax.ShapeDtypeStruct((), jnp.int32)
            jax.eval_shape(lambda n: jnp.asarray(self.end.planned_steps(n)), updates)

    def _add(self, grads, state, weight, flush, extra_args):
        """The state with one more micro-batch, and whether the cycle ends with it.

        The first of a cycle overwrites: nothing is zeroed, and no NaN can stay.
        """
        _check_state(state)
        axes = axes_in_scope(self.axes)
        flush = check_flush(flush)
        dtype = jax.tree.leaves(state.sum_value)[0].dtype
        read = partial(read_terms, self.terms) if self.terms else read_contribution
        new = read(grads, weight, extra_args, state.sums, dtype, axes)
        if self.nonfinite == "drop_microbatch":
            new = new.or_nothing(axes)
        first = state.num_microbatches == 0

        def add(total, new, plus: Callable = jnp.add):
            new = new.astype(total.dtype).reshape(total.shape)
            return jnp.where(first, new, plus(total, new))

        state = state._replace(
            sums=jax.tree.map(add, state.sums, new.grads),
            sum_weight=jax.tree.map(
                partial(add, plus=add_pairs), state.sum_weight, new.weight
            ),
            sum_value=jax.tree.map(add, state.sum_value, new.value),
            num_microbatches=state.num_microbatches + 1,
        )

        def whole_weight():
            if not axes:
                return state.sum_weight
            return jax.tree.map(lambda w: all_reduce(w[0], axes), state.sum_weight)

        ends = self.end.reached(state.num_microbatches, state.update, whole_weight)
        return state, ends | flush


def _check_state(state):
    if not isinstance(state, AccumulateState):
        raise TypeError(
            f"state is of type {name_of_type(state)}; it must be what tx.init(params) "
            "returned. The orders are tx.update(grad_sums, state, params), "
            "tx.step(params, state, grad_sums) and tx.flush(params, state)."
        )


def _value_dtype(params):
    """Float32 at least, and as wide as the widest parameter."""
    dtypes = [at_least_float32(jnp.result_type(x)) for x in jax.tree.leaves(params)]
    return functools.reduce(
        jnp.promote_types, [jnp.finfo(dtype).dtype for dtype in dtypes], jnp.float32
    )
