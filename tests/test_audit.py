"""The audit: passes on sound models, and cannot pass on nothing."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jaxga import audit
from jaxga._audit.cycles import Settings
from jaxga._audit.problem import Problem
from jaxga._audit.study import Study, study_cycles

pytestmark = pytest.mark.anywhere

ROWS, LENGTH, WIDTH, CLASSES = 8, 3, 4, 5


@functools.cache
def make_batch(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, LENGTH)) < 0.6
    mask[0], mask[-1] = True, False
    return {
        "x": rng.normal(size=(rows, LENGTH, WIDTH)).astype(np.float32),
        "y": rng.integers(0, CLASSES, size=(rows, LENGTH)).astype(np.int32),
        "mask": mask,
    }


def make_arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32) / 2,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def token_losses(logits, batch):
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def counted(logits, batch):
    return jaxga.WeightedSum.of(token_losses(logits, batch), where=batch["mask"])


# Sound models.


def mlp(seed=0):
    shapes = {"w": (WIDTH, 6), "b": (6,), "out": (6, CLASSES)}

    def loss_fn(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None, None])
        return counted(hidden @ params["out"], batch)

    return loss_fn, make_arrays(shapes, seed), {}


def several_terms():
    """Per token, per row, and one that is the same for every row."""
    plain, params, _ = mlp()

    def loss_fn(params, batch, scale):
        squares = (batch["x"] @ params["w"]) ** 2
        return {
            "cross_entropy": plain(params, batch),
            "rows": scale * jaxga.WeightedSum.of(squares.sum((1, 2))),
            "decay": 0.1 * jaxga.WeightedSum((params["w"] ** 2).sum(), 1),
        }

    return loss_fn, params, {"args": (np.float32(0.02),)}


def scanned():
    """Layers in a scan, under a checkpoint, with a layer norm."""
    shapes = {"layers": (3, WIDTH, WIDTH), "out": (WIDTH, CLASSES)}

    @jax.checkpoint
    def layer(h, w):
        return h + jax.nn.gelu(jax.nn.standardize(h, axis=-1) @ w), None

    def loss_fn(params, batch):
        h, _ = lax.scan(layer, batch["x"], params["layers"])
        return counted(h @ params["out"], batch)

    return loss_fn, make_arrays(shapes), {}


class Transformer(nn.Module):
    dtype: type | None = None
    has_batch_norm: bool = False

    @nn.compact
    def __call__(self, x, deterministic=False):
        h = nn.Dense(WIDTH, dtype=self.dtype)(x)
        h = h + nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(nn.LayerNorm()(h))
        if self.has_batch_norm:
            h = nn.BatchNorm(use_running_average=False)(h)
        h = nn.Dropout(0.4)(h, deterministic=deterministic)
        return nn.Dense(CLASSES, dtype=self.dtype)(h)


def linen_transformer():
    """Dropout, one key per row; a gradient of zero in it, the bias of the keys."""
    model = Transformer()
    params = model.init(jax.random.key(0), make_batch()["x"], True)["params"]

    def loss_fn(params, batch, key):
        def one(x, key):
            return model.apply({"params": params}, x[None], rngs={"dropout": key})[0]

        return counted(jax.vmap(one)(batch["x"], key), batch)

    return loss_fn, params, {"key": jax.random.key(1), "per_example_keys": True}


def nnx_model():
    """With counters and keys in its state, which no one compares."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(WIDTH, 6, rngs=rngs)
            self.norm = nnx.LayerNorm(6, rngs=rngs)
            self.dropout = nnx.Dropout(0.0, rngs=rngs)
            self.out = nnx.Linear(6, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, batch, model_state):
        net = nnx.merge(graph, params, model_state)
        loss = counted(net(batch["x"]), batch)
        state = nnx.state(net, nnx.Not(nnx.Param))
        return jaxga.LossOutput(loss, model_state=state)

    return loss_fn, params, {"model_state": rest}


