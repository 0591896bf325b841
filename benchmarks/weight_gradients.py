"""What do weight gradients in float32 save: error, and traffic in a GPU's memory?

    python benchmarks/weight_gradients.py                        # CPU, or a GPU
    python benchmarks/weight_gradients.py --target h200.txtpb    # for a GPU

A network of residual blocks computes in bfloat16 with float32 parameters, its layers
unrolled or scanned. "stock" casts the weights and multiplies; "float32" is
`jaxga.float32_wgrad_dot_general`; with "cast once" weights are cast before the loop
over the micro-batches; the "compiler option" leaves matrix products to cuBLAS.

Errors are those of the gradient of the weights: against float64, and against the sum
of the unrounded gradients of the same activations. On a GPU, or with `--target`, the
programs are compiled and read: what made the weights' gradients, and the bytes of
arrays of the weights' shapes that are read and written, in one micro-batch for each
parameter. On a GPU they are timed too. Where it is only compiled, matrix products are
those of XLA's cost model, not the fastest of those tried. `layouts.py` says what
`--target` takes.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import markdown
import numpy as np
from compiled import devices_of
from contenders import Loss, hand_written_scan
from gpu_program import read
from harness import (
    check_equal,
    distance,
    options,
    parse_options,
    publish,
    time_in_turns,
)
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxga import float32_wgrad_dot_general

PyTree = Any
HALF, BY_HAND = jnp.bfloat16, "hand-written scan, stock"
TOLERANCE = 1e-2  # of a gradient, to that with products rounded to bfloat16
ERROR_STEPS = (1, 4, 16, 64)
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of the network and of a micro-batch.

    Attributes:
        layers: blocks, of two matrices each.
        width: features of a token.
        hidden: features inside a block.
        rows: tokens of a micro-batch.
        accum_steps: micro-batches of a cycle.
    """

    layers: int
    width: int
    hidden: int
    rows: int
    accum_steps: int

    @property
    def parameters(self) -> int:
        return 2 * self.layers * self.width * self.hidden


SIZES = {
    "tiny": Size(layers=2, width=48, hidden=96, rows=8, accum_steps=2),
    "small": Size(layers=4, width=128, hidden=512, rows=16, accum_steps=64),
    "large": Size(layers=8, width=2048, hidden=8192, rows=4096, accum_steps=8),
}


# The network, and its ways to multiply.


def multiply(x: jax.Array, weights: jax.Array, low: jax.Array | None) -> jax.Array:
    return x @ weights.astype(x.dtype)


def multiply_wide(x: jax.Array, weights: jax.Array, low: jax.Array | None) -> jax.Array:
    dims = ((x.ndim - 1,), (0,)), ((), ())
    return float32_wgrad_dot_general(x, weights, dims, cast_weights=low)


def narrow(params: PyTree) -> PyTree:
    return jax.tree.map(lambda weights: weights.astype(HALF), params)


# How a layer multiplies; and what a cycle is given: the parameters, of which it takes
# the gradient, and beside them perhaps a narrow copy.
FORMS = {
    "stock": (multiply, lambda params: (params, None)),
    "stock, cast once": (multiply, lambda params: (narrow(params), None)),
    "float32": (multiply_wide, lambda params: (params, None)),
    "float32, cast once": (multiply_wide, lambda params: (params, narrow(params))),
}


def make_loss(product: Callable, dtype: Any = HALF) -> Callable:
    """`loss_fn(params, batch, low)` of stacked layers, or of a list of them."""

    def block(h, layer):
        weights, low = layer
        z = h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)
        z = jax.nn.gelu(product(z, weights["in"], low and low["in"]))
        return h + product(z, weights["out"], low and low["out"]), None

    def loss_fn(params, batch, low=None):
        h, layer = batch["x"].astype(dtype), jax.checkpoint(block, prevent_cse=False)
        if isinstance(params, list):
            for pair in zip(params, low or [None] * len(params), strict=True):
                h, _ = layer(h, pair)
        else:
            h, _ = lax.scan(layer, h, (params, low))
        wide = h.astype(jnp.promote_types(dtype, jnp.float32))
        return jaxga.WeightedSum.of((wide - batch["y"]) ** 2)

    return loss_fn


class Stock(Loss):
    """The network as it is given to those that sum otherwise."""

    def sum_and_weight(self, params, batch):
        found = make_loss(multiply)(params, batch)
        return found.total, found.weight


def make_cycle(form: str, accum_steps: int) -> Callable:
    """Gradient of a cycle, of parameters and a batch."""
    if form == BY_HAND:
        by_hand = hand_written_scan(accum_steps, Stock())
        return lambda params, batch: by_hand(params, batch)[1]
    product, given = FORMS[form]
    cycle = jaxga.value_and_grad(make_loss(product), accum_steps=accum_steps)

    def run(params, batch):
        params, low = given(params)
        return cycle(params, batch, low)[1]

    return run


def param_types(size: Size, scanned: bool, sharding: Any = None) -> PyTree:
    lead = (size.layers,) if scanned else ()
    shapes = {"in": (size.width, size.hidden), "out": (size.hidden, size.width)}
    layer = {
        name: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32, sharding=sharding)
        for name, shape in shapes.items()
    }
    return layer if scanned else [layer] * size.layers


def batch_types(size: Size, rows: int, sharding: Any = None) -> PyTree:
    shape = (rows, size.width)
    one = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return {"x": one, "y": one}


