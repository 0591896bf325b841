"""A small language model with ragged masks, its float64 truth, and a strict comparison."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxga

ROWS, LENGTH, VOCAB, WIDTH = 384, 6, 11, 8


def make_params(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": (VOCAB, WIDTH),
        "hidden": {"w": (WIDTH, WIDTH), "b": (WIDTH,)},
        "out": (WIDTH, VOCAB),
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(dtype) / 2,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_batch(rows=ROWS, seed=1, accum_steps=48):
    """Rows of very uneven length; some micro-batches of `accum_steps` are all padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, size=(rows, LENGTH + 1)).astype(np.int32)
    lengths = rng.integers(0, LENGTH + 1, size=rows)
    lengths[np.isin(np.arange(rows) % accum_steps, (1, 5, accum_steps - 1))] = 0
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": np.arange(LENGTH) < lengths[:, None],
        "weights": rng.uniform(0.1, 2.0, size=(rows, LENGTH)).astype(np.float32),
    }


def hidden(params, batch):
    h = params["embed"][batch["inputs"]]
    return jnp.tanh(h @ params["hidden"]["w"] + params["hidden"]["b"][None, None])


def token_losses(params, batch):
    logits = (hidden(params, batch) @ params["out"]).astype(
        jnp.promote_types(params["out"].dtype, jnp.float32)
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


def loss_fn(params, batch):
    return jaxga.WeightedSum.of(token_losses(params, batch), where=batch["mask"])


def weighted_loss_fn(params, batch):
    return jaxga.WeightedSum.of(
        token_losses(params, batch), where=batch["mask"], weights=batch["weights"]
    )


def terms_loss_fn(params, batch):
    """Per token; per token with float weights; per row."""
    squares = (hidden(params, batch) ** 2).sum(-1)
    return {
        "cross_entropy": loss_fn(params, batch),
        "penalty": 0.1
        * jaxga.WeightedSum.of(squares, where=batch["mask"], weights=batch["weights"]),
        "rows": 0.01 * jaxga.WeightedSum.of(squares.sum(-1)),
    }


def truth(mean_loss, params, batch):
    """Loss and gradient of the full batch at once, in float64, by plain JAX.

    `mean_loss(params, batch)` divides by itself; nothing of jaxga takes part.
    """
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), params)
        loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params, batch)
        return jax.tree.map(np.asarray, (loss, grads))


def mean_loss(params, batch):
    losses, mask = token_losses(params, batch), batch["mask"]
    return jnp.where(mask, losses, 0).sum() / mask.sum()


def weighted_mean_loss(params, batch):
    weights = jnp.where(batch["mask"], batch["weights"], 0)
    return (token_losses(params, batch) * weights).sum() / weights.sum()


def terms_mean_loss(params, batch):
    squares = (hidden(params, batch) ** 2).sum(-1)
    weights = jnp.where(batch["mask"], batch["weights"], 0)
    penalty = (squares * weights).sum() / weights.sum()
    rows = squares.sum(-1).mean()
    return mean_loss(params, batch) + 0.1 * penalty + 0.01 * rows


def distance(actual, expected):
    """The norm of the difference of two trees over the norm of the second."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = [
        (np.asarray(a, np.float64), np.asarray(e, np.float64))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    assert pairs, "nothing to compare"
    for got, want in pairs:
        assert got.shape == want.shape
        assert np.abs(want).max() > 1e-4, "almost zero: anything passes"
    size = np.sqrt(sum((want**2).sum() for _, want in pairs))
    return np.sqrt(sum(((got - want) ** 2).sum() for got, want in pairs)) / size
