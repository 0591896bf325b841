"""What does a call cost when micro-batches arrive one at a time?

    python benchmarks/streaming.py      # CPU, about a minute

The optimizer's side only: gradients are given, there is no model. A cycle is eight
calls and one AdamW update. The floor is a bare addition per call and AdamW once, in two
jitted functions, told from outside when the cycle ends. Nothing zeroes its sums: it is
right for one cycle, the one that is checked. The others are one jitted function each,
called eight times, which finds that out by itself. All have their parameters and states
donated.

Before anything is timed, parameters and moments after a cycle must equal the floor's.
All calls weigh the same, so that a mean of means, which is what `optax.MultiSteps`
computes, is the mean.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import markdown
import optax
from harness import (
    PyTree,
    add_size,
    check_equal,
    compile_step,
    distance_on_device,
    options,
    parse_options,
    publish,
    ratios,
    time_in_turns,
)
from transformer import Size, make_params

ACCUM_STEPS = 8
FLOOR, STEP, UPDATE = "bare add + AdamW", "jaxga step", "jaxga update"
MULTISTEPS = "optax.MultiSteps"
# Cycles per turn: what is short is run more often, for the same noise in all.
_REPEATS = {FLOOR: 8, STEP: 8, UPDATE: 2, MULTISTEPS: 1}
# Of the model there are only the shapes: length and rows do not matter here.
SIZES = {
    "tiny": Size(layers=2, width=16, length=16, vocab=32, microbatch_size=1),
    "small": Size(layers=8, width=512, length=64, vocab=4096, microbatch_size=1),
    "large": Size(layers=16, width=2048, length=512, vocab=32768, microbatch_size=1),
}


class Floor:
    """An addition per call, and AdamW at the end."""

    def __init__(self, tx, params, grads):
        self.params, self.opt_state = fresh((params, tx.init(params)))
        self.sums = jax.tree.map(jnp.zeros_like, grads)

        def add(sums, grads):
            return jax.tree.map(jnp.add, sums, grads)

        def update(params, opt_state, sums):
            mean = jax.tree.map(lambda total: total * (1 / ACCUM_STEPS), sums)
            return apply(tx, params, opt_state, mean)

        self._add, known = compile_step(add, self.sums, grads)
        self._update, also_known = compile_step(
            update, *(self.params, self.opt_state, self.sums), donate_argnums=(0, 1)
        )
        self.programs = [(self._add, known), (self._update, also_known)]

    def call(self, grads, *, closes):
        self.sums = self._add(self.sums, grads)
        if closes:
            self.params, self.opt_state = self._update(
                self.params, self.opt_state, self.sums
            )
        return self.params, self.opt_state, self.sums


class OneFunction:
    """A function `(params, opt_state, grads) -> (params, opt_state)` for every call."""

    def __init__(self, tx, step, params, grads):
        self.params, self.opt_state = fresh((params, tx.init(params)))
        self._step, known = compile_step(
            step, *(self.params, self.opt_state, grads), donate_argnums=(0, 1)
        )
        self.programs = [(self._step, known)]

    def call(self, grads, *, closes):
        self.params, self.opt_state = self._step(self.params, self.opt_state, grads)
        return self.params, self.opt_state


def contenders(params: PyTree, grads: PyTree) -> dict[str, Floor | OneFunction]:
    """All that are compared, by name, each with a state of its own; the floor first."""
    adamw = optax.adamw(1e-4)
    tx = jaxga.accumulate(adamw, ACCUM_STEPS)
    multisteps = optax.MultiSteps(adamw, ACCUM_STEPS)
    return {
        FLOOR: Floor(adamw, params, grads),
        STEP: OneFunction(tx, tx.step, params, grads),
        UPDATE: OneFunction(tx, updating(tx), params, grads),
        MULTISTEPS: OneFunction(multisteps, updating(multisteps), params, grads),
    }


def updating(tx) -> Callable:
    """A step of `update` and `optax.apply_updates`."""

    def step(params, opt_state, grads):
        return apply(tx, params, opt_state, grads)

    return step


def apply(tx, params, opt_state, grads):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def check_cycle(entrants, gradients) -> dict[str, dict[str, float]]:
    """Distances to the floor's parameters and moments, after the very first cycle.

    The moments are compared besides: AdamW's first update is the same for a gradient
    of any length.

    Raises:
        ValueError: a contender arrives somewhere else.
    """

    def arrive(entrant):
        run_calls(entrant, gradients)
        moments = [optax.tree.get(entrant.opt_state, name) for name in ("mu", "nu")]
        return {"parameters": entrant.params, "moments": moments}

    expected = arrive(entrants[FLOOR])
    errors = {}
    for name, entrant in entrants.items():
        if name != FLOOR:
            got = arrive(entrant)
            errors[name] = {
                f"{part}_error": check_equal(
                    name, got[part], expected[part], 1e-6, distance=distance_on_device
                )
                for part in expected
            }
    return errors


def run_calls(entrant, gradients) -> tuple[float, float]:
    """A cycle: seconds of one of its calls but the last, and of the last."""
    start = time.perf_counter()
    for number in range(ACCUM_STEPS - 1):
        out = entrant.call(gradients[number % len(gradients)], closes=False)
    jax.block_until_ready(out)
    middle = time.perf_counter()
    last = gradients[(ACCUM_STEPS - 1) % len(gradients)]
    jax.block_until_ready(entrant.call(last, closes=True))
    return (middle - start) / (ACCUM_STEPS - 1), time.perf_counter() - middle


def measure(size: Size, rounds: int) -> dict:
    """Time of a cycle of every contender, and what is known of their programs."""
    # Three in turn, so that two trees are told from one and large ones fit.
    params, *gradients = (
        make_params(size, scanned=True, seed=seed) for seed in range(4)
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    number = sum(map(math.prod, shapes))
    entrants = contenders(params, gradients[0])
    del params
    errors = check_cycle(entrants, gradients)

    calls = {name: [] for name in entrants}

    def runner(name):
        def run():
            for _ in range(_REPEATS[name]):
                calls[name].append(run_calls(entrants[name], gradients))

        return run

    runs = {name: runner(name) for name in entrants}
    seconds = time_in_turns(runs, rounds, _REPEATS)
    return {
        "parameters": number,
        "shapes": [list(shape) for shape in shapes],
        "accum_steps": ACCUM_STEPS,
        "rounds": rounds,
        "multisteps_to_step": ratios(seconds[MULTISTEPS], seconds[STEP]),
        "contenders": {
            name: {
                "median_seconds": statistics.median(seconds[name]),
                "time_to_floor": ratios(seconds[name], seconds[FLOOR]),
                # The first round warms up.
                **medians_of_calls(calls[name][_REPEATS[name] :]),
                **known_of(entrant.programs, shapes, number),
                **errors.get(name, dict(parameters_error=None, moments_error=None)),
            }
            for name, entrant in entrants.items()
        },
    }


def medians_of_calls(calls):
    middle, closing = zip(*calls, strict=True)
    return {
        "mid_call_ms": 1e3 * statistics.median(middle),
        "closing_call_ms": 1e3 * statistics.median(closing),
    }


def known_of(programs, shapes, number) -> dict:
    """What XLA says of a contender, before it runs: of its programs together."""
    compiled, known = zip(*programs, strict=True)
    accessed = [(each.cost_analysis() or {}).get("bytes accessed") for each in compiled]
    return {
        "compile_seconds": sum(each["compile_seconds"] for each in known),
        "temp_per_parameter": max(each["temp_bytes"] for each in known) / number,
        "bytes_per_parameter": None if None in accessed else sum(accessed) / number,
        "leaf_copies": sum(count_copies(each.as_text(), shapes) for each in compiled),
    }


def count_copies(text: str, shapes) -> int:
    """Copies of an array with the shape of a leaf in a compiled program."""
    alike = "|".join(",".join(map(str, shape)) for shape in set(shapes))
    return len(re.findall(rf"= f32\[(?:{alike})\]\S* copy\(", text))


def fresh(tree):
    """Donated buffers are gone: each contender needs its own."""
    return jax.tree.map(jnp.copy, tree)


def table(result: Mapping[str, Any]) -> str:
    """A row for each contender."""
    rows = [_row(name, found) for name, found in result["contenders"].items()]
    setting = markdown.setting(result["environment"])
    return markdown.join(setting, _shapes(result), markdown.table([_HEADER, *rows]))


_HEADER = (
    "contender",
    "cycle",
    "cycle / floor",
    "(least to greatest)",
    "mid-cycle call",
    "closing call",
    "bytes / parameter",
    "temporaries / parameter",
    "leaf copies",
    "parameters error",
    "moments error",
)


def _row(name, found):
    floor, accessed = found["time_to_floor"], found["bytes_per_parameter"]
    return (
        name,
        f"{found['median_seconds']:.3g} s",
        f"{floor['median']:.3f}",
        markdown.spread(floor),
        f"{found['mid_call_ms']:.3g} ms",
        f"{found['closing_call_ms']:.3g} ms",
        "" if accessed is None else f"{accessed:.1f}",
        f"{found['temp_per_parameter']:.1f}",
        str(found["leaf_copies"]),
        markdown.error(found["parameters_error"]),
        markdown.error(found["moments_error"]),
    )


def _shapes(result):
    ratio = result["multisteps_to_step"]
    return (
        f"{result['parameters'] / 1e6:.1f} M parameters in {len(result['shapes'])} "
        f"leaves; cycles of {result['accum_steps']} calls; {result['rounds']} rounds; "
        f"optax.MultiSteps / jaxga step: {ratio['median']:.2f} "
        f"({ratio['min']:.2f} to {ratio['max']:.2f})."
    )


def parse(argv):
    parser = options(__doc__, rounds=15)
    add_size(parser, SIZES)
    return parse_options(parser, argv, "size")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    found = measure(SIZES[args.size], args.rounds)
    publish("streaming", __doc__, found, table, args.output)


if __name__ == "__main__":
    main()
