"""What every benchmark does alike: compile, time in turns, compare, keep as JSON."""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
RESULTS = Path(__file__).parent / "results"


def compile_step(
    step: Callable, *args: PyTree, donate_argnums: int | tuple[int, ...] = 0
) -> tuple[Any, dict[str, float]]:
    """Compiles a step whose first argument, or those numbered, are donated.

    Returns:
        The compiled step, and what is known before it runs: `compile_seconds`, and in
        bytes `temp_bytes` (what it needs beside arguments and results) and
        `total_bytes` (with them, what is donated counted once).
    """
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=donate_argnums).lower(*args).compile()
    seconds = time.perf_counter() - start
    return compiled, {"compile_seconds": seconds, **memory_of(compiled)}


def memory_of(compiled: Any) -> dict[str, int]:
    """In XLA's own account: `temp_bytes`, and with arguments and results `total_bytes`.

    What is donated is counted once. On several devices, that of one of them.
    """
    memory = compiled.memory_analysis()
    temp = memory.temp_size_in_bytes
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "temp_bytes": temp,
        "total_bytes": kept - memory.alias_size_in_bytes + temp,
    }


def time_in_turns(
    runs: Mapping[str, Callable[[], PyTree]],
    rounds: int,
    repeats: Mapping[str, int] | None = None,
    *,
    wait: Callable[[PyTree], Any] = jax.block_until_ready,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of every run in every round: all take a turn, then all take another.

    A machine that slows down for a while then slows all of them: ratios within a round
    hold where seconds do not. A first round warms up and is not counted.

    Args:
        runs: by name, what to time.
        rounds: how many times.
        repeats: by name, how many steps one call of a run makes, by default one; the
            seconds are those of one step.
        wait: what is done with a run's result before the clock is stopped.
        pause: seconds before every turn, for threads that still spin after theirs.
    """
    repeats = repeats or dict.fromkeys(runs, 1)
    seconds = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(rounds + 1):
        # In one order for ever, some would always find the caches as the largest left
        # them.
        shuffle(order)
        for name in order:
            time.sleep(pause)
            start = time.perf_counter()
            wait(runs[name]())
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: times[1:] for name, times in seconds.items()}


def ratios(times: list[float], baseline: list[float]) -> dict[str, float]:
    """Median, least and greatest of the ratios of paired times."""
    paired = [time / base for time, base in zip(times, baseline, strict=True)]
    return {
        "median": statistics.median(paired),
        "min": min(paired),
        "max": max(paired),
    }


def tree_bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def distance(actual: PyTree, expected: PyTree) -> float:
    """The norm of the difference of two trees over the norm of the second."""
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise ValueError("The two trees differ in structure.")
    off, size = 0.0, 0.0
    for got, want in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        if got.shape != want.shape:
            raise ValueError(f"A leaf has shape {got.shape} instead of {want.shape}.")
        off += ((got - want) ** 2).sum()
        size += (want**2).sum()
    if not size:
        raise ValueError("There is nothing to compare with: the tree is empty or zero.")
    return float(np.sqrt(off / size))


@jax.jit
def distance_on_device(actual: PyTree, expected: PyTree) -> jax.Array:
    """As `distance`, in float32, of what is too large to be moved to the host."""

    def norm(tree):
        return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))

    return norm(jax.tree.map(jnp.subtract, actual, expected)) / norm(expected)


def check_equal(
    name: str,
    actual: PyTree,
    expected: PyTree,
    tolerance: float = 1e-5,
    *,
    distance: Callable[[PyTree, PyTree], Any] = distance,
) -> float:
    """The distance of two trees. What is not equal is not worth timing.

    Args:
        name: whose answer it is.
        actual: the answer.
        expected: the one that it is compared with.
        tolerance: the largest distance.
        distance: how it is found; `distance_on_device` for large trees.

    Raises:
        ValueError: it is more than `tolerance`, or NaN, or there is nothing to compare.
    """
    found = float(distance(actual, expected))
    if not found <= tolerance:  # NaN compares false
        raise ValueError(
            f"The answer of {name!r} is {found:.1e} away from the one it is compared "
            f"with, more than {tolerance:.0e}: it is not timed."
        )
    return found


def full_precision():
    """A context in which a GPU multiplies float32 as it is.

    By default it rounds factors to 11 bits: another cut is another rounding.
    """
    return jax.default_matmul_precision("highest")


def environment(device: jax.Device | None = None) -> dict[str, Any]:
    """What a figure depends on besides the code.

    Args:
        device: what is measured, there or not; by default the first that is there.
    """
    packages = ("jax", "jaxlib", "optax", "jaxga")
    device = device or jax.devices()[0]
    return {
        "device_kind": device.device_kind,
        "backend": device.platform,
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
    }


def save(name: str, result: Mapping[str, Any], path: Path | None = None) -> Path:
    """Writes a result, by default to `results/<device kind>/<name>.json`.

    What is `compiled_only` has a folder of its own beside that.
    """
    kind = result["environment"]["device_kind"].lower()
    folder = re.sub(r"[^a-z0-9]+", "-", kind)
    if result.get("compiled_only"):
        folder += "-compiled-only"
    path = path or RESULTS / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(result), indent=2) + "\n")
    return path


def options(doc: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options that scripts share.

    Args:
        doc: the script's docstring, whose first line is its question.
        rounds: the default of `--rounds`, for a script that times.
    """
    parser = argparse.ArgumentParser(description=_question(doc))
    if rounds is not None:
        help = "timed rounds, after one to warm up; default: %(default)s"
        parser.add_argument("--rounds", type=int, default=rounds, help=help)
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    return parser


def parse_options(
    parser: argparse.ArgumentParser, argv: list[str] | None, *partial: str
) -> argparse.Namespace:
    """The options given, refused where they would spoil the results that are kept.

    Args:
        parser: of a script.
        argv: its arguments; None for those of the process.
        partial: the options of which only the defaults belong into the kept results.
    """
    args = parser.parse_args(argv)
    for name in partial:
        if args.output is None and getattr(args, name) != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} needs --output: the kept results are the defaults'")
    return args


