"""How long does a step take to compile, by the number of micro-batches?

    python benchmarks/compile_time.py      # CPU, about a minute

jaxga and a scan written by hand are one loop, however many micro-batches there are; a
loop in Python is as many copies of the model as it has steps. What is compiled is loss
and gradient of a batch, traced and compiled anew every time, and compared with that of
the full batch.
"""

import argparse
import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import markdown
from contenders import (
    Loss,
    divide,
    full_batch,
    hand_written_scan,
    jaxga_cycle,
)
from harness import check_equal, full_precision, options, parse_options, publish
from transformer import SIZES, make_batch, make_params

ACCUM_STEPS = (1, 4, 16, 64)
SIZE = SIZES["tiny"]
UNROLLED = "loop in Python"


def python_loop(accum_steps: int) -> Callable:
    """A loop that tracing unrolls, as it is written for PyTorch."""
    grad_fn = jax.value_and_grad(Loss().sum_and_weight, has_aux=True)

    def gradient(params, batch):
        sums = None
        for i in range(accum_steps):
            microbatch = jax.tree.map(lambda leaf, i=i: leaf[i::accum_steps], batch)
            found = grad_fn(params, microbatch)
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        return divide(sums)

    return gradient


CONTENDERS = {
    "jaxga.value_and_grad": jaxga_cycle,
    "hand-written scan": hand_written_scan,
    UNROLLED: python_loop,
}


def measure(
    accum_steps: list[int], unrolled_up_to: int, rounds: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """By contender and number of micro-batches: seconds, and size of the program."""
    params, found = make_params(SIZE, scanned=True), {name: {} for name in CONTENDERS}
    # Whatever is compiled first in a process takes longer.
    compile_once(full_batch(), params, make_batch(SIZE, SIZE.microbatch_size))
    for steps in accum_steps:
        batch = make_batch(SIZE, steps * SIZE.microbatch_size)
        _, expected = jax.jit(full_batch())(params, batch)
        entrants = {
            name: make(steps)
            for name, make in CONTENDERS.items()
            if name != UNROLLED or steps <= unrolled_up_to
        }
        known = {name: [] for name in entrants}
        for _ in range(rounds):
            for name, gradient in entrants.items():
                compiled, seconds = compile_once(gradient, params, batch)
                check_equal(name, compiled(params, batch)[1], expected)
                known[name].append(seconds)
        for name in entrants:
            found[name][str(steps)] = medians(known[name])
    return found


def compile_once(gradient, params, batch) -> tuple[Any, dict[str, float]]:
    jax.clear_caches()  # what was traced before would not be traced again
    start = time.perf_counter()
    lowered = jax.jit(gradient).lower(params, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return compiled, {
        "trace_seconds": traced - start,
        "compile_seconds": end - traced,
        "total_seconds": end - start,
        "instructions": len(_INSTRUCTION.findall(compiled.as_text())),
    }


_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%\S+ = ", re.M)


def medians(found):
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def table(result: Mapping[str, Any]) -> str:
    """A row for each contender, a column for each number of micro-batches."""
    counts = list(result["contenders"]["jaxga.value_and_grad"])
    seconds, sizes = (
        markdown.table(
            [
                ("contender", *counts),
                *(
                    (name, *(show(found.get(n)) for n in counts))
                    for name, found in result["contenders"].items()
                ),
            ]
        )
        for show in (_seconds, _instructions)
    )
    return markdown.join(
        markdown.setting(result["environment"]),
        f"Seconds to trace and compile, by number of micro-batches; "
        f"{result['layers']} layers, scanned; median of {result['rounds']} rounds.",
        seconds,
        "Instructions in the compiled program:",
        sizes,
    )


def _seconds(found):
    return f"{found['total_seconds']:.2f}" if found else ""


def _instructions(found):
    return f"{found['instructions']:,.0f}" if found else ""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # What an earlier run has compiled and kept is not to be found again.
    jax.config.update("jax_enable_compilation_cache", False)
    with full_precision():
        contenders = measure(args.accum_steps, args.unrolled_up_to, args.rounds)
    found = {**dataclasses.asdict(SIZE), "rounds": args.rounds}
    found |= {"contenders": contenders}
    publish("compile_time", __doc__, found, table, args.output)


def parse(argv) -> argparse.Namespace:
    parser = options(__doc__, rounds=3)
    add = parser.add_argument
    add("--accum-steps", nargs="+", type=int, default=list(ACCUM_STEPS))
    help = "micro-batches up to which the loop in Python is compiled"
    add("--unrolled-up-to", type=int, default=16, help=f"{help}; default: %(default)s")
    return parse_options(parser, argv, "accum_steps", "unrolled_up_to")


if __name__ == "__main__":
    main()
