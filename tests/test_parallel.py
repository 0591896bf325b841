"""DataParallel, and the caller's own tensor parallelism beside a data axis."""

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxga import collectives
from problems import (
    LOSSES,
    counted,
    counted_mean,
    distance,
    make_batch,
    make_mesh,
    make_params,
    truth,
)

TX = optax.sgd(1.0)
TENSOR_SPECS = {
    "embed": P(),
    "hidden": {"w": P(None, "model"), "b": P("model")},
    "out": P("model", None),
}


def moved_by(step, state, batch):
    """What SGD with rate 1 subtracted: the gradient."""
    before = jax.tree.map(np.asarray, state.params)
    new, _ = step(state, batch)
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, new.params)


@pytest.mark.parametrize(
    ("num_devices", "axis_type"),
    [
        *(pytest.param(n, AxisType.Auto, marks=pytest.mark.anywhere) for n in (1, 2)),
        *((4, AxisType.Auto), (8, AxisType.Auto), (8, AxisType.Explicit)),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_float64_full_batch(name, num_devices, axis_type):
    parallel = jaxga.DataParallel(make_mesh(num_devices, axis_type))
    step = jaxga.make_train_step(LOSSES[name][0], TX, accum_steps=6, parallel=parallel)
    state = parallel.shard_state(jaxga.TrainState.create(make_params(), TX))
    actual = moved_by(step, state, parallel.shard_batch(make_batch()))
    _, grads = truth(LOSSES[name][1], make_params(), make_batch())
    assert distance(actual, grads) <= 1e-6


def test_bfloat16_parameters_on_devices():
    """Sums are in float32: the error is that of one micro-batch's gradient."""
    parallel = jaxga.DataParallel(make_mesh(8))
    tx = optax.trace(decay=0.0)  # its state is the gradient that it was given
    params = jax.tree.map(jnp.asarray, make_params(jnp.bfloat16))
    step = jaxga.make_train_step(counted, tx, accum_steps=6, parallel=parallel)
    state = parallel.shard_state(jaxga.TrainState.create(params, tx))
    new, _ = step(state, make_batch())
    _, grads = truth(counted_mean, make_params(jnp.bfloat16), make_batch())
    assert distance(new.opt_state.trace, grads) <= 2e-2


@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit))
def test_takes_a_batch_from_the_host(axis_type):
    parallel = jaxga.DataParallel(make_mesh(8, axis_type))
    step = jaxga.make_train_step(counted, TX, accum_steps=6, parallel=parallel)
    state = parallel.shard_state(jaxga.TrainState.create(make_params(), TX))
    actual = moved_by(step, state, make_batch())
    assert distance(actual, truth(counted_mean, make_params(), make_batch())[1]) <= 1e-6


def test_shard_state_and_batch_and_init():
    parallel = jaxga.DataParallel(make_mesh(8))
    assert parallel.num_devices == 8
    batch = parallel.shard_batch({"x": np.arange(16)})
    assert batch["x"].sharding.spec == P("data")
    np.testing.assert_array_equal(batch["x"].addressable_shards[3].data, [6, 7])
    state = parallel.init(lambda key: jax.random.normal(key, (3,)), jax.random.key(0))
    assert state.sharding.is_fully_replicated and len(state.sharding.device_set) == 8
    planned = parallel.shard_state(jax.eval_shape(lambda: jnp.zeros((4, 2))))
    assert planned.shape == (4, 2) and planned.sharding.mesh == parallel.mesh


@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit))
def test_further_arguments_may_lie_over_the_data_axis(axis_type):
    def loss_fn(params, batch, scale):
        return jaxga.WeightedSum.of(params * batch * scale.sum())

    mesh = make_mesh(4, axis_type)
    parallel = jaxga.DataParallel(mesh)
    step = jaxga.make_train_step(loss_fn, TX, accum_steps=2, parallel=parallel)
    state = parallel.shard_state(jaxga.TrainState.create(jnp.float32(0), TX))
    scale = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    state, _ = step(state, np.ones(8, np.float32), scale)
    assert state.params == -28


def test_two_data_axes():
    mesh = jax.make_mesh((4, 2), ("replica", "fsdp"), (AxisType.Auto,) * 2)
    parallel = jaxga.DataParallel(mesh, axis=("replica", "fsdp"))
    step = jaxga.make_train_step(counted, TX, accum_steps=6, parallel=parallel)
    state = parallel.shard_state(jaxga.TrainState.create(make_params(), TX))
    actual = moved_by(step, state, parallel.shard_batch(make_batch()))
    assert distance(actual, truth(counted_mean, make_params(), make_batch())[1]) <= 1e-6


