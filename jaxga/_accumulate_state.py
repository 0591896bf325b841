"""The state of a cycle over several calls, and how it is found in an optimizer's."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import PartitionSpec

from ._axes import AxisNames, check_axis_name
from ._checks import PyTree, place
from ._optimizer import check_transformation


class AccumulateState(NamedTuple):
    """The state of `jaxga.accumulate`. Its tree never changes shape or dtype.

    With `axis_name`, `sums`, `sum_weight` and `sum_value` have a leading axis of 1:
    each device holds its own. Everything else is the same on all devices. With `terms`
    these three, and `weight`, are dicts with an entry for each term.

    Attributes:
        sums: the gradient's sum in this cycle, in the structure of the parameters.
            Between two cycles it is left over from the last, and is overwritten.
        sum_weight: float32, shape `(2,)`, the weight of `sums`; the number is the sum
            of the two.
        sum_value: shape `(2,)`, the sum of `value * weight` over the calls that were
            given a `value=`, and of their weights.
        num_microbatches: int32 scalar, micro-batches in this cycle so far.
        inner_state: the state of the inner transformation.
        update: int32 scalar, cycles so far that ended in an update.
        skipped: int32 scalar, cycles so far that ended and changed nothing.
        grad_norm: float32 scalar, the norm of the divided gradient of the last cycle
            that ended, also of one that was skipped.
        weight: float32 scalar, the weight of that cycle.
        updated: boolean scalar, whether the last call ended in an update.
    """

    sums: PyTree
    sum_weight: PyTree
    sum_value: PyTree
    num_microbatches: jax.Array
    inner_state: PyTree
    update: jax.Array
    skipped: jax.Array
    grad_norm: jax.Array
    weight: PyTree
    updated: jax.Array

    @property
    def terms(self) -> tuple[str, ...] | None:
        """The terms that have sums of their own; None if there is one sum."""
        has_terms = isinstance(self.sum_weight, dict)
        return tuple(self.sum_weight) if has_terms else None

    @property
    def is_local(self) -> bool:
        """Whether each device has sums of its own."""
        return jax.tree.leaves(self.sum_weight)[0].ndim > 1


def find_states(tree: PyTree) -> dict[str, AccumulateState]:
    """All states of `accumulate` in a tree, by their place in it."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=_is_state)
    return {place(path): leaf for path, leaf in leaves if _is_state(leaf)}


def has_updated(state: PyTree) -> jax.Array:
    """Whether the last call of an accumulating optimizer ended in an update.

    Args:
        state: the state of `jaxga.accumulate`, or any tree that holds one: the state of
            an `optax.chain`, a whole train state.

    Returns:
        Boolean scalar (with a leading axis of devices after `pmap`). False after a call
        in mid-cycle, after a cycle that was skipped, and after a flush of nothing.

    Raises:
        ValueError: the tree holds no state of `jaxga.accumulate`, or several.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> import optax
        >>> tx = optax.chain(jaxga.accumulate(optax.sgd(0.1), 2), optax.scale(0.5))
        >>> params = jnp.zeros(3)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.ones(3), state, params)
        ...     print(jaxga.has_updated(state))
        False
        True
    """
    found = find_states(state)
    if not found:
        raise ValueError(
            f"The tree holds no state of jaxga.accumulate: {jax.tree.structure(state)}."
        )
    if len(found) > 1:
        raise ValueError(
            f"The tree holds {len(found)} states of jaxga.accumulate, at "
            f"{', '.join(found)}. Pass the one that is meant; or put one accumulate "
            "around the others, so that they share a cycle."
        )
    (only,) = found.values()
    (updated,) = jax.tree.leaves(only.updated)  # Flax wraps it in a variable
    return updated


def state_specs(
    tx: optax.GradientTransformation, params: PyTree, axis_name: AxisNames
) -> PyTree:
    """The `PartitionSpec`s of an optimizer's state, for the caller's own `shard_map`.

    Args:
        tx: an optimizer made with `jaxga.accumulate(..., axis_name=axis_name)`, inside
            `optax.chain` and the like or not.
        params: the parameters, or their shapes.
        axis_name: the axis or axes over which the sums stay apart.

    Returns:
        The tree of `tx.init(params)`, of specs: the sums of each device lie along the
        axis, everything else is the same on all devices. Where parameters are sharded
        over further axes by hand, add these to the leaves of their shape.

    Raises:
        TypeError: `tx` is no gradient transformation; `axis_name` is no name.
        ValueError: `axis_name` is empty, or not the one that `accumulate` was given.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> import optax
        >>> tx = jaxga.accumulate(optax.sgd(0.1), 2, axis_name="data")
        >>> specs = jaxga.state_specs(tx, jnp.zeros(3), "data")
        >>> specs.sums == jax.P("data"), specs.update == jax.P()
        (True, True)
    """
    check_transformation("tx", tx)
    axes = check_axis_name(axis_name)
    if not axes:
        raise ValueError(
            f"{axis_name=} names no axis. Without one the state is the same on all "
            "devices: PartitionSpec() is its spec."
        )
    env = [(name, 1) for name in axes]
    _, state = jax.make_jaxpr(tx.init, axis_env=env, return_shape=True)(params)
    along = PartitionSpec(axes[0] if len(axes) == 1 else axes)

    def specs(node):
        if not _is_state(node):
            return PartitionSpec()
        if not node.is_local:
            raise ValueError(
                f"{axis_name=}, but the optimizer was made by accumulate without "
                "axis_name: its sums are the same on all devices. Give accumulate "
                "the same axis_name."
            )
        whole = jax.tree.map(lambda _: PartitionSpec(), node)
        sums = (node.sums, node.sum_weight, node.sum_value)
        sums = jax.tree.map(lambda _: along, sums)
        return whole._replace(**dict(zip(AccumulateState._fields, sums, strict=False)))

    return jax.tree.map(specs, state, is_leaf=_is_state)


def holds_accumulator(state: PyTree) -> bool:
    """Whether an optimizer accumulates already: by `accumulate`, or `MultiSteps`."""
    kinds = AccumulateState | optax.MultiStepsState
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return any(isinstance(leaf, kinds) for leaf in leaves)


def _is_state(node: Any) -> bool:
    return isinstance(node, AccumulateState)
