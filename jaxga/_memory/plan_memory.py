"""The largest micro-batch that fits, read off compiled steps before anything runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from .._checks import PyTree, check_array, check_count, describe, place
from .._parallel import DataParallel
from .budget import devices_of, find_budget
from .plan import MemoryPlan
from .planner import Lowered, Planner


def plan_memory(
    build: Callable[[int, int], Any],
    state: PyTree,
    row: PyTree,
    *,
    global_batch_size: int,
    num_devices: int | None = None,
    budget_bytes: int | None = None,
    devices: Sequence[Any] | None = None,
) -> MemoryPlan:
    """The largest micro-batch that fits in memory, found before anything runs.

    Compiles the step for a few sizes (four as a rule, six at most), reads what each
    needs, and chooses the largest that it has compiled and that fits; the next size is
    compiled too, and does not. The others are predicted. The sizes are the divisors of
    a device's share of the batch: the global batch, and with it the training run, stay
    as they are.

    A step's peak is taken to be its arguments, its results that replace no donated
    argument, and its temporaries. That does *not* contain the scratch memory in which a
    GPU's compiler tries out kernels, the buffers of NCCL, the gaps between blocks, and
    what else you hold on the device (the next batch, if it is moved while this one
    computes). 8 % of the budget are kept free for the first three; for the last, give a
    smaller `budget_bytes`. Near the limit of its device XLA recomputes activations by
    itself to save memory, and at most warns if that is not enough: that a step compiles
    does not mean that it fits.

    Args:
        build: `build(microbatch_size, accum_steps)` makes the step for a size: what
            `make_train_step` of `jaxga`, `jaxga.linen` or `jaxga.nnx` returns, or any
            function jitted with donated state that has `.lower(state, batch)`. (One
            that takes more: `jax.jit(lambda s, b: step(s, b, key=key),
            donate_argnums=0)`.)
        state: the train state: arrays, or `jax.ShapeDtypeStruct`s, as
            `jax.eval_shape` gives them. For a step of `jaxga.nnx` the pair `(model,
            optimizer)`. A step with `parallel` takes it as `shard_state` lays it out,
            wherever these arrays lie.
        row: one example, the batch without its leading axis: arrays or shapes.
        global_batch_size: examples per update, over all devices.
        num_devices: devices that the batch is divided over. By default those of the
            step's `parallel`, or 1.
        budget_bytes: memory of one device. By default its own limit, which for a GPU is
            the part that JAX has reserved (`XLA_PYTHON_CLIENT_MEM_FRACTION`); a CPU
            has none, nor does a device that is not there.
        devices: those to compile for, if they are not the step's or JAX's default. They
            need not exist: `jax.experimental.topologies.get_topology_desc(...).devices`
            (with `parallel`, its mesh is of the same devices).

    Returns:
        A `MemoryPlan`, with `microbatch_size`, `accum_steps`, `peak_bytes`, and `rows`,
        what each size needs. Printed, a table. If the devices belong to several
        processes, all call this, and get the same.

    Raises:
        TypeError: a number is no integer; a leaf of `row` is no array; `build` returned
            nothing that can be lowered.
        ValueError: not even a micro-batch of 1 fits; the budget is not known; the batch
            does not divide over the devices; `num_devices` or `devices` contradict the
            step.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> import optax
        >>> tx = optax.sgd(0.1)
        >>> def loss_fn(params, batch):
        ...     h = jnp.tanh(batch["x"] @ params["in"])
        ...     return jaxga.WeightedSum.of((h @ params["out"] - batch["y"]) ** 2)
        >>> def build(microbatch_size, accum_steps):
        ...     return jaxga.make_train_step(loss_fn, tx, accum_steps=accum_steps)
        >>> params = {"in": jnp.ones((64, 256)), "out": jnp.ones(256)}
        >>> row = {"x": jnp.ones(64), "y": jnp.ones(())}
        >>> plan = jaxga.plan_memory(build, jaxga.TrainState.create(params, tx), row,
        ...                          global_batch_size=256, budget_bytes=600_000)
        >>> plan.microbatch_size * plan.accum_steps
        256
        >>> step = build(plan.microbatch_size, plan.accum_steps)
    """
    total = check_count("global_batch_size", global_batch_size)
    for name, value in (("num_devices", num_devices), ("budget_bytes", budget_bytes)):
        if value is not None:
            check_count(name, value)
    step = check_step(build(1, max(total // (num_devices or 1), 1)))
    target = _Target.of(step, num_devices, devices)
    args = (*target.before_batch(step, state), target.batch(row, total))
    on = list(target.devices or devices_of(args))

    def lower(sizes):
        made = check_step(build(sizes.microbatch_size, sizes.accum_steps))
        return Lowered.of(made, *args)

    budget = find_budget(on, budget_bytes)
    return Planner(lower, total, target.num_devices, on, budget).run(refine=True)


@dataclasses.dataclass(frozen=True)
class _Target:
    """What the step is compiled for.

    Attributes:
        parallel: the step's own devices, if it has them.
        num_devices: over which the batch is divided.
        devices: those named; None for where the arrays lie.
    """

    parallel: DataParallel | None
    num_devices: int
    devices: Sequence[Any] | None

    @classmethod
    def of(cls, step, num_devices, devices):
        devices = None if devices is None else list(devices)
        parallel = getattr(step, "parallel", None)
        if parallel is None:
            if devices is not None and len(devices) != 1:
                raise ValueError(
                    f"devices has {len(devices)} devices, but the step that build "
                    "returned has no parallel=DataParallel(mesh) to divide the batch "
                    "over them. Give it one of a mesh of these devices, or plan for "
                    "devices[:1]."
                )
            return cls(None, num_devices or 1, devices)
        own = list(parallel.mesh.devices.flat)
        if num_devices not in (None, parallel.num_devices):
            raise ValueError(
                f"{num_devices=}, but the step that build returned divides the batch "
                f"over {parallel.num_devices} devices, those of its {parallel}. Leave "
                "num_devices out."
            )
        if devices is not None and set(devices) != set(own):
            raise ValueError(
                f"devices={devices} are not those of the step that build returned, "
                f"{own}. Make its DataParallel(mesh) with a mesh of these devices."
            )
        return cls(parallel, parallel.num_devices, own)

    def before_batch(self, step, state):
        """The step's arguments before the batch."""
        if getattr(step, "takes_objects", False):
            return self._objects(state)
        if self.parallel is not None:
            return (self.parallel.shard_state(jax.tree.map(_shape, state)),)
        if self.devices is not None:
            sharding = SingleDeviceSharding(self.devices[0])
            return (jax.tree.map(lambda leaf: _shape(leaf, sharding), state),)
        return (state,)

    def _objects(self, state):
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(
                f"state is {describe(state)}; for a step of jaxga.nnx it must be the "
                "pair (model, optimizer)."
            )
        if self.parallel is None and self.devices is not None:
            raise ValueError(
                f"devices={self.devices} with a step of jaxga.nnx: give the step "
                "parallel=jaxga.DataParallel(mesh), with a mesh of these devices, and "
                "the objects as nnx.eval_shape makes them."
            )
        return state

    def batch(self, row, total):
        """The shape of the whole batch."""

        def stack(path, leaf):
            name = f"row{place(path)}"
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                check_array(name, leaf)
            one = _shape(leaf)
            shape = (total, *one.shape)
            return jax.ShapeDtypeStruct(shape, one.dtype, sharding=self._of_rows())

        batch = jax.tree.map_with_path(stack, row)
        if not jax.tree.leaves(batch):
            raise ValueError(f"row holds no arrays: {row!r}.")
        return batch

    def _of_rows(self) -> Sharding | None:
        if self.parallel is not None:
            spec = PartitionSpec(self.parallel.axes)
            return NamedSharding(self.parallel.mesh, spec)
        return SingleDeviceSharding(self.devices[0]) if self.devices else None


def check_step(step: Any) -> Any:
    """Refuses what cannot be compiled without being run."""
    if not hasattr(step, "lower"):
        raise TypeError(
            f"build returned {describe(step)}, which has no .lower: it must return a "
            "step of make_train_step, or a function jitted with jax.jit. A step with "
            "axis_name= is not jitted: put your jax.shard_map around it and jax.jit "
            "around that, and give num_devices."
        )
    return step


def _shape(leaf, sharding=None):
    """Shape and dtype of an array as JAX would hold it, and where it lies."""
    known = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    dtype = leaf.dtype if known else jnp.result_type(leaf)
    sharding = sharding or getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)
