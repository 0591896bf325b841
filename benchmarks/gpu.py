"""What does accumulation cost on this GPU? All questions at once.

    pip install "jax[cuda13]" optax jaxga      # and torch, accelerate to compare with
    python benchmarks/gpu.py                   # what ten minutes suffice for
    python benchmarks/gpu.py --questions large peaks           # some of them
    python benchmarks/gpu.py --size tiny --output /tmp/found   # a CPU will do, to try
    python benchmarks/gpu.py --target h200.txtpb               # compiled, not run

Each question runs in a process of its own: one that fails says why, and the others run;
the exit status then is not 0. Results are kept as every script's, in
`results/<device kind>/gpu_<question>.json` or under these names where `--output` says,
one setting at a time: what is cut off at the limit has kept what it had, and says so.
Outside a git checkout they name the commit that the variable `BENCHMARK_COMMIT` has. A
folder in `JAX_COMPILATION_CACHE_DIR` keeps what is compiled for the next call of the
script. `layouts.py` says what `--target` is.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_questions
import jax
import markdown
from compiled import devices_of
from contenders import GRADIENT, PLAIN, UPDATE
from harness import environment, options, parse_options, save

_HERE = Path(__file__).parent
# In the order of what is missed most: the last are left out where time runs out.
_ORDER = (
    *("cycle", "peers", "against_torch", "streaming", "large", "peaks", "fusion"),
    *("weight_gradients", "traced", "extras", "microbatch_map", "memory_plan"),
)
# Those that are scripts of their own, with what makes them tiny.
_SCRIPTS = {
    "against_torch": ("--size", "tiny"),
    "streaming": ("--size", "tiny"),
    "weight_gradients": ("--size", "tiny", "--errors", "tiny"),
    "extras": ("--size", "tiny"),
    "microbatch_map": ("--size", "tiny"),
    "memory_plan": ("--size", "small"),
}
_UNTIMED = ("memory_plan",)
_NEEDS = {"against_torch": ("torch", "accelerate")}  # beside jaxga
_RUNS = (*_SCRIPTS, "peaks")  # nothing of these can be said of what is only compiled
_LEAST = 10  # seconds that are worth starting a question for


def run_all(args) -> int:
    """Runs the questions one after the other; the number of those without an answer."""
    end, missing = time.monotonic() + args.limit, []
    with tempfile.TemporaryDirectory() as cache:
        for question in args.questions:
            if lacking := _lacks(question):
                print(f"{question}: skipped, {' and '.join(lacking)} not installed.\n")
                continue
            start = time.monotonic()
            if not _run(question, args, cache, end - start):
                missing.append(question)
            seconds = time.monotonic() - start
            print(f"\n[{question}: {seconds:.0f} s]\n", flush=True)
    if missing:
        again = " ".join(missing)
        print(f"Not answered: to ask again, --questions {again}", file=sys.stderr)
    return len(missing)


def _lacks(question):
    needed = _NEEDS.get(question, ())
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _run(question, args, cache, limit) -> bool:
    if limit < _LEAST:
        print(f"{question}: left out, the {args.limit} s are over.", file=sys.stderr)
        return False
    # A session of its own: its processes end with it, and leave the GPU to the next.
    process = subprocess.Popen(
        _command(question, args),
        env=os.environ | _variables(question, cache),
        start_new_session=True,
    )
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"{question}: stopped, the {args.limit} s are over.", file=sys.stderr)
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        # Its own message stands above.
        print(f"{question}: failed with status {status}.", file=sys.stderr)
    return not status


def _variables(question, cache):
    # What one process has compiled, or tuned, the next one need not.
    found = {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if question in gpu_questions.QUESTIONS:
        # Its own processes need room beside it.
        found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return found


def _command(question, args):
    output = []
    if args.output:
        output = ["--output", str(args.output / f"{_kept_as(question)}.json")]
    rounds = [] if question in _UNTIMED else ["--rounds", str(args.rounds)]
    if question in _SCRIPTS:
        tiny = _SCRIPTS[question] if args.size else ()
        script = str(_HERE / f"{question}.py")
        return [sys.executable, script, *tiny, *rounds, *output]
    size = ["--size", args.size] if args.size else []
    target = ["--target", str(args.target)] if args.target else []
    command = [sys.executable, __file__, "--question", question]
    return [*command, *size, *rounds, *output, *target]


def _kept_as(question):
    return question if question in _SCRIPTS else f"gpu_{question}"


def ask(args) -> None:
    """One question, in this process."""
    machine = _machine(args)
    question = gpu_questions.QUESTIONS[args.question]
    found = {
        "question": question.__doc__.splitlines()[0],
        "environment": environment(machine.device),
        "compiled_only": machine.device is not None,
        "complete": False,
        "settings": [],
    }
    print(_head(found | {"complete": True}), flush=True)
    for setting in question(machine):
        found["settings"].append(setting)
        save(_kept_as(args.question), found, args.output)
        print(f"\n{_part(setting)}", flush=True)
    path = save(_kept_as(args.question), found | {"complete": True}, args.output)
    print(f"\nwritten to {path}")


def _machine(args):
    tiny, device = args.size == "tiny", None
    if args.target:
        # What is compiled for a GPU needs none, and one that is there is left alone.
        jax.config.update("jax_platforms", "cpu")
        (device,) = devices_of(args.target, 1)
    on_gpu = jax.default_backend() == "gpu" or device is not None
    if not on_gpu and not tiny:
        sys.exit(
            "benchmarks/gpu.py found no GPU: JAX runs on the "
            f"{jax.default_backend()!r} backend. Install jax[cuda13], or try the "
            "script with --size tiny, or compile for a GPU with --target."
        )
    return gpu_questions.Machine(on_gpu, tiny, args.rounds, device)


def table(result) -> str:
    """The result of one question as Markdown."""
    return markdown.join(_head(result), map(_part, result["settings"]))


def _head(result):
    cut_off = "" if result["complete"] else " Cut off: not all was measured."
    setting = markdown.setting(result["environment"])
    return f"{result['question']} {setting}.{cut_off}"


def _part(setting):
    rows = [_row(name, found, setting) for name, found in setting["contenders"].items()]
    return markdown.join(_described(setting), markdown.table([_HEADER, *rows]))


_HEADER = (
    "contender",
    "tokens / second",
    "time",
    "time / parts",
    "(least to greatest)",
    "temporaries / gradient",
    "peak, predicted",
    "peak, measured",
    "gradient error",
)


def _row(name, found, setting):
    ratio, seconds = found.get("time_to_parts"), found.get("median_seconds")
    tokens = setting["tokens"] * _microbatches(name, setting)
    return (
        name,
        f"{tokens / seconds:,.0f}" if seconds and tokens else "",
        f"{1e3 * seconds:.4g} ms" if seconds else "",
        f"{ratio['median']:.3f}" if ratio else "",
        markdown.spread(ratio) if ratio else "",
        f"{found['temp_gradients']:.2f}",
        f"{found['predicted_peak_bytes'] / 2**30:.3f} GiB",
        _measured(found),
        markdown.error(found.get("gradient_error")),
    )


def _microbatches(name, setting):
    """How many a contender computes in its time."""
    return {PLAIN: 1, GRADIENT: 1, UPDATE: 0}.get(name, setting["accum_steps"])


def _measured(found):
    if "measured_peak_bytes" not in found:
        return ""
    measured = found["measured_peak_bytes"]
    return f"{measured / 2**30:.3f} GiB" if measured else "not known"


def _described(each):
    losses = each["losses"]
    is_timed = each["rounds"] and not each["compiled_only"]
    rounds = f"; {each['rounds']} rounds" if is_timed else ""
    return (
        f"{'Compiled, not run. ' if each['compiled_only'] else ''}"
        f"Layers {each['model']}{' and rematerialised' if losses['remat'] else ''}: "
        f"{each['layers']} of width {each['width']}, {each['parameters'] / 1e6:.1f} M "
        f"parameters, computed in {losses['dtype']}; cycles of {each['accum_steps']} x "
        f"{each['tokens']:,} tokens{rounds}."
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.peak:
        print(json.dumps(gpu_questions.peak(args.peak, _machine(args))))
    elif args.question:
        ask(args)
    else:
        sys.exit(min(1, run_all(args)))


def parse(argv):
    parser = options(__doc__, rounds=10)
    add = parser.add_argument
    add("--questions", nargs="+", choices=_ORDER, help="instead of all")
    add("--size", choices=["tiny"], help="to try the script; also runs on a CPU")
    add("--target", type=Path, help="description of a GPU to compile for")
    add("--limit", type=float, default=570, help="seconds for everything")
    add("--question", choices=_ORDER, help=argparse.SUPPRESS)
    add("--peak", help=argparse.SUPPRESS)
    args = parse_options(parser, argv, "size")
    if args.questions is None:
        args.questions = [q for q in _ORDER if not (args.target and q in _RUNS)]
    return args


if __name__ == "__main__":
    main()
