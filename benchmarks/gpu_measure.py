"""How `gpu_questions.py` measures cycles of the GPT, on a GPU or compiled for one.

Every program is compiled once; its first cycle, from a fresh state, is compared before
its times are taken.
"""

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping
from typing import Any

import gpt
import jax
import jax.numpy as jnp
import optax
from contenders import (
    GRADIENT,
    PLAIN,
    UPDATE,
    Contender,
    Loss,
    first_gradient,
    full_batch,
    gradient_alone,
    in_parts,
    plain,
    update_alone,
)
from cycle import even_rows, sum_of_parts
from harness import (
    PyTree,
    check_equal,
    distance_on_device,
    memory_of,
    ratios,
    time_in_turns,
)
from jax.sharding import SingleDeviceSharding

# Of the gradient, to that in float32. A micro-batch left out of eight is a third.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-1}


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model, and the cycle that all contenders compute.

    Attributes:
        size: shapes; `microbatch_size` rows are a micro-batch.
        accum_steps: micro-batches in a cycle.
        scanned: whether layers are stacked and scanned.
        losses: how the model computes.
    """

    size: gpt.Size
    accum_steps: int
    scanned: bool
    losses: gpt.TokenLosses

    def params(self) -> PyTree:
        return gpt.make_params(self.size, scanned=self.scanned)

    def batch(self, microbatches: int) -> PyTree:
        """Rows of one length: all contenders then compute the same."""
        return even_rows(
            gpt.make_batch(self.size, microbatches * self.size.microbatch_size)
        )

    def float32_gradient(self, params: PyTree) -> PyTree:
        """Of the whole cycle, row by row."""
        batch = self.batch(self.accum_steps)
        loss = Loss(gpt.TokenLosses(remat=self.losses.remat))
        return in_parts(loss, params, batch, len(batch["mask"]))

    def parts(self) -> dict[str, Contender]:
        """What a cycle consists of: its ideal is made of their times."""
        return {GRADIENT: gradient_alone(self.loss), UPDATE: update_alone()}

    @property
    def loss(self) -> Loss:
        return Loss(self.losses)

    def describe(self) -> dict[str, Any]:
        params = jax.eval_shape(self.params)
        return {
            **dataclasses.asdict(self.size),
            "model": "scanned" if self.scanned else "unrolled",
            "losses": dataclasses.asdict(self.losses),
            "accum_steps": self.accum_steps,
            "tokens": self.size.microbatch_size * self.size.length,
            "parameters": gpt.count(params),
            "gradient_bytes": 4 * gpt.count(params),
        }


def measure(
    setting: Setting,
    entrants: Mapping[str, Contender],
    rounds: int,
    *,
    inexact: Collection[str] = (),
    compiler_options: Mapping[str, dict] | None = None,
    device: jax.Device | None = None,
) -> dict[str, Any]:
    """Memory, errors and times of whole cycles.

    Args:
        setting: the model and the cycle.
        entrants: the contenders by name.
        rounds: timed rounds.
        inexact: those whose gradient is compared and may differ.
        compiler_options: by name, for a contender that is compiled in another way.
        device: one that need not be there: programs are compiled for it, and nothing
            runs.
    """
    options = compiler_options or {}
    parts, runs = setting.parts(), {}
    memory = {PLAIN: Program(setting, PLAIN, plain(full_batch(setting.loss)))}
    for name, entrant in (parts | dict(entrants)).items():
        runs[name] = memory[name] = Program(setting, name, entrant, options.get(name))
    found = {name: program.compile(device) for name, program in memory.items()}
    is_here = device is None
    if is_here:
        add_errors(found, setting, runs, inexact)
        add_times(found, runs, rounds, setting.accum_steps)
    described = setting.describe() | {"rounds": rounds, "compiled_only": not is_here}
    return described | {"contenders": found}


def add_errors(found, setting, runs, inexact) -> None:
    """How far the gradient of each first cycle is from that in float32."""
    params = setting.params()
    expected = setting.float32_gradient(params)
    tolerance = TOLERANCES[setting.losses.dtype]
    for name, program in runs.items():
        program.start(params)
        if name in (GRADIENT, UPDATE):
            continue
        jax.block_until_ready(program.cycle())
        bound = math.inf if name in inexact else tolerance
        found[name]["gradient_error"] = check_equal(
            name, program.last_gradient(), expected, bound, distance=distance_on_device
        )


def add_times(found, runs, rounds, accum_steps) -> None:
    repeats = {n: accum_steps if n in (GRADIENT, UPDATE) else 1 for n in runs}
    calls = {n: (lambda n=n: runs[n].cycles(repeats[n])) for n in runs}
    seconds = time_in_turns(calls, rounds, repeats)
    parts = sum_of_parts(seconds, accum_steps)
    for name, times in seconds.items():
        found[name]["median_seconds"] = statistics.median(times)
        if name not in (GRADIENT, UPDATE):
            found[name]["time_to_parts"] = ratios(times, parts)


class Program:
    """A contender's step, compiled, with a state of its own."""

    def __init__(self, setting, name, entrant, options=None):
        self._entrant, self._setting, self._options = entrant, setting, options
        self._name, self._tx = name, optax.adamw(1e-4)

    def compile(self, device: jax.Device | None = None) -> dict[str, float]:
        """Compiles for a device, there or not; its memory."""
        data, state = jax.eval_shape(lambda: self._make(self._setting.params()))
        if device is not None:
            data, state = _placed((data, state), SingleDeviceSharding(device))
        step = self._entrant.make_step(self._tx)
        jitted = jax.jit(step, donate_argnums=0, compiler_options=self._options)
        self._step = jitted.lower(state, data[0]).compile()
        memory = memory_of(self._step)
        gradient = 4 * gpt.count(jax.eval_shape(self._setting.params))
        return {
            "temp_bytes": memory["temp_bytes"],
            "temp_gradients": memory["temp_bytes"] / gradient,
            "predicted_peak_bytes": memory["total_bytes"],
        }

    def start(self, params: PyTree) -> None:
        """Gives it data and a state."""
        self._data, self._state = self._make(params)

    def _make(self, params):
        state = self._entrant.make_state(jax.tree.map(jnp.copy, params), self._tx)
        if self._name == UPDATE:
            return [jax.tree.map(jnp.ones_like, params)], state
        is_one = self._name in (PLAIN, GRADIENT)
        rows = self._setting.batch(1 if is_one else self._setting.accum_steps)
        return self._entrant.data(rows), state

    def cycle(self):
        for each in self._data:
            self._state, other = self._step(self._state, each)
        return other

    def cycles(self, number: int):
        for _ in range(number):
            other = self.cycle()
        return self._state, other

    def last_gradient(self) -> PyTree:
        """The gradient of the very first update."""
        return first_gradient(self._entrant.read_opt_state(self._state))


def _placed(tree, sharding):
    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)
