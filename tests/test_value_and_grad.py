"""The gradient of a cycle is that of the full batch, however it is cut."""

import functools

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from problems import (
    LOSSES,
    counted,
    counted_mean,
    distance,
    make_batch,
    make_mesh,
    make_params,
    split_over_devices,
    three_terms,
    three_terms_mean,
    truth,
)

BOUND = 1e-6


@functools.cache
def true_loss_and_grads(name):
    return truth(LOSSES[name][1], make_params(), make_batch())


def under_jit(cycle, num_devices):
    return jax.jit(cycle)(make_params(), make_batch())


def under_pmap(cycle, num_devices):
    devices = jax.devices()[:num_devices]
    mapped = jax.pmap(
        cycle, axis_name="data", in_axes=(None, 0), out_axes=None, devices=devices
    )
    return mapped(make_params(), split_over_devices(make_batch(), num_devices))


def under_shard_map(cycle, num_devices, check_vma):
    mapped = jax.shard_map(
        cycle,
        mesh=make_mesh(num_devices),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(make_params(), make_batch())


RUNNERS = {
    "pmap": under_pmap,
    "shard_map": functools.partial(under_shard_map, check_vma=True),
    "shard_map_unchecked": functools.partial(under_shard_map, check_vma=False),
}


@pytest.mark.parametrize("accum_steps", (1, 6, 48))
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_float64_full_batch(name, accum_steps):
    loss, grads = true_loss_and_grads(name)
    cycle = jaxga.value_and_grad(LOSSES[name][0], accum_steps=accum_steps)
    output, actual = under_jit(cycle, 1)
    assert distance(actual, grads) <= BOUND
    np.testing.assert_allclose(output.loss, loss, rtol=BOUND)


@pytest.mark.long
@pytest.mark.parametrize("accum_steps", (1, 3, 48))
@pytest.mark.parametrize("num_devices", (1, 4, 8))
@pytest.mark.parametrize("runner", RUNNERS)
def test_equals_the_float64_full_batch_on_devices(runner, num_devices, accum_steps):
    loss, grads = true_loss_and_grads("counted")
    cycle = jaxga.value_and_grad(counted, accum_steps=accum_steps, axis_name="data")
    output, actual = RUNNERS[runner](cycle, num_devices)
    assert distance(actual, grads) <= BOUND
    np.testing.assert_allclose(output.loss, loss, rtol=BOUND)
    assert output.weight == make_batch()["mask"].sum()


@pytest.mark.parametrize("num_devices, accum_steps", [(8, 6)])
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_on_devices(name, runner, num_devices, accum_steps):
    loss, grads = true_loss_and_grads(name)
    cycle = jaxga.value_and_grad(
        LOSSES[name][0], accum_steps=accum_steps, axis_name="data"
    )
    output, actual = RUNNERS[runner](cycle, num_devices)
    assert distance(actual, grads) <= BOUND
    np.testing.assert_allclose(output.loss, loss, rtol=BOUND)


def test_some_microbatches_and_devices_have_no_token_at_all():
    mask = make_batch()["mask"]
    assert (mask.reshape(-1, 48, 6).sum((0, 2)) == 0).sum() == 8
    on_devices = mask.reshape(8, -1, 6, 6).sum((1, 3))  # of device d, micro-batch i
    assert (on_devices == 0).any() and len(np.unique(on_devices)) > 10


def test_microbatch_size_is_the_other_way_to_say_it():
    _, grads = true_loss_and_grads("counted")
    seen = []
    cycle = jaxga.value_and_grad(
        lambda p, b: seen.append(b["inputs"].shape) or counted(p, b), microbatch_size=64
    )
    assert distance(under_jit(cycle, 1)[1], grads) <= BOUND
    assert set(seen) == {(64, 6)}


def test_microbatches_are_strided_rows():
    def loss_fn(params, rows):
        return jaxga.LossOutput(
            jaxga.WeightedSum.of(rows * params), metrics=jaxga.Stack(rows)
        )

    output, _ = jaxga.value_and_grad(loss_fn, accum_steps=3)(
        jnp.float32(1), jnp.arange(12.0)
    )
    np.testing.assert_array_equal(output.metrics[0], [0, 3, 6, 9])
    np.testing.assert_array_equal(output.metrics[1], [1, 4, 7, 10])


def _static_cycle(cycle, num):
    return cycle(make_params(), make_batch(), num_microbatches=num)


@pytest.mark.parametrize("traced", (True, False), ids=("traced", "static"))
@pytest.mark.parametrize("num", (0, 1, 4, 6))
def test_short_cycle_is_that_of_its_microbatches(num, traced):
    kept = jax.tree.map(lambda x: x[np.arange(384) % 6 < num], make_batch())
    cycle = jaxga.value_and_grad(counted, accum_steps=6)
    if traced:
        run = jax.jit(lambda n: cycle(make_params(), make_batch(), num_microbatches=n))
    else:
        run = functools.partial(_static_cycle, cycle)
    output, actual = run(num)
    if num == 0:
        assert output.loss == 0 and output.weight == 0
        assert all((g == 0).all() for g in jax.tree.leaves(actual))
        return
    loss, grads = truth(counted_mean, make_params(), kept)
    assert distance(actual, grads) <= BOUND
    np.testing.assert_allclose(output.loss, loss, rtol=BOUND)


def test_traced_count_above_the_number_of_microbatches_counts_none_twice():
    cycle = jaxga.value_and_grad(counted, accum_steps=6)
    run = jax.jit(lambda p, b, n: cycle(p, b, num_microbatches=n))
    most, more = (run(make_params(), make_batch(), n)[1] for n in (6, 9))
    for a, b in zip(*map(jax.tree.leaves, (most, more)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num", (1, 4))
def test_short_cycle_on_devices(num):
    kept = jax.tree.map(lambda x: x[np.arange(384) % 6 < num], make_batch())
    _, grads = truth(three_terms_mean, make_params(), kept)
    cycle = jaxga.value_and_grad(three_terms, accum_steps=6, axis_name="data")
    mapped = jax.shard_map(
        lambda p, b, n: cycle(p, b, num_microbatches=n),
        mesh=make_mesh(8),
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
    )
    _, actual = jax.jit(mapped)(make_params(), make_batch(), np.int32(num))
    assert distance(actual, grads) <= BOUND


# The dtype of the sums.


def test_float64_stays_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(np.float64), make_params())
        _, grads = truth(counted_mean, params, make_batch())
        cycle = jaxga.value_and_grad(counted, accum_steps=48)
        _, actual = jax.jit(cycle)(params, make_batch())
        assert {g.dtype for g in jax.tree.leaves(actual)} == {np.dtype(np.float64)}
        assert distance(actual, grads) <= 1e-14


def test_bfloat16_parameters_are_summed_in_float32():
    """Only each micro-batch's gradient is rounded to 8 bits: the error stays flat."""
    params = make_params(jnp.bfloat16)
    _, grads = truth(counted_mean, params, make_batch())
    errors = []
    for accum_steps in (1, 6, 48):
        cycle = jaxga.value_and_grad(counted, accum_steps=accum_steps)
        _, actual = jax.jit(cycle)(params, make_batch())
        assert {g.dtype for g in jax.tree.leaves(actual)} == {np.dtype(np.float32)}
        errors.append(distance(actual, grads))
    assert max(errors) <= 2e-2
    assert errors[-1] <= 1.2 * errors[0]


def test_bfloat16_sums_of_one_stand_still_and_float32_sums_do_not():
    def loss_fn(params, rows):
        return jaxga.WeightedSum((params * rows).sum().astype(jnp.float32), 1)

    params, rows = jnp.ones((), jnp.bfloat16), jnp.ones(1024, jnp.bfloat16)
    _, exact = jaxga.value_and_grad_sums(loss_fn, accum_steps=1024)(params, rows)
    assert exact.total == 1024
    with pytest.warns(UserWarning, match="accum_dtype=bfloat16 over 1024"):
        _, swamped = jaxga.value_and_grad_sums(
            loss_fn, accum_steps=1024, accum_dtype=jnp.bfloat16
        )(params, rows)
    assert swamped.total == 256 and swamped.total.dtype == jnp.bfloat16


def test_complex_parameters():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(12, 3)) + 1j * rng.normal(size=(12, 3))).astype(np.complex64)
    w = (rng.normal(size=3) + 1j * rng.normal(size=3)).astype(np.complex64)
    cycle = jaxga.value_and_grad(
        lambda w, x: jaxga.WeightedSum.of(jnp.abs(x @ w) ** 2), accum_steps=4
    )
    _, actual = jax.jit(cycle)(w, x)
    expected = jax.grad(lambda w: (jnp.abs(x @ w) ** 2).mean())(w)
    assert actual.dtype == np.complex64
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


