"""Model state: what the forward pass changes, and how micro-batches' versions merge.

Floating-point leaves follow the rule. Integers, booleans and random keys (counters,
streams) are the same on every device and come back as the forward pass left them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import varying, varying_axes
from ._batch_norm import RunningPair, find_running_pairs
from ._checks import PyTree, check_array, describe, place
from ._forward import Forward
from ._params import OVERWRITTEN
from ._state_merges import (
    MERGES,
    BatchNormLeaf,
    LeafAsLeft,
    OverwrittenLeaf,
)

RULES = ("carry", "mean", "max", "batch_norm")


def check_rule(rule: str | Mapping[str, str]) -> str | Mapping[str, str]:
    """Refuses a rule, or a dict of rules, that there is not."""
    for one in rule.values() if isinstance(rule, Mapping) else (rule,):
        if one not in RULES:
            raise ValueError(
                f"model_state_merge={rule!r}: {one!r} is none of {', '.join(RULES)}."
            )
    return rule


class ModelState:
    """The leaves of one cycle's model state, and the merge of each.

    Leaves that the forward pass hands back untouched take no part: they are neither
    carried nor merged, and come back as the very arrays that went in.
    """

    def __init__(self, tree: PyTree, rule: str | Mapping[str, str], axes: tuple):
        self.tree, self.axes = tree, axes
        self.rules = _rule_of_each_leaf(tree, rule)
        self.leaves = [
            check_array(f"model_state{place(path)}", leaf)
            for path, leaf in jax.tree.leaves_with_path(tree)
        ]
        self.first = [_varying_if_inexact(leaf, axes) for leaf in self.leaves]
        self.merges = {
            i: MERGES[rule](leaf) if _is_inexact(leaf) else LeafAsLeft(leaf, rule)
            for i, (leaf, rule) in enumerate(zip(self.first, self.rules, strict=True))
        }
        self.pairs: list[RunningPair] = []

    def read(self, returned: PyTree) -> list[jax.Array]:
        """The leaves of what the loss function returned, checked."""
        leaves = check_unchanged(self.tree, returned)
        return [_varying_if_inexact(leaf, self.axes) for leaf in leaves]

    def leave_out(self, untouched: set[int]) -> None:
        for i in untouched:
            if not isinstance(self.merges[i], OverwrittenLeaf):
                del self.merges[i]

    def find_running_averages(
        self, forward: Forward, params: PyTree, rows: PyTree
    ) -> None:
        """Finds how the running averages of batch norm move in the forward pass.

        Args:
            forward: takes parameters, rows, the index of a micro-batch and the leaves
                of this state, and returns the new leaves last.
            params: its first argument. Shapes will do.
            rows: its second.
        """
        paths = {
            i: path
            for i, (path, _) in enumerate(jax.tree.leaves_with_path(self.tree))
            if isinstance(self.merges.get(i), BatchNormLeaf)
        }
        if paths:
            arguments = params, rows, jnp.int32(0), self.first
            self.pairs = find_running_pairs(forward, arguments, paths)
        for pair in self.pairs:
            self.merges[pair.mean].factor = pair.factor

    def start(self) -> dict[int, Any]:
        """What the loop begins with, by the index of the leaf."""
        kinds = {type(merge) for merge in self.merges.values()}
        assert self.pairs or BatchNormLeaf not in kinds, "their momenta were not found"
        return {i: merge.start() for i, merge in self.merges.items()}

    def feed(self, parts: dict[int, Any]) -> list[jax.Array]:
        """The leaves that the next micro-batch gets."""
        fed = {i: merge.feed(parts[i]) for i, merge in self.merges.items()}
        return [fed.get(i, leaf) for i, leaf in enumerate(self.first)]

    def put(self, parts: dict[int, Any], new: list[jax.Array], present) -> dict:
        """Adds a micro-batch; `present` says whether it had any weight."""
        merges = self.merges.items()
        return {i: merge.put(parts[i], new[i], present) for i, merge in merges}

    def check_not_overwritten(self) -> None:
        """Refuses fp8 histories, whose gradient is that of the whole objective."""
        if self._overwritten():
            raise ValueError(
                "The gradient of each term is summed for itself, but histories of fp8 "
                "layers (_overwrite_with_gradient) are those of the whole loss. "
                "Compute the cycle in one call, or give term_weights=."
            )

    def overwritten(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """Those that are to be overwritten with their gradient (fp8)."""
        return [leaves[i] for i in self._overwritten()]

    def overwrite(
        self, leaves: list[jax.Array], new: list[jax.Array]
    ) -> list[jax.Array]:
        """The leaves with new ones for these."""
        new = dict(zip(self._overwritten(), new, strict=True))
        return [new.get(i, leaf) for i, leaf in enumerate(leaves)]

    def put_gradients(
        self, parts: dict[int, Any], grads: list[jax.Array], present
    ) -> dict[int, Any]:
        """Adds a micro-batch's gradients by these."""
        pairs = zip(self._overwritten(), grads, strict=True)
        return parts | {
            i: self.merges[i].put_gradient(parts[i], grad, present) for i, grad in pairs
        }

    def _overwritten(self):
        merges = self.merges.items()
        return [i for i, merge in merges if isinstance(merge, OverwrittenLeaf)]

    def all_reduce(self, parts: dict[int, Any]) -> dict[int, Any]:
        """Merges over the devices."""
        merges = self.merges.items()
        return {i: merge.all_reduce(parts[i], self.axes) for i, merge in merges}

    def unflatten(self, leaves: list[jax.Array]) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(self.tree), leaves)

    def differs(self) -> list[frozenset[str]]:
        """The axes over which each leaf differs between devices."""
        return [
            frozenset(self.axes if _is_inexact(leaf) else ()) for leaf in self.leaves
        ]

    def check_agreement(self, differs: list[frozenset[str]]) -> None:
        """Refuses a counter, flag or key that the devices would disagree about."""
        for i, (path, _) in enumerate(jax.tree.leaves_with_path(self.tree)):
            axes = differs[i] & set(self.axes) - varying_axes(self.leaves[i])
            if axes and not _is_inexact(self.leaves[i]):
                raise TypeError(
                    f"model_state{place(path)}, {describe(self.leaves[i])}, depends on "
                    f"each device's own rows over {sorted(axes)}, and has no merge: "
                    "integers, booleans and keys must agree. Return what differs as a "
                    "metric, or keep it as floating point."
                )

    def finish(self, parts: dict[int, Any]) -> PyTree:
        """The model state after the cycle."""
        leaves = list(self.leaves)
        for i, merge in self.merges.items():
            leaves[i] = merge.finish(parts[i], leaves[i])
        for pair in self.pairs:
            leaves[pair.var] += parts[pair.mean].variance()
        dtypes = [leaf.dtype for leaf in self.leaves]
        return self.unflatten(list(map(_as_dtype, leaves, dtypes)))


