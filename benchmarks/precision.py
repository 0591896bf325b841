"""How far is a gradient from float64, by precision and number of micro-batches?

    python benchmarks/precision.py      # CPU, about a minute

One batch of a small language model, with rows of unequal length, is cut into ever more
micro-batches, down to one row in each. What is compared is the whole gradient, with
that of the full batch in float64, computed without jaxga, from the same parameters: the
norm of the difference over the norm.
"""

import argparse
import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import markdown
import numpy as np
import optax
from harness import (
    PyTree,
    distance,
    full_precision,
    options,
    parse_options,
    publish,
)
from jax import lax
from transformer import SIZES, make_batch, make_params

ACCUM_STEPS = (1, 16, 64, 256, 1024, 4096)
SIZE = dataclasses.replace(SIZES["tiny"], width=32, vocab=64)
# DESIGN's bounds for float32, by the most micro-batches for which they hold.
BOUNDS = {64: 1e-6, 1024: 1e-5}


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of the parameters, of the computation and of the gradient's sum.

    Attributes:
        params: in which the model's parameters are held.
        computed: to which the loss function casts them.
        summed: `accum_dtype`; None is the default.
    """

    params: str
    computed: str
    summed: str | None = None


PRECISIONS = {
    "float32": Precision("float32", "float32"),
    "float32, sums in float64": Precision("float32", "float32", "float64"),
    "float32, sums in bfloat16": Precision("float32", "float32", "bfloat16"),
    "bfloat16 computation": Precision("float32", "bfloat16"),
    "bfloat16 parameters": Precision("bfloat16", "bfloat16"),
    "bfloat16 parameters and sums": Precision("bfloat16", "bfloat16", "bfloat16"),
    "float16 computation, loss scale 2^15": Precision("float32", "float16"),
}


@jax.tree_util.register_static
class ConstantScale:
    """A loss scale, with the methods of jmp's."""

    def scale(self, tree):
        return jax.tree.map(lambda x: x * 2.0**15, tree)

    def unscale(self, tree):
        return jax.tree.map(lambda x: x / 2.0**15, tree)

    def adjust(self, _):
        return self


def token_losses(params: PyTree, batch: PyTree) -> jax.Array:
    """As in `transformer.py`; its attention, though, has no float16 on a CPU."""
    h = params["embed"][batch["inputs"]] + params["positions"][None]
    h, _ = lax.scan(block, h, params["layers"])
    logits = normalise(h) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(
        widen(logits), batch["targets"]
    )


def block(h, layer):
    length, width = h.shape[1:]
    q, k, v = jnp.split(normalise(h) @ layer["qkv"], 3, axis=-1)
    scores = widen(q @ k.mT) * width**-0.5
    seen = jnp.tril(jnp.ones((length, length), bool))
    attention = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(h.dtype)
    h = h + attention @ v @ layer["attended"]
    return h + jax.nn.gelu(normalise(h) @ layer["wide"]) @ layer["narrow"], None


def normalise(h):
    wide = widen(h)
    size = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * lax.rsqrt(size + 1e-6)).astype(h.dtype)


def widen(x):
    """To float32 at least, as all mixed precision does with softmax and norms."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gradient(
    params: PyTree, batch: PyTree, precision: Precision, accum_steps: int
) -> PyTree:
    """By jaxga, as a user of that precision would call it."""

    def loss_fn(params, batch):
        params = jax.tree.map(lambda x: x.astype(precision.computed), params)
        return jaxga.WeightedSum.of(token_losses(params, batch), where=batch["mask"])

    settings = {"accum_steps": accum_steps, "accum_dtype": precision.summed}
    if precision.computed != "float16":
        cycle = jaxga.value_and_grad(loss_fn, **settings)
        return jax.jit(cycle)(params, batch)[1]
    tx = optax.trace(decay=0.0)  # its state is the gradient that it was given
    state = jaxga.TrainState.create(params, tx, loss_scale=ConstantScale())
    step = jaxga.make_train_step(loss_fn, tx, donate=False, **settings)
    state, metrics = step(state, batch)
    if metrics["skipped"]:
        raise ValueError("The scaled gradient ran over.")
    return state.opt_state.trace


def exact(params: PyTree, batch: PyTree) -> PyTree:
    """In float64, of the full batch at once, without jaxga."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)

        def mean_loss(params):
            losses = token_losses(params, batch)
            return jnp.where(batch["mask"], losses, 0).sum() / batch["mask"].sum()

        return jax.device_get(jax.jit(jax.grad(mean_loss))(params))


def measure(accum_steps: list[int], names: list[str]) -> dict[str, Any]:
    """The error of each precision named, by number of micro-batches."""
    rows = max(accum_steps)
    batch = make_batch(SIZE, rows)
    drawn = make_params(SIZE, scanned=True)
    errors, truths = {}, {}
    for name in names:
        precision = PRECISIONS[name]
        params = jax.tree.map(lambda x, to=precision.params: x.astype(to), drawn)
        if precision.params not in truths:
            truths[precision.params] = exact(params, batch)
        is_wide = precision.summed == "float64"
        with jax.enable_x64(True) if is_wide else contextlib.nullcontext():
            errors[name] = {
                str(n): distance(
                    jax.device_get(gradient(params, batch, precision, n)),
                    truths[precision.params],
                )
                for n in accum_steps
            }
    return {**dataclasses.asdict(SIZE), "rows": rows, "errors": errors}


def check_bounds(errors: Mapping[str, Mapping[str, float]]) -> None:
    """Refuses a float32 that is further from float64 than jaxga promises."""
    for steps, error in errors.get("float32", {}).items():
        bounds = [bound for most, bound in BOUNDS.items() if int(steps) <= most]
        if not error <= min(bounds, default=np.inf):
            raise ValueError(
                f"float32 is {error:.1e} from float64 over {steps} micro-batches, more "
                f"than {min(bounds):.0e}."
            )


def table(result: Mapping[str, Any]) -> str:
    """A row for each precision, a column for each number of micro-batches."""
    counts = list(next(iter(result["errors"].values())))
    header = ("precision", *(f"{int(n):,}" for n in counts))
    rows = [
        (name, *(f"{errors[n]:.1e}" for n in counts))
        for name, errors in result["errors"].items()
    ]
    shapes = (
        f"Error by number of micro-batches. {result['rows']:,} rows of at most "
        f"{result['length']} tokens; {result['layers']} layers of width "
        f"{result['width']}."
    )
    return markdown.join(
        markdown.setting(result["environment"]),
        shapes,
        markdown.table([header, *rows]),
    )


def parse(argv):
    parser = options(__doc__)
    parser.add_argument(
        "--accum-steps",
        nargs="+",
        type=int,
        default=list(ACCUM_STEPS),
        help="each divides the largest, which is the number of rows",
    )
    names = list(PRECISIONS)
    parser.add_argument(
        "--precisions", nargs="+", choices=names, default=names, metavar="NAME"
    )
    args = parse_options(parser, argv, "accum_steps", "precisions")
    check_counts(parser, args.accum_steps)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # Sums in bfloat16 are what jaxga warns of, and what is to be seen here.
    warnings.filterwarnings("ignore", message="accum_dtype=bfloat16")
    with full_precision():
        found = measure(args.accum_steps, args.precisions)
    check_bounds(found["errors"])
    publish("precision", __doc__, found, table, args.output)


def check_counts(parser: argparse.ArgumentParser, counts: list[int]) -> None:
    if min(counts) < 1 or any(max(counts) % n for n in counts):
        parser.error(f"--accum-steps {counts}: each must divide the largest")


if __name__ == "__main__":
    main()
