"""Model state: each rule over micro-batches and devices; what is untouched is free."""

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxga import collectives
from problems import make_mesh, split_over_devices

pytestmark = pytest.mark.anywhere

ROWS = np.arange(1.0, 25.0, dtype=np.float32)
STATE = {
    "mean": np.float32(100),  # an exponential average, as batch norm keeps it
    "peak": np.zeros(2, np.float32),  # a history of largest values, as fp8 keeps it
    "calls": np.int32(7),
    "frozen": np.ones(1000, np.float32),
}


def loss_fn(params, rows, model_state):
    history = jnp.roll(model_state["peak"], 1).at[0].set(rows.max())
    new = {
        "mean": 0.5 * model_state["mean"] + 0.5 * rows.mean(),
        "peak": history,
        "calls": model_state["calls"] + 1,
        "frozen": model_state["frozen"],
    }
    loss = jaxga.WeightedSum.of(params * rows * model_state["frozen"][0])
    return jaxga.LossOutput(loss, model_state=new)


def run(rule, accum_steps=3, rows=ROWS):
    cycle = jaxga.value_and_grad(
        loss_fn, accum_steps=accum_steps, model_state_merge=rule
    )
    run_cycle = jax.jit(lambda rows: cycle(jnp.float32(1), rows, model_state=STATE))
    return run_cycle(rows)[0].model_state


def test_carry_threads_the_microbatches_in_order():
    mean = 100.0
    for i in range(3):
        mean = 0.5 * mean + 0.5 * ROWS[i::3].mean()
    state = run("carry")
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-6)
    np.testing.assert_array_equal(state["peak"], [24, 23])
    assert state["calls"] == 10


def test_mean_starts_each_microbatch_from_the_first_state():
    state = run("mean")
    expected = np.mean([50 + 0.5 * ROWS[i::3].mean() for i in range(3)])
    np.testing.assert_allclose(state["mean"], expected, rtol=1e-6)
    assert state["calls"] == 8


def test_max_starts_each_microbatch_from_the_first_state():
    state = run({"peak": "max", "mean": "mean"})
    np.testing.assert_array_equal(state["peak"], [24, 0])  # rolled once
    assert state["calls"] == 10  # not named: carried


@pytest.mark.parametrize("runner", ("pmap", "checked", "unchecked"))
@pytest.mark.parametrize("rule", ("carry", "mean", "max"))
def test_devices_agree_afterwards(rule, runner):
    cycle = jaxga.value_and_grad(
        loss_fn, accum_steps=3, axis_name="data", model_state_merge=rule
    )

    def state_of(params, rows, state):
        return cycle(params, rows, model_state=state)[0].model_state

    if runner == "pmap":
        devices = jax.devices()[:4]
        mapped = jax.pmap(state_of, "data", in_axes=(None, 0, None), devices=devices)
        state = mapped(jnp.float32(1), split_over_devices(ROWS, 4), STATE)
        assert all((leaf == leaf[:1]).all() for leaf in jax.tree.leaves(state))
        state = jax.tree.map(lambda leaf: leaf[0], state)
    else:
        mapped = jax.shard_map(
            state_of,
            mesh=make_mesh(4),
            in_specs=(P(), P("data"), P()),
            out_specs=P(),
            check_vma=runner == "checked",
        )
        state = jax.jit(mapped)(jnp.float32(1), ROWS, STATE)
    per_device = [run(rule, rows=rows) for rows in split_over_devices(ROWS, 4)]
    merge = np.max if rule == "max" else np.mean
    for name in ("mean", "peak"):
        expected = merge([s[name] for s in per_device], axis=0)
        np.testing.assert_allclose(state[name], expected, rtol=1e-6)
    assert state["calls"] == per_device[0]["calls"]


