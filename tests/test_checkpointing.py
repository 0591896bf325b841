"""Runs that are saved, killed and resumed; as a script, one process of such a run."""

import base64
import contextlib
import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import jaxga.linen
import jmp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxga import checkpointing
from jaxga._fingerprint import fingerprint
from orbax.checkpoint import checkpoint_managers
from problems import counted, distance, make_batch, make_mesh, make_params, truth

pytestmark = pytest.mark.anywhere

ROWS, CALLS = 24, 4  # rows per call; calls per cycle


class Rows:
    """Micro-batches of some rows, from the same rows however they are cut."""

    def __init__(self, rows):
        self.rows, self.next = rows, 0

    def __iter__(self):
        return self

    def __next__(self):
        first, self.next = self.next, self.next + self.rows
        whole = make_batch()
        if self.next > len(whole["mask"]):
            raise StopIteration
        return jax.tree.map(lambda x: x[first : self.next], whole)

    def get_state(self):
        return {"next row": self.next, "of": b"\x00\xff", "note": (1, [None, 0.1])}

    def set_state(self, state):
        assert state == self.get_state() | {"next row": state["next row"]}
        self.next = state["next row"]


@contextlib.contextmanager
def manager_of(folder, **options):
    options = ocp.CheckpointManagerOptions(**options)
    with ocp.CheckpointManager(folder, options=options) as manager:
        yield manager


