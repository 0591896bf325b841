"""The questions of `gpu.py`: each yields what it finds, one setting after the other."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpt
import jax
import jax.numpy as jnp
import jaxga
from contenders import FULL, Contender, contenders, maxtext_form, plain
from gpu_measure import Program, Setting, measure

JAXGA, BY_HAND, MICROBATCH = (
    "jaxga.make_train_step",
    "hand-written scan",
    "optax.microbatch",
)
_BFLOAT16_SUMS = "MaxText's form, bfloat16 sums"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and at which size a question is asked.

    Attributes:
        on_gpu: whether it is, or is compiled for, a GPU: bfloat16, cuDNN's attention.
        tiny: a model to try the script with.
        rounds: timed rounds.
        device: a GPU that is not there, to compile for.
    """

    on_gpu: bool
    tiny: bool
    rounds: int
    device: jax.Device | None = None

    def setting(
        self, rows: int, accum_steps: int, *, scanned: bool, large=False, **losses
    ) -> Setting:
        name = "tiny" if self.tiny else "1.3b" if large else "124m"
        size = dataclasses.replace(_SIZES[name], microbatch_size=rows)
        computed = gpt.TokenLosses(
            dtype="bfloat16" if self.on_gpu else "float32",
            attention="cudnn" if self.on_gpu else "xla",
            **losses,
        )
        return Setting(size, accum_steps, scanned, computed)

    def measure(self, setting, entrants, **rest):
        return measure(setting, entrants, self.rounds, device=self.device, **rest)


# 1.31 billion parameters.
_SIZES = gpt.SIZES | {"1.3b": gpt.Size(24, 2048, 1024, 50304, microbatch_size=4)}


def cycle(machine: Machine) -> Iterator[dict[str, Any]]:
    """Does a cycle cost its arithmetic alone, by tokens and by micro-batches?"""
    for rows, accum_steps in ((8, 8), (2, 8), (32, 8), (8, 64), (8, 1)):
        setting = machine.setting(rows, accum_steps, scanned=False)
        yield machine.measure(setting, _of(setting, JAXGA))


def peers(machine: Machine) -> Iterator[dict[str, Any]]:
    """What do the alternatives take, in time and memory, with scanned layers?"""
    setting = machine.setting(8, 8, scanned=True, remat=True)
    entrants = contenders(8, 8, setting.loss)
    del entrants[FULL]
    # Eight significant bits in the gradients, and in their sums.
    half = plain(maxtext_form(8, setting.loss, jnp.bfloat16))
    entrants[_BFLOAT16_SUMS] = half
    yield machine.measure(setting, entrants, inexact={_BFLOAT16_SUMS})
    setting = machine.setting(2, 8, scanned=True, remat=True)
    names = (JAXGA, BY_HAND, MICROBATCH, "jaxga.accumulate", "optax.MultiSteps")
    yield machine.measure(setting, _of(setting, *names))


def fusion(machine: Machine) -> Iterator[dict[str, Any]]:
    """Is it worth adding weight gradients inside the matrix product?

    Few tokens, so that the bytes of the accumulator weigh most. A product in float32
    can be added by the product itself; by default bfloat16 leaves it, and XLA uses
    Triton's kernels.
    """
    stock = machine.setting(2, 8, scanned=False)
    exact = machine.setting(2, 8, scanned=False, float32_wgrad=True)
    without_triton = {"xla_gpu_enable_triton_gemm": False} if machine.on_gpu else None
    entrants, options = {}, {}
    for setting, suffix in ((stock, ""), (exact, ", float32 weight gradients")):
        entrants[JAXGA + suffix] = _of(setting, JAXGA)[JAXGA]
        name = f"{JAXGA}, no Triton{suffix}"
        entrants[name] = entrants[JAXGA + suffix]
        options[name] = without_triton
    yield machine.measure(stock, entrants, compiler_options=options)


def large(machine: Machine) -> Iterator[dict[str, Any]]:
    """Are sums carried, or added to in place, at a larger size?

    jaxga adds each layer's gradient in place; a scan carries a second buffer.
    """
    setting = _large(machine)
    yield machine.measure(setting, _of(setting, JAXGA, BY_HAND))


def peaks(machine: Machine) -> Iterator[dict[str, Any]]:
    """Is the predicted peak the real one?"""
    found = _large(machine).describe() | {"rounds": 0, "compiled_only": False}
    found["contenders"] = {
        name: _peak_in_own_process(name, machine)
        for name in (JAXGA, BY_HAND, MICROBATCH)
    }
    yield found


def traced(machine: Machine) -> Iterator[dict[str, Any]]:
    """What does a number of micro-batches cost that is known only when it runs?"""
    setting = machine.setting(2, 8, scanned=True)
    entrants = _of(setting, JAXGA)
    entrants["num_microbatches traced"] = Traced(
        lambda tx: _traced_step(setting, tx),
        jaxga.TrainState.create,
        lambda state: state.opt_state,
        accum_steps=setting.accum_steps,
    )
    yield machine.measure(setting, entrants)


@dataclasses.dataclass(frozen=True)
class Traced(Contender):
    """Given the number of micro-batches, `accum_steps`, beside the batch."""

    accum_steps: int = 1

    def data(self, batch):
        return [(batch, jnp.int32(self.accum_steps))]


QUESTIONS = {
    each.__name__: each for each in (cycle, peers, fusion, large, peaks, traced)
}


def peak(name: str, machine: Machine) -> dict[str, Any]:
    """A step's memory, and the most that this process has held in two cycles of it."""
    setting = _large(machine)
    program = Program(setting, name, _of(setting, name)[name])
    found = program.compile()
    program.start(setting.params())
    before = _peak_so_far()
    jax.block_until_ready(program.cycles(2))
    measured = _peak_so_far()
    # What went before, compiling not the least, may have held more than the step.
    return found | {"measured_peak_bytes": measured if measured > before else None}


def _peak_in_own_process(name, machine):
    """In a process of its own: a peak is that of everything a process has done."""
    script = str(Path(__file__).with_name("gpu.py"))
    command = [sys.executable, script, "--peak", name, "--output", os.devnull]
    command += ["--size", "tiny"] if machine.tiny else []
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def _peak_so_far():
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0)


def _large(machine):
    return machine.setting(4, 4, scanned=True, large=True, remat=True)


def _of(setting, *names):
    rows = setting.size.microbatch_size
    entrants = contenders(setting.accum_steps, rows, setting.loss)
    return {name: entrants[name] for name in names}


def _traced_step(setting, tx):
    accum_steps = setting.accum_steps
    step = jaxga.make_train_step(setting.loss.weighted_sum, tx, accum_steps=accum_steps)
    return lambda state, data: step(state, data[0], num_microbatches=data[1])
