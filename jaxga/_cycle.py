"""One cycle: the sums over all micro-batches, merged over the devices once."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._accumulators import accumulate_gradients, add_gradients, is_vmapped
from ._axes import axes_in_scope, varying
from ._batches import (
    as_arrays,
    as_rows,
    count_microbatches,
    count_rows,
    take_microbatch,
)
from ._checks import PyTree
from ._cycle_settings import (
    CycleSettings,
    check_arguments,
    check_num_microbatches,
)
from ._forward import Forward
from ._keys import check_key, keys_of_rows, microbatch_key, row_ids
from ._loss import LossOutput, read_loss, terms_of
from ._merge import is_merge_type
from ._model_state import ModelState
from ._noise_scale import Parts, PartsOfCycle
from ._objective import Objective, divided, each_term_apart, given_weights
from ._params import (
    check_params,
    dtype_of_gradient,
    dtype_of_sum,
    warn_of_swamping,
)
from ._stages import Stage0
from ._summed_already import check_sums_differ
from ._sums import WeightedSum
from ._term_weights import ROWS, STATE, any_weight, count_term_weights


class Cycle:
    """A cycle on the arrays of one call: checked and traced when made; then `run`."""

    def __init__(
        self,
        settings: CycleSettings,
        params: PyTree,
        batch: PyTree,
        args: tuple,
        *,
        model_state: PyTree,
        key: jax.Array | None,
        num_microbatches: int | jax.Array | None,
        make_stage: Callable[..., Stage0] = Stage0,
        noise_per: str | None = None,
    ):
        self.settings, self.key = settings, key
        self.args = as_arrays(args)
        self.axes = axes_in_scope(settings.axis_name)
        check_key(key, settings.per_example_keys)
        keywords = {"key": key, "model_state": model_state}
        given = {name for name, value in keywords.items() if value is not None}
        check_arguments(settings.loss_fn, len(args), given)
        self.accum_steps = count_microbatches(
            batch, settings.accum_steps, settings.microbatch_size
        )
        self.num_microbatches = check_num_microbatches(
            num_microbatches, self.accum_steps
        )
        warn_of_swamping(settings.accum_dtype, self.accum_steps)

        leaves = check_params(params)
        self.treedef = jax.tree.structure(params)
        self.param_dtypes = [leaf.dtype for leaf in leaves]
        self.sum_dtypes = [dtype_of_sum(leaf, settings.accum_dtype) for leaf in leaves]
        self.grad_dtypes = list(map(dtype_of_gradient, leaves, self.sum_dtypes))
        params = varying(leaves, self.axes)
        self.stage = make_stage(params, self.axes, self.grad_dtypes)
        self.state = ModelState(model_state, settings.model_state_merge, self.axes)
        rows = count_rows(batch)
        size = rows // self.accum_steps
        self.noise = PartsOfCycle(noise_per, self.stage, size, self.accum_steps)
        self.rows = {"batch": as_rows(batch)}
        if settings.per_example_keys:
            self.rows["id"] = row_ids(rows, self.axes)

        whole = self.stage.whole()
        self.forward = Forward(
            self._forward, whole, self.rows, jnp.int32(0), self.state.first
        )
        self._check_what_devices_share()
        self.state.leave_out(self._untouched_state())
        self.state.find_running_averages(self.forward, whole, self.rows)

    def run(
        self,
        *,
        reduce: bool,
        reduce_gradient: bool = True,
        term_weights: Mapping | None = None,
        loss_scale: Any = None,
        separate_terms: bool = False,
    ) -> tuple[LossOutput, WeightedSum | dict[str, WeightedSum], Parts | None]:
        """The sums of the cycle, the summed gradient, and what its parts say.

        Args:
            reduce: whether to merge over the devices.
            reduce_gradient: whether the gradient and its weight too, if anything is.
            term_weights: the weight of each term over the cycle, if known.
            loss_scale: what the mean loss is scaled by; the gradient comes scaled.
            separate_terms: whether to sum the gradient of each term for itself.

        Returns:
            The sums of the loss and the metrics, and the model state; the gradient, of
            weight 1 if each term has been divided by its own weight already, or a dict
            by term; and the parts of which a noise scale is estimated, if asked.
        """
        objective = self._objective(term_weights, reduce, loss_scale, separate_terms)
        reduces = bool(reduce and self.axes)
        finish = partial(self._finish, reduces, reduces and reduce_gradient)
        grads, parts, weighed = self._accumulate(objective, finish)
        trees = [jax.tree.unflatten(self.treedef, x) for x in self._trees(grads)]
        state = self.state.finish(parts["state"])
        output = LossOutput(parts["loss"], parts["metrics"], state)
        return output, objective.weigh(trees, weighed), parts["noise"]

    def _forward(self, wide_params, rows, index, state_leaves):
        """The loss function on one micro-batch. What is traced, once."""
        pairs = zip(wide_params, self.param_dtypes, strict=True)
        params = [wide.astype(dtype) for wide, dtype in pairs]
        rows = take_microbatch(rows, self.accum_steps, index)
        keywords = {}
        if self.key is not None:
            keywords["key"] = (
                keys_of_rows(self.key, rows["id"])
                if self.settings.per_example_keys
                else microbatch_key(self.key, index, self.axes)
            )
        if self.state.tree is not None:
            keywords["model_state"] = self.state.unflatten(state_leaves)
        params = jax.tree.unflatten(self.treedef, params)
        output = read_loss(
            self.settings.loss_fn(params, rows["batch"], *self.args, **keywords),
            with_state=self.state.tree is not None,
        )
        totals = _map(lambda term: term.total, output.loss)
        weights = _map(lambda term: term.weight, output.loss)
        sums = varying((totals, weights, output.metrics), self.axes)
        return sums[0], (*sums[1:], self.state.read(output.model_state))

    def _microbatch(self, objective, index, parts):
        state = self.state.feed(parts["state"])
        totals, pullback, (weights, metrics, new_state) = jax.vjp(
            lambda wide, overwritten: self.forward(
                self.stage.for_use(wide),
                self.rows,
                index,
                self.state.overwrite(state, overwritten),
            ),
            self.stage.wide_at(index),
            self.state.overwritten(state),
            has_aux=True,
        )
        new = {"loss": jax.tree.map(WeightedSum, totals, weights), "metrics": metrics}
        merged = {
            name: _map(lambda part, one: part.put(one, index), parts[name], new[name])
            for name in new
        }
        present = any_weight(weights)
        merged["state"] = self.state.put(parts["state"], new_state, present)
        cotangents = objective.cotangents(totals)

        def backward(targets):
            grads = []
            values = [jax.ad.GradValue() for _ in self.state.overwritten(state)]
            for own, cotangent in zip(self._trees(targets), cotangents, strict=True):
                new, given = pullback.with_refs(own, values)(cotangent)
                grads += new
            put = self.state.put_gradients(merged["state"], given, present)
            noise = self.noise.add_microbatch(parts["noise"], grads, weights)
            return grads, merged | {"state": put, "noise": noise}

        return backward

    def _accumulate(self, objective, finish):
        """All micro-batches, the last one outside the loop if that is asked."""
        num, microbatch = self.num_microbatches, partial(self._microbatch, objective)
        sums = range(objective.num_sums)
        overlaps = self.stage.overlap_last
        grads, parts = accumulate_gradients(
            microbatch,
            num - 1 if overlaps else num,
            lambda: [x for _ in sums for x in self.stage.zeros(self.sum_dtypes)],
            self._start(),
            in_place=self._in_place() * len(sums),
        )
        if not overlaps:
            return finish(grads, parts)

        def last(grads, parts):
            # Each gradient can be merged as soon as this backward pass has made it.
            return finish(*add_gradients(microbatch, num - 1, grads, parts))

        if isinstance(num, np.integer):
            return last(grads, parts) if num else finish(grads, parts)
        return lax.cond(num > 0, last, finish, grads, parts)

    def _finish(self, reduces, reduces_gradient, grads, parts):
        """Merges over the devices: the gradient, and the sums beside it.

        Also returns the loss that has the gradient's weights.
        """
        own, num = parts["loss"], self.num_microbatches
        noise = self.noise.add_device(parts["noise"], grads, own, num)
        parts = parts | {"noise": noise}
        if reduces_gradient:
            first, *rest = self._trees(grads)
            grads, own = self.stage.all_reduce(first, own)
            for tree in rest:
                grads += self.stage.all_reduce(tree, ())[0]
        if reduces:
            loss = own if reduces_gradient else lax.psum(own, self.axes)
            parts = self._all_reduce(parts) | {"loss": loss}
        return grads, parts, own

    def _start(self):
        """The sums before the first micro-batch."""
        totals, (weights, metrics, _) = self.forward.shapes
        loss = jax.tree.map(WeightedSum, totals, weights)
        empty = partial(_map, lambda part: part.empty(self.accum_steps))
        return {
            "loss": empty(loss),
            "metrics": empty(metrics),
            "noise": self.noise.start(),
            "state": self.state.start(),
        }

    def _all_reduce(self, parts):
        """The merge over the devices of what comes besides loss and gradient."""
        metrics = _map(lambda part: part.all_reduce(self.axes), parts["metrics"])
        return {
            "metrics": metrics,
            "noise": self.noise.all_reduce(parts["noise"]),
            "state": self.state.all_reduce(parts["state"]),
        }

    def _objective(self, term_weights, reduce, loss_scale, separate_terms):
        totals = self.forward.shapes[0]
        if separate_terms:
            self.state.check_not_overwritten()
            return each_term_apart(totals, term_weights)
        if term_weights is not None:
            weights = given_weights(term_weights, totals)
        elif len(terms_of(totals)) == 1 and loss_scale is None:
            return Objective()
        elif not reduce:
            raise ValueError(
                f"loss_fn returned the terms {sorted(totals)}, and their gradients can "
                "only be summed if each is divided by its term's weight over the whole "
                "cycle and all devices. Give these weights as term_weights=, or sum "
                "the gradient of each term for itself, with separate_terms=True."
            )
        else:
            params = self.stage.for_use(self.stage.wide())
            weights = count_term_weights(
                self.forward, self.num_microbatches, params, self.rows, self.state
            )
            weights = lax.psum(weights, self.axes) if self.axes else weights
        return divided(weights, totals, loss_scale)

    def _trees(self, leaves):
        """The leaves of several trees of parameters, apart."""
        size = len(self.param_dtypes)
        starts = range(0, len(leaves), size) if size else [0]
        return [leaves[start : start + size] for start in starts]

    def _in_place(self):
        """Which gradients to sum in place, for the reasons in `_accumulators`."""
        inputs = self.stage.params, self.rows, self.args, self.state.leaves, self.key
        holds_one = self.noise.per == "microbatch"  # to measure it before it is added
        if holds_one or is_vmapped((*inputs, self.num_microbatches)):
            return [False for _ in self.grad_dtypes]
        dtypes = zip(self.grad_dtypes, self.sum_dtypes, strict=True)
        uses = zip(self.forward.uses(), dtypes, strict=True)
        return [use == {"scan"} and one == other for use, (one, other) in uses]

    def _untouched_state(self):
        first = len(jax.tree.leaves(self.forward.shapes)) - len(self.state.leaves)
        same = self.forward.same_as_input(STATE)
        return {i for i in range(len(self.state.leaves)) if same.get(first + i) == i}

    def _check_what_devices_share(self):
        """Refuses what has been summed over the devices before it was returned."""
        if not self.axes:
            return
        every = frozenset(self.axes)
        totals, (weights, metrics, state) = self.forward.data_flow(
            {
                ROWS: [every for _ in jax.tree.leaves(self.rows)],
                STATE: self.state.differs(),
            },
            data=ROWS,
        )
        check_sums_differ(totals, weights, metrics, every)
        self.state.check_agreement([flow.differs for flow in state])


def _map(function, tree, *rest):
    return jax.tree.map(function, tree, *rest, is_leaf=is_merge_type)
