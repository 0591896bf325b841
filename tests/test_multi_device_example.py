"""The table of multi_device.py: what each way holds and moves, and its checks."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long
SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "multi_device.py"
ROW = re.compile(
    r"^(\S.*?) +(\d+\.\d\d) +(\d+\.\d\d) +(\d+\.\d\d) +(\d+\.\d\d) +(\d\.\d{6})  (.*)$",
    re.M,
)
WHOLE, ALL_REDUCE = (1, 1, 1), "1 x all-reduce 1.00"
GATHERED = r"10 x all-gather 1\.00"
# Of every micro-batch (there are 4): 6 parameters in each of 6 layers, and 4 others.
SCATTERED = rf"{4 * (6 * 6 + 4)} x reduce-scatter 4\.00"
# Layers are gathered in the forward and in the backward pass.
GATHERED_OFTEN = rf"{4 * (2 * 6 * 6 + 4)} x all-gather 7\.\d\d"
EXPECTED = {
    "plain JAX, one device": ((1, 0, 1), "-"),
    "jax.pmap": (WHOLE, ALL_REDUCE),
    "jax.shard_map": (WHOLE, ALL_REDUCE),
    "zero=0": (WHOLE, ALL_REDUCE),
    "zero=1": ((1, 1, 0.12), rf"10 x reduce-scatter 1\.00, {GATHERED}"),
    "zero=2": ((1, 0.12, 0.12), f"{SCATTERED}, {GATHERED}"),
    "zero=3": ((0.12, 0.12, 0.12), f"{GATHERED_OFTEN}, {SCATTERED}"),
    "zero=3, gather_once": ((0.12, 0.12, 0.12), f"{GATHERED}, {SCATTERED}"),
    "zero=3, 2 replicas": (
        (0.25, 0.25, 0.25),
        rf"{GATHERED_OFTEN}, {SCATTERED}, 1 x all-reduce 0\.25",
    ),
}


ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(SCRIPT.parent),
    # Nearly all of its time is LLVM's.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}


def run(script, *flags):
    return subprocess.run(
        [sys.executable, script, *flags],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_table():
    result = run(SCRIPT)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {name: values for name, *values in ROW.findall(result.stdout)}
    assert rows.keys() == EXPECTED.keys(), result.stdout
    for name, (sizes, moved) in EXPECTED.items():
        assert tuple(map(float, rows[name][:3])) == sizes, name
        assert re.fullmatch(moved, rows[name][5]), (name, rows[name][5])
    losses = [float(values[4]) for values in rows.values()]
    assert max(losses) - min(losses) <= 1e-5
    # The accumulators, and what was gathered, are where the stages differ.
    temporaries = {name: float(values[3]) for name, values in rows.items()}
    assert temporaries["zero=3"] < temporaries["zero=2"] < temporaries["zero=0"] - 0.8
    assert temporaries["zero=3"] < temporaries["zero=3, gather_once"] - 0.8
    trap = (
        r"psum behind the loop, 8\.00 times the gradient; moved: \d+ x all-reduce 5\.00"
    )
    assert re.search(trap, result.stdout), result.stdout


def test_wrong_flags():
    result = run(SCRIPT, "--devices", "0")
    assert result.returncode == 2
    assert "error: --devices 0: must be at least 1" in result.stderr
