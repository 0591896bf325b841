"""One step on any kind of train state: a cycle, then one update or none."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._accumulate_state import find_states
from ._axes import AxisNames
from ._checks import PyTree, check_flag, describe
from ._cycle import Cycle
from ._cycle_settings import CycleSettings
from ._devices import AsTheyAre, Divided
from ._dtypes import as_total
from ._feeding import check_feeding, find_feeding, is_finite_everywhere
from ._noise_scale import NoiseScale
from ._parallel import DataParallel
from ._placed_step import PlacedStep
from ._record import check_names, make_record
from ._sums import divide_gradient, inverse
from ._term_weights import any_weight
from ._value_and_grad import finish_output


class StateKind:
    """How a step reads and writes a kind of train state."""

    def check(self, state: Any) -> None:
        raise NotImplementedError

    def read(self, state: Any, key: jax.Array | None) -> tuple[PyTree, PyTree, Any]:
        """Its parameters, its model state, and the key of the next cycle."""
        raise NotImplementedError

    def optimizer(self, state: Any) -> tuple[optax.GradientTransformation, PyTree]:
        """The optimizer and its state."""
        raise NotImplementedError

    def apply(self, state: Any, grads: PyTree, loss: jax.Array) -> Any:
        """The state after an update, its model state apart."""
        raise NotImplementedError

    def skip(self, state: Any) -> Any:
        """The state after a cycle that changes nothing."""
        raise NotImplementedError

    def accumulated(
        self,
        state: Any,
        params: PyTree,
        opt_state: PyTree,
        updated: jax.Array,
        skipped: jax.Array,
    ) -> Any:
        """The state after a call of an optimizer that accumulates over calls.

        `updated` and `skipped`, 0 or 1, say whether it ended a cycle, and how.
        """
        raise NotImplementedError

    def with_model_state(self, state: Any, model_state: PyTree) -> Any:
        raise NotImplementedError

    def loss_scale(self, state: Any) -> Any:
        """The loss scale in the state, if there is one."""
        return None

    def with_loss_scale(self, state: Any, loss_scale: Any) -> Any:
        raise NotImplementedError

    def noise_scale(self, state: Any) -> NoiseScale | None:
        """The noise scale in the state, if there is one."""
        return None

    def with_noise_scale(self, state: Any, noise_scale: NoiseScale) -> Any:
        raise NotImplementedError

    def updates(self, state: Any) -> jax.Array:
        """How many updates there have been."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Step:
    """A step, not jitted: `step(state, batch, *args, key=None, num_microbatches=None)`.

    Attributes:
        kind: how the state is read and written.
        settings: those of the cycle.
        parallel: the devices, if the step is to divide the batch over them itself.
        nonfinite: what becomes of a cycle whose gradient is not finite.
    """

    kind: StateKind
    settings: CycleSettings
    parallel: DataParallel | None
    nonfinite: str

    def __post_init__(self):
        if self.nonfinite not in ("skip_cycle", "propagate"):
            raise ValueError(
                f"nonfinite={self.nonfinite!r} must be 'skip_cycle' or 'propagate'. "
                "(Leaving out single micro-batches would need the gradient of each, "
                "which this step never holds.)"
            )

    def __call__(
        self, state, batch, *args, key=None, num_microbatches=None, placement=None
    ):
        self.kind.check(state)
        params, model_state, key = self.kind.read(state, key)
        has_parallel = self.parallel is not None
        feeding = find_feeding(*self.kind.optimizer(state), params, has_parallel)
        devices = self._devices(state, placement)
        if key is not None and feeding is not None:
            key = jax.random.fold_in(key, feeding.calls())
        loss_scale = self.kind.loss_scale(state)
        noise_scale = self.kind.noise_scale(state)
        noise_per = None if noise_scale is None else noise_scale.per
        rest = (args, model_state, key, num_microbatches, loss_scale)
        terms = feeding and feeding.state.terms
        run = functools.partial(self._cycle, feeding, noise_per)
        (sums, parts), grads = devices.run(run, batch, params, rest, terms)
        check_names(sums.metrics)
        output = finish_output(sums, None)
        if feeding is None:
            new, good, counts = self._update(state, grads, output, parts, devices)
        else:
            check_feeding(loss_scale, noise_scale, self.nonfinite)
            new, good, counts = self._add(feeding, state, grads, output, devices)
        model_state = _select(good, output.model_state, model_state)
        new = self.kind.with_model_state(new, model_state)
        return new, make_record(output, isinstance(sums.loss, dict), **counts)

    def _devices(self, state, placement):
        if self.parallel is None:
            return AsTheyAre()
        if placement is None:
            return Divided(self.parallel, self.parallel.layout(state))
        if placement.misplaced:
            raise ValueError(placement.misplaced)
        layout = self.parallel.layout_beside(state, placement.others)
        return Divided(self.parallel, layout)

    def _update(self, state, grads, output, parts, devices):
        """One update of the optimizer with the finished gradient, or none."""
        loss_scale = self.kind.loss_scale(state)
        noise_scale = self.kind.noise_scale(state)
        norm = optax.tree.norm(jax.tree.map(as_total, grads.total))
        good = _is_good(output.weights, norm, self.nonfinite)

        def apply(old):
            # The summed gradient is only read here, in the branch that divides it:
            # divided before, or handed through, it would need a second buffer.
            mean = divide_gradient(grads)
            mean = mean if loss_scale is None else loss_scale.unscale(mean)
            return devices.for_update(self.kind.apply(old, mean, output.loss))

        new = jax.lax.cond(good, apply, self.kind.skip, devices.for_update(state))
        new = devices.stored(new, state, good)
        if loss_scale is not None:
            adjusted = loss_scale.adjust(jnp.isfinite(norm))
            adjusted = _select(any_weight(output.weights), adjusted, loss_scale)
            new = self.kind.with_loss_scale(new, adjusted)
            norm = loss_scale.unscale(norm)
        counts = {
            "grad_norm": norm * inverse(grads.weight, norm.dtype),
            "update": self.kind.updates(new),
            "skipped": 1 - good.astype(jnp.int32),
        }
        if noise_scale is not None:
            if loss_scale is not None:
                parts = parts.unscaled(loss_scale)
            noise_scale = _select(
                good, noise_scale.add(parts, norm, grads.weight), noise_scale
            )
            new = self.kind.with_noise_scale(new, noise_scale)
            counts["noise_scale"] = noise_scale.value
        return new, good, counts

    def _add(self, feeding, state, grads, output, devices):
        """One call of an optimizer that accumulates over calls."""
        old, state = state, devices.for_update(state)
        params, _, _ = self.kind.read(state, None)
        _, opt_state = self.kind.optimizer(state)
        params, opt_state = feeding.add(params, opt_state, grads, output)
        after = next(iter(find_states(opt_state).values()))
        updated = after.update - feeding.state.update
        skipped = after.skipped - feeding.state.skipped
        new = self.kind.accumulated(state, params, opt_state, updated, skipped)
        new = devices.stored(new, old, updated > 0)
        axes = self.settings.axis_name if feeding.state.is_local else ()
        counts = {
            "grad_norm": after.grad_norm,
            "update": self.kind.updates(new),
            "skipped": skipped,
        }
        return new, is_finite_everywhere(grads, axes), counts

    def _cycle(self, feeding, noise_per, make_stage, batch, params, rest):
        args, model_state, key, num_microbatches, loss_scale = rest
        cycle = Cycle(
            self.settings,
            params,
            batch,
            args,
            model_state=model_state,
            key=key,
            num_microbatches=num_microbatches,
            make_stage=make_stage,
            noise_per=noise_per,
        )
        is_local = separate_terms = False
        if feeding is not None:
            feeding.check_terms(cycle.forward.shapes[0])
            is_local = feeding.state.is_local
            separate_terms = feeding.state.terms is not None
        output, grads, noise = cycle.run(
            reduce=True,
            reduce_gradient=not is_local,
            loss_scale=loss_scale,
            separate_terms=separate_terms,
        )
        return (output, noise), grads


def jit_step(step: Step, axis_name: AxisNames | None, donate: bool) -> Callable:
    """Jits a step, unless it is for the caller's own `pmap` or `shard_map`."""
    check_flag("donate", donate)
    if axis_name is not None:
        return step.__call__

    if step.parallel is not None:
        return PlacedStep(step, step.parallel, donate)

    def train_step(state, batch, *args, key=None, num_microbatches=None):
        return step(state, batch, *args, key=key, num_microbatches=num_microbatches)

    return jax.jit(train_step, donate_argnums=(0,) if donate else ())


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


def _is_good(weights, norm, nonfinite):
    """Whether a cycle is applied: it has a weight, and is finite if that is asked."""
    has_weight = any_weight(weights)
    if nonfinite == "propagate":
        return has_weight
    # A negative weight is a count that ran over; NaN compares false.
    right = [jnp.asarray(weight) >= 0 for weight in weights.values()]
    return has_weight & jnp.isfinite(norm) & jnp.stack(right).all()


def _select(good, new, old):
    """A model state or the one before; a leaf that nothing touched as it is."""

    def select(new, old):
        return new if new is old else jnp.where(good, new, old)

    return jax.tree.map(select, new, old)
