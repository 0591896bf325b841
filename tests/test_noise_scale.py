"""The gradient noise scale: against plain NumPy, and against what is known of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jaxga
import jaxga.linen
import jaxga.nnx
import jmp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from refusals import refusals, refused

pytestmark = pytest.mark.anywhere

ROWS, FEATURES = 64, 8
ORIGIN = np.linspace(-1, 1, FEATURES).astype(np.float32)
STILL = optax.sgd(0.0)


def make_batch(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    x = rng.normal(0.5, 2.0, size=(rows, FEATURES)).astype(np.float32)
    return {"x": x, "mask": rng.random(rows) < rng.uniform(0.3, 0.9, size=rows)}


def loss_fn(params, batch):
    # The bias is too short to be divided over devices: it stays whole in every stage.
    errors = (params["w"] + params["b"][0])[None] - batch["x"]
    return jaxga.WeightedSum.of((errors**2 / 2).sum(-1), where=batch["mask"])


def make_params():
    return {"w": jnp.asarray(ORIGIN), "b": jnp.zeros(3)}


def gradients(batch):
    """Of each row, in float64."""
    errors = ORIGIN + np.zeros((len(batch["x"]), 1)) - np.float64(batch["x"])
    errors *= batch["mask"][:, None]
    bias = np.zeros((len(errors), 3))
    bias[:, 0] = errors.sum(-1)
    return np.concatenate([errors, bias], axis=1)


def expected(grads, weights, part):
    """Noise and signal by the definition: parts' means against the mean of all."""
    names = sorted({p for p, w in zip(part, weights, strict=True) if w})
    sums = np.stack([grads[part == name].sum(0) for name in names])
    sizes = np.array([weights[part == name].sum() for name in names], np.float64)
    mean = grads.sum(0) / sizes.sum()
    deviations = ((sums / sizes[:, None] - mean) ** 2).sum(-1)
    noise = (sizes * deviations).sum() / (len(names) - 1)
    return noise, (mean**2).sum() - noise / sizes.sum()


def parts_of_rows(devices, accum_steps, rows=ROWS):
    """The device and the micro-batch of each row."""
    of_device, i = np.divmod(np.arange(rows), rows // devices)
    return of_device, i % accum_steps


def run(per, *, batch=None, parallel=None, loss_fn=loss_fn, state=None, **settings):
    batch = make_batch() if batch is None else batch
    count = settings.pop("num_microbatches", None)
    step = jaxga.make_train_step(
        loss_fn, STILL, parallel=parallel, donate=False, **settings
    )
    keywords = {"noise_scale": jaxga.NoiseScale(per=per)}
    state = state or jaxga.TrainState.create(make_params(), STILL, **keywords)
    if parallel is not None:
        state = parallel.shard_state(state)
    return step(state, batch, num_microbatches=count)


def check(noise_scale, noise, signal):
    np.testing.assert_allclose(noise_scale.noise, noise, rtol=2e-5)
    np.testing.assert_allclose(noise_scale.signal, signal, rtol=2e-5)
    np.testing.assert_allclose(noise_scale.value, noise / signal, rtol=4e-5)


def of_batch(batch, part):
    return expected(gradients(batch), batch["mask"], part)


LAYOUTS = {
    "zero0": ({"data": 4}, {}, "zero"),
    "zero1": ({"data": 4}, {"zero": 1}, "zero"),
    "zero2": ({"data": 4}, {"zero": 2}, "group"),
    "zero3": ({"data": 4}, {"zero": 3}, "group"),
    "gather_once": ({"data": 4}, {"zero": 3, "gather_once": True}, "group"),
    "overlap_last": ({"data": 4}, {"overlap_last": True}, "zero"),
    "hybrid": (
        {"replica": 2, "data": 2},
        {"zero": 3, "axis": ("replica", "data"), "shard_axis": "data"},
        "hybrid",
    ),
}


def make_parallel(layout):
    shape, options, _ = LAYOUTS[layout]
    devices = jax.devices()[:4]
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), devices=devices)
    return jaxga.DataParallel(mesh, **options)


