"""Accumulation as an optax transformation: one micro-batch per call."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from ._accumulate_state import AccumulateState
from ._axes import AxisNames, check_axis_name
from ._checks import PyTree
from ._cycle_end import CycleEnd, Steps
from ._open_cycle import OpenCycle, Weight
from ._optimizer import check_transformation
from ._params import check_accum_dtype, warn_of_swamping

_POLICIES = ("skip_cycle", "drop_microbatch", "propagate")


class Accumulate(optax.GradientTransformationExtraArgs):
    """What `accumulate` returns: `init` and `update` as optax has them, and two more.

    `optax.chain` and every other wrapper of optax sees `init` and `update` only: what
    it returns has neither `step` nor `flush`.
    """

    __slots__ = ()

    @property
    def cycle(self) -> OpenCycle:
        """The settings: of optax, a transformation is two functions, and is rebuilt
        from them; they are all that it can hold."""
        update: Any = self.update
        return update.__self__

    def step(
        self,
        params: PyTree,
        state: AccumulateState,
        grad_sums: PyTree,
        weight: Weight = None,
        flush: ArrayLike = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AccumulateState]:
        """Adds a micro-batch, and applies the update if the cycle ends with it.

        The same numbers as `update` and `optax.apply_updates`, at the cost of an
        addition in mid-cycle. It takes and returns in the same order: jitted as
        `jax.jit(tx.step, donate_argnums=(0, 1))`, or inside a function of the user's
        own that does so, every buffer is updated in place.

        Args:
            params: the parameters.
            state: as `init` or the last call returned it.
            grad_sums: as for `update`.
            weight: as for `update`.
            flush: as for `update`.
            **extra_args: as for `update`.

        Returns:
            The parameters and the state.

        Raises:
            TypeError: as for `accumulate`.
            ValueError: as for `accumulate`.
        """
        return self.cycle.step(params, state, grad_sums, weight, flush, **extra_args)

    def flush(
        self, params: PyTree, state: AccumulateState, **extra_args: Any
    ) -> tuple[PyTree, AccumulateState]:
        """Closes a cycle short, at the end of an epoch, say.

        The update is exactly that of the micro-batches that are in. With none in,
        nothing changes, and `has_updated` is false.

        Args:
            params: the parameters.
            state: the state.
            **extra_args: what `inner` needs besides; `value` is the mean so far.

        Returns:
            The parameters and the state.

        Raises:
            TypeError: as for `accumulate`.
            ValueError: as for `accumulate`.
        """
        return self.cycle.flush(params, state, **extra_args)


def accumulate(
    inner: optax.GradientTransformation,
    accum_steps: Steps | None = None,
    *,
    until_weight: ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    accum_dtype: DTypeLike | None = None,
    nonfinite: str = "skip_cycle",
    terms: Sequence[str] | None = None,
) -> Accumulate:
    """Gives an optimizer one update per cycle of calls, one micro-batch per call.

    Each call adds an undivided gradient and its weight. When the cycle is complete, the
    sum is divided by the whole weight, and `inner` runs, once: the update is that of
    one batch of all micro-batches, however unequal they are. What counts or schedules
    inside `inner` counts updates. What stands outside, chained after it, is called
    every time, with zeros in mid-cycle: a schedule or weight decay belongs inside,
    `accumulate(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), 8)`.
    A transformation chained *before* it sees the gradient of each micro-batch.

    Args:
        inner: any optax gradient transformation. With bfloat16 parameters it is handed
            float32 gradients; its state keeps the dtypes that `inner.init` gave it.
        accum_steps: calls per cycle: an integer, or a function of the number of updates
            so far (batch-size warm-up), which is traced: nothing is compiled again.
        until_weight: weight that completes a cycle, in the unit of `weight=`: tokens,
            say. With `accum_steps` too, whichever comes first; one of them is needed.
            With `terms`, a dict: of the terms in it, whichever comes first.
        axis_name: the axis or axes of the `pmap` or `shard_map` in which `init` and
            `update` are called. Each device then sums its own gradients, and they are
            reduced once per cycle (with `until_weight`, the weight at each call).
            Without, gradients must be the same on all devices; `()` says that they are.
        accum_dtype: dtype of the sums. By default each leaf is summed in float32, or in
            its own dtype if that is wider.
        nonfinite: `"skip_cycle"`: a cycle whose gradient, summed over calls and
            devices, is not finite changes nothing, and is counted. `"drop_microbatch"`:
            a micro-batch whose gradient is not finite is left out, with its weight, by
            the device that has it. `"propagate"`: it is applied as it is. A gradient
            counts as not finite if its norm overflows, its weight is negative or not
            finite, or its `value=` is not finite. A cycle without any weight changes
            nothing either way, and is counted.
        terms: the names of the terms of a loss that is a dict, if each is to be divided
            by a weight of its own, and none of these weights is known before the cycle
            is over. `grad_sums`, `weight` and `value` are then dicts by term, as
            `jaxga.value_and_grad_sums(..., separate_terms=True)` gives them, and each
            term has an accumulator of its own, of the parameters' size. Where the
            loader knows the weights of a cycle, `term_weights` needs one accumulator
            and one backward pass for all: call `jaxga.value_and_grad_sums` with them,
            and this without `terms` and with `weight=1 / n`, where `n` is the number of
            calls that the cycle will have, also if it is flushed early. Wrappers that
            look at a gradient leaf by leaf (`optax.masked`, `apply_if_finite`) go
            inside, for outside they would see a dict by term.

    Returns:
        A `GradientTransformationExtraArgs` with two more methods.
        `update(grad_sums, state, params, weight=None, flush=False, **extra_args)`:
        `grad_sums` is the gradient of the summed loss, `weight` what that sum is to be
        divided by. Without `weight` the gradient is taken to be a mean already, and
        each call counts alike, as in `optax.MultiSteps`. `flush`, a boolean that may be
        traced and must be the same on all devices, ends the cycle with this call.
        `value=`, the micro-batch's mean loss, reaches `inner` as the weighted mean over
        the cycle; other arguments as they are given at the call that ends it. (A line
        search evaluates its `value_fn`, which must be that of the whole cycle's data.)
        `step(params, state, grad_sums, ...)` also applies the update and is faster;
        `flush(params, state)` closes a short cycle. Optax's wrappers hide both.
        The state is a tree of fixed shape that counts micro-batches, updates and
        skipped cycles, and keeps `grad_norm` and `weight` of the last cycle.

    Raises:
        TypeError: `inner` is no gradient transformation; `accum_steps`, or what it
            returns, is no integer; `until_weight` or `weight` is no real number;
            `terms` are no names; `flush` is no boolean; a gradient that is no number,
            or complex where the parameter is real; a state of another transformation.
        ValueError: neither `accum_steps` nor `until_weight`; one that is not positive;
            an unknown `nonfinite`; `inner` accumulates already; a gradient of another
            structure or shape than the parameters; a weight or value that is no scalar;
            a `flush` that varies over devices; an axis that is not in scope, or one in
            scope and no `axis_name`; a gradient that does not vary over `axis_name`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> import optax
        >>> tx = jaxga.accumulate(optax.sgd(0.1), accum_steps=2)
        >>> params = jnp.zeros(2)
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(0, 1))
        >>> for grad_sum, tokens in ((6.0, 1), (2.0, 3)):
        ...     params, state = step(params, state, jnp.full(2, grad_sum), tokens)
        ...     print(params, jaxga.has_updated(state))
        [0. 0.] False
        [-0.2 -0.2] True
        >>> params, state = step(params, state, jnp.ones(2), 1)
        >>> params, state = tx.flush(params, state)
        >>> print(params, state.update, state.weight)
        [-0.3 -0.3] 2 1.0
    """
    if isinstance(inner, optax.MultiSteps):
        raise ValueError(
            "inner is an optax.MultiSteps, which accumulates gradients by itself. Give "
            "accumulate the optimizer that MultiSteps was given."
        )
    check_transformation("inner", inner)
    if nonfinite not in _POLICIES:
        raise ValueError(
            f"{nonfinite=} must be one of {', '.join(map(repr, _POLICIES))}."
        )
    terms = _check_terms(terms)
    cycle = OpenCycle(
        inner=inner,
        end=CycleEnd(accum_steps, until_weight, terms),
        axes=check_axis_name(axis_name),
        accum_dtype=check_accum_dtype(accum_dtype),
        nonfinite=nonfinite,
        terms=terms,
    )
    if isinstance(cycle.end.accum_steps, int):
        warn_of_swamping(cycle.accum_dtype, cycle.end.accum_steps)
    return _made_of(cycle)


def for_reduced_gradients(tx: Accumulate) -> Accumulate:
    """The same, for gradients that have been summed over the devices already.

    A step that reduces its own cycle over `axis_name` calls this, and runs inside the
    map of the caller without being asked for an axis.
    """
    return _made_of(dataclasses.replace(tx.cycle, axes=()))


def _check_terms(terms):
    if terms is None:
        return None
    names = tuple(terms) if isinstance(terms, list | tuple) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"terms={terms!r} must be a tuple of the names of the loss's terms, "
            '("cross_entropy", "load_balance"), say.'
        )
    if len(set(names)) < len(names):
        raise ValueError(f"terms={terms!r} names a term twice.")
    return names


def _made_of(cycle: OpenCycle) -> Accumulate:
    update: Any = cycle.update  # optax has other names for its arguments
    return Accumulate(cycle.init, update)
