"""Randomness: per micro-batch, or per row and then the same however a batch is cut."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from problems import (
    counted,
    distance,
    hidden,
    make_batch,
    make_mesh,
    make_params,
    split_over_devices,
)

pytestmark = pytest.mark.anywhere


def dropped(params, batch, key):
    """Dropout on the hidden layer, one key per row."""
    h = hidden(params, batch)
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.7, h.shape[1:]))(key)
    squares = jnp.where(keep, h, 0) @ params["out"]
    return jaxga.WeightedSum.of((squares**2).sum(-1), where=batch["mask"])


def make_cycle(accum_steps, **kwargs):
    cycle = jaxga.value_and_grad(
        dropped, accum_steps=accum_steps, per_example_keys=True, **kwargs
    )
    return lambda p, b: cycle(p, b, key=jax.random.key(5))


def reference():
    """The full batch in float64, each row with the key of its index."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(384))

    def mean(params):
        total = dropped(params, make_batch(), keys)
        return total.total / total.weight

    return jax.jit(jax.grad(mean))(make_params())


@pytest.mark.parametrize("accum_steps", (1, 6, 48))
def test_per_example_keys_do_not_depend_on_the_split(accum_steps):
    _, grads = jax.jit(make_cycle(accum_steps))(make_params(), make_batch())
    assert distance(grads, reference()) <= 1e-6


@pytest.mark.parametrize("num_devices, accum_steps", [(2, 48), (8, 1), (8, 6)])
@pytest.mark.parametrize("runner", ("pmap", "checked", "unchecked"))
def test_per_example_keys_do_not_depend_on_the_devices(
    runner, num_devices, accum_steps
):
    cycle = make_cycle(accum_steps, axis_name="data")
    if runner == "pmap":
        devices = jax.devices()[:num_devices]
        mapped = jax.pmap(
            cycle, "data", in_axes=(None, 0), out_axes=None, devices=devices
        )
        batch = split_over_devices(make_batch(), num_devices)
    else:
        checked = runner == "checked"
        specs = dict(in_specs=(P(), P("data")), out_specs=P(), check_vma=checked)
        mapped = jax.jit(jax.shard_map(cycle, mesh=make_mesh(num_devices), **specs))
        batch = make_batch()
    assert distance(mapped(make_params(), batch)[1], reference()) <= 1e-6


def test_per_example_keys_through_data_parallel_and_on_a_short_cycle():
    import optax

    tx = optax.sgd(1.0)
    parallel = jaxga.DataParallel(make_mesh(4))
    params = jax.tree.map(jnp.asarray, make_params())

    def moved(parallel, accum_steps, **kwargs):
        step = jaxga.make_train_step(
            dropped,
            tx,
            accum_steps=accum_steps,
            parallel=parallel,
            per_example_keys=True,
            donate=False,
        )
        state = jaxga.TrainState.create(params, tx)
        new, _ = step(state, make_batch(), key=jax.random.key(5), **kwargs)
        return jax.tree.map(lambda a, b: a - np.asarray(b), make_params(), new.params)

    assert distance(moved(parallel, 6), reference()) <= 2e-6
    assert (
        distance(
            moved(parallel, 6, num_microbatches=4), moved(None, 6, num_microbatches=4)
        )
        <= 2e-6
    )


def test_one_key_per_microbatch_and_device():
    def loss_fn(params, rows, key):
        draw = jax.random.uniform(key)
        return jaxga.LossOutput(
            jaxga.WeightedSum.of(params * rows), metrics=jaxga.Stack(draw)
        )

    cycle = jaxga.value_and_grad(loss_fn, accum_steps=3, axis_name="data")
    mapped = jax.pmap(
        lambda p, r: cycle(p, r, key=jax.random.key(1))[0].metrics,
        "data",
        in_axes=(None, 0),
        out_axes=None,
        devices=jax.devices()[:4],
    )
    draws = mapped(jnp.float32(1), np.ones((4, 6), np.float32))
    assert draws.shape == (12,)  # device by device
    assert len(np.unique(draws)) == 12
    alone = jaxga.value_and_grad(loss_fn, accum_steps=3)
    again = [
        alone(jnp.float32(1), np.ones(6, np.float32), key=jax.random.key(1))[0].metrics
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*again)


def test_old_style_keys():
    cycle = jaxga.value_and_grad(dropped, accum_steps=6, per_example_keys=True)
    _, grads = cycle(make_params(), make_batch(), key=jax.random.PRNGKey(5))
    assert distance(grads, reference()) <= 1e-6


def test_unmodified_linen_dropout_with_one_key_per_row():
    """The four lines that README gives for modules as they are."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.3, deterministic=False)(nn.Dense(8)(x))
            return nn.Dense(1)(x)[..., 0]

    model = Model()
    x = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    variables = model.init(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x
    )

    def loss_fn(params, x, key):
        def row(x, key):
            return model.apply({"params": params}, x[None], rngs={"dropout": key})[0]

        return jaxga.WeightedSum.of(jax.vmap(row)(x, key) ** 2)

    grads = [
        jax.jit(
            lambda p, x, n=accum_steps: jaxga.value_and_grad(
                loss_fn, accum_steps=n, per_example_keys=True
            )(p, x, key=jax.random.key(2))[1]
        )(variables["params"], x)
        for accum_steps in (1, 4, 12)
    ]
    assert distance(grads[1], grads[0]) <= 1e-6
    assert distance(grads[2], grads[0]) <= 1e-6


def test_key_per_microbatch_depends_on_the_split():
    """The control: what per-example keys are for."""

    def loss_fn(params, batch, key):
        mask = batch["mask"] & jax.random.bernoulli(key, 0.7, batch["mask"].shape)
        return counted(params, batch | {"mask": mask})

    grads = [
        jaxga.value_and_grad(loss_fn, accum_steps=n)(
            make_params(), make_batch(), key=jax.random.key(0)
        )[1]
        for n in (1, 6)
    ]
    assert distance(*grads) > 1e-2
