"""The GPT of `gpt.py` in PyTorch, and the ways in which PyTorch accumulates gradients.

`pip install torch accelerate`: neither is needed by anything else here.
"""

from collections.abc import Callable
from typing import Any

import accelerate
import jax
import numpy as np
import torch
import torch.nn.functional as F
from transformer import PyTree

EAGER, COMPILED = "PyTorch, eager", "PyTorch, torch.compile"
ACCELERATE = "PyTorch, Accelerate"


class Block(torch.nn.Module):
    def __init__(self, layer, heads):
        super().__init__()
        self.heads = heads
        self.qkv = _linear(layer["qkv"])
        self.attended = _linear(layer["attended"])
        self.wide = _linear(layer["wide"])
        self.narrow = _linear(layer["narrow"])

    def forward(self, h):
        rows, length, width = h.shape
        qkv = self.qkv(_normalise(h)).view(rows, length, 3, self.heads, -1)
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.attended(attended.transpose(1, 2).reshape(h.shape))
        wide = F.gelu(self.wide(_normalise(h)), approximate="tanh")
        return h + self.narrow(wide)


class GPT(torch.nn.Module):
    """Returns the sum of a micro-batch's losses, padding left out."""

    def __init__(self, params, dtype):
        super().__init__()
        self.dtype = dtype
        self.embed = torch.nn.Parameter(_tensor(params["embed"]))
        self.positions = torch.nn.Parameter(_tensor(params["positions"]))
        heads = max(1, params["embed"].shape[1] // 64)
        blocks = [Block(layer, heads) for layer in params["layers"]]
        self.layers = torch.nn.ModuleList(blocks)

    def forward(self, inputs, targets, mask):
        h = (F.embedding(inputs, self.embed) + self.positions).to(self.dtype)
        for layer in self.layers:
            h = layer(h)
        logits = F.linear(_normalise(h), self.embed)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        )
        return torch.where(mask.flatten(), losses, 0.0).sum()


def _tensor(array):
    return torch.from_numpy(np.array(array, order="C"))


def _linear(matrix):
    layer = torch.nn.Linear(*matrix.shape, bias=False)
    layer.weight = torch.nn.Parameter(_tensor(matrix.T))
    return layer


def _normalise(h):
    return F.rms_norm(h, (h.shape[-1],), eps=1e-6).to(h.dtype)


class Peer:
    """A way to accumulate: its own model, optimizer and copy of the data.

    Args:
        params: unrolled parameters, as of `gpt.make_params`.
        batch: as of `gpt.make_batch`.
        accum_steps: micro-batches in it.
        dtype: in which it computes: "float32", or "bfloat16" by autocast.
        wrap: what is done to the model, `torch.compile` for one.
    """

    def __init__(
        self,
        params: PyTree,
        batch: PyTree,
        accum_steps: int,
        dtype: str,
        wrap: Callable = lambda model: model,
    ):
        self.device = device()
        self.bare = GPT(params, getattr(torch, dtype)).to(self.device)
        self.model = wrap(self.bare)
        self.optimizer = torch.optim.AdamW(
            self.bare.parameters(), lr=1e-4, weight_decay=1e-4, fused=True
        )
        self.dtype, self.accum_steps = getattr(torch, dtype), accum_steps
        self.microbatches = [self._cut(batch, i) for i in range(accum_steps)]

    def _cut(self, batch, index):
        rows = {k: _tensor(v)[index :: self.accum_steps] for k, v in batch.items()}
        tokens = (rows[name].long() for name in ("inputs", "targets"))
        return tuple(x.contiguous().to(self.device) for x in (*tokens, rows["mask"]))

    def cycle(self, *, updates: bool = True) -> None:
        """The gradient of the mean over all tokens, and an update if wanted."""
        # Known before the first: a mean of means would be another gradient.
        weight = sum(mask.sum() for _, _, mask in self.microbatches)
        for microbatch in self.microbatches:
            with self._autocast():
                loss = self.model(*microbatch)
            (loss / weight).backward()
        if updates:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradient(self) -> PyTree:
        """The gradient as a tree of the parameters; nothing is updated."""
        self.cycle(updates=False)
        found = {name: p.grad.cpu().numpy() for name, p in self.bare.named_parameters()}
        self.optimizer.zero_grad()
        number = len(self.bare.layers)
        names = ("qkv", "attended", "wide", "narrow")
        layers = [
            {name: found[f"layers.{i}.{name}.weight"].T for name in names}
            for i in range(number)
        ]
        rest = {name: found[name] for name in ("embed", "positions")}
        return rest | {"layers": layers}

    def _autocast(self):
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed)


class AcceleratePeer(Peer):
    """`accumulate` divides by the number of micro-batches: undone as its guide says."""

    def __init__(self, params, batch, accum_steps, dtype):
        super().__init__(params, batch, accum_steps, dtype)
        precision = {"float32": "no", "bfloat16": "bf16"}[dtype]
        self.accelerator = accelerate.Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision=precision,
            gradient_accumulation_steps=accum_steps,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.bare, self.optimizer)

    def cycle(self, *, updates=True):
        weight = sum(mask.sum() for _, _, mask in self.microbatches)
        for microbatch in self.microbatches:
            with self.accelerator.accumulate(self.model):
                loss = self.model(*microbatch) * self.accum_steps / weight
                self.accelerator.backward(loss)
                if updates:
                    # Both do nothing but after the last micro-batch.
                    self.optimizer.step()
                    self.optimizer.zero_grad()


def peers(
    params: PyTree, batch: PyTree, accum_steps: int, dtype: str
) -> dict[str, Callable[[], Peer]]:
    """Makers of all ways, by name."""
    params, batch = jax.device_get((params, batch))
    given = (params, batch, accum_steps, dtype)
    return {
        EAGER: lambda: Peer(*given),
        COMPILED: lambda: Peer(*given, torch.compile),
        ACCELERATE: lambda: AcceleratePeer(*given),
    }


def device() -> torch.device:
    """Where PyTorch runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def share_cores(number: int) -> None:
    """As many threads as JAX takes: PyTorch counts only whole cores by itself."""
    torch.set_num_threads(number)


def wait() -> None:
    """Until the GPU has done what it was given; a CPU does it at once."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def versions() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "torch_threads": torch.get_num_threads(),
    }
