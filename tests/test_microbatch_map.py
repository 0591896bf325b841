"""A loss of the whole batch, mapped over micro-batches, against the full batch."""

import functools
import warnings

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxga import microbatch_map
from problems import distance, make_mesh, split_over_devices, truth

ROWS, WIDTH, LAYERS, GROUP = 48, 8, 3, 4
BOUND = 2e-6


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"layers": (LAYERS, WIDTH, WIDTH), "out": (WIDTH, 6)}
    return {
        name: (rng.normal(size=shape) / 2).astype(np.float32)
        for name, shape in shapes.items()
    }


@functools.cache
def make_batch(rows=ROWS):
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, rows, WIDTH)).astype(np.float32)
    return {
        "first": first,
        "second": second + first,
        "id": np.arange(rows, dtype=np.int32),
        "odd": np.arange(rows) % 2 == 1,
        "keys": jax.random.split(jax.random.key(7), rows),
    }


def encode_one(params, x, keys):
    def layer(h, w):
        return h + jnp.tanh(h @ w.astype(h.dtype)), None

    def drop(key):
        # The draws in float32 even where the truth is computed in float64.
        return jax.random.uniform(key, (WIDTH,), jnp.float32) < 0.8

    h = jnp.where(jax.vmap(drop)(keys), x.astype(params["out"].dtype), 0)
    h, _ = lax.scan(jax.checkpoint(layer), h, params["layers"])
    return h @ params["out"]


def encode(params, batch):
    """Both views, with dropout, and things that have no gradient."""
    both = jnp.concatenate([batch["first"], batch["second"]])
    keys = jnp.concatenate([batch["keys"]] * 2)
    return {
        "views": tuple(jnp.split(encode_one(params, both, keys), 2)),
        "id": batch["id"],
        "odd": batch["odd"],
    }


# Sums over this device's rows of losses in which rows of all devices appear.


def info_nce(outputs, gather, first_row):
    """Each row against the others of the whole batch."""
    a, b = outputs["views"]
    logits = a @ gather(b).T
    targets = first_row + jnp.arange(len(a))
    picked = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
    return jnp.sum(jax.nn.logsumexp(logits, -1) - picked)


def vicreg(outputs, gather, first_row):
    """Distance of the views, and what the covariance of the whole batch should be."""
    a, b = outputs["views"]
    both = gather(jnp.stack([a, b], axis=1))
    centred = both - both.mean(0, keepdims=True)
    covariance = jnp.einsum("nvi,nvj->vij", centred, centred) / len(both)
    whole = jnp.sum((covariance - jnp.eye(both.shape[-1])[None]) ** 2)
    # It is of the whole batch: counted on one device.
    whole = jnp.where(first_row == 0, len(both) * whole, 0)
    return jnp.sum((a - b) ** 2) + 0.1 * whole


def grpo(outputs, gather, first_row):
    """Rewards normalised within groups of consecutive rows."""
    a, b = outputs["views"]
    groups = gather(jnp.tanh(b[:, 0])).reshape(-1, GROUP)
    mean, spread = groups.mean(1, keepdims=True), groups.std(1, keepdims=True)
    advantages = ((groups - mean) / (spread + 0.1)).reshape(-1)
    own = lax.dynamic_slice_in_dim(advantages, first_row, len(a))
    return -jnp.sum(jnp.exp(0.1 * a[:, 0]) * own)


LOSSES = {"info_nce": info_nce, "vicreg": vicreg, "grpo": grpo}


def mean_loss(loss, encode=encode):
    """Of the whole batch, on one device."""

    def function(params, batch):
        outputs = encode(params, batch)
        return loss(outputs, lambda z: z, 0) / len(outputs["id"])

    return function


def local_loss(loss, accum_steps):
    mapped = microbatch_map(encode, accum_steps=accum_steps)

    def function(params, batch):
        outputs = mapped(params, batch)
        first_row = lax.axis_index("data") * len(batch["id"])
        gather = functools.partial(lax.all_gather, axis_name="data", tiled=True)
        return loss(outputs, gather, first_row)

    return function


