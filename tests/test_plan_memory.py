"""The micro-batch that fits, by compiled steps; what is predicted; "auto".

As a script this file is one of several processes.
"""

import functools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import jaxga.linen
import jaxga.nnx
import layered
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState as FlaxTrainState
from jax.sharding import PartitionSpec as P
from jaxga._memory import budget
from jaxga._memory.flops import count_flops
from jaxga._memory.search import MOST_COMPILES, Search
from problems import distance, make_mesh
from refusals import refusals, refused

pytestmark = pytest.mark.anywhere

ROWS, LENGTH, WIDTH, HIDDEN = 64, 8, 48, 256
TX = optax.sgd(0.1, momentum=0.9)  # Adam would hide a gradient of the wrong size
BUDGET = 800_000


def loss_fn(params, batch):
    h = jnp.tanh(batch["x"] @ params["in"])
    return jaxga.WeightedSum.of((h @ params["out"] - batch["y"]) ** 2)


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"in": (WIDTH, HIDDEN), "out": (HIDDEN,)}
    return {k: jnp.float32(rng.normal(size=s) / 4) for k, s in shapes.items()}


def make_batch(rows=ROWS):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, LENGTH, WIDTH)).astype(np.float32)
    return {"x": x, "y": x.sum(-1)}


def make_state(tx=TX):
    return jaxga.TrainState.create(make_params(), tx)


def shapes_of(tree):
    return jax.eval_shape(lambda: tree)


ROW = {
    "x": jax.ShapeDtypeStruct((LENGTH, WIDTH), jnp.float32),
    "y": np.zeros(LENGTH, np.float32),
}


def build_with(**options):
    def build(microbatch_size, accum_steps):
        return jaxga.make_train_step(loss_fn, TX, accum_steps=accum_steps, **options)

    return build


def plan(build=None, state=None, row=ROW, **options):
    options = {"global_batch_size": ROWS, "budget_bytes": BUDGET} | options
    state = make_state() if state is None else state
    return jaxga.plan_memory(build or build_with(), state, row, **options)


@functools.cache
def base():
    """The plan of most tests."""
    return plan()


FLOPS = 2 * ROWS * LENGTH * HIDDEN * (2 * WIDTH + 3)


def needs(lowered):
    """Arguments, results that replace none, temporaries: of what is compiled."""
    memory = lowered.compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes, results, memory.temp_size_in_bytes


def parts(row):
    return row.argument_bytes, row.result_bytes, row.temp_bytes


# ---- The search, on peaks that are known ---------------------------------------------

POWERS = [2**i for i in range(11)]
KEPT = 1000.0
# Peaks beyond what is kept: the most of an update's, and of a backward pass's.
CURVES = {
    "even": lambda size: 10 + 3 * size,
    "flat": lambda size: 50,
    "bend early": lambda size: max(90, 10 + 20 * size),
    "bend late": lambda size: max(900, 400 + 5 * size),
    "two bends": lambda size: max(300, 200 + size, 9 * size),
    "nothing at first": lambda size: max(0, 4 * size - 40),
}


def searched(curve, sizes, limit):
    tried = []

    def measure(size):
        tried.append(size)
        return KEPT + curve(size), curve(size)

    search = Search(sizes, limit, measure)
    best = search.run()
    assert sorted(search.peaks) == sorted(tried) and len(tried) <= MOST_COMPILES
    return search, best, tried


@pytest.mark.parametrize("limit", (1049, 1100, 1399, 2050, 3500, 7000, 10**6))
@pytest.mark.parametrize("name", CURVES)
def test_search_finds_the_largest_that_fits(name, limit):
    curve = CURVES[name]
    fits = [size for size in POWERS if KEPT + curve(size) <= limit]
    search, best, tried = searched(curve, POWERS, limit)
    assert best == max(fits, default=None)
    assert best is None or best in tried


@pytest.mark.parametrize("name", CURVES)
def test_search_predicts_what_it_did_not_compile(name):
    curve = CURVES[name]
    search, best, tried = searched(curve, POWERS, 4000)
    search.refine()
    predicted = [s for s in POWERS if s not in search.peaks and s < max(tried)]
    assert predicted and len(tried) <= MOST_COMPILES
    # Far from all that is compiled, a bend is between two sizes.
    rel = 0.05 if name == "bend late" else 0.03
    for size in predicted:
        assert search.predict(size) == pytest.approx(KEPT + curve(size), rel=rel)
    beyond = [size for size in POWERS if size > best]
    assert not beyond or beyond[0] in tried, "there is no proof that it does not fit"


