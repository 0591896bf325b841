"""Whatever is used wrongly is refused at trace time: the value, the rule, the mend.

Each case of a table is a call, the type of its error, and words of its message: the
value as the user typed it, and what to do instead. What only looks wrong is in the
tables of what is accepted.
"""

import collections
import dataclasses
import functools

import flax.core
import jax
import jax.numpy as jnp
import jaxga
import jaxga.linen
import jmp
import numpy as np
import optax
import pytest
from flax.training import train_state as flax_train_state
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxga import LossOutput, Max, Min, Stack, Sum, WeightedSum
from refusals import refusals, refused

pytestmark = pytest.mark.anywhere

KEY = jax.random.key(0)
X = np.arange(12.0, dtype=np.float32).reshape(6, 2)
BATCH = {"x": X, "y": np.ones(6, np.float32)}
PARAMS = {"w": np.ones(2, np.float32)}
ONE = WeightedSum(1.0, 2)


def cases(table):
    return pytest.mark.parametrize("call", list(table.values()), ids=list(table))


def row_losses(params, batch):
    return (batch["x"] @ params["w"] - batch["y"]) ** 2


def loss_fn(params, batch):
    return WeightedSum.of(row_losses(params, batch))


def keyed_loss_fn(params, batch, key):
    return loss_fn(params, batch)


def two_terms(params, batch):
    return {"a": loss_fn(params, batch), "b": 0.1 * loss_fn(params, batch)}


def trace(
    loss=loss_fn, params=PARAMS, batch=BATCH, args=(), make=None, call=None, **kw
):
    """Traces one cycle; nothing runs."""
    make = make or jaxga.value_and_grad
    cycle = make(loss, **(kw or {"accum_steps": 2}))
    return jax.eval_shape(
        lambda params: cycle(params, batch, *args, **(call or {})), params
    )


def returning(function):
    """Traces a cycle whose loss function returns `function(row losses)`."""
    return lambda: trace(lambda p, b: function(row_losses(p, b)))


def metric(value):
    return returning(lambda losses: LossOutput(WeightedSum.of(losses), {"m": value}))


# WeightedSum


@refusals(
    {
        "scalar": (lambda: WeightedSum.of(3.0), ValueError, "scalar", "from_mean(mean"),
        "jax-scalar": (
            lambda: WeightedSum.of(jnp.ones(3).mean()),
            ValueError,
            "scalar",
            "before they are reduced",
        ),
        "none": (lambda: WeightedSum.of(None), TypeError, "None", "array of numbers"),
        "string": (lambda: WeightedSum.of("ab"), TypeError, "'ab'", "array of numbers"),
        "dict": (lambda: WeightedSum.of({"a": 1}), TypeError, "{'a': 1}", "array"),
        "weighted-sum": (
            lambda: WeightedSum.of(ONE),
            TypeError,
            "WeightedSum(",
            "array",
        ),
        "keys": (
            lambda: WeightedSum.of(jax.random.split(KEY)),
            TypeError,
            "key<fry>",
            "array of numbers",
        ),
        "where-beyond": (
            lambda: WeightedSum.of(X, where=np.ones((3, 6, 2), bool)),
            ValueError,
            "(3, 6, 2)",
            "(6, 2)",
            "one entry per value",
        ),
        "where-per-row": (
            lambda: WeightedSum.of(X, where=np.ones(6, bool)),
            ValueError,
            "where has shape (6,)",
            "trailing axes of length 1",
        ),
        "where-of-column": (
            lambda: WeightedSum.of(X[:, 0], where=np.ones((6, 2), bool)),
            ValueError,
            "where has shape (6, 2)",
            "(6,)",
        ),
        "where-float": (
            lambda: WeightedSum.of(X, where=np.ones((6, 2), np.float32)),
            TypeError,
            "where is of dtype float32",
            "where=mask == 1",
        ),
        "where-int": (lambda: WeightedSum.of(X, where=1), TypeError, "int", "weights="),
        "where-string": (
            lambda: WeightedSum.of(X, where="m"),
            TypeError,
            "where",
            "'m'",
        ),
        "weights-per-row": (
            lambda: WeightedSum.of(X, weights=np.ones(6, np.float32)),
            ValueError,
            "weights has shape (6,)",
            "trailing axes of length 1",
        ),
        "weights-string": (
            lambda: WeightedSum.of(X, weights="mean"),
            TypeError,
            "weights is 'mean'",
            "array of numbers",
        ),
        "weights-complex": (
            lambda: WeightedSum.of(X, weights=1j),
            TypeError,
            "weights",
            "complex64",
            "real",
        ),
        "too-many": (
            lambda: jax.eval_shape(
                WeightedSum.of, jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
            ),
            ValueError,
            "(65536, 32768)",
            "smaller micro-batches",
        ),
    }
)
def test_of(call, error, words):
    with refused(error, *words):
        call()


@refusals(
    {
        "vector-weight": (
            lambda: WeightedSum.from_mean(1.0, jnp.ones(2)),
            ValueError,
            "weight has shape (2,)",
            "scalar",
        ),
        "string": (lambda: WeightedSum.from_mean("x", 1), TypeError, "mean is 'x'"),
        "none": (lambda: WeightedSum.from_mean(1.0, None), TypeError, "weight is None"),
        "weighted-sum": (lambda: WeightedSum.from_mean(ONE, 1), TypeError, "mean is W"),
        "dict": (lambda: WeightedSum.from_mean({"a": 1.0}, 1), TypeError, "{'a': 1.0}"),
        "complex-weight": (
            lambda: WeightedSum.from_mean(1.0, 2j),
            TypeError,
            "weight",
            "complex64",
            "real",
        ),
    }
)
def test_from_mean(call, error, words):
    with refused(error, *words):
        call()


PLUS = ("WeightedSum", "return them as a dict", "a.merge(b)")
SCALED = ("WeightedSum", "scaled by a scalar")
DIVIDED = ("WeightedSum", "0.5 * a")


