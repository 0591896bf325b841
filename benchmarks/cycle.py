"""What does a cycle cost, in memory and time, beside the alternatives?

    python benchmarks/cycle.py      # CPU, about two minutes
    python benchmarks/cycle.py --accum-steps 1 2 4 8 16 32 64          # CPU, seven
    python benchmarks/cycle.py --microbatch-size 1 2 4 8 16 32         # CPU, six

Every contender does the same whole cycle: the gradient of a batch, and one AdamW update
of a donated state. "full batch" computes the batch at once, at the memory that one
wants to save. The others cut it into micro-batches; `optax.MultiSteps` and
`jaxga.accumulate` are called once for each. "plain step" is a step on one micro-batch:
the memory without accumulation. What a cycle is made of is timed by itself: "gradient
of a micro-batch" is a forward and backward pass, "update alone" is given a gradient.

All gradients are compared before anything is timed: on rows of unequal length, where a
mean of means is not the mean, and on rows of one length, where all must agree. What is
timed runs on the latter.
"""

import dataclasses
import statistics
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import markdown
import optax
from contenders import (
    FULL,
    GRADIENT,
    MEAN_OF_MEANS,
    PLAIN,
    UPDATE,
    Loss,
    contenders,
    full_batch,
    gradient_alone,
    in_parts,
    keep_gradient,
    plain,
    update_alone,
)
from harness import (
    add_size,
    check_equal,
    compile_step,
    distance,
    full_precision,
    options,
    parse_options,
    publish,
    ratios,
    time_in_turns,
    tree_bytes,
)
from tables import cycle_table
from transformer import SIZES, Size, make_batch, make_params

# Numbers of micro-batches, and of their rows, of which results are kept: the default,
# and two sweeps.
_STEPS, _ROWS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32)
_KEPT = {((8,), ()), (_STEPS, ()), ((8,), _ROWS)}
_MODELS = ("scanned", "unrolled")
_ERRORS = ("gradient_error", "even_gradient_error")
# Of a sweep over accum_steps or rows, which has half the layers for the time it takes.
SWEPT = (
    "jaxga.make_train_step",
    "hand-written scan",
    "optax.microbatch",
    "optax.MultiSteps",
)


def check_gradients(entrants, params, batch, *, even=None, parts=1) -> dict[str, dict]:
    """How far every gradient is from the full batch's, in cycles as they are timed.

    Args:
        entrants: the contenders by name. Without the full batch among them, which may
            not fit, its gradient is summed from `parts` of it.
        params: the parameters.
        batch: rows of unequal length.
        even: rows of one length. Without it nobody may take a mean of means.
        parts: as above.

    Returns:
        By name `gradient_error`, and with `even` also `even_gradient_error`.

    Raises:
        ValueError: a contender computes another gradient than it should.
    """
    batches = {"gradient_error": batch}
    if even is not None:
        batches["even_gradient_error"] = even
    if FULL in entrants:
        expected = gradients_of(entrants[FULL], params, batches)
    else:
        expected = {k: in_parts(Loss(), params, b, parts) for k, b in batches.items()}
    errors = {}
    for name, entrant in entrants.items():
        if name == FULL:
            continue
        actual = gradients_of(entrant, params, batches)
        inexact = even is not None and name in MEAN_OF_MEANS
        errors[name] = {
            key: distance(actual[key], expected[key])
            if inexact and key == "gradient_error"
            else check_equal(name, actual[key], expected[key])
            for key in batches
        }
    return errors


def gradients_of(entrant, params, batches) -> dict:
    """The gradients with which a contender's update is made, for each batch."""
    tx = keep_gradient()
    step = jax.jit(entrant.make_step(tx))
    found = {}
    for key, batch in batches.items():
        state = entrant.make_state(copy(params), tx)
        with full_precision():
            for data in entrant.data(batch):
                state, *_ = step(state, data)
        found[key] = jax.device_get(entrant.read_opt_state(state))
    return found


