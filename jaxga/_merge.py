"""What it is to merge: two parts of the data become one."""

from typing import Any

import jax
import jax.numpy as jnp

from ._axes import full_of_type
from ._checks import PyTree, describe, place


class MergeType:
    """What `WeightedSum`, `Sum`, `Max`, `Min` and `Stack` share.

    In the loop an accumulator starts as `empty`, made from the shapes of what one
    micro-batch gives, and `put` adds what micro-batch `index` gave.
    """

    def empty(self, accum_steps: int):
        return jax.tree.map(lambda typ: full_of_type(typ, 0), self)

    def put(self, new, index):
        return self.merge(new)

    def __add__(self, other):
        raise TypeError(
            f"{type(self).__name__} cannot be added with +, because + could mean two "
            "things. To add two terms of a loss, return them as a dict, "
            '{"cross_entropy": a, "penalty": 0.1 * b}: each is then divided by its own '
            "weight. To join two parts of the data, write a.merge(b)."
        )

    __radd__ = __add__

    def __sub__(self, other):
        raise TypeError(
            f"{type(self).__name__} cannot be subtracted. To subtract a term of a "
            'loss, return both as a dict, {"cross_entropy": a, "entropy": -0.1 * b}: '
            "each is then divided by its own weight."
        )

    __rsub__ = __sub__


def merge(a: PyTree, b: PyTree) -> PyTree:
    """Joins two parts of the data, leaf by leaf.

    Args:
        a: any tree of `WeightedSum`, `Sum`, `Max`, `Min` and `Stack`: metrics of some
            batches of an evaluation, say.
        b: a tree of the same structure.

    Returns:
        The tree of `x.merge(y)`.

    Raises:
        TypeError: a leaf is none of the five types, or the two sides differ in type.
        ValueError: the trees differ in structure.

    Example:
        >>> import jaxga
        >>> first = {"loss": jaxga.WeightedSum(6.0, 3), "longest": jaxga.Max(7)}
        >>> second = {"loss": jaxga.WeightedSum(4.0, 1), "longest": jaxga.Max(5)}
        >>> both = jaxga.merge(first, second)
        >>> print(both["loss"].mean(), both["longest"].finalize())
        2.5 7
    """

    def join(path, x, y):
        if not is_merge_type(x):
            raise TypeError(not_a_merge_type(f"merge: a{place(path)}", x))
        return x.merge(y)

    _check_same_structure(a, b, is_merge_type)
    return jax.tree.map_with_path(join, a, b, is_leaf=is_merge_type)


def is_merge_type(x: Any) -> bool:
    return isinstance(x, MergeType)


def not_a_merge_type(place: str, value: Any) -> str:
    """What to say of a value that has no rule by which it merges."""
    return (
        f"{place} is {describe(value)}. How parts of it merge is not known: wrap it as "
        "jaxga.WeightedSum.of(values, where=mask) (ends as a mean), jaxga.Sum(x), "
        "jaxga.Max(x), jaxga.Min(x) or jaxga.Stack(x) (kept for every micro-batch)."
    )


def check_same_kind(a: MergeType, b: MergeType) -> None:
    """Refuses parts of different metrics. JAX would broadcast their shapes."""
    if type(a) is not type(b):
        raise TypeError(
            f"merge: {type(a).__name__} cannot be merged with {type(b).__name__}: both "
            "sides must be of one type."
        )
    _check_same_structure(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"merge: {type(a).__name__}s of the shapes {jnp.shape(x)} and "
                f"{jnp.shape(y)}; both sides must have the same shape."
            )


def _check_same_structure(a, b, is_leaf=None):
    structures = [jax.tree.structure(tree, is_leaf) for tree in (a, b)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"merge: both sides must have the same structure, not {structures[0]} and "
            f"{structures[1]}."
        )
