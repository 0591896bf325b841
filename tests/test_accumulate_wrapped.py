"""`accumulate` inside optax's wrappers, Flax's containers, and JAX's `vmap`."""

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from optax import chain
from test_accumulate import (
    CALLS,
    PARAMS,
    after,
    assert_close,
    make_calls,
    mean,
    updated,
)

pytestmark = pytest.mark.anywhere

SUMS, WEIGHTS = make_calls(2 * CALLS)
CYCLES = [(SUMS[i : i + CALLS], WEIGHTS[i : i + CALLS]) for i in (0, CALLS)]
ADAM = optax.adam(1e-2)
LABELS = {"w": "train", "b": "freeze"}


def accumulate(inner=ADAM, **kwargs):
    return jaxga.accumulate(inner, CALLS, **kwargs)


def lora(trained):
    return optax.multi_transform(
        {"train": trained, "freeze": optax.set_to_zero()}, LABELS
    )


def run(tx, params=PARAMS):
    """All calls, through the protocol of optax, jitted once."""

    @jax.jit
    def step(params, state, grads, weight):
        updates, state = tx.update(grads, state, params, weight=weight)
        return optax.apply_updates(params, updates), state

    params, states = jax.tree.map(jnp.asarray, params), [tx.init(params)]
    for grads, weight in zip(SUMS, WEIGHTS, strict=True):
        params, state = step(params, states[-1], grads, weight)
        states.append(state)
    assert step._cache_size() == 1
    return params, states[1:]


@pytest.mark.parametrize(
    "tx, inner",
    [
        (chain(accumulate(), optax.scale(0.5)), chain(ADAM, optax.scale(0.5))),
        (chain(optax.scale(0.5), accumulate()), chain(optax.scale(0.5), ADAM)),
        (
            accumulate(chain(optax.clip_by_global_norm(0.1), ADAM)),
            chain(optax.clip_by_global_norm(0.1), ADAM),
        ),
        (lora(accumulate()), lora(ADAM)),
        (accumulate(lora(ADAM)), lora(ADAM)),
        (optax.masked(accumulate(), {"w": True, "b": True}), ADAM),
        (optax.apply_if_finite(accumulate(), 3), ADAM),
        (accumulate(optax.apply_if_finite(ADAM, 3)), ADAM),
        (optax.inject_hyperparams(jaxga.accumulate)(ADAM, accum_steps=CALLS), ADAM),
        (
            accumulate(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)),
            ADAM,
        ),
        (optax.with_extra_args_support(accumulate()), ADAM),
        (
            chain(optax.named_chain(("adam", accumulate())), optax.identity()),
            ADAM,
        ),
    ],
    ids=(
        "chain before",
        "chain after",
        "clip inside",
        "inside multi_transform",
        "around multi_transform",
        "masked",
        "inside apply_if_finite",
        "around apply_if_finite",
        "inside inject_hyperparams",
        "around inject_hyperparams",
        "extra args",
        "named_chain",
    ),
)
def test_equals_the_same_around_the_mean_gradient(tx, inner):
    params, states = run(tx)
    assert_close(params, after(inner, *CYCLES))
    assert updated(states) == ([False] * (CALLS - 1) + [True]) * 2


def test_frozen_parameters_get_no_accumulator():
    inside = lora(accumulate()).init(PARAMS).inner_states["train"].inner_state
    assert [x.shape for x in jax.tree.leaves(inside.sums)] == [PARAMS["w"].shape]
    around = accumulate(lora(ADAM)).init(PARAMS)
    assert len(jax.tree.leaves(around.sums)) == 2  # put accumulate inside instead
    nothing = accumulate().init({})
    assert jax.tree.leaves(nothing.sums) == []


def test_apply_if_finite_and_nan():
    """Outside it judges single calls and drops them; inside, the cycle's gradient."""
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), PARAMS)
    outside = optax.apply_if_finite(accumulate(), 100)
    inside = accumulate(optax.apply_if_finite(ADAM, 100), nonfinite="propagate")
    for tx, counted in ((outside, CALLS - 1), (inside, 0)):
        params, state = PARAMS, tx.init(PARAMS)
        update = jax.jit(tx.update)
        for grads in (bad, *SUMS[: CALLS - 1]):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        (inner,) = [
            leaf
            for leaf in jax.tree.leaves(state, is_leaf=is_finite_state)
            if is_finite_state(leaf)
        ]
        assert inner.total_notfinite == 1
        assert_close(params, PARAMS)
        (found,) = jaxga._accumulate_state.find_states(state).values()
        assert found.num_microbatches == counted


def is_finite_state(node):
    return isinstance(node, optax.ApplyIfFiniteState)


