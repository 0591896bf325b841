"""Weight gradients that leave their matrix product in float32."""

import functools
import json
import re

import flax.linen as nn
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
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxga._jaxprs import inner_jaxprs
from jaxga._wgrad import float32_wgrad_dot_general
from problems import distance, make_mesh

HALF, FULL = jnp.bfloat16, jnp.float32
LONG = pytest.mark.long
INPUTS = np.random.default_rng(0).normal(size=(6, 5, 16)).astype(np.float32)


def is_rounded(x, dtype=HALF):
    return (np.asarray(x) == np.asarray(x.astype(dtype).astype(x.dtype))).all()


# One layer. Its weights' gradient is known in float64: that of a product.

LINEN = {
    "Dense": (nn.Dense, (7,), {}, "blf,blo->fo"),
    "no bias": (nn.Dense, (7,), {"use_bias": False}, "blf,blo->fo"),
    "DenseGeneral": (nn.DenseGeneral, ((4, 3),), {}, "blf,blop->fop"),
    "two axes": (nn.DenseGeneral, (8,), {"axis": (-1, 1)}, "blf,bo->lfo"),
    "batch": (
        nn.DenseGeneral,
        (8,),
        {"axis": -1, "batch_dims": (0,), "use_bias": False},
        "blf,blo->bfo",
    ),
}
NNX = {
    "Linear": (nnx.Linear, (16, 7), {}, "blf,blo->fo"),
    "LinearGeneral": (nnx.LinearGeneral, (16, (4, 3)), {}, "blf,blop->fop"),
    "Einsum": (nnx.Einsum, ("bld,edf->blef", (3, 16, 7), (3, 7)), {}, "bld,blef->edf"),
    "kernel first": (nnx.Einsum, ("bld,df->fbl", (16, 7)), {}, "bld,fbl->df"),
}


def check_layer(run, rounded_run, params, dtype, einsum):
    """Outputs and gradients of the layer against those of Flax's own."""
    x = jnp.asarray(INPUTS, dtype)
    outputs, pull = jax.vjp(run, params, x)
    expected, pull_rounded = jax.vjp(rounded_run, params, x)
    np.testing.assert_array_equal(outputs, expected)
    cotangent = jnp.cos(outputs)
    (grads, of_x), (rounded, of_x_rounded) = pull(cotangent), pull_rounded(cotangent)
    np.testing.assert_array_equal(of_x, of_x_rounded)
    if "bias" in grads:
        np.testing.assert_array_equal(grads["bias"], rounded["bias"])
    in_float64 = (np.asarray(a, np.float64) for a in (x, cotangent))
    exact = {"kernel": np.einsum(einsum, *in_float64)}
    assert grads["kernel"].dtype == FULL
    assert distance({"kernel": grads["kernel"]}, exact) <= 1e-6
    assert distance({"kernel": rounded["kernel"]}, exact) >= 1e-4


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("Dense", HALF),
        ("no bias", HALF),
        ("batch", HALF),
        pytest.param("DenseGeneral", HALF, marks=LONG),
        pytest.param("two axes", HALF, marks=LONG),
        pytest.param("Dense", jnp.float16, marks=LONG),
    ],
)
def test_linen(name, dtype):
    layer, args, options, einsum = LINEN[name]
    options = {**options, "dtype": dtype}
    own = layer(*args, **options, **jaxga.linen.float32_wgrad(layer))
    stock = layer(*args, **options)
    params = own.init(jax.random.key(0), INPUTS)["params"]
    runs = (lambda p, x, m=m: m.apply({"params": p}, x) for m in (own, stock))
    check_layer(*runs, params, dtype, einsum)


@pytest.mark.parametrize(
    "name",
    ["Linear", "Einsum"]
    + [pytest.param(name, marks=LONG) for name in ("LinearGeneral", "kernel first")],
)
def test_nnx(name):
    layer, args, options, einsum = NNX[name]
    options = {**options, "dtype": HALF}
    keywords = jaxga.nnx.float32_wgrad(layer)
    own = layer(*args, **options, **keywords, rngs=nnx.Rngs(0))
    stock = layer(*args, **options, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(own))

    def run(graph, params, x):
        state = nnx.state(own)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    runs = (functools.partial(run, nnx.graphdef(model)) for model in (own, stock))
    check_layer(*runs, params, HALF, einsum)