def test_search_proves_the_choice_by_the_next_size():
    search, best, tried = searched(CURVES["even"], POWERS, 1400)
    search.refine()
    assert best == 128 and 256 in search.peaks and search.peaks[256] > 1400


@pytest.mark.parametrize("seed", range(8))
def test_what_bends_down_is_not_believed(seed):
    noise = np.random.default_rng(seed).uniform(0.4, 1.6, size=2000)
    sizes = [1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60]

    def curve(size):
        return 10 * size * noise[size]

    search, best, _ = searched(curve, sizes, 1300)
    assert KEPT + curve(best) <= 1300
    search.refine()
    assert KEPT + curve(search.fitting[-1]) <= 1300


def test_a_compiler_that_runs_out_of_memory():
    search, best, _ = searched(lambda size: 40 if size <= 8 else math.inf, POWERS, 2000)
    assert best == 8
    assert search.predict(4) < 2000 and search.predict(512) == math.inf


def test_a_single_micro_batch_is_apart():
    """Its program has no loop, and says nothing of those that have."""

    def curve(size):
        return 10 + size - (30 if size == 64 else 0)

    search, best, tried = searched(curve, [1, 2, 4, 8, 16, 32, 64], 1080)
    assert best == 64 and 32 not in tried
    assert search.predict(32) == pytest.approx(KEPT + curve(32), rel=1e-9)


# ---- Plans on the CPU ----------------------------------------------------------------


def test_rows_are_what_the_compiled_steps_need():
    found = base()
    assert sum(not row.compiled for row in found.rows) >= 2
    for row in found.rows:
        assert row.microbatch_size * row.accum_steps == ROWS
        assert row.peak_bytes == sum(parts(row))
        assert row.fits == (row.peak_bytes <= found.usable_bytes)
        step = build_with()(0, row.accum_steps)
        true = needs(step.lower(make_state(), make_batch()))
        if row.compiled:
            assert parts(row) == true
            assert row.flops == FLOPS
        else:
            assert row.peak_bytes == pytest.approx(sum(true), rel=0.03)
            assert row.flops is None
    sizes = [row.microbatch_size for row in found.rows]
    at = sizes.index(found.microbatch_size)
    assert found.rows[at].peak_bytes == found.peak_bytes <= found.usable_bytes
    assert found.accum_steps == found.rows[at].accum_steps > 1
    assert found.rows[at].compiled and found.rows[at + 1].compiled
    assert not found.rows[at + 1].fits
    assert found.usable_bytes == int(BUDGET * 0.92)


WORDS = 128
WIDE = {
    "embed": (WORDS, 64),
    "layers": {"in": (3, 64, 256), "out": (3, 256, 64), "scale": (3, 64)},
    "head": (64, WORDS),
    "bias": (WORDS,),
}


@pytest.mark.long
def test_predictions_are_near_for_scanned_layers():
    """Within 3 % of the peak of the compiled program that the plan did not compile."""
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        WIDE,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tx, total = optax.adamw(1e-3), 128
    tokens = jax.ShapeDtypeStruct((3 * LENGTH,), jnp.int32)
    mask = jax.ShapeDtypeStruct((3 * LENGTH,), jnp.bool_)
    row = {"inputs": tokens, "targets": tokens, "mask": mask}
    state = jax.eval_shape(lambda p: jaxga.TrainState.create(p, tx), params)

    def build(microbatch_size, accum_steps):
        return jaxga.make_train_step(layered.counted, tx, accum_steps=accum_steps)

    found = plan(build, state, row, global_batch_size=total, budget_bytes=5_000_000)
    predicted = [r for r in found.rows if not r.compiled and r.accum_steps > 1]
    assert len(predicted) >= 2 and found.microbatch_size >= 8
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((total, *x.shape), x.dtype), row
    )
    for size in predicted:
        true = sum(needs(build(0, size.accum_steps).lower(state, batch)))
        assert size.peak_bytes == pytest.approx(true, rel=0.03)
    flops = {r.flops for r in found.rows if r.compiled}
    assert len(flops) == 1, "the work is that of the global batch, however it is cut"


