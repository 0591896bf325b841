"""The faults that trainers have shipped: each, written small, fails where jaxga passes.

One comparison for all, of raw gradients or of SGD's updates: Adam hides scale.
"""

import functools

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from problems import (
    counted,
    counted_mean,
    distance,
    hidden,
    make_batch,
    make_mesh,
    make_params,
    split_over_devices,
    three_terms,
    three_terms_mean,
    token_losses,
    truth,
)

pytestmark = pytest.mark.anywhere

K, DEVICES, BOUND = 6, 4, 1e-6


@functools.cache
def true_grads(mean_loss):
    return truth(mean_loss, make_params(), make_batch())[1]


def agrees(actual, mean_loss=counted_mean, batch=None):
    if batch is None:
        return distance(actual, true_grads(mean_loss)) <= BOUND
    return distance(actual, truth(mean_loss, make_params(), batch)[1]) <= BOUND


def microbatch(batch, i, accum_steps=K):
    return jax.tree.map(lambda x: x[i::accum_steps], batch)


def tree_sum(trees):
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)


def scale(tree, factor):
    return jax.tree.map(lambda x: x * factor, tree)


def sum_grads(params, batch):
    """The gradient of one micro-batch's summed loss."""
    return jax.grad(lambda p: counted(p, batch).total)(params)


def mean_grads(params, batch):
    return jax.grad(lambda p: counted(p, batch).mean())(params)


def tokens(batch):
    return batch["mask"].sum()


def right(params, batch):
    """What every fault below departs from, in plain JAX."""
    total = tree_sum([sum_grads(params, microbatch(batch, i)) for i in range(K)])
    return scale(total, 1 / tokens(batch))


# Faults of the denominator.


def mean_of_means(params, batch):
    return scale(
        tree_sum([mean_grads(params, microbatch(batch, i)) for i in range(K)]), 1 / K
    )


def divided_by_accum_steps_too(params, batch):
    return scale(right(params, batch), 1 / K)


def sum_of_means(params, batch):
    return scale(mean_of_means(params, batch), K)


def count_before_the_mask(params, batch):
    return scale(right(params, batch), tokens(batch) / batch["mask"].size)


def count_before_the_shift(params, batch):
    """One token too many for every row."""
    rows = len(batch["mask"])
    return scale(right(params, batch), tokens(batch) / (tokens(batch) + rows))


def constant_accum_steps_on_a_short_cycle(params, batch):
    """Each micro-batch divided by its planned share: right only if all are there."""
    planned = tokens(batch) / 4 * K
    return scale(
        tree_sum([sum_grads(params, microbatch(batch, i, 4)) for i in range(4)]),
        1 / planned,
    )


# Faults of the sum.


def earlier_ones_overwritten(params, batch):
    return scale(sum_grads(params, microbatch(batch, K - 2)), 1 / tokens(batch))


def last_one_left_out(params, batch):
    total = tree_sum([sum_grads(params, microbatch(batch, i)) for i in range(K - 2)])
    return scale(total, 1 / tokens(batch))


def tail_dropped(params, batch):
    kept = jax.tree.map(lambda x: x[:-24], batch)
    return scale(
        tree_sum([sum_grads(params, microbatch(kept, i)) for i in range(K)]),
        1 / tokens(kept),
    )


def clipped_per_microbatch(params, batch):
    def clip(grads):
        return scale(grads, jnp.minimum(1, 50 / optax.tree.norm(grads)))

    total = tree_sum([clip(sum_grads(params, microbatch(batch, i))) for i in range(K)])
    return scale(total, 1 / tokens(batch))


def summed_in_bfloat16(params, batch):
    total = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)
    for i in range(K):
        grads = sum_grads(params, microbatch(batch, i))
        total = jax.tree.map(lambda t, g: (t + g).astype(t.dtype), total, grads)
    return scale(optax.tree.cast(total, jnp.float32), 1 / tokens(batch))


def empty_microbatch_is_nan(params, batch):
    """0 / 0, and then for ever."""

    rows = [microbatch(batch, i) for i in range(K)]
    means = [scale(sum_grads(params, r), 1 / tokens(r)) for r in rows]
    return tree_sum(
        [scale(m, tokens(r) / tokens(batch)) for m, r in zip(means, rows, strict=True)]
    )


