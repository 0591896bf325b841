"""Loss scales: on the cycle's mean, unscaled in float32, adjusted once per cycle."""

import jax
import jax.numpy as jnp
import jaxga
import jmp
import numpy as np
import optax
import pytest
from problems import (
    counted,
    counted_mean,
    distance,
    make_batch,
    make_mesh,
    make_params,
    three_terms,
    three_terms_mean,
    truth,
)

pytestmark = pytest.mark.anywhere

# Its state is the gradient that it was given.
KEEP = optax.trace(decay=0.0, accumulator_dtype=jnp.float32)


def scaled_state(params, tx, scale, **kwargs):
    loss_scale = jmp.DynamicLossScale(jnp.float32(scale), **kwargs)
    params = jax.tree.map(jnp.asarray, params)
    return jaxga.TrainState.create(params, tx, loss_scale=loss_scale)


@pytest.mark.parametrize("num_devices", (None, 8))
@pytest.mark.parametrize(
    "loss_fn, mean_loss", [(counted, counted_mean), (three_terms, three_terms_mean)]
)
def test_gradient_is_unscaled(loss_fn, mean_loss, num_devices):
    parallel = num_devices and jaxga.DataParallel(make_mesh(num_devices))
    step = jaxga.make_train_step(loss_fn, KEEP, accum_steps=6, parallel=parallel)
    state = scaled_state(make_params(), KEEP, 2.0**10)
    state = parallel.shard_state(state) if parallel else state
    state, metrics = step(state, make_batch())
    loss, grads = truth(mean_loss, make_params(), make_batch())
    assert distance(state.opt_state.trace, grads) <= 1e-6
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)


def half_loss(params, rows):
    """Computed in float16, 4,096 losses per cycle."""
    return jaxga.WeightedSum.of((rows * params["w"]) ** 2)


ROWS = np.linspace(0.5, 1.5, 4096).astype(np.float16)
HALF = {"w": np.ones((), np.float16)}


def test_mean_holds_where_the_sum_would_overflow():
    """float16 ends at 65,504: a gradient of 4,096 times 2^12 is far beyond."""
    step = jaxga.make_train_step(half_loss, KEEP, accum_steps=4)
    state, metrics = step(scaled_state(HALF, KEEP, 2.0**12), ROWS)
    assert metrics["skipped"] == 0
    expected = (2 * ROWS.astype(np.float64) ** 2).mean()
    np.testing.assert_allclose(state.opt_state.trace["w"], expected, rtol=2e-3)

    def of_the_sum(w):
        return (half_loss({"w": w}, ROWS[:1024]).total * 2.0**12).astype(jnp.float16)

    assert not np.isfinite(jax.grad(of_the_sum)(jnp.float16(1)))


def test_small_gradients_survive_only_with_a_scale():
    """Below 6e-8 float16 is zero: a gradient of 1e-8 needs the scale."""

    def tiny(params, rows):
        losses = (params["w"] * rows).astype(jnp.float32) * 1e-8
        return jaxga.WeightedSum.of(losses)

    step = jaxga.make_train_step(tiny, KEEP, accum_steps=4)
    scaled, _ = step(scaled_state(HALF, KEEP, 2.0**20), ROWS)
    plain, _ = step(
        jaxga.TrainState.create(jax.tree.map(jnp.asarray, HALF), KEEP), ROWS
    )
    exact = 1e-8 * ROWS.astype(np.float64).mean()
    np.testing.assert_allclose(scaled.opt_state.trace["w"], exact, rtol=1e-2)
    assert abs(plain.opt_state.trace["w"] / exact - 1) > 0.1


def test_overflow_skips_the_cycle_and_halves_the_scale_once():
    tx = optax.adam(1e-2)
    step = jaxga.make_train_step(half_loss, tx, accum_steps=4, donate=False)
    state = scaled_state(HALF, tx, 2.0**30)
    after, metrics = step(state, ROWS)
    assert metrics["skipped"] == 1 and after.params["w"] == HALF["w"]
    assert after.loss_scale.loss_scale == 2.0**29 and after.update == 0
    for _ in range(20):
        after, metrics = step(after, ROWS)
    assert metrics["skipped"] == 0 and after.update > 0


def test_scale_grows_by_updates_not_microbatches():
    step = jaxga.make_train_step(half_loss, KEEP, accum_steps=4)
    state = scaled_state(HALF, KEEP, 2.0**4, period=3)
    scales = []
    for _ in range(6):
        state, _ = step(state, ROWS)
        scales.append(float(state.loss_scale.loss_scale))
    assert scales == [16, 16, 32, 32, 32, 64]


def test_cycle_without_weight_leaves_the_scale_as_it_was():
    step = jaxga.make_train_step(half_loss, KEEP, accum_steps=4, donate=False)
    state = scaled_state(HALF, KEEP, 2.0**4, period=1)
    after, metrics = step(state, ROWS, num_microbatches=0)
    assert metrics["skipped"] == 1
    assert after.loss_scale.loss_scale == 16 and after.loss_scale.counter == 0


def test_one_trace_over_a_run():
    traces = []

    def traced(params, rows):
        traces.append(1)
        return half_loss(params, rows)

    step = jaxga.make_train_step(traced, KEEP, accum_steps=4)
    state = scaled_state(HALF, KEEP, 2.0**4)
    for _ in range(3):
        state, _ = step(state, ROWS)
    assert len(traces) == 1


@pytest.mark.parametrize("wrong", (2.0**15, "dynamic", object()))
def test_what_is_no_loss_scale_is_refused(wrong):
    with pytest.raises(TypeError, match="has no method scale.*jmp.DynamicLossScale"):
        jaxga.TrainState.create(HALF, KEEP, loss_scale=wrong)


def test_field_that_jmp_loses_is_refused():
    """Its `tree_unflatten` forgets the least scale, silently."""
    lost = jmp.DynamicLossScale(jnp.float32(8), min_loss_scale=np.float32(0.25))
    with pytest.raises(ValueError, match="min_loss_scale is .*0.25.*default"):
        jaxga.TrainState.create(HALF, KEEP, loss_scale=lost)


def test_a_state_with_a_scale_is_made_where_it_belongs():
    mesh = jax.make_mesh((8,), ("data",))
    parallel = jaxga.DataParallel(mesh, zero=3)
    scale = jmp.DynamicLossScale(jnp.float32(2.0**10))
    state = parallel.init(
        lambda: jaxga.TrainState.create(
            jnp.zeros((8, 4)), optax.sgd(0.1), loss_scale=scale
        )
    )
    assert state.params.addressable_shards[0].data.shape == (1, 4)
    assert state.loss_scale.loss_scale == 2.0**10
