"""What the sums of a cycle are gradients of, and what weight they have.

Of the summed loss, to be divided at the end; of the objective, each term divided by its
weight over the cycle already; or of each term, in sums of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import varying, varying_axes
from ._checks import PyTree
from ._loss import terms_of
from ._sums import WeightedSum, inverse
from ._term_weights import check_term_weights


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is differentiated.

    Attributes:
        factors: what each term's total is multiplied by, in the tree of the totals;
            None for 1.
        separate: the terms that have sums of their own; None if there is one sum.
    """

    factors: PyTree = None
    separate: tuple[str, ...] | None = None

    @property
    def num_sums(self) -> int:
        """How many trees of gradients are summed."""
        return 1 if self.separate is None else len(self.separate)

    def cotangents(self, totals: PyTree) -> list[PyTree]:
        """What the backward pass starts from, once for each sum."""
        if self.separate is None:
            is_plain = self.factors is None
            factors = jax.tree.map(jnp.ones_like, totals) if is_plain else self.factors
            return [jax.tree.map(_cotangent, totals, factors)]
        if not isinstance(totals, dict):
            return [_cotangent(totals, jnp.float32(1))]
        return [
            {n: _cotangent(x, jnp.float32(n == name)) for n, x in totals.items()}
            for name in self.separate
        ]

    def weigh(
        self, grads: list[PyTree], loss: PyTree
    ) -> WeightedSum | dict[str, WeightedSum]:
        """The sums with their weights, of which the loss has those of the terms."""
        weights = {name: term.weight for name, term in terms_of(loss).items()}
        if self.separate is not None:
            pairs = zip(self.separate, grads, strict=True)
            return {name: WeightedSum(tree, weights[name]) for name, tree in pairs}
        is_divided = self.factors is not None
        weight = jnp.int32(1) if is_divided else next(iter(weights.values()))
        return WeightedSum(grads[0], weight)


def each_term_apart(totals: PyTree, term_weights: Any) -> Objective:
    """Sums for each term, which need no weights before the end."""
    if term_weights is not None:
        raise ValueError(
            "term_weights was given with separate_terms=True: if the weights are "
            "known, one sum is enough. Leave separate_terms out."
        )
    return Objective(separate=tuple(terms_of(totals)))


def divided(weights: Mapping, totals: PyTree, loss_scale: Any) -> Objective:
    """One sum of all terms, each divided by its weight over the cycle."""
    dtypes = {name: total.dtype for name, total in terms_of(totals).items()}
    factors = {name: inverse(w, dtypes[name]) for name, w in weights.items()}
    if loss_scale is not None:
        factors = loss_scale.scale(factors)
    return Objective(factors if isinstance(totals, dict) else factors["loss"])


def given_weights(term_weights: Mapping, totals: PyTree) -> dict[str, jax.Array]:
    """The weights that the caller knows, checked."""
    if not isinstance(totals, dict):
        raise TypeError(
            "term_weights was given, but loss_fn returned one loss, not a dict of "
            "terms: its weight is summed beside its gradient."
        )
    return check_term_weights(term_weights, list(totals))


def _cotangent(total, factor):
    return varying(factor.astype(total.dtype), varying_axes(total))
