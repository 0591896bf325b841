"""Terms with denominators of their own over several calls: an accumulator for each."""

import functools

import jax
import jax.numpy as jnp
import jaxga
import jaxga.linen
import jaxga.nnx
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    counted,
    counted_mean,
    distance,
    hidden,
    make_batch,
    make_mesh,
    make_params,
    three_terms,
    three_terms_mean,
    truth,
)
from refusals import refusals, refused

pytestmark = pytest.mark.anywhere

TERMS = ("cross_entropy", "penalty", "rows")
CALLS = 4
DESCENT = optax.sgd(1.0)  # parameters move by exactly the gradient


def calls(batch=None, count=CALLS):
    """The batch in as many parts, of consecutive rows: very unequal in tokens."""
    batch = make_batch() if batch is None else batch
    parts = {name: np.split(leaf, count) for name, leaf in batch.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(count)]


def make_sums(**settings):
    return jaxga.value_and_grad_sums(three_terms, separate_terms=True, **settings)


@functools.cache
def jitted_sums():
    return jax.jit(make_sums(accum_steps=2))


def totals(sums):
    return {name: term.total for name, term in sums.items()}


def weights(sums):
    return {name: term.weight for name, term in sums.items()}


def moved(params):
    return jax.tree.map(lambda old, new: old - np.asarray(new), make_params(), params)


@functools.cache
def true_gradient():
    return truth(three_terms_mean, make_params(), make_batch())[1]


def test_sums_of_each_term():
    _, sums = jax.jit(make_sums(accum_steps=6))(make_params(), make_batch())
    assert sums.keys() == set(TERMS)
    _, expected = truth(counted_mean, make_params(), make_batch())
    assert distance(sums["cross_entropy"].mean(), expected) <= 1e-6
    whole = jax.tree.map(lambda *x: sum(x), *(sums[name].mean() for name in TERMS))
    assert distance(whole, true_gradient()) <= 1e-6
    assert sums["rows"].weight == 384 and sums["rows"].weight.dtype == jnp.int32


def test_a_loss_that_is_no_dict_is_the_only_term():
    cycle = jaxga.value_and_grad_sums(counted, accum_steps=6, separate_terms=True)
    _, sums = jax.jit(cycle)(make_params(), make_batch())
    _, expected = truth(counted_mean, make_params(), make_batch())
    assert sums.keys() == {"loss"}
    assert distance(sums["loss"].mean(), expected) <= 1e-6


def test_sums_merge():
    found = [jitted_sums()(make_params(), batch)[1] for batch in calls()]
    merged = functools.reduce(jaxga.merge, found)
    whole = jax.tree.map(lambda *x: sum(x), *(merged[name].mean() for name in TERMS))
    assert distance(whole, true_gradient()) <= 1e-6


@pytest.mark.parametrize(
    "checkpoint", [True, pytest.param(False, marks=pytest.mark.long)]
)
def test_scanned_layers_in_place(checkpoint):
    def loss_fn(params, x):
        layer = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        layer = jax.checkpoint(layer) if checkpoint else layer
        h, _ = jax.lax.scan(layer, x, params)
        first, rest = jnp.split(h**2, [3], axis=-1)
        return {
            "first": jaxga.WeightedSum.of(first, where=x[:, :3] > 0),
            "rest": jaxga.WeightedSum.of(rest),
        }

    params = jax.random.normal(jax.random.key(0), (3, 8, 8)) / 2
    x = jax.random.normal(jax.random.key(1), (24, 8))
    cycle = jaxga.value_and_grad_sums(loss_fn, accum_steps=4, separate_terms=True)
    _, sums = jax.jit(cycle)(params, x)
    for name in ("first", "rest"):
        grads = jax.grad(lambda p, name=name: loss_fn(p, x)[name].total)(params)
        assert distance(sums[name].total, grads) <= 1e-6


def run_calls(tx, batches, cycle, update):
    params, state = jax.tree.map(jnp.asarray, make_params()), tx.init(make_params())
    for batch in batches:
        output, sums = cycle(params, batch)
        params, state = update(tx, params, state, sums, output)
    return params, state


def by_step(tx, params, state, sums, output):
    step = jax.jit(tx.step)
    return step(params, state, totals(sums), weights(sums))


def by_update(tx, params, state, sums, output):
    updates, state = jax.jit(tx.update)(
        totals(sums), state, params, weight=weights(sums)
    )
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("update", [by_step, by_update])
def test_a_cycle_over_several_calls(update):
    tx = jaxga.accumulate(DESCENT, CALLS, terms=TERMS)
    cycle = jitted_sums()
    params, state = run_calls(tx, calls(), cycle, update)
    assert distance(moved(params), true_gradient()) <= 1e-6
    mask = make_batch()["mask"]
    assert state.weight["cross_entropy"] == mask.sum() and state.weight["rows"] == 384
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(true_gradient())))
    np.testing.assert_allclose(state.grad_norm, norm, rtol=1e-5)
    assert state.update == 1 and jaxga.has_updated(state)


