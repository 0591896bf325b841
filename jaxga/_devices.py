"""A step's devices: the cycle on each one's rows, and the state where it belongs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ._checks import PyTree
from ._layout import PARAMETER, Layout, others_of
from ._parallel import DataParallel, check_rows
from ._shards import constrain
from ._stages import GatheredOnce, Stage0, Stage1, Stage2, Stage3
from ._sums import WeightedSum

# `run(make_stage, batch, params, rest)`: a cycle on the rows that it is given.
Run = Callable[..., tuple[PyTree, WeightedSum]]
WHOLE = PartitionSpec()

_NOTE_ON_CONSTRAINTS = (
    "jaxga: inside a step with parallel=, each device computes its own rows, and the "
    "data axes {axes} are manual. A sharding constraint in the model may name other "
    "axes only: jax.lax.with_sharding_constraint(x, PartitionSpec(None, 'model')), a "
    "bare spec, with the step called under jax.set_mesh(mesh)."
)


class AsTheyAre:
    """The devices of the call: one, or those of the caller's own map."""

    def run(
        self,
        run: Run,
        batch: PyTree,
        params: PyTree,
        rest: PyTree,
        terms: tuple[str, ...] | None = None,
    ):
        """A cycle: what it found, which is the same everywhere, and the gradient.

        `terms`: those that have a gradient of their own, if any has.
        """
        return run(Stage0, batch, params, rest)

    def for_update(self, state: PyTree) -> PyTree:
        """The state as the optimizer works on it."""
        return state

    def stored(self, state: PyTree, old: PyTree, updated: jax.Array) -> PyTree:
        """The state after `old`, as it lies between steps.

        `updated`: whether its parameters are others.
        """
        return state


class Divided(AsTheyAre):
    """The devices of a `DataParallel`."""

    def __init__(self, parallel: DataParallel, layout: Layout):
        self.parallel, self.layout = parallel, layout

    def run(self, run, batch, params, rest, terms=None):
        parallel, make_stage = self.parallel, self._stage()
        check_rows(batch, parallel.axes, parallel.num_devices)
        shards = [how.manual_spec for how in self.layout.params]
        shards = jax.tree.unflatten(jax.tree.structure(params), shards)
        is_divided = parallel.zero == 3
        grads = WeightedSum(shards if parallel.zero else WHOLE, WHOLE)
        grads = {name: grads for name in terms} if terms else grads
        mapped = self._map(
            lambda *args: run(make_stage, *args),
            in_specs=(
                PartitionSpec(parallel.axes),
                shards if is_divided else WHOLE,
                WHOLE,
            ),
            out_specs=(WHOLE, grads),
        )
        params = params if is_divided else self._gather_typed(params)
        try:
            return mapped(self._place_rows(batch), params, self._gather_typed(rest))
        except ValueError as error:
            if "with_sharding_constraint" in str(error):
                error.add_note(_NOTE_ON_CONSTRAINTS.format(axes=parallel.axes))
            raise

    def for_update(self, state):
        # Each device updates its shard, under stages 1 and 2 too.
        return self.layout.place(state, parameters_divided=True)

    def stored(self, state, old, updated):
        """Under stages 1 and 2, gathers the new parameters: once per update."""
        leaves, treedef = jax.tree.flatten(state)
        hows = {
            i: leaf.how
            for i, leaf in enumerate(self.layout.leaves)
            if leaf.role == PARAMETER
            and leaf.how.dim is not None
            and not leaf.is_divided
        }

        def gather(shards, old):
            return {i: how.gather_over(shards[i], old[i]) for i, how in hows.items()}

        def renew(shards, old, updated):
            return jax.lax.cond(updated, gather, lambda shards, old: old, shards, old)

        if hows:
            specs = {i: how.manual_spec for i, how in hows.items()}
            old = jax.tree.leaves(old)
            shards, old = ({i: x[i] for i in hows} for x in (leaves, old))
            renew = self._map(renew, in_specs=(specs, WHOLE, WHOLE), out_specs=WHOLE)
            whole = renew(shards, old, updated)
            leaves = [whole.get(i, leaf) for i, leaf in enumerate(leaves)]
        return self.layout.place(treedef.unflatten(leaves))

    def _map(self, function, in_specs, out_specs):
        return jax.shard_map(
            function,
            mesh=self.parallel.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=frozenset(self.parallel.axes),
            # With it on, axes that are left automatic fail in an assertion of JAX
            # (0.10 to 0.12).
            check_vma=False,
        )

    def _stage(self) -> Callable[..., Stage0]:
        stage = (Stage0, Stage1, Stage2, Stage3)[self.parallel.zero]
        stage = GatheredOnce if self.parallel.gather_once else stage
        hows, overlap_last = self.layout.params, self.parallel.overlap_last
        return functools.partial(stage, hows=hows, overlap_last=overlap_last)

    def _place_rows(self, batch):
        """Divides rows that arrive in another layout (from the host, say)."""
        parallel = self.parallel
        sharding = NamedSharding(parallel.mesh, PartitionSpec(parallel.axes))
        return jax.tree.map(lambda leaf: constrain(leaf, sharding), batch)

    def _gather_typed(self, tree: PyTree) -> PyTree:
        """Whole over the data axes, where their type says that it is not.

        Automatic axes are gathered by the compiler.
        """
        mesh = self.parallel.mesh

        def gather(leaf: Any):
            if not isinstance(leaf, jax.Array) or not mesh.explicit_axes:
                return leaf
            kept = PartitionSpec(*others_of(leaf, mesh, self.parallel.axes))
            if kept == jax.typeof(leaf).sharding.spec:
                return leaf
            return jax.sharding.reshard(leaf, NamedSharding(mesh, kept))

        return jax.tree.map(gather, tree)