@refusals(
    {
        "a+a": (lambda: ONE + ONE, TypeError, *PLUS),
        "a+1": (lambda: ONE + 1, TypeError, *PLUS),
        "1+a": (lambda: 1 + ONE, TypeError, *PLUS),
        "numpy+a": (lambda: np.float32(1) + ONE, TypeError, *PLUS),
        "jax+a": (lambda: jnp.ones(()) + ONE, TypeError, *PLUS),
        "sum": (lambda: sum([ONE, ONE]), TypeError, *PLUS),
        "Sum+Sum": (lambda: Sum(1) + Sum(2), TypeError, "Sum", "a.merge(b)"),
        "a-a": (lambda: ONE - ONE, TypeError, "WeightedSum", "dict", "-0.1 * b"),
        "1-a": (lambda: 1 - ONE, TypeError, "WeightedSum", "dict", "-0.1 * b"),
        "a/2": (lambda: ONE / 2, TypeError, *DIVIDED),
        "a/jax": (lambda: ONE / jnp.ones(()), TypeError, *DIVIDED),
        "a//2": (lambda: ONE // 2, TypeError, *DIVIDED),
        "2/a": (lambda: 2 / ONE, TypeError, *DIVIDED),
        "a*vector": (lambda: ONE * jnp.ones(2), TypeError, *SCALED, "(2,)", "weights="),
        "vector*a": (lambda: jnp.ones(2) * ONE, TypeError, *SCALED, "(2,)", "weights="),
        "numpy*a": (lambda: np.ones(2) * ONE, TypeError, *SCALED, "(2,)", "weights="),
        "list*a": (lambda: [1, 2] * ONE, TypeError, *SCALED, "(2,)", "weights="),
        "a*a": (lambda: ONE * ONE, TypeError, *SCALED),
        "string*a": (lambda: "2" * ONE, TypeError, *SCALED, "'2'"),
        "none*a": (lambda: ONE * None, TypeError, *SCALED, "None"),
    }
)
def test_operators(call, error, words):
    with refused(error, *words):
        call()


# merge

TYPES = "both sides must be of one type"


@refusals(
    {
        "types": (lambda: jaxga.merge(Sum(1), Max(1)), TypeError, "Sum", "Max", TYPES),
        "method": (lambda: ONE.merge(Sum(1)), TypeError, "WeightedSum", "Sum", TYPES),
        "float": (lambda: ONE.merge(1.0), TypeError, "WeightedSum", "float", TYPES),
        "bare-left": (
            lambda: jaxga.merge({"x": X}, {"x": X}),
            TypeError,
            "a['x']",
            "(6, 2)",
            "jaxga.Sum(x)",
        ),
        "bare-right": (
            lambda: jaxga.merge({"x": ONE}, {"x": 1.0}),
            TypeError,
            "WeightedSum",
            "float",
            TYPES,
        ),
        "bare-floats": (lambda: jaxga.merge(1.0, 2.0), TypeError, "1.0", "jaxga.Sum"),
        "names": (
            lambda: jaxga.merge({"x": ONE}, {"y": ONE}),
            ValueError,
            "merge",
            "'x'",
            "'y'",
            "same structure",
        ),
        "one-more": (
            lambda: jaxga.merge({"x": ONE}, {"x": ONE, "y": ONE}),
            ValueError,
            "merge",
            "'y'",
            "same structure",
        ),
        "totals": (
            lambda: WeightedSum({"a": 1.0}, 1).merge(WeightedSum(1.0, 1)),
            ValueError,
            "merge",
            "same structure",
        ),
        "shapes": (
            lambda: Sum(jnp.ones(2)).merge(Sum(jnp.ones(3))),
            ValueError,
            "(2,)",
            "(3,)",
            "same shape",
        ),
        # Silently broadcast otherwise: two parts of one metric have one shape.
        "broadcast-sum": (
            lambda: Sum(jnp.ones((2, 1))).merge(Sum(jnp.ones((2, 3)))),
            ValueError,
            "(2, 1)",
            "(2, 3)",
            "same shape",
        ),
        "broadcast-max": (
            lambda: Max(jnp.ones(())).merge(Max(jnp.ones(3))),
            ValueError,
            "()",
            "(3,)",
            "same shape",
        ),
        "broadcast-total": (
            lambda: WeightedSum(jnp.ones(()), 1).merge(WeightedSum(jnp.ones(3), 1)),
            ValueError,
            "()",
            "(3,)",
            "same shape",
        ),
        "stacks": (
            lambda: Stack(jnp.ones(2)).merge(Stack(jnp.ones(3))),
            ValueError,
            "(2,)",
            "(3,)",
            "same shape",
        ),
    }
)
def test_merge(call, error, words):
    with refused(error, *words):
        call()


# What a loss function returns

OF = "jaxga.WeightedSum.of(losses, where=mask)"


@refusals(
    {
        "scalar": (lambda v: v.mean(), TypeError, "shape ()", OF, "from_mean"),
        "vector": (lambda v: v, TypeError, "shape (3,)", OF),
        "float": (lambda v: 3.0, TypeError, "3.0 of type float", OF),
        "none": (lambda v: None, TypeError, "None", OF),
        "tuple": (lambda v: (v.sum(), 6), TypeError, "of type tuple", OF),
        "aux-tuple": (
            lambda v: (WeightedSum.of(v), {"a": 1}),
            TypeError,
            "of type tuple",
            "jaxga.LossOutput(loss, metrics=...",
        ),
        "list": (lambda v: [WeightedSum.of(v)], TypeError, "of type list", OF),
        "mean": (lambda v: WeightedSum.of(v).mean(), TypeError, "shape ()", OF),
        "Sum": (lambda v: Sum(v.sum()), TypeError, "of type Sum", OF),
        "class": (lambda v: WeightedSum, TypeError, "WeightedSum", OF),
        "scalar-in-output": (lambda v: LossOutput(v.sum()), TypeError, "shape ()", OF),
        "output-in-output": (
            lambda v: LossOutput(LossOutput(WeightedSum.of(v))),
            TypeError,
            "of type LossOutput",
            OF,
        ),
        "vector-total": (
            lambda v: WeightedSum(v, 3),
            ValueError,
            "total of the loss has shape (3,)",
            OF,
        ),
        "vector-weight": (
            lambda v: WeightedSum(v.sum(), jnp.ones(3)),
            ValueError,
            "weight of the loss has shape (3,)",
            OF,
        ),
        "one-entry": (
            lambda v: WeightedSum(v.sum(keepdims=True), 3),
            ValueError,
            "shape (1,)",
            OF,
        ),
        "dict-total": (
            lambda v: WeightedSum({"a": v.sum()}, 3),
            TypeError,
            "total of the loss",
            "of type dict",
            OF,
        ),
        "string-total": (lambda v: WeightedSum("x", 3), TypeError, "'x'", OF),
        "none-weight": (lambda v: WeightedSum(v.sum(), None), TypeError, "None", OF),
        "string-weight": (lambda v: WeightedSum(v.sum(), "3"), TypeError, "'3'", OF),
        "int-total": (
            lambda v: WeightedSum(v.sum().astype(int), 3),
            TypeError,
            "total of the loss is of dtype int32",
            "floating point",
        ),
        "complex-total": (
            lambda v: WeightedSum.of(1j * v),
            TypeError,
            "complex64",
            "floating point",
        ),
        "complex-weight": (
            lambda v: WeightedSum(v.sum(), 2j),
            TypeError,
            "weight of the loss",
            "complex64",
            "real",
        ),
        "key-weight": (
            lambda v: WeightedSum(v.sum(), jax.random.key(0)),
            TypeError,
            "weight of the loss",
            "key<fry>",
        ),
        "key-total": (
            lambda v: WeightedSum(jax.random.key(0), 3),
            TypeError,
            "key<fry>",
            "floating point",
        ),
        "nan": (
            lambda v: WeightedSum(jnp.nan, 3),
            ValueError,
            "total of the loss is the constant nan",
            "finite",
        ),
        "infinite-weight": (
            lambda v: WeightedSum(v.sum(), np.inf),
            ValueError,
            "weight of the loss is the constant inf",
            "finite",
        ),
        "negative-weight": (
            lambda v: WeightedSum(v.sum(), -3),
            ValueError,
            "weight of the loss",
            "-3",
            "negative",
        ),
        "product": (
            lambda v: WeightedSum.of(v) * WeightedSum.of(v),
            TypeError,
            *SCALED,
        ),
        "empty-dict": (lambda v: {}, ValueError, "without any term", OF),
        "scalar-term": (lambda v: {"a": v.sum()}, TypeError, "the term 'a'", OF),
        "nested-dict": (
            lambda v: {"a": {"b": WeightedSum.of(v)}},
            TypeError,
            "the term 'a'",
            "of type dict",
            OF,
        ),
        "output-in-dict": (
            lambda v: {"a": LossOutput(WeightedSum.of(v))},
            TypeError,
            "the term 'a'",
            OF,
        ),
        "vector-term": (
            lambda v: {"a": WeightedSum(v, 3)},
            ValueError,
            "total of the term 'a' has shape (3,)",
            OF,
        ),
        "int-name": (lambda v: {1: WeightedSum.of(v)}, TypeError, "named 1", "string"),
        "tuple-name": (
            lambda v: {("a", 1): WeightedSum.of(v)},
            TypeError,
            "('a', 1)",
            "string",
        ),
        "mixed-names": (
            lambda v: {"a": WeightedSum.of(v), 1: WeightedSum.of(v)},
            TypeError,
            "named 1",
            "string",
        ),
    }
)
def test_returned_loss(call, error, words):
    with refused(error, *words):
        returning(call)()


WRAP = "jaxga.Stack(x) (kept for every micro-batch)"


@refusals(
    {
        "tracer": (
            returning(lambda v: LossOutput(WeightedSum.of(v), {"m": v.max()})),
            TypeError,
            "metrics['m']",
            "shape ()",
            WRAP,
        ),
        "nested": (metric({"n": 1.0}), TypeError, "metrics['m']['n'] is 1.0", WRAP),
        "not-a-dict": (
            returning(lambda v: LossOutput(WeightedSum.of(v), v.max())),
            TypeError,
            "metrics is an array of shape ()",
            WRAP,
        ),
        "string": (metric("hi"), TypeError, "metrics['m'] is 'hi'", WRAP),
        "class": (metric(Sum), TypeError, "metrics['m']", "Sum", WRAP),
        "bare-key": (metric(KEY), TypeError, "metrics['m']", "key<fry>", WRAP),
        "key": (metric(Stack(KEY)), TypeError, "metrics['m']", "keys", "merge"),
        "stacked": (
            metric(Stack(jnp.ones(3), True)),
            ValueError,
            "metrics['m']",
            "return Stack(value)",
        ),
        "vector-weight": (
            metric(WeightedSum(jnp.ones(3), jnp.ones(3))),
            ValueError,
            "weight of metrics['m'] has shape (3,)",
            "scalar",
        ),
        "complex-weight": (
            metric(WeightedSum(1.0, 3j)),
            TypeError,
            "weight of metrics['m']",
            "complex64",
            "real",
        ),
        "none-weight": (
            metric(WeightedSum(1.0, None)),
            TypeError,
            "metrics['m']",
            "None",
            "array of numbers",
        ),
        "string-total": (
            metric(WeightedSum("x", 3)),
            TypeError,
            "metrics['m']",
            "'x'",
            "array of numbers",
        ),
        "Sum-string": (metric(Sum("hi")), TypeError, "metrics['m']", "'hi'", "numbers"),
        "Sum-none": (metric(Sum(None)), TypeError, "metrics['m']", "None", "numbers"),
        "Sum-dict": (
            metric(Sum({"b": 1})),
            TypeError,
            "metrics['m']",
            "{'b': 1}",
            "array of numbers",
        ),
        "Sum-of-WeightedSum": (
            metric(Sum(ONE)),
            TypeError,
            "metrics['m']",
            "WeightedSum(",
            "array of numbers",
        ),
        "Stack-dict": (
            metric(Stack({"b": 1})),
            TypeError,
            "metrics['m']",
            "{'b': 1}",
            "array of numbers",
        ),
        "Max-complex": (
            metric(Max(1j)),
            TypeError,
            "metrics['m']",
            "complex64",
            "real",
        ),
        "Min-complex": (
            metric(Min(1j)),
            TypeError,
            "metrics['m']",
            "complex64",
            "real",
        ),
    }
)
def test_returned_metrics(call, error, words):
    with refused(error, *words):
        call()


# value_and_grad: how it is made

AT_LEAST = "integer of at least 1"
ONE_OF = "Give exactly one of accum_steps"


@refusals(
    {
        "0": ({"accum_steps": 0}, ValueError, "accum_steps=0", AT_LEAST),
        "-1": ({"accum_steps": -1}, ValueError, "accum_steps=-1", AT_LEAST),
        "2.5": ({"accum_steps": 2.5}, TypeError, "accum_steps=2.5", AT_LEAST),
        "2.0": ({"accum_steps": 2.0}, TypeError, "accum_steps=2.0", AT_LEAST),
        "string": ({"accum_steps": "2"}, TypeError, "accum_steps='2'", AT_LEAST),
        "True": ({"accum_steps": True}, TypeError, "accum_steps=True", "not a boolean"),
        "numpy-True": ({"accum_steps": np.True_}, TypeError, "np.True_", AT_LEAST),
        "list": ({"accum_steps": [2]}, TypeError, "accum_steps=[2]", AT_LEAST),
        "vector": ({"accum_steps": np.array([2])}, TypeError, "array([2])", AT_LEAST),
        "size-0": ({"microbatch_size": 0}, ValueError, "microbatch_size=0", AT_LEAST),
        "size-1.5": ({"microbatch_size": 1.5}, TypeError, "=1.5", AT_LEAST),
        "size-True": ({"microbatch_size": True}, TypeError, "=True", "not a boolean"),
        "neither": (
            {"accum_steps": None},
            ValueError,
            ONE_OF,
            "accum_steps=None, microbatch_size=None",
        ),
        "both": (
            {"accum_steps": 2, "microbatch_size": 3},
            ValueError,
            ONE_OF,
            "accum_steps=2, microbatch_size=3",
        ),
        "axis-int": ({"axis_name": 3}, TypeError, "axis_name=3", "tuple of names"),
        "axis-list": ({"axis_name": ["d"]}, TypeError, "['d']", "tuple of names"),
        "axis-twice": ({"axis_name": ("d", "d")}, ValueError, "('d', 'd')", "twice"),
        "dtype-int": (
            {"accum_dtype": "int32"},
            TypeError,
            "='int32'",
            "floating point",
        ),
        "dtype-bool": ({"accum_dtype": bool}, TypeError, "bool", "floating point"),
        "dtype-complex": (
            {"accum_dtype": jnp.complex64},
            TypeError,
            "complex64",
            "floating point",
        ),
        "dtype-none": ({"accum_dtype": "floaty"}, TypeError, "='floaty'", "no dtype"),
        "dtype-64": (
            {"accum_dtype": "float64"},
            ValueError,
            "accum_dtype='float64'",
            "jax_enable_x64",
        ),
        "dtype-float": ({"accum_dtype": float}, ValueError, "float", "jax_enable_x64"),
        "dtype-8": (
            {"accum_dtype": jnp.float8_e4m3fn},
            TypeError,
            "accum_dtype=",
            "float8_e4m3fn",
            "bfloat16",
        ),
        "rule": (
            {"model_state_merge": "avg"},
            ValueError,
            "='avg'",
            "carry, mean, max",
        ),
        "rule-none": ({"model_state_merge": None}, ValueError, "=None", "carry, mean"),
        "rule-list": ({"model_state_merge": ["mean"]}, ValueError, "['mean']", "carry"),
        "rule-function": ({"model_state_merge": jnp.mean}, ValueError, "mean", "carry"),
        "rule-in-dict": (
            {"model_state_merge": {"stats": "avg"}},
            ValueError,
            "{'stats': 'avg'}",
            "carry, mean, max",
        ),
        "rule-nested": (
            {"model_state_merge": {"a": {"b": "mean"}}},
            ValueError,
            "{'b': 'mean'}",
            "carry, mean, max",
        ),
        "rule-for-nothing": (
            {"model_state_merge": {"stats": "mean"}},
            ValueError,
            "'stats'",
            "top-level key",
        ),
        "per-example-string": (
            {"per_example_keys": "no"},
            TypeError,
            "per_example_keys='no'",
            "True or False",
        ),
    }
)
@pytest.mark.parametrize("make", [jaxga.value_and_grad, jaxga.value_and_grad_sums])
def test_settings(make, call, error, words):
    sized = {"accum_steps", "microbatch_size"} & call.keys()
    with refused(error, *words):
        trace(make=make, **(call if sized else {"accum_steps": 2} | call))


@pytest.mark.parametrize("loss", [None, "loss", ONE, 3, PARAMS])
def test_loss_is_no_function(loss):
    for make in (
        functools.partial(jaxga.value_and_grad, accum_steps=2),
        functools.partial(jaxga.value_and_grad_sums, accum_steps=2),
        functools.partial(jaxga.make_train_step, tx=optax.sgd(0.1), accum_steps=2),
        functools.partial(jaxga.linen.make_train_step, accum_steps=2),
    ):
        with refused(TypeError, "loss_fn is", repr(loss)[:10], "not a function"):
            make(loss)


def test_narrow_sums_warn():
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=16, accum_dtype=jnp.bfloat16)
    batch = {"x": np.ones((16, 2), np.float32), "y": np.ones(16, np.float32)}
    with pytest.warns(UserWarning, match="bfloat16 over 16 micro-batches.*float32"):
        jax.eval_shape(cycle, PARAMS, batch)