def test_loss_may_use_the_axis_on_one_device_too():
    def loss_fn(params, batch):
        assert lax.axis_size("data") in (1, 8)
        losses = params * batch - lax.pmean(batch.mean(), "data")
        return jaxga.WeightedSum.of(losses**2)

    results = []
    for num_devices in (1, 8):
        parallel = jaxga.DataParallel(make_mesh(num_devices))
        step = jaxga.make_train_step(loss_fn, TX, accum_steps=1, parallel=parallel)
        state = jaxga.TrainState.create(jnp.float32(2), TX)
        state, metrics = step(
            parallel.shard_state(state), np.arange(16, dtype=np.float32)
        )
        results.append((state.params, metrics["loss"]))
    np.testing.assert_allclose(*results, rtol=1e-6)


# Tensor parallelism of the caller's own, beside the data axis.


def tensor_parallel_loss(params, batch):
    """Columns of the hidden layer on each device; the sum over them is ours."""
    h = params["embed"][batch["inputs"]] @ params["hidden"]["w"]
    h = jnp.tanh(h + params["hidden"]["b"][None, None])
    logits = lax.psum(h @ params["out"], "model")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jaxga.WeightedSum.of(losses, where=batch["mask"])


def explicit_loss(params, batch):
    """The same with axes of explicit type: shardings are said where unclear."""
    h = params["embed"].at[batch["inputs"]].get(out_sharding=P(None, None, None))
    h = jnp.tanh(h @ params["hidden"]["w"] + params["hidden"]["b"][None, None])
    logits = jnp.einsum(
        "btd,dv->btv", h, params["out"], out_sharding=P(None, None, None)
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jaxga.WeightedSum.of(losses, where=batch["mask"])


def tensor_mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)


def shard_params(mesh):
    def place(param, spec):
        return jax.device_put(param, NamedSharding(mesh, spec))

    return jax.tree.map(place, make_params(), TENSOR_SPECS)


def check_gradients_and_collectives(mapped, params, batch):
    _, grads = jax.jit(mapped)(params, batch)
    expected = truth(counted_mean, make_params(), make_batch())[1]
    assert distance(jax.device_get(grads), expected) <= 1e-6
    found = collectives(jax.jit(mapped).lower(params, batch).compile())
    shard = sum(p.nbytes for p in jax.tree.leaves(make_params())) // 2
    outside = [c for c in found if not c.in_loop and c.kind == "all-reduce"]
    assert any(c.in_loop for c in found)  # the model's own
    assert sum(c.bytes for c in outside) <= 2 * shard + 16
    return grads


def test_beside_manual_tensor_parallelism():
    cycle = jaxga.value_and_grad(tensor_parallel_loss, accum_steps=6, axis_name="data")
    mapped = jax.shard_map(
        cycle,
        mesh=tensor_mesh(AxisType.Auto),
        in_specs=(TENSOR_SPECS, P("data")),
        out_specs=(P(), TENSOR_SPECS),
    )
    check_gradients_and_collectives(mapped, make_params(), make_batch())


def test_beside_explicit_tensor_parallelism():
    mesh = tensor_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        cycle = jaxga.value_and_grad(explicit_loss, accum_steps=6, axis_name="data")
        mapped = jax.shard_map(
            cycle, in_specs=(P(), P("data")), out_specs=P(), axis_names={"data"}
        )
        batch = jax.device_put(make_batch(), NamedSharding(mesh, P("data")))
        grads = check_gradients_and_collectives(mapped, shard_params(mesh), batch)
        assert jax.typeof(grads["out"]).sharding.spec == P("model", None)


@pytest.mark.parametrize("check_vma", (True, False))
def test_beside_automatic_tensor_parallelism(check_vma):
    mesh = tensor_mesh(AxisType.Auto)
    cycle = jaxga.value_and_grad(counted, accum_steps=6, axis_name="data")
    mapped = jax.shard_map(
        cycle,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        axis_names={"data"},
        check_vma=check_vma,
    )
    check_gradients_and_collectives(mapped, shard_params(mesh), make_batch())


@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit))
def test_data_parallel_beside_tensor_parallelism(axis_type):
    mesh = tensor_mesh(axis_type)
    parallel = jaxga.DataParallel(mesh)
    loss_fn = counted if axis_type == AxisType.Auto else explicit_loss
    with jax.set_mesh(mesh):
        step = jaxga.make_train_step(loss_fn, TX, accum_steps=6, parallel=parallel)
        state = parallel.shard_state(jaxga.TrainState.create(shard_params(mesh), TX))
        before = jax.device_get(state.params)
        new, _ = step(state, parallel.shard_batch(make_batch()))
    actual = jax.tree.map(lambda a, b: a - np.asarray(b), before, new.params)
    assert distance(actual, truth(counted_mean, make_params(), make_batch())[1]) <= 1e-6
    shard = new.params["out"].addressable_shards[0].data
    assert shard.shape == (4, 11), "the parameters stay sharded"
