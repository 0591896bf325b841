"""Training steps for Flax nnx: on modules and `nnx.Optimizer`, updated in place."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import nnx
from jax.typing import DTypeLike

from ._auto_size import build_step
from ._axes import AxisNames
from ._cycle_settings import CycleSettings
from ._nnx_loss import on_arrays
from ._nnx_per_example import per_example as per_example
from ._nnx_state import as_variables, take_apart
from ._nnx_step import NnxKind, NnxStep, TrainStep, check_model
from ._nnx_wgrad import float32_wgrad as float32_wgrad
from ._parallel import DataParallel
from ._value_and_grad import CycleOutput
from ._value_and_grad import value_and_grad as value_and_grad_of_arrays

__all__ = ["float32_wgrad", "make_train_step", "per_example", "value_and_grad"]


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    wrt: Any = nnx.Param,
    accum_steps: int | None = None,
    microbatch_size: int | None = None,
    axis_name: AxisNames | None = None,
    accum_dtype: DTypeLike | None = None,
    model_state_merge: str | Mapping[Any, str] = "carry",
    per_example_keys: bool = False,
) -> Callable[..., tuple[CycleOutput, nnx.State]]:
    """Like `nnx.value_and_grad`, at the memory of one micro-batch.

    See `jaxga.value_and_grad`, which computes it. Variables other than those of `wrt`
    are updated in place: batch statistics, the counts of random streams, metrics.

    Args:
        loss_fn: `loss_fn(model, microbatch, *args)`, with `key=` added where the cycle
            was given one. Returns what `jaxga.value_and_grad` says, without a
            `model_state`.
        wrt: a filter of nnx, the variables to differentiate by.
        accum_steps: as for `jaxga.value_and_grad`.
        microbatch_size: as for `jaxga.value_and_grad`.
        axis_name: as for `jaxga.value_and_grad`. Random keys in the model are folded
            with the device's index during the cycle: dropout differs between devices.
        accum_dtype: as for `jaxga.value_and_grad`.
        model_state_merge: as for `jaxga.value_and_grad`: one rule, or a dict of rules
            by filter of nnx, `{nnx.BatchStat: "mean"}`; what no filter matches is
            carried. Random streams are always carried, and so are metrics of nnx; over
            devices, what was added to an `nnx.metrics.Average` is summed.
        per_example_keys: as for `jaxga.value_and_grad`; see `per_example` too.

    Returns:
        `cycle(model, batch, *args, key=None, num_microbatches=None,
        term_weights=None)`, which returns `(CycleOutput, grads)`. `grads` is an
        `nnx.State` of the variables of `wrt`, as `nnx.grad` gives it. Arguments that
        hold nnx objects (an `nnx.MultiMetric`, a reference model) are updated in place
        too. Wrap it in `nnx.jit`, or call it inside such a function.

    Raises:
        TypeError: `model` is no nnx module; over devices, a metric other than an
            average was written to; and as for `jaxga.value_and_grad`.
        ValueError: `wrt` matches nothing; the loss function makes variables or takes
            them away, changes an attribute, or writes to a parameter; and as for
            `jaxga.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga.nnx
        >>> from flax import nnx
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.norm = nnx.BatchNorm(3, rngs=rngs)
        ...         self.out = nnx.Linear(3, 1, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.out(self.norm(x))
        >>> def loss_fn(model, batch):
        ...     return jaxga.WeightedSum.of((model(batch["x"]) - batch["y"]) ** 2)
        >>> model = Net(nnx.Rngs(0))
        >>> batch = {"x": jnp.ones((8, 3)), "y": jnp.ones((8, 1))}
        >>> cycle = nnx.jit(jaxga.nnx.value_and_grad(loss_fn, accum_steps=2))
        >>> output, grads = cycle(model, batch)
        >>> print(output.weight, grads["out"]["bias"].shape)
        8 (1,)
        >>> print(f"{model.norm.mean[0]:.4f}")  # moved on twice, by 1 % of the way
        0.0199
    """
    settings = CycleSettings(
        loss_fn,
        accum_steps=accum_steps,
        microbatch_size=microbatch_size,
        axis_name=axis_name,
        accum_dtype=accum_dtype,
        model_state_merge=model_state_merge,
        per_example_keys=per_example_keys,
    )

    def cycle(
        model: nnx.Module,
        batch: Any,
        *args: Any,
        key: jax.Array | None = None,
        num_microbatches: int | jax.Array | None = None,
        term_weights: Mapping[str, Any] | None = None,
    ):
        check_model(model)
        parts = take_apart(model, args, wrt, model_state_merge)
        on = on_arrays(settings, parts.nodes, parts.model_state)
        run = value_and_grad_of_arrays(**vars(on))
        output, grads = run(
            parts.params,
            batch,
            *parts.plain,
            model_state=parts.model_state,
            key=key,
            num_microbatches=num_microbatches,
            term_weights=term_weights,
        )
        parts.write({}, output.metrics.add_to(output.model_state))
        output = CycleOutput(
            output.loss,
            output.terms,
            output.weights,
            output.metrics.returned,
            model_state=None,
        )
        return output, as_variables(grads, parts.variables)

    return cycle


def make_train_step(
    loss_fn: Callable[..., Any],
    *,
    accum_steps: int | None = None,
    microbatch_size: int | Literal["auto"] | None = None,
    global_batch_size: int | None = None,
    parallel: DataParallel | None = None,
    axis_name: AxisNames | None = None,
    model_state_merge: str | Mapping[Any, str] = "carry",
    per_example_keys: bool = False,
    nonfinite: str = "skip_cycle",
    accum_dtype: DTypeLike | None = None,
    donate: bool = True,
) -> TrainStep:
    """Builds a jitted training step on an `nnx.Module` and its `nnx.Optimizer`.

    One cycle of micro-batches, one call of the optimizer's `update`, with the gradient
    of the variables that are its `wrt`. All other variables are model state: they are
    updated by the forward pass, and a frozen part of the model has no accumulator and
    is not communicated.

    For the gradient noise scale, give the optimizer a variable that holds it:
    `optimizer.noise_scale = nnx.Variable(jaxga.NoiseScale(per="microbatch"))`.

    Args:
        loss_fn: as for `jaxga.nnx.value_and_grad`. Metrics that it returns must be a
            dict.
        accum_steps: as for `jaxga.make_train_step`.
        microbatch_size: as for `jaxga.make_train_step`, `"auto"` too.
        global_batch_size: as for `jaxga.make_train_step`.
        parallel: as for `jaxga.make_train_step`. Dropout differs between devices. The
            first call lays the arrays of model and optimizer out on the mesh. A model
            that is too large for one device is made there:
            `model = parallel.init(lambda: Model(nnx.Rngs(0)))`.
        axis_name: as for `jaxga.make_train_step`.
        model_state_merge: as for `jaxga.nnx.value_and_grad`.
        per_example_keys: as for `jaxga.value_and_grad`; see `per_example` too.
        nonfinite: as for `jaxga.make_train_step`. A skipped cycle restores all that
            the forward pass changed, and the optimizer's `step` does not count it.
        accum_dtype: as for `jaxga.value_and_grad`.
        donate: whether the arrays of the model, of the optimizer and of the nnx objects
            among `args` are reused for the new ones. What else refers to these very
            arrays (an `nnx.state(model)` from before, a clone without `arrays=True`)
            can then not be used again.

    Returns:
        `step(model, optimizer, batch, *args, key=None, num_microbatches=None)`, which
        updates model, optimizer and the nnx objects among `args` in place, and returns
        the record of metrics of `jaxga.make_train_step`; `update` is `optimizer.step`.
        `key` is folded with `optimizer.step`: the same key may be passed at every call.
        An optimizer made with `jaxga.accumulate` is handed the call's sums and their
        weight, by its own `step` instead of `update`. `step.lower`, of the same
        arguments, is that of `jax.jit`. It can be called inside an `nnx.jit` too.

    Raises:
        TypeError: a model that is no `nnx.Module`, an optimizer that is no
            `nnx.Optimizer`; and as for `jaxga.nnx.value_and_grad`.
        ValueError: the optimizer was made for other variables than its `wrt` names now;
            and as for `jaxga.nnx.value_and_grad` and `jaxga.make_train_step`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga.nnx
        >>> import optax
        >>> from flax import nnx
        >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        >>> def loss_fn(model, batch, metrics):
        ...     losses = (model(batch["x"]) - batch["y"]) ** 2
        ...     metrics.update(values=losses)
        ...     return jaxga.WeightedSum.of(losses)
        >>> step = jaxga.nnx.make_train_step(loss_fn, accum_steps=4)
        >>> batch = {"x": jnp.ones((8, 3)), "y": jnp.zeros((8, 1))}
        >>> average = nnx.metrics.Average()
        >>> metrics = step(model, optimizer, batch, average)
        >>> print(metrics["update"], metrics["weight"], average.count[...])
        1 8 8
    """
    jitted = build_step(
        lambda settings: NnxStep(NnxKind(), settings, parallel, nonfinite),
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
    return TrainStep(jitted, model_state_merge, parallel)
