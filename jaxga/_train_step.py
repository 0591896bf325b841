"""Training steps on `jaxga.TrainState`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax
from jax.typing import DTypeLike

from ._auto_size import build_step
from ._axes import AxisNames
from ._checks import name_of_type
from ._feeding import anywhere
from ._optimizer import check_transformation, run_transformation
from ._parallel import DataParallel
from ._params import check_no_overwritten
from ._step import StateKind, Step
from ._train_state import TrainState


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    accum_steps: int | None = None,
    microbatch_size: int | Literal["auto"] | None = None,
    global_batch_size: int | None = None,
    parallel: DataParallel | None = None,
    axis_name: AxisNames | None = None,
    model_state_merge: str | Mapping[str, str] = "carry",
    per_example_keys: bool = False,
    nonfinite: str = "skip_cycle",
    accum_dtype: DTypeLike | None = None,
    donate: bool = True,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Builds a jitted training step: one cycle of micro-batches, one optimizer update.

    Args:
        loss_fn: as for `jaxga.value_and_grad`. Metrics that it returns must be a dict.
        tx: the optimizer, an optax gradient transformation; the one that the state was
            made with. It runs once per cycle, on the finished gradient, and is given
            the loss as `value=`. One made by `jaxga.accumulate` is handed this call's
            sums and their weight instead: its cycle may span several calls. A call
            whose gradient is not finite then restores the model state that it changed.
        accum_steps: micro-batches per update. Give this or `microbatch_size`.
        microbatch_size: rows per micro-batch: with `parallel` or `axis_name`, of one
            device. `"auto"`: the largest that fits in the devices' memory, found as by
            `jaxga.plan_memory` at the first use of the step, the same on all processes;
            `step.plan` then says what was found. The step is compiled for a few sizes.
        global_batch_size: with `microbatch_size="auto"`, the batch's rows, over all
            devices: the sizes to choose from divide it.
        parallel: a `DataParallel`, for a mesh of devices.
        axis_name: instead of `parallel`, the axis or axes of the `pmap` or `shard_map`
            in which you call the step. The step is then not jitted.
        model_state_merge: as for `jaxga.value_and_grad`.
        per_example_keys: as for `jaxga.value_and_grad`.
        nonfinite: `"skip_cycle"`: a cycle whose gradient, merged over micro-batches and
            devices, is not finite changes nothing, and is counted. `"propagate"`: it is
            applied as it is. A cycle without any weight changes nothing either way.
        accum_dtype: as for `jaxga.value_and_grad`.
        donate: whether the state's buffers are reused for the new state; the state
            passed in can then not be used again.

    Returns:
        `step(state, batch, *args, key=None, num_microbatches=None)`, which returns the
        new `TrainState` and a dict of metrics, one record for the update: `loss`; each
        term of a loss that is a dict; `weight` (of a loss of several terms, a dict by
        term); `grad_norm`, of the divided gradient; the loss function's own metrics;
        `update`, optimizer updates so far; `skipped`, 1 if this cycle changed nothing,
        0 otherwise; `noise_scale`, if the state has one. (Where `tx` accumulates over
        calls, `loss` and `weight` are those of the call, `grad_norm` is that of the
        last cycle that ended, and `skipped` is 1 in the call that ended a cycle which
        changed nothing.) `key=` is for one call; a state with a key needs none.

    Raises:
        TypeError: `tx` is no gradient transformation; `parallel` is no `DataParallel`;
            a state of another kind; metrics that are no dict.
        ValueError: `parallel` and `axis_name` together; an unknown `nonfinite`; a
            metric with the name of an entry of the record; `"auto"` without
            `global_batch_size` or with `axis_name`, or nothing fits, or a device does
            not say how much memory it has (a CPU: `jaxga.plan_memory` takes a budget);
            and as for `jaxga.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> import optax
        >>> def loss_fn(params, batch):
        ...     losses = (batch["x"] @ params - batch["y"]) ** 2
        ...     return jaxga.WeightedSum.of(losses)
        >>> tx = optax.sgd(0.1)
        >>> step = jaxga.make_train_step(loss_fn, tx, accum_steps=2)
        >>> state = jaxga.TrainState.create(jnp.zeros(2), tx)
        >>> batch = {"x": jnp.eye(4, 2), "y": jnp.ones(4)}
        >>> state, metrics = step(state, batch)
        >>> print(state.params, metrics["loss"], metrics["update"])
        [0.05 0.05] 1.0 1
    """
    check_transformation("tx", tx)
    return build_step(
        lambda settings: Step(_PlainState(tx), settings, parallel, nonfinite),
        loss_fn,
        accum_steps=accum_steps,
        microbatch_size=microbatch_size,
        global_batch_size=global_batch_size,
        parallel=parallel,
        axis_name=axis_name,
        donate=donate,
        accum_dtype=accum_dtype,
        model_state_merge=model_state_merge,
        per_example_keys=per_example_keys,
    )


class _PlainState(StateKind):
    def __init__(self, tx):
        self.tx = tx

    def check(self, state):
        if not isinstance(state, TrainState):
            raise TypeError(
                f"The state is of type {name_of_type(state)}; this step takes a "
                "jaxga.TrainState, as jaxga.TrainState.create(params, tx) makes it. "
                "For Flax's own TrainState there is jaxga.linen.make_train_step, for "
                "an nnx.Module jaxga.nnx.make_train_step."
            )
        check_no_overwritten(state.params)
        init = anywhere(self.tx).init
        made = jax.tree.structure(jax.eval_shape(init, state.params))
        if made != jax.tree.structure(state.opt_state):
            raise ValueError(
                "The state's opt_state was made by another optimizer than the step's: "
                f"{jax.tree.structure(state.opt_state)}, not {made}. Give "
                "jaxga.TrainState.create(params, tx) and the step the same tx."
            )

    def read(self, state, key):
        if state.key is not None and key is not None:
            raise ValueError(
                "The state has a key of its own, and key= was given too. Leave out one "
                "of them."
            )
        if state.key is not None:
            key = jax.random.fold_in(state.key, state.update + state.skipped)
        return state.params, state.model_state, key

    def apply(self, state, grads, loss):
        updates, opt_state = run_transformation(
            self.tx, grads, state.opt_state, state.params, {"value": loss}
        )
        return dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            update=state.update + 1,
        )

    def optimizer(self, state):
        return self.tx, state.opt_state

    def accumulated(self, state, params, opt_state, updated, skipped):
        return dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            update=state.update + updated,
            skipped=state.skipped + skipped,
        )

    def skip(self, state):
        return dataclasses.replace(state, skipped=state.skipped + 1)

    def with_model_state(self, state, model_state):
        return dataclasses.replace(state, model_state=model_state)

    def loss_scale(self, state):
        return state.loss_scale

    def with_loss_scale(self, state, loss_scale):
        return dataclasses.replace(state, loss_scale=loss_scale)

    def noise_scale(self, state):
        return state.noise_scale

    def with_noise_scale(self, state, noise_scale):
        return dataclasses.replace(state, noise_scale=noise_scale)

    def updates(self, state):
        return state.update
