"""What does each layout of the state over 8 GPUs cost, in memory and communication?

    python benchmarks/layouts.py                        # small, 8 simulated devices
    python benchmarks/layouts.py --target h200.txtpb    # 8 GPUs, where there is none

With `--target`, XLA compiles for GPUs that a file describes; JAX's CUDA wheels must be
there (`pip install "jax[cuda13]"`), the GPUs need not. The file is a
`GpuTargetConfigProto` as text: XLA's repository has many, in
xla/backends/gpu/target_config/specs (github.com/openxla/xla), and where there is a GPU
`XLA_FLAGS=--xla_dump_to=DIR` makes every compilation leave `*.gpu_target_config.pbtxt`.

All is compiled and nothing is run: there are no times, and matrix products are those of
XLA's cost model, not the fastest of those tried. "plain step" computes one micro-batch,
without accumulation. A "GSPMD loop" is the usual one, written by hand: a scan that adds
up gradients under sharding constraints.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
from compiled import devices_of, measure
from harness import environment, options, parse_options, save
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from large_model import SIZES, Size, param_types, token_losses
from tables import layouts_table

PyTree = Any
Lowered = jax.stages.Lowered
NUM_DEVICES = 8
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all layouts share.

    Attributes:
        devices: on which the step shall run, or could.
        size: shapes.
        scanned: whether the layers are stacked and scanned, or unrolled.
        attention: the implementation that `jax.nn.dot_product_attention` takes.
    """

    devices: np.ndarray
    size: Size
    scanned: bool
    attention: str

    def params(self) -> PyTree:
        return param_types(self.size, scanned=self.scanned)

    def mesh(self, **axes: int) -> Mesh:
        devices = self.devices.reshape(tuple(axes.values()))
        return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))

    def tokens(self, mesh: Mesh, spec: PartitionSpec, *lead: int):
        sharding = NamedSharding(mesh, spec)
        shape = (*lead, self.size.length + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    def losses(
        self,
        over: PartitionSpec | None = None,
        mesh: Mesh | None = None,
        pin: Callable = lambda x: x,
    ) -> Callable:
        """`token_losses` of parameters and tokens.

        `over`: mesh axes for the dimensions of queries, keys and values. cuDNN's kernel
        is called on parts then, for it cannot be divided over every mesh by itself.
        """
        attend = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation=self.attention
        )
        if over is not None:
            attend = jax.shard_map(
                attend,
                mesh=mesh,
                in_specs=over,
                out_specs=over,
                axis_names=set(over) - {None},
                check_vma=False,
            )
        return functools.partial(
            token_losses, heads=self.size.heads, attend=attend, pin=pin
        )


def by_hand(setting: Setting, *, loop=True, zero=0, pinned=False) -> Lowered:
    """A step left to GSPMD, with its state where jaxga's stage `zero` has it."""
    mesh, size = setting.mesh(data=NUM_DEVICES), setting.size
    losses = setting.losses()
    if pinned:
        rows = NamedSharding(mesh, PartitionSpec("data"))
        pin = functools.partial(lax.with_sharding_constraint, shardings=rows)
        losses = setting.losses(rows.spec, mesh, pin)
    params = setting.params()
    state = {"params": params, "opt_state": jax.eval_shape(TX.init, params)}
    state = jaxga.DataParallel(mesh, zero=zero).shard_state(state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step_by_hand(losses, shardings["params"], loop)
    lead = [size.accum_steps] * loop + [NUM_DEVICES * size.rows]
    tokens = setting.tokens(mesh, PartitionSpec(*[None] * loop, "data"), *lead)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(state, tokens)


def make_step_by_hand(losses: Callable, shardings: PyTree, loop: bool) -> Callable:
    """Accumulates means, as most hand-written loops do."""

    def constrain(grads):
        return jax.tree.map(lax.with_sharding_constraint, grads, shardings)

    def gradient(params, tokens):
        loss, grads = jax.value_and_grad(lambda p: losses(p, tokens).mean())(params)
        return loss, constrain(grads)

    def mean_gradient(params, batch):
        def add(sums, tokens):
            loss, grads = jax.tree.map(jnp.add, sums, gradient(params, tokens))
            return (loss, constrain(grads)), None

        zeros = constrain(jax.tree.map(jnp.zeros_like, params))
        sums, _ = lax.scan(add, (jnp.zeros(()), zeros), batch)
        return jax.tree.map(lambda total: total / len(batch), sums)

    def step(state, batch):
        params, opt_state = state["params"], state["opt_state"]
        loss, grads = (mean_gradient if loop else gradient)(params, batch)
        updates, opt_state = TX.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state}, loss

    return step


