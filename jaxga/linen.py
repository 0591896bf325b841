"""Training steps for Flax linen: on `flax.training.train_state.TrainState`."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from jax.typing import DTypeLike

from ._auto_size import build_step
from ._axes import AxisNames
from ._checks import describe, name_of_type
from ._keys import check_key
from ._linen_per_example import per_example as per_example
from ._linen_wgrad import float32_wgrad as float32_wgrad
from ._loss import LossOutput
from ._noise_scale import NoiseScale
from ._optimizer import add_note_on_dtypes, cast_like
from ._parallel import DataParallel
from ._params import OVERWRITTEN
from ._step import StateKind, Step


def make_train_step(
    loss_fn: Callable[..., Any],
    *,
    mutable: Sequence[str] = (),
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
    """Builds a jitted training step on Flax's own `TrainState`, or a subclass of it.

    The state's `apply_gradients` is called once per cycle, so that `step`, and every
    schedule, counts updates. Scales and histories of fp8 layers, which Flax keeps in
    `state.params["_overwrite_with_gradient"]`, are overwritten with the largest of all
    micro-batches, as the full batch would have left them; the histories of output
    gradients are those of the *summed* loss.

    A subclass with a field `noise_scale` that holds a `jaxga.NoiseScale` has it
    estimated, as `jaxga.TrainState` has.

    Args:
        loss_fn: as for `jaxga.value_and_grad`, with `params` as in `state.params`.
        mutable: names of fields of the state that the forward pass changes, as
            `("batch_stats",)`. They are handed to the loss function as
            `model_state={"batch_stats": ...}`, returned by it as
            `LossOutput(..., model_state=...)`, and written back.
        accum_steps: as for `jaxga.make_train_step`.
        microbatch_size: as for `jaxga.make_train_step`, `"auto"` too.
        global_batch_size: as for `jaxga.make_train_step`.
        parallel: as for `jaxga.make_train_step`.
        axis_name: as for `jaxga.make_train_step`.
        model_state_merge: as for `jaxga.value_and_grad`; a dict gives rules by field.
        per_example_keys: as for `jaxga.value_and_grad`.
        nonfinite: as for `jaxga.make_train_step`.
        accum_dtype: as for `jaxga.value_and_grad`.
        donate: as for `jaxga.make_train_step`. An optimizer whose state holds the very
            arrays of the parameters (`optax.contrib.prodigy`) needs them copied first:
            `state.replace(opt_state=jax.tree.map(jnp.copy, state.opt_state))`.

    Returns:
        `step(state, batch, *args, key=None, num_microbatches=None)`, which returns the
        new state and the record of metrics of `jaxga.make_train_step`; `update` is
        `state.step`. `key` is folded with `state.step`: the same key may be passed at
        every call.

    Raises:
        TypeError: a state that is no Flax `TrainState`; `mutable` is no tuple of names;
            and as for `jaxga.make_train_step`.
        ValueError: a name in `mutable` that is no field of the state; a state with a
            loss scale; and as for `jaxga.make_train_step`.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxga.linen
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> model = nn.Dense(1)
        >>> batch = {"x": jnp.ones((8, 3)), "y": jnp.zeros((8, 1))}
        >>> params = model.init(jax.random.key(0), batch["x"])["params"]
        >>> state = TrainState.create(
        ...     apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
        >>> def loss_fn(params, batch):
        ...     predicted = model.apply({"params": params}, batch["x"])
        ...     return jaxga.WeightedSum.of((predicted - batch["y"]) ** 2)
        >>> step = jaxga.linen.make_train_step(loss_fn, accum_steps=4)
        >>> state, metrics = step(state, batch)
        >>> print(metrics["update"], metrics["weight"])
        1 8
    """
    kind = _LinenState(mutable)
    joined = _with_overwritten(loss_fn, has_state=bool(mutable))
    return build_step(
        lambda settings: Step(kind, settings, parallel, nonfinite),
        joined,
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


# What a step writes itself.
_OWN_FIELDS = {field.name for field in dataclasses.fields(TrainState)}


class _LinenState(StateKind):
    def __init__(self, mutable):
        names = tuple(mutable) if isinstance(mutable, Iterable) else (mutable,)
        if isinstance(mutable, str) or not all(isinstance(n, str) for n in names):
            raise TypeError(
                f"mutable={mutable!r} must be a tuple of names of fields, "
                '("batch_stats",), say.'
            )
        self.mutable = names

    def check(self, state):
        if not isinstance(state, TrainState):
            raise TypeError(
                f"The state is of type {name_of_type(state)}; this step takes a Flax "
                "TrainState (flax.training.train_state). For a jaxga.TrainState there "
                "is jaxga.make_train_step, for an nnx.Module jaxga.nnx.make_train_step."
            )
        fields = {field.name for field in dataclasses.fields(state)} - _OWN_FIELDS
        for name in self.mutable:
            if name not in fields:
                raise ValueError(
                    f"mutable={self.mutable!r} names {name!r}, which is no field of "
                    f"{type(state).__name__} that a forward pass changes: "
                    f"{sorted(fields)}."
                )
        if hasattr(getattr(state, "loss_scale", None), "unscale"):
            raise ValueError(
                f"The state has loss_scale={describe(state.loss_scale)}, which this "
                "step does not use. jaxga.make_train_step does, with "
                "jaxga.TrainState.create(params, tx, loss_scale=...); its loss "
                "function may call the same model.apply."
            )
        if not isinstance(state.params, Mapping):
            raise TypeError(
                f"state.params is of type {name_of_type(state.params)}; Flax's "
                "apply_gradients needs a dict of parameters."
            )

    def read(self, state, key):
        model_state = {name: getattr(state, name) for name in self.mutable}
        params, overwritten = _split(state.params)
        model_state = model_state | overwritten or None
        check_key(key, per_example=False)
        if key is not None:
            key = jax.random.fold_in(key, state.step)
        return params, model_state, key

    def apply(self, state, grads, loss):
        # Flax overwrites with what stands beside the gradient: nothing new, until
        # `with_model_state`.
        grads = _join(grads, _split(state.params)[1])
        try:
            new = state.apply_gradients(grads=grads)
        except TypeError as error:
            add_note_on_dtypes(error, grads, state.params)
            raise
        return cast_like(new, state)

    def optimizer(self, state):
        return state.tx, state.opt_state

    def accumulated(self, state, params, opt_state, updated, skipped):
        # Not by apply_gradients, which has no place for a weight and counts calls.
        # Selected, not added: Flax's first step is Python's 0, and must stay weak.
        step = jnp.where(updated > 0, state.step + 1, state.step)
        params = _join(params, _split(state.params)[1])
        return state.replace(params=params, opt_state=opt_state, step=step)

    def skip(self, state):
        return state

    def with_model_state(self, state, model_state):
        if not model_state:
            return state
        fields = {k: v for k, v in model_state.items() if k != OVERWRITTEN}
        if OVERWRITTEN in model_state:
            new = {OVERWRITTEN: model_state[OVERWRITTEN]}
            fields["params"] = _join(_split(state.params)[0], new)
        return state.replace(**fields)

    def noise_scale(self, state):
        value = getattr(state, "noise_scale", None)
        return value if isinstance(value, NoiseScale) else None

    def with_noise_scale(self, state, noise_scale):
        return state.replace(noise_scale=noise_scale)

    def updates(self, state):
        return state.step


# Parameters of fp8 layers are `{"params": ..., "_overwrite_with_gradient": ...}`. The
# second are scales and histories, for which the backward pass gives new values in place
# of a gradient. The cycle gets them as model state, and keeps the largest of each.


def _split(params):
    """The parameters that have a gradient, and those that are overwritten with it."""
    if OVERWRITTEN not in params:
        return params, {}
    return params["params"], {OVERWRITTEN: params[OVERWRITTEN]}


def _join(params, overwritten):
    return {"params": params, **overwritten} if overwritten else params


def _with_overwritten(loss_fn, has_state):
    """`loss_fn`, such that it gets the parameters joined."""
    if not callable(loss_fn):
        return loss_fn  # refused elsewhere

    def joined(params, microbatch, *args, **keywords):
        state = keywords.get("model_state") or {}
        if OVERWRITTEN not in state:
            return loss_fn(params, microbatch, *args, **keywords)
        own = {name: x for name, x in state.items() if name != OVERWRITTEN}
        overwritten = {OVERWRITTEN: state[OVERWRITTEN]}
        keywords = {k: v for k, v in keywords.items() if k != "model_state"}
        keywords |= {"model_state": own} if own else {}
        output = loss_fn(_join(params, overwritten), microbatch, *args, **keywords)
        if not isinstance(output, LossOutput):
            output = LossOutput(output)
        state = (output.model_state or {}) | overwritten
        return dataclasses.replace(output, model_state=state)

    joined.__signature__ = _signature(loss_fn, has_state)
    return joined


def _signature(loss_fn, has_state):
    """That of `loss_fn`; if it takes no model state, with one, which it never gets."""
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):
        return None
    parameters = list(signature.parameters.values())
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if has_state or takes_all or "model_state" in signature.parameters:
        return signature
    extra = inspect.Parameter(
        "model_state", inspect.Parameter.KEYWORD_ONLY, default=None
    )
    return signature.replace(parameters=[*parameters, extra])
