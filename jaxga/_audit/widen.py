"""A traced function, evaluated in float64.

What was traced is widened, and not traced again with wide inputs: random draws would
be others then; and models that say themselves in which dtype they compute would do so
in float32 again. Widened, they are evaluated in float64 as well.
Integers, keys and draws stay what they were; whatever floating-point values were made
from parameters, rows or counts becomes float64.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from .._jaxprs import count_consts_and_carry


@dataclasses.dataclass
class Seen:
    """What a watch has found at one equation.

    Attributes:
        equations: the equation, after those that it stands inside.
        values: what the watch returned; inside a loop one for every iteration.
    """

    equations: tuple
    values: Any


class Widened:
    """A closed jaxpr as a function of its flat inputs, in float64 where it can be.

    To be called under `jax.enable_x64(True)`.

    Attributes:
        kept: after a call, the primitives that were computed in the dtypes that they
            were traced in, because they know no other.
        seen: after a call, what `watch` returned for the outputs of each equation.
    """

    def __init__(self, closed: Any, watch: Callable | None = None):
        self._closed, self._watch = closed, watch
        self.kept: set[str] = set()
        self.seen: list[Seen] = []

    def __call__(self, *leaves: Any) -> list[jax.Array]:
        self.seen = []
        closed, leaves = self._closed, list(map(widen, leaves))
        return list(map(widen, self._run(closed, leaves, self.seen, ())))

    def _run(self, closed, inputs, seen, outer):
        jaxpr = getattr(closed, "jaxpr", closed)
        consts = map(widen, getattr(closed, "consts", ()))
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            return values[atom] if isinstance(atom, core.Var) else atom.val

        for equation in jaxpr.eqns:
            inputs = list(map(read, equation.invars))
            rule = _rule_of(equation)
            with _scope(equation):
                outputs = rule(self, equation, inputs, seen, (*outer, equation))
            values.update(zip(equation.outvars, outputs, strict=True))
        return list(map(read, jaxpr.outvars))

    def _note(self, seen, path, outputs):
        if self._watch is not None and seen is not None:
            seen.append(Seen(path, self._watch(outputs)))
        return outputs

    def inline(self, equation, inputs, seen, path):
        return self._run(_inner(equation), inputs, seen, path)

    def scan(self, equation, inputs, seen, path):
        num_consts, num_carry = count_consts_and_carry(equation)
        last = num_consts + num_carry
        consts, carry = inputs[:num_consts], list(map(widen, inputs[num_consts:last]))
        found: list[Seen] = []

        def body(carry, slices):
            found.clear()
            inner = None if seen is None else found
            closed = equation.params["jaxpr"]
            outputs = self._run(closed, [*consts, *carry, *slices], inner, path)
            outputs = list(map(widen, outputs))
            stacked = outputs[num_carry:], [one.values for one in found]
            return outputs[:num_carry], stacked

        options = {name: equation.params[name] for name in ("length", "reverse")}
        carry, (stacked, values) = lax.scan(body, carry, inputs[last:], **options)
        if seen is not None:
            seen += [
                dataclasses.replace(one, values=value)
                for one, value in zip(found, values, strict=True)
            ]
        return self._note(seen, path, [*carry, *stacked])

    def loop(self, equation, inputs, seen, path):
        params = equation.params
        first = params["cond_nconsts"]
        last = first + params["body_nconsts"]

        def goes_on(carry):
            inner = [*inputs[:first], *carry]
            return self._run(params["cond_jaxpr"], inner, None, path)[0]

        def body(carry):
            inner = [*inputs[first:last], *carry]
            return list(map(widen, self._run(params["body_jaxpr"], inner, None, path)))

        outputs = lax.while_loop(goes_on, body, list(map(widen, inputs[last:])))
        return self._note(seen, path, outputs)

    def cond(self, equation, inputs, seen, path):
        index, *operands = inputs

        def of(branch):
            return lambda *xs: list(map(widen, self._run(branch, xs, None, path)))

        branches = list(map(of, equation.params["branches"]))
        return self._note(seen, path, lax.switch(index, branches, *operands))

    def scatter(self, equation, inputs, seen, path):
        # Its parameters hold the addition as a jaxpr of narrow scalars.
        operand, indices, updates = inputs
        dtype = jnp.promote_types(operand.dtype, updates.dtype)
        names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
        options = {name: equation.params[name] for name in names}
        function = _SCATTERS[equation.primitive.name]
        output = function(
            jnp.asarray(operand, dtype), indices, jnp.asarray(updates, dtype), **options
        )
        return self._note(seen, path, [output])

    def cast(self, equation, inputs, seen, path):
        (x,), dtype = inputs, equation.params["new_dtype"]
        if _is_float(dtype) and not _is_narrow(x):
            # Counts too: the division by one is to be exact.
            dtype = wide_dtype(dtype)
            x = x.real if jnp.iscomplexobj(x) and dtype == np.float64 else x
            return self._note(seen, path, [jnp.asarray(x, dtype)])
        return self._note(seen, path, _bind(equation, inputs, equation.params))

    def keep(self, equation, inputs, seen, path):
        """In the dtypes in which it was traced."""
        if any(map(_is_wide, inputs)):
            self.kept.add(equation.primitive.name)
        dtypes = [atom.aval.dtype for atom in equation.invars]
        pairs = zip(inputs, dtypes, strict=True)
        inputs = [jnp.asarray(x, t) if _is_wide(x) else x for x, t in pairs]
        return self._note(seen, path, _bind(equation, inputs, equation.params))

    def primitive(self, equation, inputs, seen, path):
        if not any(map(_is_wide, inputs)):
            return self._note(seen, path, _bind(equation, inputs, equation.params))
        params = {name: _wide_param(name, x) for name, x in equation.params.items()}
        try:
            outputs = _bind(equation, list(map(widen, inputs)), params)
        except (TypeError, ValueError):
            # A primitive that this file does not know, with dtypes of its own.
            return self.keep(equation, inputs, seen, path)
        return self._note(seen, path, outputs)


def widen(x: Any) -> Any:
    """A float or complex array in 64 bits per number; anything else as it is."""
    if not hasattr(x, "dtype"):
        x = jnp.asarray(x)
    return jnp.asarray(x, wide_dtype(x.dtype)) if _is_narrow(x) else x


def wide_dtype(dtype: Any) -> Any:
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.dtype(jnp.complex128 if is_complex else jnp.float64)


def _is_float(dtype):
    return jnp.issubdtype(dtype, jnp.inexact)


def _is_wide(x):
    return hasattr(x, "dtype") and x.dtype in (np.float64, np.complex128)


def _is_narrow(x):
    return _is_float(x.dtype) and not _is_wide(x)


def _wide_param(name, value):
    if name == "precision":
        return None
    is_dtype = isinstance(value, np.dtype | type) and _is_dtype(value)
    return wide_dtype(value) if is_dtype and _is_float(value) else value


def _is_dtype(value):
    try:
        jnp.dtype(value)
    except TypeError:
        return False
    return True


def _bind(equation, inputs, params):
    primitive = equation.primitive
    params = primitive.get_bind_params(params)
    with equation.ctx.manager:
        outputs = primitive.bind(*inputs, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


def _scope(equation):
    names = str(equation.source_info.name_stack)
    return jax.named_scope(names) if names else contextlib.nullcontext()


def _inner(equation):
    (inner,) = [x for x in equation.params.values() if hasattr(x, "eqns")]
    return inner


_INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
_INLINED += ("custom_jvp_call", "custom_vjp_call")
# Bits, foreign programs, and devices' own.
_KEPT = ("bitcast_convert_type", "shard_map", "xla_pmap", "pure_callback")
_KEPT += ("io_callback", "debug_callback", "ffi_call")
_SCATTERS = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter_add": lax.scatter_add,
    "scatter-mul": lax.scatter_mul,
    "scatter_mul": lax.scatter_mul,
    "scatter_min": lax.scatter_min,
    "scatter_max": lax.scatter_max,
}
_RULES = {
    "scan": Widened.scan,
    "while": Widened.loop,
    "cond": Widened.cond,
    "convert_element_type": Widened.cast,
    "reduce_precision": lambda self, equation, inputs, *_: inputs,
    **dict.fromkeys(_SCATTERS, Widened.scatter),
    **dict.fromkeys(_INLINED, Widened.inline),
    **dict.fromkeys(_KEPT, Widened.keep),
}


def _rule_of(equation):
    has_own_program = any(True for _ in core.jaxprs_in_params(equation.params))
    default = Widened.keep if has_own_program else Widened.primitive
    return _RULES.get(equation.primitive.name, default)
