"""Merge types: what they sum, in which dtype, and the laws of merging."""

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from problems import make_mesh

pytestmark = pytest.mark.anywhere

# WeightedSum.


def test_of_counts_after_broadcasting():
    values = jnp.arange(12.0).reshape(3, 4)
    rows = jnp.array([[True], [False], [True]])
    total = jaxga.WeightedSum.of(values, where=rows)
    assert total.total == values[0].sum() + values[2].sum() and total.weight == 8
    columns = jnp.array([True, False, False, True])
    assert jaxga.WeightedSum.of(values, where=columns[None]).weight == 6
    assert jaxga.WeightedSum.of(values, weights=jnp.array([[2], [0], [1]])).weight == 12


def test_of_takes_where_and_weights_together():
    values = jnp.array([1.0, 2.0, 4.0])
    total = jaxga.WeightedSum.of(
        values,
        where=jnp.array([True, False, True]),
        weights=jnp.array([0.5, jnp.nan, 2.0]),
    )
    assert total.total == 8.5 and total.weight == 2.5


def test_of_selects_and_does_not_multiply():
    values = jnp.array([1.0, jnp.nan, jnp.inf])
    where = jnp.array([True, False, False])
    total = jaxga.WeightedSum.of(values, where=where)
    assert total.total == 1 and total.weight == 1
    grads = jax.grad(lambda v: jaxga.WeightedSum.of(v, where=where).total)(values)
    np.testing.assert_array_equal(grads, [1, 0, 0])


@pytest.mark.parametrize(
    "values, weights, total_dtype, weight_dtype",
    [
        (jnp.float32, None, jnp.float32, jnp.int32),
        (jnp.bfloat16, None, jnp.float32, jnp.int32),
        (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float8_e4m3fn, None, jnp.float32, jnp.int32),
        (jnp.bool_, None, jnp.float32, jnp.int32),
        (jnp.int8, jnp.uint8, jnp.float32, jnp.int32),
        (jnp.complex64, jnp.float32, jnp.complex64, jnp.float32),
    ],
)
def test_dtypes_of_sums(values, weights, total_dtype, weight_dtype):
    weights = None if weights is None else jnp.ones(4, weights)
    total = jaxga.WeightedSum.of(jnp.ones(4, values), weights=weights)
    assert (total.total.dtype, total.weight.dtype) == (total_dtype, weight_dtype)
    assert total.total == 4 and total.weight == 4


def test_float64_is_kept():
    with jax.enable_x64(True):
        total = jaxga.WeightedSum.of(jnp.ones(3, jnp.float64), weights=jnp.ones(3))
        assert total.total.dtype == total.weight.dtype == jnp.float64
        counts = jaxga.WeightedSum.of(jnp.ones(3), weights=jnp.arange(3))
        assert counts.weight.dtype == jnp.int32


def test_small_integer_weights_do_not_run_over():
    total = jaxga.WeightedSum.of(jnp.ones(300), weights=jnp.full(300, 100, jnp.int8))
    assert total.weight == 30_000


def test_counts_stay_exact_where_float32_stops():
    big = jaxga.WeightedSum(0.0, jnp.int32(2**24))
    assert big.merge(jaxga.WeightedSum(0.0, 1)).weight == 2**24 + 1
    assert np.float32(2**24) + np.float32(1) == 2**24


def test_from_mean_undoes_the_division():
    total = jaxga.WeightedSum.from_mean(jnp.float32(2.5), jnp.int32(4))
    assert total.total == 10 and total.weight == 4 and total.weight.dtype == jnp.int32
    nothing = jaxga.WeightedSum.from_mean(jnp.float32(jnp.nan), 0)
    assert nothing.total == 0 and nothing.mean() == 0


def test_mean_divides_once_and_never_by_zero():
    assert jaxga.WeightedSum(6.0, 4).mean() == 1.5
    assert jaxga.WeightedSum(6.0, 0).mean() == 0
    assert jaxga.WeightedSum(6.0, 0.25).mean() == 24  # a fraction is no reason to clamp
    assert np.isnan(jaxga.WeightedSum(6.0, -1).mean())
    tree = jaxga.WeightedSum({"a": jnp.ones(2), "b": 4.0}, 2).mean()
    assert tree["b"] == 2 and (tree["a"] == 0.5).all()


@pytest.mark.parametrize("factor", (2, 2.0, np.float32(2), jnp.float32(2)))
def test_scaling_scales_the_total_only(factor):
    for scaled in (
        factor * jaxga.WeightedSum(3.0, 4),
        jaxga.WeightedSum(3.0, 4) * factor,
    ):
        assert scaled.total == 6 and scaled.weight == 4


# Metrics through a cycle, over micro-batches and devices.


def metrics_of(rows):
    return {
        "mean": jaxga.WeightedSum.of(rows, where=rows > 3),
        "vector": jaxga.WeightedSum(
            jnp.stack([rows.sum(), (rows**2).sum()]), rows.size
        ),
        "sum": jaxga.Sum((rows > 3).sum()),
        "flags": jaxga.Sum(rows.max() > 20),
        "max": jaxga.Max(rows.max()),
        "min": jaxga.Min(rows.min().astype(jnp.int32)),
        "any": jaxga.Max(rows.max() > 22),
        "all": jaxga.Min(rows.max() > 22),
        "stack": jaxga.Stack(rows.sum()),
    }


