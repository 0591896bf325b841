"""What do the extras of a step cost, in time and in bytes accessed?

    python benchmarks/extras.py      # CPU, about a minute

Each extra is one step of `jaxga.make_train_step` against the same step without it, in
turns in one process: a ratio of 1 is an extra that costs nothing. The step without any
applies whatever gradient comes out, is told the number of micro-batches when it is
compiled, and returns no metrics but its own. All arrive at the same parameters, or
nothing is timed.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import markdown
import numpy as np
import optax
from harness import (
    PyTree,
    add_size,
    check_equal,
    full_precision,
    options,
    parse_options,
    publish,
    ratios,
    time_in_turns,
)
from transformer import SIZES, Size, make_batch, make_params, token_losses

ACCUM_STEPS = 8
NONE, DROPPED = "none", "one key per micro-batch"
KEEP = 0.9


def loss_fn(params, batch):
    return jaxga.WeightedSum.of(token_losses(params, batch), where=batch["mask"])


def loss_with_metrics(params, batch):
    losses, mask = token_losses(params, batch), batch["mask"]
    per_row = jnp.where(mask, losses, 0).sum(1)
    metrics = {
        "confident": jaxga.WeightedSum.of(losses < 1.0, where=mask),
        "rows": jaxga.Sum(jnp.int32(len(mask))),
        "worst_row": jaxga.Max(per_row.max()),
        "best_row": jaxga.Min(per_row.min()),
    }
    return jaxga.LossOutput(jaxga.WeightedSum.of(losses, where=mask), metrics=metrics)


def loss_with_dropout(params, batch, *, key):
    """Drops input tokens, drawn from one key or from a key per row."""
    draw = jax.random.bernoulli
    inputs = batch["inputs"]
    if key.shape:
        kept = jax.vmap(lambda key: draw(key, KEEP, inputs.shape[1:]))(key)
    else:
        kept = draw(key, KEEP, inputs.shape)
    return loss_fn(params, batch | {"inputs": jnp.where(kept, inputs, 0)})


@dataclasses.dataclass(frozen=True)
class Extra:
    """A step, and what it is compared with.

    Attributes:
        loss: its loss function.
        settings: of `jaxga.make_train_step`, beside the number of micro-batches.
        state: of `jaxga.TrainState.create`, made when it is needed.
        call: keyword arguments of every call.
        beside: the name of the step without this extra.
        is_same: whether it arrives where that step does.
    """

    loss: Callable = loss_fn
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state: Callable = dict
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    beside: str = NONE
    is_same: bool = True


def with_key():
    return {"key": jax.random.key(0)}


EXTRAS = {
    NONE: Extra(),
    "four metrics": Extra(loss_with_metrics),
    'nonfinite="skip_cycle"': Extra(settings={"nonfinite": "skip_cycle"}),
    "traced num_microbatches": Extra(
        call={"num_microbatches": np.int32(ACCUM_STEPS)},
    ),
    DROPPED: Extra(loss_with_dropout, state=with_key, is_same=False),
    "per_example_keys": Extra(
        loss_with_dropout,
        {"per_example_keys": True},
        with_key,
        beside=DROPPED,
        is_same=False,
    ),
    "noise scale, of micro-batches": Extra(
        state=lambda: {"noise_scale": jaxga.NoiseScale(per="microbatch")},
    ),
}


def prepare(extra: Extra, params: PyTree, batch: PyTree, tx) -> tuple[Callable, Any]:
    """A function that takes the next step, and the compiled step."""
    copies = jax.tree.map(jnp.copy, params)
    state = jaxga.TrainState.create(copies, tx, **extra.state())
    settings = {"nonfinite": "propagate"} | dict(extra.settings)
    step = jaxga.make_train_step(extra.loss, tx, accum_steps=ACCUM_STEPS, **settings)
    compiled = step.lower(state, batch, **extra.call).compile()

    def run():
        nonlocal state
        state, metrics = compiled(state, batch, **extra.call)
        return state, metrics

    return run, compiled


def check_updates(
    extras: Mapping[str, Extra], params: PyTree, batch: PyTree
) -> dict[str, float | None]:
    """The distance of an update by SGD from that of the step without the extra.

    Raises:
        ValueError: an extra changes the update, or none was made.
    """
    tx = optax.sgd(1.0)

    def update(extra):
        state, _ = prepare(extra, params, batch, tx)[0]()
        return jax.device_get(jax.tree.map(jnp.subtract, params, state.params))

    with full_precision():
        plain = update(extras[NONE])
        return {
            name: check_equal(name, update(extra), plain, 1e-6)
            if extra.is_same
            else None
            for name, extra in extras.items()
            if name != NONE
        }


def measure(extras: Mapping[str, Extra], size: Size, rounds: int) -> dict[str, Any]:
    """Paired ratios of time, and what XLA says of each step."""
    params = make_params(size, scanned=True)
    batch = make_batch(size, ACCUM_STEPS * size.microbatch_size)
    errors = check_updates(extras, params, batch)
    runs, known = {}, {}
    for name, extra in extras.items():
        runs[name], compiled = prepare(extra, params, batch, optax.adamw(1e-4))
        known[name] = {
            "bytes_accessed": (compiled.cost_analysis() or {}).get("bytes accessed"),
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
    seconds = time_in_turns(runs, rounds, dict.fromkeys(runs, 1))
    return {
        **dataclasses.asdict(size),
        "accum_steps": ACCUM_STEPS,
        "rounds": rounds,
        "extras": {
            name: {
                "beside": extra.beside,
                "time": ratios(seconds[name], seconds[extra.beside]),
                "bytes": _over(known, name, extra.beside, "bytes_accessed"),
                "temporaries": _over(known, name, extra.beside, "temp_bytes"),
                "update_error": errors[name],
            }
            for name, extra in extras.items()
            if name != NONE
        },
    }


def _over(known, name, beside, key):
    found, without = known[name][key], known[beside][key]
    return None if found is None else found / without


def table(result: Mapping[str, Any]) -> str:
    """A row for each extra."""
    header = ("extra", "beside a step with", "time", "(least to greatest)")
    header += ("bytes accessed", "temporaries")
    rows = [
        (
            name,
            found["beside"],
            f"{found['time']['median']:.3f}",
            markdown.spread(found["time"]),
            "" if found["bytes"] is None else f"{found['bytes']:.3f}",
            f"{found['temporaries']:.3f}",
        )
        for name, found in result["extras"].items()
    ]
    shapes = (
        f"{result['layers']} layers of width {result['width']}, scanned; "
        f"{result['accum_steps']} micro-batches of {result['microbatch_size']} rows of "
        f"{result['length']} tokens; {result['rounds']} rounds. Each over the step "
        "without it."
    )
    setting = markdown.setting(result["environment"])
    return markdown.join(setting, shapes, markdown.table([header, *rows]))


def chosen(names: Collection[str]) -> dict[str, Extra]:
    """The extras named, and what they are beside."""
    asked = {NONE, *names, *(EXTRAS[name].beside for name in names)}
    return {name: extra for name, extra in EXTRAS.items() if name in asked}


def parse(argv):
    parser = options(__doc__, rounds=15)
    add_size(parser, SIZES)
    names = [name for name in EXTRAS if name != NONE]
    parser.add_argument(
        "--extras", nargs="+", choices=names, default=names, metavar="NAME"
    )
    return parse_options(parser, argv, "size", "extras")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    found = measure(chosen(args.extras), SIZES[args.size], args.rounds)
    publish("extras", __doc__, found, table, args.output)


if __name__ == "__main__":
    main()