# value_and_grad: the parameters

PASS = "pass it as a further argument"


@refusals(
    {
        "int": (np.zeros(2, int), TypeError, "params is of dtype int", PASS),
        "int-leaf": (
            {"w": np.zeros(2, np.float32), "n": np.zeros(2, np.int32)},
            TypeError,
            "params['n'] is of dtype int32",
            PASS,
        ),
        "bool": (np.zeros(2, bool), TypeError, "dtype bool", PASS),
        "key": (KEY, TypeError, "key<fry>", PASS),
        "python-int": (3, TypeError, "params is 3 of type int", PASS),
        "python-bool": ({"w": True}, TypeError, "params['w'] is True", PASS),
        "string": ({"w": "a"}, TypeError, "params['w'] is 'a'", PASS),
        "function": ({"w": X, "f": len}, TypeError, "params['f']", "len", PASS),
        "strings": ({"w": np.array(["a"])}, TypeError, "params['w']", "<U1", PASS),
        "objects": ({"w": np.array([{}])}, TypeError, "params['w']", "object", PASS),
        "empty": ({}, ValueError, "params holds no arrays", "{}"),
        "none": (None, ValueError, "params holds no arrays", "None"),
        "only-none": ({"w": None}, ValueError, "no arrays", "{'w': None}"),
    }
)
def test_params(call, error, words):
    cycle = jaxga.value_and_grad(lambda p, b: WeightedSum.of(b["y"]), accum_steps=2)
    with refused(error, *words):
        cycle(call, BATCH)


def test_params_as_shapes():
    shapes = jax.eval_shape(lambda: jnp.ones(2))
    with refused(TypeError, "params['w']", "ShapeDtypeStruct", "jax.eval_shape"):
        jaxga.value_and_grad(loss_fn, accum_steps=2)({"w": shapes}, BATCH)


# value_and_grad: the batch

ARGS = "cycle(params, batch, *args)"


@refusals(
    {
        "empty": ({}, ValueError, "batch holds no arrays", "{}"),
        "none": (None, ValueError, "batch holds no arrays", "None"),
        "int": (5, TypeError, "batch is 5", ARGS),
        "list-leaf": (
            {"x": X, "y": [1.0] * 6},
            TypeError,
            "batch['y'][0]",
            "1.0",
            ARGS,
        ),
        "string": ({"x": X, "s": "abc"}, TypeError, "batch['s'] is 'abc'", ARGS),
        "function": ({"x": X, "f": len}, TypeError, "batch['f']", "len", ARGS),
        "python-scalar": ({"x": X, "n": 3.0}, TypeError, "batch['n'] is 3.0", ARGS),
        "scalar": (
            {"x": X, "n": np.float32(3)},
            ValueError,
            "batch['n'] is a scalar",
            ARGS,
        ),
        "single-key": ({"x": X, "k": KEY}, ValueError, "batch['k'] is a scalar", ARGS),
        "no-rows": ({"x": X[:0]}, ValueError, "batch['x']", "(0, 2)", "no rows"),
        "disagree": (
            {"x": X, "y": np.ones(5)},
            ValueError,
            "batch['y'] has shape (5,)",
            "batch['x'] has shape (6, 2)",
            "same number of rows",
        ),
        "strings": ({"x": X, "s": np.array(["a"] * 6)}, TypeError, "batch['s']", "<U1"),
        "objects": (
            {"x": X, "s": np.array([None] * 6)},
            TypeError,
            "batch['s']",
            "obj",
        ),
        "dates": (
            {"x": X, "s": np.array(["2020"] * 6, "datetime64[s]")},
            TypeError,
            "batch['s']",
            "datetime64",
        ),
        "records": (
            {"x": X, "s": np.zeros(6, [("a", "i4")])},
            TypeError,
            "batch['s']",
            "i4",
        ),
        "shapes": (
            {"x": jax.ShapeDtypeStruct((6, 2), jnp.float32)},
            TypeError,
            "batch['x']",
            "ShapeDtypeStruct",
            "jax.eval_shape",
        ),
    }
)
def test_batch(call, error, words):
    cycle = jaxga.value_and_grad(
        lambda p, b: WeightedSum.of(jnp.ones((3, 2)) @ p["w"]), accum_steps=2
    )
    with refused(error, *words):
        cycle(PARAMS, call)


@refusals(
    {
        "accum_steps": ({"accum_steps": 4}, ValueError, "accum_steps=4", "4 or 8 rows"),
        "more-than-rows": (
            {"accum_steps": 7},
            ValueError,
            "accum_steps=7",
            "Use 7 rows",
        ),
        "size": (
            {"microbatch_size": 4},
            ValueError,
            "microbatch_size=4",
            "4 or 8 rows",
        ),
        "size-too-large": ({"microbatch_size": 7}, ValueError, "=7", "Use 7 rows"),
    }
)
def test_indivisible_batch(call, error, words):
    with refused(error, "batch['x'] has shape (6, 2)", *words, "jaxga.pad_batch"):
        trace(**call)


# value_and_grad: keys

MADE_BY = "jax.random.key(seed)"


@pytest.mark.parametrize("per_example_keys", [False, True])
@refusals(
    {
        "seed": (3, TypeError, "key is 3 of type int", MADE_BY),
        "numpy-seed": (np.int32(3), TypeError, "shape ()", "int32", MADE_BY),
        "string": ("a", TypeError, "'a'", MADE_BY),
        "dict": ({"dropout": 1}, TypeError, "{'dropout': 1}", MADE_BY),
        "function": (jax.random.key, TypeError, "function", MADE_BY),
        "batched": (jax.random.split(KEY, 3), TypeError, "(3,)", "key<fry>", MADE_BY),
        "batched-raw": (np.zeros((3, 2), np.uint32), TypeError, "(3, 2)", MADE_BY),
        "floats": (np.zeros(2), TypeError, "(2,)", "float64", MADE_BY),
        "ints": (np.zeros(2, np.int32), TypeError, "(2,)", "int32", MADE_BY),
        "long-raw": (np.zeros(3, np.uint32), TypeError, "(3,)", "uint32", MADE_BY),
        "raw-rbg": (np.zeros(4, np.uint32), TypeError, "(4,)", "uint32", MADE_BY),
    }
)
def test_no_key(per_example_keys, call, error, words):
    settings = {"accum_steps": 2, "per_example_keys": per_example_keys}
    with refused(error, *words):
        trace(keyed_loss_fn, call={"key": call}, **settings)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_rbg_per_example(impl):
    key = jax.random.key(0, impl=impl)
    with refused(ValueError, "per_example_keys=True", impl, "impl='threefry2x32'"):
        trace(keyed_loss_fn, call={"key": key}, accum_steps=2, per_example_keys=True)


def test_per_example_keys_without_key():
    with refused(ValueError, "per_example_keys=True", "cycle(params, batch, key=key)"):
        trace(keyed_loss_fn, accum_steps=2, per_example_keys=True)


@pytest.mark.parametrize("name, value", [("key", KEY), ("model_state", X)])
def test_given_but_not_taken(name, value):
    with refused(
        TypeError, f"{name}= was given", "no argument of that name: params, b"
    ):
        trace(call={name: value})


@pytest.mark.parametrize("name", ["key", "model_state"])
def test_taken_but_not_given(name):
    losses = {
        "key": keyed_loss_fn,
        "model_state": lambda params, batch, model_state: loss_fn(params, batch),
    }
    with refused(TypeError, "loss_fn", f"'{name}'", f"{name}="):
        trace(losses[name])


def test_unknown_keyword():
    with refused(TypeError, "unexpected keyword argument 'rng'"):
        trace(call={"rng": KEY})


# value_and_grad: num_microbatches

NUM = "num_microbatches"


@refusals(
    {
        "large": (3, ValueError, f"{NUM}=3", "more than the 2 micro-batches"),
        "large-array": (np.int32(3), ValueError, f"{NUM}=3", "more than the 2"),
        "negative": (-1, ValueError, f"{NUM}=-1", "at least 0"),
        "float": (1.0, TypeError, f"{NUM}=1.0", "integer"),
        "string": ("1", TypeError, f"{NUM}='1'", "integer"),
        "bool": (True, TypeError, f"{NUM}=True", "integer"),
        "vector": (np.array([1, 2]), TypeError, f"{NUM}=array([1, 2])", "integer"),
        "jax-float": (jnp.ones(()), TypeError, f"{NUM}=Array(1.", "integer"),
    }
)
def test_num_microbatches(call, error, words):
    with refused(error, *words):
        trace(call={NUM: call})