def assert_same(actual, expected):
    """Bit for bit, and of the same kind."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for got, want in pairs:
        assert type(got) is type(want)
        if isinstance(want, jax.Array):
            assert got.dtype == want.dtype and got.committed == want.committed
            assert got.sharding.is_equivalent_to(want.sharding, want.ndim)
            if jax.dtypes.issubdtype(want.dtype, jax.dtypes.prng_key):
                got, want = jax.random.key_data(got), jax.random.key_data(want)
            assert got.weak_type == want.weak_type
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


# ---- Every kind of state comes back, and goes on as if it had never stopped ----------


def jaxga_run():
    def loss_fn(params, batch, key, model_state):
        params = jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(key), params)
        sums = {"calls": model_state["calls"] + 1}
        return jaxga.LossOutput(counted(params, batch), model_state=sums)

    tx = optax.adam(1e-2)
    step = jaxga.make_train_step(loss_fn, tx, accum_steps=3)

    def start(seed):
        return jaxga.TrainState.create(
            jax.tree.map(jnp.asarray, make_params(seed=seed)),
            tx,
            model_state={"calls": jnp.int32(seed)},
            key=jax.random.key(seed),
            loss_scale=jmp.DynamicLossScale(jnp.float32(2.0**10), period=2),
        )

    return start, lambda state, batch: step(state, batch)[0]


class BatchStats(TrainState):
    batch_stats: dict


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(x))


def linen_run():
    model, tx = Normed(), optax.adam(1e-2)

    def loss_fn(params, batch, model_state):
        x = batch["weights"]
        out, new = model.apply(
            {"params": params, **model_state}, x, mutable=["batch_stats"]
        )
        return jaxga.LossOutput(
            jaxga.WeightedSum.of((out[:, 0] - x[:, 0]) ** 2), model_state=new
        )

    step = jaxga.linen.make_train_step(loss_fn, accum_steps=3, mutable=["batch_stats"])

    def start(seed):
        variables = model.init(jax.random.key(seed), make_batch()["weights"])
        return BatchStats.create(apply_fn=model.apply, tx=tx, **variables)

    return start, lambda state, batch: step(state, batch)[0]


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(6, 6, rngs=rngs)
        self.same = self.inner
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.same(self.dropout(self.inner(x)))


def nnx_run():
    def start(seed):
        model = Tied(nnx.Rngs(seed))
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def step(state, batch):
        model, optimizer = state
        grads = nnx.grad(lambda model: (model(batch["weights"]) ** 2).mean())(model)
        optimizer.update(model, grads)
        return state

    return start, step


def plain_run():
    def start(seed):
        key = jax.random.key(seed, impl="rbg")
        return {
            "params": {"w": jnp.full((3, 2), seed, jnp.bfloat16), "a/b": np.arange(3)},
            "keys": [jax.random.split(key, 3), (jax.random.key_data(key),)],
            "step": seed,  # Python's
            "rate": 0.1 * seed,
            "on": seed > 0,
            "small": jnp.full(3, seed, jnp.int4),
            "float8": jnp.full(3, seed, jnp.float8_e4m3fn),
            "complex": np.full(2, 1j * seed, np.complex64),
            "number": np.float32(seed),
            "weak": jnp.asarray(seed),
            "empty": [jnp.zeros((0, 3)), jax.random.split(key, 4)[:0]],
            "nothing": None,
        }

    def step(state, batch):
        state["params"]["a/b"] += 1  # in place
        return state | {"step": state["step"] + 1}

    return start, step


RUNS = dict(jaxga=jaxga_run, linen=linen_run, nnx=nnx_run, plain=plain_run)


def snapshot(state):
    """A copy that no step changes."""
    if any(
        isinstance(part, nnx.Pytree)
        for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Pytree))
    ):
        state = nnx.as_pure(nnx.state(state))
    return jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, state)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_goes_on_bit_for_bit(tmp_path, kind):
    start, step = RUNS[kind]()
    data = jaxga.cycles(Rows(8), 3)
    state = start(1)
    with manager_of(tmp_path) as manager:
        for _ in range(2):
            state = step(state, next(data)[0])
        assert checkpointing.save(manager, state, data)
        saved = snapshot(state)
        for batch, _ in data:  # the step takes over the memory of what is being saved
            state = step(state, batch)
    other, again = start(2), jaxga.cycles(Rows(8), 3)
    with manager_of(tmp_path) as manager:
        assert manager.all_steps() == [3 if kind == "plain" else 2]
        other = checkpointing.restore(manager, other, again)
    if kind != "linen":  # whose first step is Python's 0
        assert_same(snapshot(other), saved)
    assert again.get_state() == {"source": {**Rows(8).get_state(), "next row": 48}} | {
        "updates": 2
    }
    for batch, _ in again:
        other = step(other, batch)
    assert_same(snapshot(other), snapshot(state))


def test_shapes_say_where_to_restore(tmp_path):
    mesh = make_mesh(4)
    state = {"w": jnp.arange(8.0), "key": jax.random.key(3), "step": jnp.int32(5)}
    state["mask"] = state["w"] > 3
    with manager_of(tmp_path) as manager:
        checkpointing.save(manager, state)
        like = jax.eval_shape(lambda: state)
        assert_same(checkpointing.restore(manager, like), state)
        sharding = NamedSharding(mesh, P("data"))
        like["w"] = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
        like["mask"] = jax.ShapeDtypeStruct((8,), jnp.bool_, sharding=sharding)
        whole = NamedSharding(mesh, P())
        like["key"] = jax.ShapeDtypeStruct((), state["key"].dtype, sharding=whole)
        found = checkpointing.restore(manager, like)
    assert found["w"].sharding == sharding and found["key"].sharding == whole
    assert found["mask"].sharding == sharding
    assert found["w"].tolist() == list(range(8))
    assert found["mask"].tolist() == [i > 3 for i in range(8)]
    assert jax.random.bits(found["key"]) == jax.random.bits(state["key"])


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_reads_the_arrays_by_name(tmp_path):
    state = jaxga.TrainState.create({"w": jnp.arange(3.0)}, optax.sgd(0.1))
    with manager_of(tmp_path) as manager:
        checkpointing.save(manager, state)
        manager.wait_until_finished()
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore())
        found = manager.restore(0, args=args)["state"]
    assert found["params.w"].tolist() == [0, 1, 2]
    assert set(found) == {"params.w", "update", "skipped"}


# ---- A cycle that is open ------------------------------------------------------------


@functools.cache
def on_devices(devices, axis_type=AxisType.Auto, accum_steps=CALLS, terms=None):
    """An accumulating SGD on a mesh: a state, and a call."""
    mesh = make_mesh(devices, axis_type)
    return on_mesh(mesh, accum_steps, terms)


def on_mesh(mesh, accum_steps=CALLS, terms=None):
    axis = {"axis_name": "data"}
    tx = jaxga.accumulate(optax.sgd(1.0), accum_steps, terms=terms, **axis)
    specs = jaxga.state_specs(tx, make_params(), "data")

    def loss_fn(params, rows):
        loss = counted(params, rows)
        return {name: loss * (1 / len(terms)) for name in terms} if terms else loss

    def take(params, state, rows):
        sums = jaxga.value_and_grad_sums(
            loss_fn, accum_steps=1, separate_terms=bool(terms), **axis
        )
        _, grads = sums(params, rows)
        if not terms:
            return tx.step(params, state, grads.total, grads.weight)
        parts = [{n: getattr(grads[n], x) for n in terms} for x in ("total", "weight")]
        return tx.step(params, state, *parts)

    def mapped(f, ins, outs):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs))

    whole = NamedSharding(mesh, P())
    params = jax.tree.map(lambda x: jax.device_put(x, whole), make_params())
    state = params, mapped(tx.init, P(), specs)(params)
    both = P(), specs
    call = mapped(take, (*both, P("data")), both)
    rows = NamedSharding(mesh, P("data"))

    def place(x):
        return jax.make_array_from_callback(x.shape, rows, lambda i: x[i])

    return state, lambda state, batch: call(*state, jax.tree.map(place, batch))


def gradient_error(params):
    """How far the first update is from that of all rows at once, in float64."""
    batch = jax.tree.map(lambda x: x[: ROWS * CALLS], make_batch())
    mean = functools.partial(jax.tree.map, lambda a, b: np.asarray(a) - np.asarray(b))

    def mean_loss(params, batch):
        return counted(params, batch).mean()

    _, grads = truth(mean_loss, make_params(), batch)
    return distance(mean(make_params(), params), grads)


def half_a_cycle(run, calls=CALLS // 2 + 1):
    state, call = run
    data = Rows(ROWS)
    for _ in range(calls):
        state = call(state, next(data))
    assert state[1].update == 0 and state[1].num_microbatches == calls
    return state, data


def to_the_end(state, call, data):
    while state[1].update == 0:
        state = call(state, next(data))
    return state


def test_an_open_cycle_goes_on_bit_for_bit(tmp_path):
    like, call = on_devices(4)
    state, data = half_a_cycle((like, call))
    with manager_of(tmp_path) as manager:
        assert checkpointing.save(manager, state, data)
        assert manager.latest_step() == 0  # updates, not micro-batches
        found = checkpointing.restore(manager, like, again := Rows(ROWS))
    assert_same(found, state)
    assert found[1].sums["out"].shape[0] == 4  # those of each device
    assert_same(to_the_end(found, call, again), to_the_end(state, call, data))


@pytest.mark.parametrize(
    "before, after, axis_type, terms",
    (
        (1, 4, AxisType.Auto, None),
        (4, 8, AxisType.Auto, None),
        (8, 3, AxisType.Explicit, None),
        (4, 2, AxisType.Auto, ("one", "other")),
    ),
)
def test_an_open_cycle_goes_on_on_other_devices(
    tmp_path, before, after, axis_type, terms
):
    state, data = half_a_cycle(on_devices(before, terms=terms))
    with manager_of(tmp_path) as manager:
        checkpointing.save(manager, state, data)
        like, call = on_devices(after, axis_type, terms=terms)
        found = checkpointing.restore(manager, like, again := Rows(ROWS))
    for got, want in zip(*map(jax.tree.leaves, (found, like)), strict=True):
        assert got.shape == want.shape and got.sharding == want.sharding
    for pair in jax.tree.leaves(found[1].sum_weight):
        weights = np.asarray(pair, np.float64).sum()
        assert weights == make_batch()["mask"][: again.next].sum()
    found = to_the_end(found, call, again)
    assert found[1].num_microbatches == 0 and again.next == ROWS * CALLS
    assert gradient_error(found[0]) < 1e-6


def test_weights_of_many_devices_stay_exact(tmp_path):
    """Counts that float32 cannot hold are pairs, and are merged as pairs."""
    like, _ = on_devices(4)
    counts = np.array([2**31 + 3, 7, 2**33 + 1, 2**25 + 1])
    high = counts.astype(np.float32)
    pairs = np.stack([high, counts - high.astype(np.int64)], axis=-1)
    pairs = jax.device_put(pairs.astype(np.float32), like[1].sum_weight.sharding)
    state = like[0], like[1]._replace(sum_weight=pairs)
    with manager_of(tmp_path) as manager:
        checkpointing.save(manager, state)
        found = checkpointing.restore(manager, on_devices(1)[0])
    assert np.asarray(found[1].sum_weight, np.float64).sum() == counts.sum()


def test_other_accum_steps_same_rows(tmp_path):
    """Between two cycles: a position in rows means the same however they are cut."""

    def run(rows, accum_steps):
        tx = optax.sgd(1.0)
        step = jaxga.make_train_step(counted, tx, accum_steps=accum_steps)
        state = jaxga.TrainState.create(jax.tree.map(jnp.asarray, make_params()), tx)
        return step, state, jaxga.cycles(Rows(rows), accum_steps)

    def train(step, state, data, updates=99):
        for _, (batch, n) in zip(range(updates), data, strict=False):
            state, _ = step(state, batch, num_microbatches=n)
        return state

    step, state, data = run(24, 4)
    expected = train(*run(24, 4))
    state = train(step, state, data, updates=2)
    with manager_of(tmp_path) as manager:
        checkpointing.save(manager, state, data)
        step, like, data = run(12, 8)
        state = checkpointing.restore(manager, like, data)
    assert data.get_state()["source"]["next row"] == 2 * 96
    found = train(step, state, data)
    assert found.update == expected.update == 4
    moved = [
        jax.tree.map(lambda a, b: a - b, s.params, make_params())
        for s in (found, expected)
    ]
    assert distance(*moved) < 1e-6


# ---- Which checkpoints there are -----------------------------------------------------


def counted_state(update, value=0.0):
    return {"update": update, "w": jnp.full(3, value, jnp.float32)}


def test_numbers_are_counts_of_updates(tmp_path):
    with manager_of(tmp_path, save_interval_steps=2) as manager:
        found = [checkpointing.save(manager, counted_state(i)) for i in (0, 1, 2, 2)]
        assert found == [True, False, True, False]
        assert checkpointing.save(manager, counted_state(3), force=True)
        assert checkpointing.save(manager, counted_state(3), step=10)
        with pytest.raises(ValueError, match="step=3, but .* holds a checkpoint 10"):
            checkpointing.save(manager, counted_state(3))
        with pytest.raises(ValueError, match="step=10: .* of this number already"):
            checkpointing.save(manager, counted_state(3), step=10, force=True)
        assert manager.all_steps() == [0, 2, 3, 10]
        assert checkpointing.restore(manager, counted_state(0), step=2)["update"] == 2
        with pytest.raises(FileNotFoundError, match=r"no checkpoint 1: there are \[0,"):
            checkpointing.restore(manager, counted_state(0), step=1)


def test_the_last_and_the_best_are_kept(tmp_path):
    def badness(metrics):
        return -metrics["loss"]

    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(2),
            checkpoint_managers.BestN(get_metric_fn=badness, n=1),
        ]
    )
    with manager_of(tmp_path, preservation_policy=policy, best_fn=badness) as manager:
        for update, loss in enumerate((5.0, 1.0, 3.0, 4.0, 2.0)):
            metrics = {"loss": jnp.float32(loss)}
            checkpointing.save(manager, counted_state(update, loss), metrics=metrics)
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 3, 4] and manager.best_step() == 1
        best = checkpointing.restore(manager, counted_state(0), step=1)
    assert best["w"].tolist() == [1, 1, 1]


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_is_told_and_loses_nothing(tmp_path):
    noise = np.random.default_rng(0).normal(size=2**20)
    with manager_of(tmp_path, max_to_keep=1) as manager:
        assert checkpointing.save(manager, counted_state(1, 5.0))
        manager.wait_until_finished()
        with full_disk(), pytest.raises(ValueError, match="Error writing"):
            checkpointing.save(manager, {"update": 2, "w": noise})
            manager.wait_until_finished()
        found = checkpointing.restore(manager, counted_state(0))
        assert_same(found, counted_state(1, 5.0))
        assert checkpointing.save(manager, {"update": 2, "w": noise})
    with manager_of(tmp_path) as manager:
        assert manager.all_steps() == [2]


def test_no_implicit_transfers(tmp_path):
    """`jax.transfer_guard("disallow")` finds none."""
    state = {
        "update": jnp.int32(1),
        "key": jax.random.key(0),
        "n": np.arange(3),
        "x": 2,
    }
    with manager_of(tmp_path) as manager, jax.transfer_guard("disallow"):
        checkpointing.save(manager, state, metrics={"loss": state["update"]})
        found = checkpointing.restore(manager, state)
    assert_same(found, state)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path):
    """Each file in turn: gone, cut off, or one bit of it another."""
    original = tmp_path / "original"
    state = {"update": 1, "w": jnp.asarray(np.random.default_rng(0).normal(size=4096))}
    with manager_of(original) as manager:
        checkpointing.save(manager, state, Rows(1))
        checkpointing.save(manager, state | {"update": 2}, data := Rows(2))
    seen = set()
    for i, path in enumerate(files_of(original / "2")):
        for damage in ("gone", "cut", "bit"):
            folder = tmp_path / f"{damage}-{i}"
            shutil.copytree(original, folder)
            victim = folder / path.relative_to(original)
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 1
            if damage == "gone":
                victim.unlink()
            else:
                part = content if damage == "bit" else content[: len(content) // 2]
                victim.write_bytes(bytes(part))
            with manager_of(folder) as manager:
                try:
                    found = checkpointing.restore(manager, state, data)
                except ValueError as error:
                    assert "Checkpoint 2 in" in str(error) and "damaged" in str(error)
                    seen.add((damage, path.parent.name))
                else:  # nothing that matters here
                    assert_same(found, state | {"update": 2})
    # The description, and the arrays: each in each way.
    for damage in ("gone", "cut", "bit"):
        assert {(damage, "jaxga"), (damage, "d")} <= seen
    folder = tmp_path / "fallback"
    shutil.copytree(original, folder)
    (folder / "2" / "state" / "manifest.ocdbt").unlink()
    with manager_of(folder) as manager:
        with pytest.raises(ValueError, match="Checkpoint 2 in .* is damaged"):
            checkpointing.restore(manager, state)
        with pytest.warns(UserWarning, match="(?s)Checkpoint 2 in .*An older one"):
            found = checkpointing.restore(manager, state, fallback=True)
        assert_same(found, state)
        assert manager.all_steps() == [1, 2]  # whoever only reads changes nothing
        assert checkpointing.save(manager, found | {"update": 2})
        manager.wait_until_finished()
    assert (folder / "2.unreadable").is_dir()
    with manager_of(folder) as manager:
        assert_same(checkpointing.restore(manager, state), state | {"update": 2})
    time.sleep(0.3)  # Orbax's other readers fail a moment later, in their own threads


@pytest.mark.parametrize(
    "dtype", ("float32", "bfloat16", "float8_e4m3fn", "int4", "bool", "complex64")
)
def test_fingerprints_know_an_array_wherever_it_lies(dtype):
    numbers = np.random.default_rng(0).integers(0, 2, size=(4, 3))
    numbers[0, :2] = 0, 1
    array = numbers.astype(jnp.dtype(dtype))
    known = fingerprint(array)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        sharding = NamedSharding(make_mesh(4, axis_type), P("data"))
        assert fingerprint(jax.device_put(array, sharding)) == known
    assert fingerprint(jnp.asarray(array)) == known
    assert fingerprint(np.concatenate([array, np.zeros_like(array)])) == known
    assert fingerprint(np.concatenate([np.zeros_like(array), array])) != known
    swapped = array.copy()
    swapped[0, :2] = array[0, 1::-1]
    assert fingerprint(swapped) != known
    for i in range(array.size):
        other = array.copy()
        other.flat[i] = 1 - numbers.flat[i]
        assert fingerprint(other) != known


def test_another_model_is_told_leaf_by_leaf(tmp_path):
    saved = {"step": 1, "a": jnp.ones(2), "b": jnp.ones((2, 3)), "c": jnp.ones(4)}
    saved["key"] = jax.random.key(0)
    like = {"step": 1, "a": jnp.ones(2), "b": jnp.ones((3, 2)), "d": jnp.ones(4)}
    like |= {"key": jax.random.key(0, impl="rbg")}
    with manager_of(tmp_path) as manager:
        checkpointing.save(manager, saved)
        checkpointing.save(manager, like, step=2)
        with pytest.raises(ValueError) as caught:
            checkpointing.restore(manager, like, step=1)
        lines = str(caught.value).splitlines()
        assert lines == [
            f"Checkpoint 1 in {tmp_path} is of another state:",
            "  missing: d",
            "  unexpected: c",
            "  b: float32 of shape (2, 3) in the checkpoint, "
            "float32 of shape (3, 2) in the state",
            "  key: key<threefry2x32> of shape () in the checkpoint, "
            "key<rbg> of shape () in the state",
        ]
        with pytest.warns(UserWarning, match="Checkpoint 2 in .* another state"):
            found = checkpointing.restore(manager, saved, fallback=True)
        assert_same(found, saved)
        half = saved | {"a": jnp.ones(2, jnp.bfloat16)}
        with pytest.raises(ValueError, match="a: float32 of .*bfloat16 of shape"):
            checkpointing.restore(manager, half, step=1)
        many = {"step": 1} | {f"x{i}": jnp.ones(1) for i in range(30)}
        with pytest.raises(ValueError, match="\n  and 14 more$"):
            checkpointing.restore(manager, many, step=1)
        with pytest.raises(ValueError, match="(?s)No checkpoint .* 2 in .* 1 in "):
            checkpointing.restore(manager, many, fallback=True)


def test_what_others_have_saved_is_refused(tmp_path):
    state = counted_state(1)
    with manager_of(tmp_path / "other") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardSave(state))
        manager.save(1, args=args)
        with pytest.raises(ValueError, match="not saved by jaxga.checkpointing"):
            checkpointing.restore(manager, state)
    with manager_of(tmp_path / "empty") as manager:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint: there are \[\]"):
            checkpointing.restore(manager, state)


# ---- What is refused -----------------------------------------------------------------


def deleted():
    array = jnp.ones(2)
    array.delete()
    return {"x": array}


def shaped():
    return {"x": jax.ShapeDtypeStruct((2,), jnp.float32)}


UNFIT = types.SimpleNamespace(get_state=lambda: {"a": [{3: 4}]})
REFUSED = {  # what is saved besides {"update": 1}, or instead; the data; the error
    "array": (lambda: jnp.ones(3), None, TypeError, "of shape .*be a tree of arrays"),
    "nothing": (lambda: (), None, TypeError, "must be a tree of arrays"),
    "no count": (lambda: [jnp.ones(1)], None, ValueError, "no `update` or.*Pass step="),
    "two counts": (lambda: {"step": 2}, None, ValueError, "several: step, update. P"),
    "word": (lambda: {"x": "word"}, None, TypeError, "x is 'word' of type str; it mu"),
    "large": (lambda: {"x": 2**70}, None, TypeError, "x is 1180.* of type int; it mu"),
    "deleted": (deleted, None, ValueError, "x has been deleted: a step took over"),
    "shape": (shaped, None, TypeError, "x is ShapeDtypeStruct.*shape without values"),
    "name": (
        lambda: {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}},
        None,
        ValueError,
        "several leaves of the name 'a.b'",
    ),
    "negative": (
        lambda: {"update": -1},
        None,
        ValueError,
        "step=-1 must be an integer",
    ),
    "data": (dict, iter([]), TypeError, "list_iterator, has no get_state"),
    "position": (
        dict,
        UNFIT,
        TypeError,
        r"get_state\(\)\['a'\]\[0\] is {3: 4} of type",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_save_refuses(tmp_path, case):
    make, data, error, message = REFUSED[case]
    state = make()
    if isinstance(state, dict):
        state = {"update": 1} | state
    with manager_of(tmp_path) as manager:
        with pytest.raises(error, match=message):
            checkpointing.save(manager, state, data)
        assert manager.all_steps() == []
        assert checkpointing.save(manager, counted_state(1))


def test_restore_refuses(tmp_path):
    state = counted_state(1)
    with pytest.raises(TypeError, match="must be an orbax.checkpoint.CheckpointM"):
        checkpointing.save(tmp_path, state)
    with pytest.raises(TypeError, match="must be an orbax.checkpoint.CheckpointM"):
        checkpointing.restore(tmp_path, state)
    with manager_of(tmp_path) as manager:
        checkpointing.save(manager, state)
        with pytest.raises(ValueError, match="no position for data: it was saved with"):
            checkpointing.restore(manager, state, Rows(1))
        with pytest.raises(TypeError, match="list_iterator, has no set_state"):
            checkpointing.restore(manager, state, iter([]))
        with pytest.raises(TypeError, match="fallback='no' must be True or False"):
            checkpointing.restore(manager, state, fallback="no")


def test_any_position_comes_back_exactly(tmp_path):
    position = {
        "generator": np.random.Philox(3).state,
        "torch": b"\x80\x00",
        "large": 2**130,
        "nested": [(), {}, [1.5, float("inf"), None, True, np.int64(3)]],
    }
    found = []
    data = types.SimpleNamespace(get_state=lambda: position, set_state=found.append)
    with manager_of(tmp_path) as manager:
        checkpointing.save(manager, counted_state(1), data)
        checkpointing.restore(manager, counted_state(1), data)
    assert repr(found) == repr([position])


# ---- Killed --------------------------------------------------------------------------

UPDATES, CALLS_OF_KILLED = 10, 3


def train(state, call, data, calls=0, after_call=lambda state, calls: None):
    while calls < CALLS_OF_KILLED * UPDATES:
        state, calls = call(state, next(data)), calls + 1
        after_call(state, calls)
    return [digest(state), data.next]


def train_process(folder):
    """Goes on from what is in the folder; every call is saved, most within a cycle."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_compilation_cache_dir", f"{folder}-compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    state, call = on_devices(4, accum_steps=CALLS_OF_KILLED)
    data, calls = Rows(8), 0
    with manager_of(folder, max_to_keep=2) as manager:

        def save(state, calls):
            assert checkpointing.save(manager, state, data, step=calls)

        if manager.latest_step() is not None:
            state, calls = checkpointing.restore(manager, state, data), data.next // 8
        found = train(state, call, data, calls, save)
    print(json.dumps(found), flush=True)


