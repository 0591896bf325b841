"""How many tokens per second, beside PyTorch?

    pip install torch accelerate
    python benchmarks/against_torch.py      # CPU, about two minutes

One GPT of the same shapes and from the same parameters, on the same micro-batches, in
float32 on a CPU and in bfloat16 beside float32 parameters on a GPU. Every contender
does a whole cycle: the gradient of the mean over all tokens, and one AdamW update.
PyTorch accumulates in three ways: a loop as it is written by hand, that loop with
`torch.compile`, and Accelerate's `accumulate`, told the number of tokens as its guide
says. Attention is each framework's own, norms are in float32.

Before anything is timed, every gradient is compared with that of the full batch in
float32. All take turns in one process, on as many threads, after a pause: what another
framework's threads still do at the end of their turn is not counted to the next one's.
"""

import contextlib
import dataclasses
import importlib.util
import os
import statistics
import sys

# PyTorch needs room too: JAX takes what it uses, not three quarters of the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpt
import jax
import jax.numpy as jnp
import markdown
import optax
from contenders import Loss, contenders, first_gradient, in_parts
from harness import (
    check_equal,
    compile_step,
    full_precision,
    options,
    parse_options,
    publish,
    ratios,
    time_in_turns,
)

JAXGA = "jaxga.make_train_step"
# To rounding: of float32, and of products in bfloat16, layer by layer.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-1}
_DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # JAX's names and PyTorch's
_PAUSE = 0.05  # seconds: threads that have done their work still spin for a while


class Jaxga:
    """The cycle of `jaxga.make_train_step`, with the methods of a PyTorch peer."""

    def __init__(self, params, batch, accum_steps, loss):
        rows = len(batch["mask"]) // accum_steps
        self._batch, self._tx = batch, optax.adamw(1e-4, weight_decay=1e-4)
        self._entrant = contenders(accum_steps, rows, loss)[JAXGA]
        copied = jax.tree.map(jnp.copy, params)
        self._state = self._entrant.make_state(copied, self._tx)
        step = self._entrant.make_step(self._tx)
        self._step, _ = compile_step(step, self._state, batch)

    def cycle(self):
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready(metrics)

    def gradient(self):
        """Of the first cycle."""
        self.cycle()
        return first_gradient(self._entrant.read_opt_state(self._state))


def measure(size: gpt.Size, accum_steps: int, dtype: str, rounds: int) -> dict:
    """Errors and times of all, on one model."""
    import torch_peers

    if torch_peers.device().type != _DEVICES[jax.default_backend()]:
        sys.exit(
            f"JAX runs on the {jax.default_backend()!r} backend, PyTorch on "
            f"{torch_peers.device().type!r}: install both for one of them, or set "
            "JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES=. Nothing was measured."
        )
    torch_peers.share_cores(_cores())
    has_cudnn = jax.default_backend() == "gpu" and dtype == "bfloat16"
    loss = Loss(gpt.TokenLosses(dtype, attention="cudnn" if has_cudnn else "xla"))
    params = gpt.make_params(size, scanned=False)
    batch = gpt.make_batch(size, accum_steps * size.microbatch_size)
    expected = in_parts(Loss(gpt.TokenLosses()), params, batch, accum_steps)

    makers = {JAXGA: lambda: Jaxga(params, batch, accum_steps, loss)}
    makers |= torch_peers.peers(params, batch, accum_steps, dtype)
    runs, found = {}, {}
    for name, make in makers.items():
        entrant = make()
        got = entrant.gradient()
        found[name] = {
            "gradient_error": check_equal(name, got, expected, TOLERANCES[dtype])
        }
        runs[name] = entrant.cycle
    seconds = time_in_turns(
        runs, rounds, wait=lambda _: torch_peers.wait(), pause=_PAUSE
    )
    tokens = accum_steps * size.microbatch_size * size.length
    return {
        "versions": torch_peers.versions(),
        "dtype": dtype,
        **dataclasses.asdict(size),
        "parameters": gpt.count(params),
        "accum_steps": accum_steps,
        "tokens": tokens,
        "rounds": rounds,
        "contenders": {
            name: known
            | {
                "median_seconds": statistics.median(seconds[name]),
                "tokens_per_second": tokens / statistics.median(seconds[name]),
                "time_to_jaxga": ratios(seconds[name], seconds[JAXGA]),
            }
            for name, known in found.items()
        },
    }


def _cores():
    """Those that this process may use: as many threads as JAX makes."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def table(result) -> str:
    """The result of `against_torch.py` as Markdown."""
    versions = result["versions"]
    header = (
        "contender",
        "tokens / second",
        "time / jaxga",
        "(least to greatest)",
        "gradient error",
    )
    rows = [
        (
            name,
            f"{found['tokens_per_second']:,.0f}",
            f"{found['time_to_jaxga']['median']:.3f}",
            markdown.spread(found["time_to_jaxga"]),
            markdown.error(found["gradient_error"]),
        )
        for name, found in result["contenders"].items()
    ]
    described = (
        f"PyTorch {versions['torch']}, Accelerate {versions['accelerate']}, "
        f"{versions['torch_threads']} threads. {result['layers']} layers of width "
        f"{result['width']}, {result['parameters'] / 1e6:.1f} M parameters, computed "
        f"in {result['dtype']}; {result['accum_steps']} micro-batches of "
        f"{result['microbatch_size']} rows of {result['length']} tokens; "
        f"{result['rounds']} rounds."
    )
    return markdown.join(
        markdown.setting(result["environment"]),
        described,
        markdown.table([header, *rows]),
    )


def missing() -> list[str]:
    """What must be installed and is not."""
    needed = ("torch", "accelerate")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if absent := missing():
        sys.exit(
            f"benchmarks/against_torch.py needs {' and '.join(absent)}, not installed "
            f"here: pip install {' '.join(absent)}. Nothing was measured."
        )
    # PyTorch multiplies float32 as it is, on a GPU too.
    exact = full_precision() if args.dtype == "float32" else contextlib.nullcontext()
    with exact:
        found = measure(gpt.SIZES[args.size], args.accum_steps, args.dtype, args.rounds)
    publish("against_torch", __doc__, found, table, args.output)


def parse(argv):
    parser = options(__doc__, rounds=10)
    on_cpu = jax.default_backend() == "cpu"
    size, dtype = ("small", "float32") if on_cpu else ("124m", "bfloat16")
    help = "default here: %(default)s"
    parser.add_argument("--size", choices=gpt.SIZES, default=size, help=help)
    parser.add_argument("--dtype", choices=TOLERANCES, default=dtype, help=help)
    parser.add_argument("--accum-steps", type=int, default=8)
    return parse_options(parser, argv, "size", "dtype", "accum_steps")


if __name__ == "__main__":
    main()
