"""What a cycle is made with and called with, checked."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._axes import check_axis_name
from ._batches import check_sizes
from ._checks import check_count, check_flag, describe
from ._model_state import check_rule
from ._params import check_accum_dtype


@dataclasses.dataclass(frozen=True)
class CycleSettings:
    """What a cycle is made with, checked."""

    loss_fn: Callable
    accum_steps: int | None
    microbatch_size: int | None
    axis_name: Any
    accum_dtype: Any
    model_state_merge: str | Mapping[str, str]
    per_example_keys: bool

    def __post_init__(self):
        if not callable(self.loss_fn):
            raise TypeError(f"loss_fn is {describe(self.loss_fn)}, not a function.")
        sizes = check_sizes(self.accum_steps, self.microbatch_size, "update")
        object.__setattr__(self, "accum_steps", sizes[0])
        object.__setattr__(self, "microbatch_size", sizes[1])
        check_flag("per_example_keys", self.per_example_keys)
        object.__setattr__(self, "axis_name", check_axis_name(self.axis_name))
        object.__setattr__(self, "accum_dtype", check_accum_dtype(self.accum_dtype))
        check_rule(self.model_state_merge)


def check_num_microbatches(num, accum_steps):
    """`num_microbatches`: static, as NumPy's int32, or traced."""
    if num is None:
        return np.int32(accum_steps)
    if not isinstance(num, jax.core.Tracer):
        count = check_count("num_microbatches", num, at_least=0)
        if count > accum_steps:
            raise ValueError(
                f"num_microbatches={count} is more than the {accum_steps} "
                "micro-batches that the batch is split into."
            )
        return np.int32(count)
    if num.ndim or not jnp.issubdtype(num.dtype, jnp.integer):
        raise TypeError(
            f"num_microbatches is {describe(num)}; it must be an integer scalar."
        )
    return jnp.clip(num, 0, accum_steps).astype(jnp.int32)


def check_arguments(loss_fn: Callable, num_args: int, keywords: set[str]) -> None:
    """Refuses to call a loss function with other arguments than it takes."""
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):
        return  # a callable without a signature: Python will say it
    names = ", ".join(signature.parameters)
    kinds = {p.kind for p in signature.parameters.values()}
    for name in sorted(keywords):
        takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        if name not in signature.parameters and not takes_all:
            raise TypeError(
                f"{name}= was given to the cycle, which hands it to loss_fn as "
                f"{name}=, but loss_fn has no argument of that name: {names}."
            )
    try:
        signature.bind(*range(2 + num_args), **dict.fromkeys(keywords))
    except TypeError as error:
        call = ["params", "microbatch", *["..."] * num_args, *sorted(keywords)]
        raise TypeError(
            f"loss_fn({names}) cannot be called as loss_fn({', '.join(call)}): "
            f"{error}. Give the cycle what is missing: cycle(params, batch, *args, "
            "key=..., model_state=...)."
        ) from error
