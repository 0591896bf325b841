"""What do the examples find that the README of the library tells of?

    python benchmarks/examples.py                       # CPU, about ten minutes
    python benchmarks/examples.py --only byte_lm        # the others stay as they are
    python benchmarks/examples.py --only experts --output /tmp/found.json -- --steps 9

Each runs as its users run it, with its defaults, in a process of its own: some set
JAX's options for all that comes after. They are made for a CPU, and run there also
beside a GPU. What is kept is what `main` returns, and what it has printed. Each draws
its picture in place; with `--output`, beside the file.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import markdown
from harness import RESULTS, environment, options, publish

FOLDER = Path(__file__).parent.parent / "examples"
KEPT = RESULTS / "cpu" / "examples.json"
# By run, by name: the figures of an example.
Figures = dict[str, dict[str, float]]


def of_byte_lm(module: ModuleType, returned: Any) -> dict[str, Any]:
    return {"runs": returned}


def of_experts(module: ModuleType, returned: Any) -> dict[str, Any]:
    errors, held_out = returned
    runs = {f"gradient: {name}": parts for name, parts in errors.items()}
    for name, scores in held_out.items():
        runs[f"after training: {name}"] = _numbers(scores)
    return {"experts": module.EXPERTS, "runs": runs}


def of_nnx_digits(module: ModuleType, returned: Any) -> dict[str, Any]:
    runs = {}
    for name, (_, distances, results) in returned.items():
        first, second = distances[-1]
        found = {"first_layer": first, "second_layer": second, **results}
        runs[name] = _numbers(found)
    return {"runs": runs}


def of_batch_size(module: ModuleType, returned: Any) -> dict[str, Any]:
    runs, measured = returned
    found = {}
    for name, run in runs.items():
        first, last = module.first_and_last(run.noise_scale)
        figures = {"noise_scale_first": first, "noise_scale_last": last}
        figures["held_out"] = measured[name].loss[-1]
        found[name] = {"updates": len(run.tokens), **_numbers(figures)}
    return {"runs": found}


def of_contrastive(module: ModuleType, returned: Any) -> dict[str, Any]:
    runs = {}
    for rows, found in returned.items():
        for name, scores in found["scores"].items():
            view, label = zip(*scores, strict=True)
            runs[f"{rows} images, {name}"] = {
                "other_view": sum(view) / len(view),
                "label": sum(label) / len(label),
            }
    most = max(returned)
    return {
        "updates": returned[most]["updates"],
        "batch_size": most,
        "microbatch_size": module.MICROBATCH_SIZE,
        "runs": runs,
    }


def _numbers(figures):
    """Plain ones, of whatever arrays they were."""
    return {name: float(value) for name, value in figures.items()}


# By the name of the example: what is kept of it.
EXAMPLES: dict[str, Callable[[ModuleType, Any], dict[str, Any]]] = {
    "byte_lm": of_byte_lm,
    "experts": of_experts,
    "nnx_digits": of_nnx_digits,
    "batch_size": of_batch_size,
    "contrastive": of_contrastive,
}


def run_here(name: str, folder: Path, argv: list[str]) -> dict[str, Any]:
    """Runs an example in this process, in a folder; what is kept of it."""
    sys.path.insert(0, str(FOLDER))
    os.chdir(folder)
    module, printed, start = importlib.import_module(name), io.StringIO(), time.time()
    with contextlib.redirect_stdout(printed):
        returned = module.main(argv)
    return {
        "flags": argv,
        "seconds": time.time() - start,
        "environment": environment(),
        **EXAMPLES[name](module, returned),
        "printed": printed.getvalue().splitlines(),
    }


def run(name: str, folder: Path, argv: list[str]) -> dict[str, Any]:
    """The same in a process of its own; shows what it printed."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        found = process.submit(run_here, name, folder, argv).result()
    print("\n".join(found["printed"]), end="\n\n", flush=True)
    return found


def table(result: Mapping[str, Any]) -> str:
    """A table for each example: a row for each of its runs."""
    return markdown.join(
        part for item in result["examples"].items() for part in _table(*item)
    )


def _table(name, found):
    columns = list(dict.fromkeys(key for run in found["runs"].values() for key in run))
    rows = [
        (run, *(f"{figures[key]:.4g}" if key in figures else "" for key in columns))
        for run, figures in found["runs"].items()
    ]
    seconds, where = found["seconds"], markdown.setting(found["environment"])
    yield f"`{name}.py`, {seconds:.0f} s. {where}"
    yield markdown.table([("", *(key.replace("_", " ") for key in columns)), *rows])


def main(argv: list[str] | None = None) -> None:
    args = parse_options(argv)
    # Of the processes to come, and of this one.
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    path = args.output or KEPT
    folder = path.resolve().parent if args.output else FOLDER
    found = {name: run(name, folder, args.flags) for name in args.only}
    if path.exists():
        found = json.loads(path.read_text())["examples"] | found
    ordered = {name: found[name] for name in EXAMPLES if name in found}
    publish("examples", __doc__, {"examples": ordered}, table, path)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    names = list(EXAMPLES)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"of {', '.join(names)}; default: all",
    )
    parser.add_argument(
        "flags", nargs="*", help="after --, flags for the examples, to try something"
    )
    args = parser.parse_args(argv)
    if args.flags and not args.output:
        parser.error("flags for the examples need --output: the defaults are kept")
    return args


if __name__ == "__main__":
    main()
