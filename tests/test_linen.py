"""Flax linen: its own train state, batch norm, dropout, subclasses."""

import functools
from typing import Any

import flax
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
from problems import distance, make_mesh, truth

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


def test_bfloat16_parameters_and_their_optimizer_keep_their_dtypes():
    """Though the gradient is float32: or else the second step would be traced anew."""
    traces = []

    def traced(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    def dtypes(state):
        return [leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))]

    state = make_state(optax.adam(1e-2))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params)
    state = state.replace(params=params, opt_state=state.tx.init(params))
    step, expected = jaxga.linen.make_train_step(traced, accum_steps=3), dtypes(state)
    for _ in range(3):
        state, _ = step(state, BATCH)
        assert dtypes(state) == expected
    assert len(traces) == 1


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


# Random numbers row by row.


def drop_per_example(apply):
    def dropped(params, batch, key):
        predicted = apply(
            {"params": params}, batch["x"], train=True, rngs={"dropout": key}
        )
        return jaxga.WeightedSum.of((predicted - batch["y"]) ** 2, where=batch["mask"])

    return dropped


def grads_of_dropout(apply, accum_steps, parallel=None, **settings):
    """Of SGD at rate 1, the change of the parameters is the gradient."""
    step = jaxga.linen.make_train_step(
        drop_per_example(apply),
        accum_steps=accum_steps,
        parallel=parallel,
        donate=False,
        **settings,
    )
    state = make_state(optax.sgd(1.0))
    after, _ = step(state, BATCH, key=jax.random.key(5))
    return jax.tree.map(jnp.subtract, state.params, after.params)


def test_per_example_dropout_is_the_same_however_the_batch_is_cut():
    apply = jaxga.linen.per_example(Net().apply)
    alone = grads_of_dropout(apply, 1, per_example_keys=True)
    parallel = jaxga.DataParallel(make_mesh(4))
    for accum_steps, devices in ((4, None), (3, parallel)):
        grads = grads_of_dropout(apply, accum_steps, devices, per_example_keys=True)
        assert distance(grads, alone) <= 1e-6
    cut = grads_of_dropout(Net().apply, 4)
    assert distance(cut, grads_of_dropout(Net().apply, 1)) > 0.1  # one key for many


def test_per_example_is_the_module_on_each_row_with_its_key():
    variables = {"params": make_state().params}
    keys = jax.random.split(jax.random.key(0), 48)
    apply = jaxga.linen.per_example(Net().apply)
    rows = apply(variables, X, train=True, rngs={"dropout": keys})
    for i in (0, 7):
        alone = Net().apply(
            variables, X[i : i + 1], train=True, rngs={"dropout": keys[i]}
        )
        np.testing.assert_allclose(rows[i], alone[0], rtol=1e-6)
    same = apply(variables, np.tile(X[:1], (48, 1)), train=True, rngs={"dropout": keys})
    assert same.shape == (48,) and len(set(np.asarray(same).tolist())) > 2


def test_per_example_hands_collections_back_row_by_row():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x, *, scale, flip):
            self.sow("seen", "x", x)
            return {"out": -x * scale if flip else x}

    keys = jax.random.split(jax.random.key(0), 48)
    out, collections = jaxga.linen.per_example(Sowing().apply)(
        {}, X, scale=2 * X, flip=True, rngs={"dropout": keys}, mutable="seen"
    )
    np.testing.assert_array_equal(out["out"], -2 * X * X)
    assert collections["seen"]["x"][0].shape == (48, 1, 5)


@pytest.mark.parametrize(
    "rngs, words",
    (
        ({"dropout": jax.random.key(0)}, "one key per row"),
        ({"dropout": jax.random.PRNGKey(0)}, "one key per row"),
        ({"dropout": np.ones(48)}, "must be random keys"),
        ({}, "one key per row"),
        ({"dropout": jax.random.split(jax.random.key(0), 6)}, "keys for 6 rows"),
    ),
    ids=("single", "raw", "floats", "none", "too_few"),
)
def test_per_example_refuses_other_keys(rngs, words):
    apply = jaxga.linen.per_example(Net().apply)
    with pytest.raises((TypeError, ValueError), match=words):
        apply({"params": make_state().params}, X, train=True, rngs=rngs)


def test_per_example_refuses_a_module():
    with pytest.raises(TypeError, match="give model.apply"):
        jaxga.linen.per_example(3)


# fp8: scales and histories that are overwritten with their gradient.


class Fp8Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, dot_general_cls=nn.Fp8DotGeneral)(x))
        return nn.Dense(16, dot_general_cls=nn.Fp8DotGeneral)(x)[..., 0]


# Rows of very different size: the largest is in one micro-batch, on one device.
FP8_X = (
    np.random.default_rng(0).normal(size=(48, 16)) * np.linspace(0.1, 3, 48)[:, None]
)
FP8_X = FP8_X.astype(np.float32)


def fp8_loss(params, x):
    return jaxga.WeightedSum.of((Fp8Net().apply(params, x) - 1) ** 2)