def by_jaxga(setting: Setting, mesh: dict | None = None, **options: Any) -> Lowered:
    """The step of `jaxga.make_train_step` with a `DataParallel` of these options."""
    mesh, size = setting.mesh(**mesh or {"data": NUM_DEVICES}), setting.size
    parallel = jaxga.DataParallel(mesh, **options)
    over = PartitionSpec(None, None, "model") if "model" in mesh.shape else None
    losses = setting.losses(over)
    step = jaxga.make_train_step(
        lambda params, tokens: jaxga.WeightedSum.of(losses(params, tokens)),
        TX,
        accum_steps=size.accum_steps,
        parallel=parallel,
    )
    params = setting.params()
    state = jax.eval_shape(lambda p: jaxga.TrainState.create(p, TX), params)
    if over is not None:
        state = dataclasses.replace(state, params=divide_over_model(params, mesh))
    rows = size.accum_steps * size.rows * parallel.num_devices
    tokens = setting.tokens(mesh, PartitionSpec(parallel.axes), rows)
    return step.lower(parallel.shard_state(state), tokens)


def divide_over_model(params: PyTree, mesh: Mesh) -> PyTree:
    """Tensor parallelism over heads, hidden features and the vocabulary."""
    specs = dict.fromkeys(("q", "k", "v", "gate", "up"), (None, None, "model"))
    specs |= dict.fromkeys(("o", "down", "out"), (None, "model"))
    specs |= {"embed": ("model",)}

    def divide(path, leaf):
        spec = PartitionSpec(*specs.get(path[-1].key, ()))
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map_with_path(divide, params)


_HYBRID = {"mesh": {"replica": 2, "fsdp": 4}, "axis": ("replica", "fsdp")}
_TENSOR = {"mesh": {"data": 4, "model": 2}}
LAYOUTS = {
    "plain step": (by_hand, {"loop": False}),
    "GSPMD loop": (by_hand, {}),
    "GSPMD loop, FSDP": (by_hand, {"zero": 3}),
    "GSPMD loop, FSDP, activations constrained": (by_hand, {"zero": 3, "pinned": True}),
    "zero=0": (by_jaxga, {"zero": 0}),
    "zero=0, overlap_last": (by_jaxga, {"zero": 0, "overlap_last": True}),
    "zero=1": (by_jaxga, {"zero": 1}),
    "zero=1, overlap_last": (by_jaxga, {"zero": 1, "overlap_last": True}),
    "zero=2": (by_jaxga, {"zero": 2}),
    "zero=3": (by_jaxga, {"zero": 3}),
    "zero=3, gather_once": (by_jaxga, {"zero": 3, "gather_once": True}),
    "zero=3, 2 replicas of 4": (by_jaxga, {**_HYBRID, "zero": 3, "shard_axis": "fsdp"}),
    "zero=0, 4 x 2 tensor parallel": (by_jaxga, {**_TENSOR, "zero": 0}),
    "zero=3, 4 x 2 tensor parallel": (by_jaxga, {**_TENSOR, "zero": 3}),
}
# A gradient's merge can only begin when all of it is there: with scanned layers at the
# end of the scan, when little is left to hide behind.
UNROLLED = ("zero=0", "zero=0, overlap_last", "zero=1", "zero=1, overlap_last")
UNROLLED_LAYERS = 6


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # What is compiled for GPUs needs none, and one that is there is left alone.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    devices = np.array(
        devices_of(args.target, NUM_DEVICES) if args.target else jax.devices()
    )
    kind = f"{NUM_DEVICES} x {devices[0].device_kind}"
    attention = "cudnn" if args.target else "xla"
    size = SIZES[args.size or ("1b" if args.target else "small")]
    few = dataclasses.replace(size, layers=min(size.layers, UNROLLED_LAYERS))
    models = (
        (Setting(devices, size, True, attention), LAYOUTS),
        (Setting(devices, few, False, attention), UNROLLED),
    )
    chosen = [
        (setting, [name for name in names if name in args.layouts])
        for setting, names in models
    ]
    result = {
        "question": __doc__.splitlines()[0],
        "environment": environment(devices[0]) | {"device_kind": kind},
        "compiled_only": True,
        "models": [compile_all(setting, names) for setting, names in chosen if names],
    }
    path = save("layouts", result, args.output)
    print(f"{layouts_table(result)}\n\nwritten to {path}")


def compile_all(setting: Setting, names: list[str]) -> dict[str, Any]:
    """What is found of one model under these layouts."""
    params, found = jax.tree.leaves(setting.params()), {}
    for name in names:
        lower, options = LAYOUTS[name]
        found[name] = measure(lower(setting, **options).compile())
        print(f"{name}: peak {found[name]['peak_bytes'] / 2**30:.3f} GiB", flush=True)
    return {
        "model": "scanned" if setting.scanned else "unrolled",
        **dataclasses.asdict(setting.size),
        "parameters": sum(leaf.size for leaf in params),
        "gradient_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in params),
        "layouts": found,
    }


def parse(argv):
    parser = options(__doc__)
    add = parser.add_argument
    add("--target", type=Path, help="description of the GPUs; without: the CPU")
    add("--size", choices=SIZES, help="default: 1b with --target, or else small")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    return parse_options(parser, argv, "size", "layouts")


if __name__ == "__main__":
    main()
