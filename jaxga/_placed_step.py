"""A jitted step that looks where the state lies before it runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ._checks import PyTree, describe
from ._layout import REST
from ._parallel import DataParallel


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the state that a step is called with lies.

    Attributes:
        others: for each leaf, how the mesh axes beside the data axes divide it.
        misplaced: what to say of it, if it lies otherwise than the stage has it.
    """

    others: tuple
    misplaced: str | None


class PlacedStep:
    """A jitted step of a `DataParallel`; used like what `jax.jit` returns.

    How mesh axes beside the data axes divide a parameter cannot be seen inside `jit`
    where they are of automatic type. So it is read off the arrays here, and handed on.
    """

    def __init__(self, step: Callable, parallel: DataParallel, donate: bool):
        """`step(state, batch, *args, placement, **keywords)`, not jitted."""

        def train_step(
            state, batch, *args, key=None, num_microbatches=None, placement=None
        ):
            given = {"key": key, "num_microbatches": num_microbatches}
            return step(state, batch, *args, placement=placement, **given)

        donated = (0,) if donate else ()
        self._jitted = jax.jit(
            train_step, static_argnames="placement", donate_argnums=donated
        )
        self.parallel, self._seen = parallel, {}

    def __call__(self, state: PyTree, batch: PyTree, *args: Any, **keywords: Any):
        keywords["placement"] = self._look(state)
        return self._jitted(state, batch, *args, **keywords)

    def lower(self, state: PyTree, batch: PyTree, *args: Any, **keywords: Any):
        """As of a jitted function: arrays, or `jax.ShapeDtypeStruct`s."""
        keywords["placement"] = self._look(state)
        return self._jitted.lower(state, batch, *args, **keywords)

    def trace(self, state: PyTree, batch: PyTree, *args: Any, **keywords: Any):
        """As of a jitted function: arrays, or `jax.ShapeDtypeStruct`s."""
        keywords["placement"] = self._look(state)
        return self._jitted.trace(state, batch, *args, **keywords)

    def eval_shape(self, state: PyTree, batch: PyTree, *args: Any, **keywords: Any):
        """As of a jitted function."""
        return self.trace(state, batch, *args, **keywords).out_info

    def clear_cache(self) -> None:
        """As of a jitted function."""
        self._jitted.clear_cache()

    def _look(self, state):
        """Where the state lies; None inside a jitted function, where nobody knows."""
        leaves, treedef = jax.tree.flatten(state)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return None
        # Of one shape and kind for a whole run: looked at once, not at every call.
        key = treedef, *((np.shape(x), getattr(x, "sharding", None)) for x in leaves)
        if key not in self._seen:
            layout = self.parallel.layout(state)
            others = tuple(leaf.how.others for leaf in layout.leaves)
            self._seen[key] = Placement(others, _find_misplaced(leaves, layout))
        return self._seen[key]


_ARRAYS = (jax.Array, jax.ShapeDtypeStruct)


def _find_misplaced(leaves, layout):
    """What to say of a state that does not lie as the stage has it."""
    for leaf, expected in zip(leaves, layout.leaves, strict=True):
        if expected.role == REST or not isinstance(leaf, _ARRAYS):
            continue
        sharding, actual = expected.sharding(layout.mesh), leaf.sharding
        is_here = isinstance(actual, NamedSharding) and actual.mesh == layout.mesh
        if not is_here and not layout.zero:
            continue  # JAX puts what is whole on one device on all of them
        if not (is_here and actual.is_equivalent_to(sharding, len(leaf.shape))):
            return (
                f"state{expected.path}, {describe(leaf)}, lies as {actual}, but under "
                f"zero={layout.zero} it must lie as {sharding}. Lay the state out with "
                "state = parallel.shard_state(state), or make it with parallel.init."
            )
    return None
