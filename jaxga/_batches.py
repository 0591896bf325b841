"""Rows of a batch: how they are split into micro-batches, and padded to a whole cycle.

Micro-batch `i` holds rows `i, i + accum_steps, i + 2 * accum_steps, ...`. Contiguous
rows of an array that is sharded over devices would lie on a few of them: every device
would then gather and compute all rows. Strided rows stay where they are.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._checks import PyTree, check_array, check_count, describe, place


def count_rows(batch: PyTree, name: str = "batch") -> int:
    """The length of the leading axis that all leaves of a batch share."""
    leaves = jax.tree.leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"{name} holds no arrays: {batch!r}.")
    first = None
    for path, leaf in leaves:
        words = f"{name}{place(path)}"
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"{words} is {describe(leaf)}, not an array. Pass what is no rows of "
                "the batch as a further argument: cycle(params, batch, *args)."
            )
        if not leaf.shape:
            raise ValueError(
                f"{words} is a scalar; every leaf of a batch needs a leading axis of "
                "rows. Pass scalars as further arguments: cycle(params, batch, *args)."
            )
        first = first or (words, leaf.shape)
        if leaf.shape[0] != first[1][0]:
            raise ValueError(
                f"{words} has shape {leaf.shape}, but {first[0]} has shape "
                f"{first[1]}: all leaves of a batch need the same number of rows."
            )
    if first[1][0] == 0:
        raise ValueError(f"{first[0]} has shape {first[1]}: the batch has no rows.")
    return first[1][0]


def as_rows(batch: PyTree) -> PyTree:
    """The leaves as JAX arrays."""
    return jax.tree.map_with_path(
        lambda path, leaf: check_array(f"batch{place(path)}", leaf), batch
    )


def as_arrays(args: PyTree) -> PyTree:
    """Further arguments: NumPy cannot be indexed by the rows of a traced batch."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, args
    )


def check_sizes(
    accum_steps: int | None, microbatch_size: int | None, per: str
) -> tuple[int | None, int | None]:
    """Exactly one of the two, as Python's int: JAX's scalar would be traced.

    `per`: what the micro-batches are parts of, as messages say it.
    """
    if (accum_steps is None) == (microbatch_size is None):
        raise ValueError(
            f"Give exactly one of accum_steps (micro-batches per {per}) and "
            f"microbatch_size (rows per micro-batch); got {accum_steps=}, "
            f"{microbatch_size=}."
        )
    if accum_steps is not None:
        return check_count("accum_steps", accum_steps), None
    return None, check_count("microbatch_size", microbatch_size)


def count_microbatches(
    batch: PyTree, accum_steps: int | None, microbatch_size: int | None
) -> int:
    """`accum_steps`, given or found, after checking that it divides the rows."""
    rows = count_rows(batch)
    name, value = (
        ("accum_steps", accum_steps)
        if accum_steps is not None
        else ("microbatch_size", microbatch_size)
    )
    if rows % value:
        path, leaf = jax.tree.leaves_with_path(batch)[0]
        below, above = rows // value * value, -(-rows // value) * value
        raise ValueError(
            f"batch{place(path)} has shape {leaf.shape}: its {rows} rows are not a "
            f"multiple of {name}={value}. Use {f'{below} or ' if below else ''}{above} "
            "rows, or pad with jaxga.pad_batch. (Inside pmap, shard_map and parallel= "
            "the rows are those of one device.)"
        )
    return value if accum_steps is not None else rows // value


def take_microbatch(batch: PyTree, accum_steps: int, index) -> PyTree:
    """Rows `index, index + accum_steps, ...` of every leaf."""
    if accum_steps == 1:
        return batch

    def take(leaf):
        split = jnp.reshape(leaf, (-1, accum_steps, *leaf.shape[1:]))
        return lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)

    return jax.tree.map(take, batch)


def pad_batch(
    batch: PyTree, rows: int, *, accum_steps: int
) -> tuple[PyTree, np.ndarray]:
    """Pads a short batch to a number of rows, and says which rows are real.

    The real rows fill the first micro-batches: a cycle with
    `num_microbatches = ceil(real_rows * accum_steps / rows)` computes them all and no
    micro-batch of padding. The padding repeats a real row, because rows of zeros can
    give a NaN gradient even where their loss is masked.

    Args:
        batch: pytree of arrays, each of shape `(real_rows, ...)`; on the host, NumPy
            arrays stay NumPy arrays.
        rows: the number of rows wanted, a multiple of `accum_steps`.
        accum_steps: the number of micro-batches that the cycle splits the batch into;
            1 appends the padding at the end.

    Returns:
        The batch with leaves of shape `(rows, ...)`, and a boolean mask of shape
        `(rows,)`, true where a row is real. Give the mask to the loss function, as part
        of the batch, and count with it.

    Raises:
        TypeError: `rows` or `accum_steps` is no integer; a leaf is no array.
        ValueError: the batch has no rows, or more than `rows`; `rows` is not a multiple
            of `accum_steps`; leaves disagree about their rows.

    Example:
        >>> import jaxga
        >>> import numpy as np
        >>> batch, mask = jaxga.pad_batch({"x": np.array([1, 2, 3])}, 6, accum_steps=3)
        >>> print(batch["x"], mask.astype(int))
        [1 3 1 2 1 1] [1 1 0 1 0 0]
    """
    rows = check_count("rows", rows)
    accum_steps = check_count("accum_steps", accum_steps)
    real = count_rows(batch)
    if rows % accum_steps:
        above = math.ceil(rows / accum_steps) * accum_steps
        raise ValueError(
            f"pad_batch: {rows=} is not a multiple of {accum_steps=}. Use {above}."
        )
    if real > rows:
        raise ValueError(
            f"pad_batch: the batch has {real} rows already, more than {rows=}."
        )
    # Row r of the result is entry r // accum_steps of micro-batch r % accum_steps.
    entry, microbatch = np.divmod(np.arange(rows), accum_steps)
    source = microbatch * (rows // accum_steps) + entry
    mask = source < real
    source = np.where(mask, source, 0)
    for path, leaf in jax.tree.leaves_with_path(batch):
        if not isinstance(leaf, np.ndarray):
            check_array(f"batch{place(path)}", leaf)
    return jax.tree.map(lambda leaf: leaf[source], batch), mask
