"""Checks of what a user passed, and words for the messages."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

PyTree = Any


def describe(value: Any) -> str:
    """A value in a few words."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{value!r} of type {type(value).__name__}"


def place(path) -> str:
    """Where in a tree a leaf stands, as `['a'][0].b`."""
    return jax.tree_util.keystr(path)


def check_numbers(name: str, value: ArrayLike) -> jax.Array:
    """Refuses what is no array of numbers or booleans."""
    try:
        array = jnp.asarray(value)
        if jnp.issubdtype(array.dtype, jnp.number) or array.dtype == jnp.bool_:
            return array
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} is {describe(value)}; it must be an array of numbers.")


def check_count(name: str, value: Any, at_least: int = 1) -> int:
    """Refuses what is no integer, or too small a one."""
    rule = f"{name}={value!r} must be an integer of at least {at_least}"
    if isinstance(value, bool):
        raise TypeError(f"{rule}, not a boolean.")
    try:
        count = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{rule}, not of type {type(value).__name__}.") from error
    if count < at_least:
        raise ValueError(f"{rule}.")
    return count
