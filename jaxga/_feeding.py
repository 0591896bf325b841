"""A step that feeds an accumulating optimizer: sums and their weight, undivided."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._accumulate import Accumulate, for_reduced_gradients
from ._accumulate_state import AccumulateState, find_states, holds_accumulator
from ._checks import PyTree, place
from ._forward import Forward
from ._loss import terms_of
from ._merge import is_merge_type
from ._optimizer import run_transformation
from ._value_and_grad import CycleOutput


@dataclasses.dataclass(frozen=True)
class Feeding:
    """An optimizer made by `jaxga.accumulate`, and how a step feeds it.

    Attributes:
        tx: the optimizer.
        state: the accumulator's state in the optimizer's. Its `is_local` says whether
            each device keeps sums of its own until the cycle closes.
    """

    tx: optax.GradientTransformation
    state: AccumulateState

    def calls(self) -> jax.Array:
        """Calls in this cycle so far."""
        return self.state.num_microbatches

    def check_terms(self, totals: PyTree) -> None:
        """Refuses a loss of other terms than there are sums for.

        Args:
            totals: the loss's total, or that of each term.
        """
        terms, names = self.state.terms, tuple(sorted(terms_of(totals)))
        if terms is not None and set(terms) != set(names):
            raise ValueError(
                f"jaxga.accumulate was given terms={terms}, but loss_fn returned the "
                f"terms {list(names)}."
            )
        if terms is None and len(names) > 1:
            raise ValueError(
                f"loss_fn returned the terms {list(names)}, and the optimizer "
                "accumulates over several calls: each term would be divided by its "
                "weight in one call, not by that in the cycle. Give jaxga.accumulate "
                f"terms={names}, which takes an accumulator for each; or compute the "
                "cycle in one call (accum_steps of the step); or, where the weights of "
                "a cycle are known, call jaxga.value_and_grad_sums with term_weights= "
                "and tx.step yourself."
            )

    def add(
        self, params: PyTree, opt_state: PyTree, grads: PyTree, output: CycleOutput
    ) -> tuple[PyTree, PyTree]:
        """Adds what one step has summed: a `WeightedSum`, or one for each term."""
        sums = jax.tree.map(lambda x: x.total, grads, is_leaf=is_merge_type)
        arguments = {
            "weight": jax.tree.map(lambda x: x.weight, grads, is_leaf=is_merge_type),
            "value": output.terms if self.state.terms else output.loss,
        }
        if isinstance(self.tx, Accumulate):
            tx = anywhere(self.tx)
            return tx.step(params, opt_state, sums, **arguments)
        updates, opt_state = run_transformation(
            self.tx, sums, opt_state, params, arguments
        )
        return optax.apply_updates(params, updates), opt_state


def anywhere(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, such that an accumulator without axes may be made inside a map too."""
    named = not isinstance(tx, Accumulate) or tx.cycle.axes is not None
    return tx if named else for_reduced_gradients(tx)


def find_feeding(
    tx: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    has_parallel: bool,
) -> Feeding | None:
    """How to feed `tx`; None if it takes finished gradients."""
    if not holds_accumulator(opt_state):
        return None
    states = find_states(opt_state)
    if not states:
        raise ValueError(
            "The optimizer is wrapped in optax.MultiSteps, which would average the "
            "cycles' gradients, each alike. Give the step the optimizer itself and a "
            "larger accum_steps, or jaxga.accumulate(optimizer, accum_steps)."
        )
    if len(states) > 1:
        raise ValueError(
            f"The optimizer holds {len(states)} accumulators, at {', '.join(states)}: "
            "their cycles need not end together. Put one jaxga.accumulate around them."
        )
    (state,) = states.values()
    if state.is_local and has_parallel:
        raise ValueError(
            "The optimizer was made by jaxga.accumulate with an axis_name, for a step "
            "in a pmap or shard_map of your own. With parallel= the step reduces each "
            "call's sums itself: leave axis_name out of accumulate."
        )
    _check_all_accumulate(tx, opt_state, params, state)
    return Feeding(tx, state)


def _check_all_accumulate(tx, opt_state, params, state):
    """Refuses an optimizer for part of the parameters that would be fed bare sums."""
    sums = state.sums[state.terms[0]] if state.terms else state.sums
    summed = {place(path) for path, _ in jax.tree.leaves_with_path(sums)}
    paths = [place(path) for path, _ in jax.tree.leaves_with_path(params)]
    if summed == set(paths) or isinstance(tx, Accumulate):
        return

    def update(grads):
        one = {name: jnp.float32(1) for name in state.terms or ()} or jnp.float32(1)
        grads = {name: grads for name in state.terms or ()} or grads
        extra_args = {"weight": one, "value": one}
        return run_transformation(tx, grads, opt_state, params, extra_args)[0]

    traced = Forward(update, jax.tree.map(jnp.zeros_like, params))
    nothing = jax.tree.map(lambda _: False, traced.shapes)
    for i, path in enumerate(paths):
        leaves = [j == i for j in range(len(paths))]
        wanted = jax.tree.unflatten(jax.tree.structure(nothing), leaves)
        if path not in summed and traced.only(wanted).needs[0]:
            raise ValueError(
                f"params{path} is updated by a part of the optimizer that does not "
                "accumulate, beside one that does: it would be handed sums that are "
                "not divided. Put jaxga.accumulate around the whole optimizer."
            )


def check_feeding(loss_scale: Any, noise_scale: Any, nonfinite: str) -> None:
    """Refuses what cannot be exact, or has no meaning, over several calls."""
    if loss_scale is not None:
        raise ValueError(
            "A loss scale and an optimizer made by jaxga.accumulate do not go "
            "together: the scale is adjusted once per cycle, and the step does not see "
            "the cycle. Compute the cycle in one call."
        )
    if noise_scale is not None:
        raise ValueError(
            "A noise scale and an optimizer made by jaxga.accumulate do not go "
            "together: the step does not see the cycle whose parts would be compared. "
            "Compute the cycle in one call."
        )
    if nonfinite != "skip_cycle":
        raise ValueError(
            f"{nonfinite=} was given to the step, but the optimizer made by "
            "jaxga.accumulate decides that: give it to accumulate."
        )


def is_finite_everywhere(grads: PyTree, axes: tuple[str, ...]) -> jax.Array:
    """Whether this call's gradient is finite, on all devices of `axes`."""
    totals = jax.tree.map(lambda x: x.total, grads, is_leaf=is_merge_type)
    finite = jnp.isfinite(optax.tree.norm(totals))
    return jax.lax.pmin(finite.astype(jnp.int32), axes) > 0 if axes else finite