def test_untouched_leaves_cost_no_communication_and_come_back_as_they_are():
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=3, axis_name="data")
    identical = []

    def state_of(params, rows, state):
        new = cycle(params, rows, model_state=state)[0].model_state
        identical.append(new["frozen"] is state["frozen"])
        return new

    mapped = jax.shard_map(
        state_of,
        mesh=make_mesh(8),
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
        check_vma=False,
    )
    compiled = jax.jit(mapped).lower(jnp.float32(1), ROWS, STATE).compile()
    assert identical == [True]
    assert sum(c.bytes for c in collectives(compiled)) < 100


def test_random_keys_come_back_as_they_are():
    def with_key(params, rows, model_state):
        key = model_state["key"]
        noise = jax.random.normal(
            jax.random.fold_in(key, model_state["count"]), rows.shape
        )
        state = {"key": key, "count": model_state["count"] + 1}
        loss = jaxga.WeightedSum.of(params * rows * noise)
        return jaxga.LossOutput(loss, model_state=state)

    state = {"key": jax.random.key(3), "count": jnp.uint32(0)}
    cycle = jaxga.value_and_grad(with_key, accum_steps=4, axis_name="data")
    mapped = jax.shard_map(
        lambda p, r, s: cycle(p, r, model_state=s)[0].model_state,
        mesh=make_mesh(2),
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
    )
    new = jax.jit(mapped)(jnp.float32(1), ROWS, state)
    assert (jax.random.key_data(new["key"]) == jax.random.key_data(state["key"])).all()
    assert new["count"] == 4


@pytest.mark.parametrize("rule", ("carry", "mean", "max"))
def test_microbatch_without_any_weight_leaves_the_state_as_it_was(rule):
    def masked(params, batch, model_state):
        rows, mask = batch
        out = loss_fn(params, rows, model_state)
        return jaxga.LossOutput(
            jaxga.WeightedSum.of(params * rows, where=mask), model_state=out.model_state
        )

    cycle = jaxga.value_and_grad(masked, accum_steps=3, model_state_merge=rule)
    real = np.arange(24) % 3 != 1
    run_masked = jax.jit(
        lambda rows, mask: cycle(jnp.float32(1), (rows, mask), model_state=STATE)
    )
    state = run_masked(np.where(real, ROWS, 1e6), real)[0].model_state
    kept = np.stack([ROWS[0::3], ROWS[2::3]], 1).reshape(-1)
    expected = run(rule, accum_steps=2, rows=kept)
    np.testing.assert_allclose(state["mean"], expected["mean"], rtol=1e-6)
    np.testing.assert_array_equal(state["peak"], expected["peak"])
    nothing = run_masked(ROWS, np.zeros(24, bool))[0].model_state
    assert nothing["mean"] == 100 and (nothing["peak"] == 0).all()


def test_bfloat16_state_is_averaged_in_float32_and_keeps_its_dtype():
    def half(params, rows, model_state):
        state = (rows.mean() + 0 * model_state).astype(jnp.bfloat16)
        return jaxga.LossOutput(jaxga.WeightedSum.of(params * rows), model_state=state)

    rows = np.repeat(np.float32([256, 1]), 8).reshape(2, 8).T.reshape(-1)
    cycle = jaxga.value_and_grad(half, accum_steps=2, model_state_merge="mean")
    state = cycle(jnp.float32(1), rows, model_state=jnp.bfloat16(0))[0].model_state
    assert state.dtype == jnp.bfloat16 and state == jnp.bfloat16(128.5)


def test_float8_state_has_no_infinity_to_start_from():
    def history(params, rows, model_state):
        state = (model_state.astype(jnp.float32) + 1).astype(jnp.float8_e4m3fn)
        return jaxga.LossOutput(jaxga.WeightedSum.of(params * rows), model_state=state)

    cycle = jaxga.value_and_grad(history, accum_steps=2, model_state_merge="max")
    first = jnp.ones(2, jnp.float8_e4m3fn)
    state = cycle(jnp.float32(1), ROWS, model_state=first)[0].model_state
    assert state.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(state.astype(jnp.float32), [2, 2])


