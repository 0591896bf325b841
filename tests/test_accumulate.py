"""`accumulate`: what closes a cycle, what a bad micro-batch does, what a call costs."""

import re

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax

RNG = np.random.default_rng(0)
PARAMS = {
    "w": RNG.normal(size=(4, 3)).astype("f4"),
    "b": RNG.normal(size=3).astype("f4"),
}
CALLS = 4


def make_calls(number, seed=1):
    """Summed gradients and their weights, one entry per call."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 9, size=number).astype(np.int32)
    sums = [
        {n: (rng.normal(size=p.shape) * w).astype("f4") for n, p in PARAMS.items()}
        for w in weights
    ]
    return sums, weights


def mean(sums, weights):
    return jax.tree.map(lambda *leaves: sum(leaves) / np.float32(sum(weights)), *sums)


def run(tx, sums, weights, state=None, params=None, **kwargs):
    """All calls through `step`, jitted once; every state on the way."""
    step, states = jax.jit(tx.step), []
    params = jax.tree.map(jnp.asarray, params or PARAMS)
    state = state or tx.init(params)
    for grads, weight in zip(sums, weights, strict=True):
        params, state = step(params, state, grads, weight, **kwargs)
        states.append(state)
    assert step._cache_size() == bool(len(sums)), "one trace over the run"
    return params, states


def after(inner, *cycles):
    """The inner transformation on the mean of each cycle."""
    params, state = jax.tree.map(jnp.asarray, PARAMS), inner.init(PARAMS)
    for sums, weights in cycles:
        updates, state = inner.update(mean(sums, weights), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(actual, expected, rtol=2e-7):
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        got, want = np.asarray(got, "f8"), np.asarray(want, "f8")
        assert np.abs(got - want).max() <= rtol * np.abs(want).max()


def assert_equal(actual, expected):
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_array_equal(got, want)


def updated(states):
    return [bool(jaxga.has_updated(state)) for state in states]


# When a cycle closes.


def test_steps_as_a_function_of_updates():
    tx = jaxga.accumulate(optax.sgd(0.1), lambda updates: jnp.minimum(1 + updates, 3))
    _, states = run(tx, *make_calls(9))
    assert updated(states) == [1, 0, 1, 0, 0, 1, 0, 0, 1]


def test_whichever_comes_first():
    sums, _ = make_calls(8)
    tx = jaxga.accumulate(optax.sgd(0.1), 3, until_weight=10)
    _, states = run(tx, sums, np.int32([1, 1, 1, 4, 6, 2, 9, 1]))
    assert updated(states) == [0, 0, 1, 0, 1, 0, 1, 0]
    assert [float(s.weight) for s in states if s.updated] == [3, 10, 11]
    assert [int(s.num_microbatches) for s in states] == [1, 2, 0, 1, 0, 1, 0, 1]


def test_function_of_updates_with_until_weight():
    sums, _ = make_calls(5)
    tx = jaxga.accumulate(
        optax.sgd(0.1), lambda n: jnp.where(n < 1, 2, 9), until_weight=10
    )
    _, states = run(tx, sums, np.float32([1, 1, 4.5, 4.5, 1.0]))
    assert updated(states) == [0, 1, 0, 0, 1]


def test_flush_closes_a_short_cycle_exactly():
    sums, weights = make_calls(3)
    inner = optax.adam(1e-2)
    tx = jaxga.accumulate(inner, 100)
    params, states = run(tx, sums, weights)
    flushed, state = jax.jit(tx.flush)(params, states[-1])
    expected = after(inner, (sums, weights))
    assert_close(flushed, expected)
    assert (state.update, state.num_microbatches) == (1, 0) and state.updated
    # With the call that ends it, of which it is not known before that it does.
    params, states = run(tx, sums[:2], weights[:2], flush=False)
    params, state = jax.jit(tx.step)(
        params, states[-1], sums[2], weights[2], flush=True
    )
    assert_equal(params, flushed)


def test_flush_through_update():
    sums, weights = make_calls(3)
    tx = jaxga.accumulate(optax.sgd(0.1), 100)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for i in range(3):
        updates, state = update(sums[i], state, PARAMS, weights[i], flush=i == 2)
    assert update._cache_size() == 1
    params = optax.apply_updates(PARAMS, updates)
    assert_close(params, after(optax.sgd(0.1), (sums, weights)))


def test_flushing_an_empty_cycle_changes_nothing():
    tx = jaxga.accumulate(optax.adam(1e-2), 2)
    params, states = run(tx, *make_calls(2))
    for state in (states[-1], tx.init(params)):
        again, after_flush = jax.jit(tx.flush)(params, state)
        assert_equal(again, params)
        assert not after_flush.updated, "nothing happened in the last call"
        assert_equal(after_flush._replace(updated=state.updated), state)


def test_calls_without_weight_count_alike():
    sums, _ = make_calls(CALLS)
    tx = jaxga.accumulate(optax.sgd(0.1), CALLS)
    step, params, state = jax.jit(tx.step), PARAMS, tx.init(PARAMS)
    for grads in sums:
        params, state = step(params, state, grads)
    assert_close(params, after(optax.sgd(0.1), (sums, np.ones(CALLS, "f4"))))


# Weights.


def test_a_million_weights_are_exact():
    """8191 a million times; a float32 alone is 1e-4 off, an int32 overflows."""
    tx = jaxga.accumulate(optax.sgd(0.1), 2**30)
    million, params = 10**6, jnp.zeros(1)

    def call(carry, _):
        (params, state), plain = carry
        carry = tx.step(params, state, jnp.zeros(1), jnp.int32(8191)), plain + 8191.0
        return carry, None

    start = ((params, tx.init(params)), jnp.float32(0))
    ((_, state), plain), _ = jax.jit(
        lambda carry: lax.scan(call, carry, None, length=million)
    )(start)
    high, low = np.asarray(state.sum_weight, np.float64)
    assert high + low == million * 8191
    assert abs(float(plain) - million * 8191) > 1e5


@pytest.mark.parametrize("weight", (2**30 + 1, np.int64(2**40 + 3), 0.1, 5e9 + 1))
def test_large_and_fractional_weights(weight):
    tx = jaxga.accumulate(optax.sgd(1.0), 1000)
    params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    for _ in range(3):
        params, state = tx.step(params, state, jnp.ones(1), weight)
    high, low = np.asarray(state.sum_weight, np.float64)
    np.testing.assert_allclose(high + low, 3 * float(weight), rtol=1e-13)


def test_unsigned_and_narrow_weights():
    tx = jaxga.accumulate(optax.sgd(1.0), 1000)
    params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    step = jax.jit(tx.step)
    for weight in (
        jnp.uint32(2**32 - 1),
        jnp.int8(5),
        jnp.bool_(True),
        jnp.bfloat16(2),
    ):
        params, state = step(params, state, jnp.ones(1), weight)
    high, low = np.asarray(state.sum_weight, np.float64)
    assert high + low == 2**32 + 7


def test_until_weight_beyond_float32():
    """16,777,217 is no float32: a plain sum would never reach it by ones."""
    tx = jaxga.accumulate(optax.sgd(1.0), until_weight=2**24 + 1)
    params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    seen = []
    for weight in (2**24, 1, 2**24 + 1):
        params, state = jax.jit(tx.step)(params, state, jnp.ones(1), jnp.int32(weight))
        seen.append(bool(state.updated))
    assert seen == [False, True, True]


# Bad micro-batches.


@pytest.mark.parametrize("bad", ("gradient", "weight", "negative", "value", "overflow"))
@pytest.mark.parametrize("nonfinite", ("skip_cycle", "drop_microbatch"))
def test_a_bad_microbatch(nonfinite, bad):
    """In the second cycle: it is skipped, or lacks the one; the third is as ever."""
    inner = optax.adam(1e-2)
    sums, weights = make_calls(3 * CALLS)
    weights = weights.astype("f4")
    good_sums, good_weights = list(sums), weights.copy()
    values = np.ones(3 * CALLS, "f4")
    number = {"gradient": np.nan, "overflow": 1e30}.get(bad)
    if number:
        sums[5] = jax.tree.map(lambda x: np.full_like(x, number), sums[5])
    elif bad == "value":
        values[5] = np.inf
    else:
        weights[5] = np.nan if bad == "weight" else -1
    tx = jaxga.accumulate(inner, CALLS, nonfinite=nonfinite)
    step, params, state, states = jax.jit(tx.step), PARAMS, tx.init(PARAMS), []
    for i, grads in enumerate(sums):
        params, state = step(params, state, grads, weights[i], value=values[i])
        states.append(state)
    kept = [i for i in range(4, 8) if i != 5]
    cycles = [range(4), kept, range(8, 12)]
    if nonfinite == "skip_cycle":
        del cycles[1]
    expected = [([good_sums[i] for i in c], good_weights[list(c)]) for c in cycles]
    assert_close(params, after(inner, *expected))
    skips = int(nonfinite == "skip_cycle")
    assert (state.update, state.skipped) == (3 - skips, skips)
    assert [int(s.skipped) for s in states] == [0] * 7 + [skips] * 5
    assert updated(states)[7] == (not skips)
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), state))


def test_propagate_lets_it_through_but_no_further_than_the_user_asked():
    sums, weights = make_calls(2)
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), sums[0])
    tx = jaxga.accumulate(optax.sgd(0.1), 2, nonfinite="propagate")
    params, states = run(tx, [sums[0], bad], weights)
    assert np.isnan(params["w"]).all() and states[-1].updated
    # The sums themselves start anew.
    params, states = run(tx, sums, weights, state=states[-1], params=PARAMS)
    assert_close(params, after(optax.sgd(0.1), (sums, weights)))


def test_multisteps_keeps_a_nan_for_ever():
    """The control."""
    sums, _ = make_calls(6)
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), sums[0])
    tx = optax.MultiSteps(optax.apply_if_finite(optax.sgd(0.1), 100), 2)
    params, state = PARAMS, tx.init(PARAMS)
    for grads in (bad, *sums[1:]):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_equal(params, PARAMS)  # no update ever again
    tx = jaxga.accumulate(optax.sgd(0.1), 2)
    params, states = run(tx, [bad, *sums[1:]], np.ones(6, "f4"))
    assert (states[-1].update, states[-1].skipped) == (2, 1)
    cycles = [(sums[i : i + 2], np.ones(2, "f4")) for i in (2, 4)]
    assert_close(params, after(optax.sgd(0.1), *cycles))


@pytest.mark.parametrize("nonfinite", ("skip_cycle", "drop_microbatch", "propagate"))
def test_a_cycle_without_weight_changes_nothing_and_is_counted(nonfinite):
    tx = jaxga.accumulate(optax.adamw(1e-2), 2, nonfinite=nonfinite)
    sums = [jax.tree.map(np.zeros_like, PARAMS)] * 2
    params, states = run(tx, sums, np.int32([0, 0]))
    assert_equal(params, PARAMS)
    assert (states[-1].update, states[-1].skipped) == (0, 1)
    assert_equal(states[-1].inner_state, tx.init(PARAMS).inner_state)
    assert states[-1].grad_norm == 0 == states[-1].weight


def test_a_weight_that_is_no_number_ends_the_cycle_that_a_weight_ends():
    sums, _ = make_calls(3)
    tx = jaxga.accumulate(optax.sgd(0.1), until_weight=10)
    _, states = run(tx, sums, np.float32([np.nan, 9, 2]))
    assert [int(s.skipped) for s in states] == [1, 1, 1]
    assert updated(states) == [0, 0, 1]


# What the inner transformation is given.


def test_it_runs_once_per_cycle():
    runs = []

    def count(updates, params):
        jax.debug.callback(lambda: runs.append(1))
        return updates

    inner = optax.chain(optax.stateless(count), optax.adam(1e-2))
    for tx in (jaxga.accumulate(inner, CALLS), optax.MultiSteps(inner, CALLS)):
        runs.clear()
        state, update = tx.init(PARAMS), jax.jit(tx.update)
        for grads in make_calls(3 * CALLS)[0]:
            _, state = update(grads, state, PARAMS)
        jax.effects_barrier()
        assert len(runs) == (3 * CALLS if isinstance(tx, optax.MultiSteps) else 3)


def test_value_is_the_weighted_mean_of_the_cycle():
    """Also where a micro-batch of no weight has no loss; plateau acts on it."""
    values = np.float32([1.0, 5.0, np.nan, 2.0])
    weights = np.int32([3, 1, 0, 4])
    seen = optax.contrib.reduce_on_plateau(patience=2, cooldown=0)
    tx = jaxga.accumulate(optax.chain(optax.sgd(1.0), seen), CALLS)
    sums, _ = make_calls(CALLS)
    step, params, state = jax.jit(tx.step), PARAMS, tx.init(PARAMS)
    for i in range(CALLS):
        params, state = step(params, state, sums[i], weights[i], value=values[i])
    plateau = state.inner_state[1]
    np.testing.assert_allclose(plateau.best_value, (3 * 1 + 5 + 4 * 2) / 8, rtol=1e-6)
    for _ in range(2):  # no better twice: the rate is reduced, by updates, not by calls
        assert plateau.scale == 1
        for i in range(CALLS):
            params, state = step(params, state, sums[i], weights[i], value=values[i])
        plateau = state.inner_state[1]
    assert plateau.scale < 1


def test_flush_hands_on_the_mean_value_so_far():
    inner = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau())
    tx = jaxga.accumulate(inner, 100)
    params, state = PARAMS, tx.init(PARAMS)
    for weight, value in ((1, 2.0), (3, 6.0)):
        params, state = tx.step(params, state, PARAMS, weight, value=value)
    _, state = tx.flush(params, state)
    assert state.updated and state.inner_state[1].best_value == 5


def test_the_norm_and_weight_of_the_last_cycle_are_kept():
    sums, weights = make_calls(5)
    tx = jaxga.accumulate(optax.sgd(0.1), 2)
    _, states = run(tx, sums, weights)
    norms = [optax.tree.norm(mean(sums[i : i + 2], weights[i : i + 2])) for i in (0, 2)]
    expected = [0, norms[0], norms[0], norms[1], norms[1]]
    np.testing.assert_allclose([s.grad_norm for s in states], expected, rtol=1e-6)
    totals = [weights[i] + weights[i + 1] for i in (0, 2)]
    assert [int(s.weight) for s in states] == [
        0,
        totals[0],
        totals[0],
        *[totals[1]] * 2,
    ]


def test_bfloat16_gradients_are_summed_in_float32():
    """Equal terms: a bfloat16 sum stands still at 256."""
    params = jnp.zeros(2, jnp.bfloat16)
    sums = {None: 1000.0, jnp.bfloat16: 256.0}
    for accum_dtype, expected in sums.items():
        tx = jaxga.accumulate(
            optax.sgd(1.0), until_weight=1000, accum_dtype=accum_dtype
        )
        state = tx.init(params)
        _, state = jax.jit(
            lambda s, tx=tx: lax.fori_loop(
                0,
                1000,
                lambda _, c: tx.step(*c, jnp.ones(2, jnp.bfloat16), 0.5),
                (params, s),
            )
        )(state)
        assert (state.sums == expected).all()


def test_complex_parameters():
    params = jnp.asarray([1 + 1j, 2.0], jnp.complex64)
    tx = jaxga.accumulate(optax.sgd(1.0), 2)
    state = tx.init(params)
    for weight in (1, 3):
        params, state = tx.step(params, state, weight * jnp.asarray([2j, 1.0]), weight)
    np.testing.assert_allclose(params, [1 - 1j, 1.0])
    np.testing.assert_allclose(state.grad_norm, np.sqrt(5), rtol=1e-6)


# The state.


def test_its_tree_never_changes():
    tx = jaxga.accumulate(optax.adamw(1e-2), 2, nonfinite="drop_microbatch")
    start = tx.init(PARAMS)

    def types(state):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)

    sums, weights = make_calls(4)
    params, states = run(tx, sums, weights)
    flushed = tx.flush(params, states[0])[1]
    through_update = tx.update(sums[0], start, PARAMS, 2, value=1.0)[1]
    for state in (*states, flushed, through_update):
        assert types(state) == types(start)
        leaves, treedef = jax.tree.flatten(state)
        assert_equal(jax.tree.unflatten(treedef, leaves), state)


@pytest.mark.parametrize("calls_before", range(CALLS))
def test_saved_and_restored_it_continues_bit_for_bit(tmp_path, calls_before):
    tx = jaxga.accumulate(optax.adamw(1e-2), CALLS)
    sums, weights = make_calls(2 * CALLS)
    params, states = run(tx, sums[:calls_before], weights[:calls_before])
    state = states[-1] if states else tx.init(PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: (params, state))
        restored = checkpointer.restore(tmp_path / "state", like)
    rest = sums[calls_before:], weights[calls_before:]
    straight = run(tx, *rest, params=params, state=state)
    resumed = run(tx, *rest, params=restored[0], state=restored[1])
    assert_equal(resumed, straight)


def test_has_updated_needs_exactly_one():
    with pytest.raises(ValueError, match="holds no state of jaxga.accumulate"):
        jaxga.has_updated(optax.adam(1e-3).init(PARAMS))
    both = [jaxga.accumulate(optax.sgd(0.1), 2).init(PARAMS)] * 2
    with pytest.raises(
        ValueError, match=r"2 states of jaxga.accumulate, at \[0\], \[1\]"
    ):
        jaxga.has_updated(both)
    assert not jaxga.has_updated({"opt_state": (both[0],), "params": PARAMS})


def test_tree_map_params_finds_the_sums():
    tx = jaxga.accumulate(optax.adam(1e-2), 2)
    names = {"w": "W", "b": "B"}
    state = optax.tree_utils.tree_map_params(
        tx, lambda _, n: n, tx.init(PARAMS), names, transform_non_params=lambda _: None
    )
    assert state.sums == names and state.inner_state[0].mu == names


# Costs, from the compiled program.

SHAPES = {f"w{i}": jax.ShapeDtypeStruct((512, 1024), jnp.float32) for i in range(3)}
SIZE = sum(s.size for s in SHAPES.values())
WEIGHT = jax.ShapeDtypeStruct((), jnp.int32)


# jaxlib 0.10.0 and 0.10.1 copy what a conditional reads: 4 bytes, written and read.
COPIED = 0 if jax.__version_info__ >= (0, 10, 2) else 4


class Cost:
    """Per parameter: bytes accessed, temporaries, aliased; and copies of a leaf."""

    def __init__(self, function, *args):
        compiled = jax.jit(function, donate_argnums=(0, 1)).lower(*args).compile()
        memory = compiled.memory_analysis()
        self.bytes = compiled.cost_analysis()["bytes accessed"] / SIZE
        self.temp = memory.temp_size_in_bytes / SIZE
        self.not_aliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
        # The table of pointers to the outputs is no buffer of the user's.
        self.not_aliased -= 8 * len(jax.tree.leaves(jax.eval_shape(function, *args)))
        text = compiled.as_text()
        self.copies = len(re.findall(r"= f32\[512,1024\]\S* copy\(", text))


def plain_adamw(params, state, sums):
    updates, state = optax.adamw(1e-3).update(sums, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    "settings, extra",
    [
        (dict(accum_steps=8), 4),
        (dict(accum_steps=lambda updates: jnp.minimum(updates + 1, 8)), 4),
        (dict(until_weight=4_000_000), 4),
        (dict(accum_steps=8, until_weight=1e6, nonfinite="propagate"), 4),
        (dict(accum_steps=8, nonfinite="drop_microbatch"), 8),
    ],
    ids=("steps", "schedule", "until_weight", "both", "drop_microbatch"),
)
def test_a_call_costs_an_addition_and_its_closing_one_optimizer(settings, extra):
    """12 bytes for the sum; in the closing branch AdamW's, and 4 to read the norm.

    Both branches are counted, since they are in one program. `drop_microbatch` reads
    the gradient once more.
    """
    tx = jaxga.accumulate(optax.adamw(1e-3), **settings)
    state = jax.eval_shape(tx.init, SHAPES)
    cost = Cost(tx.step, SHAPES, state, SHAPES, WEIGHT)
    inner_state = jax.eval_shape(optax.adamw(1e-3).init, SHAPES)
    closing = Cost(plain_adamw, SHAPES, inner_state, SHAPES).bytes
    copied = COPIED * extra / 2  # each tree that is read besides
    assert 12 + closing <= cost.bytes <= 12 + closing + extra + copied + 0.5
    assert cost.temp <= COPIED + 0.01 and cost.copies == 0
    assert cost.not_aliased <= 1  # the output's own table may be rounded up


def test_multisteps_costs_more():
    """The control."""
    tx = optax.MultiSteps(optax.adamw(1e-3), 8)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    cost = Cost(step, SHAPES, jax.eval_shape(tx.init, SHAPES), SHAPES)
    assert cost.bytes > 80 and cost.temp > 8 and cost.copies >= 3


def test_another_order_of_arguments_would_copy():
    """The control: returned in another order than donated."""
    tx = jaxga.accumulate(optax.adamw(1e-3), 8)

    def swapped(state, params, grads):
        return tx.step(params, state, grads)

    cost = Cost(swapped, jax.eval_shape(tx.init, SHAPES), SHAPES, SHAPES)
    assert cost.copies >= 3 and cost.temp > 1


def test_flush_needs_no_temporary():
    tx = jaxga.accumulate(optax.adamw(1e-3), 8)
    cost = Cost(tx.flush, SHAPES, jax.eval_shape(tx.init, SHAPES))
    assert cost.temp <= COPIED + 0.01 and cost.copies == 0
    assert cost.not_aliased <= 1


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(1e-2),
        optax.contrib.dog(1.0),
        optax.contrib.cocob(),
        optax.lbfgs(0.1, linesearch=None),
    ],
    ids=("adam", "dog", "cocob", "lbfgs"),
)
def test_a_fresh_state_can_be_donated(inner):
    """Every leaf a buffer of its own, also where the inner state keeps parameters."""
    tx = jaxga.accumulate(inner, 2)
    params = jax.tree.map(jnp.array, PARAMS)
    buffers = jax.tree.leaves((params, tx.init(params)))
    assert len({id(leaf) for leaf in buffers}) == len(buffers)
    step = jax.jit(tx.step, donate_argnums=(0, 1))
    params, state = step(params, tx.init(params), PARAMS)
    step(params, state, PARAMS)


# What is refused.


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        ({}, ValueError, "accum_steps=None and until_weight=None: no cycle"),
        (dict(accum_steps=0), ValueError, "accum_steps=0 must be .* at least 1"),
        (dict(accum_steps=-1), ValueError, "accum_steps=-1 must be"),
        (dict(accum_steps=2.5), TypeError, "accum_steps is 2.5; .*integer"),
        (dict(accum_steps=np.float32(2)), TypeError, "accum_steps.*integer"),
        (dict(accum_steps="2"), TypeError, "accum_steps='2' must be an integer"),
        (dict(accum_steps=True), TypeError, "accum_steps=True .*not a boolean"),
        (dict(accum_steps=np.array([2, 3])), TypeError, "accum_steps"),
        (dict(accum_steps=2**31), ValueError, "more than an int32 counts"),
        (dict(until_weight=0), ValueError, "until_weight=0 must be a positive"),
        (dict(until_weight=-1.5), ValueError, "until_weight=-1.5 must be a pos"),
        (dict(until_weight=float("nan")), ValueError, "until_weight=nan must be"),
        (dict(until_weight=float("inf")), ValueError, "until_weight=inf must be"),
        (dict(until_weight="1e6"), TypeError, "until_weight is '1e6'.*a positive"),
        (dict(until_weight=True), TypeError, "until_weight is True"),
        (dict(until_weight=1j), TypeError, "until_weight is 1j"),
        (dict(until_weight=np.ones(2)), TypeError, r"shape \(2,\).*a positive"),
        (dict(until_weight=lambda n: 3), TypeError, "function.* is accum_steps"),
        (dict(accum_steps=2, nonfinite="skip"), ValueError, "nonfinite='skip' must"),
        (dict(accum_steps=2, axis_name=3), TypeError, "axis_name=3 must be a name"),
        (dict(accum_steps=2, axis_name=("a", "a")), ValueError, "an axis twice"),
        (dict(accum_steps=2, accum_dtype="int32"), TypeError, "floating point"),
    ],
)
def test_refuses_settings(kwargs, error, match):
    with pytest.raises(error, match=match):
        jaxga.accumulate(optax.sgd(0.1), **kwargs)


@pytest.mark.parametrize("inner", (None, "adam", optax.adam, lambda g: g))
def test_refuses_what_is_no_transformation(inner):
    with pytest.raises(TypeError, match="inner is .* optax gradient transformation"):
        jaxga.accumulate(inner, 2)


@pytest.mark.parametrize(
    "inner",
    [
        lambda: jaxga.accumulate(optax.sgd(0.1), 2),
        lambda: optax.chain(optax.clip(1.0), jaxga.accumulate(optax.sgd(0.1), 2)),
        lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    ],
    ids=("itself", "in a chain", "MultiSteps"),
)
def test_refuses_two_accumulators(inner):
    with pytest.raises(ValueError, match="accumulates gradients already.*Use one"):
        jaxga.accumulate(inner(), 2).init(PARAMS)


def test_refuses_multisteps_itself():
    with pytest.raises(ValueError, match="inner is an optax.MultiSteps.*that Multi"):
        jaxga.accumulate(optax.MultiSteps(optax.sgd(0.1), 2), 2)


@pytest.mark.parametrize(
    "steps, match",
    [
        (lambda updates: 2.0, "returned is 2.0; it must be an integer"),
        (optax.linear_schedule(1, 8, 10), "returned is an array.*float32.*jnp.round"),
        (lambda updates: 0, "returned=0 must be an integer of at least 1"),
        (lambda updates: jnp.array([1, 2]), r"shape \(2,\)|type"),
        (lambda updates: "4", "returned='4' must be an integer"),
    ],
)
def test_refuses_what_a_function_of_updates_returns(steps, match):
    with pytest.raises((TypeError, ValueError), match=match):
        jaxga.accumulate(optax.sgd(0.1), steps).init(PARAMS)


def test_a_function_of_updates_that_branches_is_told_of_where():
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        jaxga.accumulate(optax.sgd(0.1), lambda n: 4 if n < 9 else 8).init(PARAMS)
    assert "jnp.where(updates < 100, 4, 8)" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "grads, error, match",
    [
        ({"w": PARAMS["w"]}, ValueError, "grad_sums has the structure"),
        (None, ValueError, "grad_sums has the structure"),
        (
            PARAMS | {"b": np.ones(4, "f4")},
            ValueError,
            r"grad_sums\['b'\] has shape \(4,\), but the parameter has \(3,\)",
        ),
        (
            PARAMS | {"b": np.ones(3, "c8")},
            TypeError,
            r"grad_sums\['b'\] is of dtype complex64.*real parameter",
        ),
        (PARAMS | {"b": np.ones(3, "i4")}, TypeError, "dtype int32.*no gradient"),
        (PARAMS | {"b": "abc"}, TypeError, r"grad_sums\['b'\] is 'abc'"),
    ],
)
def test_refuses_gradients(grads, error, match):
    tx = jaxga.accumulate(optax.sgd(0.1), 2)
    for call in (
        lambda: tx.update(grads, tx.init(PARAMS), PARAMS),
        lambda: tx.step(PARAMS, tx.init(PARAMS), grads),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        (dict(weight=np.ones(3)), ValueError, r"weight is .*shape \(3,\).*a scalar"),
        (dict(weight="8"), TypeError, "weight is '8'.*array of numbers"),
        (dict(weight=1j), TypeError, "weight is of dtype complex64; it must be real"),
        (dict(flush="no"), TypeError, "flush is 'no'.*True or False"),
        (dict(flush=1), TypeError, "flush is 1 of type int.*True or False"),
        (dict(flush=np.array([True])), TypeError, r"flush is .*shape \(1,\)"),
        (dict(value=np.ones(2)), ValueError, r"value is .*shape \(2,\).*a scalar"),
        (dict(value="low"), TypeError, "value is 'low'"),
    ],
)
def test_refuses_arguments_of_a_call(kwargs, error, match):
    tx = jaxga.accumulate(optax.sgd(0.1), 2)
    with pytest.raises(error, match=match):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **kwargs)
    with pytest.raises(error, match=match):
        tx.step(PARAMS, tx.init(PARAMS), PARAMS, **kwargs)


def test_refuses_other_orders_of_arguments_and_missing_parameters():
    tx = jaxga.accumulate(optax.adamw(0.1), 2)
    state = tx.init(PARAMS)
    for call in (
        lambda: tx.step(state, PARAMS, PARAMS),
        lambda: tx.update(state, PARAMS, PARAMS),
        lambda: tx.flush(state, PARAMS),
        lambda: tx.update(PARAMS, optax.adamw(0.1).init(PARAMS), PARAMS),
    ):
        with pytest.raises(
            TypeError, match=r"state is of type .*tx.step\(params, state"
        ):
            call()
    for call in (
        lambda: tx.step(None, state, PARAMS),
        lambda: tx.flush({"w": PARAMS["w"]}, state),
    ):
        with pytest.raises(ValueError, match="params has the structure"):
            call()
    with pytest.raises(ValueError, match="requires? .*params"):
        tx.update(PARAMS, state)
