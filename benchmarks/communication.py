"""What does an update move between devices, by stage and number of devices?

    python benchmarks/communication.py      # CPU, about two minutes

Every step is compiled for 1, 2, 4 and 8 simulated devices and asked for its collectives
(`jaxga.collectives`): these are counts, and nothing is timed. The peers are written by
hand, as they are written elsewhere: under `jit`, a scan that leaves the reduction to
XLA; and under `pmap`, a scan with a `psum` of every micro-batch's gradient, or of their
mean. All make
the same update of the parameters, or nothing is counted. Rows are of one length, for
both peers take the mean of the micro-batches' means.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import markdown
import numpy as np
import optax
from compiled import measure as measure_compiled
from contenders import Loss, cut
from harness import (
    PyTree,
    check_equal,
    options,
    parse_options,
    publish,
    tree_bytes,
)
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformer import SIZES, make_batch, make_params

DEVICES = (1, 2, 4, 8)
ACCUM_STEPS, AXIS = 8, "data"
SIZE = SIZES["tiny"]
# Elementwise, and with a state of its own to divide: SGD with momentum, of rate 1.
TX = optax.sgd(1.0, momentum=0.9)
LOSS = Loss()


@dataclasses.dataclass(frozen=True)
class Run:
    """A compiled step, and what it is called with.

    Attributes:
        compiled: the step, `(state, batch) -> (state, loss)`.
        state: its state, placed.
        batch: its batch, placed.
        read_params: the parameters in a state.
    """

    compiled: Any
    state: PyTree
    batch: PyTree
    read_params: Callable


def by_jaxga(mesh: Mesh, params: PyTree, batch: PyTree, **options: Any) -> Run:
    parallel = jaxga.DataParallel(mesh, AXIS, **options)
    step = jaxga.make_train_step(
        LOSS.weighted_sum, TX, accum_steps=ACCUM_STEPS, parallel=parallel, donate=False
    )
    state = parallel.shard_state(jaxga.TrainState.create(params, TX))
    batch = parallel.shard_batch(batch)
    compiled = step.lower(state, batch).compile()
    return Run(compiled, state, batch, lambda state: state.params)


def by_gspmd(mesh: Mesh, params: PyTree, batch: PyTree) -> Run:
    """A loop under `jit`: nothing in it says when the devices add up."""

    def step(state, batch):
        params, opt_state = state
        loss, grads = mean_of_means(params, cut(batch, ACCUM_STEPS))
        updates, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put((params, TX.init(params)), everywhere)
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXIS)))
    jitted = jax.jit(step, out_shardings=(everywhere, everywhere))
    return Run(jitted.lower(state, batch).compile(), state, batch, lambda s: s[0])


def by_pmap(mesh: Mesh, params: PyTree, batch: PyTree, *, in_loop: bool) -> Run:
    """A loop under `pmap`; each gradient is reduced in it, or their mean after it."""

    def step(state, batch):
        params, opt_state = state
        microbatches = cut(batch, ACCUM_STEPS)
        if in_loop:
            loss, grads = mean_of_means(params, microbatches, psum_mean)
        else:
            loss, grads = psum_mean(mean_of_means(params, microbatches))
        updates, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def psum_mean(tree):
        return jax.tree.map(lambda x: lax.psum(x, AXIS) / mesh.size, tree)

    # A leading axis of devices on everything, the state included.
    by_device = NamedSharding(mesh, PartitionSpec(AXIS))
    copies = [(params, TX.init(params))] * mesh.size
    state = jax.device_put(jax.tree.map(lambda *x: jnp.stack(x), *copies), by_device)
    batch = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
    batch = jax.device_put(batch, by_device)
    mapped = jax.pmap(step, AXIS, devices=list(mesh.devices.flat))
    compiled = mapped.lower(state, batch).compile()
    return Run(compiled, state, batch, lambda s: jax.tree.map(lambda x: x[0], s[0]))


def mean_of_means(params, microbatches, reduce=lambda found: found):
    def body(sums, microbatch):
        found = reduce(jax.value_and_grad(LOSS.mean)(params, microbatch))
        return jax.tree.map(jnp.add, sums, found), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    sums, _ = lax.scan(body, zeros, microbatches)
    return jax.tree.map(lambda leaf: leaf / ACCUM_STEPS, sums)


STEPS = {
    "loop under jit": (by_gspmd, {}),
    "loop under pmap, psum in it": (by_pmap, {"in_loop": True}),
    "loop under pmap, psum after it": (by_pmap, {"in_loop": False}),
    "zero=0": (by_jaxga, {"zero": 0}),
    "zero=1": (by_jaxga, {"zero": 1}),
    "zero=2": (by_jaxga, {"zero": 2}),
    "zero=3": (by_jaxga, {"zero": 3}),
    "zero=3, gather_once": (by_jaxga, {"zero": 3, "gather_once": True}),
}


def measure(names: list[str], devices: list[int]) -> dict[str, Any]:
    """Collectives of every step, by number of devices, with as much to do for each."""
    params = make_params(SIZE, scanned=True)
    found = {name: {} for name in names}
    for number in devices:
        mesh = Mesh(np.array(jax.devices()[:number]), (AXIS,))
        batch = make_batch(SIZE, number * ACCUM_STEPS * SIZE.microbatch_size)
        batch["mask"] = jnp.ones_like(batch["mask"])
        right = jax.jit(jax.grad(LOSS.mean))(params, batch)
        for name in names:
            make, options = STEPS[name]
            run = make(mesh, params, batch, **options)
            check_equal(name, update_of(run, params), right)
            counted = measure_compiled(run.compiled)
            found[name][str(number)] = counted["collectives"]
            print(f"{name}, {number} devices", flush=True)
    return {
        **dataclasses.asdict(SIZE),
        "accum_steps": ACCUM_STEPS,
        "gradient_bytes": tree_bytes(params),
        "arrays": len(jax.tree.leaves(params)),
        "steps": found,
    }


def update_of(run: Run, params: PyTree) -> PyTree:
    """What the first update takes off the parameters: the gradient."""
    after = run.read_params(run.compiled(run.state, run.batch)[0])
    return jax.tree.map(
        lambda old, new: np.asarray(old) - np.asarray(new), params, after
    )


def table(result: Mapping[str, Any]) -> str:
    """A row for each step and kind of collective, a column for each mesh."""
    gradient = result["gradient_bytes"]
    counts = list(next(iter(result["steps"].values())))
    rows = []
    for name, by_devices in result["steps"].items():
        kinds = sorted({g["kind"] for groups in by_devices.values() for g in groups})
        for kind in kinds or [""]:
            cells = (_moved(by_devices[n], kind, gradient) for n in counts)
            rows.append((name, kind, *cells))
    header = ("step", "collective", *(f"{n} devices" for n in counts))
    header = tuple("1 device" if cell == "1 devices" else cell for cell in header)
    shapes = (
        'Sizes of the gradient moved per update, in how many collectives; "(loop)": in '
        f"a loop. {result['accum_steps']} micro-batches; {result['layers']} layers, "
        f"scanned; {result['arrays']} arrays of parameters."
    )
    setting = markdown.setting(result["environment"])
    return markdown.join(setting, shapes, markdown.table([header, *rows]))


def _moved(groups, kind, gradient):
    parts = [
        f"{group['bytes_per_update'] / gradient:.2f} in {group['per_update']}"
        + (" (loop)" if group["in_loop"] else "")
        for group in groups
        if group["kind"] == kind
    ]
    return "; ".join(parts)


def parse(argv):
    parser = options(__doc__)
    add = parser.add_argument
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="NAME")
    add("--devices", nargs="+", type=int, default=list(DEVICES))
    return parse_options(parser, argv, "steps", "devices")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # Whatever the machine has: the counts are those of any devices.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    # Simulated devices share the threads of few cores: with several computations under
    # way, each can hold threads that the others' all-reduce is waiting for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    found = measure(args.steps, args.devices)
    publish("communication", __doc__, found, table, args.output)


if __name__ == "__main__":
    main()
