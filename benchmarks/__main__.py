"""Runs every benchmark that this machine can, then rewrites tables and pictures.

python -m benchmarks      # CPU: more than half an hour
"""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Script:
    """A script and its arguments, and what a machine needs for it.

    Attributes:
        arguments: the file's name, and options.
        module: a package that has to be installed.
        on_gpu: whether it needs a GPU.
    """

    arguments: tuple[str, ...]
    module: str | None = None
    on_gpu: bool = False

    def lacks(self) -> str | None:
        """What the machine lacks for it; None if nothing."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if self.on_gpu and _backend() != "gpu":
            return "there is no GPU"
        return None


GPU_ONLY = ("cycle", "peers", "large", "peaks", "fusion", "traced")
SCRIPTS = (
    Script(("cycle.py",)),
    Script(("cycle.py", "--accum-steps", *"1 2 4 8 16 32 64".split())),
    Script(("cycle.py", "--microbatch-size", *"1 2 4 8 16 32".split())),
    Script(("streaming.py",)),
    Script(("precision.py",)),
    Script(("compile_time.py",)),
    Script(("communication.py",)),
    Script(("extras.py",)),
    Script(("weight_gradients.py",)),
    Script(("microbatch_map.py",)),
    Script(("memory_plan.py",)),
    Script(("against_torch.py",), module="accelerate"),
    # The questions that no script above has asked.
    Script(("gpu.py", "--limit", "3600", "--questions", *GPU_ONLY), on_gpu=True),
    Script(("examples.py",), module="sklearn"),
    Script(("pictures.py",), module="matplotlib"),
    Script(("tables.py",)),
)


def main() -> None:
    failed = []
    for script in SCRIPTS:
        name = " ".join(script.arguments)
        lacking = script.lacks()
        if lacking:
            print(f"== {name}: skipped, {lacking}\n", flush=True)
            continue
        print(f"== {name}", flush=True)
        # Each in a process of its own: none finds a device that another has filled.
        if subprocess.run(_command(script)).returncode:
            failed.append(name)
        print(flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _command(script):
    first, *options = script.arguments
    return [sys.executable, str(_HERE / first), *options]


def _backend():
    """Asked for in a process of its own, which lets go of the device."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


if __name__ == "__main__":
    main()