def test_a_device_without_rows_has_no_say():
    """Padding may leave devices without any weight: their state is an old one."""

    def masked(params, batch, model_state):
        rows, mask = batch
        loss = jaxga.WeightedSum.of(params * rows, where=mask)
        return jaxga.LossOutput(loss, model_state=0 * model_state + 8)

    for rule in ("carry", "mean", "max"):
        cycle = jaxga.value_and_grad(
            masked, accum_steps=2, axis_name="data", model_state_merge=rule
        )
        mapped = jax.shard_map(
            lambda b, s, cycle=cycle: cycle(jnp.float32(1), b, model_state=s)[0],
            mesh=make_mesh(4),
            in_specs=(P("data"), P()),
            out_specs=P(),
        )
        batch = ROWS[:16], np.arange(16) < 8
        assert jax.jit(mapped)(batch, jnp.float32(0)).model_state == 8


def test_state_of_a_short_cycle_is_that_of_its_microbatches():
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=3, model_state_merge="mean")
    run_short = jax.jit(
        lambda n: cycle(jnp.float32(1), ROWS, model_state=STATE, num_microbatches=n)
    )
    expected = np.mean([50 + 0.5 * ROWS[i::3].mean() for i in range(2)])
    np.testing.assert_allclose(run_short(2)[0].model_state["mean"], expected, rtol=1e-6)
    untouched = run_short(0)[0].model_state
    assert untouched["mean"] == 100 and untouched["calls"] == 7


# What is overwritten with its gradient, as Flax keeps scales and histories of fp8.


@jax.custom_vjp
def recorded(x, largest):
    return x


recorded.defvjp(
    lambda x, largest: (x, jnp.abs(x).max()), lambda largest, grad: (grad, largest)
)
OVERWRITTEN = "_overwrite_with_gradient"


def recording_loss(params, batch, model_state):
    rows, mask = batch
    x = recorded(params * rows, model_state[OVERWRITTEN]["largest"])
    loss = jaxga.WeightedSum.of(x, where=mask)
    new = model_state | {"calls": model_state["calls"] + 1}
    return jaxga.LossOutput(loss, model_state=new)


@pytest.mark.parametrize("rule", ("carry", {"calls": "mean"}), ids=("carry", "dict"))
def test_overwritten_with_the_largest_gradient(rule):
    cycle = jaxga.value_and_grad(recording_loss, accum_steps=3, model_state_merge=rule)
    state = {OVERWRITTEN: {"largest": jnp.float32(500)}, "calls": jnp.int32(0)}
    mask = np.arange(24) % 3 != 1
    rows = np.where(mask, ROWS, 1e6)  # of no weight, and so of no say

    @jax.jit
    def run(mask, num_microbatches):
        return cycle(
            jnp.float32(2),
            (rows, mask),
            model_state=state,
            num_microbatches=num_microbatches,
        )

    output, grads = run(mask, 3)
    assert output.model_state[OVERWRITTEN]["largest"] == 2 * ROWS[mask].max()
    np.testing.assert_allclose(grads, ROWS[mask].mean(), rtol=1e-6)
    assert output.model_state["calls"] == (3 if rule == "carry" else 1)
    for present, num in ((mask, 0), (0 * mask > 0, 3)):
        assert run(present, num)[0].model_state[OVERWRITTEN]["largest"] == 500


@pytest.mark.parametrize("check_vma", (True, False))
def test_overwritten_with_the_largest_of_all_devices(check_vma):
    cycle = jaxga.value_and_grad(recording_loss, accum_steps=3, axis_name="data")
    mapped = jax.shard_map(
        lambda batch, state: cycle(jnp.float32(2), batch, model_state=state)[0],
        mesh=make_mesh(4),
        in_specs=(P("data"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    state = {OVERWRITTEN: {"largest": jnp.float32(500)}, "calls": jnp.int32(0)}
    batch = np.roll(ROWS, 10), np.ones(24, bool)
    output = jax.jit(mapped)(batch, state)
    assert output.model_state[OVERWRITTEN]["largest"] == 48