def _as_dtype(leaf, dtype):
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def _is_inexact(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _varying_if_inexact(leaf, axes):
    return varying(leaf, axes) if _is_inexact(leaf) else leaf


def _rule_of_each_leaf(tree, rule):
    leaves = jax.tree.leaves_with_path(tree)
    keys = [getattr(path[0], "key", None) if path else None for path, _ in leaves]
    if isinstance(rule, str):
        return [OVERWRITTEN if key == OVERWRITTEN else rule for key in keys]
    unknown = sorted(set(rule) - set(keys), key=str)
    if unknown:
        raise ValueError(
            f"model_state_merge={dict(rule)!r} gives rules by top-level key, but "
            f"model_state has no {' and '.join(map(repr, unknown))}; it has "
            + (f"{sorted(set(map(str, keys)))}." if any(keys) else "no top-level keys.")
        )
    rule = {**rule, OVERWRITTEN: OVERWRITTEN}
    return [rule.get(key, "carry") for key in keys]


def check_unchanged(old: PyTree, new: PyTree) -> list[jax.Array]:
    """The leaves of `new`, if they have the structure, shapes and dtypes of `old`."""
    before, after = (
        {place(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (old, new)
    )
    lost, found = before.keys() - after.keys(), after.keys() - before.keys()
    if lost or found or jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            "loss_fn returned a model_state of another structure than it was given"
            + (f"; without {sorted(lost)}" if lost else "")
            + (f"; with {sorted(found)} besides" if found else "")
            + (f": {jax.tree.structure(new)} for {jax.tree.structure(old)}.")
        )
    for path in before:
        had, has = (check_array(f"model_state{path}", x[path]) for x in (before, after))
        if had.shape != has.shape or had.dtype != has.dtype:
            raise ValueError(
                f"model_state{path} changed from shape {had.shape}, {had.dtype}, to "
                f"shape {has.shape}, {has.dtype}, in loss_fn; it must keep both."
            )
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(new)]