def even_rows(batch):
    """The batch with rows of one length."""
    length = batch["mask"].shape[1]
    mask = jnp.broadcast_to(jnp.arange(length) < 3 * length // 4, batch["mask"].shape)
    return batch | {"mask": mask}


def measure(
    size: Size,
    *,
    scanned: bool,
    accum_steps: int,
    rounds: int,
    names: Collection[str] | None = None,
) -> dict:
    """Memory and time of all contenders, or of those named, on one model."""
    params = make_params(size, scanned=scanned)
    batch = make_batch(size, accum_steps * size.microbatch_size)
    even = even_rows(batch)
    entrants = contenders(accum_steps, size.microbatch_size)
    names = set(entrants if names is None else names)
    entrants = {name: entrants[name] for name in entrants if name in names}
    errors = check_gradients(entrants, params, batch, even=even, parts=accum_steps)

    inputs = {name: entrant.data(even) for name, entrant in entrants.items()}
    inputs[PLAIN] = inputs[GRADIENT] = [
        even_rows(make_batch(size, size.microbatch_size))
    ]
    inputs[UPDATE] = [jax.tree.map(jnp.ones_like, params)]
    entrants |= {
        PLAIN: plain(full_batch()),
        GRADIENT: gradient_alone(),
        UPDATE: update_alone(),
    }
    runs, found = {}, {}
    # What is short is run as often as a cycle does: the same noise, then, for all.
    repeats = {name: 1 if name in names else accum_steps for name in entrants}
    for name, entrant in entrants.items():
        runs[name], found[name] = prepare(entrant, params, inputs[name], repeats[name])
        found[name] |= errors.get(name, dict.fromkeys(_ERRORS))
    seconds = time_in_turns(runs, rounds, repeats)
    return {
        "model": "scanned" if scanned else "unrolled",
        **dataclasses.asdict(size),
        "accum_steps": accum_steps,
        "rows": accum_steps * size.microbatch_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "gradient_bytes": tree_bytes(params),
        "rounds": rounds,
        "contenders": with_times(found, seconds, names, accum_steps),
    }


def with_times(found, seconds, cycles, accum_steps) -> dict:
    """What is known of each contender, and its times; `cycles` are whole cycles."""
    parts = sum_of_parts(seconds, accum_steps)
    full = seconds.get(FULL)
    return {
        name: known
        | {
            "median_seconds": statistics.median(seconds[name]),
            "time_to_full_batch": full and ratios(seconds[name], full),
            "time_to_parts": ratios(seconds[name], parts) if name in cycles else None,
        }
        for name, known in found.items()
    }


def prepare(entrant, params, data, repeats) -> tuple[Callable, dict]:
    """A step compiled and given a state of its own; each call is the next `repeats`."""
    tx = optax.adamw(1e-4)
    state = entrant.make_state(copy(params), tx)
    step, known = compile_step(entrant.make_step(tx), state, data[0])
    gradient = tree_bytes(params)
    for part in ("temp", "total"):
        known[f"{part}_gradients"] = known[f"{part}_bytes"] / gradient

    def run():
        nonlocal state
        for _ in range(repeats):
            for each in data:
                state, other = step(state, each)
        return state, other

    return run, known


def sum_of_parts(seconds, accum_steps) -> list[float]:
    """In every round, what gradients and an update take: no loop, no sums."""
    pairs = zip(seconds[GRADIENT], seconds[UPDATE], strict=True)
    return [accum_steps * gradient + update for gradient, update in pairs]


def sweep_table(result) -> str:
    """The result of a sweep as Markdown: time / parts of each contender."""
    models = result["models"]
    names = [n for n, c in models[0]["contenders"].items() if c["time_to_parts"]]
    parts = [markdown.setting(result["environment"])]
    for kind in dict.fromkeys(model["model"] for model in models):
        rows = [_sweep_row(m, names) for m in models if m["model"] == kind]
        size = next(m for m in models if m["model"] == kind)
        parts.append(
            f"Layers {kind}: {size['layers']} of width {size['width']}, "
            f"{size['parameters'] / 1e6:.1f} M parameters; {size['rounds']} rounds. "
            "Time / parts: median (least to greatest)."
        )
        header = ("micro-batches", "tokens in each", "gradient of one", *names)
        parts.append(markdown.table([header, *rows]))
    return markdown.join(parts)


def _sweep_row(model, names):
    def cell(name):
        ratio = model["contenders"][name]["time_to_parts"]
        return f"{ratio['median']:.3f} ({markdown.spread(ratio)})"

    tokens = model["microbatch_size"] * model["length"]
    seconds = model["contenders"][GRADIENT]["median_seconds"]
    first = (str(model["accum_steps"]), f"{tokens:,}", f"{1e3 * seconds:.3g} ms")
    return *first, *map(cell, names)


def copy(tree):
    """Steps donate their state: each needs one of its own."""
    return jax.tree.map(jnp.copy, tree)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    size, given = SIZES[args.size], sizes_given(args)
    given_rows = given.pop("microbatch_size", [size.microbatch_size])
    sweep = sweep_of(args.accum_steps, given_rows)
    if sweep:
        given.setdefault("layers", size.layers // 2)
    size = dataclasses.replace(size, **given)
    names = args.contenders or (SWEPT if sweep else None)
    models = [
        measure(
            dataclasses.replace(size, microbatch_size=rows),
            scanned=model == "scanned",
            accum_steps=accum_steps,
            rounds=args.rounds or (8 if sweep else 15),
            names=names,
        )
        for model in args.models
        for rows in given_rows
        for accum_steps in args.accum_steps
    ]
    if sweep or FULL not in models[0]["contenders"]:
        name, table = sweep or "cycle_sweep", sweep_table
    else:
        name, table = "cycle", cycle_table
    publish(name, __doc__, {"models": models}, table, args.output)


def sweep_of(accum_steps, rows) -> str | None:
    """The name of a sweep's results; None if no size has several values."""
    if len(rows) > 1:
        return "cycle_tokens"
    return "cycle_sweep" if len(accum_steps) > 1 else None


def parse(argv):
    parser = options(__doc__)
    add_size(parser, SIZES)
    add = parser.add_argument
    add("--models", nargs="+", choices=_MODELS, default=_MODELS)
    add("--accum-steps", type=int, nargs="+", default=[8], help="several: a sweep")
    names = list(contenders(1, 1))
    add("--contenders", nargs="+", choices=names, metavar="NAME", help=str(names))
    add("--rounds", type=int, help="timed rounds, after one to warm up")
    for field in dataclasses.fields(Size):
        several = {"nargs": "+"} if field.name == "microbatch_size" else {}
        option = f"--{field.name.replace('_', '-')}"
        add(option, type=int, help="instead of --size's", **several)
    partial = ("size", "models", "contenders", "layers", "width", "length", "vocab")
    args = parse_options(parser, argv, *partial)
    sizes = tuple(args.accum_steps), tuple(args.microbatch_size or ())
    if args.output is None and sizes not in _KEPT:
        parser.error(
            "--output is needed: the kept results are those of the default sizes, of "
            f"--accum-steps {_listed(_STEPS)}, and of --microbatch-size "
            f"{_listed(_ROWS)}"
        )
    return args


def _listed(numbers):
    return " ".join(map(str, numbers))


def sizes_given(args):
    given = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Size)
    }
    return {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    main()
