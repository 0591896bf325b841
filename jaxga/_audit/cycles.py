"""The accumulated gradient that is audited: jaxga's own cycle, or another trainer's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from .._checks import PyTree
from .._value_and_grad import value_and_grad
from .problem import Problem

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the cycles under audit are made with."""

    accum_dtype: Any
    model_state_merge: str | Mapping[str, str]
    per_example_keys: bool


@dataclasses.dataclass(frozen=True)
class Found:
    """What a cycle found, on the host in float64.

    Attributes:
        grads: the leaves of the gradient.
        weights: the weight of each term.
        state: the floating-point leaves of the new model state, by path.
    """

    grads: list[np.ndarray]
    weights: dict[str, float]
    state: dict[str, np.ndarray]


def run_cycle(
    problem: Problem, settings: Settings, accum_steps: int, num_devices: int
) -> Found:
    """One cycle over the whole batch."""
    name = (repr(settings), accum_steps, num_devices)
    if name not in problem.cycles:
        problem.cycles[name] = _make(problem, settings, accum_steps, num_devices)
    params, batch, state = problem.on_host()
    output, grads = problem.cycles[name](
        batch, params, problem.arrays, state, problem.key
    )
    weights = {name: float(w) for name, w in output.weights.items()}
    new_state = problem.floats_of_state(output.model_state)
    return Found(on_host(grads), weights, new_state)


def _make(problem, settings, accum_steps, num_devices):
    cycle = value_and_grad(
        problem.loss_fn,
        accum_steps=accum_steps,
        axis_name=AXIS if num_devices > 1 else None,
        **vars(settings),
    )

    def run(batch, params, arrays, model_state, key):
        args = problem.args_with(arrays)
        return cycle(params, batch, *args, model_state=model_state, key=key)

    if num_devices == 1:
        return jax.jit(run)
    mesh = jax.make_mesh(
        (num_devices,),
        (AXIS,),
        (jax.sharding.AxisType.Auto,),
        devices=jax.local_devices()[:num_devices],
    )
    specs = (P(AXIS), P(), P(), P(), P())
    # As in jaxga's own steps.
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
    )
    return jax.jit(mapped)


def on_host(tree: PyTree) -> list[np.ndarray]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [
        x.astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in leaves
    ]