@pytest.mark.parametrize("value", [1.0, True, np.array([1, 2])], ids=str)
def test_traced_num_microbatches(value):
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=2)
    with refused(TypeError, NUM, "array of shape", "integer scalar"):
        jax.eval_shape(lambda n: cycle(PARAMS, BATCH, num_microbatches=n), value)


# value_and_grad: term_weights

EACH = "one weight for each term of the loss, ['a', 'b']"


@refusals(
    {
        "wrong": ({"a": 6, "c": 6}, ValueError, EACH, "['a', 'c']"),
        "missing": ({"a": 6}, ValueError, EACH, "['a']"),
        "more": ({"a": 6, "b": 6, "c": 6}, ValueError, EACH, "['a', 'b', 'c']"),
        "empty": ({}, ValueError, EACH, "[]"),
        "list": ([6, 6], ValueError, EACH, "[6, 6]"),
        "float": (6.0, ValueError, EACH, "6.0"),
        "vector": ({"a": X[0], "b": 6}, ValueError, "['a'] has shape (2,)", "a scalar"),
        "string": ({"a": "x", "b": 6}, TypeError, "['a'] is 'x'", "numbers"),
        "none": ({"a": None, "b": 6}, TypeError, "['a'] is None", "numbers"),
        "complex": ({"a": 1j, "b": 6}, TypeError, "['a']", "complex", "real"),
        "nan": ({"a": np.nan, "b": 6}, ValueError, "['a']", "nan", "finite"),
        "negative": ({"a": -1, "b": 6}, ValueError, "['a']", "-1", "negative"),
    }
)
def test_term_weights(call, error, words):
    with refused(error, "term_weights", *words):
        trace(two_terms, call={"term_weights": call})


def test_term_weights_for_one_loss():
    with refused(TypeError, "term_weights was given", "one loss", "dict of terms"):
        trace(call={"term_weights": {"loss": 6}})


def test_sums_of_terms_without_their_weights():
    with refused(ValueError, "['a', 'b']", "Give these weights as term_weights="):
        trace(two_terms, make=jaxga.value_and_grad_sums)


def test_weight_of_several_terms():
    output, _ = trace(two_terms)
    with refused(ValueError, "['a', 'b']", "see weights"):
        _ = output.weight


# value_and_grad: model state

STATE = {"stats": {"mean": np.zeros(2, np.float32), "count": np.int32(0)}}


def with_mean(state, mean):
    return {"stats": state["stats"] | {"mean": mean}}


@refusals(
    {
        "not-returned": (
            lambda s: None,
            ValueError,
            "loss_fn did not return it",
            "jaxga.LossOutput(loss, model_state=new_model_state)",
        ),
        "shape": (
            lambda s: with_mean(s, jnp.zeros(3)),
            ValueError,
            "model_state['stats']['mean']",
            "(2,)",
            "(3,)",
            "keep both",
        ),
        "dtype": (
            lambda s: with_mean(s, jnp.zeros(2, jnp.bfloat16)),
            ValueError,
            "model_state['stats']['mean']",
            "float32",
            "bfloat16",
            "keep both",
        ),
        "python-float": (
            lambda s: with_mean(s, 0.0),
            ValueError,
            "model_state['stats']['mean']",
            "shape ()",
            "keep both",
        ),
        "int-to-float": (
            lambda s: {"stats": s["stats"] | {"count": s["stats"]["count"] + 1.0}},
            ValueError,
            "model_state['stats']['count']",
            "int32",
            "float32",
        ),
        "missing": (
            lambda s: {"stats": {"mean": s["stats"]["mean"]}},
            ValueError,
            "another structure",
            "without",
            "['stats']['count']",
        ),
        "more": (
            lambda s: s | {"more": jnp.zeros(1)},
            ValueError,
            "another structure",
            "['more']",
            "besides",
        ),
        "none-leaf": (
            lambda s: with_mean(s, None),
            ValueError,
            "another structure",
            "['stats']['mean']",
        ),
        "frozen": (
            flax.core.freeze,
            ValueError,
            "another structure",
            "FrozenDict",
        ),
        "weighted-sum": (
            lambda s: with_mean(s, WeightedSum(s["stats"]["mean"], 1)),
            ValueError,
            "another structure",
            "['stats']['mean'].total",
        ),
        "string-leaf": (
            lambda s: with_mean(s, "x"),
            TypeError,
            "model_state['stats']['mean']",
            "'x'",
        ),
    }
)
def test_returned_model_state(call, error, words):
    def stateful(params, batch, model_state):
        return LossOutput(loss_fn(params, batch), model_state=call(model_state))

    with refused(error, *words):
        trace(stateful, call={"model_state": STATE})


def test_model_state_returned_bare():
    def stateful(params, batch, model_state):
        return loss_fn(params, batch), model_state

    with refused(ValueError, "did not return it", "LossOutput(loss, model_state="):
        trace(stateful, call={"model_state": STATE})


def test_model_state_not_given():
    with refused(
        ValueError, "it would be lost", "cycle(params, batch, model_state=..."
    ):
        trace(lambda p, b: LossOutput(loss_fn(p, b), model_state=STATE))


@refusals(
    {
        "string": ({"a": "x"}, TypeError, "model_state['a']", "'x'", "array"),
        "function": ({"a": len}, TypeError, "model_state['a']", "len", "array"),
        "strings": ({"a": np.array(["x"])}, TypeError, "model_state['a']", "<U1"),
    }
)
def test_given_model_state(call, error, words):
    def stateful(params, batch, model_state):
        return LossOutput(loss_fn(params, batch), model_state=model_state)

    with refused(error, *words):
        trace(stateful, call={"model_state": call})


@refusals(
    {
        "key": ({"other": "mean"}, STATE, ValueError, "no 'other'", "['stats']"),
        "mixed-keys": ({"other": "mean", 1: "max"}, STATE, ValueError, "other", "1"),
        "no-keys": ({"other": "mean"}, X, ValueError, "'other'", "no top-level keys"),
        "complex": ("max", X * 1j, TypeError, "model_state", "complex", "real"),
    }
)
def test_rules_of_model_state(call, error, words):
    state, (error, *words) = error, words if isinstance(error, type) else words

    def stateful(params, batch, model_state):
        new = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), model_state)
        return LossOutput(loss_fn(params, batch), model_state=new)

    with refused(error, *words):
        trace(
            stateful, call={"model_state": state}, accum_steps=2, model_state_merge=call
        )


# value_and_grad: devices

WAYS = ["pmap", "shard_map", "unchecked", "explicit"]
ROWS = {"x": np.ones((16, 2), np.float32), "y": np.ones(16, np.float32)}


def mesh_of(sizes=(8,), names=("d",), axis_type=AxisType.Auto):
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names))


def trace_on_devices(way, loss, axis_name="d", make=jaxga.value_and_grad, **call):
    """Traces a cycle on 8 devices, in one of the four ways."""
    cycle = functools.partial(make(loss, accum_steps=2, axis_name=axis_name), **call)
    if way == "pmap":
        mapped = jax.pmap(cycle, axis_name="d", in_axes=(None, 0))
        rows = jax.tree.map(lambda leaf: leaf.reshape(8, 2, *leaf.shape[1:]), ROWS)
        return jax.eval_shape(mapped, PARAMS, rows)
    mesh = mesh_of(axis_type=AxisType.Explicit if way == "explicit" else AxisType.Auto)
    mapped = jax.shard_map(
        cycle,
        mesh=mesh,
        in_specs=(P(), P("d")),
        out_specs=P(),
        check_vma=way != "unchecked",
    )
    with jax.set_mesh(mesh):
        rows = jax.device_put(ROWS, NamedSharding(mesh, P("d")))
        return jax.eval_shape(mapped, PARAMS, rows)


def psum(x):
    return lax.psum(x, "d")


@jax.custom_vjp
def psum_with_vjp(x):
    return psum(x)


psum_with_vjp.defvjp(lambda x: (psum(x), None), lambda _, g: (g,))


def psum_in_scan(losses):
    zero = jnp.zeros((), losses.dtype)
    return lax.scan(lambda c, x: (c + psum(x), None), zero, losses)[0]


def psum_in_loop(losses):
    zero = jnp.zeros((), losses.dtype)
    return lax.fori_loop(0, 2, lambda i, c: c + psum(losses.sum()), zero)


def psum_in_cond(losses):
    return lax.cond(
        lax.psum(1, "d") > 4,
        lambda x: psum(x.sum()),
        lambda x: psum(2 * x.sum()),
        losses,
    )