def test_projections_of_attention_in_nnx():
    make = functools.partial(
        nnx.MultiHeadAttention, 2, 16, dtype=HALF, decode=False, use_bias=False
    )
    keywords = jaxga.nnx.float32_wgrad(nnx.MultiHeadAttention)
    own, stock = make(rngs=nnx.Rngs(0), **keywords), make(rngs=nnx.Rngs(0))
    x = jnp.asarray(INPUTS, HALF)
    np.testing.assert_array_equal(own(x), stock(x))
    grads, rounded = (
        nnx.grad(lambda model: jnp.sum(jnp.sin(model(x).astype(FULL))))(model)
        for model in (own, stock)
    )
    grads, rounded = map(nnx.to_pure_dict, (grads, rounded))
    assert distance(grads, rounded) <= 1e-2
    assert not any(map(is_rounded, jax.tree.leaves(grads)))
    assert all(map(is_rounded, jax.tree.leaves(rounded)))


def test_a_layer_that_computes_in_float32_is_as_it_was():
    own, stock = nn.Dense(7, **jaxga.linen.float32_wgrad()), nn.Dense(7)
    params = stock.init(jax.random.key(0), INPUTS)
    jaxprs = (
        str(jax.make_jaxpr(jax.grad(lambda p, m=m: m.apply(p, INPUTS).sum()))(params))
        for m in (own, stock)
    )
    assert len(set(jaxprs)) == 1


def test_wider_weights_and_outputs():
    """A float32 cotangent is not rounded; float64 weights get a float64 gradient."""
    dims = ((1,), (0,)), ((), ())
    with jax.enable_x64(True):
        x = jnp.asarray(INPUTS[:, 0], HALF)
        for dtype in (np.float32, np.float64):
            weights = INPUTS[0].T.astype(dtype)

            def product(weights, x=x):
                return float32_wgrad_dot_general(
                    x, weights, dims, preferred_element_type=FULL
                )

            outputs, pull = jax.vjp(product, weights)
            assert outputs.dtype == FULL
            cotangent = jnp.cos(outputs)
            (grad,) = pull(cotangent)
            assert grad.dtype == dtype
            assert distance(grad, np.float64(x).T @ np.float64(cotangent)) <= 1e-6


@pytest.mark.parametrize(
    "dtype, name", ((HALF, "bf16"), (jnp.float16, "f16")), ids=("bfloat16", "float16")
)
def test_what_a_gpu_is_told(dtype, name):
    """To multiply what it has in bfloat16, and not to round a cotangent in float32."""
    weights, x = INPUTS[0].T, jnp.asarray(INPUTS[:, 0], dtype)

    def lowered(preferred):
        def loss(weights):
            dims = ((1,), (0,)), ((), ())
            out = float32_wgrad_dot_general(x, weights, dims, None, preferred)
            return jnp.sum(jnp.sin(out.astype(FULL)))

        traced = jax.jit(jax.grad(loss)).trace(weights)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) == 2 and dots[1].endswith("xf32>")
        return dots

    algorithm = f"lhs_precision_type = {name}, rhs_precision_type = {name}, accumul"
    assert [algorithm in dot for dot in lowered(None)] == [False, True]
    assert [algorithm in dot for dot in lowered(FULL)] == [False, False]


def test_forward_mode_and_second_derivatives():
    weights, x = INPUTS[0].T, jnp.asarray(INPUTS[:, 0], HALF)
    dims = ((1,), (0,)), ((), ())

    def loss(product, weights):
        return jnp.sum(jnp.sin(product(weights).astype(FULL)))

    def own(weights):
        return float32_wgrad_dot_general(x, weights, dims)

    def stock(weights):
        return lax.dot_general(x, weights.astype(HALF), dims)

    for derivative in (jax.jvp, lambda f, *a: jax.jvp(jax.grad(f), *a)):
        found, expected = (
            derivative(functools.partial(loss, f), (weights,), (weights,))[1]
            for f in (own, stock)
        )
        assert distance(found, expected) <= 2e-2


