"""Tables from the kept results, for the terminal and for the READMEs.

python benchmarks/tables.py      # rewrites those in benchmarks/README.md and README.md
"""

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import markdown
from paragraphs import (
    EXAMPLES,
    example_parts,
    precision_paragraph,
    weight_gradients_parts,
)
from summary import HEADLINES, summary_table

_HERE = Path(__file__).parent
# By the name of its markers: the results that a table is made of (a pattern of files),
# and the function that makes it. Imported when needed: scripts import this module.
TABLES = {
    "cycle": ("cycle", "tables.cycle_table"),
    "cycle_sweep": ("cycle_sweep", "cycle.sweep_table"),
    "cycle_tokens": ("cycle_tokens", "cycle.sweep_table"),
    "memory": ("cycle_sweep", "tables.memory_table"),
    "streaming": ("streaming", "streaming.table"),
    "precision": ("precision", "precision.table"),
    "compile_time": ("compile_time", "compile_time.table"),
    "communication": ("communication", "communication.table"),
    "extras": ("extras", "extras.table"),
    "weight_gradients": ("weight_gradients", "weight_gradients.table"),
    "microbatch_map": ("microbatch_map", "microbatch_map.table"),
    "memory_plan": ("memory_plan", "memory_plan.table"),
    "against_torch": ("against_torch", "against_torch.table"),
    "gpu": ("gpu_*", "gpu.table"),
    "examples": ("examples", "examples.table"),
    "layouts": ("layouts", "tables.layouts_table"),
}


def readme(text: str, results: Path = _HERE / "results") -> str:
    """The README of the benchmarks with its tables made anew from the results."""
    for name, (source, place) in TABLES.items():
        tables = [_function(place)(result) for result in load(source, results)]
        text = between(text, f"{name} tables", tables)
    return text


def _function(place):
    module, function = place.split(".")
    return getattr(importlib.import_module(module), function)


def root_readme(text: str, results: Path = _HERE / "results") -> str:
    """The README of the library, with what the results say of it made anew."""
    found = {name: list(load(name, results)) for name in HEADLINES}
    examples = list(load("examples", results))
    for name in EXAMPLES:
        text = between(text, f"{name} example", example_parts(name, examples))
    weights = weight_gradients_parts(load("weight_gradients", results))
    text = between(text, "weight_gradients", list(weights))
    text = between(text, "benchmarks", [summary_table(found)])
    return between(text, "precision", [precision_paragraph(found["precision"])])


def load(name: str, results: Path) -> Iterator[dict[str, Any]]:
    """The results of one kind, or of all that match a pattern, of all devices."""
    for path in sorted(results.glob(f"*/{name}.json")):
        yield json.loads(path.read_text())


