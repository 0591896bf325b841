"""What does a cycle cost, in memory and time, beside the alternatives?

    python benchmarks/cycle.py      # CPU, about two minutes

Every contender does the same whole step: the gradient of a batch, and one AdamW update
of a donated state. "full batch" computes the batch at once, at the memory that one
wants to save. "one micro-batch" is a step on a micro-batch only: the memory without
accumulation. "update alone" is given a gradient. The others cut the batch into
micro-batches. All gradients are compared before anything is timed.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from contenders import FLOOR, FULL, UPDATE, contenders, full_batch, plain, update_alone
from harness import (
    check_equal,
    compile_step,
    environment,
    ratios,
    save,
    time_in_turns,
    tree_bytes,
)
from tables import cycle_table
from transformer import SIZES, Size, make_batch, make_params


def keep_gradient() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the last gradient."""

    def zeros(params):
        return jax.tree.map(jnp.zeros_like, params)

    return optax.GradientTransformation(
        zeros, lambda grads, state, params=None: (zeros(grads), grads)
    )


def check_gradients(entrants, params, batch) -> dict[str, float]:
    """The distance of every gradient from the full batch's, in steps as they are timed.

    Raises:
        ValueError: a contender computes another gradient.
    """
    tx = keep_gradient()

    def gradient(entrant):
        state = entrant.make_state(copy(params), tx)
        # A GPU's default rounds factors to 11 bits: another cut is another rounding.
        with jax.default_matmul_precision("highest"):
            state, *_ = jax.jit(entrant.make_step(tx))(state, batch)
        return jax.device_get(entrant.read_opt_state(state))

    expected = gradient(entrants[FULL])
    return {
        name: check_equal(name, gradient(entrant), expected)
        for name, entrant in entrants.items()
        if name != FULL
    }


def measure(size: Size, *, scanned: bool, accum_steps: int, rounds: int) -> dict:
    """Memory and time of all contenders on one model."""
    rows = accum_steps * size.microbatch_size
    params = make_params(size, scanned=scanned)
    batch = make_batch(size, rows)
    entrants = contenders(accum_steps, size.microbatch_size)
    errors = check_gradients(entrants, params, batch)

    inputs = dict.fromkeys(entrants, batch)
    inputs[FLOOR] = make_batch(size, size.microbatch_size)
    inputs[UPDATE] = jax.tree.map(jnp.ones_like, params)
    entrants |= {FLOOR: plain(full_batch()), UPDATE: update_alone()}
    runs, known = {}, {}
    # What is short is run as often as a cycle does: the same noise, then, for all.
    repeats = {name: 1 if inputs[name] is batch else accum_steps for name in entrants}
    for name, entrant in entrants.items():
        runs[name], known[name] = prepare(entrant, params, inputs[name], repeats[name])
    seconds = time_in_turns(runs, rounds, repeats)
    parts = sum_of_parts(seconds, accum_steps)
    return {
        "model": "scanned" if scanned else "unrolled",
        **dataclasses.asdict(size),
        "accum_steps": accum_steps,
        "rows": rows,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "gradient_bytes": tree_bytes(params),
        "rounds": rounds,
        "contenders": {
            name: known[name]
            | {
                "gradient_error": errors.get(name),
                "temp_gradients": known[name]["temp_bytes"] / tree_bytes(params),
                "median_seconds": statistics.median(seconds[name]),
                "time_to_full_batch": ratios(seconds[name], seconds[FULL]),
                "time_to_parts": ratios(seconds[name], parts)
                if inputs[name] is batch
                else None,
            }
            for name in entrants
        },
    }


def prepare(entrant, params, data, repeats) -> tuple[Callable, dict]:
    """A step compiled and given a state of its own; each call is the next `repeats`."""
    tx = optax.adamw(1e-4)
    state = entrant.make_state(copy(params), tx)
    step, known = compile_step(entrant.make_step(tx), state, data)

    def run():
        nonlocal state
        for _ in range(repeats):
            state, other = step(state, data)
        return state, other

    return run, known


def sum_of_parts(seconds, accum_steps) -> list[float]:
    """In every round, what micro-batches and an update must take: no loop, no sums."""
    pairs = zip(seconds[FLOOR], seconds[UPDATE], strict=True)
    return [accum_steps * (step - update) + update for step, update in pairs]


def copy(tree):
    """Steps donate their state: each needs one of its own."""
    return jax.tree.map(jnp.copy, tree)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    size = dataclasses.replace(SIZES[args.size], **sizes_given(args))
    models = [
        measure(
            size,
            scanned=model == "scanned",
            accum_steps=args.accum_steps,
            rounds=args.rounds,
        )
        for model in args.models
    ]
    result = {
        "question": __doc__.splitlines()[0],
        "environment": environment(),
        "models": models,
    }
    path = save("cycle", result, args.output)
    print(cycle_table(json.loads(path.read_text())))
    print(f"\nwritten to {path}")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "small" if jax.default_backend() == "cpu" else "large"
    add = parser.add_argument
    add("--size", choices=SIZES, default=default, help="default here: %(default)s")
    add("--models", nargs="+", choices=_MODELS, default=_MODELS)
    add("--accum-steps", type=int, default=8)
    add("--rounds", type=int, default=15, help="timed rounds, after one to warm up")
    add("--output", type=Path, help="the JSON file to write")
    for field in dataclasses.fields(Size):
        add(f"--{field.name.replace('_', '-')}", type=int, help="instead of --size's")
    return parser.parse_args(argv)


_MODELS = ("scanned", "unrolled")


def sizes_given(args):
    given = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Size)
    }
    return {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    main()