def test_weights_that_were_cast_before():
    """What stands in the float32 weights is then read by nothing."""
    weights, x, dims = (
        INPUTS[0].T,
        jnp.asarray(INPUTS[:, 0], HALF),
        (((1,), (0,)), ((), ())),
    )
    cast = weights.astype(HALF)

    def loss(weights, cast):
        out = float32_wgrad_dot_general(x, weights, dims, cast_weights=cast)
        return jnp.sum(jnp.sin(out.astype(FULL)))

    gradient = jax.grad(loss, argnums=(0, 1))
    expected, _ = gradient(weights, None)
    found, none = gradient(np.full_like(weights, np.nan), cast)
    np.testing.assert_array_equal(found, expected)
    assert not none.any()
    match = r"cast_weights is an array of shape \(16, 5\) and dtype float32"
    with pytest.raises(ValueError, match=match):
        loss(weights, weights)


# What is refused.


@pytest.mark.parametrize("layer", (nn.Einsum, nn.Conv, nn.MultiHeadDotProductAttention))
def test_layers_that_cast_themselves_are_refused(layer):
    match = rf"float32_wgrad: {layer.__name__} does not take promote_dtype together"
    with pytest.raises(TypeError, match=match):
        jaxga.linen.float32_wgrad(layer)


def test_layers_of_nnx_that_cast_themselves_are_refused():
    with pytest.raises(TypeError, match="Conv does not take promote_dtype together"):
        jaxga.nnx.float32_wgrad(nnx.Conv)


def test_another_product_beside_it_is_refused():
    """Flax would take it in place of this one, and multiply in another dtype."""
    keywords = jaxga.linen.float32_wgrad()
    with pytest.raises(TypeError, match="multiple values.*dot_general_cls"):
        nn.Dense(7, dot_general_cls=nn.Fp8DotGeneralOp, **keywords)


def test_narrow_parameters_are_refused_when_differentiated():
    layer = nn.Dense(7, param_dtype=HALF, dtype=HALF, **jaxga.linen.float32_wgrad())
    params = layer.init(jax.random.key(0), INPUTS)
    layer.apply(params, INPUTS)  # as for generating text
    match = r"weights are an array of shape \(16, 7\) and dtype bfloat16.*param_dtype"
    with pytest.raises(TypeError, match=match):
        jax.grad(lambda p: layer.apply(p, INPUTS).astype(FULL).sum())(params)


@pytest.mark.parametrize("dtypes", ((HALF, jnp.float16), (jnp.int8, FULL)), ids=str)
def test_operands_that_are_no_weights_are_refused(dtypes):
    lhs, rhs = (jnp.ones((3, 3), dtype) for dtype in dtypes)
    match = "float32_wgrad: the operands are .*the wider must be the weights'"
    with pytest.raises(TypeError, match=match):
        float32_wgrad_dot_general(lhs, rhs, (((1,), (0,)), ((), ())))


# Whole cycles: scanned layers, rematerialised or not, on every stage.

LAYERS, WIDTH, FEATURES, ROWS = 3, 16, 32, 64


class Layer(nn.Module):
    keywords: dict

    @nn.compact
    def __call__(self, h, _):
        dense = functools.partial(nn.Dense, dtype=HALF, **self.keywords)
        return h + dense(WIDTH)(nn.gelu(dense(FEATURES)(h))), None


class Model(nn.Module):
    own: bool
    remat: bool = True

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        layers = nn.scan(layer, length=LAYERS, **options)
        keywords = jaxga.linen.float32_wgrad() if self.own else {}
        h, _ = layers(keywords, name="layers")(x.astype(HALF), None)
        return h.astype(FULL)


def rows():
    x = np.random.default_rng(1).normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    return {"x": x[0], "y": x[1]}


def loss_of(model):
    def loss_fn(params, batch):
        predicted = model.apply({"params": params}, batch["x"])
        return jaxga.WeightedSum.of((predicted - batch["y"]) ** 2)

    return loss_fn


@functools.cache
def params_of_model():
    return Model(False).init(jax.random.key(0), rows()["x"])["params"]


def kernels(tree):
    return {name: leaf["kernel"] for name, leaf in tree["layers"].items()}


@functools.cache
def full_batch(own):
    """The kernels' gradient of the full batch, without jaxga's loop."""
    loss_fn = loss_of(Model(own))
    grad = jax.grad(lambda p: loss_fn(p, rows()).mean())
    return kernels(jax.jit(grad)(params_of_model()))


def make_step(own, remat, zero, num_devices=8, accum_steps=4):
    model, tx = Model(own, remat), optax.sgd(1.0)
    parallel = jaxga.DataParallel(make_mesh(num_devices), zero=zero)
    state = TrainState.create(apply_fn=None, params=params_of_model(), tx=tx)
    step = jaxga.linen.make_train_step(
        loss_of(model), accum_steps=accum_steps, parallel=parallel, donate=False
    )
    return step, parallel.shard_state(state)