def long(make):
    return pytest.param(make, marks=pytest.mark.long)


SOUND = [
    long(mlp),
    several_terms,
    long(scanned),
    long(linen_transformer),
    long(nnx_model),
]


@pytest.mark.parametrize("make", SOUND, ids=lambda make: make.__name__)
def test_passes_on_a_sound_model(make):
    loss_fn, params, options = make()
    args = options.pop("args", ())
    report = audit(
        loss_fn, params, make_batch(), *args, accum_steps=4, num_devices=1, **options
    )
    assert report.passed, report
    assert not report.causes and str(report).startswith("jaxga.audit: passed")
    exact, cycle = report.entries
    assert (exact.precision, cycle.precision) == ("float64", "float32")
    assert exact.error < 1e-12 and 1e-9 < cycle.error < 1e-5


@pytest.mark.long
def test_tries_several_splits_and_devices_by_default():
    loss_fn, params, _ = mlp()
    report = audit(loss_fn, params, make_batch(16))
    assert report.passed, report
    tried = [(one.accum_steps, one.num_devices) for one in report.entries[2:]]
    assert tried == [(1, 1), (2, 1), (4, 1), (2, 8)]
    assert not report.notes
    assert "248" not in str(report) and "60 parameters in 3 leaves" in str(report)


@pytest.mark.long
def test_one_device_is_said_where_rows_do_not_divide():
    loss_fn, params, _ = mlp()
    batch = jax.tree.map(lambda x: x[:11], make_batch(16))
    report = audit(loss_fn, params, batch, accum_steps=11)
    assert report.passed and "compared on one device" in report.notes[0], report


@pytest.mark.long
@pytest.mark.parametrize("where", ("compute", "params"))
def test_narrow_models_are_widened_and_judged_by_their_own_rounding(where):
    model = Transformer(dtype=jnp.bfloat16 if where == "compute" else None)
    params = model.init(jax.random.key(0), make_batch()["x"], True)["params"]
    if where == "params":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def loss_fn(params, batch):
        return counted(model.apply({"params": params}, batch["x"], True), batch)

    report = audit(loss_fn, params, make_batch(), accum_steps=4, num_devices=1)
    assert report.passed, report
    exact, cycle = report.entries
    assert exact.error < 1e-12 and cycle.error > 1e-4


@pytest.mark.long
def test_float64_can_be_done_without():
    loss_fn, params, _ = mlp()
    report = audit(
        loss_fn, params, make_batch(), accum_steps=2, num_devices=1, float64=False
    )
    assert report.passed and "not in float64" in str(report)
    assert {entry.precision for entry in report.entries} == {"float32"}


@pytest.mark.long
def test_what_knows_no_float64_is_said():
    plain, params, _ = mlp()

    def loss_fn(params, batch):
        bits = lax.bitcast_convert_type(batch["x"], jnp.int32)
        batch = batch | {"x": lax.bitcast_convert_type(bits, jnp.float32)}
        return plain(params, batch)

    report = audit(loss_fn, params, make_batch(), accum_steps=2, num_devices=1)
    assert report.passed and "bitcast_convert_type know no other" in str(report)


@pytest.mark.long
def test_callbacks_and_complex_numbers_are_widened_or_kept():
    plain, params, _ = mlp()

    def loss_fn(params, batch):
        x = batch["x"]
        ones = jax.pure_callback(np.ones_like, x, x, vmap_method="expand_dims")
        size = jaxga.WeightedSum.of(jnp.abs(jnp.fft.fft(x @ params["w"])).sum((1, 2)))
        return {"loss": plain(params, batch | {"x": x * ones}), "size": size}

    report = audit(loss_fn, params, make_batch(), accum_steps=2, num_devices=1)
    assert report.passed and "pure_callback know no other" in str(report), report


# Nothing passes on nothing.


def plain_loss(params, batch):
    return mlp()[0](params, batch)