# The sums themselves.


@pytest.mark.parametrize("calls", (2, 4))
def test_sums_of_several_calls_merge_exactly(calls):
    _, grads = true_loss_and_grads("counted")
    cycle = jax.jit(jaxga.value_and_grad_sums(counted, accum_steps=3))
    batch = split_over_devices(make_batch(), calls)
    parts = [
        cycle(make_params(), jax.tree.map(lambda x, i=i: x[i], batch))
        for i in range(calls)
    ]
    loss, summed = parts[0][0].loss, parts[0][1]
    for output, more in parts[1:]:
        loss, summed = loss.merge(output.loss), summed.merge(more)
    assert distance(summed.mean(), grads) <= BOUND
    np.testing.assert_allclose(loss.mean(), true_loss_and_grads("counted")[0], BOUND)


def test_sums_stay_on_their_device():
    cycle = jaxga.value_and_grad_sums(counted, accum_steps=6, axis_name="data")

    def local(params, batch):
        _, grads = cycle(params, batch)
        return jax.tree.map(lambda x: x[None], grads)

    mapped = jax.shard_map(
        local, mesh=make_mesh(8), in_specs=(P(), P("data")), out_specs=P("data")
    )
    grads = jax.jit(mapped)(make_params(), make_batch())
    assert len(np.unique(grads.weight)) > 1
    merged = jax.tree.map(lambda x: x.sum(0), grads)
    assert distance(merged.mean(), true_loss_and_grads("counted")[1]) <= BOUND