def test_known_weights_need_one_accumulator():
    batch, params = make_batch(), jax.tree.map(jnp.asarray, make_params())
    given = {
        "cross_entropy": batch["mask"].sum(),
        "penalty": np.where(batch["mask"], batch["weights"], 0).sum(),
        "rows": 384,
    }
    tx = jaxga.accumulate(DESCENT, CALLS)
    cycle = jaxga.value_and_grad_sums(three_terms, accum_steps=2)
    state = tx.init(params)
    for part in calls():
        _, grads = jax.jit(cycle)(params, part, term_weights=given)
        params, state = tx.step(params, state, grads.total, weight=1 / CALLS)
    assert distance(moved(params), true_gradient()) <= 1e-6


def test_a_flush_ends_a_cycle_exactly_and_the_next_starts_anew():
    tx = jaxga.accumulate(DESCENT, 10, terms=TERMS)
    cycle = jitted_sums()
    params, state = run_calls(tx, calls(), cycle, by_step)
    params, state = jax.jit(tx.flush)(params, state)
    assert distance(moved(params), true_gradient()) <= 1e-6
    start = params
    for batch in calls():
        _, sums = cycle(make_params(), batch)
        params, state = by_step(tx, params, state, sums, None)
    params, state = tx.flush(params, state)
    step = jax.tree.map(lambda old, new: np.asarray(old - new), start, params)
    assert distance(step, true_gradient()) <= 1e-6


@pytest.mark.parametrize("limits", [{"rows": 192}, {"rows": 999, "penalty": 1}])
def test_a_cycle_ends_by_the_weight_of_a_term(limits):
    tx = jaxga.accumulate(DESCENT, until_weight=limits, terms=TERMS)
    cycle = jitted_sums()
    _, state = run_calls(tx, calls(), cycle, by_step)
    assert state.update == (4 if "penalty" in limits else 2)


def two_terms(params, batch):
    terms = three_terms(params, batch)
    return {"rows": terms["rows"], "none": counted(params, batch)}


def test_a_term_without_weight_in_the_whole_cycle_counts_nothing():
    batch = make_batch() | {"mask": np.zeros_like(make_batch()["mask"])}
    tx = jaxga.accumulate(DESCENT, CALLS, terms=("rows", "none"))
    cycle = jaxga.value_and_grad_sums(two_terms, accum_steps=2, separate_terms=True)
    params, state = run_calls(tx, calls(batch), jax.jit(cycle), by_step)

    def rows(params, batch):
        return 0.01 * (hidden(params, batch) ** 2).sum((-1, -2)).mean()

    expected = truth(rows, make_params(), batch)[1]
    # A small step off parameters of size 1 has their rounding in it.
    assert distance(moved(params)["embed"], expected["embed"]) <= 1e-5
    assert state.update == 1 and state.weight["none"] == 0


def test_the_value_is_the_objective_of_the_cycle():
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        jax.debug.callback(lambda x: seen.append(float(x)), value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = jaxga.accumulate(optax.chain(inner, DESCENT), CALLS, terms=TERMS)

    def step_with_value(tx, params, state, sums, output):
        value = {name: term.mean() for name, term in output.loss.items()}
        return tx.step(params, state, totals(sums), weights(sums), value=value)

    run_calls(tx, calls(), jitted_sums(), step_with_value)
    jax.effects_barrier()
    loss, _ = truth(three_terms_mean, make_params(), make_batch())
    np.testing.assert_allclose(seen, [loss], rtol=1e-6)


@pytest.mark.parametrize(
    ("nonfinite", "updates"), [("skip_cycle", 0), ("drop_microbatch", 1)]
)
def test_a_gradient_that_is_not_finite(nonfinite, updates):
    tx = jaxga.accumulate(DESCENT, CALLS, terms=TERMS, nonfinite=nonfinite)
    cycle = jitted_sums()

    def poisoned(params, batch):
        output, sums = cycle(params, batch)
        if batch["mask"][0, 0] == first["mask"][0, 0]:
            is_first = np.array_equal(batch["inputs"], first["inputs"])
            bad = jnp.nan if is_first else 0.0
            total = jax.tree.map(lambda x: x + bad, sums["rows"].total)
            sums = sums | {"rows": jaxga.WeightedSum(total, sums["rows"].weight)}
        return output, sums

    first = calls()[0]
    params, state = run_calls(tx, calls(), poisoned, by_step)
    assert state.update == updates and state.skipped == 1 - updates
    rest = jax.tree.map(lambda *x: np.concatenate(x), *calls()[1:])
    if updates:
        expected = truth(three_terms_mean, make_params(), rest)[1]
        assert distance(moved(params), expected) <= 1e-6
    else:
        assert all((x == 0).all() for x in jax.tree.leaves(moved(params)))


def test_the_reverse_is_not_enough():
    """What it is for: all terms over the tokens is another gradient."""
    _, sums = jax.jit(make_sums(accum_steps=6))(make_params(), make_batch())
    tokens = sums["cross_entropy"].weight
    wrong = jax.tree.map(lambda *x: sum(x) / tokens, *totals(sums).values())
    assert distance(wrong, true_gradient()) > 1e-2


# Steps.


def make_step(parallel=None, **settings):
    tx = jaxga.accumulate(DESCENT, CALLS, terms=TERMS)
    step = jaxga.make_train_step(
        three_terms, tx, accum_steps=2, parallel=parallel, **settings
    )
    state = jaxga.TrainState.create(jax.tree.map(jnp.asarray, make_params()), tx)
    return step, state if parallel is None else parallel.shard_state(state)


@pytest.mark.parametrize(
    "zero",
    [None, 0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2)), 3],
)
def test_train_step(zero):
    parallel = None if zero is None else jaxga.DataParallel(make_mesh(4), zero=zero)
    step, state = make_step(parallel)
    for batch in calls():
        state, metrics = step(state, batch)
    assert distance(moved(state.params), true_gradient()) <= 1e-6
    assert metrics["update"] == 1 and set(TERMS) <= metrics.keys()
    assert step._jitted._cache_size() == 1 if parallel else step._cache_size() == 1


