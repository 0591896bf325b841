"""How near is the memory that jaxga.plan_memory predicts to what the step needs?

    python benchmarks/memory_plan.py                        # on a GPU; else small
    python benchmarks/memory_plan.py --target h200.txtpb    # a GPU, where there is none

Plans, then compiles all sizes of the micro-batch that fit, and the next one, without
the planner. The global batch is a power of two, and so are the sizes. With `--target`,
XLA compiles for GPUs that a file describes; layouts.py says where such files are.

On a GPU that is there an update is run, too, with the size that was chosen, and with
the next, each in a process of its own: the first must succeed, and the second run out
of memory. The most that was in use stands beside what was predicted.
"""

import argparse
import dataclasses
import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import markdown
import numpy as np
import optax
from compiled import devices_of
from harness import environment, memory_of, options, parse_options, save
from jax.sharding import AxisType, Mesh
from large_model import SIZES, Size, param_types, token_losses

PyTree = Any
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
TOLERANCE = 0.03  # of a peak
FRACTION = 0.75  # of a GPU's memory, which JAX takes if nothing else is said
SMALL_BUDGET = 2 * 2**20  # bytes: a CPU has no limit of its own
ROWS = {"small": 128, "1b": 1024}  # per update, on each device


@dataclasses.dataclass(frozen=True)
class Model:
    """A step to plan.

    Attributes:
        scanned: whether the layers are stacked and scanned, or unrolled.
        layers: how many; 0 for those of the size.
        num_devices: in the mesh.
        zero: the stage of `DataParallel`.
    """

    scanned: bool
    layers: int
    num_devices: int
    zero: int


