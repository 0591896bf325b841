"""The audit of models that compute in few bits: faults show through the rounding."""

import functools

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import pytest
from jax import lax
from jaxga import audit
from jaxga._audit.cycles import Settings
from jaxga._audit.problem import Problem
from jaxga._audit.study import Study, study_cycles
from jaxga._audit.trainer_study import study_trainer
from test_audit import random_loss, random_values

pytestmark = pytest.mark.anywhere

ROWS, WIDTH, PARTS = 64, 16, 4


@functools.cache
def make_params():
    rng = np.random.default_rng(1)
    shapes = {"w": (WIDTH, WIDTH), "u": (WIDTH, WIDTH), "v": (WIDTH,)}
    return {n: rng.normal(size=s).astype(np.float32) / 4 for n, s in shapes.items()}


@functools.cache
def make_batch(seed=2):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        "y": rng.normal(size=ROWS).astype(np.float32),
        "mask": rng.random(ROWS) < 0.8,
    }


def predict(params, x, dtype=jnp.bfloat16):
    w, u, v = (params[name].astype(dtype) for name in "wuv")
    return (jnp.tanh(jnp.tanh(x.astype(dtype) @ w) @ u) @ v).astype(jnp.float32)


def narrow_loss(params, batch):
    losses = (predict(params, batch["x"]) - batch["y"]) ** 2
    return jaxga.WeightedSum.of(losses, where=batch["mask"])


def sums_of(params, batch):
    grads = jax.grad(lambda p: narrow_loss(p, batch).total)(params)
    return grads, batch["mask"].sum()


def trainer(factors):
    """Adds the micro-batches' gradients with factors made from their weights."""

    @jax.jit
    def grad_fn(params, batch):
        parts = [jax.tree.map(lambda x, i=i: x[i::PARTS], batch) for i in range(PARTS)]
        found = [sums_of(params, part) for part in parts]
        weights = jnp.stack([weight for _, weight in found])
        scaled = [
            jax.tree.map(lambda g, f=f: f * g, grads)
            for f, (grads, _) in zip(factors(weights), found, strict=True)
        ]
        return jax.tree.map(lambda *leaves: sum(leaves), *scaled)

    return grad_fn


@functools.cache
def study():
    options = dict(model_state=None, key=None, per_example_keys=False, is_wide=True)
    problem = Problem(narrow_loss, make_params(), make_batch(), (), **options)
    made = Study(problem, 1e-5)
    assert not made.nothing_to_compare()
    return made


def all_of(w, extra=0):
    return [1 / (w.sum() + extra)] * PARTS


def only_leaf(params, batch):
    grads = trainer(all_of)(params, batch)
    return grads | {"u": 0.97 * grads["u"]}


# What the rounding of one leaf hides, up to 11 % of it, each of these is less than.
HIDDEN = {
    "one_token_too_many": (trainer(functools.partial(all_of, extra=1)), "factor"),
    "four_tokens_too_many": (trainer(functools.partial(all_of, extra=4)), "factor"),
    "one_percent": (trainer(lambda w: [1.01 / w.sum()] * PARTS), "factor"),
    "mean_of_means": (trainer(lambda w: 1 / w / PARTS), "means"),
    "one_part_counts_more": (
        trainer(lambda w: jnp.array([1.12, 1, 1, 1]) / w.sum()),
        "means",
    ),
    "one_leaf": (only_leaf, None),
}


def test_a_narrow_trainer_that_is_right_passes():
    for grad_fn in (trainer(all_of), jax.grad(lambda p, b: narrow_loss(p, b).mean())):
        entries, causes = study_trainer(study(), grad_fn, [PARTS], [1])
        assert not causes and all(entry.passed for entry in entries), entries


@pytest.mark.parametrize("name", HIDDEN)
def test_a_small_systematic_error_is_seen_through_the_rounding(name):
    grad_fn, kind = HIDDEN[name]
    entries, (cause,) = study_trainer(study(), grad_fn, [PARTS], [1])
    assert not entries[0].passed
    assert kind in (None, cause.kind), cause


def test_what_rounding_hides_is_said():
    made = study()
    made.note_what_is_hidden()
    assert "hides a wrong factor nearer to 1 than 0.0" in made.notes[-1]


def coupled(params, batch):
    """A narrow model with a primitive that is computed as it was traced."""
    x = batch["x"] - 0.2 * batch["x"].mean(0, keepdims=True)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    x = x + 0 * lax.bitcast_convert_type(bits, jnp.float32)
    return narrow_loss(params, batch | {"x": x})


def test_coupling_is_seen_beside_what_knows_no_float64():
    report = audit(
        coupled, make_params(), make_batch(), accum_steps=PARTS, num_devices=1
    )
    assert [cause.kind for cause in report.causes] == ["coupling"], report
    assert "bitcast_convert_type know no other" in str(report)


@pytest.mark.long
@pytest.mark.parametrize("factors", ((6e4,), (1e2, 6e4)), ids=("sum", "mean"))
def test_what_overflows_is_said(factors):
    def loss_fn(params, batch):
        out = predict(params, batch["x"], jnp.float16).astype(jnp.float16)
        for factor in factors:
            out = out * factor
        return jaxga.WeightedSum.of(out)

    options = dict(accum_steps=PARTS, num_devices=1)
    report = audit(loss_fn, make_params(), make_batch(), **options)
    assert [cause.kind for cause in report.causes] == ["nan"], report
    assert "overflows in the" in report.causes[0].text


@pytest.mark.long
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("kind", range(5))
def test_no_false_alarm_on_narrow_problems(kind, dtype):
    """The cycle, and a mean in another order: five losses, each on ten batches."""
    loss, rows, width, accum_steps = random_loss(kind)
    where = ("compute", "params")[kind % 2]

    def narrow(tree, when):
        leaves = jax.tree.map(lambda x: x.astype(dtype), tree)
        return leaves if where == when else tree

    def loss_fn(params, batch):
        return loss(narrow(params, "compute"), batch)

    def values(seed):
        params, batch = random_values(seed, rows, width)
        return narrow(params, "params"), batch

    @jax.jit
    def backwards(params, batch):
        """As a trainer would: a mean loss, with the rows in another order."""
        batch = jax.tree.map(lambda x: x[::-1], batch)

        def mean(params):
            found = loss_fn(params, batch)
            terms = found.values() if isinstance(found, dict) else [found]
            return sum(term.mean() for term in terms)

        return jax.grad(mean)(params)

    options = dict(model_state=None, key=None, per_example_keys=False, is_wide=True)
    problem = Problem(loss_fn, *values(kind), (), **options)
    judged = 0
    for seed in range(100 * kind, 100 * kind + 6):
        made = Study(problem.on(*values(seed)), 1e-5)
        if made.nothing_to_compare():
            continue
        judged += 1
        settings = Settings(None, "carry", False)
        for entries, causes in (
            study_cycles(made, settings, [(accum_steps, 1)]),
            study_trainer(made, backwards, [accum_steps], [1]),
        ):
            assert not causes and all(e.passed for e in entries), (seed, causes)
    assert judged >= 2