@pytest.mark.parametrize(
    "check_vma", [True, pytest.param(False, marks=pytest.mark.long)]
)
def test_sums_stay_on_their_device_until_the_end(check_vma):
    mesh = make_mesh(4)
    tx = jaxga.accumulate(DESCENT, CALLS, terms=TERMS, axis_name="data")
    cycle = make_sums(accum_steps=2, axis_name="data")
    params = jax.tree.map(jnp.asarray, make_params())
    specs = jaxga.state_specs(tx, params, "data")
    assert specs.sums["rows"]["out"] == P("data") and specs.weight["rows"] == P()
    over = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    state = jax.jit(over(tx.init, in_specs=P(), out_specs=specs))(params)

    def update(params, state, batch):
        _, sums = cycle(params, batch)
        return tx.step(params, state, totals(sums), weights(sums))

    specs_in = (P(), specs, P("data"))
    update = jax.jit(over(update, in_specs=specs_in, out_specs=(P(), specs)))
    for batch in calls():
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        params, state = update(params, state, batch)
    assert distance(moved(params), true_gradient()) <= 1e-6
    found = jaxga.collectives(update.lower(params, state, batch).compile())
    gradient = sum(x.nbytes for x in jax.tree.leaves(make_params()))
    assert sum(c.bytes for c in found) <= 3 * gradient + 64


@pytest.mark.long
def test_linen():
    tx = jaxga.accumulate(DESCENT, CALLS, terms=TERMS)
    state = TrainState.create(apply_fn=None, params=make_params(), tx=tx)
    step = jaxga.linen.make_train_step(three_terms, accum_steps=2)
    for batch in calls():
        state, metrics = step(state, batch)
    assert distance(moved(state.params), true_gradient()) <= 1e-6
    assert state.step == metrics["update"] == 1


def test_nnx():
    class Model(nnx.Module):
        def __init__(self):
            self.params = nnx.data(jax.tree.map(nnx.Param, make_params()))

    def loss_fn(model, batch):
        return three_terms(nnx.as_pure(nnx.state(model))["params"], batch)

    model = Model()
    tx = jaxga.accumulate(DESCENT, CALLS, terms=TERMS)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = jaxga.nnx.make_train_step(loss_fn, accum_steps=2)
    for batch in calls():
        metrics = step(model, optimizer, batch)
    params = nnx.to_pure_dict(nnx.state(model))["params"]
    assert distance(moved(params), true_gradient()) <= 1e-6
    assert metrics["update"] == 1


@pytest.mark.long
def test_in_a_chain():
    tx = optax.chain(jaxga.accumulate(DESCENT, CALLS, terms=TERMS), optax.scale(2.0))
    step = jaxga.make_train_step(three_terms, tx, accum_steps=2)
    state = jaxga.TrainState.create(jax.tree.map(jnp.asarray, make_params()), tx)
    for batch in calls():
        state, _ = step(state, batch)
    half = jax.tree.map(lambda x: x / 2, moved(state.params))
    assert distance(half, true_gradient()) <= 1e-6