def nothing_depends(params, batch):
    return jaxga.WeightedSum((params["w"] ** 2).sum(), 1)


def stopped(params, batch):
    return plain_loss(lax.stop_gradient(params), batch)


def not_a_number(params, batch):
    """Its gradient, 1 / x, is finite."""
    return jaxga.WeightedSum.of(jnp.log(batch["x"] @ params["w"]))


def no_gradient(params, batch):
    """Infinite at zero, though the loss is finite."""
    return jaxga.WeightedSum.of(jnp.sqrt(batch["x"] ** 2 * (params["w"][0, 0] * 0)))


def test_no_leaves():
    report = audit(plain_loss, {}, make_batch(), accum_steps=2)
    assert not report.passed and report.causes[0].kind == "refused"
    assert "params holds no arrays" in report.causes[0].text


@pytest.mark.parametrize(
    "loss_fn, kind",
    [
        (stopped, "nothing"),
        (nothing_depends, "unchanged"),
        (not_a_number, "nan"),
        (no_gradient, "nan"),
    ],
)
def test_a_gradient_that_proves_nothing(loss_fn, kind):
    report = audit(loss_fn, mlp()[1], make_batch(), accum_steps=2, num_devices=1)
    assert not report.passed and not report.entries
    assert [cause.kind for cause in report.causes] == [kind], report


@pytest.mark.long
def test_a_batch_that_proves_nothing():
    batch = make_batch()
    masked = batch | {"mask": np.zeros_like(batch["mask"])}
    for one, kind in ((masked, "nothing"), (None, "unchanged")):
        if one is None:
            one = jax.tree.map(lambda x: np.repeat(x[:1], ROWS, axis=0), batch)
            one = {name: one[name] for name in ("y", "mask")}
        report = audit(
            lambda p, b: counted(jnp.ones((len(b["y"]), LENGTH, 1)) * p, b),
            np.arange(CLASSES, dtype=np.float32)[None, None],
            one,
            accum_steps=2,
            num_devices=1,
        )
        assert [cause.kind for cause in report.causes] == [kind], report


@pytest.mark.long
def test_zero_leaves_are_said():
    plain, params, _ = mlp()
    params = params | {"unused": np.ones(3, np.float32)}
    report = audit(plain, params, make_batch(), accum_steps=2, num_devices=1)
    assert report.passed and "params['unused']" in report.notes[0]
    assert "1 of 4 leaves" in report.notes[0]


@pytest.mark.long
def test_a_report_without_entries_or_with_a_wrong_one_does_not_pass():
    loss_fn, params, _ = mlp()
    report = audit(loss_fn, params, make_batch(), accum_steps=2, num_devices=1)
    assert not dataclasses.replace(report, entries=()).passed
    leaf = report.entries[0].leaves[0]
    for difference in (np.nan, np.inf, 2 * leaf.allowed):
        wrong = dataclasses.replace(leaf, difference=difference)
        entry = dataclasses.replace(report.entries[0], leaves=(wrong,))
        assert not dataclasses.replace(report, entries=(entry,)).passed


# What it refuses.


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(accum_steps=3), ValueError, "8 rows.* 3 of accum_steps=.*Use 9 rows"),
        (dict(accum_steps=()), ValueError, "accum_steps=.* holds no number"),
        (dict(accum_steps=2.0), TypeError, "accum_steps=2.0 must be an integer"),
        (dict(accum_steps=0), ValueError, "accum_steps=0 must be an integer of at"),
        (dict(num_devices=3), ValueError, "8 rows.* 3 of num_devices"),
        (dict(num_devices=64), ValueError, "num_devices=64, but there are 8 devices"),
        (dict(num_devices=8), ValueError, "1 rows.*of accum_steps"),
        (dict(tolerance=0), ValueError, "tolerance=0 must be a number between"),
        (dict(float64="no"), TypeError, "float64='no' must be True or False"),
        (dict(grad_fn=1), TypeError, "grad_fn is 1 of type int, not a function"),
        (dict(per_example_keys=1), TypeError, "per_example_keys=1 must be True"),
        (dict(model_state_merge="sum"), ValueError, "'sum' is none of carry"),
        (dict(accum_dtype="int8"), TypeError, "accum_dtype=.*floating point"),
        (dict(grad_fn=lambda p, b: 1.0), TypeError, "grad_fn returned .*structure"),
        (
            dict(grad_fn=lambda p, b: p | {"b": np.ones(2)}),
            ValueError,
            r"grad_fn returned shape \(2,\) at \['b'\]; the parameter is of shape",
        ),
    ],
)
def test_bad_arguments_are_refused(options, error, words):
    loss_fn, params, _ = mlp()
    with pytest.raises(error, match=words):
        audit(loss_fn, params, make_batch(), **dict(accum_steps=2) | options)


