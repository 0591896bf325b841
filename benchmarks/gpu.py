"""What does accumulation cost on this GPU? All questions at once.

    pip install "jax[cuda13]" optax jaxga      # and torch, accelerate for the last one
    python benchmarks/gpu.py                   # NVIDIA H200: under ten minutes
    python benchmarks/gpu.py --size tiny       # a CPU will do, to try the script
    python benchmarks/gpu.py --target h200.txtpb      # compiled for a GPU, not run

Each question runs in a process of its own: one that fails says why, and the others run;
the exit status then is not 0. Results are kept as every script's, in
`results/<device kind>/gpu_<question>.json`, one setting at a time: what is cut off at
the limit has kept what it had. `--target` is explained in `layouts.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import markdown

_HERE = Path(__file__).parent
# In the order of what is missed most: the last are left out where time runs out.
_ORDER = ("cycle", "peers", "against_torch", "streaming", "fusion", "traced", "large")
_SCRIPTS = ("against_torch", "streaming")
_LEAST = 10  # seconds that are worth starting a question for


def run_all(args) -> int:
    """Runs the questions one after the other; the number of those that failed."""
    end, failed = time.monotonic() + args.limit, []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            # What one process has compiled, or tuned, the next one need not.
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        for question in args.questions:
            start = time.monotonic()
            if not _run(question, args, environment, end - start):
                failed.append(question)
            seconds = time.monotonic() - start
            print(f"\n[{question}: {seconds:.0f} s]\n", flush=True)
    if failed:
        print(f"Failed: {', '.join(failed)}.", file=sys.stderr)
    return len(failed)


def _run(question, args, environment, limit) -> bool:
    if limit < _LEAST:
        print(f"{question}: left out, the {args.limit} s are over.", file=sys.stderr)
        return False
    try:
        subprocess.run(
            _command(question, args), env=environment, timeout=limit, check=True
        )
    except subprocess.TimeoutExpired:
        print(f"{question}: stopped, the {args.limit} s are over.", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        # Its own message stands above.
        print(f"{question}: failed with status {error.returncode}.", file=sys.stderr)
    else:
        return True
    return False


def _command(question, args):
    rounds = ["--rounds", str(args.rounds)]
    size = ["--size", args.size] if args.size else []
    output = []
    if args.output:
        output = ["--output", str(args.output / f"{question}.json")]
    if question in _SCRIPTS:
        return [sys.executable, str(_HERE / f"{question}.py"), *size, *rounds, *output]
    target = ["--target", str(args.target)] if args.target else []
    command = [sys.executable, __file__, "--question", question]
    return [*command, *size, *rounds, *output, *target]


def ask(args) -> None:
    """One question, in this process."""
    import gpu_questions
    from harness import environment, save

    machine = _machine(args)
    question = gpu_questions.QUESTIONS[args.question]
    found = {
        "question": question.__doc__.splitlines()[0],
        "environment": environment(machine.device),
        "compiled_only": machine.device is not None,
        "settings": [],
    }
    print(_head(found), flush=True)
    for setting in question(machine):
        found["settings"].append(setting)
        path = save(f"gpu_{args.question}", found, args.output)
        print(f"\n{_part(setting)}", flush=True)
    print(f"\nwritten to {path}")


def _machine(args):
    import gpu_questions
    import jax
    from compiled import devices_of

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
    return f"{result['question']} {markdown.setting(result['environment'])}"


def _part(setting):
    rows = [_row(*item) for item in setting["contenders"].items()]
    return markdown.join(_described(setting), markdown.table([_HEADER, *rows]))


_HEADER = (
    "contender",
    "time",
    "time / parts",
    "(least to greatest)",
    "temporaries / gradient",
    "peak, predicted",
    "peak, measured",
    "gradient error",
    "compile",
)


def _row(name, found):
    ratio, seconds = found.get("time_to_parts"), found.get("median_seconds")
    measured = found.get("measured_peak_bytes")
    return (
        name,
        f"{1e3 * seconds:.4g} ms" if seconds else "",
        f"{ratio['median']:.3f}" if ratio else "",
        markdown.spread(ratio) if ratio else "",
        f"{found['temp_gradients']:.2f}",
        f"{found['predicted_peak_bytes'] / 2**30:.3f} GiB",
        f"{measured / 2**30:.3f} GiB" if measured else "",
        markdown.error(found.get("gradient_error")),
        f"{found['compile_seconds']:.1f} s",
    )


def _described(each):
    losses = each["losses"]
    return (
        f"{'Compiled, not run. ' if each['compiled_only'] else ''}"
        f"Layers {each['model']}{' and rematerialised' if losses['remat'] else ''}: "
        f"{each['layers']} of width {each['width']}, {each['parameters'] / 1e6:.1f} M "
        f"parameters, computed in {losses['dtype']}; {each['accum_steps']} "
        f"micro-batches of {each['tokens']:,} tokens; {each['rounds']} rounds."
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.peak:
        import gpu_questions

        print(json.dumps(gpu_questions.peak(args.peak, _machine(args))))
    elif args.question:
        ask(args)
    else:
        sys.exit(min(1, run_all(args)))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--questions", nargs="+", choices=_ORDER, help="instead of all")
    add("--size", choices=["tiny"], help="to try the script; also runs on a CPU")
    add("--target", type=Path, help="description of a GPU to compile for")
    add("--rounds", type=int, default=10, help="timed rounds, after one to warm up")
    add("--limit", type=float, default=570, help="seconds for everything")
    add("--output", type=Path, help="folder of the JSON files; a file for --question")
    add("--question", choices=_ORDER, help=argparse.SUPPRESS)
    add("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.questions is None:
        only = {name for name in _ORDER if not args.target or name not in _SCRIPTS}
        args.questions = [name for name in _ORDER if name in only]
    return args


if __name__ == "__main__":
    main()