@pytest.mark.long
def test_what_is_not_donated_counts_twice():
    donated, kept = base(), plan(build_with(donate=False))
    size = sum(x.nbytes for x in jax.tree.leaves(make_state()))
    grown = kept.rows[0].result_bytes - donated.rows[0].result_bytes
    assert grown == pytest.approx(size, rel=0.01)


@pytest.mark.long
def test_a_state_divided_over_devices():
    """Per device, wherever the state lies now; the work is that of one device."""
    parallel = jaxga.DataParallel(make_mesh(8), zero=3)
    build = build_with(parallel=parallel)
    found = plan(build, shapes_of(make_state()), num_devices=8)
    assert found.num_devices == 8
    for row in found.rows:
        assert row.microbatch_size * row.accum_steps * 8 == ROWS
    lowered = build(0, found.accum_steps).lower(
        parallel.shard_state(make_state()), parallel.shard_batch(make_batch())
    )
    rows = [row for row in found.rows if row.accum_steps == found.accum_steps]
    assert parts(rows[0]) == needs(lowered) and rows[0].flops == FLOPS
    assert rows[0].argument_bytes < base().rows[0].argument_bytes / 7
    assert plan(build, make_state()) == found


def test_a_map_of_ones_own():
    mesh = make_mesh(4)

    def build(microbatch_size, accum_steps):
        step = jaxga.make_train_step(
            loss_fn, TX, accum_steps=accum_steps, axis_name="data"
        )
        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        return jax.jit(jax.shard_map(step, mesh=mesh, **specs), donate_argnums=0)

    found = plan(build, num_devices=4)
    assert found.num_devices == 4
    assert found.microbatch_size * found.accum_steps * 4 == ROWS
    assert {row.flops for row in found.rows if row.compiled} == {FLOPS}


@pytest.mark.long
def test_a_device_that_is_named():
    device = jax.devices()[3]
    found = plan(state=shapes_of(make_state()), devices=[device])
    assert found == base()


def test_printed():
    found = base()
    lines = repr(found).splitlines()
    assert lines[0].startswith("64 examples per update = ")
    assert lines[0].endswith("* 1 device (cpu)")
    assert lines[1].endswith("(781.25 KiB less 8%)")
    header = "micro-batch accum_steps arguments results temporaries peak flops"
    assert lines[2].split() == header.split()
    assert len(lines) == 3 + len(found.rows)
    (chosen,) = [line for line in lines if line.endswith("chosen")]
    assert chosen.split()[:2] == [str(found.microbatch_size), str(found.accum_steps)]
    assert "compiled" in chosen and lines[-1].endswith("too large")
    assert any("predicted" in line for line in lines)


# ---- Flax ----------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))[..., 0]


def nnx_loss_fn(model, batch):
    return jaxga.WeightedSum.of((model(batch["x"]) - batch["y"]) ** 2)


def make_objects():
    model = Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


LINEN = nn.Sequential([nn.Dense(HIDDEN), jnp.tanh, nn.Dense(1)])


def linen_loss_fn(params, batch):
    predicted = LINEN.apply({"params": params}, batch["x"])[..., 0]
    return jaxga.WeightedSum.of((predicted - batch["y"]) ** 2)


def make_linen_state():
    params = LINEN.init(jax.random.key(0), jnp.ones((1, WIDTH)))["params"]
    return FlaxTrainState.create(apply_fn=LINEN.apply, params=params, tx=TX)


