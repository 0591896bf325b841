"""`accumulate` around optax's optimizers: each against itself on the mean gradient."""

import functools

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
import pytest
from jax import lax
from optax import chain, contrib

pytestmark = pytest.mark.anywhere

CALLS, CYCLES = 4, 3
QUICK = {  # the programs are tiny, and there are 150 of them
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
RATE = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 2, 10)
MASK = {"w": True, "b": False, "s": True}
LABELS = {"w": "train", "b": "freeze", "s": "train"}

OPTAX = (
    "adabelief adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb "
    "lion nadam nadamw novograd optimistic_gradient_descent radam "
    "rmsprop rprop sgd sign_sgd yogi"
)
CONTRIB = "ademamix momo momo_adam muon schedule_free_adamw schedule_free_sgd"

INNER = {name: getattr(optax, name)(1e-2) for name in OPTAX.split()}
INNER |= {name: getattr(contrib, name)(1e-2) for name in CONTRIB.split()}
INNER |= {
    # At their usual rates these hardly move in three updates; acprop's first is huge.
    "adadelta": optax.adadelta(10.0),
    "lars": optax.lars(1.0),
    "acprop": contrib.acprop(1e-4),
    "dadapt_adamw": contrib.dadapt_adamw(1.0, estim_lr0=1e-2),
    "dog": contrib.dog(1.0, init_step=("heuristic", 1e-2)),
    "dowg": contrib.dowg(1.0, init_estim_sq_dist=1e-2),
    "prodigy": contrib.prodigy(1.0, estim_lr0=1e-2),
    "mechanize": contrib.mechanize(optax.sgd(1.0), s_init=1e-2),
    "noisy_sgd": optax.noisy_sgd(1e-2, key=jax.random.key(0)),
    "sgd, schedule": optax.sgd(RATE),
    "sgd, nesterov": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam, schedule": optax.adam(RATE),
    "adam, bfloat16 moment": optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "adamw, masked decay": optax.adamw(RATE, mask=MASK),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "cocob": contrib.cocob(),
    "sam": contrib.sam(optax.sgd(1e-2), optax.sgd(1e-3)),
    "complex_valued": contrib.split_real_and_imaginary(optax.adam(1e-2)),
    "polyak_sgd": optax.polyak_sgd(1.0),
    "reduce_on_plateau": chain(optax.sgd(1e-2), contrib.reduce_on_plateau(patience=1)),
    "lbfgs": optax.lbfgs(),
    "lbfgs, no line search": optax.lbfgs(1e-2, linesearch=None),
    "backtracking": chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "identity": optax.identity(),
    "clip, adamw": chain(optax.clip_by_global_norm(0.1), optax.adamw(RATE)),
    "clip by value": chain(optax.clip(0.05), optax.sgd(1e-2)),
    "clip by block": chain(optax.clip_by_block_rms(0.1), optax.sgd(1e-2)),
    "adaptive_grad_clip": chain(optax.adaptive_grad_clip(0.1), optax.sgd(1e-2)),
    "centralize": chain(optax.centralize(), optax.sgd(1e-2)),
    "normalize": chain(optax.normalize_by_update_norm(), optax.sgd(1e-2)),
    "trust ratio": chain(optax.scale_by_trust_ratio(), optax.sgd(1e-2)),
    "add_noise": chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(1e-2)),
    "zero_nans": chain(optax.zero_nans(), optax.sgd(1e-2)),
    "nonnegative": chain(optax.sgd(1e-2), optax.keep_params_nonnegative()),
    "apply_every": chain(optax.apply_every(2), optax.sgd(1e-2)),
    "trace": chain(optax.trace(0.9), optax.scale(-1e-2)),
    "ema": chain(optax.adam(1e-2), optax.ema(0.9)),
    "decayed weights": chain(optax.add_decayed_weights(0.1), optax.sgd(RATE)),
    "snapshot": chain(optax.adam(1e-2), optax.snapshot("seen", lambda u: u)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
    "masked": optax.masked(optax.adam(1e-2), MASK),
    "multi_transform": optax.multi_transform(
        {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, LABELS
    ),
    "partition": optax.partition(
        {"train": optax.lion(1e-2), "freeze": optax.sgd(RATE)}, LABELS
    ),
    "freeze": chain(optax.adam(1e-2), optax.transforms.freeze(MASK)),
    "flatten": optax.flatten(optax.adam(1e-2)),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 5),
    "conditionally_transform": optax.conditionally_transform(
        optax.adam(1e-2), lambda step: step > 0
    ),
}

# Their own lax.cond or lax.clamp refuses a float32 gradient beside bfloat16 state.
CANNOT_MIX = ("apply_if_finite", "conditionally_transform", "mechanize", "novograd")

NEEDS = {
    "lbfgs": {"value", "grad", "value_fn"},
    "backtracking": {"value", "grad", "value_fn"},
    "momo": {"value"},
    "momo_adam": {"value"},
    "polyak_sgd": {"value"},
    "reduce_on_plateau": {"value"},
}


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 6), "b": (6,), "s": (1,)}
    return {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in shapes.items()}