def make(types: PyTree, seed: int) -> PyTree:
    """Random arrays; matrices keep the size of what they are multiplied with."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values / math.sqrt(leaf.shape[-2]) if seed == 0 else values)

    return jax.tree.map(draw, types)


# Errors.


def exact(params: PyTree, batch: PyTree) -> PyTree:
    """In float64, of the full batch at once, without jaxga's loop."""
    with jax.enable_x64(True):
        params, batch = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)), (params, batch)
        )
        loss_fn = make_loss(multiply, jnp.float64)
        grad = jax.jit(jax.grad(lambda p: loss_fn(p, batch).mean()))
        return jax.device_get(grad(params))


def measure_errors(size: Size) -> dict[str, Any]:
    """By form and number of micro-batches, over one batch."""
    params = make(param_types(size, scanned=True), 0)
    batch = make(batch_types(size, max(ERROR_STEPS) * size.rows), 1)
    truth = exact(params, batch)
    found = {"stock": {}, "float32": {}}
    for steps in ERROR_STEPS:
        grads = {
            form: jax.device_get(jax.jit(make_cycle(form, steps))(params, batch))
            for form in found
        }
        for form in found:
            found[form][str(steps)] = {"float64": distance(grads[form], truth)}
        found["stock"][str(steps)]["unrounded"] = distance(
            grads["stock"], grads["float32"]
        )
    return found


# What a GPU's program does.

PROGRAMS = {
    BY_HAND: (BY_HAND, {}),
    "stock": ("stock", {}),
    "stock, compiler option": ("stock", CUBLAS),
    "stock, cast once": ("stock, cast once", {}),
    "stock, cast once, compiler option": ("stock, cast once", CUBLAS),
    "float32": ("float32", {}),
    "float32, compiler option": ("float32", CUBLAS),
    "float32, cast once": ("float32, cast once", {}),
    "float32, cast once, compiler option": ("float32, cast once", CUBLAS),
}


def measure_programs(
    size: Size, scanned: bool, device: jax.Device, rounds: int
) -> dict[str, Any]:
    """Compiles the programs, reads them, and times them where the device is here."""
    sharding = NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec())
    types = (
        param_types(size, scanned, sharding),
        batch_types(size, size.accum_steps * size.rows, sharding),
    )
    found, compiled = {}, {}
    for name, (form, flags) in PROGRAMS.items():
        run = jax.jit(make_cycle(form, size.accum_steps), compiler_options=flags)
        compiled[name] = run.lower(*types).compile()
        found[name] = read(compiled[name].as_text(), size) | {
            "temp_bytes": compiled[name].memory_analysis().temp_size_in_bytes
        }
        print(f"{'scanned' if scanned else 'unrolled'}, {name}: compiled", flush=True)
    if device in jax.devices():
        args = make(types[0], 0), make(types[1], 1)
        expected = compiled["stock"](*args)
        runs = {name: lambda run=run: run(*args) for name, run in compiled.items()}
        for name, run in runs.items():
            check_equal(name, run(), expected, TOLERANCE)
        for name, times in time_in_turns(runs, rounds).items():
            found[name]["seconds"] = times
    return found


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    parts = [markdown.setting(result["environment"])]
    if "errors" in result:
        parts.append(_errors(result["errors"]))
    programs = result.get("programs", {})
    parts += (_programs(f"layers {kind}", found) for kind, found in programs.items())
    return markdown.join(parts)


def _errors(errors):
    header = ("micro-batches", "stock, by rounding", *(f"{f}, in all" for f in errors))
    rows = [
        (
            steps,
            f"{errors['stock'][steps]['unrounded']:.1e}",
            *(f"{found[steps]['float64']:.1e}" for found in errors.values()),
        )
        for steps in errors["stock"]
    ]
    return markdown.table([header, *rows])


def _programs(title, programs):
    header = [title, "gradients made by", "bytes", "temporaries"]
    if any("seconds" in found for found in programs.values()):
        header.append("cycle")
    return markdown.table([header, *(_row(*item) for item in programs.items())])


def _row(name, found):
    products = "; ".join(f"{n} x {how}" for how, n in found["products"].items())
    moved, temp = found["bytes_per_parameter"], found["temp_bytes"]
    cells = [name, products, f"{moved:.1f}", f"{temp / 2**30:.2f} GiB"]
    if "seconds" in found:
        cells.append(f"{1e3 * statistics.median(found['seconds']):.2f} ms")
    return cells


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.target:
        # What is compiled for a GPU needs none, and one that is there is left alone.
        jax.config.update("jax_platforms", "cpu")
        (device,) = devices_of(args.target, 1)
    else:
        device = jax.devices()[0]
    found = {"compiled_only": args.target is not None}
    if not args.target:
        size = SIZES[args.errors]
        found |= {"errors_size": dataclasses.asdict(size)}
        found["errors"] = measure_errors(size)
    if device.platform != "cpu":
        size = SIZES[args.size]
        found |= {"size": dataclasses.asdict(size)}
        found["programs"] = {
            layers: measure_programs(size, layers == "scanned", device, args.rounds)
            for layers in ("unrolled", "scanned")
        }
    publish("weight_gradients", __doc__, found, table, args.output, device=device)


def parse(argv):
    parser = options(__doc__, rounds=10)
    add = parser.add_argument
    add("--target", type=Path, help="description of a GPU; without: what is here")
    add("--size", choices=SIZES, default="large", help="of the programs")
    add("--errors", choices=SIZES, default="small", help="size for the errors")
    return parse_options(parser, argv, "size", "errors")


if __name__ == "__main__":
    main()
