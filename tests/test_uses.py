"""Which parameters are summed in place: those that go into a scan, tables apart."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import pytest
from jax import lax
from jaxga._forward import Forward
from problems import distance

TOKENS = np.arange(6)


def scanned(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0]


@pytest.mark.parametrize(
    "function, uses",
    [
        (scanned, {"scan"}),
        (jax.jit(scanned), {"scan"}),
        (jax.checkpoint(scanned), {"scan"}),
        (
            lambda p, x: scanned(p.astype(jnp.bfloat16), x.astype(jnp.bfloat16)),
            {"scan"},
        ),
        (
            lambda p, x: scanned(jax.jit(lambda p: p.astype("f2"))(p), x.astype("f2")),
            {"scan"},
        ),
        (lambda p, x: x @ p[0], set()),
        (lambda p, x: p[0][TOKENS], set()),
        (lambda p, x: p.reshape(6, 2)[TOKENS], {"gather"}),
        (lambda p, x: jnp.take(p, TOKENS[:2], axis=0), {"gather"}),
        (
            lambda p, x: lax.scan(lambda h, i: (h + p[i, TOKENS[:2]], None), x, TOKENS)[
                0
            ],
            {"scan", "gather"},
        ),
    ],
)
def test_uses_are_found_at_any_depth(function, uses):
    p, x = jnp.ones((3, 2, 2)), jnp.ones((2, 2))
    assert Forward(lambda ps, x: function(ps[0], x), [p], x).uses() == [uses]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return h + nn.Dense(64)(nn.relu(nn.Dense(256)(h))), None


class LanguageModel(nn.Module):
    """Scanned, rematerialised layers and a tied embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 64)
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=6,
        )
        h, _ = layers()(embed(tokens), None)
        return embed.attend(h)


def language_loss(params, tokens):
    logits = LanguageModel().apply({"params": params}, tokens)
    return jaxga.WeightedSum.of(-jax.nn.log_softmax(logits)[..., 0])


def test_scanned_linen_layers_are_summed_in_place_and_the_table_is_not():
    tokens = np.random.default_rng(0).integers(0, 50, (16, 5))
    params = LanguageModel().init(jax.random.key(0), tokens)["params"]
    traced = Forward(lambda p, t: language_loss(p, t).total, params, tokens)
    uses = jax.tree.unflatten(jax.tree.structure(params), traced.uses())
    assert uses["Embed_0"]["embedding"] == {"gather"}
    del uses["Embed_0"]
    layers = jax.tree.leaves(uses)
    assert len(layers) == 4 and all(use == {"scan"} for use in layers)
    expected = jax.grad(lambda p: language_loss(p, tokens).mean())(params)
    _, grads = jax.jit(jaxga.value_and_grad(language_loss, accum_steps=4))(
        params, tokens
    )
    assert distance(grads, expected) <= 1e-6


def test_table_gets_its_rows_added_whole():
    """In place, JAX 0.12 would scatter one number at a time: an index per number."""

    def loss_fn(params, tokens):
        h = params["table"][tokens]
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"])
        return jaxga.WeightedSum.of(h)

    params = {"table": jnp.ones((50, 64)), "layers": jnp.ones((3, 64, 64)) / 64}
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=4)
    text = jax.jit(cycle).lower(params, np.zeros((16, 5), np.int32)).as_text()
    assert "tensor<4x5x1xi32>, tensor<4x5x64xf32>" in text  # an index for each row
    assert "tensor<4x5x64x2xi32>" not in text
