"""Pictures of the kept results, beside them.

python benchmarks/pictures.py      # needs matplotlib
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # no screen needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
# Told apart also by those who do not see all colours (Okabe and Ito).
BLACK, BLUE, RED, GREEN, ORANGE, PURPLE, SKY = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
)
PRECISIONS = {
    "float32": (BLUE, "o-"),
    "float32, sums in float64": (SKY, "o:"),
    "float32, sums in bfloat16": (RED, "s--"),
    "bfloat16 computation": (GREEN, "o-"),
    "bfloat16 parameters": (PURPLE, "o-"),
    "bfloat16 parameters and sums": (ORANGE, "s--"),
    "float16 computation, loss scale 2^15": (BLACK, "o-"),
}
CYCLES = {
    "jaxga.make_train_step": (BLUE, "o-"),
    "jaxga.accumulate": (SKY, "o-"),
    "hand-written scan": (BLACK, "s--"),
    "optax.microbatch": (GREEN, "s--"),
    "optax.MultiSteps": (RED, "s--"),
}


def precision(result: Mapping[str, Any]) -> Figure:
    """Error by number of micro-batches, a line for each precision."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    counts = _by_size(axes, "micro-batches", result["errors"]["float32"])
    for name, errors in result["errors"].items():
        color, style = PRECISIONS[name]
        axes.plot(counts, list(errors.values()), style, color=color, label=name)
    axes.set(yscale="log", ylabel="distance of the gradient from float64")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def cycle_sweep(result: Mapping[str, Any]) -> Figure:
    """By number of micro-batches."""
    return _cycles(result, "micro-batches", lambda model: model["accum_steps"])


def cycle_tokens(result: Mapping[str, Any]) -> Figure:
    """By tokens of a micro-batch."""

    def tokens(model):
        return model["microbatch_size"] * model["length"]

    return _cycles(result, "tokens of a micro-batch", tokens)


def _cycles(result, label, size_of):
    """Time of a cycle over that of its parts, layers scanned and unrolled."""
    models = result["models"]
    kinds = list(dict.fromkeys(model["model"] for model in models))
    figure, all_axes = plt.subplots(
        *(1, len(kinds)),
        figsize=(1 + 4.2 * len(kinds), 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for kind, axes in zip(kinds, all_axes[0], strict=True):
        of_kind = [model for model in models if model["model"] == kind]
        sizes = _by_size(axes, label, [size_of(model) for model in of_kind])
        _draw_cycles(axes, sizes, of_kind)
        axes.set_title(f"layers {kind}")
    all_axes[0, 0].set_ylim(bottom=0)  # shared: when all are drawn
    all_axes[0, 0].set_ylabel("time of a cycle / that of its parts")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_cycles(axes, sizes, models):
    axes.axhline(1, color="0.6", linewidth=1)
    for name, (color, style) in CYCLES.items():
        found = [model["contenders"].get(name) for model in models]
        if None not in found:
            ratios = [each["time_to_parts"]["median"] for each in found]
            axes.plot(sizes, ratios, style, color=color, label=name)


def compile_time(result: Mapping[str, Any]) -> Figure:
    """Seconds to compile by number of micro-batches."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    styles = zip((BLUE, BLACK, RED), ("o-", "s--", "s-"), strict=True)
    contenders = result["contenders"]
    _by_size(axes, "micro-batches", max(contenders.values(), key=len))
    for (name, found), (color, style) in zip(contenders.items(), styles, strict=True):
        seconds = [each["total_seconds"] for each in found.values()]
        axes.plot([int(n) for n in found], seconds, style, color=color, label=name)
    axes.set(ylabel="seconds to trace and compile", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def _by_size(axes: Axes, label: str, sizes) -> list[int]:
    """A horizontal axis that doubles."""
    sizes = [int(size) for size in sizes]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    return sizes


PICTURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "precision": precision,
    "cycle_sweep": cycle_sweep,
    "cycle_tokens": cycle_tokens,
    "compile_time": compile_time,
}


def draw(results: Path = RESULTS) -> list[Path]:
    """Draws what there is, each beside its JSON file; returns the pictures."""
    drawn = []
    for name, picture in PICTURES.items():
        for path in sorted(results.glob(f"*/{name}.json")):
            figure = picture(json.loads(path.read_text()))
            figure.savefig(path.with_suffix(".png"), dpi=150)
            plt.close(figure)
            drawn.append(path.with_suffix(".png"))
    return drawn


if __name__ == "__main__":
    for path in draw():
        print(f"written to {path}")