def test_micro_batches_on_one_device():
    state, metrics = run("microbatch", accum_steps=4)
    noise, signal = of_batch(make_batch(), parts_of_rows(1, 4)[1])
    check(state.noise_scale, noise, signal)
    np.testing.assert_array_equal(metrics["noise_scale"], state.noise_scale.value)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=() if name in ("zero0", "zero3") else pytest.mark.long)
        for name in LAYOUTS
    ],
)
def test_micro_batches_of_devices(layout):
    state, _ = run("microbatch", parallel=make_parallel(layout), accum_steps=4)
    device, microbatch = parts_of_rows(4, 4)
    units = {"zero": device, "hybrid": device // 2, "group": 0 * device}
    part = units[LAYOUTS[layout][2]] * 10 + microbatch
    check(state.noise_scale, *of_batch(make_batch(), part))


@pytest.mark.long
@pytest.mark.parametrize("layout", ["zero0", "zero1", "hybrid"])
def test_devices(layout):
    state, _ = run("device", parallel=make_parallel(layout), accum_steps=4)
    device, _ = parts_of_rows(4, 4)
    part = device // 2 if layout == "hybrid" else device
    check(state.noise_scale, *of_batch(make_batch(), part))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("per", ["device", "microbatch"])
def test_in_a_map_of_the_callers_own(per, check_vma):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    step = jaxga.make_train_step(loss_fn, STILL, accum_steps=4, axis_name="data")
    keywords = {"noise_scale": jaxga.NoiseScale(per=per)}
    state = jaxga.TrainState.create(make_params(), STILL, **keywords)
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )
    batch = jax.device_put(make_batch(), NamedSharding(mesh, P("data")))
    state, _ = jax.jit(mapped)(state, batch)
    device, microbatch = parts_of_rows(4, 4)
    part = device if per == "device" else device * 10 + microbatch
    check(state.noise_scale, *of_batch(make_batch(), part))


def test_only_micro_batches_that_are_there():
    state, _ = run("microbatch", accum_steps=8, num_microbatches=jnp.int32(3))
    batch, microbatch = make_batch(), parts_of_rows(1, 8)[1]
    batch["mask"] &= microbatch < 3
    check(state.noise_scale, *of_batch(batch, microbatch))


def test_parts_without_weight_do_not_count():
    batch, microbatch = make_batch(), parts_of_rows(1, 8)[1]
    batch["mask"] &= microbatch % 3 > 0
    state, _ = run("microbatch", batch=batch, accum_steps=8)
    check(state.noise_scale, *of_batch(batch, microbatch))


def test_scanned_layers_whose_gradients_are_summed_in_place_otherwise():
    def losses(layers, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h * w[None]), None), x, layers)
        return (h**2).sum(-1)

    layers = jnp.linspace(0.5, 2, 3 * FEATURES).reshape(3, FEATURES)
    batch = make_batch()
    state = jaxga.TrainState.create(
        layers, STILL, noise_scale=jaxga.NoiseScale(per="microbatch")
    )
    state, _ = run(
        "microbatch",
        loss_fn=lambda layers, batch: jaxga.WeightedSum.of(
            losses(layers, batch["x"]), where=batch["mask"]
        ),
        state=state,
        accum_steps=4,
    )
    of_row = jax.vmap(jax.grad(lambda w, x: losses(w, x[None])[0]), (None, 0))
    grads = np.float64(of_row(layers, batch["x"])).reshape(ROWS, -1)
    grads *= batch["mask"][:, None]
    noise, signal = expected(grads, batch["mask"], parts_of_rows(1, 4)[1])
    check(state.noise_scale, noise, signal)


def two_terms(params, batch):
    errors = loss_fn(params, batch)
    rows = len(batch["x"])
    return {"errors": errors, "pull": jaxga.WeightedSum(params["w"].sum() * rows, rows)}


@pytest.mark.parametrize("scaled", [False, True])
def test_terms_count_in_examples_and_a_loss_scale_does_not_matter(scaled):
    scale = jmp.StaticLossScale(jnp.float32(64.0)) if scaled else None
    state = jaxga.TrainState.create(
        make_params(),
        STILL,
        loss_scale=scale,
        noise_scale=jaxga.NoiseScale(per="microbatch"),
    )
    state, _ = run("microbatch", loss_fn=two_terms, state=state, accum_steps=4)
    batch = make_batch()
    grads = gradients(batch) * ROWS / batch["mask"].sum()
    grads[:, :FEATURES] += 1
    part = parts_of_rows(1, 4)[1]
    check(state.noise_scale, *expected(grads, np.ones(ROWS), part))


def test_a_loss_scale_does_not_matter():
    scale = jmp.StaticLossScale(jnp.float32(64.0))
    state = jaxga.TrainState.create(
        make_params(),
        STILL,
        loss_scale=scale,
        noise_scale=jaxga.NoiseScale(per="microbatch"),
    )
    state, _ = run("microbatch", state=state, accum_steps=4)
    check(state.noise_scale, *of_batch(make_batch(), parts_of_rows(1, 4)[1]))


