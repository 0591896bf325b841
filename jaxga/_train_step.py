"""A whole training step: one cycle, and one update of the optimizer or none."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from ._axes import AxisNames
from ._checks import PyTree, describe
from ._cycle import Cycle, CycleSettings
from ._dtypes import as_total
from ._parallel import DataParallel
from ._sums import divide_gradient, inverse
from ._value_and_grad import CycleOutput, finish_output


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training run changes. Make one with `TrainState.create`.

    Attributes:
        params: the parameters.
        opt_state: the optimizer's state.
        model_state: what the forward pass changes (batch statistics); None without.
        key: random key of the run, never advanced: a step folds it with the number of
            cycles so far. None without.
        loss_scale: not built yet; None.
        noise_scale: not built yet; None.
        update: int32 scalar, optimizer updates so far.
        skipped: int32 scalar, cycles so far that changed nothing, because their
            gradient was not finite or no weight arrived.
    """

    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    key: jax.Array | None
    loss_scale: Any
    noise_scale: Any
    update: jax.Array
    skipped: jax.Array

    @classmethod
    def create(
        cls,
        params: PyTree,
        tx: optax.GradientTransformation,
        *,
        model_state: PyTree = None,
        key: jax.Array | None = None,
        loss_scale: Any = None,
        noise_scale: Any = None,
    ) -> "TrainState":
        """A state before the first update.

        Args:
            params: pytree of floating-point arrays.
            tx: the optimizer, an optax gradient transformation.
            model_state: what the forward pass changes, if anything.
            key: a random key for the run, if the loss function takes `key=`.
            loss_scale: not built yet.
            noise_scale: not built yet.

        Raises:
            TypeError: `tx` is no gradient transformation.
            NotImplementedError: `loss_scale` or `noise_scale` is given.

        Example:
            >>> import jax.numpy as jnp
            >>> import jaxga
            >>> import optax
            >>> state = jaxga.TrainState.create(jnp.zeros(3), optax.adam(1e-3))
            >>> print(state.update, state.skipped)
            0 0
        """
        check_tx(tx)
        for name, value in {
            "loss_scale": loss_scale,
            "noise_scale": noise_scale,
        }.items():
            if value is not None:
                raise NotImplementedError(f"{name}= is not built yet; leave it out.")
        return cls(
            params=params,
            opt_state=tx.init(params),
            model_state=model_state,
            key=key,
            loss_scale=None,
            noise_scale=None,
            update=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
        )


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    accum_steps: int | None = None,
    microbatch_size: int | None = None,
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
            the loss as `value=`.
        accum_steps: micro-batches per update. Give this or `microbatch_size`.
        microbatch_size: rows per micro-batch: with `parallel` or `axis_name`, of one
            device.
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
        0 otherwise. `key=` is for one call; a state with a key needs none.

    Raises:
        TypeError: `tx` is no gradient transformation; `parallel` is no `DataParallel`;
            a state of another kind; metrics that are no dict.
        ValueError: `parallel` and `axis_name` together; an unknown `nonfinite`; a
            metric with the name of an entry of the record; and as for
            `jaxga.value_and_grad`.

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
    check_tx(tx)
    settings = CycleSettings(
        loss_fn,
        accum_steps=accum_steps,
        microbatch_size=microbatch_size,
        axis_name=parallel_axis(parallel, axis_name),
        accum_dtype=accum_dtype,
        model_state_merge=model_state_merge,
        per_example_keys=per_example_keys,
    )
    step = build_step(_PlainState(tx), settings, parallel, nonfinite)
    if axis_name is not None:
        return step
    return jax.jit(step, donate_argnums=(0,) if donate else ())


class StateKind:
    """How a step reads and writes a kind of train state."""

    def check(self, state: Any) -> None:
        raise NotImplementedError

    def read(self, state: Any, key: jax.Array | None) -> tuple[PyTree, PyTree, Any]:
        """Its parameters, its model state, and the key of the next cycle."""
        raise NotImplementedError

    def apply(self, state: Any, grads: PyTree, loss: jax.Array) -> Any:
        """The state after an update, its model state apart."""
        raise NotImplementedError

    def skip(self, state: Any) -> Any:
        """The state after a cycle that changes nothing."""
        raise NotImplementedError

    def with_model_state(self, state: Any, model_state: PyTree) -> Any:
        raise NotImplementedError

    def updates(self, state: Any) -> jax.Array:
        """How many updates there have been."""
        raise NotImplementedError


class _PlainState(StateKind):
    def __init__(self, tx):
        self.tx = optax.with_extra_args_support(tx)

    def check(self, state):
        if not isinstance(state, TrainState):
            raise TypeError(
                f"The state is of type {type(state).__name__}; this step takes a "
                "jaxga.TrainState, as jaxga.TrainState.create(params, tx) makes it. "
                "For Flax's own TrainState there is jaxga.linen.make_train_step."
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
        try:
            updates, opt_state = self.tx.update(
                grads, state.opt_state, state.params, value=loss
            )
        except TypeError as error:
            add_note_on_dtypes(error, grads, state.params)
            raise
        return dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            opt_state=cast_like(opt_state, state.opt_state),
            update=state.update + 1,
        )

    def skip(self, state):
        return dataclasses.replace(state, skipped=state.skipped + 1)

    def with_model_state(self, state, model_state):
        return dataclasses.replace(state, model_state=model_state)

    def updates(self, state):
        return state.update


