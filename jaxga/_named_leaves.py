"""The leaves of a training state by name, and what a checkpoint says of them."""

import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._accumulate_state import AccumulateState
from ._checks import PyTree, describe, is_key

Leaves = dict[str, Any]
_NUMBERS = {"bool": jnp.bool_, "int": jnp.integer, "float": jnp.floating}
_FIELDS = set(AccumulateState._fields) - {"sums", "inner_state"}
_SHOWN = 20  # differences in a message


def named_leaves(
    argument: str, state: PyTree
) -> tuple[Leaves, Callable[[Leaves], PyTree]]:
    """The leaves by name, `params.w` say, and a function that puts others in place.

    Those of Flax nnx are taken from its own state, where what is shared stands once.
    """
    nnx: Any = sys.modules.get("flax.nnx")  # whoever made such objects imported it

    def is_object(node):
        return nnx is not None and isinstance(node, nnx.Pytree)

    tree, has_objects = state, False
    if any(map(is_object, jax.tree.leaves(state, is_leaf=is_object))):
        tree, has_objects = nnx.as_pure(nnx.state(state)), True
    found, structure = jax.tree.flatten_with_path(tree)
    names = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in found]
    leaves = dict(zip(names, (leaf for _, leaf in found), strict=True))
    _check_leaves(argument, state, names, leaves)

    def rebuild(new):
        new = jax.tree.unflatten(structure, [new[name] for name in names])
        if not has_objects:
            return new
        nnx.update(state, new)
        return state

    return leaves, rebuild


def _check_leaves(argument, state, names, leaves):
    if not names or "" in leaves:
        raise TypeError(
            f"{argument} is {describe(state)}; it must be a tree of arrays."
        )
    if len(leaves) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{argument} has several leaves of the name {twice!r}: a key that holds a "
            "dot reads like two keys. Rename it."
        )
    for name, leaf in leaves.items():
        if not (_is_number(leaf) or is_key(leaf)):
            raise TypeError(
                f"{argument}: {name} is {describe(leaf)}; it must be an array of "
                "numbers, random keys, or a number of Python's."
            )


def _is_number(leaf):
    if is_python(leaf):
        return np.asarray(leaf).dtype != object  # 2**64 is one
    dtype = getattr(leaf, "dtype", None)
    return dtype == np.bool_ or jnp.issubdtype(dtype or object, np.number)


def is_python(leaf: Any) -> bool:
    """Whether it is a number of Python's, `step` of a new Flax state say."""
    return type(leaf) in (bool, int, float)


def key_impl(leaf: Any) -> Any:
    """The random generator of keys, or of their shape."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def count_updates(leaves: Leaves) -> int:
    """The integer called `update` or `step` that stands highest in the tree."""
    found: dict[int, Leaves] = {}
    for name, leaf in leaves.items():
        *above, last = name.split(".")
        dtype = type(leaf) if is_python(leaf) else leaf.dtype
        if last in ("update", "step") and jnp.issubdtype(dtype, np.integer):
            found.setdefault(len(above), {})[name] = leaf
    highest = found[min(found)] if found else {}
    if len(highest) != 1:
        which = f"several: {', '.join(highest)}" if highest else "no `update` or `step`"
        raise ValueError(
            "The state is saved under its count of updates, but it has "
            f"{which}. Pass step=, a number that grows from save to save."
        )
    (leaf,) = highest.values()
    if isinstance(leaf, jax.Array):
        leaf = jax.device_get(leaf.addressable_data(0))
    return np.asarray(leaf).reshape(-1)[0].item()


def describe_leaf(leaf: Any) -> tuple[str, tuple[int, ...]]:
    """Its dtype, by name, and its shape."""
    if is_python(leaf):
        return type(leaf).__name__, ()
    dtype = f"key<{key_impl(leaf)}>" if is_key(leaf) else leaf.dtype.name
    return dtype, tuple(leaf.shape)


def sums_of_devices(leaves: Leaves) -> dict[str, bool]:
    """The sums of open cycles that each device has of its own; true for weights."""
    found = {}
    for name, leaf in leaves.items():
        above = "".join(re.findall(r"^(?:.*\.)?(?=sum_weight(?:$|\.))", name))
        fields = {field: _entries(leaves, above + field) for field in _FIELDS}
        if name in fields["sum_weight"] and all(fields.values()) and leaf.ndim == 2:
            sums = _entries(leaves, above + "sums")
            found |= dict.fromkeys([*sums, *fields["sum_value"]], False)
            found |= dict.fromkeys(fields["sum_weight"], True)
    return found


def _entries(leaves, name):
    """What stands under a name: a leaf, or all of a tree."""
    return [other for other in leaves if other == name or other.startswith(name + ".")]


def differences(
    saved: dict[str, tuple[str, tuple[int, ...]]], wanted: Leaves
) -> list[str]:
    """What a checkpoint has differently, a line for each leaf."""
    lines = [f"missing: {name}" for name in wanted if name not in saved]
    lines += [f"unexpected: {name}" for name in saved if name not in wanted]
    sums = sums_of_devices(wanted)
    for name in wanted:
        own = describe_leaf(wanted[name])
        if name in saved and not _fits(saved[name], own, name in sums):
            has, wants = (f"{d} of shape {shape}" for d, shape in (saved[name], own))
            lines.append(f"{name}: {has} in the checkpoint, {wants} in the state")
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more"]
    return lines


def _fits(saved, own, is_sum):
    (dtype, shape), (own_dtype, own_shape) = saved, own
    if is_sum and len(shape) == len(own_shape):  # of any number of devices
        shape, own_shape = shape[1:], own_shape[1:]
    return shape == own_shape and (dtype == own_dtype or _stand_for(dtype, own_dtype))


def _stand_for(dtype, other):
    """Whether one is Python's number, and the other an array of the same kind."""
    kind = _NUMBERS.get(dtype) or _NUMBERS.get(other)
    if kind is None or "key<" in dtype + other:
        return False
    return all(jnp.issubdtype(jnp.dtype(name), kind) for name in (dtype, other))
