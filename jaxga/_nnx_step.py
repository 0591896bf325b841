"""A training step on nnx objects: their arrays as a state, and back."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import optax
from flax import nnx

from ._checks import PyTree, name_of_type, place
from ._feeding import anywhere
from ._keys import check_key
from ._memory.plan import MemoryPlan
from ._nnx_loss import on_arrays
from ._nnx_state import Nodes, Parts, as_variables, take_apart
from ._noise_scale import NoiseScale
from ._optimizer import add_note_on_dtypes, cast_like, settled
from ._parallel import DataParallel
from ._step import StateKind, Step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NnxState:
    """All arrays of a model, of its optimizer and of other nnx objects.

    Attributes:
        params: the variables that the optimizer is for.
        opt_state: the state of the optax transformation.
        model_state: all other variables of the model and of the objects beside it.
        counters: all other variables of the optimizer, its `step` among them.
        nodes: what the model and the objects are besides.
        graphdef: what the optimizer is besides.
    """

    params: PyTree
    opt_state: PyTree
    model_state: dict[str, PyTree]
    counters: dict[str, PyTree]
    nodes: Nodes = dataclasses.field(metadata={"static": True})
    graphdef: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, parts: Parts, optimizer: nnx.Optimizer) -> "NnxState":
        opt_state, counters, graphdef = read_optimizer(optimizer)
        return cls(
            params=parts.params,
            opt_state=opt_state,
            model_state=parts.model_state,
            counters=counters,
            nodes=parts.nodes,
            graphdef=graphdef,
        )

    def optimizer(self) -> nnx.Optimizer:
        """A new optimizer that holds these arrays."""
        state = nnx.State(self.counters | _entry(self.opt_state))
        return nnx.merge(self.graphdef, state, copy=True)

    def model(self) -> nnx.Module:
        """A new model that holds these arrays."""
        return self.nodes.merge(self.params, self.model_state)[0]

    def write(self, parts: Parts, optimizer: nnx.Optimizer) -> None:
        """Writes the arrays into the objects of the caller."""
        parts.write(self.params, self.model_state)
        nnx.update(optimizer, nnx.State(self.counters | _entry(self.opt_state)))


def read_optimizer(optimizer: nnx.Optimizer) -> tuple[PyTree, dict, Any]:
    """The optax state, all other variables, and what is static."""
    graphdef, state = nnx.split(optimizer)
    counters = dict(nnx.as_pure(state))
    counters.pop("opt_state", None)
    return nnx.as_pure(optimizer.opt_state), counters, graphdef


def _entry(opt_state):
    has_leaves = bool(jax.tree.leaves(opt_state))
    return {"opt_state": nnx.state(opt_state)} if has_leaves else {}


class NnxStep(Step):
    """A step on a `NnxState`."""

    def __call__(self, state, batch, *args, **keywords):
        settings = on_arrays(self.settings, state.nodes, state.model_state)
        step = dataclasses.replace(self, settings=settings)
        return Step.__call__(step, state, batch, *args, **keywords)

    def _cycle(self, *args, **keywords):
        (sums, noise), grads = super()._cycle(*args, **keywords)
        model_state = sums.metrics.add_to(sums.model_state)
        metrics = sums.metrics.returned
        sums = dataclasses.replace(sums, metrics=metrics, model_state=model_state)
        return (sums, noise), grads


class NnxKind(StateKind):
    """How a step reads and writes a `NnxState`."""

    def check(self, state):
        optimizer = state.optimizer()
        params = nnx.state(state.model(), optimizer.wrt)
        init = anywhere(optimizer.tx).init
        made = jax.eval_shape(lambda: nnx.as_pure(init(params)))
        made, has = (_shapes(tree) for tree in (made, state.opt_state))
        differ = sorted(path for path in made | has if made.get(path) != has.get(path))
        if differ:
            raise ValueError(
                f"The optimizer's state does not fit wrt={optimizer.wrt!r} on this "
                f"model: {len(differ)} entries differ, opt_state{differ[0]} the first. "
                "Make the optimizer for this model and with the wrt that it has now: "
                "nnx.Optimizer(model, tx, wrt=...)."
            )

    def read(self, state, key):
        check_key(key, per_example=False)
        if key is not None:
            key = jax.random.fold_in(key, self.updates(state))
        return state.params, state.model_state, key

    def optimizer(self, state):
        return state.optimizer().tx, state.opt_state

    def apply(self, state, grads, loss):
        model, optimizer = state.model(), state.optimizer()
        grads = as_variables(grads, nnx.state(model, optimizer.wrt))
        takes_value = isinstance(optimizer.tx, optax.GradientTransformationExtraArgs)
        try:
            optimizer.update(model, grads, **({"value": loss} if takes_value else {}))
        except TypeError as error:
            add_note_on_dtypes(error, grads, state.params)
            raise
        params = nnx.as_pure(nnx.state(model, optimizer.wrt))
        opt_state, counters, _ = read_optimizer(optimizer)
        new = dataclasses.replace(
            state, params=params, opt_state=opt_state, counters=counters
        )
        return cast_like(new, state)

    def skip(self, state):
        return state

    def accumulated(self, state, params, opt_state, updated, skipped):
        # Not by optimizer.update, which has no place for a weight and counts calls.
        step = state.counters["step"]
        counters = state.counters | {"step": step + updated.astype(step.dtype)}
        return dataclasses.replace(
            state, params=params, opt_state=opt_state, counters=counters
        )

    def with_model_state(self, state, model_state):
        return dataclasses.replace(state, model_state=model_state)

    def noise_scale(self, state):
        value = state.counters.get("noise_scale")
        return value if isinstance(value, NoiseScale) else None

    def with_noise_scale(self, state, noise_scale):
        counters = state.counters | {"noise_scale": noise_scale}
        return dataclasses.replace(state, counters=counters)

    def updates(self, state):
        return state.counters["step"]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`step(model, optimizer, batch, *args)`, as `make_train_step` returns it."""

    step: Callable
    rules: Any
    parallel: DataParallel | None
    layouts: set = dataclasses.field(default_factory=set)

    # Read by jaxga.plan_memory: two arguments before the batch.
    takes_objects: ClassVar[bool] = True

    @property
    def plan(self) -> MemoryPlan | None:
        """What `microbatch_size="auto"` has chosen; None before its first use."""
        return getattr(self.step, "plan", None)

    def __call__(
        self,
        model: nnx.Module,
        optimizer: nnx.Optimizer,
        batch: PyTree = None,
        *args: Any,
        key: jax.Array | None = None,
        num_microbatches: int | jax.Array | None = None,
    ) -> dict[str, Any]:
        """Computes a cycle, updates the objects in place, and returns the record."""
        parts, state, rest = self._read(model, optimizer, batch, args)
        state = self._place(settled(state, ()))
        state, metrics = self.step(
            state, *rest, key=key, num_microbatches=num_microbatches
        )
        self.layouts.add(_shardings(state))
        state.write(parts, optimizer)
        return metrics

    def lower(self, *args: Any, **keywords: Any) -> Any:
        """As `.lower` of a jitted function, of the arguments of `trace`."""
        return self.trace(*args, **keywords).lower()

    def trace(
        self,
        model: nnx.Module,
        optimizer: nnx.Optimizer,
        batch: PyTree = None,
        *args: Any,
        key: jax.Array | None = None,
        num_microbatches: int | jax.Array | None = None,
    ) -> Any:
        """As `.trace` of a jitted function; shapes will do (`nnx.eval_shape`)."""
        _, state, rest = self._read(model, optimizer, batch, args)
        step: Any = self.step
        state = self._place(state)
        return step.trace(state, *rest, key=key, num_microbatches=num_microbatches)

    def _read(self, model, optimizer, batch, args):
        check_objects(model, optimizer)
        parts = take_apart(model, args, optimizer.wrt, self.rules)
        return parts, NnxState.of(parts, optimizer), (batch, *parts.plain)

    def _place(self, state):
        """The state on the mesh, as the stage has it. No user can do it by hand."""
        inside = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state))
        if self.parallel is None or inside or _shardings(state) in self.layouts:
            return state
        return self.parallel.shard_state(state)


def check_model(model: Any) -> None:
    """Refuses what is no nnx module, and says what is for it."""
    if isinstance(model, nnx.Module):
        return
    raise TypeError(
        f"The model is of type {name_of_type(model)}; it must be an nnx.Module. For a "
        "jaxga.TrainState there is jaxga.make_train_step, for linen's TrainState "
        "jaxga.linen.make_train_step, for parameters jaxga.value_and_grad."
    )


def check_objects(model: Any, optimizer: Any) -> None:
    """Refuses what is no model with its optimizer."""
    check_model(model)
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            f"The optimizer is of type {name_of_type(optimizer)}; it must be an "
            "nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )
    if isinstance(optimizer, nnx.ModelAndOptimizer):
        raise TypeError(
            "The optimizer is an nnx.ModelAndOptimizer, which holds a model of its "
            "own. Make an nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )


def _shardings(state):
    return tuple(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(state))


def _shapes(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {place(path): leaf.shape for path, leaf in leaves}