MODELS = {
    "scanned": Model(True, 0, num_devices=1, zero=0),
    "unrolled": Model(False, 6, num_devices=1, zero=0),
    "scanned, zero=3": Model(True, 0, num_devices=8, zero=3),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model on devices.

    Attributes:
        model: what stands in `MODELS`.
        size: its shapes.
        parallel: its devices, there or not.
        attention: the implementation that `jax.nn.dot_product_attention` takes.
        rows: per update, on each device.
        budget: bytes of a device; None for its own limit.
    """

    model: Model
    size: Size
    parallel: jaxga.DataParallel
    attention: str
    rows: int
    budget: int | None

    def build(self, microbatch_size: int, accum_steps: int) -> Any:
        attend = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation=self.attention
        )
        losses = functools.partial(
            token_losses, heads=self.size.heads, attend=attend, pin=lambda x: x
        )
        return jaxga.make_train_step(
            lambda params, tokens: jaxga.WeightedSum.of(losses(params, tokens)),
            TX,
            accum_steps=accum_steps,
            parallel=self.parallel,
        )

    @property
    def global_batch_size(self) -> int:
        return self.rows * self.parallel.num_devices

    def types(self) -> PyTree:
        return param_types(self.size, scanned=self.model.scanned)

    def state(self) -> jaxga.TrainState:
        """Its shapes."""
        return jax.eval_shape(lambda p: jaxga.TrainState.create(p, TX), self.types())

    def plan(self) -> Any:
        return jaxga.plan_memory(
            self.build,
            self.state(),
            jax.ShapeDtypeStruct((self.size.length + 1,), jnp.int32),
            global_batch_size=self.global_batch_size,
            budget_bytes=self.budget,
        )

    def peak(self, row: Any) -> int:
        """Of the compiled step, without the planner."""
        state = self.parallel.shard_state(self.state())
        shape = self.global_batch_size, self.size.length + 1
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        step = self.build(row.microbatch_size, row.accum_steps)
        return memory_of(step.lower(state, tokens).compile())["total_bytes"]

    def run(self, microbatch_size: int) -> None:
        """Two updates on random tokens."""
        shape = self.global_batch_size, self.size.length + 1
        tokens = np.random.default_rng(0).integers(0, self.size.vocab, shape, np.int32)
        step = self.build(microbatch_size, self.rows // microbatch_size)
        state = self.parallel.init(self._random_state, jax.random.key(0))
        for _ in range(2):
            state, metrics = step(state, self.parallel.shard_batch(tokens))
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise ValueError(f"The loss is {loss}.")

    def _random_state(self, key):
        leaves, treedef = jax.tree.flatten(self.types())
        keys = jax.random.split(key, len(leaves))
        params = [
            jax.random.normal(k, leaf.shape, leaf.dtype) / 50
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return jaxga.TrainState.create(treedef.unflatten(params), TX)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.part:
        found = plan_all(args) if args.part[0] == "plan" else run_one(args)
        print(json.dumps(found))
        return
    result = measure(argv)
    path = save("memory_plan", result, args.output)
    print(f"{table(result)}\n\nwritten to {path}")
    if failed := failures(result):
        raise SystemExit("\n".join(failed))


def measure(argv: list[str]) -> dict[str, Any]:
    """Each part in a process of its own: none finds a device that another fills."""
    result = part(argv, "plan")
    if not result["runs"]:
        return result
    for name, model in result["models"].items():
        sizes = [size["microbatch_size"] for size in model["sizes"]]
        last = sizes.index(model["plan"]["microbatch_size"])
        for size in model["sizes"][last : last + 2]:
            size["run"] = part(argv, name, str(size["microbatch_size"]))
    return result


def part(argv: list[str], *which: str) -> Any:
    command = [sys.executable, __file__, *argv, "--part", *which]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *log, found = done.stdout.splitlines()
    print(*log, sep="\n", flush=True)
    return json.loads(found)


def plan_all(args: argparse.Namespace) -> dict[str, Any]:
    settings = make_settings(args)
    device = next(iter(settings.values())).parallel.mesh.devices.flat[0]
    return {
        "question": __doc__.splitlines()[0],
        "environment": environment(device),
        "compiled_only": args.target is not None,
        "runs": args.target is None and jax.default_backend() == "gpu",
        "tolerance": TOLERANCE,
        "models": {name: compare(name, each) for name, each in settings.items()},
    }


def compare(name: str, setting: Setting) -> dict[str, Any]:
    """The plan, and the sizes that it only predicted compiled too."""
    start = time.perf_counter()
    plan = setting.plan()
    seconds = time.perf_counter() - start
    print(f"{name}, {seconds:.1f} s:\n{plan}", flush=True)
    sizes, fitted = [], True
    for row in plan.rows:
        if not fitted:
            break  # one beyond those that fit is enough
        fitted = row.fits
        found = dataclasses.asdict(row)
        if not row.compiled:
            found["peak_if_compiled"] = peak = setting.peak(row)
            found["error"] = row.peak_bytes / peak - 1
        sizes.append(found)
    numbers = dataclasses.asdict(plan)
    rows = numbers.pop("rows")
    return {
        **dataclasses.asdict(setting.model),
        "layers": setting.size.layers,
        "length": setting.size.length,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(setting.types())),
        "plan": numbers,
        "plan_seconds": seconds,
        "compiled_by_plan": sum(row["compiled"] for row in rows),
        "sizes": sizes,
    }


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """Whether a size runs, and the most that was in use on one device."""
    name, size = args.part
    setting = make_settings(args)[name]
    try:
        setting.run(int(size))
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return {"succeeded": False, "message": str(error).splitlines()[0]}
    used = [
        (device.memory_stats() or {}).get("peak_bytes_in_use")
        for device in setting.parallel.mesh.devices.flat
    ]
    return {"succeeded": True, "peak_bytes_in_use": max(used) if all(used) else None}


def failures(result: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    said = []
    for name, model in result["models"].items():
        chosen = model["plan"]["microbatch_size"]
        for size in model["sizes"]:
            label = f"{name}, micro-batch {size['microbatch_size']}"
            # One micro-batch alone has another program: its figure is a bound.
            is_far = abs(size.get("error", 0)) > result["tolerance"]
            if is_far and size["fits"] and size["accum_steps"] > 1:
                said.append(f"{label}: predicted {size['error']:+.1%} off.")
            should = size["microbatch_size"] == chosen
            if "run" in size and size["run"]["succeeded"] != should:
                said.append(f"{label}: " + ("out of memory." if should else "it runs."))
    return said


def make_settings(args: argparse.Namespace) -> dict[str, Setting]:
    """The models that there are devices for."""
    if args.target:
        devices, budget = described(args.target)
    else:
        devices, budget = jax.devices(), None
    is_cpu = devices[0].platform == "cpu"
    budget = SMALL_BUDGET if is_cpu else budget
    found = {}
    for name, model in MODELS.items():
        if name not in args.models or model.num_devices > len(devices):
            continue
        named = args.size or ("small" if is_cpu else "1b")
        size = SIZES[named]
        size = dataclasses.replace(size, layers=model.layers or size.layers)
        of_mesh = np.array(devices[: model.num_devices])
        mesh = Mesh(of_mesh, ("data",), axis_types=(AxisType.Auto,))
        parallel = jaxga.DataParallel(mesh, zero=model.zero)
        attention = "xla" if is_cpu else "cudnn"
        found[name] = Setting(model, size, parallel, attention, ROWS[named], budget)
    return found


def described(target: Path) -> tuple[list, int]:
    """Devices that do not exist, and the memory that JAX would take of one."""
    text = target.read_text()
    # What is compiled for GPUs needs none, and one that is there is left alone.
    jax.config.update("jax_platforms", "cpu")
    devices = devices_of(target, 8)
    memory = int(re.search(r"device_memory_size: (\d+)", text)[1])
    return list(devices), int(FRACTION * memory)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    header = "micro-batch", "accum_steps", "planned", "compiled", "error", "run"
    parts = [markdown.setting(result["environment"])]
    for name, model in result["models"].items():
        plan = model["plan"]
        parts.append(
            f"{name}: {model['layers']} layers, {model['parameters'] / 1e6:.1f} M "
            f"parameters, {model['num_devices']} x {plan['device_kind']}, budget "
            f"{in_units(plan['budget_bytes'])} per device; chosen: "
            f"{plan['microbatch_size']}, after {model['compiled_by_plan']} "
            f"compilations, {model['plan_seconds']:.0f} s."
        )
        parts.append(markdown.table([header, *map(table_row, model["sizes"])]))
    return markdown.join(parts)


def table_row(size: dict[str, Any]) -> tuple[str, ...]:
    compiled, error = size["peak_bytes"], "by the plan"
    if not size["compiled"]:
        compiled, error = size["peak_if_compiled"], f"{size['error']:+.1%}"
    run = size.get("run")
    used = in_units(run["peak_bytes_in_use"]) if run and run["succeeded"] else ""
    return (
        str(size["microbatch_size"]),
        str(size["accum_steps"]),
        in_units(size["peak_bytes"]),
        in_units(compiled),
        error,
        "" if run is None else used or "out of memory",
    )


def in_units(count: int | None) -> str:
    if count is None:
        return "not known"
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.2f} {name}"


def parse(argv):
    parser = options(__doc__)
    add = parser.add_argument
    add("--target", type=Path, help="description of the GPU; without: what is there")
    add("--size", choices=SIZES, help="default: 1b on a GPU, or else small")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    add("--part", nargs="+", help=argparse.SUPPRESS)  # what a child is to do
    return parse_options(parser, argv, "size", "models")


if __name__ == "__main__":
    main()
