"""What does a loss over the whole batch cost at the memory of a micro-batch?

    python benchmarks/microbatch_map.py      # CPU, about a minute

In-batch negatives (InfoNCE): an encoder maps each row to a few features, and the loss
compares all rows with all. "full batch" differentiates that as it stands. "checkpoint
in lax.map" is what one would write by hand: each micro-batch rematerialised, in order.
"one micro-batch" is the full batch's program on one micro-batch only, which is another
loss: the memory that one would like. Gradients are compared before anything is timed.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import markdown
from harness import (
    PyTree,
    add_size,
    check_equal,
    compile_step,
    full_precision,
    options,
    parse_options,
    publish,
    ratios,
    time_in_turns,
    tree_bytes,
)
from jax import lax


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of the encoder and of a micro-batch.

    Attributes:
        layers: of two matrices each, of `width` by four times that.
        width: features per token.
        length: tokens per row.
        microbatch_size: rows of a micro-batch.
    """

    layers: int
    width: int
    length: int
    microbatch_size: int


SIZES = {
    "tiny": Size(layers=2, width=16, length=8, microbatch_size=4),
    "small": Size(layers=8, width=128, length=32, microbatch_size=8),
    "large": Size(layers=16, width=2048, length=256, microbatch_size=8),
}
FEATURES = 32
FULL, MAP, BY_HAND = "full batch", "jaxga.microbatch_map", "checkpoint in lax.map"
FLOOR = "one micro-batch"


