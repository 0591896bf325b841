"""The examples run as their users run them, and their own assertions hold."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

BYTE_LM = pathlib.Path(__file__).parent.parent / "examples" / "byte_lm.py"
GRADIENT_BOUND, LOSS_BOUND = 5e-6, 1e-4
QUICK = ("--size", "tiny", "--steps", "20")


def run_byte_lm(folder, *flags, script=BYTE_LM):
    return subprocess.run(
        [sys.executable, script, *flags],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def figures(output):
    """Of each run: the differences of gradient and loss to (1), the held-out loss."""
    number = r"([0-9.]+(?:e[+-]\d+)?)"
    lines = re.findall(
        rf"^\((\d)\) [a-z ]+ {number} +{number} +{number}$", output, re.M
    )
    return {int(run): tuple(map(float, values)) for run, *values in lines}


@pytest.mark.long
def test_streaming(tmp_path):
    script = BYTE_LM.parent / "streaming.py"
    result = run_byte_lm(tmp_path, "--microbatches", "80", script=script)
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(
        r"largest difference of the loss: (\S+)\n.*parameters.*: (\S+)", result.stdout
    )
    assert all(float(number) < LOSS_BOUND for number in found.groups())
    cycles = re.search(r"(\d+) updates of (\d+) to (\d+) micro-batches", result.stdout)
    updates, least, most = map(int, cycles.groups())
    assert updates >= 5 and least < most  # they end by tokens, not by count
    picture = (tmp_path / "streaming.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.long
def test_streaming_refuses_wrong_flags(tmp_path):
    script = BYTE_LM.parent / "streaming.py"
    result = run_byte_lm(tmp_path, "--microbatches", "0", script=script)
    assert result.returncode == 2
    assert "error: --microbatches 0: must be at least 1" in result.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("nnx_digits", ("--epochs", "2")),
        ("lora", ("--base", "10", "--steps", "8")),
    ],
)
def test_examples_with_nnx(tmp_path, name, flags):
    script = BYTE_LM.parent / f"{name}.py"
    result = run_byte_lm(tmp_path, *flags, script=script)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.long
def test_resume(tmp_path):
    script = BYTE_LM.parent / "resume.py"
    flags = ("--updates", "4", "--kills", "1")
    result = run_byte_lm(tmp_path, *flags, script=script)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"killed 1 times, \d of them inside a save", result.stdout)
    assert "of 32 calls, all bit for bit" in result.stdout
    assert (tmp_path / "resume.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.long
def test_resume_refuses_wrong_flags(tmp_path):
    script = BYTE_LM.parent / "resume.py"
    result = run_byte_lm(tmp_path, "--kills", "-1", script=script)
    assert result.returncode == 2
    assert "error: --kills -1: must be at least 0" in result.stderr


def test_byte_lm(tmp_path):
    result = run_byte_lm(tmp_path, *QUICK, "--devices", "8")
    assert result.returncode == 0, result.stdout + result.stderr

    arithmetic = (
        "64 examples per update = 1 per micro-batch * 8 accumulation steps * 8 devices"
    )
    assert arithmetic in result.stdout.splitlines()

    found = figures(result.stdout)
    assert sorted(found) == [1, 2, 3], result.stdout
    assert found[1][:2] == (0, 0)
    gradient, loss, held_out = found[2]
    assert gradient < GRADIENT_BOUND
    assert loss < LOSS_BOUND
    assert abs(held_out - found[1][2]) < 2 * LOSS_BOUND
    gradient, loss, held_out = found[3]
    assert gradient > 100 * GRADIENT_BOUND
    assert loss > 100 * LOSS_BOUND
    assert 1 < held_out < 5  # of ln 256 = 5.5: it has learnt something

    assert "samples, which begin with 'def '" in result.stdout
    bar = r"<00:0\d, +[\d.]+k tokens/s, update 20, loss [\d.]+"
    assert len(re.findall(bar, result.stderr)) >= 3, result.stderr
    picture = (tmp_path / "byte_lm.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert 20_000 < len(picture) < 150_000


@pytest.fixture
def byte_lm(monkeypatch):
    monkeypatch.syspath_prepend(str(BYTE_LM.parent))
    precision = jax.config.jax_default_matmul_precision  # which it sets
    yield importlib.import_module("byte_lm")
    jax.config.update("jax_default_matmul_precision", precision)


@pytest.mark.parametrize("wrong", (None, "gradient", "loss", "mistake"))
def test_byte_lm_sees_what_is_wrong(byte_lm, wrong):
    """The script's assertions can fail."""
    off = {"gradient": 1e-7, "loss": 1e-7, "mistake": 0.2}
    if wrong:
        off[wrong] = {"gradient": 1e-3, "loss": 1e-2, "mistake": 1e-7}[wrong]
    grads = [{"w": np.ones(4) * x} for x in (1, 1 + off["gradient"], 1.2)]
    losses = [np.full(9, 3.0) + x for x in (0, off["loss"], off["mistake"])]
    curves = [{"loss": loss} for loss in losses]
    arguments = ["truth", "jaxga", "mistake"], grads, curves, [2.0, 2.0, 2.1]
    if wrong is None:
        assert byte_lm.report(*arguments)["jaxga"]["gradient"] < 1e-6
    else:
        with pytest.raises(AssertionError):
            byte_lm.report(*arguments)


@pytest.mark.parametrize(
    "flags, message",
    (
        (("--steps", "0"), "--steps 0: must be at least 1"),
        (("--batch", "-8"), "--batch -8: must be at least 1"),
        (("--seed", "-1"), "--seed -1: must be at least 0"),
        (("--devices", "0"), "--devices 0: must be at least 1"),
        (("--size", "huge"), "--size: invalid choice: 'huge'"),
        (("--steps", "ten"), "--steps: invalid int value: 'ten'"),
        (
            ("--picture", "no/folder.png"),
            "--picture .*folder.png: there is no such folder",
        ),
    ),
)
def test_byte_lm_refuses_wrong_flags(byte_lm, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        byte_lm.main(flags)
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


@pytest.mark.long
def test_byte_lm_refuses_a_batch_that_does_not_divide(tmp_path):
    result = run_byte_lm(tmp_path, "--devices", "3")
    assert result.returncode == 2, result.stderr
    message = "--batch 64 --devices 3: .* Use global_batch_size=48 or 72"
    assert re.search(f"error: .*{message}", result.stderr), result.stderr
    assert "Traceback" not in result.stderr


PREFERENCES = BYTE_LM.parent / "preferences.py"


@pytest.mark.long
def test_preferences(tmp_path):
    quick = ("--base", "6", "--steps", "6", "--layers", "1")
    result = run_byte_lm(tmp_path, *quick, script=PREFERENCES)
    assert result.returncode == 0, result.stdout + result.stderr
    number = r"(-?[0-9.]+(?:e[+-]\d+)?)"
    rows = re.findall(
        rf"^\((\d)\) [a-z ]+ {number} +{number} +{number} +{number} +{number}$",
        result.stdout,
        re.M,
    )
    found = {int(run): tuple(map(float, values)) for run, *values in rows}
    assert sorted(found) == [1, 2, 3, 4], result.stdout
    gradients, margins = zip(*(found[run][:2] for run in (1, 2, 3, 4)), strict=True)
    assert gradients[0] == margins[0] == 0
    assert 0 < gradients[1] < GRADIENT_BOUND
    assert margins[1] < LOSS_BOUND
    assert min(gradients[2:]) > 0.05  # of the gradient's own size
    assert found[2][2:] == pytest.approx(found[1][2:], abs=2e-3)
    picture = (tmp_path / "preferences.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
