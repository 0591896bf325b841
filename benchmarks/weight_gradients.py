"""What do weight gradients in float32 save: error, and traffic in a GPU's memory?

    python benchmarks/weight_gradients.py                        # CPU, or a GPU
    python benchmarks/weight_gradients.py --target h200.txtpb    # for a GPU

A network of residual blocks computes in bfloat16 with float32 parameters, its layers
unrolled or scanned. "stock" casts the weights and multiplies; "float32" is
`jaxga.float32_wgrad_dot_general`; "cast once" is the same with weights cast before the
loop over the micro-batches; the "compiler option" leaves matrix products to cuBLAS.

Errors are those of the gradient of the weights: against float64, and against the sum
of the unrounded gradients of the same activations. On a GPU, or with `--target`, the
programs are compiled and read: what made the weights' gradients, and the bytes of
arrays of the weights' shapes that are read and written, in one micro-batch for each
parameter. On a GPU they are timed too. Where it is only compiled, matrix products are
those of XLA's cost model, not the fastest of those tried. `layouts.py` says what
`--target` takes.
"""

import argparse
import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
from compiled import devices_of
from harness import RESULTS, distance, environment, save, time_in_turns
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxga import float32_wgrad_dot_general
from jaxga._hlo import callees, is_end, read_modules, trip_count

PyTree = Any
HALF = jnp.bfloat16
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


FORMS = {
    "stock": (multiply, False),
    "float32": (multiply_wide, False),
    "float32, cast once": (multiply_wide, True),
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


def make_cycle(form: str, accum_steps: int) -> Callable:
    """Gradient of a cycle, of parameters and a batch."""
    product, once = FORMS[form]
    cycle = jaxga.value_and_grad(make_loss(product), accum_steps=accum_steps)

    def run(params, batch):
        low = jax.tree.map(lambda x: x.astype(HALF), params) if once else None
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
    "stock": ("stock", {}),
    "stock, compiler option": ("stock", CUBLAS),
    "float32": ("float32", {}),
    "float32, compiler option": ("float32", CUBLAS),
    "float32, cast once": ("float32, cast once", {}),
    "float32, cast once, compiler option": ("float32, cast once", CUBLAS),
}


def measure_programs(size: Size, scanned: bool, device: Any) -> dict[str, Any]:
    """Compiles the programs, reads them, and times them where the device is here."""
    sharding = NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec())
    types = (
        param_types(size, scanned, sharding),
        batch_types(size, size.accum_steps * size.rows, sharding),
    )
    found, compiled = {}, {}
    for name, (form, options) in PROGRAMS.items():
        run = jax.jit(make_cycle(form, size.accum_steps), compiler_options=options)
        compiled[name] = run.lower(*types).compile()
        found[name] = read(compiled[name].as_text(), size) | {
            "temp_bytes": compiled[name].memory_analysis().temp_size_in_bytes
        }
        print(f"{'scanned' if scanned else 'unrolled'}, {name}: compiled", flush=True)
    if device in jax.devices():
        args = make(types[0], 0), make(types[1], 1)
        runs = {name: lambda run=run: run(*args) for name, run in compiled.items()}
        seconds = time_in_turns(runs, 10, dict.fromkeys(runs, 1))
        for name, times in seconds.items():
            found[name]["seconds"] = times
    return found


def read(text: str, size: Size) -> dict[str, Any]:
    """How the weights' gradients are made, and what moves arrays of their shapes."""
    (module,) = read_modules(text)
    reader = _Reader(module.computations, size)
    reader.visit(module.entry, 1.0)
    per_parameter = size.parameters * size.accum_steps
    return {
        "products": dict(sorted(reader.products.items())),
        "bytes_per_parameter": reader.bytes / per_parameter,
    }


