"""What the README of the library says of results in its text: examples, precision."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import markdown

Result = Mapping[str, Any]


def precision_paragraph(found: Sequence[Result]) -> str:
    """How far gradients are from float64, in words."""
    parts = [_precision_words(result) for result in found]
    return markdown.join(parts) if parts else "Not measured yet."


def _precision_words(result: Result) -> str:
    errors, show = result["errors"], markdown.error
    half = [
        *errors["bfloat16 computation"].values(),
        *errors["bfloat16 parameters"].values(),
    ]
    narrow = errors["bfloat16 parameters and sums"]
    most = list(narrow)[-1]
    single = [f"{show(e)} over {int(n):,}" for n, e in errors["float32"].items()]
    scaled = max(errors["float16 computation, loss scale 2^15"].values())
    some = list(narrow)[len(narrow) // 2]
    words = (
        f"Of a small transformer, a gradient's relative error (the norm of its "
        f"difference to float64, over its norm) is in float32 {', '.join(single)} "
        f"micro-batches. In bfloat16 it is {show(min(half))} to {show(max(half))}, "
        f"over {int(most):,} micro-batches no more than over one; summed in bfloat16 "
        f"(`accum_dtype=jnp.bfloat16`) {show(narrow[some])} over {int(some):,} and "
        f"{show(narrow[most])} over {int(most):,}. In float16, with a loss scale, it "
        f"is {show(scaled)}."
    )
    return _filled(words)


def weight_gradients_parts(found: Iterable[Result]) -> Iterator[str]:
    """What the ways to make weight gradients move in a GPU's memory."""
    for result in found:
        programs = result.get("programs")
        if programs:
            not_run = ", compiled and not run" if result["compiled_only"] else ""
            yield _filled(
                f"Bytes of weights and their gradients that are read and written, for "
                f"each parameter and micro-batch, on an "
                f"{result['environment']['device_kind']}{not_run}:"
            )
            rows = [(words, *_moved(programs, way)) for way, words in _WAYS.items()]
            header = ("", *(f"layers {kind}" for kind in programs))
            yield markdown.table([header, *rows])


def _moved(programs, way):
    return [f"{found[way]['bytes_per_parameter']:.0f}" for found in programs.values()]


_WAYS = {
    "hand-written scan, stock": "hand-written scan",
    "stock": "jaxga",
    "stock, cast once": "jaxga, weights cast once",
    "float32": "jaxga, `float32_wgrad`",
    "float32, compiler option": "jaxga, `float32_wgrad` and the option",
    "float32, cast once, compiler option": "jaxga, all three",
}


def example_parts(name: str, found: Sequence[Result]) -> list[str]:
    """What an example has found: paragraphs, a table, a block of code.

    Args:
        name: one of `EXAMPLES`.
        found: the results of `examples.py`, one for each machine: the first is told.
    """
    kept = [result["examples"][name] for result in found if name in result["examples"]]
    return list(EXAMPLES[name](kept[0])) if kept else ["Not measured yet."]


def _byte_lm(found: Result) -> Iterator[str]:
    minutes = found["seconds"] / 60
    yield f"It prints, after {minutes:.0f} minutes ({_where(found)}):"
    table = found["printed"][-1 - len(found["runs"]) :]  # with its header
    yield "\n".join(("```", *table, "```"))


def _experts(found: Result) -> Iterator[str]:
    runs, mistake = found["runs"], "all over tokens"
    errors = [run["all"] for name, run in runs.items() if "gradient: jaxga" in name]
    yield _filled(
        f"`examples/experts.py` trains a mixture of experts with three denominators "
        f"(tokens, sequences, and the load balance per micro-batch), in one call and "
        f"streamed: jaxga's gradient is that of all rows to "
        f"{markdown.error(max(errors))} in float64. With everything divided by tokens "
        f"it is off by {_percent(runs[f'gradient: {mistake}']['all'])}, and one of "
        f"{found['experts']} experts gets "
        f"{_percent(runs[f'after training: {mistake}']['busiest'])} of the tokens."
    )


def _batch_size(found: Result) -> Iterator[str]:
    small, grown = found["runs"]["small"], found["runs"]["adaptive"]
    yield _filled(
        f"In `examples/batch_size.py` it grows from {grown['noise_scale_first']:,.0f} "
        f"tokens to {grown['noise_scale_last']:,.0f} (medians of the first and the "
        f"last tenth of the updates), and `num_microbatches` follows it without a "
        f"recompilation: {grown['updates']} updates instead of {small['updates']} for "
        f"the same tokens, held-out loss {grown['held_out']:.3f} instead of "
        f"{small['held_out']:.3f}."
    )


def _contrastive(found: Result) -> Iterator[str]:
    mapped, plain = (
        _percent(found["runs"][f"{found['batch_size']} images, {way}"]["other_view"])
        for way in ("microbatch_map", "plain accumulation")
    )
    yield _filled(
        f"`examples/contrastive.py` shows what the negatives are worth: after "
        f"{found['updates']} updates with {found['batch_size']} digits, in "
        f"micro-batches of {found['microbatch_size']}, the other view of a held-out "
        f"digit is found for {mapped} of them; with plain accumulation, which stays at "
        f"the negatives of a micro-batch, for {plain}."
    )


def _nnx_digits(found: Result) -> Iterator[str]:
    rows = [
        (*words, f"{found['runs'][rule]['first_layer']:.1e}")
        for rule, words in _RULES.items()
    ]
    header = ("rule", "running averages", "distance from the full batch's")
    yield markdown.table([header, *rows])
    yield _filled(
        f"The distances are those of the first layer in `examples/nnx_digits.py` "
        f"({_where(found)})."
    )


_RULES = {
    "batch_norm": ('`"batch_norm"`', "as one batch of all rows would leave them"),
    "mean": (
        '`"mean"`',
        "every micro-batch from the same start, averaged: the spread between them is "
        "lost",
    ),
    "carry": (
        '`"carry"` (default)',
        "one after the other: they move `accum_steps` times per update",
    ),
}
# By name of the example, what the README says of it.
EXAMPLES: dict[str, Callable[[Result], Iterator[str]]] = {
    "byte_lm": _byte_lm,
    "experts": _experts,
    "contrastive": _contrastive,
    "batch_size": _batch_size,
    "nnx_digits": _nnx_digits,
}


def _filled(words):
    # A line does not end between a number and what is kept beside it.
    filled = textwrap.fill(words, 92, break_on_hyphens=False)
    return filled.replace("\N{NO-BREAK SPACE}", " ")


def _percent(share):
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _where(found):
    """Versions and machine, in few words."""
    place = found["environment"]
    cores = f"{place['cpu_count']} CPU cores"
    return f"Python {place['python']}, jax {place['jax']}, {cores}"