def fp8_state(tx):
    variables = jax.jit(Fp8Net().init)(jax.random.key(0), FP8_X)
    return TrainState.create(apply_fn=None, params=variables, tx=tx)


def fp8_on_the_full_batch(state):
    """Flax's own step, with the gradient of the sum; parameters by its mean."""

    @jax.jit
    def step(state):
        grads = jax.grad(lambda params: fp8_loss(params, FP8_X).total)(state.params)
        means = jax.tree.map(lambda x: x / 48, grads["params"])
        return state.apply_gradients(grads={**grads, "params": means})

    for _ in range(3):
        state = step(state)
    return state


def test_fp8_is_as_the_full_batch_leaves_it():
    tx = optax.adam(1e-2, eps=1e-3)
    expected = fp8_on_the_full_batch(fp8_state(tx))
    parallel = jaxga.DataParallel(make_mesh(4))
    step = jaxga.linen.make_train_step(fp8_loss, accum_steps=3, parallel=parallel)
    state = fp8_state(tx)
    first = jax.tree.map(np.asarray, state.params)
    for _ in range(3):
        state, metrics = step(state, FP8_X)
    assert distance(state.params["params"], expected.params["params"]) <= 1e-6
    key = "_overwrite_with_gradient"
    jax.tree.map(np.testing.assert_array_equal, state.params[key], expected.params[key])
    for name, leaf in state.params[key]["Dense_1"]["Fp8DirectDotGeneralOp_0"].items():
        old = first[key]["Dense_1"]["Fp8DirectDotGeneralOp_0"][name]
        assert not np.array_equal(leaf, old), name
    # Of the parameters alone: histories are no gradient.
    grad = jax.jit(jax.grad(lambda params: fp8_loss(params, FP8_X).total))
    grads = grad(expected.params)
    _, metrics = step(state, FP8_X)
    norm = optax.tree.norm(grads["params"]) / 48
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def test_fp8_in_a_skipped_cycle_and_over_several_calls():
    bad = FP8_X.copy()
    bad[5] = np.nan
    step = jaxga.linen.make_train_step(fp8_loss, accum_steps=3, donate=False)
    state = fp8_state(optax.adam(1e-2))
    after, metrics = step(state, bad)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    # One call per micro-batch: parameters move at the last, histories at each.
    state = fp8_state(jaxga.accumulate(optax.sgd(0.1), 2))
    first, _ = step(state, FP8_X)
    jax.tree.map(
        np.testing.assert_array_equal, first.params["params"], state.params["params"]
    )
    second, metrics = step(first, FP8_X)
    assert metrics["update"] == 1
    kernels = [s.params["params"]["Dense_0"]["kernel"] for s in (second, state)]
    assert distance(*kernels) > 1e-3
    name = "_overwrite_with_gradient"
    histories = [
        s.params[name]["Dense_0"]["Fp8DirectDotGeneralOp_0"]["input_amax_history"]
        for s in (first, second)
    ]
    assert [int((h > 0).sum()) for h in histories] == [1, 2]


def test_fp8_beside_batch_statistics():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16, dot_general_cls=nn.Fp8DotGeneral)(x)
            return nn.BatchNorm(use_running_average=False)(x)[..., 0]

    def both_loss(params, x, model_state):
        out, new = Both().apply({**params, **model_state}, x, mutable="batch_stats")
        return jaxga.LossOutput(jaxga.WeightedSum.of(out**2), model_state=new)

    variables = dict(jax.jit(Both().init)(jax.random.key(0), FP8_X))
    stats = variables.pop("batch_stats")
    state = NormState.create(
        apply_fn=None, params=variables, tx=optax.sgd(0.1), batch_stats=stats
    )
    step = jaxga.linen.make_train_step(
        both_loss,
        mutable=("batch_stats",),
        accum_steps=3,
        model_state_merge="batch_norm",
    )
    expected = both_loss(variables, FP8_X, {"batch_stats": stats}).model_state
    state, _ = step(state, FP8_X)
    assert distance(state.batch_stats, expected["batch_stats"]) <= 1e-6
    assert "_overwrite_with_gradient" in state.params


# The rest of linen.