def loss_with_metrics(params, rows):
    return jaxga.LossOutput(jaxga.WeightedSum.of(params * rows), metrics_of(rows))


ROWS = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize("runner", ("one", "pmap", "checked", "unchecked"))
def test_metrics_merge_over_microbatches_and_devices(runner):
    axis_name = None if runner == "one" else "data"
    cycle = jaxga.value_and_grad(loss_with_metrics, accum_steps=3, axis_name=axis_name)

    def run(params, rows):
        return cycle(params, rows)[0].metrics

    if runner == "one":
        metrics = jax.jit(run)(jnp.float32(1), ROWS)
    elif runner == "pmap":
        run = jax.pmap(
            run, "data", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:4]
        )
        metrics = run(jnp.float32(1), ROWS.reshape(4, 6))
    else:
        specs = dict(in_specs=(P(), P("data")), out_specs=P())
        run = jax.shard_map(
            run, mesh=make_mesh(4), check_vma=runner == "checked", **specs
        )
        metrics = jax.jit(run)(jnp.float32(1), ROWS)
    assert metrics["mean"] == ROWS[4:].mean()
    np.testing.assert_allclose(metrics["vector"], [ROWS.mean(), (ROWS**2).mean()])
    assert metrics["sum"] == 20 and metrics["max"] == 23 and metrics["min"] == 0
    assert metrics["min"].dtype == jnp.int32
    assert metrics["any"] and not metrics["all"]
    devices = ROWS.reshape(1 if runner == "one" else 4, -1)
    stacked = [rows[i::3].sum() for rows in devices for i in range(3)]
    np.testing.assert_array_equal(metrics["stack"], stacked)
    flags = [rows[i::3].max() > 20 for rows in devices for i in range(3)]
    assert metrics["flags"] == sum(flags)


def test_metrics_of_a_short_cycle():
    cycle = jax.jit(
        lambda n: (
            jaxga.value_and_grad(loss_with_metrics, accum_steps=3)(
                jnp.float32(1), ROWS, num_microbatches=n
            )[0].metrics
        )
    )
    metrics = cycle(2)
    assert np.isnan(metrics["stack"][2]) and np.isfinite(metrics["stack"][:2]).all()
    assert metrics["max"] == 22
    nothing = cycle(0)
    assert nothing["mean"] == 0 and nothing["max"] == -np.inf


# Laws: any split, any order, any grouping.

NUMBERS = st.integers(-1000, 1000)  # exact in float32, so that laws hold exactly
PARTS = st.lists(st.tuples(NUMBERS, st.integers(0, 1000)), min_size=1, max_size=9)


def make_part(total, weight):
    return {
        "mean": jaxga.WeightedSum(np.float32(total), np.int32(weight)),
        "sum": jaxga.Sum(np.int32(total)),
        "max": jaxga.Max(np.float32(total)),
        "min": jaxga.Min(np.int32(weight)),
    }


def merge_all(parts):
    merged = parts[0]
    for part in parts[1:]:
        merged = jaxga.merge(merged, part)
    return merged


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@settings(max_examples=50, deadline=None)
@given(parts=PARTS, data=st.data())
def test_any_order_and_any_grouping_give_the_same(parts, data):
    parts = [make_part(*part) for part in parts]
    straight = merge_all(parts)
    shuffled = data.draw(st.permutations(parts))
    while len(shuffled) > 1:  # merge neighbours anywhere until one is left
        i = data.draw(st.integers(0, len(shuffled) - 2))
        shuffled[i : i + 2] = [jaxga.merge(shuffled[i], shuffled[i + 1])]
    assert same(shuffled[0], straight)


@settings(max_examples=50, deadline=None)
@given(part=st.tuples(NUMBERS, st.integers(0, 1000)))
def test_empty_is_the_identity(part):
    part = jax.tree.map(jnp.asarray, make_part(*part))
    shapes = jax.eval_shape(lambda: part)
    empty = jax.tree.map(
        lambda m: m.empty(1), shapes, is_leaf=lambda x: hasattr(x, "empty")
    )
    assert same(jaxga.merge(part, empty), part)
    assert same(jaxga.merge(empty, part), part)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.tuples(NUMBERS, st.booleans()), min_size=2, max_size=30),
    data=st.data(),
)
def test_any_split_of_the_data_gives_the_same(values, data):
    numbers, mask = (np.array(column) for column in zip(*values, strict=True))
    numbers = numbers.astype(np.float32)
    cuts = data.draw(st.sets(st.integers(1, len(values) - 1)))
    whole = jaxga.WeightedSum.of(numbers, where=mask)
    parts = [
        jaxga.WeightedSum.of(n, where=m)
        for n, m in zip(
            np.split(numbers, sorted(cuts)), np.split(mask, sorted(cuts)), strict=True
        )
    ]
    assert same(merge_all(parts), whole)


def test_stacks_merge_in_order_and_group_freely():
    a, b, c = (jaxga.Stack(np.float32(i)) for i in range(3))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    np.testing.assert_array_equal(left.finalize(), [0, 1, 2])
    np.testing.assert_array_equal(right.finalize(), [0, 1, 2])


@pytest.mark.parametrize("part", make_part(3, 4).values(), ids=type)
def test_flattening_keeps_every_field(part):
    leaves, treedef = jax.tree.flatten(part)
    assert jax.tree.unflatten(treedef, leaves) == part
    stack = jaxga.Stack(np.ones(2), stacked=True)
    assert jax.tree.map(lambda x: x, stack).stacked
