"""A small causal language model to measure with: layers scanned or unrolled.

Scanned, its layers are stacked, run by `lax.scan` and rematerialised, as large models
do. Unrolled, every layer has arrays of its own and keeps its activations.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of the model and of a micro-batch.

    Attributes:
        layers: blocks of attention and MLP.
        width: features per token.
        length: tokens per row.
        vocab: different tokens.
        microbatch_size: rows of a micro-batch.
    """

    layers: int
    width: int
    length: int
    vocab: int
    microbatch_size: int


SIZES = {
    "tiny": Size(layers=2, width=16, length=16, vocab=32, microbatch_size=2),
    "small": Size(layers=8, width=128, length=64, vocab=256, microbatch_size=4),
    "large": Size(layers=12, width=1024, length=512, vocab=8192, microbatch_size=4),
}
_HEAD_WIDTH = 64


def make_params(size: Size, *, scanned: bool, seed: int = 0) -> PyTree:
    """Random float32 parameters; `layers` is one stacked dict, or a list of dicts."""
    width = size.width
    shapes = {
        "embed": (size.vocab, width),
        "positions": (size.length, width),
        "layers": {
            "qkv": (size.layers, width, 3 * width),
            "attended": (size.layers, width, width),
            "wide": (size.layers, width, 4 * width),
            "narrow": (size.layers, 4 * width, width),
        },
        "out": (width, size.vocab),
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    params = treedef.unflatten(map(_make_leaf, keys, leaves))
    if not scanned:
        stacked = params["layers"]
        params["layers"] = [
            {name: leaf[i] for name, leaf in stacked.items()}
            for i in range(size.layers)
        ]
    return params


def make_batch(size: Size, rows: int, *, seed: int = 1) -> PyTree:
    """Rows of unequal length, so that a mean of means is not the mean."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, size.vocab, (rows, size.length + 1)).astype(np.int32)
    lengths = rng.integers(size.length // 4, size.length + 1, rows)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": np.arange(size.length) < lengths[:, None],
    }
    return jax.tree.map(jnp.asarray, batch)


def token_losses(params: PyTree, batch: PyTree) -> jax.Array:
    """Cross entropy of every token, padding included, of shape `(rows, length)`."""
    h = params["embed"][batch["inputs"]] + params["positions"][None]
    if isinstance(params["layers"], list):
        for layer in params["layers"]:
            h = _block(h, layer)
    else:
        h, _ = lax.scan(_scanned_block, h, params["layers"])
    logits = _normalise(h) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


def _block(h, layer):
    rows, length, width = h.shape
    heads = max(1, width // _HEAD_WIDTH)
    qkv = (_normalise(h) @ layer["qkv"]).reshape(rows, length, 3, heads, -1)
    attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
    h = h + attended.reshape(h.shape) @ layer["attended"]
    return h + jax.nn.gelu(_normalise(h) @ layer["wide"]) @ layer["narrow"]


def _scanned_block(h, layer):
    # Inside a scan nothing can undo the rematerialisation: no barrier is needed.
    return jax.checkpoint(_block, prevent_cse=False)(h, layer), None


def _normalise(h):
    return h * lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)


def _make_leaf(key, shape):
    return jax.random.normal(key, shape) * shape[-2] ** -0.5