@pytest.mark.long
def test_nnx_over_devices():
    parallel = jaxga.DataParallel(make_mesh(8), zero=3)

    def build(microbatch_size, accum_steps):
        return jaxga.nnx.make_train_step(
            nnx_loss_fn, accum_steps=accum_steps, parallel=parallel
        )

    found = plan(build, nnx.eval_shape(make_objects), budget_bytes=BUDGET // 4)
    assert found.microbatch_size * found.accum_steps * 8 == ROWS
    batch = parallel.shard_batch(make_batch())
    lowered = build(0, found.accum_steps).lower(*make_objects(), batch)
    assert sum(needs(lowered)) == found.peak_bytes


# ---- Arithmetic ----------------------------------------------------------------------


def flops_of(function, *args):
    return count_flops(jax.make_jaxpr(function)(*args))


def test_flops():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    once = 2 * 3 * 4 * 5

    def repeated(a, b):
        return jax.lax.scan(lambda c, _: (c + a @ b, None), jnp.zeros((3, 5)), length=7)

    def chosen(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((3, 5)))

    def unknown(a, b):
        return jax.lax.while_loop(
            lambda c: c[0, 0] < 9, lambda c: c + a @ b, jnp.zeros((3, 5))
        )

    def unused(a, b):
        _ = jnp.sin(a) @ b
        return a @ b

    assert flops_of(jnp.matmul, a, b) == once
    assert flops_of(jax.jit(repeated), a, b) == 7 * once
    assert flops_of(chosen, a, b) == once
    assert flops_of(jax.checkpoint(jnp.matmul), a, b) == once
    assert flops_of(unused, a, b) == once
    assert flops_of(unknown, a, b) is None
    mapped = jax.shard_map(
        jnp.matmul, mesh=make_mesh(4), in_specs=(P("data"), P()), out_specs=P("data")
    )
    assert flops_of(mapped, jnp.ones((12, 4)), b) == 4 * once


def test_flops_of_a_convolution():
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((5, 5, 3, 16))

    def convolve(image, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=layout
        )

    assert flops_of(convolve, image, kernel) == 2 * (2 * 8 * 8 * 16) * (5 * 5 * 3)


# ---- microbatch_size="auto" ----------------------------------------------------------


@pytest.fixture
def limit(monkeypatch):
    """As if the devices had a limit of memory."""
    given = {"bytes": BUDGET}
    monkeypatch.setattr(budget, "_limit", lambda device: given["bytes"])
    return given


def auto(make=jaxga.make_train_step, loss=loss_fn, *args, **options):
    options = {"microbatch_size": "auto", "global_batch_size": ROWS} | options
    return make(
        loss, *(args or ((TX,) if make is jaxga.make_train_step else ())), **options
    )


def moved(step, state, batch):
    start = jax.device_get(state.params)
    new, metrics = step(state, batch)
    return jax.tree.map(np.subtract, jax.device_get(new.params), start), metrics


def test_auto_takes_what_plan_memory_finds(limit):
    step = auto()
    assert step.plan is None
    found, metrics = moved(step, make_state(), make_batch())
    expected, _ = moved(
        jaxga.make_train_step(loss_fn, TX, accum_steps=1), make_state(), make_batch()
    )
    assert distance(found, expected) < 1e-6
    chosen = base()
    assert 1 < chosen.microbatch_size < ROWS
    assert step.plan.microbatch_size == chosen.microbatch_size
    assert step.plan.peak_bytes == chosen.peak_bytes
    assert metrics["weight"] == ROWS * LENGTH


def test_auto_chooses_once(limit):
    traced = []

    def counted(params, batch):
        traced.append(len(batch["x"]))
        return loss_fn(params, batch)

    step = auto(loss=counted)
    lowered = step.lower(shapes_of(make_state()), make_batch())
    chosen = step.plan
    assert set(traced) == {row.microbatch_size for row in chosen.rows if row.compiled}
    times = {traced.count(size) for size in traced}
    assert len(times) == 1, "the chosen step was traced again"
    limit["bytes"] = 10 * BUDGET
    once = len(traced)
    state, _ = step(make_state(), make_batch())
    state, metrics = step(state, make_batch())
    assert len(traced) == once and step.plan is chosen and metrics["update"] == 2
    argument, results, temporaries = needs(lowered)
    assert argument + results + temporaries == chosen.peak_bytes
    assert step.eval_shape(state, make_batch())[1]["loss"].shape == ()
    assert step.trace(state, make_batch()).jaxpr.eqns
    state, _ = step(state, make_batch(ROWS // 2))  # fewer micro-batches, as large
    assert traced[-1] == chosen.microbatch_size
    step.clear_cache()


def test_auto_over_devices(limit):
    limit["bytes"] = 160_000
    parallel = jaxga.DataParallel(make_mesh(8), zero=3)
    step = auto(parallel=parallel)
    state = parallel.shard_state(make_state())
    found, _ = moved(step, state, parallel.shard_batch(make_batch()))
    whole = jaxga.make_train_step(loss_fn, TX, accum_steps=1)
    expected, _ = moved(whole, make_state(), make_batch())
    assert distance(found, expected) < 1e-6
    assert step.plan.num_devices == 8 and step.plan.accum_steps > 1


@pytest.mark.long
def test_auto_with_linen(limit):
    step = auto(jaxga.linen.make_train_step, linen_loss_fn)
    _, metrics = step(make_linen_state(), make_batch())
    assert metrics["weight"] == ROWS * LENGTH and 1 < step.plan.microbatch_size < ROWS


def test_auto_with_nnx(limit):
    step = auto(jaxga.nnx.make_train_step, nnx_loss_fn)
    model, optimizer = make_objects()
    metrics = step(model, optimizer, make_batch())
    assert metrics["update"] == 1 and 1 < step.plan.microbatch_size < ROWS
    other, its_optimizer = make_objects()
    full = jaxga.nnx.make_train_step(nnx_loss_fn, accum_steps=1)
    full(other, its_optimizer, make_batch())
    kernels = [np.asarray(m.hidden.kernel[...]) for m in (model, other)]
    np.testing.assert_allclose(*kernels, rtol=1e-5, atol=1e-7)


# ---- What is refused -----------------------------------------------------------------


class Absent:
    """A device that can only be compiled for."""

    process_index, device_kind = 0, "absent"

    def memory_stats(self):
        raise jax.errors.JaxRuntimeError("only supported for addressable devices")

    def __repr__(self):
        return "a device that is not there"


def parallel_build(zero=0, devices=8):
    return build_with(parallel=jaxga.DataParallel(make_mesh(devices), zero=zero))


REFUSED = {
    "nothing fits": (
        lambda: plan(budget_bytes=150_000),
        ValueError,
        "Not even a micro-batch of 1 fits. It needs",
        "of arguments",
        "of temporaries",
        "of the budget of 146.48 KiB, 134.77 KiB may be used (8% are kept free)",
        "jax.checkpoint",
        "zero=1",
    ),
    "no budget": (
        lambda: plan(budget_bytes=None),
        ValueError,
        "does not say how much memory it has",
        "Give budget_bytes",
    ),
    "a device that is not there": (
        lambda: budget.find_budget([Absent()], None),
        ValueError,
        "a device that is not there does not say how much memory",
        "Give budget_bytes",
    ),
    "budget is no count": (
        lambda: plan(budget_bytes=1.5e9),
        TypeError,
        "budget_bytes=1500000000.0 must be an integer",
    ),
    "batch is no count": (
        lambda: plan(global_batch_size=0),
        ValueError,
        "global_batch_size=0 must be an integer of at least 1",
    ),
    "batch does not divide": (
        lambda: plan(parallel_build(), global_batch_size=60),
        ValueError,
        "global_batch_size=60",
        "num_devices = 1 * 8",
        "56 or 64",
    ),
    "other number of devices": (
        lambda: plan(parallel_build(), num_devices=4),
        ValueError,
        "num_devices=4",
        "over 8 devices",
        "Leave num_devices out",
    ),
    "other devices": (
        lambda: plan(parallel_build(devices=4), devices=jax.devices()[4:]),
        ValueError,
        "devices=[",
        "mesh of these devices",
    ),
    "devices without parallel": (
        lambda: plan(devices=jax.devices()),
        ValueError,
        "devices has 8 devices",
        "parallel=DataParallel(mesh)",
    ),
    "no step": (
        lambda: plan(lambda microbatch_size, accum_steps: None),
        TypeError,
        "build returned None",
        ".lower",
    ),
    "a bare step": (
        lambda: plan(build_with(axis_name="data")),
        TypeError,
        "which has no .lower",
        "jax.shard_map",
    ),
    "row of nothing": (lambda: plan(row={}), ValueError, "row holds no arrays: {}"),
    "row of words": (
        lambda: plan(row={"x": "text"}),
        TypeError,
        "row['x'] is 'text'",
        "not an array",
    ),
    "nnx without the pair": (
        lambda: plan(
            lambda m, k: jaxga.nnx.make_train_step(nnx_loss_fn, accum_steps=k),
            make_state(),
        ),
        TypeError,
        "must be the pair (model, optimizer)",
    ),
    "nnx on devices that are named": (
        lambda: plan(
            lambda m, k: jaxga.nnx.make_train_step(nnx_loss_fn, accum_steps=k),
            make_objects(),
            devices=jax.devices()[:1],
        ),
        ValueError,
        "jaxga.nnx",
        "parallel=jaxga.DataParallel(mesh)",
        "nnx.eval_shape",
    ),
    "auto without a limit": (
        lambda: auto()(make_state(), make_batch()),
        ValueError,
        "does not say how much memory it has",
    ),
    "auto without a batch size": (
        lambda: auto(global_batch_size=None),
        ValueError,
        'microbatch_size="auto" needs global_batch_size',
    ),
    "auto and accum_steps": (
        lambda: auto(accum_steps=4),
        ValueError,
        'accum_steps=4 and microbatch_size="auto" exclude each other',
    ),
    "auto and axis_name": (
        lambda: auto(axis_name="data"),
        ValueError,
        "axis_name='data'",
        "parallel=jaxga.DataParallel(mesh)",
    ),
    "auto over devices that do not divide": (
        lambda: auto(parallel=jaxga.DataParallel(make_mesh(8)), global_batch_size=60),
        ValueError,
        "global_batch_size=60",
        "56 or 64",
    ),
    "auto and an unknown rule": (
        lambda: auto(nonfinite="ignore"),
        ValueError,
        "nonfinite='ignore'",
    ),
    "auto and other rows": (
        lambda: auto()(make_state(), make_batch(32)),
        ValueError,
        "The batch has 32 rows, but global_batch_size=64",
    ),
    "auto inside jit": (
        lambda: jax.jit(auto())(make_state(), make_batch()),
        ValueError,
        "inside a jitted function",
        "jaxga.plan_memory",
    ),
    "auto and num_microbatches": (
        lambda: auto()(make_state(), make_batch(), num_microbatches=3),
        ValueError,
        "num_microbatches=3",
        "step.plan.accum_steps",
    ),
    "a size without auto": (
        lambda: auto(microbatch_size=8),
        ValueError,
        "global_batch_size=64 is for",
        "Leave it out",
    ),
    "another word": (
        lambda: auto(microbatch_size="largest", global_batch_size=None),
        TypeError,
        "microbatch_size='largest' must be an integer",
    ),
}


@refusals(REFUSED)
def test_refused(call, error, words):
    with refused(error, *words):
        call()


def test_auto_says_what_to_do_on_a_cpu():
    with pytest.raises(ValueError) as caught:
        auto()(make_state(), make_batch())
    (note,) = caught.value.__notes__
    assert "jaxga.plan_memory(..., budget_bytes=...)" in note


# ---- Several processes ---------------------------------------------------------------


LIMITS = (600_000, 330_000)  # bytes


def be_a_process(address, number, folder):
    """Has another limit than the other process, and must choose the same."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(address, 2, int(number))
    budget._limit = lambda device: LIMITS[int(number)]
    parallel = jaxga.DataParallel(make_mesh(4))
    half = jax.tree.map(lambda x: np.split(x, 2)[int(number)], make_batch())
    step = auto(parallel=parallel)
    state = parallel.shard_state(make_state())
    _, metrics = step(state, parallel.shard_batch(half))
    told = [step.plan.microbatch_size, step.plan.budget_bytes, int(metrics["weight"])]
    Path(folder, f"{number}.json").write_text(json.dumps(told))
    jax.distributed.shutdown()


@pytest.mark.long
def test_processes_choose_the_same(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(number), tmp_path],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    told = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]
    assert told[0] == told[1]
    size, budget, weight = told[0]
    assert budget == min(LIMITS) and weight == ROWS * LENGTH
    parallel = jaxga.DataParallel(make_mesh(4))
    alone = plan(build_with(parallel=parallel), budget_bytes=min(LIMITS))
    more = plan(build_with(parallel=parallel), budget_bytes=max(LIMITS))
    assert size == alone.microbatch_size < more.microbatch_size


if __name__ == "__main__":
    be_a_process(*sys.argv[1:])