@functools.cache
def expected(name):
    return truth(mean_loss(LOSSES[name]), make_params(), make_batch())


@pytest.mark.parametrize(
    ("name", "accum_steps"),
    [
        ("info_nce", 4),
        pytest.param("info_nce", 1, marks=pytest.mark.long),
        pytest.param("info_nce", 48, marks=pytest.mark.long),
        pytest.param("vicreg", 4, marks=pytest.mark.long),
        pytest.param("grpo", 4, marks=pytest.mark.long),
    ],
)
def test_gradient_is_that_of_the_full_batch(name, accum_steps):
    mapped = microbatch_map(encode, accum_steps=accum_steps)
    loss = jax.jit(jax.value_and_grad(mean_loss(LOSSES[name], mapped)))
    value, grads = loss(make_params(), make_batch())
    assert distance(value, expected(name)[0]) < BOUND
    assert distance(grads, expected(name)[1]) < BOUND


def test_outputs_come_in_the_order_of_the_batch():
    mapped = microbatch_map(encode, microbatch_size=8)
    outputs = jax.jit(mapped)(make_params(), make_batch())
    whole = jax.jit(encode)(make_params(), make_batch())
    assert distance(outputs["views"], whole["views"]) < BOUND
    for name in ("id", "odd"):
        assert outputs[name].dtype == whole[name].dtype
        np.testing.assert_array_equal(outputs[name], make_batch()[name])


# ---- Over devices ----------------------------------------------------------------


def by_pmap(loss, num_devices):
    def gradient(params, batch):
        grads = jax.grad(local_loss(loss, 3))(params, batch)
        return jax.tree.map(lambda g: g / ROWS, lax.psum(grads, "data"))

    run = jax.pmap(
        gradient,
        axis_name="data",
        in_axes=(None, 0),
        devices=jax.devices()[:num_devices],
    )
    grads = run(make_params(), split_over_devices(make_batch(), num_devices))
    return jax.tree.map(lambda g: g[0], grads)


