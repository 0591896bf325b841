"""Several terms, several denominators: what each term of a cycle will be divided by.

The gradient of a sum of means is one sum over micro-batches only if every term is
differentiated with its own factor, 1 / weight; so the weights are needed first. They
rarely depend on the forward pass: a first pass over the micro-batches that computes
nothing else is then almost free.
"""

import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ._accumulators import for_each_microbatch
from ._axes import full_of_type
from ._checks import PyTree, check_constant_weight, check_real
from ._dtypes import as_weight
from ._forward import Forward
from ._loss import terms_of, words_for
from ._model_state import ModelState

# The arguments of the traced forward pass.
PARAMS, ROWS, INDEX, STATE = range(4)


def check_term_weights(given: Mapping, names: list[str]) -> dict[str, jax.Array]:
    """Refuses weights that do not fit the terms."""
    if not isinstance(given, Mapping) or set(given) != set(names):
        has = sorted(map(str, given)) if isinstance(given, Mapping) else repr(given)
        raise ValueError(
            f"term_weights must be a dict with one weight for each term of the loss, "
            f"{sorted(names)}; it has {has}."
        )
    weights = {}
    for name in names:
        weight = check_real(f"term_weights[{name!r}]", given[name])
        if weight.ndim:
            raise ValueError(
                f"term_weights[{name!r}] has shape {weight.shape}; it must be a "
                "scalar, the term's weight over the whole cycle and all devices."
            )
        check_constant_weight(f"term_weights[{name!r}]", given[name])
        weights[name] = as_weight(weight)
    return weights


def count_term_weights(
    forward: Forward,
    num_microbatches,
    params: list[jax.Array],
    rows: PyTree,
    state: ModelState,
) -> dict[str, jax.Array]:
    """The weight of each term over this device's micro-batches."""
    types = terms_of(forward.shapes[1][0])
    pruned = forward.only(_wanted(forward, types))
    threads_state = pruned.needs[STATE]
    if pruned.needs[PARAMS] or threads_state:
        _warn_of_second_forward(forward, types)
    if threads_state:
        pruned = forward.only(_wanted(forward, types, state=True))

    def body(index, carry):
        weights, parts = carry
        outputs = pruned(params, rows, index, state.feed(parts))
        new = dict(zip(sorted(types), outputs, strict=False))
        if threads_state:
            parts = state.put(parts, outputs[len(types) :], any_weight(new))
        return {name: weights[name] + new[name] for name in types}, parts

    zeros = {name: full_of_type(typ, 0) for name, typ in types.items()}
    carry = (zeros, state.start())
    return for_each_microbatch(num_microbatches, body, carry)[0]


def any_weight(weights: PyTree) -> jax.Array:
    """Whether a micro-batch has any weight in any of its terms."""
    return jnp.stack([weight != 0 for weight in jax.tree.leaves(weights)]).any()


def _wanted(forward, names, state=False):
    wanted = jax.tree.map(lambda _: False, forward.shapes)
    weights = wanted[1][0]
    if isinstance(weights, dict):
        weights = {name: name in names for name in weights}
    else:
        weights = True
    leaves = [state for _ in wanted[1][2]]
    return wanted[0], (weights, wanted[1][1], leaves)


def _warn_of_second_forward(forward, names):
    for name in names:
        needs = forward.only(_wanted(forward, [name])).needs
        if needs[PARAMS] or needs[STATE]:
            warnings.warn(
                f"The weight of {words_for(name)} depends on the parameters or on the "
                "model state, so the forward pass runs once more, to find it before "
                "the gradient. Give term_weights= to avoid that, if it is known.",
                stacklevel=2,
            )