SUMMED = {
    "psum": lambda v: WeightedSum(psum(v.sum()), v.size),
    "pmean": lambda v: WeightedSum(lax.pmean(v.sum(), "d"), v.size),
    "psum-of-all": lambda v: psum(WeightedSum.of(v)),
    "all_reduce": lambda v: WeightedSum.of(v).all_reduce("d"),
    "from_mean": lambda v: WeightedSum.from_mean(lax.pmean(v.mean(), "d"), v.size),
    "scaled": lambda v: 0.5 * WeightedSum(psum(v).sum() + 1, v.size),
    "jit": lambda v: WeightedSum(jax.jit(psum)(v.sum()), v.size),
    "jit-of-jit": lambda v: WeightedSum(jax.jit(jax.jit(psum))(v.sum()), v.size),
    "jit-of-all": lambda v: jax.jit(lambda v: psum(WeightedSum.of(v)))(v),
    "checkpoint": lambda v: WeightedSum(jax.checkpoint(psum)(v.sum()), v.size),
    "vmap": lambda v: WeightedSum(jax.vmap(psum)(v).sum(), v.size),
    "custom_vjp": lambda v: WeightedSum(psum_with_vjp(v.sum()), v.size),
    "scan": lambda v: WeightedSum(psum_in_scan(v), v.size),
    "jit-of-scan": lambda v: WeightedSum(jax.jit(psum_in_scan)(v), v.size),
    "map": lambda v: WeightedSum(lax.map(psum, v).sum(), v.size),
    "fori_loop": lambda v: WeightedSum(psum_in_loop(v), v.size),
    "cond": lambda v: WeightedSum(psum_in_cond(v), v.size),
    "all_gather": lambda v: WeightedSum.of(lax.all_gather(v, "d", tiled=True)),
    "reduce-scatter": lambda v: WeightedSum.of(
        lax.all_gather(lax.psum_scatter(jnp.broadcast_to(v.sum(), 8), "d"), "d")
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", list(SUMMED.values()), ids=list(SUMMED))
def test_total_summed_over_devices_already(way, loss):
    words = ("The total of the loss", "['d']", "over this device's own rows")
    with refused(ValueError, *words):
        trace_on_devices(way, lambda p, b: loss(row_losses(p, b)))


@pytest.mark.parametrize("way", WAYS)
def test_weight_summed_over_devices_already(way):
    def loss(params, batch):
        losses = row_losses(params, batch)
        return WeightedSum(losses.sum(), psum((batch["y"] > 0).sum()))

    with refused(ValueError, "The weight of the loss", "['d']", "own rows"):
        trace_on_devices(way, loss)


@pytest.mark.parametrize("way", WAYS)
def test_term_summed_over_devices_already(way):
    def loss(params, batch):
        losses = row_losses(params, batch)
        return {"a": WeightedSum.of(losses), "b": WeightedSum(psum(losses.sum()), 2)}

    with refused(ValueError, "total of the term 'b'", "['d']", "own rows"):
        trace_on_devices(way, loss)


@pytest.mark.parametrize("way", WAYS)
@cases(
    {
        "sum": lambda v, n: Sum(psum(n)),
        "total": lambda v, n: WeightedSum(psum(v.sum()), n),
        "weight": lambda v, n: WeightedSum(v.sum(), psum(n)),
    }
)
def test_metric_summed_over_devices_already(way, call):
    def loss(params, batch):
        losses = lax.stop_gradient(row_losses(params, batch))
        metric = call(losses, (batch["y"] > 0).sum())
        return LossOutput(loss_fn(params, batch), {"m": metric})

    with refused(ValueError, "metrics['m']", "['d']", "own rows"):
        trace_on_devices(way, loss)


@pytest.mark.parametrize("way", WAYS)
def test_sums_summed_over_devices_already(way):
    with refused(ValueError, "The total of the loss", "own rows"):
        trace_on_devices(
            way, lambda p, b: psum(loss_fn(p, b)), make=jaxga.value_and_grad_sums
        )


@pytest.mark.parametrize("check_vma", [False, True])
def test_summed_over_one_of_two_axes(check_vma):
    mapped = jax.shard_map(
        jaxga.value_and_grad(
            lambda p, b: lax.psum(loss_fn(p, b), "e"),
            accum_steps=2,
            axis_name=("d", "e"),
        ),
        mesh=mesh_of((4, 2), ("d", "e")),
        in_specs=(P(), P(("d", "e"))),
        out_specs=P(),
        check_vma=check_vma,
    )
    with refused(ValueError, "The total of the loss", "['e']", "own rows"):
        jax.eval_shape(mapped, PARAMS, ROWS)


@pytest.mark.parametrize("make", [jaxga.value_and_grad, jaxga.value_and_grad_sums])
@pytest.mark.parametrize("way", WAYS)
def test_axes_in_scope(way, make):
    with refused(ValueError, "('d',) are in scope", "axis_name='d'", "axis_name=()"):
        trace_on_devices(way, loss_fn, axis_name=None, make=make)
    with refused(ValueError, "axis_name='data'", "('d',)", "jax.shard_map"):
        trace_on_devices(way, loss_fn, axis_name="data", make=make)
    with refused(ValueError, "axis_name='e'", "('d',)", "jax.shard_map"):
        trace_on_devices(way, loss_fn, axis_name=("d", "e"), make=make)


def test_axis_not_in_scope():
    with refused(
        ValueError, "axis_name='d'", "no axes", "jax.pmap(..., axis_name='d')"
    ):
        trace(accum_steps=2, axis_name="d")


@pytest.mark.parametrize("way", WAYS)
@refusals(
    {
        "count": (np.int32(0), TypeError, "int32"),
        "flag": (np.bool_(False), TypeError, "bool"),
        "key": (KEY, TypeError, "key<fry>"),
    }
)
def test_model_state_that_devices_disagree_about(way, call, error, words):
    def stateful(params, batch, model_state):
        count = (batch["y"] > 0).sum()
        if jnp.issubdtype(model_state.dtype, jax.dtypes.prng_key):
            new = jax.random.fold_in(model_state, count)
        else:
            new = (model_state + count).astype(model_state.dtype)
        return LossOutput(loss_fn(params, batch), model_state=new)

    with refused(error, "model_state", *words, "own rows", "as a metric"):
        trace_on_devices(way, stateful, model_state=call)


def features(params, batch):
    return batch["x"] * params["w"][None]


def sync_batch_norm(params, batch):
    h = features(params, batch)
    centred = h - lax.pmean(h.mean(0), "d")[None]
    return WeightedSum.of((centred**2).sum(-1) / lax.pmean((centred**2).mean(), "d"))


def sync_batch_norm_in_scan(params, batch):
    def layer(h, _):
        return h - lax.pmean(h.mean(0), "d")[None], None

    h, _ = lax.scan(layer, features(params, batch), None, length=2)
    return WeightedSum.of((h**2).sum(-1))


def gathered_negatives(params, batch):
    h = features(params, batch)
    everyone = lax.all_gather(h, "d", tiled=True)
    return WeightedSum.of(jax.nn.logsumexp(h @ everyone.T, axis=-1))


def gathered_negatives_in_scan(params, batch):
    h = features(params, batch)
    everyone = lax.all_gather(h, "d", tiled=True)
    losses = lax.map(lambda row: jax.nn.logsumexp(everyone @ row), h)
    return WeightedSum.of(losses)


def own_rows_of_gathered(params, batch):
    everyone = lax.all_gather(features(params, batch), "d")
    return WeightedSum.of(everyone[lax.axis_index("d")].sum(-1))


def weights_over_global_sum(params, batch):
    weights = jnp.abs(batch["x"].sum(-1))
    weights = weights / psum(weights.sum())
    return WeightedSum.of(row_losses(params, batch), weights=weights)


def penalty_on_params(params, batch):
    penalty = WeightedSum((params["w"] ** 2).sum(), 1)
    return {"loss_per_row": loss_fn(params, batch), "penalty": penalty}


def merged_metrics(params, batch):
    losses = lax.stop_gradient(row_losses(params, batch))
    return LossOutput(
        loss_fn(params, batch),
        {
            "mean": WeightedSum(lax.pmean(losses.mean(), "d"), 1),
            "both": psum(WeightedSum.of(losses)),
            "max": Max(lax.pmax(losses.max(), "d")),
            "devices": Sum(1),
        },
    )


def constant_weight(params, batch):
    return WeightedSum(row_losses(params, batch).sum(), 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "loss",
    [
        loss_fn,
        two_terms,
        sync_batch_norm,
        sync_batch_norm_in_scan,
        gathered_negatives,
        gathered_negatives_in_scan,
        own_rows_of_gathered,
        weights_over_global_sum,
        penalty_on_params,
        merged_metrics,
        constant_weight,
    ],
)
def test_collectives_that_are_accepted(way, loss):
    trace_on_devices(way, loss)


@pytest.mark.parametrize("way", WAYS)
@cases(
    {
        "counter": (np.int32(0), lambda state, batch: state + 1),
        "global-counter": (
            np.int32(0),
            lambda state, batch: state + psum((batch["y"] > 0).sum()),
        ),
        "key": (KEY, lambda state, batch: jax.random.fold_in(state, 1)),
        "mean": (np.float32(0), lambda state, batch: state + batch["y"].mean()),
        "sync": (np.float32(0), lambda s, b: s + lax.pmean(b["y"].mean(), "d")),
    }
)
def test_model_state_that_is_accepted_on_devices(way, call):
    state, change = call

    def stateful(params, batch, model_state):
        return LossOutput(
            loss_fn(params, batch), model_state=change(model_state, batch)
        )

    trace_on_devices(way, stateful, model_state=state)


# value_and_grad: what is accepted

Pair = collections.namedtuple("Pair", "x y")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    x: jax.Array
    y: jax.Array


def attribute_loss(params, batch):
    return loss_fn(params, {"x": batch.x, "y": batch.y})


def keyword_loss(params, batch, **keywords):
    assert keywords.keys() == {"key"}
    return loss_fn(params, batch)


def partial_loss(scale, params, batch):
    return scale * loss_fn(params, batch)


class CallableLoss:
    def __call__(self, params, batch, *, key=None):
        return loss_fn(params, batch)


def constant_state(params, batch, model_state):
    return LossOutput(loss_fn(params, batch), model_state=model_state)


KEYS = jax.random.split(KEY, 6)


@cases(
    {
        "numpy-accum_steps": lambda: trace(accum_steps=np.int64(2)),
        "jax-accum_steps": lambda: trace(accum_steps=jnp.int32(2)),
        "numpy-microbatch_size": lambda: trace(microbatch_size=np.int32(3)),
        "one-micro-batch": lambda: trace(microbatch_size=6),
        "numpy-num": lambda: trace(call={NUM: np.int32(1)}),
        "jax-num": lambda: trace(call={NUM: jnp.int32(1)}),
        "no-micro-batch": lambda: trace(call={NUM: 0}),
        "dtype-name": lambda: trace(accum_steps=2, accum_dtype="bfloat16"),
        "no-axes": lambda: trace(accum_steps=2, axis_name=()),
        "rule-without-state": lambda: trace(accum_steps=2, model_state_merge="mean"),
        "frozen-params": lambda: trace(params=flax.core.freeze(PARAMS)),
        "numpy-float64-params": lambda: trace(params={"w": np.ones(2)}),
        "float-param": lambda: trace(
            lambda p, b: WeightedSum.of(p * b["y"]), params=2.0
        ),
        "bfloat16-params": lambda: trace(params={"w": jnp.ones(2, jnp.bfloat16)}),
        "none-in-params": lambda: trace(params=PARAMS | {"bias": None}),
        "named-tuple": lambda: trace(attribute_loss, batch=Pair(**BATCH)),
        "dataclass": lambda: trace(attribute_loss, batch=Rows(**BATCH)),
        "frozen-batch": lambda: trace(batch=flax.core.freeze(BATCH)),
        "none-in-batch": lambda: trace(batch=BATCH | {"mask": None}),
        "keys-in-batch": lambda: trace(batch=BATCH | {"keys": KEYS}),
        "numpy-int64-leaf": lambda: trace(batch=BATCH | {"n": np.arange(6)}),
        "further-arguments": lambda: trace(
            lambda p, b, name, scale: scale * loss_fn(p, b), args=("name", 2.0)
        ),
        "unused-key-default": lambda: trace(CallableLoss()),
        "callable-object": lambda: trace(CallableLoss(), call={"key": KEY}),
        "keywords": lambda: trace(keyword_loss, call={"key": KEY}),
        "partial": lambda: trace(functools.partial(partial_loss, 2.0)),
        "jitted-loss": lambda: trace(jax.jit(loss_fn)),
        "positional-key": lambda: trace(keyed_loss_fn, args=(KEY,)),
        "raw-key": lambda: trace(keyed_loss_fn, call={"key": jax.random.PRNGKey(0)}),
        "numpy-raw-key": lambda: trace(
            keyed_loss_fn, call={"key": np.zeros(2, np.uint32)}
        ),
        "rbg-per-micro-batch": lambda: trace(
            keyed_loss_fn, call={"key": jax.random.key(0, impl="rbg")}
        ),
        "empty-model-state": lambda: trace(constant_state, call={"model_state": {}}),
        "python-model-state": lambda: trace(
            constant_state, call={"model_state": {"a": 1.0, "b": 2}}
        ),
        "key-model-state": lambda: trace(constant_state, call={"model_state": KEY}),
        "numpy-term-weights": lambda: trace(
            two_terms, call={"term_weights": {"a": np.int64(6), "b": np.float32(6)}}
        ),
        "vmap": lambda: jax.eval_shape(
            jax.vmap(jaxga.value_and_grad(loss_fn, accum_steps=2), (0, None)),
            {"w": np.ones((3, 2), np.float32)},
            BATCH,
        ),
        "constant-loss": returning(lambda v: WeightedSum(1.0, 3)),
        "numpy-weight": returning(lambda v: WeightedSum(v.sum(), np.int64(3))),
        "no-weight": returning(lambda v: WeightedSum(v.sum(), 0)),
        "boolean-weight": returning(lambda v: WeightedSum(v.sum(), v.sum() > 0)),
        "one-term": returning(lambda v: {"a": WeightedSum.of(v)}),
        "no-metrics": returning(lambda v: LossOutput(WeightedSum.of(v), {})),
        "none-metric": metric(None),
        "metric-of-many": metric({"a": [Sum(1), (Max(2.0), Min(True))]}),
        "vector-metric": metric(WeightedSum(jnp.ones(3), 1)),
        "tree-metric": metric(WeightedSum({"a": 1.0, "b": X}, 1)),
        "int-stack": metric(Stack(3)),
    }
)
def test_accepted(call):
    call()


@pytest.mark.parametrize("scale", [2, 2.0, np.float32(2), np.int64(2), jnp.float32(2)])
def test_scales_that_are_accepted(scale):
    for scaled in (scale * ONE, ONE * scale):
        assert (scaled.total, scaled.weight) == (2, 2)


@pytest.mark.parametrize(
    "where, count",
    [
        (True, 12),
        (None, 12),
        (np.array([[True, False]]), 6),
        (np.arange(6)[:, None] < 2, 4),
        (np.arange(12).reshape(6, 2) < 5, 5),
        (jnp.arange(6)[:, None] < 2, 4),
    ],
)
def test_where_that_is_accepted(where, count):
    assert WeightedSum.of(X, where=where).weight == count
    assert WeightedSum.of(X.tolist(), where=where).weight == count


# BatchSizes


@refusals(
    {
        "none": ({}, ValueError, "two of global_batch_size", "are missing"),
        "one": (
            {"global_batch_size": 64},
            ValueError,
            "needs two of",
            "microbatch_size and accum_steps are missing",
        ),
        "only-devices": ({"num_devices": 8}, ValueError, "needs two of", "are missing"),
        "contradiction": (
            {
                "global_batch_size": 64,
                "microbatch_size": 4,
                "accum_steps": 4,
                "num_devices": 2,
            },
            ValueError,
            "global_batch_size=64",
            "4 * 4 * 2 = 32",
            "Leave one of them out, or use global_batch_size=32",
        ),
        "indivisible": (
            {"global_batch_size": 100, "microbatch_size": 6, "num_devices": 8},
            ValueError,
            "global_batch_size=100",
            "6 * 8 = 48",
            "Use global_batch_size=96 or 144",
        ),
        "too-small": (
            {"global_batch_size": 5, "accum_steps": 6, "num_devices": 8},
            ValueError,
            "global_batch_size=5",
            "Use global_batch_size=48",
        ),
        "default-devices": (
            {"global_batch_size": 12, "accum_steps": 2},
            ValueError,
            "accum_steps * num_devices = 2 * 8",
            "Use global_batch_size=16",
        ),
        "bool": ({"global_batch_size": True}, TypeError, "=True", "not a boolean"),
        "string": (
            {"microbatch_size": "4"},
            TypeError,
            "microbatch_size='4'",
            AT_LEAST,
        ),
        "float": ({"accum_steps": 1e3}, TypeError, "accum_steps=1000.0", AT_LEAST),
        "0": ({"global_batch_size": 0}, ValueError, "global_batch_size=0", AT_LEAST),
        "-1": ({"accum_steps": -1}, ValueError, "accum_steps=-1", AT_LEAST),
        "no-devices": ({"num_devices": 0}, ValueError, "num_devices=0", AT_LEAST),
        "devices": ({"num_devices": [0, 1]}, TypeError, "num_devices=[0, 1]", AT_LEAST),
    }
)
def test_batch_sizes(call, error, words):
    with refused(error, *words):
        jaxga.BatchSizes(**call)


def test_batch_sizes_that_are_accepted():
    sizes = jaxga.BatchSizes(np.int64(64), np.int32(4), num_devices=jnp.int32(8))
    assert sizes == jaxga.BatchSizes(64, 4, 2, 8)
    assert {type(value) for value in dataclasses.astuple(sizes)} == {int}


# pad_batch


@refusals(
    {
        "too-many": ((BATCH, 4, 2), ValueError, "6 rows already", "more than rows=4"),
        "multiple": ((BATCH, 9, 2), ValueError, "rows=9", "accum_steps=2", "Use 10"),
        "empty": (({}, 8, 2), ValueError, "batch holds no arrays", "{}"),
        "no-rows": (
            ({"x": X[:0]}, 8, 2),
            ValueError,
            "batch['x']",
            "(0, 2)",
            "no rows",
        ),
        "float": ((BATCH, 8.0, 2), TypeError, "rows=8.0", AT_LEAST),
        "bool": ((BATCH, True, 1), TypeError, "rows=True", "not a boolean"),
        "0": ((BATCH, 0, 1), ValueError, "rows=0", AT_LEAST),
        "string": ((BATCH, 8, "2"), TypeError, "accum_steps='2'", AT_LEAST),
        "0-steps": ((BATCH, 8, 0), ValueError, "accum_steps=0", AT_LEAST),
        "swapped": ((8, BATCH, 2), TypeError, "rows={'x'", AT_LEAST),
        "scalar": (
            ({"x": X, "n": np.ones(())}, 8, 2),
            ValueError,
            "batch['n']",
            "scalar",
        ),
        "list": (({"x": X, "y": [1] * 6}, 8, 2), TypeError, "batch['y'][0]", "array"),
        "disagree": (
            ({"x": X, "y": X[:3]}, 8, 2),
            ValueError,
            "batch['y'] has shape (3, 2)",
            "same number of rows",
        ),
        "shapes": (
            ({"x": jax.ShapeDtypeStruct((6, 2), jnp.float32)}, 8, 2),
            TypeError,
            "batch['x']",
            "ShapeDtypeStruct",
        ),
    }
)
def test_pad_batch(call, error, words):
    batch, rows, accum_steps = call
    with refused(error, *words):
        jaxga.pad_batch(batch, rows, accum_steps=accum_steps)


@cases(
    {
        "numpy-ints": lambda: (BATCH, np.int64(8), np.int32(2)),
        "jax-ints": lambda: (BATCH, jnp.int32(8), jnp.int32(2)),
        "full": lambda: (BATCH, 6, 2),
        "none-leaf": lambda: (BATCH | {"mask": None}, 8, 2),
        "strings-on-the-host": lambda: (BATCH | {"s": np.array(["a"] * 6)}, 8, 2),
        "keys": lambda: (BATCH | {"keys": KEYS}, 8, 2),
        "frozen": lambda: (flax.core.freeze(BATCH), 8, 2),
        "named-tuple": lambda: (Pair(**BATCH), 8, 2),
    }
)
def test_pad_batch_that_is_accepted(call):
    batch, rows, accum_steps = call()
    padded, mask = jaxga.pad_batch(batch, rows, accum_steps=accum_steps)
    assert mask.sum() == 6
    assert jax.tree.structure(padded) == jax.tree.structure(batch)
    assert {len(leaf) for leaf in jax.tree.leaves(padded)} == {int(rows)}


# DataParallel

MAKE_MESH = 'jax.make_mesh((jax.device_count(),), ("data",))'
ZEROS = "must be 0, 1, 2 or 3"


def data_parallel(mesh=None, **kw):
    return jaxga.DataParallel(mesh or mesh_of((2,), ("data",)), **kw)


@refusals(
    {
        "string": (
            lambda: data_parallel("data"),
            TypeError,
            "mesh is 'data'",
            MAKE_MESH,
        ),
        "int": (lambda: data_parallel(8), TypeError, "mesh is 8", MAKE_MESH),
        "none": (
            lambda: jaxga.DataParallel(None),
            TypeError,
            "mesh is None",
            MAKE_MESH,
        ),
        "devices": (
            lambda: data_parallel(jax.devices()),
            TypeError,
            "mesh is [CpuDevice",
            MAKE_MESH,
        ),
        "abstract": (
            lambda: data_parallel(mesh_of().abstract_mesh),
            TypeError,
            "AbstractMesh",
            MAKE_MESH,
        ),
        "class": (
            lambda: data_parallel(jax.sharding.Mesh),
            TypeError,
            "Mesh",
            MAKE_MESH,
        ),
        "axis": (
            lambda: data_parallel(axis="batch"),
            ValueError,
            "axis='batch'",
            "('data',)",
        ),
        "one-axis": (
            lambda: data_parallel(axis=("data", "x")),
            ValueError,
            "axis=('data', 'x')",
            "('data',)",
        ),
        "no-axis": (lambda: data_parallel(axis=()), ValueError, "axis=()", "mesh"),
        "axis-none": (
            lambda: data_parallel(axis=None),
            ValueError,
            "axis=None",
            "mesh",
        ),
        "axis-list": (
            lambda: data_parallel(axis=["data"]),
            TypeError,
            "DataParallel",
            "axis=['data']",
            "tuple of names",
        ),
        "axis-int": (
            lambda: data_parallel(axis=0),
            TypeError,
            "DataParallel",
            "axis=0",
            "tuple of names",
        ),
        "zero-4": (lambda: data_parallel(zero=4), ValueError, "zero=4", ZEROS),
        "zero-minus": (lambda: data_parallel(zero=-1), ValueError, "zero=-1", ZEROS),
        "zero-True": (lambda: data_parallel(zero=True), ValueError, "zero=True", ZEROS),
        "zero-string": (lambda: data_parallel(zero="1"), ValueError, "zero='1'", ZEROS),
        "zero-none": (lambda: data_parallel(zero=None), ValueError, "zero=None", ZEROS),
        "zero-list": (lambda: data_parallel(zero=[1]), ValueError, "zero=[1]", ZEROS),
        "zero-array": (
            lambda: data_parallel(zero=np.array([0, 1])),
            ValueError,
            "zero=array([0, 1])",
            ZEROS,
        ),
    }
)
def test_data_parallel(call, error, words):
    with refused(error, *words):
        call()


@refusals(
    {
        "indivisible": (
            {"x": X[:5]},
            ValueError,
            "5 rows",
            "2 devices",
            "jaxga.pad_batch",
        ),
        "scalar": ({"x": X, "n": np.ones(())}, ValueError, "batch['n'] is a scalar"),
        "list": ({"x": X, "y": [1] * 6}, TypeError, "batch['y'][0] is 1", "array"),
        "empty": ({}, ValueError, "batch holds no arrays", "{}"),
        "strings": ({"x": X, "s": np.array(["a"] * 6)}, TypeError, "batch['s']", "<U1"),
    }
)
def test_shard_batch(call, error, words):
    with refused(error, *words):
        data_parallel().shard_batch(call)


@pytest.mark.parametrize("leaf", ["x", len], ids=["string", "function"])
def test_shard_state(leaf):
    with refused(TypeError, "state['a']", repr(leaf), "array"):
        data_parallel().shard_state({"a": leaf})


@cases(
    {
        "numpy-zero": lambda: data_parallel(zero=np.int64(0)),
        "axes": lambda: data_parallel(
            mesh_of((4, 2), ("data", "x")), axis=("data", "x")
        ),
        "explicit": lambda: data_parallel(jax.make_mesh((8,), ("data",))),
        "none-in-batch": lambda: data_parallel().shard_batch(BATCH | {"mask": None}),
        "numpy-state": lambda: data_parallel().shard_state({"a": 1.0, "b": X}),
        "shapes": lambda: data_parallel().shard_state(
            jax.eval_shape(lambda: {"a": jnp.ones(3)})
        ),
    }
)
def test_data_parallel_that_is_accepted(call):
    call()


# TrainState.create and make_train_step

SGD = optax.sgd(0.1)
TX = "it must be an optax gradient transformation, optax.adamw(1e-3), say"


def make_state(params=PARAMS, tx=SGD, **kw):
    return jaxga.TrainState.create(jax.tree.map(jnp.array, params), tx, **kw)


def trace_step(loss=loss_fn, state=None, tx=SGD, batch=BATCH, args=(), call=None, **kw):
    step = jaxga.make_train_step(loss, tx, **({"accum_steps": 2} | kw))
    state = make_state(tx=tx) if state is None else state
    return jax.eval_shape(lambda s, b: step(s, b, *args, **(call or {})), state, batch)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam,
        optax.constant_schedule(0.1),
        "adam",
        None,
        (1, 2),
        1e-3,
        optax.MultiSteps(SGD, 2),
    ],
    ids=["factory", "schedule", "string", "none", "tuple", "rate", "MultiSteps"],
)
def test_no_optimizer(tx):
    with refused(TypeError, "tx is", repr(tx)[:20], TX):
        jaxga.make_train_step(loss_fn, tx, accum_steps=2)
    with refused(TypeError, "tx is", repr(tx)[:20], TX):
        jaxga.TrainState.create(PARAMS, tx)