def test_an_error_of_the_loss_function_is_its_own():
    def broken(params, batch):
        return batch["x"] @ params["out"]

    with pytest.raises(TypeError, match="dot_general"):
        audit(broken, mlp()[1], make_batch())


# No false alarms.


def random_values(seed, rows, width):
    rng = np.random.default_rng(seed)
    shapes = {"e": (7, width), "w": (width, width), "b": (width,), "v": (width,)}
    size = np.float32(10 ** rng.uniform(-2, 1))
    params = jax.tree.map(lambda x: x * size, make_arrays(shapes, seed))
    batch = {
        "id": rng.integers(0, 7, size=(rows, LENGTH)).astype(np.int32),
        "y": rng.normal(size=(rows, LENGTH)).astype(np.float32) * 10,
        "mask": rng.random((rows, LENGTH)) < rng.uniform(0.2, 1.0),
        "weight": rng.uniform(0.1, 2.0, size=(rows, 1)).astype(np.float32),
    }
    batch["mask"][0] = True
    return params, batch


def random_loss(kind):
    """Layers and a loss, and how the rows are cut: of ten kinds."""
    activation = [jnp.tanh, jax.nn.relu, jax.nn.gelu, jnp.sin, jax.nn.silu][kind % 5]

    def loss_fn(params, batch):
        h = params["e"][batch["id"]] @ params["w"] + params["b"][None, None]
        h = activation(jax.nn.standardize(h, axis=-1) if kind % 3 else h)
        losses, where = (h @ params["v"] - batch["y"]) ** 2, batch["mask"]
        loss = jaxga.WeightedSum.of(losses, where=where)
        if kind % 4 == 1:
            return jaxga.WeightedSum.of(losses, where=where, weights=batch["weight"])
        if kind % 4 == 2:
            count = where.sum()
            mean = jnp.where(where, losses, 0).sum() / jnp.maximum(count, 1)
            return jaxga.WeightedSum.from_mean(mean, count)
        if kind % 4 == 3:
            size = 0.1 * jaxga.WeightedSum.of((h**2).sum((1, 2)))
            return {"loss": loss, "size": size}
        return loss

    return loss_fn, 4 + 4 * (kind % 3), 2 + kind % 4, 2 + 2 * (kind % 2)


@pytest.mark.long
@pytest.mark.parametrize("kind", range(10))
def test_no_false_alarm_on_a_hundred_sound_problems(kind):
    """Ten losses, each on ten batches with parameters of ten sizes."""
    loss_fn, rows, width, accum_steps = random_loss(kind)
    problem = Problem(
        loss_fn,
        *random_values(kind, rows, width),
        (),
        model_state=None,
        key=None,
        per_example_keys=False,
        is_wide=True,
    )
    settings = Settings(None, "carry", False)
    for seed in range(100 * kind, 100 * kind + 10):
        study = Study(problem.on(*random_values(seed, rows, width)), 1e-5)
        assert not study.nothing_to_compare()
        entries, causes = study_cycles(study, settings, [(accum_steps, 1)])
        assert not causes and all(one.passed for one in entries), (seed, entries)
