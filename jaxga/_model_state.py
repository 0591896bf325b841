"""Model state: what the forward pass changes, and how micro-batches' versions merge.

Floating-point leaves follow the rule. Integers, booleans and random keys (counters,
streams) are the same on every device and come back as the forward pass left them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import varying, varying_axes
from ._checks import PyTree, check_array, check_real, describe, place
from ._dtypes import as_total
from ._metrics import Max
from ._sums import WeightedSum

RULES = ("carry", "mean", "max")


def check_rule(rule: str | Mapping[str, str]) -> str | Mapping[str, str]:
    """Refuses a rule, or a dict of rules, that there is not."""
    for one in rule.values() if isinstance(rule, Mapping) else (rule,):
        if one == "batch_norm":
            raise NotImplementedError(
                'model_state_merge="batch_norm" is not built yet. Use "mean" (the '
                'average over micro-batches) or "carry" (one after the other).'
            )
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
            i: _MERGES[rule](leaf) if _is_inexact(leaf) else _AsLeft(leaf, rule)
            for i, (leaf, rule) in enumerate(zip(self.first, self.rules, strict=True))
        }

    def read(self, returned: PyTree) -> list[jax.Array]:
        """The leaves of what the loss function returned, checked."""
        leaves = check_unchanged(self.tree, returned)
        return [_varying_if_inexact(leaf, self.axes) for leaf in leaves]

    def leave_out(self, untouched: set[int]) -> None:
        for i in untouched:
            del self.merges[i]

    def start(self) -> dict[int, Any]:
        """What the loop begins with, by the index of the leaf."""
        return {i: merge.start() for i, merge in self.merges.items()}

    def feed(self, parts: dict[int, Any]) -> list[jax.Array]:
        """The leaves that the next micro-batch gets."""
        fed = {i: merge.feed(parts[i]) for i, merge in self.merges.items()}
        return [fed.get(i, leaf) for i, leaf in enumerate(self.first)]

    def put(self, parts: dict[int, Any], new: list[jax.Array], present) -> dict:
        """Adds a micro-batch; `present` says whether it had any weight."""
        merges = self.merges.items()
        return {i: merge.put(parts[i], new[i], present) for i, merge in merges}

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
            leaves[i] = merge.finish(parts[i], leaves[i]).astype(leaves[i].dtype)
        return self.unflatten(leaves)


@dataclasses.dataclass
class _Carry:
    """Threaded through the micro-batches in order; the mean over devices."""

    first: jax.Array

    def start(self):
        return WeightedSum(self.first, _no_count(self.first))

    def feed(self, part):
        return part.total

    def put(self, part, new, present):
        # Of weight 1 once there was any: a device without rows has no say.
        weight = jnp.maximum(part.weight, present.astype(jnp.int32))
        return WeightedSum(jnp.where(present, new, part.total), weight)

    def all_reduce(self, part, axes):
        total = as_total(part.total)
        total = jnp.where(part.weight > 0, total, jnp.zeros_like(total))
        merged = WeightedSum(total, part.weight).all_reduce(axes)
        return WeightedSum(merged.mean(), merged.weight)

    def finish(self, part, old):
        return jnp.where(part.weight == 0, old, part.total)


@dataclasses.dataclass
class _Mean(_Carry):
    """Each micro-batch starts from the first state; the mean of the results."""

    def start(self):
        return WeightedSum(jnp.zeros_like(as_total(self.first)), _no_count(self.first))

    def feed(self, part):
        return self.first

    def put(self, part, new, present):
        new = jnp.where(present, as_total(new), jnp.zeros_like(part.total))
        return part.merge(WeightedSum(new, present.astype(jnp.int32)))

    def all_reduce(self, part, axes):
        return part.all_reduce(axes)

    def finish(self, part, old):
        return jnp.where(part.weight == 0, as_total(old), part.mean())


@dataclasses.dataclass
class _Max(_Mean):
    """Each micro-batch starts from the first state; the largest of the results."""

    def start(self):
        check_real("model_state under the rule 'max'", self.first)
        return Max(jnp.full_like(as_total(self.first), -jnp.inf))

    def put(self, part, new, present):
        largest = part.merge(Max(as_total(new)))
        return Max(jnp.where(present, largest.value, part.value))

    def finish(self, part, old):
        return jnp.where(part.value == -jnp.inf, as_total(old), part.value)


@dataclasses.dataclass
class _AsLeft:
    """No number with a fraction: as the forward pass left it."""

    first: jax.Array
    rule: str

    def start(self):
        return self.first

    def feed(self, part):
        return part if self.rule == "carry" else self.first

    def put(self, part, new, present):
        return new

    def all_reduce(self, part, axes):
        return part

    def finish(self, part, old):
        return part


_MERGES = {"carry": _Carry, "mean": _Mean, "max": _Max}


def _is_inexact(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _varying_if_inexact(leaf, axes):
    return varying(leaf, axes) if _is_inexact(leaf) else leaf


def _no_count(like):
    """A count of 0 that varies over the axes over which `like` does."""
    return varying(jnp.zeros((), jnp.int32), varying_axes(like))


def _rule_of_each_leaf(tree, rule):
    leaves = jax.tree.leaves_with_path(tree)
    if isinstance(rule, str):
        return [rule for _ in leaves]
    keys = [getattr(path[0], "key", None) if path else None for path, _ in leaves]
    unknown = sorted(set(rule) - set(keys), key=str)
    if unknown:
        raise ValueError(
            f"model_state_merge={dict(rule)!r} gives rules by top-level key, but "
            f"model_state has no {' and '.join(map(repr, unknown))}; it has "
            + (f"{sorted(set(map(str, keys)))}." if any(keys) else "no top-level keys.")
        )
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
