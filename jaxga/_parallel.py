"""Data parallelism over a mesh: where arrays lie, and the manual axis of a cycle."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._axes import AxisNames, check_axis_name
from ._batches import count_rows
from ._checks import PyTree, check_array, check_host_array, describe, place


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """The batch divided over devices, the parameters whole on each.

    Sums are merged over the devices once per cycle. The axis is bound on a mesh of one
    device too, so that one script, and one loss function, serves all.

    Attributes:
        mesh: the devices, as `jax.make_mesh((8,), ("data",))` gives them. Axes of the
            mesh besides `axis` are left to JAX: parameters that are sharded over them
            stay so.
        axis: the mesh axis, or a tuple of axes, over which the batch is divided.
        zero: which state is divided over the devices besides the batch. Only 0, none,
            is built yet.
        gather_once: not built yet.
        overlap_last: not built yet.

    Raises:
        TypeError: `mesh` is no mesh.
        ValueError: `axis` is no axis of the mesh; `zero` is not 0, 1, 2 or 3.
        NotImplementedError: an option that is not built yet.

    Example:
        >>> import jax
        >>> import jaxga
        >>> parallel = jaxga.DataParallel(jax.make_mesh((1,), ("data",)))
        >>> parallel.num_devices
        1
    """

    mesh: Mesh
    axis: AxisNames = "data"
    zero: int = 0
    gather_once: bool = False
    overlap_last: bool = False

    def __post_init__(self):
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"mesh is {describe(self.mesh)}; it must be a jax.sharding.Mesh, as "
                'jax.make_mesh((jax.device_count(),), ("data",)) gives it.'
            )
        self._check_axis()
        for name in self.axes:
            if name not in self.mesh.axis_names:
                raise ValueError(
                    f"axis={self.axis!r}, but the mesh has the axes "
                    f"{self.mesh.axis_names}."
                )
        if not self.axes:
            raise ValueError(f"axis={self.axis!r} names no axis of the mesh.")
        self._check_built()

    def _check_axis(self):
        try:
            check_axis_name(self.axis)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"DataParallel: axis={self.axis!r} must be a name, or a tuple of "
                "names, each once."
            ) from error

    def _check_built(self):
        is_count = (
            isinstance(self.zero, int | np.integer) and type(self.zero) is not bool
        )
        if not is_count or self.zero not in range(4):
            raise ValueError(f"zero={self.zero!r} must be 0, 1, 2 or 3.")
        for name in ("zero", "gather_once", "overlap_last"):
            if getattr(self, name):
                raise NotImplementedError(
                    f"{name}={getattr(self, name)!r} is not built yet; leave it at "
                    f"{type(self).__dataclass_fields__[name].default!r}."
                )

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes over which the batch is divided."""
        return check_axis_name(self.axis) or ()

    @property
    def num_devices(self) -> int:
        """The devices that the batch is divided over."""
        return math.prod(self.mesh.shape[name] for name in self.axes)

    def shard_state(self, state: PyTree) -> PyTree:
        """Puts a train state on the mesh, whole on every device.

        Args:
            state: any pytree of arrays, or of `jax.ShapeDtypeStruct`s to plan with.
                An array that is sharded over other axes of this mesh stays so.

        Returns:
            The same tree. As with `jax.device_put`, arrays that lie there already are
            not copied: a step that donates the state deletes them.
        """
        return jax.tree.map_with_path(self._place_whole, state)

    def shard_batch(self, batch: PyTree) -> PyTree:
        """Divides the rows of a batch over the devices.

        Args:
            batch: pytree of arrays with a leading axis of rows: all rows on one
                process, on several processes each process's own.

        Returns:
            Global arrays whose leading axis is sharded.

        Raises:
            TypeError: a leaf is no array.
            ValueError: the rows do not divide over this process's devices.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec(self.axes))
        self._check_rows(batch, jax.process_count())
        for path, leaf in jax.tree.leaves_with_path(batch):
            check_host_array(f"batch{place(path)}", leaf)
        if jax.process_count() == 1:
            return jax.device_put(batch, sharding)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch
        )

    def init(self, init_fn: Callable[..., PyTree], *args: Any) -> PyTree:
        """Makes a state on the mesh: `init_fn(*args)`, compiled for its devices.

        Args:
            init_fn: makes the state, `lambda key: TrainState.create(...)`, say.
            *args: its arguments.

        Returns:
            What it returns, whole on every device.
        """
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(init_fn, out_shardings=whole)(*args)

    def divide(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """`function(batch, whole)` on each device's rows, inside the manual axes.

        What it returns must be the same on every device.
        """

        def divided(batch: PyTree, whole: PyTree) -> PyTree:
            self._check_rows(batch, 1)
            rows = PartitionSpec(self.axes)
            return jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(rows, PartitionSpec()),
                out_specs=PartitionSpec(),
                axis_names=frozenset(self.axes),
                # With it on, axes that are left automatic fail in an assertion of
                # JAX (0.10 to 0.12).
                check_vma=False,
            )(self._place_rows(batch), jax.tree.map(self._gather, whole))

        return divided

    def _check_rows(self, batch, num_processes):
        rows, devices = count_rows(batch), max(1, self.num_devices // num_processes)
        if rows % devices:
            raise ValueError(
                f"The batch has {rows} rows, which do not divide over {devices} "
                f"devices of the mesh axes {self.axes}. Use a multiple of {devices} "
                "rows, or pad with jaxga.pad_batch."
            )

    def _place_rows(self, batch):
        """Divides rows that arrive in another layout (from the host, say)."""
        sharding = NamedSharding(self.mesh, PartitionSpec(self.axes))
        if set(self.axes) & set(self.mesh.explicit_axes):
            return jax.sharding.reshard(batch, sharding)
        return jax.lax.with_sharding_constraint(batch, sharding)

    def _gather(self, leaf):
        """Whole over the data axes, where their type says that it is not.

        Automatic axes are gathered by the compiler.
        """
        if not isinstance(leaf, jax.Array) or not self.mesh.explicit_axes:
            return leaf
        spec = jax.typeof(leaf).sharding.spec
        kept = [_without(entry, self.axes) for entry in spec]
        if PartitionSpec(*kept) == spec:
            return leaf
        return jax.sharding.reshard(
            leaf, NamedSharding(self.mesh, PartitionSpec(*kept))
        )

    def _place_whole(self, path, leaf):
        sharding = getattr(leaf, "sharding", None)
        if not (isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh):
            sharding = NamedSharding(self.mesh, PartitionSpec())
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(check_array(f"state{place(path)}", leaf), sharding)


def _without(entry, axes):
    names = entry if isinstance(entry, tuple) else (entry,)
    return tuple(name for name in names if name and name not in axes) or None