@pytest.mark.parametrize("per", ["device", "microbatch"])
def test_known_ratio_of_a_quadratic(per):
    """The true noise scale: the trace of the covariance over the squared mean."""
    rng, deviations = np.random.default_rng(1), np.linspace(0.5, 2, FEATURES)
    mean, start = 0.3 * np.ones(FEATURES), jnp.zeros(FEATURES)
    parallel = make_parallel("zero0") if per == "device" else None
    step = jaxga.make_train_step(
        lambda params, x: jaxga.WeightedSum.of(((params[None] - x) ** 2 / 2).sum(-1)),
        STILL,
        accum_steps=4,
        parallel=parallel,
    )
    noise_scale = jaxga.NoiseScale(per=per, decay=1.0)
    state = jaxga.TrainState.create(start, STILL, noise_scale=noise_scale)
    for _ in range(400):
        x = (mean + deviations * rng.normal(size=(256, FEATURES))).astype(np.float32)
        state, metrics = step(state, x)
    true = (deviations**2).sum() / (mean**2).sum()
    np.testing.assert_allclose(metrics["noise_scale"], true, rtol=0.05)


def test_averages_of_numerator_and_denominator_apart():
    keywords = {"noise_scale": jaxga.NoiseScale(per="microbatch", decay=0.5)}
    state = jaxga.TrainState.create(make_params(), STILL, **keywords)
    estimates = []
    for seed in range(3):
        batch = make_batch(seed)
        state, metrics = run("microbatch", batch=batch, state=state, accum_steps=4)
        estimates.append(of_batch(batch, parts_of_rows(1, 4)[1]))
    weights = [0.25, 0.5, 1.0]
    noise, signal = np.average(estimates, axis=0, weights=weights)
    check(state.noise_scale, noise, signal)
    assert metrics["noise_scale"] == state.noise_scale.value


def test_a_skipped_cycle_leaves_it_alone():
    before, _ = run("microbatch", accum_steps=4)
    batch = make_batch(1)
    batch["x"][np.flatnonzero(batch["mask"])[3]] = np.nan
    state, metrics = run("microbatch", batch=batch, state=before, accum_steps=4)
    assert metrics["skipped"] == 1
    for new, old in zip(*map(jax.tree.leaves, (state, before)), strict=True):
        if new is not state.skipped:
            np.testing.assert_array_equal(new, old)


def test_a_nan_that_is_applied_does_not_stay():
    before, _ = run("microbatch", accum_steps=4)
    batch = make_batch(1)
    batch["x"][np.flatnonzero(batch["mask"])[3]] = np.nan
    settings = {"accum_steps": 4, "nonfinite": "propagate"}
    state, metrics = run("microbatch", batch=batch, state=before, **settings)
    assert np.isnan(metrics["loss"]) and metrics["skipped"] == 0
    assert metrics["noise_scale"] == before.noise_scale.value


def test_one_part_is_no_estimate():
    state, metrics = run("microbatch", accum_steps=4, num_microbatches=1)
    assert metrics["noise_scale"] == state.noise_scale.total == 0
    state, _ = run("microbatch", accum_steps=4)
    again, _ = run("microbatch", state=state, accum_steps=4, num_microbatches=1)
    assert again.noise_scale.value == state.noise_scale.value > 0


def test_a_gradient_hidden_by_noise():
    batch = {"x": np.array([[1.0], [-1.0]] * 2) * np.ones(FEATURES) + ORIGIN}
    batch["mask"] = np.ones(4, bool)
    batch = {name: leaf[[0, 2, 1, 3]] for name, leaf in batch.items()}
    state, metrics = run("microbatch", batch=batch, accum_steps=4)
    assert state.noise_scale.signal < 0 and metrics["noise_scale"] == jnp.inf


class NoisyState(TrainState):
    noise_scale: Any = None


@pytest.mark.parametrize("field", ["jaxga", "someone else's"])
def test_linen(field):
    is_ours = field == "jaxga"
    noise_scale = jaxga.NoiseScale(per="microbatch") if is_ours else jnp.ones(())
    state = NoisyState.create(
        apply_fn=None, params=make_params(), tx=STILL, noise_scale=noise_scale
    )
    step = jaxga.linen.make_train_step(loss_fn, accum_steps=4)
    state, metrics = step(state, make_batch())
    if is_ours:
        check(state.noise_scale, *of_batch(make_batch(), parts_of_rows(1, 4)[1]))
    else:
        assert "noise_scale" not in metrics and state.noise_scale == 1