class Block(nn.Module):
    """Normalises by batch, drops out, and is scanned over and rematerialised."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return x + nn.Dropout(0.5, deterministic=not train)(nn.relu(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        layers = nn.scan(
            nn.remat(Block, static_argnums=(2,)),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=3,
        )
        x = nn.Dense(8, use_bias=False)(x)
        return layers()(x, train)[0].sum(-1)


def test_scanned_rematerialised_layers_with_dropout_and_batch_statistics():
    model = Stack()
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(model.init, static_argnums=2)(rngs, X, True)

    def stack_loss(params, batch, model_state, key):
        variables = {"params": params, **model_state}
        rngs = {"dropout": key}
        out, new = model.apply(
            variables, batch["x"], True, rngs=rngs, mutable="batch_stats"
        )
        loss = jaxga.WeightedSum.of((out - batch["y"]) ** 2)
        return jaxga.LossOutput(loss, model_state=new)

    state = NormState.create(
        apply_fn=None,
        params=variables["params"],
        tx=optax.sgd(1.0),
        batch_stats=variables["batch_stats"],
    )
    step = jaxga.linen.make_train_step(
        stack_loss, mutable=["batch_stats"], accum_steps=3, donate=False
    )
    key = jax.random.key(2)
    after, _ = step(state, BATCH, key=key)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def microbatch(params, rows, stats, key):
        output = stack_loss(params, rows, stats, key)
        return output.loss.total, output.model_state

    # By hand: one after the other, the statistics carried along.
    stats, grads = {"batch_stats": state.batch_stats}, []
    for i in range(3):
        rows = jax.tree.map(lambda x, i=i: x[i::3], BATCH)
        folded = jax.random.fold_in(jax.random.fold_in(key, 0), i)
        part, stats = microbatch(state.params, rows, stats, folded)
        grads.append(part)
    expected = jax.tree.map(lambda *parts: sum(parts) / 48, *grads)
    change = jax.tree.map(jnp.subtract, state.params, after.params)
    assert distance(change, expected) <= 1e-6
    assert distance(after.batch_stats, stats["batch_stats"]) <= 1e-6


class CacheState(TrainState):
    cache: Any = None
    batch_stats: Any = None


def test_several_mutable_collections_each_by_its_rule():
    class Caching(nn.Module):
        @nn.compact
        def __call__(self, x):
            largest = self.variable("cache", "largest", lambda: jnp.zeros(5))
            calls = self.variable("cache", "calls", lambda: jnp.zeros((), jnp.int32))
            if not self.is_initializing():
                largest.value = jnp.maximum(largest.value, x.max(0))
                calls.value += 1
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
            return x.sum(-1)

    def caching_loss(params, batch, model_state):
        variables = {"params": params, **model_state}
        out, new = Caching().apply(
            variables, batch["x"], mutable=["cache", "batch_stats"]
        )
        return jaxga.LossOutput(
            jaxga.WeightedSum.of((out - batch["y"]) ** 2), model_state=new
        )

    variables = dict(jax.jit(Caching().init)(jax.random.key(0), X))
    params = variables.pop("params")
    state = CacheState.create(
        apply_fn=None, params=params, tx=optax.sgd(0.1), **variables
    )
    step = jaxga.linen.make_train_step(
        caching_loss,
        mutable=("cache", "batch_stats"),
        accum_steps=3,
        model_state_merge={"cache": "max", "batch_stats": "batch_norm"},
        parallel=jaxga.DataParallel(make_mesh(4)),
        donate=False,
    )
    after, _ = step(state, BATCH)
    np.testing.assert_array_equal(after.cache["largest"], np.maximum(X.max(0), 0))
    assert after.cache["calls"] == 1
    full = caching_loss(params, BATCH, variables).model_state
    assert distance(after.batch_stats, full["batch_stats"]) <= 1e-6


def test_partitioned_parameters_on_devices():
    """`nn.with_partitioning` boxes, and `nn.with_logical_partitioning`."""
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types, devices=devices)

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.normal()
            first = nn.with_partitioning(init, (None, "model"))
            second = nn.with_logical_partitioning(init, ("embed", "out"))
            x = nn.relu(nn.Dense(8, kernel_init=first)(x))
            return nn.Dense(1, kernel_init=second)(x)[..., 0]

    def boxed_loss(params, batch):
        predicted = Boxed().apply({"params": params}, batch["x"])
        return jaxga.WeightedSum.of((predicted - batch["y"]) ** 2, where=batch["mask"])

    def boxed_mean(params, batch):
        losses = (Boxed().apply({"params": params}, batch["x"]) - batch["y"]) ** 2
        return jnp.where(batch["mask"], losses, 0).sum() / batch["mask"].sum()

    params = jax.jit(Boxed().init)(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0))
    step = jaxga.linen.make_train_step(
        boxed_loss,
        accum_steps=3,
        parallel=jaxga.DataParallel(mesh),
        donate=False,
    )
    after, _ = step(state, BATCH)
    change = jax.tree.map(jnp.subtract, params, after.params)
    assert distance(change, truth(boxed_mean, params, BATCH)[1]) <= 1e-6
    assert isinstance(after.params["Dense_0"]["kernel"], nn.Partitioned)
    assert after.params["Dense_1"]["kernel"].names == ("embed", "out")


def test_frozen_dicts_of_parameters():
    state = make_state()
    frozen = TrainState.create(
        apply_fn=None, params=flax.core.freeze(state.params), tx=state.tx
    )
    step = jaxga.linen.make_train_step(loss_fn, accum_steps=3, donate=False)
    after, _ = step(frozen, BATCH)
    expected, _ = step(state, BATCH)
    assert isinstance(after.params, flax.core.FrozenDict)
    assert distance(flax.core.unfreeze(after.params), expected.params) <= 1e-6