def add_size(parser: argparse.ArgumentParser, sizes: Mapping[str, Any]) -> None:
    """`--size`: small on a CPU, large on an accelerator."""
    default = "small" if jax.default_backend() == "cpu" else "large"
    help = "default here: %(default)s"
    parser.add_argument("--size", choices=sizes, default=default, help=help)


def publish(
    name: str,
    doc: str,
    found: Mapping[str, Any],
    table: Callable[[Mapping[str, Any]], str],
    path: Path | None = None,
    *,
    device: jax.Device | None = None,
) -> None:
    """Saves what a script found, with its question and the machine; prints its table.

    Args:
        name: the script's name, without `.py`.
        doc: its docstring.
        found: what it measured.
        table: makes Markdown of the result.
        path: where to write it; by default where `save` does.
        device: what was measured, as for `environment`.
    """
    head = {"question": _question(doc), "environment": environment(device)}
    path = save(name, head | found, path)
    # As it was saved: a table from the file is this one.
    print(table(json.loads(path.read_text())))
    print(f"\nwritten to {path}")


def _question(doc):
    return doc.splitlines()[0]


def _processor():
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    told = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", told)
    return name[1] if name else platform.processor()


def _commit():
    """The commit that was measured; outside a git checkout, what the script is told."""

    def git(*args):
        command = ("git", *args)
        root = Path(__file__).parent.parent
        return subprocess.check_output(
            command, cwd=root, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        measured = ("jaxga", "benchmarks/*.py", "examples/*.py")
        changed = git("status", "--porcelain", "--", *measured)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCHMARK_COMMIT")


def _rounded(value):
    """Four digits are more than any of the times has."""
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