def test_parameters_of_fp8_layers_outside_linen():
    params = {"params": PARAMS, "_overwrite_with_gradient": {"s": X}}
    with refused(ValueError, "_overwrite_with_gradient", "jaxga.linen.make_train_step"):
        jax.eval_shape(jaxga.value_and_grad(loss_fn, accum_steps=2), params, BATCH)
    parallel = data_parallel()
    step = jaxga.make_train_step(loss_fn, SGD, accum_steps=2, parallel=parallel)
    state = jaxga.TrainState.create(params, SGD)
    with refused(ValueError, "_overwrite_with_gradient", "jaxga.linen.make_train_step"):
        step(state, BATCH)


@refusals(
    {
        "swapped": (
            lambda: jaxga.TrainState.create(SGD, PARAMS),
            TypeError,
            "tx is {'w'",
            TX,
        ),
        "seed": (lambda: make_state(key=3), TypeError, "key is 3", MADE_BY),
        "string": (lambda: make_state(key="a"), TypeError, "key is 'a'", MADE_BY),
        "batched": (
            lambda: make_state(key=jax.random.split(KEY, 3)),
            TypeError,
            "key is an array of shape (3,)",
            MADE_BY,
        ),
        "dict": (
            lambda: make_state(key={"dropout": 1}),
            TypeError,
            "key is {'dropout': 1}",
            MADE_BY,
        ),
    }
)
def test_create(call, error, words):
    with refused(error, *words):
        call()