def test_what_ticks_when():
    """A schedule inside counts updates; chained outside, every call."""

    def count(state):
        return int(optax.tree.get(state, "count"))

    schedule = optax.scale_by_schedule(lambda step: 1.0)
    _, inside = run(accumulate(chain(optax.scale(-0.1), schedule)))
    assert [count(state) for state in inside] == [0, 0, 0, 1, 1, 1, 1, 2]
    _, outside = run(chain(accumulate(optax.scale(-0.1)), schedule))
    assert [count(state) for state in outside] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_schedule_free_parameters_for_evaluation():
    inner = optax.contrib.schedule_free_sgd(1e-2)
    params, states = run(accumulate(inner))
    state, plain = inner.init(PARAMS), jax.tree.map(jnp.asarray, PARAMS)
    for cycle in CYCLES:
        updates, state = inner.update(mean(*cycle), state, plain)
        plain = optax.apply_updates(plain, updates)
    evaluate = optax.contrib.schedule_free_eval_params
    assert_close(
        evaluate(states[-1].inner_state, params), evaluate(state, plain), rtol=1e-6
    )


def test_the_methods_are_hidden_by_wrappers_and_kept_otherwise():
    tx = accumulate()
    assert isinstance(tx, optax.GradientTransformationExtraArgs) and len(tx) == 2
    rebuilt = jax.tree.map(lambda function: function, tx)
    assert rebuilt.step(PARAMS, tx.init(PARAMS), PARAMS)[1].num_microbatches == 1
    assert not hasattr(chain(tx), "step") and not hasattr(chain(tx), "flush")


def test_flax_train_state_counts_calls():
    """Its `apply_gradients` has no place for a weight: each call counts alike."""
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=accumulate())
    apply = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for grads in SUMS:
        state = apply(state, grads)
    ones = np.ones(CALLS, "f4")
    assert_close(state.params, after(ADAM, *[(sums, ones) for sums, _ in CYCLES]))
    assert state.step == 2 * CALLS and state.opt_state.update == 2
    assert jaxga.has_updated(state)


class Model(nnx.Module):
    def __init__(self):
        self.w, self.b = (nnx.Param(jnp.array(PARAMS[name])) for name in ("w", "b"))


def as_state(grads):
    return nnx.State({name: nnx.Param(value) for name, value in grads.items()})


def test_nnx_optimizer():
    model = Model()
    optimizer = nnx.Optimizer(model, accumulate(), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, grads, weight):
        optimizer.update(model, as_state(grads), weight=weight)

    done = []
    for grads, weight in zip(SUMS, WEIGHTS, strict=True):
        update(model, optimizer, grads, weight)
        done.append(bool(jaxga.has_updated(optimizer.opt_state)))
    assert done == ([False] * (CALLS - 1) + [True]) * 2
    assert_close({n: getattr(model, n)[...] for n in PARAMS}, after(ADAM, *CYCLES))


def test_nnx_optimizer_through_step_and_flush():
    model = Model()
    optimizer = nnx.Optimizer(model, accumulate(), wrt=nnx.Param)

    def pure():
        params = nnx.as_pure(nnx.state(model, optimizer.wrt))
        return params, nnx.as_pure(optimizer.opt_state)

    def write(params, state):
        nnx.update(model, params)
        nnx.update(optimizer.opt_state, nnx.state(state))

    step = jax.jit(optimizer.tx.step)
    for grads, weight in zip(SUMS[:-1], WEIGHTS[:-1], strict=True):
        write(*step(*pure(), nnx.as_pure(as_state(grads)), weight))
    write(*jax.jit(optimizer.tx.flush)(*pure()))
    cycles = [CYCLES[0], tuple(part[:-1] for part in CYCLES[1])]
    assert_close({n: getattr(model, n)[...] for n in PARAMS}, after(ADAM, *cycles))


def test_an_ensemble_under_vmap():
    tx = accumulate()
    params = jax.tree.map(lambda p: np.stack([p, p]), PARAMS)
    state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(tx.step))
    for grads, weight in zip(SUMS, WEIGHTS, strict=True):
        grads = jax.tree.map(lambda g: np.stack([g, 2 * g]), grads)
        params, state = step(params, state, grads, np.stack([weight, 2 * weight]))
    for i in range(2):
        one = jax.tree.map(lambda p, i=i: p[i], params)
        assert_close(one, after(ADAM, *CYCLES), rtol=1e-6)


def test_a_line_search_sees_the_whole_cycle():
    """With a value_fn of all its data; the value is the mean of the calls'."""
    rng = np.random.default_rng(3)
    xs, counts = rng.normal(size=(CALLS, 8)).astype("f4"), np.int32([8, 1, 3, 5])
    mask = np.arange(8) < counts[:, None]

    def loss(params, xs, mask):
        return jnp.where(mask, (params - xs) ** 2, 0).sum()

    def whole(params):
        return loss(params, xs, mask) / mask.sum()

    inner = chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))
    tx = accumulate(inner)
    params, state = jnp.float32(3), tx.init(jnp.float32(3))
    for i in range(CALLS):
        value, grads = jax.value_and_grad(loss)(params, xs[i], mask[i])
        params, state = tx.step(
            params,
            state,
            grads,
            counts[i],
            value=value / counts[i],
            grad=jax.grad(whole)(params),
            value_fn=whole,
        )
    expected, plain = jnp.float32(3), inner.init(jnp.float32(3))
    value, grads = jax.value_and_grad(whole)(expected)
    updates, _ = inner.update(
        grads, plain, expected, value=value, grad=grads, value_fn=whole
    )
    assert_close(params, optax.apply_updates(expected, updates), rtol=1e-6)
