"""Named mesh axes: which are in scope, and what varies over them.

Inside `shard_map` JAX may know of every value over which axes it varies from device to
device, and then sums the gradient of a replicated parameter over the devices by itself:
inside every micro-batch, and a further `psum` would make it too large by the number of
devices. So parameters are marked as varying first. Under `pmap` and `check_vma=False`
nothing is known, and marking does nothing.
"""

from typing import Any

import jax
from jax import lax

from ._checks import PyTree

AxisNames = str | tuple[str, ...]


def check_axis_name(axis_name: AxisNames | None) -> tuple[str, ...] | None:
    """The axes as a tuple; None if it is left open whether there are any."""
    if axis_name is None or isinstance(axis_name, tuple):
        names = axis_name
    else:
        names = (axis_name,)
    for name in names or ():
        if not isinstance(name, str):
            raise TypeError(f"{axis_name=} must be a name, or a tuple of names.")
    if names and len(set(names)) < len(names):
        raise ValueError(f"{axis_name=} names an axis twice.")
    return names


def axes_in_scope(axes: tuple[str, ...] | None) -> tuple[str, ...]:
    """Refuses axes that are not bound, and bound ones that are passed over."""
    bound = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    if axes is None and bound:
        raise ValueError(
            f"The mesh axes {bound} are in scope (inside pmap or shard_map), but no "
            f"axis_name was given: every device would keep a gradient of its own. Pass "
            f"axis_name={bound[0]!r} to sum over it, or axis_name=() to keep it local."
        )
    for name in axes or ():
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"axis_name={name!r} is not in scope here; in scope are "
                f"{bound or 'no axes'}. Call this inside jax.pmap(..., "
                f"axis_name={name!r}) or jax.shard_map over a mesh with that axis."
            ) from error
    return axes or ()


def varying_axes(x: Any) -> frozenset[str]:
    """The axes over which an array, or its type, is known to vary."""
    typ = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    manual = getattr(typ, "manual_axis_type", None)
    return frozenset() if manual is None else manual.varying


def varying(tree: PyTree, axes) -> PyTree:
    """Marks arrays as varying over `axes`, where they are not."""
    mesh_axes = jax.sharding.get_abstract_mesh().manual_axes

    def mark(x):
        missing = tuple(
            name for name in axes if name in mesh_axes and name not in varying_axes(x)
        )
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def full_of_type(typ: jax.ShapeDtypeStruct, value: Any) -> jax.Array:
    """An array of one value, with a type's sharding and varying axes too.

    `lax.full_like` would do, but fails beside automatic axes (JAX 0.10 to 0.12).
    """
    sharding = typ.sharding
    is_sharded = sharding is not None and any(sharding.spec)
    full = lax.full(
        typ.shape, value, typ.dtype, sharding=sharding if is_sharded else None
    )
    return varying(full, varying_axes(typ))


def device_index(axes: tuple[str, ...]) -> jax.Array | int:
    """The index of this device among those of `axes`; 0 without axes."""
    return lax.axis_index(axes) if axes else 0
