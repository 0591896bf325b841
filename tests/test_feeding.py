"""Steps that feed an accumulating optimizer: several calls a cycle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxga
import jaxga.linen
import jmp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from jaxga import collectives
from problems import (
    counted,
    counted_mean,
    distance,
    make_batch,
    make_mesh,
    make_params,
    split_over_devices,
    three_terms,
    truth,
)

pytestmark = pytest.mark.anywhere

CALLS = 3  # per cycle


def inner():
    """Clipping and a schedule: both would show what is not one update per cycle."""
    schedule = optax.linear_schedule(1.0, 0.1, transition_steps=4)
    return optax.chain(
        optax.clip_by_global_norm(0.3), optax.sgd(schedule, momentum=0.9)
    )


def batches():
    """Two cycles of calls; each call's batch holds another number of tokens."""
    calls = [make_batch(seed=seed) for seed in range(2 * CALLS)]
    return [
        batch | {"mask": batch["mask"] & (np.arange(6) <= seed)[None]}
        for seed, batch in enumerate(calls)
    ]


@functools.cache
def expected_params():
    tx, params = inner(), make_params()
    state = tx.init(params)
    for first in (0, CALLS):
        cycle = batches()[first : first + CALLS]
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *cycle)
        grads = jax.tree.map(np.float32, truth(counted_mean, params, whole)[1])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def make_state(tx):
    return jaxga.TrainState.create(arrays(make_params()), tx)


def make_linen_state(tx):
    return TrainState.create(apply_fn=None, params=arrays(make_params()), tx=tx)


def build(kind, tx, **kwargs):
    if kind == "linen":
        return jaxga.linen.make_train_step(counted, accum_steps=6, **kwargs)
    return jaxga.make_train_step(counted, tx, accum_steps=6, **kwargs)


@pytest.mark.parametrize("num_devices", (None, 8))
@pytest.mark.parametrize("kind", ("plain", "linen"))
def test_a_cycle_of_calls_is_one_full_batch(kind, num_devices):
    tx = jaxga.accumulate(inner(), CALLS)
    parallel = num_devices and jaxga.DataParallel(make_mesh(num_devices))
    step = build(kind, tx, parallel=parallel)
    state = make_linen_state(tx) if kind == "linen" else make_state(tx)
    state = parallel.shard_state(state) if parallel else state
    updates = []
    for batch in batches():
        state, metrics = step(state, batch)
        updates.append(int(metrics["update"]))
        assert metrics["weight"] == batch["mask"].sum() and metrics["skipped"] == 0
    assert updates == [0, 0, 1, 1, 1, 2]
    assert (state.step if kind == "linen" else state.update) == 2
    assert distance(state.params, expected_params()) <= 1e-6


@pytest.mark.parametrize("kept", ("apart", "reduced"))
@pytest.mark.parametrize("runner", ("pmap", "checked", "unchecked"))
def test_in_the_callers_own_map(runner, kept):
    """Sums stay on their device until the cycle closes, or are reduced per call."""
    axis_name = "data" if kept == "apart" else None
    tx = jaxga.accumulate(inner(), CALLS, axis_name=axis_name)
    step = jaxga.make_train_step(counted, tx, accum_steps=6, axis_name="data")
    whole, along = P(), P("data")
    if kept == "apart":
        of_tx = jaxga.state_specs(tx, make_params(), "data")
        specs = jax.tree.map(
            lambda _: whole, make_state(jaxga.accumulate(inner(), CALLS))
        )
        specs = dataclasses.replace(specs, opt_state=of_tx)
    else:
        specs = whole

    def make(params, _):
        return jaxga.TrainState.create(params, tx)

    if runner == "pmap":
        state = make_state(jaxga.accumulate(inner(), CALLS))
        state = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
        if kept == "apart":  # each device makes its own sums
            make = jax.pmap(make, "data", in_axes=(None, 0))
            state = make(make_params(), np.arange(8))
        mapped = jax.pmap(step, "data")
        data = [split_over_devices(batch, 8) for batch in batches()]
    else:
        shard_map = functools.partial(
            jax.shard_map, mesh=make_mesh(8), check_vma=runner == "checked"
        )
        state = make_state(tx) if kept == "reduced" else None
        if kept == "apart":
            make = shard_map(make, in_specs=(whole, along), out_specs=specs)
            state = jax.jit(make)(make_params(), np.arange(8))
        mapped = jax.jit(
            shard_map(step, in_specs=(specs, along), out_specs=(specs, whole))
        )
        data = batches()
    for batch in data:
        state, metrics = mapped(state, batch)
    params = jax.device_get(state.params)
    if runner == "pmap":
        params = jax.tree.map(lambda x: x[5], params)
    assert distance(params, expected_params()) <= 1e-6
    gradient_bytes = sum(p.nbytes for p in jax.tree.leaves(make_params()))
    found = collectives(mapped.lower(state, data[0]).compile())
    large = [c for c in found if c.bytes >= gradient_bytes]
    assert len(large) == 1 and not any(c.in_loop for c in found)