def build_step(
    kind: StateKind,
    settings: CycleSettings,
    parallel: DataParallel | None,
    nonfinite: str,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """The step on any kind of state, not jitted."""
    if nonfinite not in ("skip_cycle", "propagate"):
        raise ValueError(
            f"{nonfinite=} must be 'skip_cycle' or 'propagate'. (Leaving out single "
            "micro-batches needs a gradient of each, which this step never holds.)"
        )

    def run_cycle(batch, whole):
        params, args, model_state, key, num_microbatches = whole
        cycle = Cycle(
            settings,
            params,
            batch,
            args,
            model_state=model_state,
            key=key,
            num_microbatches=num_microbatches,
        )
        return cycle.run(reduce=True)

    def train_step(state, batch, *args, key=None, num_microbatches=None):
        kind.check(state)
        params, old_model_state, key = kind.read(state, key)
        whole = (params, args, old_model_state, key, num_microbatches)
        run = run_cycle if parallel is None else parallel.divide(run_cycle)
        sums, grads = run(batch, whole)
        output = finish_output(sums, None)
        norm = optax.tree.norm(jax.tree.map(as_total, grads.total))
        good = _is_good(output.weights, norm, nonfinite)
        # The summed gradient is only read in the branch that divides it: divided
        # before it, or handed through, it would need a second buffer.
        new = jax.lax.cond(
            good,
            lambda old: kind.apply(old, divide_gradient(grads), output.loss),
            kind.skip,
            state,
        )
        new = kind.with_model_state(
            new, _select(good, output.model_state, old_model_state)
        )
        return new, _record(
            sums.loss,
            output,
            grad_norm=norm * inverse(grads.weight, norm.dtype),
            update=kind.updates(new),
            skipped=1 - good.astype(jnp.int32),
        )

    return train_step


def check_tx(tx: Any) -> None:
    """Refuses what is no optax gradient transformation."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx is {describe(tx)}; it must be an optax gradient transformation, "
            "optax.adamw(1e-3), say."
        )


def parallel_axis(
    parallel: DataParallel | None, axis_name: AxisNames | None
) -> AxisNames | None:
    """The axis that a step's cycle merges over."""
    if parallel is None:
        return axis_name
    if not isinstance(parallel, DataParallel):
        raise TypeError(
            f"parallel is {describe(parallel)}; it must be a jaxga.DataParallel(mesh)."
        )
    if axis_name is not None:
        raise ValueError(
            f"parallel and axis_name={axis_name!r} exclude each other: with parallel "
            "the step makes its own shard_map, with axis_name it is called in yours."
        )
    return parallel.axes


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """An optimizer's new state in the dtypes that `init` gave it."""

    def cast(leaf, like):
        same = getattr(leaf, "dtype", None) == getattr(like, "dtype", None)
        return leaf if same else jnp.asarray(leaf, like.dtype)

    return jax.tree.map(cast, tree, like)


def add_note_on_dtypes(error: TypeError, grads: PyTree, params: PyTree) -> None:
    """Says what to do where an optimizer cannot mix dtypes."""
    dtypes = [
        {leaf.dtype for leaf in jax.tree.leaves(tree)} for tree in (grads, params)
    ]
    if dtypes[0] != dtypes[1]:
        error.add_note(
            "jaxga: gradients are handed to the optimizer in the dtype in which they "
            "were summed, float32 for bfloat16 parameters, and this transformation "
            "cannot mix the two. Put optax.stateless(lambda updates, params: "
            "optax.tree.cast_like(updates, params)) before it in an optax.chain."
        )


def _is_good(weights, norm, nonfinite):
    """Whether a cycle is applied: it has some weight, and is finite if that is asked."""
    weights = jnp.stack([jnp.asarray(w, jnp.float32) for w in weights.values()])
    has_weight = (weights != 0).any()
    if nonfinite == "propagate":
        return has_weight
    # A negative weight is a count that ran over; NaN compares false.
    return has_weight & jnp.isfinite(norm) & (weights >= 0).all()


def _select(good, new, old):
    """A model state or the one before; a leaf that nothing touched as it is."""

    def select(new, old):
        return new if new is old else jnp.where(good, new, old)

    return jax.tree.map(select, new, old)


def _record(loss: PyTree, output: CycleOutput, **counts) -> dict[str, Any]:
    """One record per update, each name once."""
    metrics = {} if output.metrics is None else output.metrics
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"loss_fn returned metrics of type {type(metrics).__name__}; a training "
            "step needs a dict of metrics by name."
        )
    weights = output.weights if len(output.weights) > 1 else output.weight
    record = {"loss": output.loss, "weight": weights} | counts
    terms = output.terms if isinstance(loss, dict) else {}
    if len(terms) == 1:
        terms.pop("loss", None)  # the only term is the objective
    for what, entries in (("term", terms), ("metric", metrics)):
        for name, value in entries.items():
            if name in record:
                raise ValueError(
                    f"The {what} {name!r} has the name of another entry of the step's "
                    f"record, {sorted(record)}. Give it another name."
                )
            record[name] = value
    return record