@functools.cache
def make_gradients():
    """Summed gradients of every call, and their very unequal weights."""
    rng = np.random.default_rng(1)
    shape = (CYCLES, CALLS)
    weights = rng.integers(1, 9, size=shape).astype(np.int32)
    weights[1, 2] = 0
    sums = {
        name: (rng.normal(size=(*shape, *p.shape)) * _along(weights, p)).astype("f4")
        for name, p in make_params().items()
    }
    return sums, weights


def _along(weights, param):
    return weights.reshape(*weights.shape, *[1] * param.ndim)


def mean_gradients():
    """Of each cycle's full batch."""
    sums, weights = make_gradients()
    total = weights.sum(1)
    return {
        name: (leaf.astype("f8").sum(1) / _along(total, leaf[0, 0])).astype("f4")
        for name, leaf in sums.items()
    }


def loss(params):
    return sum(jnp.sum(p.astype(jnp.float32) ** 2) for p in params.values())


def extra_args(name, params, mean):
    possible = {"value": loss(params), "grad": mean, "value_fn": loss}
    return {key: possible[key] for key in NEEDS.get(name, ())}


def plain(name, inner, params):
    """The inner transformation, once per cycle, on the mean gradient."""
    inner = optax.with_extra_args_support(inner)
    state = inner.init(params)

    def update(carry, mean):
        params, old = carry
        args = extra_args(name, params, mean)
        updates, new = inner.update(mean, old, params, **args)
        new = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), new, old)
        return (optax.apply_updates(params, updates), new), None

    state = jax.tree.map(jnp.asarray, state)
    return lax.scan(update, (params, state), mean_gradients())[0]


def through_update(tx, params, state, grads, weight, **args):
    updates, state = tx.update(grads, state, params, weight=weight, **args)
    return optax.apply_updates(params, updates), state


def through_step(tx, params, state, grads, weight, **args):
    return tx.step(params, state, grads, weight=weight, **args)


def accumulated(name, inner, params, call):
    """The same run, one call per micro-batch; the scan demands fixed dtypes."""
    tx = jaxga.accumulate(inner, CALLS)

    def cycle(carry, cycle):
        sums, weights, mean = cycle

        def one(carry, microbatch):
            args = extra_args(name, carry[0], mean)
            return call(tx, *carry, *microbatch, **args), None

        return lax.scan(one, carry, (sums, weights))[0], None

    xs = (*make_gradients(), mean_gradients())
    (params, state), _ = lax.scan(cycle, (params, tx.init(params)), xs)
    return params, state


def difference(actual, expected):
    """The largest, over the largest entry of each leaf."""
    worst = 0.0
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        got, want = np.asarray(got, "f8"), np.asarray(want, "f8")
        worst = max(worst, np.abs(got - want).max() / np.abs(want).max())
    return worst


def run_all(name, inner, dtype):
    def run(params):
        return (
            plain(name, inner, params)[0],
            accumulated(name, inner, params, through_update),
            accumulated(name, inner, params, through_step),
        )

    return jax.jit(run, compiler_options=QUICK)(make_params(dtype))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if i % 4 else ())
        for i, name in enumerate(INNER)
    ],
)
def test_float32_parameters(name):
    expected, updated, stepped = run_all(name, INNER[name], jnp.float32)
    assert difference(expected, make_params()) > 1e-5, "the optimizer did nothing"
    for params, state in (updated, stepped):
        assert difference(params, expected) <= 2e-7
        assert (state.update, state.skipped, state.num_microbatches) == (CYCLES, 0, 0)


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in INNER if n not in CANNOT_MIX][::3])
@pytest.mark.filterwarnings("ignore:scatter inputs:FutureWarning")  # lbfgs's own
def test_bfloat16_parameters(name):
    expected, updated, stepped = run_all(name, INNER[name], jnp.bfloat16)
    for params, _ in (updated, stepped):
        assert {p.dtype for p in params.values()} == {jnp.dtype(jnp.bfloat16)}
        assert difference(params, expected) == 0


@pytest.mark.parametrize("name", CANNOT_MIX)
def test_where_dtypes_cannot_mix_the_error_gives_a_mend_that_works(name):
    params = make_params(jnp.bfloat16)
    for call in (through_update, through_step):
        with pytest.raises(TypeError) as caught:
            accumulated(name, INNER[name], params, call)
        (note,) = {n for n in caught.value.__notes__ if n.startswith("jaxga")}
        assert "optax.tree.cast_like(updates, params)" in note
    cast = optax.stateless(
        lambda updates, params: optax.tree.cast_like(updates, params)
    )
    expected, *both = run_all(name, chain(cast, INNER[name]), jnp.bfloat16)
    assert [difference(params, expected) for params, _ in both] == [0, 0]


def test_the_table_is_long_enough():
    assert len(INNER) >= 60


def test_the_comparison_sees_a_mean_of_means():
    """The control: `optax.MultiSteps`, of equal weight for every call."""
    sums, weights = make_gradients()
    tx = optax.MultiSteps(optax.sgd(1e-2), CALLS)
    params, state = make_params(), tx.init(make_params())
    expected = jax.jit(lambda p: plain("sgd", INNER["sgd"], p)[0])(params)
    for cycle in range(CYCLES):
        for call in range(CALLS):
            weight = max(weights[cycle, call], 1)
            grads = jax.tree.map(lambda x, i=(cycle, call): x[i] / weight, sums)  # noqa: B023
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    assert difference(params, expected) > 1e-3