@refusals(
    {
        "nonfinite": ({"nonfinite": "skip"}, ValueError, "='skip'", "'skip_cycle' or"),
        "drop": (
            {"nonfinite": "drop_microbatch"},
            ValueError,
            "nonfinite='drop_microbatch'",
            "'skip_cycle' or 'propagate'",
        ),
        "nonfinite-none": ({"nonfinite": None}, ValueError, "=None", "'skip_cycle' or"),
        "parallel-mesh": (
            {"parallel": mesh_of()},
            TypeError,
            "parallel is Mesh",
            "jaxga.DataParallel(mesh)",
        ),
        "parallel-string": (
            {"parallel": "data"},
            TypeError,
            "parallel is 'data'",
            "jaxga.DataParallel(mesh)",
        ),
        "parallel-class": (
            {"parallel": jaxga.DataParallel},
            TypeError,
            "parallel is",
            "jaxga.DataParallel(mesh)",
        ),
        "parallel-and-axis": (
            {"parallel": data_parallel(), "axis_name": "data"},
            ValueError,
            "axis_name='data'",
            "exclude each other",
        ),
        "neither-size": ({"accum_steps": None}, ValueError, ONE_OF, "accum_steps=None"),
        "both-sizes": ({"microbatch_size": 2}, ValueError, ONE_OF, "microbatch_size=2"),
        "accum_steps": ({"accum_steps": 2.5}, TypeError, "accum_steps=2.5", AT_LEAST),
        "rule": ({"model_state_merge": "avg"}, ValueError, "'avg'", "carry, mean, max"),
        "dtype": ({"accum_dtype": "int32"}, TypeError, "='int32'", "floating point"),
        "donate": ({"donate": "no"}, TypeError, "donate='no'", "True or False"),
    }
)
@pytest.mark.parametrize("kind", ["plain", "linen"])
def test_step_settings(kind, call, error, words):
    make = {
        "plain": functools.partial(jaxga.make_train_step, loss_fn, SGD),
        "linen": functools.partial(jaxga.linen.make_train_step, loss_fn),
    }[kind]
    with refused(error, *words):
        make(**({"accum_steps": 2} | call))


def flax_state(params=PARAMS, tx=SGD):
    return flax_train_state.TrainState.create(
        apply_fn=len, params=jax.tree.map(jnp.array, params), tx=tx
    )


CREATE = "jaxga.TrainState.create(params, tx)"


@refusals(
    {
        "flax": (
            flax_state(),
            TypeError,
            "flax.training.train_state.TrainState",
            "jaxga.linen.make_train_step",
        ),
        "params": (jnp.ones(2), TypeError, "state is of type", CREATE),
        "dict": (PARAMS, TypeError, "state is of type dict", CREATE),
        "tuple": ((PARAMS, ()), TypeError, "state is of type tuple", CREATE),
    }
)
def test_kind_of_state(call, error, words):
    with refused(error, *words):
        trace_step(state=call)


def test_state_and_batch_swapped():
    step = jaxga.make_train_step(loss_fn, SGD, accum_steps=2)
    with refused(TypeError, "state is of type dict", CREATE):
        step.lower(BATCH, make_state())


@pytest.mark.parametrize(
    "of_state, of_step",
    [
        (SGD, optax.adam(0.1)),
        (optax.adam(0.1), SGD),
        (optax.adam(0.1), optax.lion(0.1)),
    ],
)
def test_state_of_another_optimizer(of_state, of_step):
    with refused(ValueError, "opt_state", "another optimizer", CREATE):
        trace_step(state=make_state(tx=of_state), tx=of_step)


@refusals(
    {
        "two-keys": (
            lambda: trace_step(
                keyed_loss_fn, make_state(key=KEY), call={"key": jax.random.key(1)}
            ),
            ValueError,
            "key of its own",
            "key= was given too",
            "Leave out one",
        ),
        "key-not-taken": (
            lambda: trace_step(state=make_state(key=KEY)),
            TypeError,
            "key=",
            "no argument of that name: params, batch",
        ),
        "key-not-given": (
            lambda: trace_step(keyed_loss_fn),
            TypeError,
            "'key'",
            "key=",
        ),
        "key-is-seed": (
            lambda: trace_step(keyed_loss_fn, call={"key": 3}),
            TypeError,
            "key is an array of shape ()",
            MADE_BY,
        ),
        "state-not-taken": (
            lambda: trace_step(state=make_state(model_state=X)),
            TypeError,
            "model_state=",
            "no argument of that name: params, batch",
        ),
        "indivisible": (
            lambda: trace_step(accum_steps=4),
            ValueError,
            "batch['x'] has shape (6, 2)",
            "accum_steps=4",
            "jaxga.pad_batch",
        ),
        "indivisible-on-devices": (
            lambda: trace_step(parallel=data_parallel(mesh_of((4,), ("data",)))),
            ValueError,
            "6 rows",
            "4 devices",
            "jaxga.pad_batch",
        ),
        "indivisible-on-device": (
            lambda: trace_step(parallel=data_parallel()),
            ValueError,
            "3 rows",
            "accum_steps=2",
            "those of one device",
        ),
        "summed-on-devices": (
            lambda: trace_step(
                lambda p, b: lax.psum(loss_fn(p, b), "data"),
                parallel=data_parallel(),
                accum_steps=3,
            ),
            ValueError,
            "The total of the loss",
            "['data']",
            "own rows",
        ),
        "axis-out-of-scope": (
            lambda: trace_step(axis_name="d"),
            ValueError,
            "axis_name='d'",
            "jax.shard_map over a mesh",
        ),
        "integer-params": (
            lambda: trace_step(
                state=dataclasses.replace(make_state(), params=np.zeros(2, np.int32))
            ),
            TypeError,
            "params is of dtype int32",
            PASS,
        ),
    }
)
def test_step(call, error, words):
    with refused(error, *words):
        call()


def test_step_in_shard_map_without_axis():
    step = jaxga.make_train_step(loss_fn, SGD, accum_steps=2)
    mapped = jax.shard_map(
        step, mesh=mesh_of(), in_specs=(P(), P("d")), out_specs=P(), check_vma=False
    )
    with refused(ValueError, "('d',) are in scope", "Pass axis_name='d'"):
        jax.eval_shape(mapped, make_state(), ROWS)


RECORD = "step's record"


