"""Language models of linen and nnx, as they are, under the stages that divide most."""

import functools

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
from jaxga import DataParallel, collectives
from layered import make_mesh

LAYERS, WIDTH, WORDS, LENGTH, HEADS = 12, 256, 256, 8, 4
TX = optax.adamw(1e-3)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, deterministic=True)(h, h)
        h = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        h = nn.Dropout(0.1, deterministic=False)(h)
        return x + nn.Dense(WIDTH)(h), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(WORDS, WIDTH)
        blocks = nn.scan(
            nn.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=LAYERS,
        )
        x, _ = blocks()(embed(tokens), None)
        return embed.attend(nn.LayerNorm()(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, decode=False, deterministic=True, rngs=rngs
        )
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(self.dropout(nnx.gelu(self.up(self.norms[1](x)))))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def make(rngs):
            return NnxBlock(rngs)

        self.blocks = make(rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return self.embed.attend(self.norm(run(self.embed(tokens), self.blocks)))


def mean_free(logits, tokens):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jaxga.WeightedSum.of(losses)


def compile_linen(parallel, tokens):
    model = LinenModel()

    def loss_fn(params, tokens, key):
        logits = model.apply({"params": params}, tokens[:, :-1], rngs={"dropout": key})
        return mean_free(logits, tokens)

    def create():
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        params = model.init(keys, jnp.zeros((1, LENGTH), jnp.int32))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=TX)

    state = parallel.shard_state(jax.eval_shape(create))
    step = jaxga.linen.make_train_step(loss_fn, accum_steps=4, parallel=parallel)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = step.lower(state, tokens, key=key)
    return lowered.compile(), jax.tree.leaves(state.params)


def compile_nnx(parallel, tokens):
    def loss_fn(model, tokens):
        return mean_free(model(tokens[:, :-1]), tokens)

    model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    optimizer = nnx.eval_shape(lambda: nnx.Optimizer(model, TX, wrt=nnx.Param))
    step = jaxga.nnx.make_train_step(loss_fn, accum_steps=4, parallel=parallel)
    compiled = step.lower(model, optimizer, tokens).compile()
    return compiled, jax.tree.leaves(nnx.state(model, nnx.Param))


COMPILE = {"linen": compile_linen, "nnx": compile_nnx}


@pytest.mark.parametrize("zero", (pytest.param(2, marks=pytest.mark.anywhere), 3))
@pytest.mark.parametrize(
    "api", (pytest.param("linen", marks=pytest.mark.anywhere), "nnx")
)
def test_temporaries_and_collectives(api, zero):
    parallel = DataParallel(make_mesh(data=8), zero=zero)
    tokens = jax.ShapeDtypeStruct((8 * 4, LENGTH + 1), jnp.int32)
    compiled, params = COMPILE[api](parallel, tokens)
    tree = sum(4 * leaf.size for leaf in params)
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.45 * tree
    found = collectives(compiled)
    assert not found.select("all-to-all")
    scattered = found.select("reduce-scatter", in_loop=True).bytes_per_call
    assert scattered == pytest.approx(4 * tree, rel=0.02)
    gathered = found.select("all-gather").bytes_per_call
    once = functools.partial(pytest.approx, rel=0.05)
    assert gathered == (once(tree) if zero == 2 else once(8 * tree, rel=0.2))


@pytest.mark.anywhere
def test_the_losses_are_those_of_one_device():
    tokens = np.random.default_rng(0).integers(0, WORDS, (32, LENGTH + 1))
    tokens, losses = tokens.astype(np.int32), []
    for num_devices in (1, 8):
        parallel = DataParallel(make_mesh(data=num_devices), zero=3)
        model = parallel.init(lambda: NnxModel(nnx.Rngs(0)))
        part = model.blocks.up.kernel.get_value().addressable_shards[0].data
        assert part.shape == (LAYERS, WIDTH // num_devices, 4 * WIDTH)
        model.eval()
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        step = jaxga.nnx.make_train_step(
            lambda model, tokens: mean_free(model(tokens[:, :-1]), tokens),
            accum_steps=4,
            parallel=parallel,
        )
        losses.append([step(model, optimizer, tokens)["loss"] for _ in range(2)])
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert losses[0][1] < losses[0][0]