@pytest.mark.parametrize("where", ("chain", "multi_transform"))
def test_inside_other_transformations(where):
    tx = jaxga.accumulate(inner(), CALLS)
    if where == "chain":
        tx = optax.chain(tx, optax.identity())
    else:
        labels = {"embed": "train", "hidden": "train", "out": "train"}
        tx = optax.multi_transform({"train": tx}, labels)
    step = jaxga.make_train_step(counted, tx, accum_steps=6)
    state = make_state(tx)
    for batch in batches():
        state, _ = step(state, batch)
    assert distance(state.params, expected_params()) <= 1e-6
    assert state.update == 2


def test_a_frozen_part_gets_no_accumulator():
    labels = {"embed": "freeze", "hidden": "train", "out": "train"}
    tx = optax.multi_transform(
        {"train": jaxga.accumulate(optax.adam(1e-2), 2), "freeze": optax.set_to_zero()},
        labels,
    )
    state = make_state(tx)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    assert make_params()["embed"].shape not in shapes
    step = jaxga.make_train_step(counted, tx, accum_steps=6)
    for batch in batches()[:2]:
        state, _ = step(state, batch)
    np.testing.assert_array_equal(state.params["embed"], make_params()["embed"])
    assert not np.array_equal(state.params["out"], make_params()["out"])


def test_flush_closes_a_short_cycle():
    tx = jaxga.accumulate(optax.sgd(1.0), CALLS)
    step = jaxga.make_train_step(counted, tx, accum_steps=6)
    state = make_state(tx)
    for batch in batches()[:2]:
        state, _ = step(state, batch)
    params, opt_state = jax.jit(tx.flush)(state.params, state.opt_state)
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches()[:2])
    moved = jax.tree.map(lambda a, b: a - np.asarray(b), make_params(), params)
    assert distance(moved, truth(counted_mean, make_params(), whole)[1]) <= 1e-6
    assert opt_state.update == 1 and jaxga.has_updated(opt_state)


def test_a_nan_skips_its_cycle_and_restores_the_model_state():
    def loss_fn(params, batch, model_state):
        loss = jaxga.WeightedSum.of(params * batch)
        return jaxga.LossOutput(loss, model_state=model_state + batch.sum())

    tx = jaxga.accumulate(optax.sgd(1.0), 2)
    step = jaxga.make_train_step(loss_fn, tx, accum_steps=2)
    state = jaxga.TrainState.create(jnp.float32(0), tx, model_state=jnp.float32(0))
    ones = np.ones(4, np.float32)
    skipped = []
    for batch in (ones, ones * np.nan, ones, ones):
        state, metrics = step(state, batch)
        skipped.append(int(metrics["skipped"]))
    assert skipped == [0, 1, 0, 0]
    assert (state.update, state.skipped) == (1, 1)
    assert state.params == -1 and state.model_state == 12


def test_every_call_gets_a_key_of_its_own():
    def loss_fn(params, batch, key):
        draw = jaxga.Stack(jax.random.uniform(key))
        return jaxga.LossOutput(jaxga.WeightedSum.of(params * batch), {"draw": draw})

    tx = jaxga.accumulate(optax.sgd(1.0), 3)
    step = jaxga.make_train_step(loss_fn, tx, accum_steps=2)
    state = jaxga.TrainState.create(jnp.float32(0), tx, key=jax.random.key(0))
    draws = []
    for _ in range(5):
        state, metrics = step(state, np.ones(4, np.float32))
        draws.extend(np.asarray(metrics["draw"]).tolist())
    assert len(set(draws)) == 10


