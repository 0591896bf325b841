"""A small masked language model, its float64 truth, and a strict comparison."""

import functools

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
from jax.sharding import AxisType

ROWS, LENGTH, VOCAB, WIDTH = 384, 6, 11, 8


def make_params(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": (VOCAB, WIDTH),
        "hidden": {"w": (WIDTH, WIDTH), "b": (WIDTH,)},
        "out": (WIDTH, VOCAB),
    }
    return jax.tree.map(
        lambda shape: (rng.normal(size=shape) / 2).astype(dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@functools.cache
def make_batch(rows=ROWS, seed=1):
    """Rows of very uneven length: cut into 48, some micro-batches have no valid token.

    Cut into 6, one of them has none; on 8 devices, some device's micro-batch has none.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, size=(rows, LENGTH + 1)).astype(np.int32)
    lengths = rng.integers(0, LENGTH + 1, size=rows)
    lengths[np.arange(rows) % 6 == 5] = 0
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": np.arange(LENGTH) < lengths[:, None],
        "weights": rng.uniform(0.1, 2.0, size=(rows, LENGTH)).astype(np.float32),
    }


def hidden(params, batch):
    w, b = params["hidden"]["w"], params["hidden"]["b"]
    return jnp.tanh(params["embed"][batch["inputs"]] @ w + b[None, None])


def token_losses(params, batch):
    logits = hidden(params, batch) @ params["out"]
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


# Losses in jaxga's contract, and the means they must come to, in plain JAX.


def counted(params, batch):
    return jaxga.WeightedSum.of(token_losses(params, batch), where=batch["mask"])


def counted_mean(params, batch):
    losses, mask = token_losses(params, batch), batch["mask"]
    return jnp.where(mask, losses, 0).sum() / mask.sum()


def weighed(params, batch):
    return jaxga.WeightedSum.of(
        token_losses(params, batch), where=batch["mask"], weights=batch["weights"]
    )


def weighed_mean(params, batch):
    weights = jnp.where(batch["mask"], batch["weights"], 0)
    return (token_losses(params, batch) * weights).sum() / weights.sum()


def from_mean(params, batch):
    """As existing code has it: a mean of its own, guarded, and what it divided by."""
    count = batch["mask"].sum()
    losses = jnp.where(batch["mask"], token_losses(params, batch), 0)
    return jaxga.WeightedSum.from_mean(losses.sum() / jnp.maximum(count, 1), count)


def three_terms(params, batch):
    """Per token; per token with float weights; per row."""
    squares = (hidden(params, batch) ** 2).sum(-1)
    mask, weights = batch["mask"], batch["weights"]
    penalty = jaxga.WeightedSum.of(squares, where=mask, weights=weights)
    return {
        "cross_entropy": counted(params, batch),
        "penalty": 0.1 * penalty,
        "rows": 0.01 * jaxga.WeightedSum.of(squares.sum(-1)),
    }


def three_terms_mean(params, batch):
    squares = (hidden(params, batch) ** 2).sum(-1)
    weights = jnp.where(batch["mask"], batch["weights"], 0)
    penalty = (squares * weights).sum() / weights.sum()
    rows = squares.sum(-1).mean()
    return counted_mean(params, batch) + 0.1 * penalty + 0.01 * rows


LOSSES = {
    "counted": (counted, counted_mean),
    "weighed": (weighed, weighed_mean),
    "from_mean": (from_mean, counted_mean),
    "three_terms": (three_terms, three_terms_mean),
}


def truth(mean_loss, params, batch):
    """Loss and gradient of the full batch at once, in float64, without jaxga."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), params)
        loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params, batch)
        return jax.tree.map(np.asarray, (loss, grads))


def distance(actual, expected):
    """The norm of two trees' difference over the norm of the second tree."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = [
        (np.asarray(a, np.float64), np.asarray(e, np.float64))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    assert pairs, "nothing to compare"
    for got, want in pairs:
        assert got.shape == want.shape
        assert np.abs(want).max() > 1e-6, "almost zero: anything passes"
    size = np.sqrt(sum((want**2).sum() for _, want in pairs))
    return np.sqrt(sum(((got - want) ** 2).sum() for got, want in pairs)) / size


def make_mesh(num_devices, axis_type=AxisType.Auto):
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), ("data",), (axis_type,), devices=devices)


def split_over_devices(batch, num_devices):
    """What `pmap` takes: a leading axis of devices."""
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