def test_nnx():
    class Model(nnx.Module):
        def __init__(self):
            params = make_params()
            self.w, self.b = nnx.Param(params["w"]), nnx.Param(params["b"])

    def of_model(model, batch):
        return loss_fn({"w": model.w[...], "b": model.b[...]}, batch)

    model = Model()
    optimizer = nnx.Optimizer(model, STILL, wrt=nnx.Param)
    optimizer.noise_scale = nnx.Variable(jaxga.NoiseScale(per="microbatch"))
    step = jaxga.nnx.make_train_step(of_model, accum_steps=4)
    for seed in range(2):
        metrics = step(model, optimizer, make_batch(seed))
    part = parts_of_rows(1, 4)[1]
    estimates = [of_batch(make_batch(seed), part) for seed in range(2)]
    noise_scale = optimizer.noise_scale.get_value()
    check(noise_scale, *np.average(estimates, axis=0, weights=[0.95, 1]))
    assert metrics["noise_scale"] == noise_scale.value


def compiled(per, zero):
    mesh = jax.make_mesh((8,), ("data",))
    parallel = jaxga.DataParallel(mesh, zero=zero)
    params = {"w": jnp.zeros((512, 512))}

    def loss_fn(params, x):
        return jaxga.WeightedSum.of(jnp.tanh(x @ params["w"]) ** 2)

    step = jaxga.make_train_step(loss_fn, STILL, accum_steps=4, parallel=parallel)
    noise_scale = None if per is None else jaxga.NoiseScale(per=per)
    state = jaxga.TrainState.create(params, STILL, noise_scale=noise_scale)
    batch = jnp.zeros((64, 512))
    return step.lower(parallel.shard_state(state), batch).compile()


@pytest.mark.parametrize(("per", "zero"), [("device", 0), ("microbatch", 2)])
def test_cost(per, zero):
    """Beside the norms: some scalars on the wire, and no second gradient."""
    plain, measured = compiled(None, zero), compiled(per, zero)
    gradient = 512 * 512 * 4
    temp = [c.memory_analysis().temp_size_in_bytes for c in (plain, measured)]
    assert temp[1] - temp[0] < 0.05 * gradient
    moved = [sum(c.bytes for c in jaxga.collectives(x)) for x in (plain, measured)]
    assert 0 < moved[1] - moved[0] < 64
    if per == "device":
        assert not any(c.in_loop for c in jaxga.collectives(measured))


REFUSED = {
    "per": (lambda: jaxga.NoiseScale(per="row"), ValueError, "per='row'"),
    "decay": (lambda: jaxga.NoiseScale(decay=1.5), ValueError, "decay=1.5"),
    "decay of True": (lambda: jaxga.NoiseScale(decay=True), ValueError, "decay=True"),
    "number": (
        lambda: jaxga.TrainState.create(make_params(), STILL, noise_scale=1.0),
        TypeError,
        "it must be a jaxga.NoiseScale()",
    ),
    "class": (
        lambda: jaxga.TrainState.create(
            make_params(), STILL, noise_scale=jaxga.NoiseScale
        ),
        TypeError,
        "it must be a jaxga.NoiseScale()",
    ),
    "one device": (
        lambda: run("device", accum_steps=4),
        ValueError,
        "the batch is on one device. Use jaxga.NoiseScale(per='microbatch')",
    ),
    "one micro-batch": (
        lambda: run("microbatch", accum_steps=1),
        ValueError,
        "one micro-batch on one device: there is nothing to compare 64 rows with",
    ),
    "scattered gradients": (
        lambda: run("device", accum_steps=4, parallel=make_parallel("zero2")),
        ValueError,
        "divided over ('data',). Use jaxga.NoiseScale(per='microbatch')",
    ),
}


@refusals(REFUSED)
def test_misuse(call, error, words):
    with refused(error, *words):
        call()


def test_an_optimizer_that_accumulates_over_calls_is_refused():
    tx = jaxga.accumulate(STILL, 2)
    keywords = {"noise_scale": jaxga.NoiseScale(per="microbatch")}
    state = jaxga.TrainState.create(make_params(), tx, **keywords)
    step = jaxga.make_train_step(loss_fn, tx, accum_steps=2)
    with pytest.raises(ValueError, match="noise scale and an optimizer made by"):
        step(state, make_batch())


def test_it_takes_part_in_donation_and_is_compiled_once():
    step = jaxga.make_train_step(loss_fn, STILL, accum_steps=4)
    keywords = {"noise_scale": jaxga.NoiseScale(per="microbatch")}
    state = jaxga.TrainState.create(make_params(), STILL, **keywords)
    for seed in range(3):
        state, _ = step(state, make_batch(seed))
    assert step._cache_size() == 1
    assert dataclasses.is_dataclass(state.noise_scale)