class _Reader:
    """Goes through what runs, with the number of times that it does.

    Attributes:
        products: how often the weights' gradients are made how, in one micro-batch.
        bytes: of arrays of the weights' shapes, read and written in loops.
    """

    def __init__(self, computations, size):
        self.computations, self.size = computations, size
        self.products, self.bytes = collections.Counter(), 0.0

    def visit(self, name, times, in_loop=False):
        computation = self.computations[name]
        for instruction in computation.values():
            if instruction.opcode == "while":
                for role, callee in callees(instruction, self.computations):
                    if role == "body":
                        inner = times * (trip_count(instruction) or 1)
                        self.visit(callee, inner, True)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for _, callee in callees(instruction, self.computations):
                    self.visit(callee, times, in_loop)
            elif not in_loop or instruction.opcode in _FREE:
                continue
            elif not is_end(instruction.opcode):
                self._count(instruction, computation, times)

    def _count(self, instruction, computation, times):
        names = re.findall(r"%([\w.\-]+)", instruction.operands)
        shapes = [computation[name].shape for name in names if name in computation]
        inner = [instruction, *self._inside(instruction)]
        opcodes = {each.opcode for each in inner}
        # Of a stack of layers a slice is read, or only written to, or all is.
        read = 1 if "dynamic-slice" in opcodes else None
        written = 1 if "dynamic-update-slice" in opcodes else None
        read = 0 if written and not read else read
        moved = [self._weights(shape, read) for shape in shapes]
        # What begins names its operands again, in front of its result.
        result = re.sub(r"^\(\(.*?\), ", "", instruction.shape)
        self.bytes += times * (sum(moved) + self._weights(result, written))
        if self._makes_gradient(inner):
            how = _how(inner, opcodes)
            self.products[how] += round(times / self.size.accum_steps)

    def _inside(self, instruction):
        """The instructions of what it calls, at any depth."""
        for _, callee in callees(instruction, self.computations):
            for each in self.computations[callee].values():
                yield from (each, *self._inside(each))

    def _weights(self, shape, of_stack):
        """The bytes of the weights' matrices in a shape; `of_stack`: of how many layers
        of a stack, or None for all."""
        total = 0
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
            dims = [int(d) for d in dims.split(",") if d and int(d) > 1]
            one = self.size.width * self.size.hidden
            if sorted(dims[-2:]) != sorted((self.size.width, self.size.hidden)):
                continue
            matrices = math.prod(dims) // one
            if matrices > 1 and of_stack is not None:
                matrices = of_stack
            total += _BYTES[dtype] * one * matrices
        return total

    def _makes_gradient(self, inner):
        """Whether it is a product whose result is a matrix of weights."""
        return any(
            self._weights(each.shape, None)
            for each in inner
            if each.opcode == "dot" or "__cublas" in each.attributes
        )


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "s8": 1, "u8": 1, "pred": 1}


def _how(inner, opcodes):
    for each in inner:
        if "__cublas" in each.attributes:
            beta = re.search(r'"beta":"?([\d.]+)', each.attributes)
            adds = beta is not None and float(beta[1]) == 1
            in_place = adds and "output_to_operand_aliasing" in each.attributes
            dtype = re.search(r"\w+(?=\[)", each.shape)[0]
            place = f"added {'inside' if adds else 'apart'}"
            return f"cuBLAS, {dtype}, {place}{', in place' if in_place else ''}"
    (dtype,) = {
        re.search(r"\w+(?=\[)", each.shape)[0] for each in inner if each.opcode == "dot"
    }
    # An addition in a fused product is that to the sum: there is no other.
    return f"Triton, {dtype}, added {'inside' if 'add' in opcodes else 'apart'}"


def weight_gradients_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    parts = []
    if errors := result.get("errors"):
        steps = list(errors["stock"])
        rows = [
            (
                "stock, against float64",
                *(_error(errors["stock"][n]["float64"]) for n in steps),
            ),
            (
                "float32, against float64",
                *(_error(errors["float32"][n]["float64"]) for n in steps),
            ),
            (
                "stock, by rounding alone",
                *(_error(errors["stock"][n]["unrounded"]) for n in steps),
            ),
        ]
        header = ("weights' gradients", *(f"{n} micro-batches" for n in steps))
        parts.append(_markdown([header, *rows]))
    for layers, programs in result.get("programs", {}).items():
        timed = any("seconds" in found for found in programs.values())
        rows = [_row(name, found, timed) for name, found in programs.items()]
        header = (
            f"layers {layers}",
            "made by",
            "bytes / parameter and micro-batch",
            "temporaries",
        )
        parts.append(_markdown([(*header, *(["cycle"] if timed else [])), *rows]))
    return "\n\n".join(parts)


def _row(name, found, timed):
    products = "; ".join(f"{n} x {how}" for how, n in found["products"].items())
    cells = [
        name,
        products,
        f"{found['bytes_per_parameter']:.1f}",
        f"{found['temp_bytes'] / 2**30:.2f} GiB",
    ]
    if timed:
        cells.append(f"{1e3 * float(np.median(found['seconds'])):.2f} ms")
    return cells


def _error(error):
    return f"{error:.1e}"


def _markdown(rows):
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--target", type=Path, help="description of a GPU; without: what is here")
    add("--size", choices=SIZES, help="of the programs; default: large")
    add("--errors", choices=SIZES, default="small", help="size for the errors")
    add("--output", type=Path, help="the JSON file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.target:
        jax.config.update("jax_platforms", "cpu")
        device = devices_of(args.target, 1)[0]
    else:
        device = jax.devices()[0]
    result = {"question": __doc__.splitlines()[0], "environment": environment()}
    path = args.output
    if args.target:
        result["compiled_only"] = True
        result["environment"] |= {
            "device_kind": device.device_kind,
            "backend": device.platform,
        }
        slug = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower())
        path = path or RESULTS / f"{slug}-compiled-only" / "weight_gradients.json"
    else:
        size = SIZES[args.errors]
        result |= {"errors_size": dataclasses.asdict(size)}
        result["errors"] = measure_errors(size)
    if device.platform != "cpu":
        size = SIZES[args.size or "large"]
        result |= {"size": dataclasses.asdict(size)}
        result["programs"] = {
            layers: measure_programs(size, layers == "scanned", device)
            for layers in ("unrolled", "scanned")
        }
    path = save("weight_gradients", result, path)
    print(weight_gradients_table(json.loads(path.read_text())))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