def make_params(size: Size, *, scanned: bool) -> PyTree:
    """Random float32 parameters, layers stacked or in a list."""
    shapes = {
        "wide": (size.layers, size.width, 4 * size.width),
        "narrow": (size.layers, 4 * size.width, size.width),
    }
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = {
        name: jax.random.normal(key, shape) * shape[-2] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    unrolled = [
        {name: leaf[i] for name, leaf in stacked.items()} for i in range(size.layers)
    ]
    out = jax.random.normal(keys[2], (size.width, FEATURES)) * size.width**-0.5
    return {"layers": stacked if scanned else unrolled, "out": out}


def make_batch(size: Size, rows: int) -> jax.Array:
    """Two views of each row, of shape `(rows, 2, length, width)`."""
    row, noise = (
        jax.random.normal(jax.random.key(seed), (rows, views, size.length, size.width))
        for seed, views in ((1, 1), (2, 2))
    )
    return row + 0.5 * noise


def encode(params: PyTree, views: jax.Array) -> jax.Array:
    """Features of unit length, of shape `(rows, 2, FEATURES)`."""
    h = views
    if isinstance(params["layers"], list):
        for layer in params["layers"]:
            h = _layer(h, layer)
    else:
        # Inside a scan nothing can undo the rematerialisation: no barrier is needed.
        layer = jax.checkpoint(_layer, prevent_cse=False)
        h, _ = lax.scan(lambda h, w: (layer(h, w), None), h, params["layers"])
    h = h.mean(axis=2) @ params["out"]
    return h * lax.rsqrt(jnp.sum(h * h, axis=-1, keepdims=True))


def _layer(h, w):
    size = jnp.mean(h * h, axis=-1, keepdims=True)
    return h + jax.nn.gelu(h * lax.rsqrt(size + 1e-6) @ w["wide"]) @ w["narrow"]


def checkpointed(accum_steps: int) -> Callable:
    """What one would write by hand."""

    def run(params, views):
        split = views.reshape(accum_steps, -1, *views.shape[1:])
        one = jax.checkpoint(lambda microbatch: encode(params, microbatch))
        return lax.map(one, split).reshape(len(views), 2, FEATURES)

    return run


def gradient(encode: Callable) -> Callable:
    """Of the mean InfoNCE of all rows."""

    def loss(params, views):
        features = encode(params, views)
        similarity = features[:, 0] @ features[:, 1].T * 10
        return jnp.mean(jax.nn.logsumexp(similarity, axis=1) - jnp.diag(similarity))

    return jax.grad(loss)


def check_gradients(encoders, params, views) -> dict[str, float]:
    """How far the gradients are from the full batch's, in full precision."""
    with full_precision():
        found = {
            name: jax.device_get(jax.jit(gradient(encoders[name]))(params, views))
            for name in (FULL, MAP, BY_HAND)
        }
    expected = found.pop(FULL)
    return {name: check_equal(name, got, expected) for name, got in found.items()}


def measure(size: Size, *, scanned: bool, accum_steps: int, rounds: int) -> dict:
    """Memory and time of all contenders on one encoder."""
    rows = accum_steps * size.microbatch_size
    params, views = make_params(size, scanned=scanned), make_batch(size, rows)
    encoders = {
        FULL: encode,
        MAP: jaxga.microbatch_map(encode, accum_steps=accum_steps),
        BY_HAND: checkpointed(accum_steps),
    }
    inputs = dict.fromkeys(encoders, views)
    encoders[FLOOR], inputs[FLOOR] = encode, views[: size.microbatch_size]
    steps, known = {}, {}
    for name, encoder in encoders.items():
        steps[name], known[name] = compile_step(
            gradient(encoder), params, inputs[name], donate_argnums=()
        )
    errors = check_gradients(encoders, params, views)
    # What is short is run as often as there are micro-batches: the same noise for all.
    repeats = {name: accum_steps if name == FLOOR else 1 for name in steps}

    def run(name):
        for _ in range(repeats[name]):
            found = steps[name](params, inputs[name])
        return found

    runs = {name: lambda name=name: run(name) for name in steps}
    seconds = time_in_turns(runs, rounds, repeats)
    unit = tree_bytes(params)
    return {
        "model": "scanned" if scanned else "unrolled",
        **dataclasses.asdict(size),
        "accum_steps": accum_steps,
        "rows": rows,
        "gradient_bytes": unit,
        "rounds": rounds,
        "contenders": {
            name: known[name]
            | {
                "gradient_error": errors.get(name),
                "temp_and_gradient": 1 + known[name]["temp_bytes"] / unit,
                "median_seconds": statistics.median(seconds[name]),
                "time_to_full_batch": ratios(seconds[name], seconds[FULL]),
            }
            for name in steps
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """A table for each encoder, a row for each contender."""
    header = (
        "contender",
        "temporaries and gradient / gradient",
        "time / full batch",
        "(least to greatest)",
        "gradient error",
        "compile",
    )
    parts = [markdown.setting(result["environment"])]
    for model in result["models"]:
        rows = [_row(name, found) for name, found in model["contenders"].items()]
        parts += [_shapes(model), markdown.table([header, *rows])]
    return markdown.join(*parts)


def _row(name, found):
    ratio = found["time_to_full_batch"]
    return (
        name,
        f"{found['temp_and_gradient']:.2f}",
        f"{ratio['median']:.3f}",
        markdown.spread(ratio),
        markdown.error(found["gradient_error"]),
        f"{found['compile_seconds']:.1f} s",
    )


def _shapes(model):
    seconds = model["contenders"][FULL]["median_seconds"]
    return (
        f"Layers {model['model']}: {model['layers']} of width {model['width']} (a "
        f"gradient of {model['gradient_bytes'] / 2**20:.0f} MiB); "
        f"{model['accum_steps']} micro-batches of {model['microbatch_size']} rows, "
        f"each two views of {model['length']} tokens; {model['rounds']} rounds; full "
        f"batch {seconds:.3f} s."
    )


def parse(argv):
    parser = options(__doc__, rounds=15)
    add_size(parser, SIZES)
    models = ("scanned", "unrolled")
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--accum-steps", type=int, default=8)
    return parse_options(parser, argv, "size", "models", "accum_steps")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    found = [
        measure(
            SIZES[args.size],
            scanned=model == "scanned",
            accum_steps=args.accum_steps,
            rounds=args.rounds,
        )
        for model in args.models
    ]
    publish("microbatch_map", __doc__, {"models": found}, table, args.output)


if __name__ == "__main__":
    main()