def test_axis_name_of_nothing_keeps_it_local():
    cycle = jaxga.value_and_grad(counted, accum_steps=6, axis_name=())
    mapped = jax.pmap(cycle, axis_name="data", in_axes=(None, 0))
    batch = split_over_devices(make_batch(), 8)
    _, actual = mapped(make_params(), batch)
    mine = jax.tree.map(lambda x: x[3], batch)
    _, grads = truth(counted_mean, make_params(), mine)
    assert distance(jax.tree.map(lambda g: g[3], actual), grads) <= BOUND


def test_two_data_axes_as_a_tuple():
    mesh = jax.make_mesh((4, 2), ("replica", "fsdp"), (AxisType.Auto,) * 2)
    axes = ("replica", "fsdp")
    cycle = jaxga.value_and_grad(three_terms, accum_steps=6, axis_name=axes)
    mapped = jax.shard_map(cycle, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P())
    _, actual = jax.jit(mapped)(make_params(), make_batch())
    assert distance(actual, true_loss_and_grads("three_terms")[1]) <= BOUND


# Where else a cycle may stand.


def test_inside_vmap_and_under_a_further_derivative():
    def loss_fn(w, x, scale):
        return jaxga.WeightedSum.of(jnp.sin(x @ w) ** 2 * scale)

    def mean_loss(w, x, scale):
        return (jnp.sin(x @ w) ** 2 * scale).mean()

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    w = jnp.array([[1.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=4)
    ensemble = jax.jit(jax.vmap(lambda w: cycle(w, x, 2.0)[1]))(w)
    expected = jax.vmap(lambda w: jax.grad(mean_loss)(w, x, 2.0))(w)
    np.testing.assert_allclose(ensemble, expected, rtol=1e-5)
    second = jax.jit(jax.grad(lambda s: cycle(w[0], x, s)[1].sum()))(2.0)
    expected = jax.grad(lambda s: jax.grad(mean_loss)(w[0], x, s).sum())(2.0)
    np.testing.assert_allclose(second, expected, rtol=1e-5)


@pytest.mark.parametrize("outside", (lambda f: f, jax.jit), ids=("eager", "jit"))
def test_an_ensemble_of_scanned_layers(outside):
    def loss_fn(params, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)
        return jaxga.WeightedSum.of(h.sum(-1) ** 2)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    params = rng.normal(size=(4, 2, 3, 3)).astype(np.float32)  # an ensemble of 4
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=4)
    _, grads = outside(jax.vmap(cycle, in_axes=(0, None)))(params, x)
    mean = jax.vmap(jax.grad(lambda p: loss_fn(p, x).mean()))
    np.testing.assert_allclose(grads, mean(params), rtol=1e-4, atol=1e-6)


def test_further_arguments_are_passed_whole():
    table = np.arange(5, dtype=np.float32)

    def loss_fn(params, rows, table, *, scale=1.0):
        assert table.shape == (5,)
        return jaxga.WeightedSum.of(params * table[rows] * scale)

    output, grads = jaxga.value_and_grad(loss_fn, accum_steps=2)(
        jnp.float32(2), np.array([0, 1, 2, 4]), table
    )
    assert (output.loss, grads) == (3.5, 1.75)