def by_shard_map(check_vma, loss, num_devices):
    def gradient(params, batch):
        if not check_vma:
            grads = jax.grad(local_loss(loss, 3))(params, batch)
            return jax.tree.map(lambda g: g / ROWS, lax.psum(grads, "data"))
        # Replicated parameters: JAX sums their gradient over the devices itself.
        return jax.grad(
            lambda p: lax.psum(local_loss(loss, 3)(p, batch), "data") / ROWS
        )(params)

    run = jax.shard_map(
        gradient,
        mesh=make_mesh(num_devices),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    return jax.jit(run)(make_params(), make_batch())


def by_data_parallel(zero, loss, num_devices):
    parallel = jaxga.DataParallel(make_mesh(num_devices), zero=zero)
    params, tx = jax.tree.map(jnp.asarray, make_params()), optax.sgd(1.0)
    state = parallel.shard_state(jaxga.TrainState.create(params, tx))
    of_rows = local_loss(loss, 3)

    def loss_fn(params, batch, key):
        # Keys of the cycle's own would be other keys than the truth's.
        assert key.shape == batch["id"].shape
        return jaxga.WeightedSum(of_rows(params, batch), len(batch["id"]))

    step = jaxga.make_train_step(
        loss_fn, tx, accum_steps=1, parallel=parallel, per_example_keys=True
    )
    batch = parallel.shard_batch(make_batch())
    after, _ = step(state, batch, key=jax.random.key(0))
    after = jax.device_get(after.params)
    return jax.tree.map(lambda old, new: old - new, make_params(), after)


RUNNERS = {
    "pmap": by_pmap,
    "shard_map": functools.partial(by_shard_map, True),
    "shard_map unchecked": functools.partial(by_shard_map, False),
    **{f"zero={n}": functools.partial(by_data_parallel, n) for n in range(4)},
}
QUICK = {
    ("pmap", "grpo"),
    ("shard_map", "vicreg"),
    ("zero=0", "info_nce"),
}
GRID = [
    pytest.param(
        runner,
        name,
        num_devices,
        marks=() if (runner, name) in QUICK and num_devices == 4 else pytest.mark.long,
    )
    for runner in RUNNERS
    for name in LOSSES
    for num_devices in (1, 4)
    if runner not in ("zero=1", "zero=2", "zero=3")
    or (name, num_devices) == ("info_nce", 4)
]


@pytest.mark.parametrize(("runner", "name", "num_devices"), GRID)
def test_over_devices(runner, name, num_devices):
    grads = RUNNERS[runner](LOSSES[name], num_devices)
    assert distance(grads, expected(name)[1]) < BOUND


@pytest.mark.long
def test_the_gradient_is_summed_over_devices_once_after_the_loop():
    def gradient(params, batch):
        loss = local_loss(info_nce, 3)
        return jax.grad(lambda p: lax.psum(loss(p, batch), "data"))(params)

    run = jax.shard_map(
        gradient, mesh=make_mesh(4), in_specs=(P(), P("data")), out_specs=P()
    )
    found = jaxga.collectives(jax.jit(run).lower(make_params(), make_batch()).compile())
    assert not [c for c in found if c.in_loop]
    reduced = [c for c in found if c.kind == "all-reduce"]
    size = sum(leaf.nbytes for leaf in make_params().values())
    assert sum(c.bytes for c in reduced) == size


@pytest.mark.parametrize(
    "axis_type",
    (AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.long)),
)
def test_rows_that_are_sharded_under_jit(axis_type):
    mesh = make_mesh(4, axis_type)

    def plain(params, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
        return h @ params["out"]

    def loss(params, x, encode, replicate):
        z = encode(params, x)
        return jnp.mean(jax.nn.logsumexp(z @ replicate(z).T, -1) ** 2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(2, 3))

    def replicate(z):
        return jax.sharding.reshard(z, P()) if axis_type == AxisType.Explicit else z

    params, x = make_params(), make_batch()["first"]
    want = grad(params, x, plain, lambda z: z)
    with jax.set_mesh(mesh):
        params, x = jax.device_put(
            (params, x), (NamedSharding(mesh, P()), NamedSharding(mesh, P("data")))
        )
        mapped = microbatch_map(plain, accum_steps=3)
        found = grad(params, x, mapped, replicate)
        if axis_type == AxisType.Explicit:
            assert jax.typeof(found[1]).sharding.spec[0] == "data"
            assert jax.typeof(mapped(params, x)).sharding.spec[0] == "data"
    assert distance(jax.device_get(found), want) < BOUND


@pytest.mark.long
def test_tensor_parallel_outputs_that_are_the_same_stay_so():
    """Over an axis that divides the model only, nothing is made to vary."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    params = {"in": make_params()["layers"][0], "bias": np.ones(WIDTH, np.float32)}

    def plain(params, x, scale):
        return scale * jnp.tanh(x @ params["in"]) ** 2 + params["bias"][None]

    def divided(params, x, scale):
        # The sum over "model" of pieces of the width; the bias is added once, after.
        h = jnp.tanh(x @ params["in"])
        square = jnp.zeros((len(x), WIDTH)).at[:, : WIDTH // 2].set(h**2)
        place = lax.axis_index("model") * (WIDTH // 2)
        square = jnp.roll(square, place, axis=1)
        return scale * lax.psum(square, "model") + params["bias"][None]

    def local(params, scale, x):
        z = microbatch_map(divided, accum_steps=3)(params, x, scale)
        everyone = lax.all_gather(z, "data", tiled=True)
        return lax.psum(jnp.sum(jax.nn.logsumexp(z @ everyone.T, -1)), "data")

    def whole(params, scale, x):
        z = plain(params, x, scale)
        return jnp.sum(jax.nn.logsumexp(z @ z.T, -1))

    specs = {"in": P(None, "model"), "bias": P()}
    run = jax.shard_map(
        jax.grad(local, argnums=(0, 1)),
        mesh=mesh,
        in_specs=(specs, P(), P("data")),
        out_specs=(specs, P()),
    )
    x, scale = make_batch()["first"], jnp.float32(0.7)
    grads = jax.device_get(jax.jit(run)(params, scale, x))
    want = jax.jit(jax.grad(whole, argnums=(0, 1)))(params, scale, x)
    assert distance(grads, want) < BOUND


# ---- Keys ------------------------------------------------------------------------


def drop_and_sum(params, x, key):
    kept = jax.random.bernoulli(key, 0.5, x.shape)
    return jnp.where(kept, x, 0) @ params


def drop_by_hand(params, x, key):
    """What four micro-batches come to, each with the key folded with its index."""
    parts = [
        drop_and_sum(params, x[i::4], jax.random.fold_in(key, i)) for i in range(4)
    ]
    return jnp.stack(parts, axis=1).reshape(len(x), -1)


@pytest.mark.parametrize(
    "make_key",
    (jax.random.key, pytest.param(jax.random.PRNGKey, marks=pytest.mark.long)),
    ids=("typed", "raw"),
)
def test_one_key_is_folded_with_the_microbatch_in_both_passes(make_key):
    x, params, key = make_batch()["first"], jnp.ones((WIDTH, 2)), make_key(3)
    mapped = microbatch_map(drop_and_sum, accum_steps=4)

    def loss(encode):
        def function(params, x):
            z = encode(params, x, key=key)
            return jnp.sum(jax.nn.logsumexp(z @ z.T, -1))

        return jax.jit(jax.grad(function, argnums=(0, 1)))

    assert distance(loss(mapped)(params, x), loss(drop_by_hand)(params, x)) < BOUND


def test_one_key_of_a_cycle():
    """A cycle traces the loss first: nothing of that trace may be kept."""
    x, params = make_batch()["first"], jnp.ones((WIDTH, 2))

    def gradient(encode):
        def loss_fn(params, x, key):
            z = encode(params, x, key=key)
            return jaxga.WeightedSum.of(jax.nn.logsumexp(z @ z.T, -1))

        cycle = jax.jit(jaxga.value_and_grad(loss_fn, accum_steps=2))
        return cycle(params, x, key=jax.random.key(3))[1]

    mapped = microbatch_map(drop_and_sum, accum_steps=4)
    assert distance(gradient(mapped), gradient(drop_by_hand)) < BOUND


def keyed_rows(params, x, key):
    return jax.vmap(lambda x, k: drop_and_sum(params, x, k))(x, key)


@pytest.mark.parametrize(
    "make_key",
    (jax.random.key, pytest.param(jax.random.PRNGKey, marks=pytest.mark.long)),
    ids=("typed", "raw"),
)
def test_a_key_per_row_makes_it_independent_of_the_cut(make_key):
    x, params = make_batch()["first"], jnp.ones((WIDTH, 2))
    keys = jax.random.split(make_key(3), ROWS)
    want = keyed_rows(params, x, keys)
    for accum_steps in (1, 6):
        got = microbatch_map(keyed_rows, accum_steps=accum_steps)(params, x, key=keys)
        assert distance(got, want) < BOUND


@pytest.mark.long
@pytest.mark.parametrize(("num_devices", "accum_steps"), [(4, 3), (1, 6)])
def test_the_keys_of_a_cycle_give_the_same_dropout_anywhere(num_devices, accum_steps):
    parallel = jaxga.DataParallel(make_mesh(num_devices))
    tx, params = optax.sgd(1.0), jnp.ones((WIDTH, 2))
    mapped = microbatch_map(keyed_rows, accum_steps=accum_steps)

    def loss_fn(encode, params, x, key):
        z = encode(params, x, key=key)
        everyone = lax.all_gather(z, "data", tiled=True)
        return jaxga.WeightedSum.of(jax.nn.logsumexp(z @ everyone.T, -1))

    def update(encode, parallel):
        step = jaxga.make_train_step(
            functools.partial(loss_fn, encode),
            tx,
            accum_steps=1,
            parallel=parallel,
            per_example_keys=True,
        )
        state = parallel.shard_state(jaxga.TrainState.create(jnp.copy(params), tx))
        x = parallel.shard_batch(make_batch()["first"])
        return step(state, x, key=jax.random.key(2))[0].params - 1

    want = update(keyed_rows, jaxga.DataParallel(make_mesh(1)))
    assert distance(update(mapped, parallel), want) < BOUND


# ---- What is differentiated ------------------------------------------------------


def test_gradient_with_respect_to_batch_arguments_and_what_fn_closes_over():
    x, params = make_batch()["first"], make_params()

    def loss(accum_steps):
        def function(inputs):
            def fn(params, batch, more, name):
                assert name == "static" and isinstance(more["numbers"], jax.Array)
                h = batch["x"] * inputs["closed"] + more["given"]
                picked = more["numbers"][batch["i"]].astype(h.dtype)
                return encode_one(params, h, batch["keys"]) + picked[:, None]

            more = {"given": inputs["given"], "numbers": np.arange(ROWS)}
            batch = {
                "x": inputs["x"],
                "i": make_batch()["id"],
                "keys": make_batch()["keys"],
            }
            call = microbatch_map(fn, accum_steps=accum_steps) if accum_steps else fn
            more = more if accum_steps else more | {"numbers": jnp.arange(ROWS)}
            z = call(inputs["params"], batch, more, "static")
            return jnp.mean(jax.nn.logsumexp(z @ z.T / 50, -1))

        return function

    inputs = {
        "params": params,
        "x": x,
        "given": np.ones((1, WIDTH), np.float32),
        "closed": np.full((1, WIDTH), 0.5, np.float32),
    }
    want = jax.jit(jax.grad(loss(None)))(inputs)
    assert distance(jax.jit(jax.grad(loss(6)))(inputs), want) < BOUND


def test_only_what_is_differentiated_has_an_accumulator():
    """Not a teacher that is passed. (Scanned, it would be summed in place.)"""
    shapes = (6, 2), (8, 6), (3, 6, 6)
    params, x, teacher = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def fn(params, x, teacher):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, teacher)
        return h @ params, x @ params

    def loss(params, x, teacher):
        h, z = microbatch_map(fn, accum_steps=4)(params, x, teacher)
        return jnp.sum(z @ h.T)

    program, control = (
        str(jax.make_jaxpr(jax.grad(loss, argnums))(params, x, teacher))
        for argnums in ((0,), (0, 2))
    )
    assert "Ref{f32[3,6,6]}" in control
    assert "Ref{" not in program


@pytest.mark.long
def test_an_output_that_the_loss_does_not_use_costs_no_gradient():
    mapped = microbatch_map(encode, accum_steps=4)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, encode):
        return jax.grad(lambda p: jnp.sum(encode(p, make_batch())["views"][0] ** 2))(
            params
        )

    want = gradient(make_params(), encode)
    assert distance(gradient(make_params(), mapped), want) < BOUND


@pytest.mark.long
def test_each_microbatch_is_computed_twice():
    calls = []

    def fn(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return x @ params

    mapped = microbatch_map(fn, accum_steps=4)
    x, params = make_batch()["first"], make_params()["out"]
    jax.block_until_ready(jax.jit(mapped)(params, x))
    jax.effects_barrier()
    assert len(calls) == 4
    calls.clear()
    grad = jax.jit(jax.grad(lambda p: jnp.sum(mapped(p, x) ** 2)))
    jax.block_until_ready(grad(params))
    jax.effects_barrier()
    assert len(calls) == 8


@pytest.mark.parametrize("scanned", (False, pytest.param(True, marks=pytest.mark.long)))
def test_narrow_parameters_are_summed_in_float32_and_rounded_once(scanned):
    """512 gradients of 1: a sum in bfloat16 stands still at 256."""
    params = jnp.full((2, 1), 3, jnp.bfloat16)

    def fn(params, x):
        if scanned:
            return lax.scan(lambda h, w: (h + w * x, None), x, params)[0]
        return x * params[0] + x * params[1]

    def grad(**settings):
        mapped = microbatch_map(fn, microbatch_size=1, **settings)
        loss = jax.grad(lambda p: mapped(p, jnp.ones(512, jnp.bfloat16)).sum())
        return jax.jit(loss)(params)

    found = grad()
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), [[512], [512]])
    with pytest.warns(UserWarning, match="accum_dtype=bfloat16 over 512"):
        found = grad(accum_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found.astype(np.float32), [[256], [256]])


@pytest.mark.long
def test_under_vmap_and_differentiated_twice():
    batch = make_batch(12)
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), make_params())

    @functools.partial(jax.jit, static_argnums=1)
    def derivatives(ensemble, encode):
        gradient = jax.grad(lambda p: mean_loss(info_nce, encode)(p, batch))
        params = make_params()
        product = jax.jvp(gradient, (params,), (params,))[1]
        return jax.vmap(gradient)(ensemble), product

    mapped = microbatch_map(encode, accum_steps=3)
    want = derivatives(ensemble, encode)
    assert distance(derivatives(ensemble, mapped), want) < BOUND
    with pytest.raises(TypeError, match="forward-mode .* custom_vjp"):
        jax.jvp(lambda p: mapped(p, batch)["views"], *[(make_params(),)] * 2)


# ---- Flax ------------------------------------------------------------------------


@pytest.mark.long
def test_linen_with_dropout():
    import flax.linen as nn
    import jaxga.linen

    model = nn.Sequential([nn.Dense(8), nn.Dropout(0.5, deterministic=False)])
    x = make_batch()["first"]
    keys = jax.random.split(jax.random.key(2), ROWS)
    apply = jaxga.linen.per_example(model.apply)

    def encode(params, x, key):
        return apply({"params": params}, x, rngs={"dropout": key})

    params = nn.Dense(8).init(jax.random.key(0), x)["params"]
    assert_same_gradient(encode, {"layers_0": params}, x, key=keys)


def test_nnx_as_a_function_of_its_split_state():
    import jaxga.nnx
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(WIDTH, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(jnp.tanh(self.inner(x)))

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    forward = jaxga.nnx.per_example(lambda model, x: model(x))

    def encode(params, x, rest, key):
        return forward(nnx.merge(graphdef, params, rest), x, key)

    x = make_batch()["first"]
    keys = jax.random.split(jax.random.key(2), ROWS)
    assert_same_gradient(encode, params, x, rest, key=keys)
    with pytest.raises(TypeError, match="params is an nnx.Module"):
        microbatch_map(encode, accum_steps=2)(Net(nnx.Rngs(0)), x)


def assert_same_gradient(encode, params, x, *args, key):
    def gradient(encode):
        def loss(params):
            z = encode(params, x, *args, key=key)
            return jnp.mean(jax.nn.logsumexp(z @ z.T, -1))

        return jax.jit(jax.grad(loss))(params)

    found = gradient(microbatch_map(encode, accum_steps=6))
    assert distance(found, gradient(encode)) < BOUND


# ---- Memory ----------------------------------------------------------------------


def scanned_memory(encode, rows):
    """Temporaries and gradient of a step, in gradients."""
    layers, width, features = 8, 64, 256
    params = {
        "in": jax.ShapeDtypeStruct((layers, width, features), jnp.float32),
        "out": jax.ShapeDtypeStruct((layers, features, width), jnp.float32),
    }

    def loss(params, x):
        z = encode(params, x)
        similarities = z @ z.T
        return jnp.sum(jax.nn.logsumexp(similarities, -1) - jnp.sum(z * z, -1))

    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis()
    size = 2 * 4 * layers * width * features
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / size


def scanned_encoder(params, x):
    def layer(h, w):
        return h + jnp.tanh(h @ w["in"]) @ w["out"], None

    return lax.scan(jax.checkpoint(layer), x, params)[0][:, :4]


def test_scanned_layers_take_one_gradient_and_it_is_flat():
    one_microbatch = scanned_memory(scanned_encoder, 4)
    few, many = (
        scanned_memory(microbatch_map(scanned_encoder, microbatch_size=4), rows)
        for rows in (16, 64)
    )
    assert few < one_microbatch + 0.15
    # The outputs of all rows, and their similarities, are what grows.
    outputs = 4 * (4 * 64 * 4 + 3 * 64 * 64)
    assert many - few < outputs / (2 * 4 * 8 * 64 * 256)
    # What is compared with is not small by itself.
    assert scanned_memory(scanned_encoder, 512) > many + 0.5


# ---- Refusals --------------------------------------------------------------------


def rows_of(params, x):
    return x * params


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({}, ValueError, "exactly one of accum_steps .*accum_steps=None"),
        (
            {"accum_steps": 2, "microbatch_size": 3},
            ValueError,
            "exactly one of .*accum_steps=2, microbatch_size=3",
        ),
        ({"accum_steps": 0}, ValueError, "accum_steps=0 must be .* at least 1"),
        ({"microbatch_size": 2.5}, TypeError, "microbatch_size=2.5 must be an integer"),
        (
            {"accum_steps": 2, "accum_dtype": "int32"},
            TypeError,
            "accum_dtype.*floating point",
        ),
    ],
)
def test_refuses_settings(settings, error, words):
    with pytest.raises(error, match=words):
        microbatch_map(rows_of, **settings)


def test_refuses_what_is_no_function():
    with pytest.raises(TypeError, match="fn is 3 of type int, not a function"):
        microbatch_map(3, accum_steps=2)


@pytest.mark.parametrize(
    ("fn", "error", "words"),
    [
        (
            lambda p, x: {"z": x, "loss": jnp.sum(x)},
            ValueError,
            r"fn's output\['loss'\] has shape \(\); .* leading axis .* 3 rows",
        ),
        (
            lambda p, x: x.T,
            ValueError,
            r"fn's output has shape \(2, 3\); .* micro-batch's 3 rows",
        ),
        (
            lambda p, x: (x, 1.0),
            TypeError,
            r"fn's output\[1\] is 1.0 of type float, not an array",
        ),
        (lambda p, x: None, TypeError, "fn returned None, which holds no arrays"),
        (
            lambda p, x: jaxga.WeightedSum.of(x),
            ValueError,
            r"fn's output.total has shape \(\)",
        ),
    ],
    ids=("scalar", "other", "number", "nothing", "sum"),
)
def test_refuses_outputs_that_are_no_rows(fn, error, words):
    with pytest.raises(error, match=words):
        microbatch_map(fn, accum_steps=2)(jnp.ones(()), jnp.ones((6, 2)))


@pytest.mark.parametrize(
    ("params", "batch", "key", "error", "words"),
    [
        (1.0, {"a": np.ones(6), "b": np.ones(4)}, None, ValueError, r"\['b'\].*\(4,\)"),
        (1.0, np.ones(7), None, ValueError, r"7 rows .* accum_steps=2. Use 6 or 8"),
        (1.0, {"a": 3}, None, TypeError, r"batch\['a'\] is 3 of type int"),
        ({"n": np.arange(2)}, np.ones(6), None, TypeError, r"params\['n'\] .* int"),
        (1.0, np.ones(6), 7, TypeError, "key is 7 of type int; it must be one key"),
        (
            1.0,
            np.ones(6),
            lambda: jax.random.split(jax.random.key(0), 5),
            ValueError,
            r"shape \(5,\).*batch has 6 rows: give one key, or one for each row",
        ),
        (
            1.0,
            np.ones(6),
            lambda: jax.random.split(jax.random.key(0, impl="rbg"), 6),
            ValueError,
            "does not work with keys of 'rbg'",
        ),
    ],
    ids=("leaves", "divide", "leaf", "integers", "key", "keys", "rbg"),
)
def test_refuses_inputs(params, batch, key, error, words):
    key = key() if callable(key) else key
    mapped = microbatch_map(lambda p, x, key=None: x, accum_steps=2)
    with pytest.raises(error, match=words):
        mapped(params, batch, key=key)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        microbatch_map(rows_of, accum_steps=6)(jnp.ones(()), jnp.ones(6))