def moved(step, state):
    new, _ = step(state, rows())
    params, new = jax.device_get((state.params, new.params))
    return kernels(jax.tree.map(np.subtract, params, new))


@pytest.mark.parametrize(
    "zero", (*(pytest.param(zero, marks=LONG) for zero in (0, 1, 2)), 3)
)
def test_every_stage_gives_the_gradient_of_the_full_batch(zero):
    change = moved(*make_step(True, True, zero))
    assert distance(change, full_batch(True)) <= 1e-5
    assert distance(change, full_batch(False)) >= 1e-4


@LONG
def test_rounded_gradients_depend_on_how_the_batch_is_cut():
    """The control: what is lost where the layers are Flax's own."""
    assert distance(moved(*make_step(False, True, 0)), full_batch(False)) >= 3e-4


def half_gathers(step, state):
    """The shards that are gathered in bfloat16, as the program says it.

    XLA's CPU compiler gathers all of them in float32.
    """
    found = []

    def search(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "all_gather":
                (operand,) = equation.invars
                found.append((operand.aval.dtype, operand.aval.shape))
            for inner in inner_jaxprs(equation):
                search(getattr(inner, "jaxpr", inner))

    search(step.trace(state, rows()).jaxpr.jaxpr)
    return sorted(shape for dtype, shape in found if dtype == HALF)


@pytest.mark.parametrize(
    "remat", (True, pytest.param(False, marks=LONG)), ids=("remat", "plain")
)
def test_parameters_are_gathered_as_for_layers_of_flax(remat):
    """In bfloat16, one layer at a time, and not a second time for their gradient."""
    own, stock = (make_step(own, remat, zero=3) for own in (True, False))
    gathers = half_gathers(*own)
    assert {len(shape) for shape in gathers} == {1, 2}  # never a stack of layers
    assert gathers == half_gathers(*stock)
    found, expected = (
        jaxga.collectives(step.lower(state, rows()).compile())
        for step, state in (own, stock)
    )
    assert found.bytes_per_call == expected.bytes_per_call
    assert len(found) == len(expected)


@LONG
@pytest.mark.parametrize("zero", (None, 3))
def test_a_step_with_an_option_for_the_compiler(zero):
    """That of a GPU is ignored on a CPU; one that XLA does not know is refused."""
    if zero is None:
        tx = optax.sgd(1.0)
        step = jaxga.linen.make_train_step(loss_of(Model(True)), accum_steps=4)
        state = TrainState.create(apply_fn=None, params=params_of_model(), tx=tx)
    else:
        step, state = make_step(True, True, zero)
    expected, _ = step(jax.tree.map(jnp.copy, state), rows())
    option = {"xla_gpu_enable_triton_gemm": False}
    fast = jax.jit(step, donate_argnums=0, compiler_options=option)
    found, _ = fast(jax.tree.map(jnp.copy, state), rows())
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(step, compiler_options={"xla_gpu_no_such": False})(state, rows())


def test_rows_with_keys_of_their_own_get_no_gradients_of_their_own():
    model = nn.Sequential(
        [
            nn.Dense(FEATURES, dtype=HALF, **jaxga.linen.float32_wgrad()),
            nn.Dropout(0.5, deterministic=False),
        ]
    )
    apply = jaxga.linen.per_example(model.apply)

    def loss_fn(params, x, key):
        out = apply({"params": params}, x, rngs={"dropout": key})
        return jaxga.WeightedSum.of(jnp.sin(out.astype(FULL)))

    x = rows()["x"]
    params = nn.Dense(FEATURES).init(jax.random.key(0), x)["params"]
    params = {"layers_0": params}
    grads = []
    for accum_steps in (1, 4):
        cycle = jaxga.value_and_grad(
            loss_fn, accum_steps=accum_steps, per_example_keys=True
        )
        compiled = jax.jit(cycle).lower(params, x, key=jax.random.key(1)).compile()
        grads.append(compiled(params, x, key=jax.random.key(1))[1])
        text = compiled.as_text()
        each = ROWS // accum_steps
        assert re.search(rf"f32\[(?:{WIDTH},{FEATURES}|{FEATURES},{WIDTH})\]", text)
        assert not re.search(
            rf"f32\[{each},(?:{WIDTH},{FEATURES}|{FEATURES},{WIDTH})\]", text
        )
    kernel = [{"kernel": g["layers_0"]["kernel"]} for g in grads]
    assert distance(*kernel) <= 1e-6


def test_weights_that_an_explicit_axis_divides():
    devices, dims = jax.devices()[:4], (((1,), (0,)), ((), ()))
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Explicit,), devices=devices)

    def loss_fn(params, x, whole):
        h = jnp.tanh(float32_wgrad_dot_general(x.astype(HALF), params["in"], dims))
        y = float32_wgrad_dot_general(h, params["out"], dims, out_sharding=whole)
        return jnp.sum(jnp.sin(y.astype(FULL)))

    rng, x = np.random.default_rng(2), INPUTS[:, 0]
    shapes = {"in": (16, 8), "out": (8, 3)}
    params = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    expected = jax.grad(loss_fn)(params, x, None)
    specs = {"in": P(None, "model"), "out": P("model", None)}
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
            for name, leaf in params.items()
        }
        whole = NamedSharding(mesh, P(None, None))
        grads = jax.jit(jax.grad(loss_fn), static_argnums=2)(placed, x, whole)
    assert {name: leaf.sharding.spec for name, leaf in grads.items()} == specs
    assert not any(map(is_rounded, grads.values()))
    assert distance(jax.device_get(grads), expected) <= 1e-2


