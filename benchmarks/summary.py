"""What the README of the library says of the results: headlines, and the examples."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import markdown

Result = Mapping[str, Any]
# A row: what is measured, what jaxga has, what the others have.
Rows = Iterator[tuple[str, str, str]]


def summary_table(found: Mapping[str, Sequence[Result]]) -> str:
    """A table of headlines for each machine.

    Args:
        found: the results by name of the script, one for each device.
    """
    by_machine = {}
    for name, headline in HEADLINES.items():
        for result in found.get(name, ()):
            rows = by_machine.setdefault(markdown.machine(result["environment"]), [])
            rows += headline(result)
    return markdown.join(
        markdown.join(machine, markdown.table([("", "jaxga", "beside it"), *rows]))
        for machine, rows in by_machine.items()
        if rows
    )


def precision_paragraph(found: Sequence[Result]) -> str:
    """How far gradients are from float64, in words."""
    parts = [_precision_words(result) for result in found]
    return markdown.join(parts) if parts else "Not measured yet."


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


def _cycle(result: Result) -> Rows:
    for model in result["models"]:
        contenders, steps = model["contenders"], model["accum_steps"]
        jaxga, others = _split(contenders, _CYCLE_PEERS)
        beyond = _beyond_plain(model, "total_bytes")

        def time(found):
            return _ratio(found["time_to_parts"])

        what = f"cycle of {steps}, layers {model['model']}"
        times = f"{what}: time, over {steps} gradients and an update"
        memory = f"{what}: memory beyond a plain step's, in gradients"
        yield times, time(jaxga), _each(others, time)
        yield memory, beyond(jaxga), _each(others, beyond)


_CYCLE_PEERS = ("hand-written scan", "optax.microbatch", "optax.MultiSteps")


def _streaming(result: Result) -> Rows:
    contenders = result["contenders"]
    names = {"jaxga step": "`tx.step`", "jaxga update": "`update` and `apply_updates`"}
    floor, multisteps = contenders["bare add + AdamW"], contenders["optax.MultiSteps"]

    def both(show):
        return "; ".join(f"{word} {show(contenders[n])}" for n, word in names.items())

    def call(found):
        return f"{found['mid_call_ms']:.3g} ms"

    def cycle(found):
        return _ratio(found["time_to_floor"])

    yield (
        "call in mid-cycle, the optimizer's side",
        both(call),
        f"a bare addition {call(floor)}; optax.MultiSteps {call(multisteps)}",
    )
    yield (
        f"cycle of {result['accum_steps']} calls, over bare additions and an AdamW",
        both(cycle),
        f"optax.MultiSteps {cycle(multisteps)}",
    )


def _precision(result: Result) -> Rows:
    errors = result["errors"]
    narrow = errors["float32, sums in bfloat16"]
    for count in ("64", "1024"):
        if count in narrow:
            yield (
                f"float32 gradient of {int(count):,} micro-batches, error to float64",
                markdown.error(errors["float32"][count]),
                f"sums in bfloat16 {markdown.error(narrow[count])}",
            )


def _compile_time(result: Result) -> Rows:
    jaxga, others = _split(
        result["contenders"],
        ("hand-written scan", "loop in Python"),
        "jaxga.value_and_grad",
    )
    first, last = list(jaxga)[0], list(jaxga)[-1]

    def times(found):
        most = list(found)[-1]
        times = found[most]["total_seconds"] / found[first]["total_seconds"]
        return f"{times:.2g}" + (f" (of {most})" if most != last else "")

    yield (
        f"compile time of {last} micro-batches, over that of {first}",
        times(jaxga),
        _each(others, times),
    )


def _communication(result: Result) -> Rows:
    most = list(result["steps"]["zero=0"])[-1]

    def sent(name):
        size = _sent(result["steps"][name][most], int(most))
        return f"{size / result['gradient_bytes']:.2f}"

    loops = [name for name in result["steps"] if name.startswith("loop")]
    yield (
        f"sent by each of {most} devices per update of {result['accum_steps']} "
        "micro-batches, in float32 gradients",
        "; ".join(f"`zero={stage}` {sent(f'zero={stage}')}" for stage in range(4)),
        "; ".join(f"{name} {sent(name)}" for name in loops),
    )


def _sent(groups, devices):
    """Bytes that leave a device in an update, in a ring of all devices."""
    shares = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}
    sizes = (shares[g["kind"]] * g["bytes_per_update"] for g in groups)
    return sum(sizes) * (devices - 1) / devices


def _extras(result: Result) -> Rows:
    extras = result["extras"]
    costs = (
        f"{name} {_ratio(extras[name]['time'])}"
        for name in _CHEAP
        if extras[name]["beside"] == "none"
    )
    yield "time of a step, over that without", "; ".join(costs), ""


_CHEAP = (
    "four metrics",
    'nonfinite="skip_cycle"',
    "traced num_microbatches",
    "noise scale, of micro-batches",
)


def _layouts(result: Result) -> Rows:
    model = result["models"][0]
    jaxga, others = _split(model["layouts"], _LAYOUT_PEERS, "zero=3")

    def temporaries(found):
        return f"{found['temp_bytes'] / 2**30:.2f} GiB"

    def sent(found):
        groups = found["collectives"]
        size = _sent(groups, _LAYOUT_DEVICES) / 2**30
        hidden = sum(group["hidden_bytes_per_update"] for group in groups)
        hidden /= sum(group["bytes_per_update"] for group in groups)
        return f"{size:.1f} GiB ({hidden:.0%})"

    what = f"{model['parameters'] / 1e9:.2g} billion parameters, `zero=3`"
    each = "of each device (compiled, not run)"
    yield f"{what}: temporaries {each}", temporaries(jaxga), _each(others, temporaries)
    yield (
        f"{what}: sent by each device in an update (gradients by jaxga in float32, by "
        "the loops in bfloat16), and what share behind matrix products (compiled, not "
        "run)",
        sent(jaxga),
        _each(others, sent),
    )


_LAYOUT_DEVICES = 8
_LAYOUT_PEERS = ("GSPMD loop, FSDP", "GSPMD loop, FSDP, activations constrained")


def _against_torch(result: Result) -> Rows:
    jaxga, others = _split(
        result["contenders"], list(result["contenders"])[1:], "jaxga.make_train_step"
    )

    def speed(found):
        return f"{found['tokens_per_second']:,.0f}"

    yield (
        f"tokens per second, a GPT of {result['parameters'] / 1e6:.1f} M parameters, "
        f"{result['dtype']}",
        speed(jaxga),
        _each(others, speed),
    )


def _microbatch_map(result: Result) -> Rows:
    for model in result["models"]:
        mapped, others = _split(
            model["contenders"], ("checkpoint in lax.map",), "jaxga.microbatch_map"
        )

        def time(found):
            return _ratio(found["time_to_full_batch"])

        def memory(found):
            return f"{found['temp_and_gradient']:.2f}"

        what = f"`microbatch_map`, layers {model['model']}"
        for measure, show in (
            ("time over the full batch's", time),
            ("temporaries and gradient, in gradients", memory),
        ):
            yield f"{what}: {measure}", show(mapped), _each(others, show)


def _gpu(result: Result) -> Rows:
    for setting in result["settings"]:
        jaxga, others = _split(setting["contenders"], _CYCLE_PEERS)
        steps, tokens = setting["accum_steps"], setting["tokens"]
        what = (
            f"{setting['parameters'] / 1e6:,.0f} M parameters, layers "
            f"{setting['model']}, cycle of {steps} x {tokens:,} tokens"
        )
        if not setting["compiled_only"]:
            yield (
                f"{what}: time, over {steps} gradients and an update",
                _ratio(jaxga["time_to_parts"]),
                _each(others, lambda found: _ratio(found["time_to_parts"])),
            )
        if others:
            beyond = _beyond_plain(setting, "predicted_peak_bytes")
            not_run = " (compiled, not run)" if setting["compiled_only"] else ""
            yield (
                f"{what}: memory beyond a plain step's, in gradients{not_run}",
                beyond(jaxga),
                _each(others, beyond),
            )


def _beyond_plain(model, size):
    """Shows what a contender needs beyond a step without accumulation."""
    plain, gradient = model["contenders"]["plain step"], model["gradient_bytes"]
    return lambda found: f"{(found[size] - plain[size]) / gradient:.2f}"


HEADLINES: dict[str, Callable[[Result], Rows]] = {
    "cycle": _cycle,
    "streaming": _streaming,
    "precision": _precision,
    "compile_time": _compile_time,
    "communication": _communication,
    "against_torch": _against_torch,
    "microbatch_map": _microbatch_map,
    "extras": _extras,
    "gpu_cycle": _gpu,
    "gpu_peers": _gpu,
    "gpu_large": _gpu,
    "layouts": _layouts,
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


def _split(contenders, peers, name="jaxga.make_train_step"):
    return contenders[name], {
        peer: contenders[peer] for peer in peers if peer in contenders
    }


def _each(others, show):
    return "; ".join(f"{name} {show(found)}" for name, found in others.items())


def _ratio(ratio):
    """The median, and the least and the greatest: a figure without them says little."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