def test_cost():
    """An addition for each term, in place; at most the gradient beside, at the end."""
    params = {"w": jnp.zeros((256, 256))}
    tx = jaxga.accumulate(optax.adam(1e-3), 4, terms=("a", "b"))
    state = tx.init(params)
    sums, ones = {"a": params, "b": params}, {"a": 1, "b": 1}
    step = jax.jit(tx.step, donate_argnums=(0, 1)).lower(params, state, sums, ones)
    memory, tree = step.compile().memory_analysis(), 256 * 256 * 4
    assert memory.alias_size_in_bytes >= 5 * tree  # parameters, two moments, two sums
    assert memory.temp_size_in_bytes < 1.1 * tree


# What is refused.


def call(sums=None, weight=None, **extra):
    tx = jaxga.accumulate(DESCENT, CALLS, terms=TERMS)
    params = make_params()
    ones = dict.fromkeys(TERMS, 1)
    sums = dict.fromkeys(TERMS, params) if sums is None else sums
    tx.step(params, tx.init(params), sums, ones if weight is None else weight, **extra)


def step_with(terms, loss_fn=three_terms):
    tx = jaxga.accumulate(DESCENT, CALLS, terms=terms)
    step = jaxga.make_train_step(loss_fn, tx, accum_steps=2)
    step(jaxga.TrainState.create(make_params(), tx), make_batch())


REFUSED = {
    "gradient without terms": (
        lambda: call(sums=make_params()),
        ValueError,
        "grad_sums must be a dict with an entry for each of them; it has ['embed'",
    ),
    "no weight": (
        lambda: call(weight=3),
        ValueError,
        "weight must be a dict with an entry for each of them; it is 3",
    ),
    "a term's weight": (
        lambda: call(weight=dict.fromkeys(TERMS, 1) | {"rows": jnp.ones(2)}),
        ValueError,
        "weight['rows'] is an array of shape (2,)",
    ),
    "a term's gradient": (
        lambda: call(sums=dict.fromkeys(TERMS, make_params()) | {"rows": jnp.ones(2)}),
        ValueError,
        "grad_sums['rows'] has the structure",
    ),
    "a term's shape": (
        lambda: call(
            sums=dict.fromkeys(TERMS, make_params())
            | {"rows": make_params() | {"out": jnp.ones(3)}}
        ),
        ValueError,
        "grad_sums['rows']['out'] has shape (3,)",
    ),
    "value": (lambda: call(value=1.0), ValueError, "value must be a dict"),
    "value of a term": (
        lambda: call(value=dict.fromkeys(TERMS, jnp.ones(2))),
        ValueError,
        "value['cross_entropy'] is",
    ),
    "a name": (
        lambda: jaxga.accumulate(DESCENT, 2, terms="rows"),
        TypeError,
        "terms='rows' must be a tuple of the names",
    ),
    "twice": (
        lambda: jaxga.accumulate(DESCENT, 2, terms=("rows", "rows")),
        ValueError,
        "names a term twice",
    ),
    "until_weight": (
        lambda: jaxga.accumulate(DESCENT, until_weight=4, terms=TERMS),
        ValueError,
        "until_weight={'cross_entropy': ...}",
    ),
    "until_weight of another": (
        lambda: jaxga.accumulate(DESCENT, until_weight={"x": 4}, terms=TERMS),
        ValueError,
        "until_weight={'cross_entropy': ...}",
    ),
    "until_weight of nothing": (
        lambda: jaxga.accumulate(DESCENT, until_weight={}, terms=TERMS),
        ValueError,
        "would end no cycle",
    ),
    "until_weight of -1": (
        lambda: jaxga.accumulate(DESCENT, until_weight={"rows": -1}, terms=TERMS),
        ValueError,
        "until_weight['rows']=-1 must be a positive number",
    ),
    "known weights": (
        lambda: make_sums(accum_steps=2)(
            make_params(), make_batch(), term_weights=dict.fromkeys(TERMS, 1)
        ),
        ValueError,
        "if the weights are known, one sum is enough",
    ),
    "one loss": (
        lambda: step_with(("a", "b"), counted),
        ValueError,
        "terms=('a', 'b'), but loss_fn returned the terms ['loss']",
    ),
    "no boolean": (
        lambda: jaxga.value_and_grad_sums(
            three_terms, accum_steps=2, separate_terms="rows"
        ),
        TypeError,
        "separate_terms",
    ),
    "step without": (
        lambda: step_with(None),
        ValueError,
        "Give jaxga.accumulate terms=('cross_entropy', 'penalty', 'rows')",
    ),
    "step with others": (
        lambda: step_with(("cross_entropy", "router")),
        ValueError,
        "terms=('cross_entropy', 'router'), but loss_fn returned the terms",
    ),
}


@refusals(REFUSED)
def test_misuse(call, error, words):
    with refused(error, *words):
        call()
