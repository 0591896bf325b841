"""What one call adds to a cycle: a summed gradient, its weight, its loss; checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._axes import varying, varying_axes
from ._checks import PyTree, check_array, check_real, describe, place
from ._compensated import pair_of, value_of
from ._norms import norm_over_shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contribution:
    """What one call adds to a cycle. Of a loss of several terms, dicts by term.

    Attributes:
        grads: the gradient's sum, in the structure of the parameters.
        weight: its weight, as a pair; NaN if it is none.
        value: `value * weight`, and the weight of the value.
    """

    grads: PyTree
    weight: PyTree
    value: PyTree

    def or_nothing(self, axes: tuple[str, ...]) -> "Contribution":
        """Nothing, if any of it is not finite."""
        good = jnp.isfinite(norm_over_shards(self.grads, axes))
        for pair in jax.tree.leaves((self.weight, self.value)):
            good &= jnp.isfinite(pair).all()
        return jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), self)


def read_contribution(
    grads: PyTree,
    weight: ArrayLike | None,
    extra_args: dict[str, Any],
    sums: PyTree,
    value_dtype: jnp.dtype,
    axes: tuple[str, ...],
    term: str = "",
) -> Contribution:
    """Checks what a call was given, against the sums that it is to be added to.

    `term`: of which term it is, as messages say it: `['cross_entropy']`.
    """
    grads = _check_gradients(grads, sums, axes, term)
    pair = _check_weight(weight, term)
    weight = value_of(pair).astype(value_dtype)
    value = jnp.zeros(2, value_dtype)
    if "value" in extra_args:
        given = check_value(extra_args["value"], term).astype(value_dtype)
        # The mean of nothing is usually NaN: it is left out, not multiplied by zero.
        product = jnp.where(weight == 0, jnp.zeros_like(given), given * weight)
        value = jnp.stack([product, weight])
    return Contribution(grads, *varying((pair, value), axes))


def read_terms(
    terms: tuple[str, ...],
    grads: PyTree,
    weight: Any,
    extra_args: dict[str, Any],
    sums: PyTree,
    value_dtype: jnp.dtype,
    axes: tuple[str, ...],
) -> Contribution:
    """`read_contribution`, where each term has a sum and a weight of its own."""
    given = {"grad_sums": grads, "weight": weight}
    given |= {name: extra_args[name] for name in ("value",) if name in extra_args}
    for name, value in given.items():
        _check_terms(name, value, terms)
    parts = {
        name: read_contribution(
            grads[name],
            weight[name],
            extra_args | {k: given[k][name] for k in ("value",) if k in given},
            sums[name],
            value_dtype,
            axes,
            term=f"[{name!r}]",
        )
        for name in terms
    }
    return Contribution(
        grads={name: part.grads for name, part in parts.items()},
        weight={name: part.weight for name, part in parts.items()},
        value={name: part.value for name, part in parts.items()},
    )


def _check_terms(name, value, terms):
    is_dict = isinstance(value, Mapping)
    if not is_dict or set(value) != set(terms):
        has = f"has {sorted(map(str, value))}" if is_dict else f"is {describe(value)}"
        raise ValueError(
            f"accumulate was given terms={terms}, so {name} must be a dict with an "
            f"entry for each of them; it {has}. jaxga.value_and_grad_sums with "
            "separate_terms=True gives a sum and a weight for each term."
        )


def check_value(value: ArrayLike, term: str = "") -> jax.Array:
    """Refuses a loss that has no weighted mean."""
    value = check_real(f"value{term}", value)
    if value.ndim:
        raise ValueError(
            f"value{term} is {describe(value)}; it must be a scalar, the mean loss of "
            "this micro-batch. The cycle hands on the weighted mean."
        )
    return value


def check_flush(flush: Any) -> jax.Array:
    """Refuses what is no boolean, or may differ from device to device."""
    is_array = hasattr(flush, "dtype") and hasattr(flush, "shape")
    if not isinstance(flush, bool) and not (
        is_array and flush.shape == () and flush.dtype == jnp.bool_
    ):
        raise TypeError(f"flush is {describe(flush)}; it must be True or False.")
    flush = jnp.asarray(flush)
    if varying_axes(flush):
        axes = tuple(sorted(varying_axes(flush)))
        raise ValueError(
            f"flush varies over the mesh axes {axes}: some devices would close the "
            "cycle, and wait for the others for ever. Decide for all of them: "
            f"jax.lax.pmax(flush.astype(int), {axes}) > 0."
        )
    return flush


def _check_weight(weight, term):
    """A weight as a pair. One that is negative or not finite turns into NaN."""
    if weight is None:
        weight = 1  # the gradient is a mean, and each call counts alike
    if isinstance(weight, np.generic):
        weight = weight.item()  # as an array of JAX, an int64 would be cut off
    if not isinstance(weight, int | float):
        weight = check_real(f"weight{term}", weight)
        if weight.ndim:
            raise ValueError(
                f"weight{term} is {describe(weight)}; it must be a scalar: the number "
                "of tokens or examples that grad_sums was summed over."
            )
    pair = pair_of(weight)
    good = jnp.isfinite(pair[0]) & (pair[0] >= 0)
    return jnp.where(good, pair, jnp.full_like(pair, jnp.nan))


def _check_gradients(grads, sums, axes, term):
    """Refuses a gradient that does not fit the parameters that `init` was given."""
    structures = [jax.tree.structure(tree) for tree in (grads, sums)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"grad_sums{term} has the structure {structures[0]}, but the parameters "
            f"that init was given have {structures[1]}."
        )
    lead = 1 if axes else 0

    def check(path, grad, total):
        words = f"grad_sums{term}{place(path)}"
        grad = check_array(words, grad)
        if total.shape[:lead] != (1,) * lead:
            raise ValueError(
                f"state.sums{term}{place(path)} has shape {total.shape} on each "
                f"device, but with axis_name={axes} its first axis is that of the "
                "devices, 1 on each. Give shard_map the specs jaxga.state_specs(tx, "
                "params, axis_name) for the state; give pmap the state as pmap "
                "returned it."
            )
        shape = total.shape[lead:]
        if grad.shape != shape:
            raise ValueError(
                f"{words} has shape {grad.shape}, but the parameter has {shape}."
            )
        is_complex = jnp.issubdtype(total.dtype, jnp.complexfloating)
        kind = jnp.inexact if is_complex else jnp.floating
        if not jnp.issubdtype(grad.dtype, kind):
            what = "complex" if is_complex else "real"
            raise TypeError(
                f"{words} is of dtype {grad.dtype}, which is no gradient of a {what} "
                "parameter."
            )
        _check_varies(words, varying_axes(grad), varying_axes(total), axes)
        return grad

    return jax.tree.map_with_path(check, grads, sums)


def _check_varies(words, grad_axes, sum_axes, axes):
    """Refuses a gradient of all devices where each has its own sum, and the reverse.

    Where JAX keeps track of what varies, the sums show it.
    """
    if frozenset(axes) <= sum_axes and not frozenset(axes) <= grad_axes:
        raise ValueError(
            f"{words} is the same on all devices of axis_name={axes}: JAX has summed "
            "it over them already, as it does under shard_map with the gradient of a "
            "replicated parameter, and it would be counted once for every device. Mark "
            "the parameters as varying before differentiating, jax.lax.pcast(params, "
            f"{axes}, to='varying'), or use jaxga.value_and_grad_sums."
        )
    if grad_axes - sum_axes - frozenset(axes):
        more = tuple(sorted(grad_axes - sum_axes - frozenset(axes)))
        raise ValueError(
            f"{words} varies over the mesh axes {more} from device to device, but "
            f"accumulate was given axis_name={axes}. Add these axes to it, or sum the "
            f"gradient over them first, jax.lax.psum(grads, {more})."
        )