FAULTS = [
    mean_of_means,
    divided_by_accum_steps_too,
    sum_of_means,
    count_before_the_mask,
    count_before_the_shift,
    constant_accum_steps_on_a_short_cycle,
    earlier_ones_overwritten,
    last_one_left_out,
    tail_dropped,
    clipped_per_microbatch,
    summed_in_bfloat16,
    empty_microbatch_is_nan,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_seen(fault):
    assert not agrees(jax.jit(fault)(make_params(), make_batch()))


def test_jaxga_has_none_of_them():
    cycle = jaxga.value_and_grad(counted, accum_steps=K)
    assert agrees(jax.jit(cycle)(make_params(), make_batch())[1])
    assert agrees(jax.jit(right)(make_params(), make_batch()))


def test_wrong_where_microbatches_differ_only():
    """Why nobody saw it: with as many tokens in each, the mean of means is right."""
    even = make_batch() | {"mask": np.ones((384, 6), bool)}
    assert agrees(jax.jit(mean_of_means)(make_params(), even), batch=even)


# Faults over devices.


def on_devices(function, **kwargs):
    mapped = jax.shard_map(
        function,
        mesh=make_mesh(DEVICES),
        in_specs=(P(), P("data")),
        out_specs=P(),
        **kwargs,
    )
    return jax.jit(mapped)(make_params(), make_batch())


def local_sums(params, batch):
    total = tree_sum([sum_grads(params, microbatch(batch, i)) for i in range(K)])
    return total, tokens(batch)


def summed_twice(params, batch):
    """`psum` of gradients of replicated parameters, which JAX has summed already."""
    total, count = local_sums(params, batch)
    return scale(lax.psum(total, "data"), 1 / lax.psum(count, "data"))


def each_device_divides_by_its_own_count(params, batch):
    total, count = local_sums(params, batch)
    return lax.pmean(scale(total, 1 / count), "data")


def mean_over_devices_of_a_sum(params, batch):
    total, count = local_sums(params, batch)
    return scale(lax.pmean(total, "data"), 1 / lax.psum(count, "data"))


def last_one_added_after_the_reduction(params, batch):
    grads = [sum_grads(params, microbatch(batch, i)) for i in range(K)]
    total = lax.psum(tree_sum(grads[:-2]), "data")
    count = lax.psum(tokens(batch), "data")
    return scale(tree_sum([total, grads[-2]]), 1 / count)


def never_reduced(params, batch):
    total, count = local_sums(params, batch)
    return scale(total, 1 / count)


@pytest.mark.parametrize(
    "fault",
    [
        each_device_divides_by_its_own_count,
        mean_over_devices_of_a_sum,
        last_one_added_after_the_reduction,
        never_reduced,
    ],
    ids=lambda fault: fault.__name__,
)
def test_fault_over_devices_is_seen(fault):
    assert not agrees(on_devices(fault, check_vma=False))


def test_summing_twice_is_too_large_by_the_number_of_devices():
    once, twice = (on_devices(summed_twice, check_vma=vma) for vma in (False, True))
    assert agrees(once) and not agrees(twice)
    assert agrees(scale(twice, 1 / DEVICES))


@pytest.mark.parametrize("check_vma", (True, False))
def test_jaxga_has_none_of_them_over_devices(check_vma):
    cycle = jaxga.value_and_grad(counted, accum_steps=K, axis_name="data")
    assert agrees(on_devices(cycle, check_vma=check_vma)[1])


# Faults of further terms.


def one_denominator_for_all_terms(params, batch):
    def total(params, rows):
        return sum(term.total for term in three_terms(params, rows).values())

    grads = [jax.grad(total)(params, microbatch(batch, i)) for i in range(K)]
    return scale(tree_sum(grads), 1 / tokens(batch))


def term_added_once_per_microbatch(params, batch):
    """A penalty that is a mean already, added to a loss divided by all tokens."""

    def loss(params, rows):
        penalty = (hidden(params, rows) ** 2).sum(-1).mean()
        return counted(params, rows).total / tokens(batch) + penalty

    grads = [jax.grad(loss)(params, microbatch(batch, i)) for i in range(K)]
    return tree_sum(grads)


def test_terms_on_the_wrong_denominator_are_seen():
    for fault in (one_denominator_for_all_terms, term_added_once_per_microbatch):
        assert not agrees(fault(make_params(), make_batch()), three_terms_mean)
    cycle = jaxga.value_and_grad(three_terms, accum_steps=K)
    assert agrees(jax.jit(cycle)(make_params(), make_batch())[1], three_terms_mean)


# Faults in time.


def run_updates(tx, step):
    params, state = make_params(), tx.init(make_params())
    for seed in range(3):
        params, state = step(params, state, make_batch(seed=seed))
    return params


def test_schedule_counts_updates_not_microbatches():
    tx = optax.sgd(optax.linear_schedule(1.0, 0.0, 4), momentum=0.9)

    @jax.jit
    def full_batch(params, state, batch):
        updates, state = tx.update(right(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def per_microbatch(params, state, batch):
        for i in range(K):
            grads = scale(mean_grads(params, microbatch(batch, i)), 1 / K)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    expected = run_updates(tx, full_batch)
    assert distance(run_updates(tx, per_microbatch), expected) > 1e-2
    step = jaxga.make_train_step(counted, tx, accum_steps=K)
    state = jaxga.TrainState.create(jax.tree.map(jnp.asarray, make_params()), tx)
    for seed in range(3):
        state, _ = step(state, make_batch(seed=seed))
    assert distance(state.params, expected) <= BOUND


def test_schedule_does_not_move_on_a_skipped_cycle():
    tx = optax.sgd(optax.linear_schedule(1.0, 0.0, 4))
    step = jaxga.make_train_step(counted, tx, accum_steps=K, donate=False)
    state = jaxga.TrainState.create(jax.tree.map(jnp.asarray, make_params()), tx)
    nothing = make_batch() | {"mask": np.zeros((384, 6), bool)}
    after, _ = step(step(state, nothing)[0], make_batch())
    straight, _ = step(state, make_batch())
    assert distance(after.params, straight.params) == 0


def test_gating_by_multiplication_keeps_a_nan_and_selection_does_not():
    tx = optax.MultiSteps(optax.sgd(1.0), 2)
    state, grads = tx.init(jnp.float32(0)), [np.nan, 1.0, 1.0, 1.0]
    for grad in grads:
        update, state = tx.update(jnp.float32(grad), state, jnp.float32(0))
    assert np.isnan(update)

    def loss_fn(params, rows):
        return jaxga.WeightedSum.of(params * rows)

    plain = optax.sgd(1.0)
    step = jaxga.make_train_step(loss_fn, plain, accum_steps=2)
    state = jaxga.TrainState.create(jnp.float32(0), plain)
    state, bad = step(state, np.float32(grads[:2]))
    state, good = step(state, np.float32(grads[2:]))
    assert (bad["skipped"], good["skipped"]) == (1, 0) and state.params == -1


# Faults of evaluation, padding and randomness.


def test_evaluation_averaged_per_batch():
    """(sum, count) of (2, 1) and (90, 9): 9.2, and not 6."""
    parts = [jaxga.WeightedSum(2.0, 1), jaxga.WeightedSum(90.0, 9)]
    assert np.mean([part.mean() for part in parts]) == 6
    np.testing.assert_allclose(jaxga.merge(*parts).mean(), 9.2, rtol=1e-6)


def test_padding_is_not_counted_and_no_row_is_lost():
    rows = jax.tree.map(lambda x: x[:101], make_batch())
    padded, real = jaxga.pad_batch(rows, 120, accum_steps=K)
    masked = padded | {"mask": padded["mask"] & real[:, None]}
    cycle = jax.jit(jaxga.value_and_grad(counted, accum_steps=K))
    assert agrees(cycle(make_params(), masked)[1], batch=rows)
    assert not agrees(cycle(make_params(), padded)[1], batch=rows)
    assert not agrees(tail_dropped(make_params(), rows), batch=rows)


def test_dropout_replayed_by_microbatch_differs_from_the_full_batch():
    def dropped(params, batch, key):
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.8, batch["mask"].shape[1:]))
        return jaxga.WeightedSum.of(
            token_losses(params, batch) * keep(key), where=batch["mask"]
        )

    def same_keys_again(params, batch):
        keys = jax.random.split(jax.random.key(0), 384 // K)
        grads = [
            jax.grad(lambda p, i=i: dropped(p, microbatch(batch, i), keys).total)(
                params
            )
            for i in range(K)
        ]
        return scale(tree_sum(grads), 1 / tokens(batch))

    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(384))
    expected = jax.grad(lambda p: dropped(p, make_batch(), keys).mean())(make_params())
    assert distance(same_keys_again(make_params(), make_batch()), expected) > 1e-2
    cycle = jaxga.value_and_grad(dropped, accum_steps=K, per_example_keys=True)
    _, grads = cycle(make_params(), make_batch(), key=jax.random.key(0))
    assert distance(grads, expected) <= BOUND


def test_devices_see_their_own_rows():
    """The whole batch on every device would give the same mean: the count tells."""
    cycle = jaxga.value_and_grad(counted, accum_steps=K, axis_name="data")
    mapped = jax.pmap(
        cycle, "data", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:DEVICES]
    )
    output, _ = mapped(make_params(), split_over_devices(make_batch(), DEVICES))
    assert output.weight == tokens(make_batch())