def test_one_trace_over_a_run():
    traces = []

    def traced(params, batch):
        traces.append(1)
        return counted(params, batch)

    tx = jaxga.accumulate(optax.adam(1e-3), lambda updates: 1 + updates)
    step = jaxga.make_train_step(traced, tx, accum_steps=6)
    state = make_state(tx)
    updates = []
    for batch in batches():
        state, metrics = step(state, batch)
        updates.append(int(metrics["update"]))
    assert updates == [1, 1, 2, 2, 2, 3] and len(traces) == 1


def test_counters_of_a_resumed_run_go_on():
    """A new optimizer in an old run: its own counts begin at 0, the run's do not."""
    tx = jaxga.accumulate(optax.sgd(0.1), 2)
    traces = []

    def traced(params, batch):
        traces.append(1)
        return counted(params, batch)

    step = jaxga.linen.make_train_step(traced, accum_steps=6)
    state = make_linen_state(tx).replace(step=1000)
    steps = []
    for batch in batches()[:4]:
        state, metrics = step(state, batch)
        steps.append((int(state.step), int(metrics["update"])))
    assert steps == [(1000, 1000), (1001, 1001), (1001, 1001), (1002, 1002)]
    assert len(traces) == 1
    step = jaxga.make_train_step(counted, tx, accum_steps=6)
    state = dataclasses.replace(
        make_state(tx), update=jnp.int32(1000), skipped=jnp.int32(7)
    )
    for batch in batches()[:2]:
        state, _ = step(state, batch)
    assert (state.update, state.skipped) == (1001, 7)


# What is refused.


def test_part_that_does_not_accumulate_beside_one_that_does():
    labels = {"embed": "plain", "hidden": "sums", "out": "sums"}
    tx = optax.multi_transform(
        {"sums": jaxga.accumulate(optax.sgd(1.0), 2), "plain": optax.sgd(1.0)}, labels
    )
    step = jaxga.make_train_step(counted, tx, accum_steps=6)
    with pytest.raises(ValueError, match=r"\['embed'\].*around the whole optimizer"):
        step(make_state(tx), make_batch())


def test_several_terms_need_one_call():
    tx = jaxga.accumulate(optax.sgd(1.0), 2)
    step = jaxga.make_train_step(three_terms, tx, accum_steps=6)
    with pytest.raises(ValueError, match="'penalty'.*in one call.*term_weights="):
        step(make_state(tx), make_batch())


def test_a_loss_scale_needs_one_call():
    tx = jaxga.accumulate(optax.sgd(1.0), 2)
    scale = jmp.DynamicLossScale(jnp.float32(8))
    state = jaxga.TrainState.create(arrays(make_params()), tx, loss_scale=scale)
    step = jaxga.make_train_step(counted, tx, accum_steps=6)
    with pytest.raises(ValueError, match="loss scale.*accumulate.*in one call"):
        step(state, make_batch())


def test_the_policy_is_the_optimizers():
    tx = jaxga.accumulate(optax.sgd(1.0), 2)
    step = jaxga.make_train_step(counted, tx, accum_steps=6, nonfinite="propagate")
    with pytest.raises(ValueError, match="'propagate'.*give it to accumulate"):
        step(make_state(tx), make_batch())


def test_two_accumulators_are_refused():
    labels = {"embed": "a", "hidden": "b", "out": "b"}
    one, two = (jaxga.accumulate(optax.sgd(1.0), n) for n in (2, 3))
    tx = optax.multi_transform({"a": one, "b": two}, labels)
    step = jaxga.make_train_step(counted, tx, accum_steps=6)
    with pytest.raises(ValueError, match="holds 2 accumulators.*one jaxga.accumulate"):
        step(make_state(tx), make_batch())


def test_multi_steps_is_refused():
    tx = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    step = jaxga.make_train_step(counted, tx, accum_steps=6)
    with pytest.raises(ValueError, match="optax.MultiSteps.*jaxga.accumulate"):
        step(make_state(tx), make_batch())


def test_parallel_and_sums_that_stay_apart_exclude_each_other():
    tx = jaxga.accumulate(optax.sgd(1.0), 2, axis_name="data")
    mesh, params = make_mesh(8), arrays(make_params())
    step = jaxga.linen.make_train_step(
        counted, accum_steps=6, parallel=jaxga.DataParallel(mesh)
    )
    make = jax.shard_map(
        tx.init,
        mesh=mesh,
        in_specs=P(),
        out_specs=jaxga.state_specs(tx, params, "data"),
    )
    state = TrainState(0, None, params, tx, jax.jit(make)(params))
    with pytest.raises(ValueError, match="leave axis_name out of accumulate"):
        step(state, make_batch())
