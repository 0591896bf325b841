"""The headlines of the results, for the README of the library."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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


def _sent(groups, devices, size="bytes_per_update"):
    """Bytes that leave a device in an update, in a ring of all devices."""
    shares = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}
    sizes = (shares[group["kind"]] * group[size] for group in groups)
    return sum(sizes) * (devices - 1) / devices


def _extras(result: Result) -> Rows:
    extras = result["extras"]
    costs = (f"{name} {_ratio(extras[name]['time'])}" for name in _CHEAP)
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
        size = _sent(groups, _LAYOUT_DEVICES)
        hidden = _sent(groups, _LAYOUT_DEVICES, "hidden_bytes_per_update")
        return f"{size / 2**30:.1f} GiB ({hidden / size:.0%})"

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


def _split(contenders, peers, name="jaxga.make_train_step"):
    return contenders[name], {
        peer: contenders[peer] for peer in peers if peer in contenders
    }


def _each(others, show):
    return "; ".join(f"{name} {show(found)}" for name, found in others.items())


def _ratio(ratio):
    """The median, and the least and the greatest: a figure without them says little."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