@refusals(
    {
        "bare": (Sum(1), TypeError, "of type Sum", "dict of metrics by name"),
        "list": ([Sum(1)], TypeError, "of type list", "dict of metrics by name"),
        "mean": (ONE, TypeError, "of type WeightedSum", "dict of metrics by name"),
        "int-name": ({1: Sum(1)}, TypeError, "named 1", "string"),
        "loss": ({"loss": Sum(1)}, ValueError, "metric 'loss'", RECORD, "another name"),
        "weight": ({"weight": Sum(1)}, ValueError, "metric 'weight'", "another name"),
        "update": ({"update": Sum(1)}, ValueError, "metric 'update'", "another name"),
        "skipped": (
            {"skipped": Sum(1)},
            ValueError,
            "metric 'skipped'",
            "another name",
        ),
        "norm": (
            {"grad_norm": Sum(1)},
            ValueError,
            "metric 'grad_norm'",
            "another name",
        ),
        "unwrapped": ({"acc": 0.5}, TypeError, "metrics['acc'] is 0.5", WRAP),
    }
)
@pytest.mark.parametrize("kind", ["plain", "linen"])
def test_metrics_of_a_step(kind, call, error, words):
    def loss(params, batch):
        return LossOutput(loss_fn(params, batch), call)

    with refused(error, *words):
        if kind == "plain":
            trace_step(loss)
        else:
            trace_linen(loss)


@refusals(
    {
        "weight": ({"weight", "b"}, ValueError, "term 'weight'", "another name"),
        "loss": ({"loss", "b"}, ValueError, "term 'loss'", "another name"),
        "grad_norm": ({"grad_norm"}, ValueError, "term 'grad_norm'", "another name"),
        "metric": ({"m", "b"}, ValueError, "metric 'm'", "another name"),
    }
)
def test_terms_of_a_step(call, error, words):
    def loss(params, batch):
        terms = {name: loss_fn(params, batch) for name in call}
        return LossOutput(terms, {"m": Sum(1)})

    with refused(error, *words):
        trace_step(loss)


@pytest.mark.parametrize("value", [1.5, True, np.array([1, 2])], ids=str)
def test_num_microbatches_of_a_step(value):
    step = jaxga.make_train_step(loss_fn, SGD, accum_steps=2)
    with refused(TypeError, NUM, "array of shape", "integer scalar"):
        step.lower(make_state(), BATCH, num_microbatches=value)


def test_donated_state_reused():
    """JAX's own error: nothing of the library runs."""
    step = jaxga.make_train_step(loss_fn, SGD, accum_steps=2)
    state = make_state()
    step(state, BATCH)
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        step(state, BATCH)


@cases(
    {
        "numpy-ints": lambda: trace_step(accum_steps=np.int64(2)),
        "microbatch_size": lambda: trace_step(accum_steps=None, microbatch_size=3),
        "donate-not": lambda: trace_step(donate=False),
        "frozen": lambda: trace_step(state=make_state(flax.core.freeze(PARAMS))),
        "raw-key": lambda: trace_step(
            keyed_loss_fn, make_state(key=jax.random.PRNGKey(0))
        ),
        "key-of-call": lambda: trace_step(keyed_loss_fn, call={"key": KEY}),
        "one-term-named-loss": lambda: trace_step(lambda p, b: {"loss": loss_fn(p, b)}),
        "nested-metrics": lambda: trace_step(
            lambda p, b: LossOutput(loss_fn(p, b), {"a": {"loss": Sum(1)}})
        ),
        "frozen-metrics": lambda: trace_step(
            lambda p, b: LossOutput(loss_fn(p, b), flax.core.freeze({"a": Sum(1)}))
        ),
        "argument": lambda: trace_step(lambda p, b, s: s * loss_fn(p, b), args=(2.0,)),
        "none-argument": lambda: trace_step(
            lambda p, b, s: loss_fn(p, b), args=(None,)
        ),
        "masked": lambda: trace_step(tx=optax.masked(optax.adam(0.1), {"w": True})),
        "schedule": lambda: trace_step(
            tx=optax.inject_hyperparams(optax.adam)(optax.constant_schedule(0.1))
        ),
        "parallel": lambda: trace_step(parallel=data_parallel(), accum_steps=3),
        "parallel-argument": lambda: trace_step(
            lambda p, b, s: s * loss_fn(p, b),
            args=(2.0,),
            parallel=data_parallel(),
            accum_steps=3,
        ),
    }
)
def test_step_that_is_accepted(call):
    call()


@pytest.mark.parametrize(
    "tx",
    [
        optax.contrib.prodigy(0.1),
        optax.contrib.dog(0.1),
        optax.contrib.schedule_free_sgd(),
    ],
    ids=["prodigy", "dog", "schedule_free"],
)
def test_optimizer_that_keeps_the_first_parameters(tx):
    """Their state starts as the parameters' own buffers: donated once, not twice."""
    step = jaxga.make_train_step(loss_fn, tx, accum_steps=2)
    state, metrics = step(make_state(tx=tx), BATCH)
    assert metrics["update"] == 1


def test_tied_parameters():
    weight = jnp.ones(2)
    state = jaxga.TrainState.create({"w": weight, "tied": weight}, SGD)
    step = jaxga.make_train_step(loss_fn, SGD, accum_steps=2)
    state, metrics = step(state, BATCH)
    assert metrics["update"] == 1


# jaxga.linen.make_train_step


class StatefulTrainState(flax_train_state.TrainState):
    batch_stats: dict | None = None


def stateful_state():
    return StatefulTrainState.create(
        apply_fn=len,
        params=jax.tree.map(jnp.array, PARAMS),
        tx=SGD,
        batch_stats={"mean": jnp.zeros(2)},
    )


def trace_linen(loss=loss_fn, state=None, call=None, **kw):
    step = jaxga.linen.make_train_step(loss, **({"accum_steps": 2} | kw))
    return jax.eval_shape(
        lambda s, b: step(s, b, **(call or {})), state or flax_state(), BATCH
    )


class ScaledTrainState(flax_train_state.TrainState):
    loss_scale: jmp.LossScale | None = None


def scaled_state(loss_scale):
    state = flax_state()
    made = {"apply_fn": len, "params": state.params, "tx": SGD}
    return ScaledTrainState.create(**made, loss_scale=loss_scale)


def test_a_loss_scale_in_a_flax_state_is_not_ignored():
    scale = jmp.StaticLossScale(jnp.float32(8))
    words = ("loss_scale=StaticLossScale(", "jaxga.TrainState.create(params, tx")
    with refused(ValueError, *words):
        trace_linen(state=scaled_state(scale))
    trace_linen(state=scaled_state(None))


TUPLE = '("batch_stats",)'
FLAX = "flax.training.train_state"


@refusals(
    {
        "string": ("batch_stats", TypeError, "mutable='batch_stats'", TUPLE),
        "ints": ((1,), TypeError, "mutable=(1,)", TUPLE),
        "none": (None, TypeError, "mutable=None", TUPLE),
        "True": (True, TypeError, "mutable=True", TUPLE),
        "no-field": (
            ("batchstats",),
            ValueError,
            "mutable=('batchstats',)",
            "'batch_stats'",
        ),
        "method": (("apply_gradients",), ValueError, "'apply_gradients'", "no field"),
        "params": (("params",), ValueError, "mutable=('params',)", "'batch_stats'"),
        "opt_state": (("opt_state",), ValueError, "('opt_state',)", "'batch_stats'"),
        "step": (("step",), ValueError, "mutable=('step',)", "'batch_stats'"),
        "tx": (("tx",), ValueError, "mutable=('tx',)", "'batch_stats'"),
        "apply_fn": (("apply_fn",), ValueError, "('apply_fn',)", "'batch_stats'"),
    }
)
def test_mutable(call, error, words):
    with refused(error, *words):
        trace_linen(constant_state, stateful_state(), mutable=call)


@refusals(
    {
        "plain": (make_state(), TypeError, "jaxga", "jaxga.make_train_step"),
        "params": (jnp.ones(2), TypeError, "The state is", FLAX),
        "dict": (PARAMS, TypeError, "The state is", "dict", FLAX),
    }
)
def test_kind_of_linen_state(call, error, words):
    step = jaxga.linen.make_train_step(loss_fn, accum_steps=2)
    with refused(error, *words):
        jax.eval_shape(step, call, BATCH)


@refusals(
    {
        "not-taken": (
            lambda: trace_linen(state=stateful_state(), mutable=("batch_stats",)),
            TypeError,
            "model_state=",
            "no argument of that name: params, batch",
        ),
        "not-mutable": (
            lambda: trace_linen(
                lambda p, b: LossOutput(loss_fn(p, b), model_state={"batch_stats": X}),
                stateful_state(),
            ),
            ValueError,
            "returned a model_state",
            "mutable=",
        ),
        "bare-stats": (
            lambda: trace_linen(
                lambda p, b, model_state: LossOutput(
                    loss_fn(p, b), model_state=model_state["batch_stats"]
                ),
                stateful_state(),
                mutable=("batch_stats",),
            ),
            ValueError,
            "another structure",
            "['batch_stats']['mean']",
        ),
        "rule": (
            lambda: trace_linen(
                constant_state,
                stateful_state(),
                mutable=("batch_stats",),
                model_state_merge={"stats": "mean"},
            ),
            ValueError,
            "no 'stats'",
            "['batch_stats']",
        ),
        "batched-key": (
            lambda: trace_linen(keyed_loss_fn, call={"key": KEYS}),
            TypeError,
            "key is an array of shape (6,)",
            MADE_BY,
        ),
        "seed": (
            lambda: trace_linen(keyed_loss_fn, call={"key": 3}),
            TypeError,
            "key is an array of shape ()",
            MADE_BY,
        ),
        "key-not-taken": (
            lambda: trace_linen(call={"key": KEY}),
            TypeError,
            "key=",
            "no argument of that name: params, batch",
        ),
        "bare-params": (
            lambda: trace_linen(
                lambda p, b: loss_fn({"w": p}, b), flax_state(np.ones(2, np.float32))
            ),
            TypeError,
            "state.params",
            "dict",
        ),
    }
)
def test_linen_step(call, error, words):
    with refused(error, *words):
        call()


@cases(
    {
        "plain": lambda: trace_linen(),
        "tuple": lambda: trace_linen(
            constant_state, stateful_state(), mutable=("batch_stats",)
        ),
        "list": lambda: trace_linen(
            constant_state, stateful_state(), mutable=["batch_stats"]
        ),
        "generator": lambda: trace_linen(
            constant_state, stateful_state(), mutable=(n for n in ["batch_stats"])
        ),
        "unused-field": lambda: trace_linen(state=stateful_state()),
        "frozen": lambda: trace_linen(state=flax_state(flax.core.freeze(PARAMS))),
        "key": lambda: trace_linen(keyed_loss_fn, call={"key": KEY}),
        "raw-key": lambda: trace_linen(
            keyed_loss_fn, call={"key": jax.random.PRNGKey(0)}
        ),
    }
)
def test_linen_step_that_is_accepted(call):
    call()
