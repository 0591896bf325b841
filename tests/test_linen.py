"""Flax linen: its own train state, batch norm, dropout, subclasses."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import jaxga.linen
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from problems import distance, make_mesh

X = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
BATCH = {"x": X, "y": np.sin(X.sum(-1)), "mask": np.arange(48) % 7 != 3}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(1)(x)[..., 0]


def loss_fn(params, batch):
    predicted = Net().apply({"params": params}, batch["x"])
    losses = (predicted - batch["y"]) ** 2
    return jaxga.WeightedSum.of(losses, where=batch["mask"])


def make_state(tx=None, cls=TrainState, **kwargs):
    params = Net().init(jax.random.key(0), X)["params"]
    tx = tx or optax.adam(1e-2, eps=1e-3)
    return cls.create(apply_fn=Net().apply, params=params, tx=tx, **kwargs)


@pytest.mark.parametrize("num_devices", (None, 4))
def test_equals_apply_gradients_on_the_full_batch(num_devices):
    parallel = num_devices and jaxga.DataParallel(make_mesh(num_devices))
    step = jaxga.linen.make_train_step(loss_fn, accum_steps=3, parallel=parallel)
    state, expected = make_state(), make_state()
    state = parallel.shard_state(state) if parallel else state

    @jax.jit
    def plain(state):
        def mean(params):
            total = loss_fn(params, BATCH)
            return total.total / total.weight

        return state.apply_gradients(grads=jax.grad(mean)(state.params))

    for _ in range(3):
        state, metrics = step(state, BATCH)
        expected = plain(expected)
    assert distance(state.params, expected.params) <= 1e-6
    assert state.step == 3 and metrics["update"] == 3


@pytest.mark.parametrize("runner", ("pmap", "checked"))
def test_in_a_pmap_or_shard_map_of_the_callers_own(runner):
    step = jaxga.linen.make_train_step(loss_fn, accum_steps=3, axis_name="data")
    alone = jaxga.linen.make_train_step(loss_fn, accum_steps=3)
    expected, _ = alone(make_state(), BATCH)
    if runner == "pmap":
        mapped = jax.pmap(
            step, "data", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:4]
        )
        state, _ = mapped(
            make_state(), jax.tree.map(lambda x: x.reshape(4, 12, *x.shape[1:]), BATCH)
        )
    else:
        mapped = jax.shard_map(
            step, mesh=make_mesh(4), in_specs=(P(), P("data")), out_specs=P()
        )
        state, _ = jax.jit(mapped)(make_state(), BATCH)
    assert distance(state.params, expected.params) <= 1e-6


class NormNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(1)(nn.relu(x))[..., 0]


class NormState(TrainState):
    batch_stats: Any = None


def norm_loss(params, batch, model_state):
    predicted, new = NormNet().apply(
        {"params": params, **model_state}, batch["x"], train=True, mutable="batch_stats"
    )
    loss = jaxga.WeightedSum.of((predicted - batch["y"]) ** 2, where=batch["mask"])
    return jaxga.LossOutput(loss, model_state=new)


def make_norm_state(tx):
    variables = NormNet().init(jax.random.key(0), X, train=True)
    return NormState.create(
        apply_fn=NormNet().apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
    )


def test_batch_statistics_are_carried_and_written_back():
    step = jaxga.linen.make_train_step(
        norm_loss, mutable=("batch_stats",), accum_steps=3
    )
    state = make_norm_state(optax.sgd(0.0))
    stats = state.batch_stats
    for i in range(3):  # one after the other, by hand
        rows = jax.tree.map(lambda x, i=i: x[i::3], BATCH)
        stats = norm_loss(state.params, rows, {"batch_stats": stats}).model_state
        stats = stats["batch_stats"]
    state, _ = step(state, BATCH)
    assert distance(state.batch_stats, stats) <= 1e-6


def test_batch_statistics_with_one_microbatch_are_the_full_batchs():
    step = jaxga.linen.make_train_step(
        norm_loss, mutable=("batch_stats",), accum_steps=1, model_state_merge="mean"
    )
    state = make_norm_state(optax.sgd(0.0))
    full = norm_loss(state.params, BATCH, {"batch_stats": state.batch_stats})
    state, _ = step(state, BATCH)
    assert distance(state.batch_stats, full.model_state["batch_stats"]) <= 1e-6


def test_skipped_cycle_restores_batch_statistics():
    step = jaxga.linen.make_train_step(
        norm_loss, mutable=("batch_stats",), accum_steps=3, donate=False
    )
    state = make_norm_state(optax.adam(1e-2))
    bad = BATCH | {"y": np.where(np.arange(48) == 5, np.inf, BATCH["y"])}
    after, metrics = step(state, bad)
    assert metrics["skipped"] == 1 and after.step == 0
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_key_is_folded_with_the_step():
    def dropped(params, batch, key):
        predicted = Net().apply(
            {"params": params}, batch["x"], train=True, rngs={"dropout": key}
        )
        loss = jaxga.WeightedSum.of((predicted - batch["y"]) ** 2)
        return jaxga.LossOutput(loss, metrics={"key": jaxga.Stack(key_bits(key))})

    def key_bits(key):
        return jax.random.key_data(key)[..., 0].astype(jnp.float32)

    step = jaxga.linen.make_train_step(dropped, accum_steps=3)
    state, key = make_state(), jax.random.key(7)
    seen = []
    for _ in range(2):
        state, metrics = step(state, BATCH, key=key)
        seen.extend(np.asarray(metrics["key"]).tolist())
    assert len(set(seen)) == 6
    expected = jax.random.fold_in(jax.random.fold_in(key, 1), 2)
    assert seen[-1] == key_bits(expected)


class CountingState(TrainState):
    """A subclass with its own `apply_gradients`."""

    applied: Any = None

    def apply_gradients(self, *, grads, **kwargs):
        return super().apply_gradients(grads=grads, applied=self.applied + 1, **kwargs)


def test_subclass_keeps_its_own_apply_gradients():
    step = jaxga.linen.make_train_step(loss_fn, accum_steps=3)
    state = make_state(cls=CountingState, applied=jnp.int32(0))
    state, _ = step(state, BATCH)
    state, _ = step(state, BATCH)
    assert type(state) is CountingState and state.applied == 2 and state.step == 2


def test_partitioned_metadata_is_kept():
    class Partitioned(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
            return nn.Dense(1, kernel_init=init)(x)[..., 0]

    params = Partitioned().init(jax.random.key(0), X)["params"]
    assert isinstance(params["Dense_0"]["kernel"], nn.Partitioned)
    state = TrainState.create(
        apply_fn=Partitioned().apply, params=params, tx=optax.sgd(0.1)
    )

    def partitioned_loss(params, batch):
        predicted = Partitioned().apply({"params": params}, batch["x"])
        return jaxga.WeightedSum.of((predicted - batch["y"]) ** 2)

    step = jaxga.linen.make_train_step(partitioned_loss, accum_steps=3, donate=False)
    new, _ = step(state, BATCH)
    kernel = new.params["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == (None, "model")
    assert not np.allclose(kernel.value, state.params["Dense_0"]["kernel"].value)


def test_one_trace_over_a_run_with_short_cycles():
    traces = []

    def traced(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    step = jaxga.linen.make_train_step(traced, accum_steps=3)
    state = make_state()
    for num in (3, 1, 2):
        state, _ = step(state, BATCH, num_microbatches=np.int32(num))
    assert len(traces) == 1