def digest(state):
    arrays = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return base64.b64encode(b"".join(arrays)).decode()


def launch(*args):
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, args)],
        # As this process, or the numbers differ in the last bit.
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def names_in(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def kill_when(process, folder, is_time):
    """By SIGKILL, the moment that the folder looks so."""
    before = names_in(folder)
    while not is_time(names_in(folder) - before):
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def is_inside_a_save(new):
    return any("tmp" in name for name in new)


def is_after(number):
    """As many more are whole; a moment later, at that."""
    return lambda new: sum(name.isdigit() for name in new) >= number


def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    expected = train(*on_devices(4, accum_steps=CALLS_OF_KILLED), Rows(8))
    assert expected[1] == 8 * CALLS_OF_KILLED * UPDATES
    reached, torn = [], 0
    for moment in (is_inside_a_save, is_after(2), is_inside_a_save):
        kill_when(launch("train", tmp_path), tmp_path, moment)
        with ocp.CheckpointManager(tmp_path) as manager:
            reached.append(manager.latest_step() or 0)
            torn += any("tmp" in name for name in names_in(tmp_path))
    last = CALLS_OF_KILLED * UPDATES
    assert torn and reached == sorted(reached) and 0 < reached[-1] < last
    assert finished(launch("train", tmp_path)) == expected


# ---- Several processes ---------------------------------------------------------------


def many_processes(port, process, folder):
    """One of two: ends the cycle that one process began, then begins one itself."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    like, call = on_mesh(jax.make_mesh((4,), ("data",), (AxisType.Auto,)))
    folder, whole = pathlib.Path(folder), None
    with manager_of(folder / "one") as manager:
        found = checkpointing.restore(manager, like, data := Rows(ROWS))
        found = to_the_end(found, call, data)
        whole = jax.tree.map(lambda x: np.asarray(x).tolist(), found[0])
    state, data = half_a_cycle((like, call))
    refused = ""
    with manager_of(folder / "two") as manager:
        try:
            checkpointing.save(manager, {"step": 1, "local": jnp.ones(2)})
        except ValueError as error:
            refused = str(error)
        checkpointing.save(manager, state, data)
    data.next += int(process)
    with manager_of(folder / "unequal") as manager:
        checkpointing.save(manager, state, data)
        checkpointing.restore(manager, like, again := Rows(ROWS))
    print(json.dumps([whole, refused, again.next - data.next]), flush=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_and_one(tmp_path):
    state, data = half_a_cycle(on_devices(8))
    with manager_of(tmp_path / "one") as manager:
        checkpointing.save(manager, state, data)
    port = free_port()
    processes = [launch("processes", port, i, tmp_path) for i in range(2)]
    try:
        results = [finished(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for i, (whole, refused, apart) in enumerate(results):
        whole = jax.tree.map(
            lambda want, got: np.asarray(got, want.dtype), make_params(), whole
        )
        assert gradient_error(whole) < 1e-6
        assert f"local lies on devices of process {i} alone" in refused
        assert apart == 0  # each its own position
    like, call = on_devices(1)
    with manager_of(tmp_path / "two") as manager:
        found = checkpointing.restore(manager, like, data := Rows(ROWS))
    assert gradient_error(to_the_end(found, call, data)[0]) < 1e-6
    with manager_of(tmp_path / "unequal") as manager:
        checkpointing.restore(manager, like)
        with pytest.raises(ValueError, match="2 processes, at different positions"):
            checkpointing.restore(manager, like, data)


if __name__ == "__main__":
    roles = {"train": train_process, "processes": many_processes}
    roles[sys.argv[1]](*sys.argv[2:])
