"""Running averages of batch norm, as the full batch would have left them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import jaxga.linen
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from problems import distance, make_mesh, split_over_devices

pytestmark = pytest.mark.anywhere

# The means of micro-batches lie well apart, and so do those of devices.
SHIFT = 2.0 * (np.arange(48) % 3) + np.arange(48) / 8
X = np.random.default_rng(0).normal(size=(48, 5)) + SHIFT[:, None]
X = X.astype(np.float32)
RULE = {"model_state_merge": "batch_norm"}


def norm(**kwargs):
    return nn.BatchNorm(use_running_average=False, **({"momentum": 0.9} | kwargs))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(norm(momentum=0.99)(nn.Dense(8)(x))))[..., 0]


def linen_problem(module, rows=X):
    """A loss function, parameters and model state; running averages not at 0 and 1."""
    variables = jax.jit(module.init)(jax.random.key(0), rows)
    state = jax.tree.map(lambda leaf: leaf + 0.3, variables["batch_stats"])

    def loss_fn(params, rows, model_state):
        variables = {"params": params, "batch_stats": model_state}
        out, new = module.apply(variables, rows, mutable="batch_stats")
        loss = jaxga.WeightedSum.of(out**2)
        return jaxga.LossOutput(loss, model_state=new["batch_stats"])

    return loss_fn, variables["params"], state


def plain_problem():
    """By hand, in another form: `old + rate * (statistic - old)`."""

    def loss_fn(params, rows, model_state):
        hidden = rows @ params
        old, mean, var = model_state["norm"], hidden.mean(0), hidden.var(0)
        new = {
            "mean": old["mean"] + 0.01 * (mean - old["mean"]),
            "var": old["var"] + 0.02 * (var - old["var"]),
        }
        normed = (hidden - mean[None]) / jnp.sqrt(var + 1e-5)[None]
        loss = jaxga.WeightedSum.of(normed.sum(-1) ** 2)
        return jaxga.LossOutput(loss, model_state={"norm": new})

    params = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    state = {"norm": {"mean": np.full(8, 0.3, "f"), "var": np.full(8, 1.3, "f")}}
    return loss_fn, params, state


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(5, 8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, momentum=0.99, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.inner(x)).sum(-1)


def nnx_problem():
    graphdef, params, state = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, rows, model_state):
        model = nnx.merge(graphdef, params, model_state, copy=True)
        loss = jaxga.WeightedSum.of(model(rows) ** 2)
        state = nnx.split(model, nnx.Param, ...)[2]
        return jaxga.LossOutput(loss, model_state=state)

    return loss_fn, params, state


PROBLEMS = {
    "linen": lambda: linen_problem(Net()),
    "plain": plain_problem,
    "nnx": nnx_problem,
}


def state_after(problem, runner="alone", rows=X, accum_steps=3, **settings):
    loss_fn, params, state = problem
    axis = None if runner == "alone" else "data"
    cycle = jaxga.value_and_grad(
        loss_fn, accum_steps=accum_steps, axis_name=axis, **(RULE | settings)
    )

    def run(params, rows, state):
        return cycle(params, rows, model_state=state)[0].model_state

    if runner == "pmap":
        in_axes, devices = (None, 0, None), jax.devices()[:4]
        run = jax.pmap(run, "data", in_axes=in_axes, out_axes=None, devices=devices)
        return run(params, split_over_devices(rows, 4), state)
    if runner != "alone":
        run = jax.shard_map(
            run,
            mesh=make_mesh(4),
            in_specs=(P(), P("data"), P()),
            out_specs=P(),
            check_vma=runner == "checked",
        )
    return jax.jit(run)(params, rows, state)


@pytest.mark.parametrize("runner", ("alone", "pmap", "checked", "unchecked"))
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_full_batch(name, runner):
    loss_fn, params, state = problem = PROBLEMS[name]()
    expected = loss_fn(params, X, state).model_state
    assert distance(state_after(problem, runner), expected) <= 1e-6
    if runner == "alone":
        control = state_after(problem, model_state_merge="mean")
        assert distance(control, expected) > 1e-3


def hand_merged(module, params, state, name, parts):
    """What is left of inputs of one layer that came in parts, in float64."""
    old = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state[name])
    seen = []
    for part in parts:
        variables = {"params": params, "batch_stats": state}
        _, found = jax.jit(
            lambda *args: module.apply(*args, capture_intermediates=True, mutable=True)
        )(variables, part)
        dense = name.replace("BatchNorm", "Dense")
        seen.append(found["intermediates"][dense]["__call__"][0])
    seen = np.concatenate(seen).astype(np.float64)
    statistics = {"mean": seen.mean(0), "var": seen.var(0)}
    return {n: 0.9 * old[n] + (1 - 0.9) * s for n, s in statistics.items()}


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(norm()(nn.Dense(6)(x)))
        return x.sum(-1)


def test_deeper_layers_keep_what_they_saw():
    """Each micro-batch is normalised by itself; that is what later layers see."""
    _, params, state = problem = linen_problem(Deep())
    after = state_after(problem)
    parts = [X[i::3] for i in range(3)]
    for name in ("BatchNorm_0", "BatchNorm_1"):
        expected = hand_merged(Deep(), params, state, name, parts)
        assert distance(after[name], expected) <= 1e-6


@pytest.mark.parametrize("fast", (True, False))
def test_mean_far_from_zero(fast):
    """Nothing cancels: the squares are taken around the mean of means."""

    class Far(nn.Module):
        @nn.compact
        def __call__(self, x):
            return norm(use_fast_variance=fast)(x).sum(-1)

    rows = X + np.float32(100)
    problem = linen_problem(Far(), rows)
    wide = rows.astype(np.float64)
    expected = {"mean": 0.9 * 0.3 + 0.1 * wide.mean(0), "var": 1.17 + 0.1 * wide.var(0)}
    after = state_after(problem, rows=rows)["BatchNorm_0"]
    # Flax's fast variance itself is E[x^2] - E[x]^2, in float32.
    bound = 3e-3 if fast else 1e-6
    assert distance({"v": after["var"]}, {"v": expected["var"]}) <= bound
    assert distance({"m": after["mean"]}, {"m": expected["mean"]}) <= 1e-6


def masked(loss_fn):
    def with_mask(params, batch, model_state):
        rows, mask = batch
        state = loss_fn(params, rows, model_state).model_state
        loss = jaxga.WeightedSum.of((rows @ params).sum(-1), where=mask)
        return jaxga.LossOutput(loss, model_state=state)

    return with_mask


def test_microbatch_without_any_weight_has_no_say():
    loss_fn, params, state = plain_problem()
    mask = np.arange(48) % 3 != 1
    expected = loss_fn(params, X[mask], state).model_state
    rows = np.where(mask[:, None], X, np.nan)
    cycle = jaxga.value_and_grad(masked(loss_fn), accum_steps=3, **RULE)
    run = jax.jit(lambda *batch: cycle(params, batch, model_state=state)[0].model_state)
    assert distance(run(rows, mask), expected) <= 1e-6
    nothing = run(rows, np.zeros(48, bool))
    jax.tree.map(np.testing.assert_array_equal, nothing, state)


def test_a_device_without_rows_has_no_say():
    loss_fn, params, state = plain_problem()
    mask = np.arange(48) < 24
    expected = loss_fn(params, X[:24], state).model_state
    cycle = jaxga.value_and_grad(
        masked(loss_fn), accum_steps=2, axis_name="data", **RULE
    )
    mapped = jax.shard_map(
        lambda p, b, s: cycle(p, b, model_state=s)[0].model_state,
        mesh=make_mesh(4),
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
    )
    assert distance(jax.jit(mapped)(params, (X, mask), state), expected) <= 1e-6


def test_short_cycle_is_that_of_its_microbatches():
    loss_fn, params, state = problem = linen_problem(Net())
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=4, **RULE)
    run = jax.jit(
        lambda num: cycle(params, X, model_state=state, num_microbatches=num)[0]
    )
    for num in (1, 3):
        rows = X[np.arange(48) % 4 < num]
        expected = loss_fn(params, rows, state).model_state
        assert distance(run(num).model_state, expected) <= 1e-6
    jax.tree.map(np.testing.assert_array_equal, run(0).model_state, problem[2])


@pytest.mark.parametrize("momentum", (0.0, 0.5, 1.0))
def test_any_momentum(momentum):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return norm(momentum=momentum)(x).sum(-1)

    loss_fn, params, state = problem = linen_problem(Own())
    expected = loss_fn(params, X, state).model_state
    after = state_after(problem)
    assert distance(after, expected) <= 1e-6
    if momentum == 1.0:
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_momentum_may_be_an_argument():
    def loss_fn(params, rows, momentum, model_state):
        statistics = {"mean": rows.mean(0), "var": rows.var(0)}
        new = {
            n: momentum * model_state[n] + (1 - momentum) * s
            for n, s in statistics.items()
        }
        return jaxga.LossOutput(jaxga.WeightedSum.of(rows @ params), model_state=new)

    cycle = jax.jit(jaxga.value_and_grad(loss_fn, accum_steps=3, **RULE))
    state, params = {"mean": jnp.zeros(5), "var": jnp.ones(5)}, jnp.ones(5)
    for momentum in (0.5, 0.9):
        after = cycle(params, X, momentum, model_state=state)[0].model_state
        expected = loss_fn(params, X, momentum, state).model_state
        assert distance(after, expected) <= 1e-6


def test_layers_that_only_use_their_averages_come_back_as_they_are():
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x).sum(-1)

    _, _, state = problem = linen_problem(Frozen())
    jax.tree.map(np.testing.assert_array_equal, state_after(problem), state)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(norm()(nn.Dense(6)(x))), None


@pytest.mark.parametrize("remat", (False, True))
def test_scanned_and_rematerialised_layers(remat):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Layer) if remat else Layer,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=2,
            )
            return layers(name="layers")(nn.Dense(6)(x), None)[0].sum(-1)

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6)(x)
            for i in range(2):
                x, _ = Layer(name=f"layers_{i}")(x, None)
            return x.sum(-1)

    _, params, state = problem = linen_problem(Scanned())
    after = state_after(problem)["layers"]

    def unroll(tree):
        apart = {k: v for k, v in tree.items() if k != "layers"}
        for i in range(2):
            apart[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], tree["layers"])
        return apart

    loss_fn = linen_problem(Unrolled())[0]
    unrolled = state_after((loss_fn, unroll(params), unroll(state)))
    for i in range(2):
        layer = jax.tree.map(lambda x, i=i: x[i], after)
        assert distance(layer, unrolled[f"layers_{i}"]) <= 1e-6


def test_no_second_forward_pass():
    loss_fn, params, state = linen_problem(Deep())

    def flops(rule):
        cycle = jaxga.value_and_grad(loss_fn, accum_steps=3, model_state_merge=rule)
        run = jax.jit(lambda p, x, s: cycle(p, x, model_state=s))
        rows = np.tile(X, (20, 1))
        return run.lower(params, rows, state).compile().cost_analysis()["flops"]

    assert flops("batch_norm") < 1.01 * flops("mean")


class SyncNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, axis_name="data")(
            nn.Dense(8)(x)
        )
        return nn.Dense(1)(nn.relu(x))[..., 0]


def test_synchronised_norm_with_one_microbatch_is_the_full_batch():
    """Gradient and state: with `axis_name` in the layer, on 1 and 4 devices."""

    def loss_fn(params, rows, model_state):
        variables = {"params": params, **model_state}
        out, new = SyncNet().apply(variables, rows, mutable="batch_stats")
        loss = jaxga.WeightedSum.of((out - rows[:, 0]) ** 2)
        return jaxga.LossOutput(loss, model_state=new)

    variables = SyncNet().init(jax.random.key(0), X, train=False)
    state = {"batch_stats": variables["batch_stats"]}

    def run(num_devices):
        tx = optax.sgd(1.0)
        parallel = jaxga.DataParallel(make_mesh(num_devices))
        step = jaxga.make_train_step(
            loss_fn, tx, accum_steps=1, parallel=parallel, donate=False, **RULE
        )
        first = jaxga.TrainState.create(variables["params"], tx, model_state=state)
        last, _ = step(first, X)
        # Of SGD at rate 1 the change is the gradient.
        change = jax.tree.map(jnp.subtract, first.params, last.params)
        return {"grads": change["Dense_1"], "state": last.model_state}

    assert distance(run(4), run(1)) <= 1e-6


def test_in_a_train_step_of_linen():
    class State(TrainState):
        batch_stats: dict

    loss_fn, params, stats = linen_problem(Net())

    def with_field(params, rows, model_state):
        out = loss_fn(params, rows, model_state["batch_stats"])
        state = {"batch_stats": out.model_state}
        return jaxga.LossOutput(out.loss, model_state=state)

    state = State.create(
        apply_fn=None, params=params, tx=optax.sgd(0.1), batch_stats=stats
    )
    step = jaxga.linen.make_train_step(
        with_field,
        mutable=("batch_stats",),
        accum_steps=3,
        model_state_merge={"batch_stats": "batch_norm"},
        parallel=jaxga.DataParallel(make_mesh(4)),
        donate=False,
    )
    expected = loss_fn(params, X, stats).model_state
    assert distance(step(state, X)[0].batch_stats, expected) <= 1e-6


# What the rule cannot merge, and the words that say so.


def twice(old, rows):
    for part in (rows, rows**2):
        old = 0.9 * old + 0.1 * part.mean(0)
    return old


def in_a_loop(old, rows):
    def body(old, _):
        return 0.9 * old + 0.1 * rows.mean(0), None

    return jax.lax.scan(body, old, length=3)[0]


@jax.custom_vjp
def opaque(old):
    return 0.9 * old


opaque.defvjp(lambda old: (opaque(old), None), lambda _, g: (g,))

REFUSED = {
    "squared": (lambda old, rows: old**2 + rows.mean(0), "momentum depends on"),
    "data": (lambda old, rows: old * rows.mean(0), "momentum depends on the param"),
    "twice": (twice, "moved more than once"),
    "loop": (in_a_loop, "scan stands between the old and the new"),
    "channels": (lambda old, rows: 0.9 * old[::-1] + rows.mean(0), "rev stands"),
    "mixed": (lambda old, rows: jnp.full(5, old.mean()) + rows.mean(0), "stands"),
    "rounded": (lambda old, rows: jnp.round(old) + rows.mean(0), "no derivative"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_another_update(name):
    move, words = REFUSED[name]

    def loss_fn(params, rows, model_state):
        new = {"mean": move(model_state["mean"], rows), "var": 0.9 * model_state["var"]}
        return jaxga.LossOutput(jaxga.WeightedSum.of(rows @ params), model_state=new)

    cycle = jaxga.value_and_grad(loss_fn, accum_steps=3, **RULE)
    state = {"mean": jnp.ones(5), "var": jnp.ones(5)}
    with pytest.raises(ValueError, match=rf"model_state\['mean'\].*{words}"):
        jax.eval_shape(cycle, jnp.ones(5), X, model_state=state)


def test_refuses_averages_that_move_each_other():
    def loss_fn(params, rows, model_state):
        mean, var = model_state["mean"], model_state["var"]
        new = {"mean": 0.9 * mean + 0.1 * var, "var": 0.9 * var + rows.var(0)}
        return jaxga.LossOutput(jaxga.WeightedSum.of(rows @ params), model_state=new)

    state = {"mean": jnp.ones(5), "var": jnp.ones(5)}
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=3, **RULE)
    with pytest.raises(ValueError, match="moves with another running average"):
        cycle(jnp.ones(5), X, model_state=state)


@pytest.mark.parametrize(
    "names, words",
    (
        (("mean", "peak"), r"\['peak'\] has.*no 'mean' and no 'var'"),
        (("mean",), r"\['mean'\] has.*changes no 'var' beside it"),
        (("var",), r"\['var'\] has.*changes no 'mean' beside it"),
    ),
    ids=("peak", "mean", "var"),
)
def test_refuses_what_is_no_pair(names, words):
    def loss_fn(params, rows, model_state):
        new = {n: 0.9 * old + 0.1 * rows.mean(0) for n, old in model_state.items()}
        return jaxga.LossOutput(jaxga.WeightedSum.of(rows @ params), model_state=new)

    cycle = jaxga.value_and_grad(loss_fn, accum_steps=3, **RULE)
    state = {name: jnp.ones(5) for name in names}
    with pytest.raises(ValueError, match=f"model_state{words}"):
        cycle(jnp.ones(5), X, model_state=state)


def test_other_state_keeps_its_own_rule():
    loss_fn, params, state = plain_problem()

    def with_count(params, rows, model_state):
        out = loss_fn(params, rows, {"norm": model_state["norm"]})
        new = out.model_state | {
            "largest": jnp.maximum(model_state["largest"], rows.max())
        }
        return jaxga.LossOutput(out.loss, model_state=new)

    rule = {"norm": "batch_norm", "largest": "max"}
    both = state | {"largest": np.float32(0)}
    after = state_after((with_count, params, both), model_state_merge=rule)
    assert after.pop("largest") == X.max()
    assert distance(after, loss_fn(params, X, state).model_state) <= 1e-6
