"""A step that finds its micro-batch itself: `microbatch_size="auto"`."""

from collections.abc import Callable
from typing import Any

import jax

from ._axes import AxisNames
from ._batch_sizes import BatchSizes
from ._batches import count_rows
from ._checks import PyTree, check_count
from ._cycle_settings import CycleSettings
from ._memory.budget import devices_of, find_budget
from ._memory.plan import MemoryPlan
from ._memory.planner import Lowered, Planner
from ._parallel import DataParallel
from ._step import Step, jit_step, parallel_axis

AUTO = "auto"


class AutoStep:
    """A jitted step whose micro-batch is chosen at its first use, and then stays.

    Used like what `jax.jit` returns: called, or lowered.

    Attributes:
        plan: what was chosen, and why, as `jaxga.plan_memory` returns it; None before
            the first use.
    """

    def __init__(
        self,
        build: Callable[[int], Any],
        global_batch_size: int,
        parallel: DataParallel | None,
    ):
        """`build(microbatch_size)` makes the step."""
        self._build, self._total, self._parallel = build, global_batch_size, parallel
        self._step: Any = None
        self.plan: MemoryPlan | None = None

    def __call__(self, state: PyTree, batch: PyTree, *args: Any, **keywords: Any):
        step = self._chosen(state, batch, args, keywords)
        return step(state, batch, *args, **keywords)

    def lower(self, state: PyTree, batch: PyTree, *args: Any, **keywords: Any):
        """As of a jitted function: arrays, or `jax.ShapeDtypeStruct`s."""
        step = self._chosen(state, batch, args, keywords)
        return step.lower(state, batch, *args, **keywords)

    def trace(self, state: PyTree, batch: PyTree, *args: Any, **keywords: Any):
        """As of a jitted function: arrays, or `jax.ShapeDtypeStruct`s."""
        step = self._chosen(state, batch, args, keywords)
        return step.trace(state, batch, *args, **keywords)

    def eval_shape(self, state: PyTree, batch: PyTree, *args: Any, **keywords: Any):
        """As of a jitted function."""
        step = self._chosen(state, batch, args, keywords)
        return step.eval_shape(state, batch, *args, **keywords)

    def clear_cache(self) -> None:
        """As of a jitted function. What was chosen stays."""
        if self._step is not None:
            self._step.clear_cache()

    def _chosen(self, state, batch, args, keywords):
        if self._step is None:
            self._check(state, batch, args, keywords)
            self.plan, self._step = self._choose(state, batch, args, keywords)
        return self._step

    def _choose(self, state, batch, args, keywords):
        steps = {}

        def lower(sizes: BatchSizes):
            size = sizes.microbatch_size
            steps[size] = self._build(size)
            return Lowered.of(steps[size], state, batch, *args, **keywords)

        parallel = self._parallel
        count = parallel.num_devices if parallel else 1
        everything = (state, batch, args, keywords)
        own = parallel.mesh.devices.flat if parallel else devices_of(everything)
        devices = sorted(own, key=lambda device: device.id)
        try:
            budget = find_budget(devices, None)
        except ValueError as error:
            error.add_note(_NOTE_ON_BUDGET)
            raise
        plan = Planner(lower, self._total, count, devices, budget).run(refine=False)
        # The step that was traced already, not another.
        return plan, steps[plan.microbatch_size]

    def _check(self, state, batch, args, keywords):
        leaves = jax.tree.leaves((state, batch, args, keywords))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise ValueError(
                'A step with microbatch_size="auto" chooses at its first use, which '
                "was inside a jitted function, where nobody knows how much memory the "
                "rest of it takes. Call it outside, or give the size that "
                "jaxga.plan_memory finds for the whole function."
            )
        if keywords.get("num_microbatches") is not None:
            raise ValueError(
                f"num_microbatches={keywords['num_microbatches']!r} at the first use "
                'of a step with microbatch_size="auto": no size is chosen yet, so '
                "nobody knows how many micro-batches there are. Use the step once "
                "without (step.lower(state, batch) will do), and see "
                "step.plan.accum_steps."
            )
        rows = count_rows(batch)
        if rows != self._total:
            raise ValueError(
                f"The batch has {rows} rows, but global_batch_size={self._total}, "
                'from which microbatch_size="auto" chooses. Both count the examples '
                "of an update, over all devices: make them the same."
            )


_NOTE_ON_BUDGET = (
    'jaxga: microbatch_size="auto" takes the limit of the device. Where there is none, '
    "choose with plan = jaxga.plan_memory(..., budget_bytes=...), and give the step "
    "microbatch_size=plan.microbatch_size."
)


def build_step(
    make: Callable[[CycleSettings], Step],
    loss_fn: Callable[..., Any],
    *,
    accum_steps: int | None,
    microbatch_size: int | str | None,
    global_batch_size: int | None,
    parallel: DataParallel | None,
    axis_name: AxisNames | None,
    donate: bool,
    **settings: Any,
) -> Any:
    """The step of the size that the user wants, jitted, or one that finds its size.

    Args:
        make: makes the step, not jitted, of the settings of its cycle.
        loss_fn: as for `jaxga.make_train_step`, and so are the other arguments.
        accum_steps: see there.
        microbatch_size: see there.
        global_batch_size: see there.
        parallel: see there.
        axis_name: see there.
        donate: see there.
        **settings: what `CycleSettings` takes besides.
    """
    cycle_axis = parallel_axis(parallel, axis_name)

    def build(accum_steps, microbatch_size):
        sizes = {"accum_steps": accum_steps, "microbatch_size": microbatch_size}
        of_cycle = CycleSettings(loss_fn, axis_name=cycle_axis, **sizes, **settings)
        return jit_step(make(of_cycle), axis_name, donate)

    if not (isinstance(microbatch_size, str) and microbatch_size == AUTO):
        if global_batch_size is not None:
            raise ValueError(
                f'{global_batch_size=} is for microbatch_size="auto", which chooses '
                f"from it; with {microbatch_size=} and {accum_steps=} the batch itself "
                "says how large it is. Leave it out. (jaxga.BatchSizes does the "
                "arithmetic.)"
            )
        return build(accum_steps, microbatch_size)
    _check_auto(accum_steps, global_batch_size, axis_name)
    total = check_count("global_batch_size", global_batch_size)
    # Refuses now what is wrong with any size, the batch's division among it.
    build(None, 1)
    if parallel is not None:
        BatchSizes(total, microbatch_size=1, num_devices=parallel.num_devices)
    return AutoStep(lambda size: build(None, size), total, parallel)


def _check_auto(accum_steps, global_batch_size, axis_name):
    if accum_steps is not None:
        raise ValueError(
            f'{accum_steps=} and microbatch_size="auto" exclude each other: the size '
            "that fits decides how many micro-batches there are."
        )
    if axis_name is not None:
        raise ValueError(
            f'{axis_name=} and microbatch_size="auto" exclude each other: such a step '
            "is a part of your own pmap or shard_map, which it cannot compile. Use "
            "parallel=jaxga.DataParallel(mesh), or find the size with "
            "jaxga.plan_memory, whose build returns your jitted function."
        )
    if global_batch_size is None:
        raise ValueError(
            'microbatch_size="auto" needs global_batch_size, the examples of an '
            "update over all devices: the sizes to choose from divide it."
        )
