"""When a cycle over several calls is complete: by its calls, by its weight, or both."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._checks import check_count, describe
from ._compensated import has_reached, pair_of


@dataclasses.dataclass(frozen=True)
class CycleEnd:
    """What completes a cycle, whichever comes first.

    Attributes:
        accum_steps: calls per cycle: an integer, a traced one, or a function of the
            number of updates so far.
        until_weight: weight per cycle; may be traced. Where terms have weights of
            their own, a dict with those of some of them.
        terms: the names of the terms; None if there is one weight.
    """

    accum_steps: Any
    until_weight: Any
    terms: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.accum_steps is None and self.until_weight is None:
            raise ValueError(
                "accumulate was given accum_steps=None and until_weight=None: no cycle "
                "would ever end. Give accum_steps (calls per update), until_weight "
                "(weight per update), or both."
            )
        if self.accum_steps is not None and not callable(self.accum_steps):
            steps = _check_accum_steps("accum_steps", self.accum_steps)
            object.__setattr__(self, "accum_steps", steps)
        if self.until_weight is not None:
            self._check_until_weight()

    def planned_steps(self, updates: jax.Array) -> ArrayLike:
        """Calls in this cycle."""
        if not callable(self.accum_steps):
            return self.accum_steps
        try:
            steps = self.accum_steps(updates)
        except jax.errors.ConcretizationTypeError as error:
            error.add_note(
                "jaxga: accum_steps is called with the number of updates as a traced "
                "int32. Write jnp.where(updates < 100, 4, 8) instead of an if."
            )
            raise
        return _check_accum_steps("what accum_steps(updates) returned", steps)

    def reached(self, calls: jax.Array, updates: jax.Array, weight: Any) -> jax.Array:
        """Whether the cycle is complete.

        Args:
            calls: int32 scalar, calls in this cycle.
            updates: int32 scalar, updates so far.
            weight: function of no arguments that gives the weight of this cycle, over
                all devices, as a pair, or a pair for each term. Called only if it
                matters.
        """
        ends = jnp.zeros((), bool)
        if self.accum_steps is not None:
            ends |= calls >= self.planned_steps(updates)
        if self.until_weight is not None:
            # A weight that is no number ends the cycle too: it would never end.
            limits, weights = self.until_weight, weight()
            if self.terms is None:
                limits, weights = {"": limits}, {"": weights}
            for name, limit in limits.items():
                ends |= has_reached(weights[name], pair_of(limit))
        return ends

    def _check_until_weight(self):
        limits = self.until_weight
        if self.terms is None:
            return _check_limit("until_weight", limits)
        if not isinstance(limits, Mapping) or not set(limits) <= set(self.terms):
            raise ValueError(
                f"until_weight is {describe(limits)}; with terms={self.terms} it must "
                "be a dict that says which weight ends a cycle: "
                f"until_weight={{{self.terms[0]!r}: ...}}."
            )
        if not limits:
            raise ValueError("until_weight={} would end no cycle: leave it out.")
        for name, limit in limits.items():
            _check_limit(f"until_weight[{name!r}]", limit)


def _check_accum_steps(name: str, value: Any) -> ArrayLike:
    """An integer of at least 1; of a traced one, that it is an integer."""
    if not isinstance(value, jax.core.Tracer):
        if getattr(value, "shape", None) == ():
            value = value.item()
        if isinstance(value, float):
            raise TypeError(
                f"{name} is {value!r}; it must be an integer of at least 1. Round a "
                "schedule of floats: jnp.round(schedule(updates)).astype(int)."
            )
        count = check_count(name, value)
        if count >= 2**31:
            raise ValueError(f"{name}={count} is more than an int32 counts.")
        return count
    if value.ndim or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{name} is {describe(value)}; it must be an integer scalar. Round a "
            "schedule of floats: jnp.round(schedule(updates)).astype(int)."
        )
    return value


def _check_limit(name: str, value: Any) -> None:
    rule = f"{name} is {describe(value)}; it must be a positive number"
    if callable(value):
        raise TypeError(
            f"{rule}. What may be a function of the number of updates is accum_steps."
        )
    if isinstance(value, jax.core.Tracer):
        kinds = jnp.floating, jnp.integer
        is_real = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
        if value.ndim or not is_real:
            raise TypeError(f"{rule}.")
        return
    number = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{rule}.")
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}={number} must be a positive number.")


Steps = int | Callable[[jax.Array], ArrayLike] | ArrayLike