def between(text: str, name: str, parts: list[str]) -> str:
    """The text with other parts between the markers of a name.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    found = re.findall(f"{re.escape(begin)}|{re.escape(end)}", text)
    if found != [begin, end]:
        raise ValueError(f"The README needs {begin} and, after it, {end}, once each.")
    before, rest = text.split(begin)
    return markdown.join(before + begin, parts, end + rest.split(end)[1])


def cycle_table(result: Mapping[str, Any]) -> str:
    """The result of `cycle.py` as Markdown."""
    parts = [markdown.setting(result["environment"])]
    for model in result["models"]:
        parts.append(_model(model))
        rows = [_cycle_row(name, found) for name, found in model["contenders"].items()]
        parts.append(markdown.table([_CYCLE_HEADER, *rows]))
    return markdown.join(parts)


def memory_table(result: Mapping[str, Any]) -> str:
    """Memory in the result of a sweep of `cycle.py`, as Markdown."""
    models = result["models"]
    peers = [n for n, c in models[0]["contenders"].items() if c["time_to_parts"]]
    rows = [_memory_row(model, peers) for model in models]
    header = ("layers", "micro-batches", "tokens in each", "plain step", *peers)
    setting = markdown.setting(result["environment"])
    return markdown.join(setting, markdown.table([header, *rows]))


def _memory_row(model, peers):
    total = {
        name: found["total_bytes"] / model["gradient_bytes"]
        for name, found in model["contenders"].items()
    }
    plain = total["plain step"]
    tokens = model["microbatch_size"] * model["length"]
    setting = (model["model"], f"{model['accum_steps']}", f"{tokens:,}")
    beyond = (f"{total[name] - plain:+.2f}" for name in peers)
    return *setting, f"{plain:.2f}", *beyond


def layouts_table(result: Mapping[str, Any]) -> str:
    """The result of `layouts.py` as Markdown."""
    parts = [markdown.setting(result["environment"])]
    for model in result["models"]:
        groups = (
            g for found in model["layouts"].values() for g in found["collectives"]
        )
        kinds = sorted({group["kind"] for group in groups})
        unit = "GiB" if model["gradient_bytes"] > 2**30 else "MiB"
        rows = [_layouts_row(*item, kinds, unit) for item in model["layouts"].items()]
        parts.append(_compiled(model, unit))
        parts.append(markdown.table([(*_LAYOUTS_HEADER, *kinds, "hidden"), *rows]))
    return markdown.join(parts)


_CYCLE_HEADER = (
    "contender",
    "temporaries / gradient",
    "time / full batch",
    "(least to greatest)",
    "time / parts",
    "gradient error",
    "on rows of one length",
    "compile",
)


def _cycle_row(name, found):
    full, parts = found["time_to_full_batch"], found["time_to_parts"]
    error = found["gradient_error"]
    return (
        name,
        f"{found['temp_gradients']:.2f}",
        f"{full['median']:.3f}",
        markdown.spread(full),
        f"{parts['median']:.3f}" if parts else "",
        markdown.error(error),
        markdown.error(found["even_gradient_error"]),
        f"{found['compile_seconds']:.1f} s",
    )


_LAYOUTS_HEADER = ("layout", "arguments", "temporaries", "peak")


def _layouts_row(name, found, kinds, unit):
    groups = found["collectives"]
    moved = sum(group["bytes_per_update"] for group in groups)
    hidden = sum(group["hidden_bytes_per_update"] for group in groups)
    memory = (found[f"{part}_bytes"] for part in ("argument", "temp", "peak"))
    cells = (_moved([g for g in groups if g["kind"] == kind], unit) for kind in kinds)
    return name, *(_in(unit, size) for size in memory), *cells, f"{hidden / moved:.0%}"


def _moved(groups, unit):
    """Of one kind: what is moved outside loops, and what in them."""
    parts = [
        f"{_in(unit, group['bytes_per_update'])} in {group['per_update']:,}"
        + (" (loop)" if group["in_loop"] else "")
        for group in groups
    ]
    return "; ".join(parts)


def _in(unit, size):
    return f"{size / {'GiB': 2**30, 'MiB': 2**20}[unit]:.2f}"


def _model(model):
    return (
        f"Layers {model['model']}: {model['layers']} of width {model['width']}, "
        f"{model['parameters'] / 1e6:.1f} M parameters "
        f"(a gradient of {model['gradient_bytes'] / 1e6:.0f} MB); "
        f"{model['accum_steps']} micro-batches of {model['microbatch_size']} rows of "
        f"{model['length']} tokens; {model['rounds']} rounds; full batch "
        f"{model['contenders']['full batch']['median_seconds']:.3g} s."
    )


def _compiled(model, unit):
    gradient = _in(unit, model["gradient_bytes"])
    return (
        f"Compiled, not run. Layers {model['model']}: {model['layers']} of width "
        f"{model['width']}, {model['parameters'] / 1e6:.4g} M parameters (a gradient "
        f"of {gradient} {unit}); {model['accum_steps']} micro-batches of "
        f"{model['rows']} rows of {model['length']} tokens on each device. "
        f"Sizes in {unit}, on each device; collectives of one update."
    )


def main() -> None:
    for path, rewrite in (
        (_HERE / "README.md", readme),
        (_HERE.parent / "README.md", root_readme),
    ):
        path.write_text(rewrite(path.read_text()))


if __name__ == "__main__":
    main()
