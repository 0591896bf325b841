"""The GPT that is run beside PyTorch and on a GPU: `transformer.py`'s, as trained.

Its parameters are float32 and its output matrix is its table of embeddings, as in
GPT-2. It computes in bfloat16 or float32; norms and losses are in float32 always.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformer
from jax import lax
from jaxga import float32_wgrad_dot_general
from transformer import PyTree, Size

SIZES = {
    "tiny": Size(layers=2, width=16, length=16, vocab=32, microbatch_size=2),
    "small": Size(layers=4, width=128, length=128, vocab=1024, microbatch_size=4),
    # 124.4 million parameters; 8,192 tokens are a micro-batch.
    "124m": Size(layers=12, width=768, length=1024, vocab=50304, microbatch_size=8),
}
_HEAD_WIDTH = 64


def make_params(size: Size, *, scanned: bool) -> PyTree:
    """Random float32 parameters; `layers` is one stacked dict, or a list of dicts."""
    params = transformer.make_params(size, scanned=scanned)
    return {name: leaf for name, leaf in params.items() if name != "out"}


def make_batch(size: Size, rows: int) -> PyTree:
    """Rows of unequal length."""
    return transformer.make_batch(size, rows)


@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """Cross entropy of every token, of shape `(rows, length)`: call it.

    Attributes:
        dtype: in which it computes.
        attention: the implementation: "xla", or "cudnn" for bfloat16 on NVIDIA GPUs.
        remat: whether layers are computed again in the backward pass.
        float32_wgrad: whether the gradients of matrices leave their matrix product in
            float32, before anything is rounded to `dtype`.
    """

    dtype: str = "float32"
    attention: str = "xla"
    remat: bool = False
    float32_wgrad: bool = False

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        h = params["embed"][batch["inputs"]] + params["positions"][None]
        h = h.astype(self.dtype)
        block, layers = self._block, params["layers"]
        if isinstance(layers, list):
            block = jax.checkpoint(block) if self.remat else block
            h = functools.reduce(block, layers, h)
        else:
            # Inside a scan nothing can undo the rematerialisation.
            block = jax.checkpoint(block, prevent_cse=False) if self.remat else block
            h, _ = lax.scan(lambda h, layer: (block(h, layer), None), h, layers)
        logits = self._dense(_normalise(h), params["embed"].T)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["targets"]
        )

    def _block(self, h, layer):
        rows, length, width = h.shape
        heads = max(1, width // _HEAD_WIDTH)
        qkv = self._dense(_normalise(h), layer["qkv"])
        q, k, v = jnp.moveaxis(qkv.reshape(rows, length, 3, heads, -1), 2, 0)
        attended = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=self.attention
        )
        h = h + self._dense(attended.reshape(h.shape), layer["attended"])
        wide = jax.nn.gelu(self._dense(_normalise(h), layer["wide"]))
        return h + self._dense(wide, layer["narrow"])

    def _dense(self, x, w):
        if self.float32_wgrad:
            return float32_wgrad_dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))
        return x @ w.astype(x.dtype)


def _normalise(h):
    wide = h.astype(jnp.float32)
    size = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * lax.rsqrt(size + 1e-6)).astype(h.dtype)


def count(params: PyTree) -> int:
    """The number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
