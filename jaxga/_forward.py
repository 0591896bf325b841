"""One trace of the forward pass, and what can be read off it before anything runs."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from ._checks import PyTree

# What is the same on every device afterwards, whatever went in.
_AGREEING = {"psum", "psum_invariant", "pmax", "pmin", "all_gather"}
_AGREEING |= {"pmax_invariant", "pmin_invariant", "all_gather_invariant"}
_LOOPS = {"scan", "while", "cond"}


class Forward:
    """A function traced once. Calling it evaluates what was traced.

    Attributes:
        shapes: its outputs, as `jax.ShapeDtypeStruct`s.
    """

    def __init__(self, function: Callable, *args: PyTree):
        self._closed, self.shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        self._leaves_per_arg = [len(jax.tree.leaves(arg)) for arg in args]

    def __call__(self, *args: PyTree) -> PyTree:
        outputs = core.jaxpr_as_fun(self._closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(self.shapes), outputs)

    def same_as_input(self, arg: int) -> dict[int, int]:
        """The flat outputs that are a leaf of argument `arg`: output to leaf."""
        leaf = {id(var): i for i, var in enumerate(self._inputs(arg))}
        outputs = enumerate(self._closed.jaxpr.outvars)
        return {i: leaf[id(var)] for i, var in outputs if id(var) in leaf}

    def only(self, wanted: PyTree) -> "Pruned":
        """The function without what its other outputs need.

        Args:
            wanted: the outputs' tree with booleans for leaves.
        """
        return Pruned(self._closed, jax.tree.leaves(wanted), self._leaves_per_arg)

    def data_flow(self, differs: dict[int, list[frozenset]], data: int) -> PyTree:
        """Follows what differs between devices from the inputs to the outputs.

        Args:
            differs: for an argument, by index, the mesh axes over which each of its
                leaves differs; nothing differs in the other arguments.
            data: the index of the argument that holds the data.

        Returns:
            The outputs' tree with pairs for leaves: the axes over which it may differ,
            and whether it was made from the data.
        """
        flow = {}
        for arg in range(len(self._leaves_per_arg)):
            inputs = self._inputs(arg)
            axes = differs.get(arg, [frozenset()] * len(inputs))
            for var, over in zip(inputs, axes, strict=True):
                flow[var] = (over, arg == data)
        outputs = _follow(self._closed.jaxpr, flow)
        return jax.tree.unflatten(jax.tree.structure(self.shapes), outputs)

    def _inputs(self, arg):
        start = sum(self._leaves_per_arg[:arg])
        return self._closed.jaxpr.invars[start : start + self._leaves_per_arg[arg]]


class Pruned:
    """Part of a traced function.

    Attributes:
        needs: for each argument, whether any of its leaves is needed.
    """

    def __init__(self, closed, wanted: list[bool], leaves_per_arg: list[int]):
        jaxpr, self._used = partial_eval.dce_jaxpr(closed.jaxpr, wanted)
        self._closed = core.ClosedJaxpr(jaxpr, closed.consts)
        used = iter(self._used)
        self.needs = [any(list(itertools.islice(used, n))) for n in leaves_per_arg]

    def __call__(self, *args: PyTree) -> list[jax.Array]:
        """The wanted outputs, as a flat list."""
        leaves = itertools.compress(jax.tree.leaves(args), self._used)
        return core.jaxpr_as_fun(self._closed)(*leaves)


def _follow(jaxpr: Any, flow: dict) -> list[tuple[frozenset[str], bool]]:
    """What `data_flow` says, for the outputs of one jaxpr."""

    def of(atom):
        return flow.get(atom, _NOTHING) if isinstance(atom, core.Var) else _NOTHING

    for equation in jaxpr.eqns:
        inputs = [of(atom) for atom in equation.invars]
        outputs = _follow_call(equation, inputs)
        if outputs is None:
            outputs = [_follow_primitive(equation, inputs)] * len(equation.outvars)
        flow.update(zip(equation.outvars, outputs, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


_NOTHING = (frozenset(), False)


def _follow_primitive(equation, inputs):
    axes = frozenset().union(*(differs for differs, _ in inputs))
    from_data = any(is_data for _, is_data in inputs)
    name, params = equation.primitive.name, equation.params
    if name == "axis_index":
        axes |= {params["axis_name"]}
    if name in _AGREEING and params.get("axis_index_groups") is None:
        over = params.get("axes", params.get("axis_name", ()))
        axes -= frozenset(over if isinstance(over, tuple) else (over,))
    return axes, from_data


def _follow_call(equation, inputs):
    """Into functions that are called once with the equation's own inputs."""
    if equation.primitive.name in _LOOPS:
        return None
    inner = [p for p in equation.params.values() if hasattr(p, "eqns")]
    if len(inner) != 1:
        return None
    jaxpr = getattr(inner[0], "jaxpr", inner[0])
    arity = (len(jaxpr.invars), len(jaxpr.outvars))
    if arity != (len(equation.invars), len(equation.outvars)):
        return None
    return _follow(jaxpr, dict(zip(jaxpr.invars, inputs, strict=True)))