# The benchmark.

PROGRAM = """
HloModule cycle

%product (a: bf16[8,48], b: bf16[8,96], sum: f32[48,96]) -> f32[48,96] {
  %a = bf16[8,48] parameter(0)
  %b = bf16[8,96] parameter(1)
  %sum = f32[48,96] parameter(2)
  %dot = f32[48,96] dot(%a, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  ROOT %total = f32[48,96] add(%dot, %sum)
}

%slice (stack: f32[2,48,96], i: s32[]) -> bf16[1,48,96] {
  %stack = f32[2,48,96] parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,48,96] dynamic-slice(%stack, %i), dynamic_slice_sizes={1,48,96}
  ROOT %half = bf16[1,48,96] convert(%one)
}

%body (carry: (f32[48,96], f32[2,48,96])) -> (f32[48,96], f32[2,48,96]) {
  %carry = (f32[48,96], f32[2,48,96]) parameter(0)
  %sum = f32[48,96] get-tuple-element(%carry), index=0
  %stack = f32[2,48,96] get-tuple-element(%carry), index=1
  %i = s32[] constant(0)
  %half = bf16[1,48,96] fusion(%stack, %i), kind=kLoop, calls=%slice
  %a = bf16[8,48] constant({...})
  %b = bf16[8,96] constant({...})
  %new = f32[48,96] fusion(%a, %b, %sum), kind=kCustom, calls=%product
  ROOT %tuple = (f32[48,96], f32[2,48,96]) tuple(%new, %stack)
}

%condition (carry: (f32[48,96], f32[2,48,96])) -> pred[] {
  %carry = (f32[48,96], f32[2,48,96]) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p: (f32[48,96], f32[2,48,96])) -> (f32[48,96], f32[2,48,96]) {
  %p = (f32[48,96], f32[2,48,96]) parameter(0)
  ROOT %while = (f32[48,96], f32[2,48,96]) while(%p), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"2"}}
}
"""


@pytest.fixture
def benchmark(load):
    return load("weight_gradients")


def test_benchmark_reads_what_a_program_moves(benchmark):
    size = benchmark.SIZES["tiny"]
    assert (size.width, size.hidden, size.accum_steps) == (48, 96, 2)
    found = benchmark.read(PROGRAM, size)
    assert found["products"] == {"Triton, f32, added inside": 1}
    # In a micro-batch: a slice read and written in half, a sum read and written.
    moved = (4 + 2 + 4 + 4) * 48 * 96
    assert found["bytes_per_parameter"] == pytest.approx(moved / size.parameters)


@pytest.mark.long
def test_benchmark_measures_errors(benchmark, tmp_path, capsys):
    path = tmp_path / "result.json"
    benchmark.main(["--errors", "tiny", "--output", str(path)])
    errors = json.loads(path.read_text())["errors"]
    assert set(errors["stock"]) == {"1", "4", "16", "64"}
    for found in errors["stock"].values():
        assert 1e-5 < found["unrounded"] < found["float64"] < 0.1
    assert "stock, by rounding" in capsys.readouterr().out
