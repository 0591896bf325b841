"""The peers side by side: what agrees is timed, what fails is said."""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.anywhere

ROOT = Path(__file__).parent.parent / "benchmarks"
JAXGA, MULTISTEPS = "jaxga.make_train_step", "optax.MultiSteps"
PARTS = {"plain step", "gradient of a micro-batch", "update alone"}


def run(script, path, *options):
    script.main([*options, "--output", str(path)])
    return json.loads(path.read_text())


def tiny_problem(load, rows):
    transformer = load("transformer")
    size = dataclasses.replace(transformer.SIZES["tiny"], layers=1)
    params = transformer.make_params(size, scanned=False)
    return params, transformer.make_batch(size, rows)


@pytest.mark.long
def test_a_mean_of_means_agrees_on_rows_of_one_length_only(load):
    cycle, to_compare, name = load("cycle"), load("contenders"), "loop of means"
    params, batch = tiny_problem(load, 4)
    entrants = to_compare.contenders(2, 2)
    entrants = {each: entrants[each] for each in (to_compare.FULL, name)}
    even = cycle.even_rows(batch)
    (errors,) = cycle.check_gradients(entrants, params, batch, even=even).values()
    assert errors["even_gradient_error"] <= 1e-5 < 1e-2 < errors["gradient_error"]
    with pytest.raises(ValueError, match=f"{name!r} is .* away"):
        cycle.check_gradients(entrants, params, batch)


@pytest.mark.long
def test_a_sum_of_means_is_found_out_on_any_rows(load):
    cycle, to_compare = load("cycle"), load("contenders")
    params, batch = tiny_problem(load, 4)
    entrants = {
        to_compare.FULL: to_compare.plain(to_compare.full_batch()),
        MULTISTEPS: dataclasses.replace(
            to_compare.multisteps_calls(2),
            make_step=lambda tx: to_compare.plain(to_compare.full_batch()).make_step(
                optax.MultiSteps(tx, 2, use_grad_mean=False)
            ),
        ),
    }
    with pytest.raises(ValueError, match="MultiSteps' is .* away"):
        cycle.check_gradients(entrants, params, batch, even=cycle.even_rows(batch))


@pytest.mark.long
def test_maxtexts_sums_in_bfloat16_are_that_far_off(load):
    cycle, to_compare = load("cycle"), load("contenders")
    params, batch = tiny_problem(load, 8)
    form = to_compare.maxtext_form(4, dtype=jnp.bfloat16)
    batches = {"uneven": batch}
    full = to_compare.plain(to_compare.full_batch())
    expected = cycle.gradients_of(full, params, batches)["uneven"]
    got = cycle.gradients_of(to_compare.plain(form), params, batches)["uneven"]
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    assert 1e-3 < load("harness").distance(got, expected) < 5e-2


@pytest.mark.long
def test_a_sweep_measures_every_number_of_microbatches(load, tmp_path):
    options = ("--size", "tiny", "--layers", "1", "--models", "unrolled")
    options += ("--rounds", "1")
    names = ("--contenders", JAXGA, MULTISTEPS)
    steps = ("--accum-steps", "1", "3")
    result = run(load("cycle"), tmp_path / "sweep.json", *options, *names, *steps)
    assert [model["accum_steps"] for model in result["models"]] == [1, 3]
    for model in result["models"]:
        found = model["contenders"]
        assert found.keys() == {JAXGA, MULTISTEPS, *PARTS}
        for name in (JAXGA, MULTISTEPS):
            # Of one round of a tiny model: any number, as long as it is one.
            assert np.isfinite(found[name]["time_to_parts"]["median"])
            assert found[name]["even_gradient_error"] <= 1e-5
        assert found[JAXGA]["gradient_error"] <= 1e-5
    errors = [m["contenders"][MULTISTEPS]["gradient_error"] for m in result["models"]]
    assert errors[0] <= 1e-5 and errors[1] > 1e-2


@pytest.fixture
def gpu(load):
    return load("gpu")


def settings(gpu, *questions, limit=60.0):
    return SimpleNamespace(questions=questions, limit=limit)


def test_a_question_that_fails_leaves_the_others_to_run(gpu, monkeypatch, capfd):
    lines = {"cycle": "print('cycle ran')", "peers": "raise SystemExit(3)"}
    lines["fusion"] = "print('fusion ran')"
    monkeypatch.setattr(
        gpu, "_command", lambda question, args: [sys.executable, "-c", lines[question]]
    )
    assert gpu.run_all(settings(gpu, "cycle", "peers", "fusion")) == 1
    out, err = capfd.readouterr()
    assert "cycle ran" in out and "fusion ran" in out
    assert "peers: failed with status 3" in err and "--questions peers\n" in err
    assert gpu.run_all(settings(gpu, "cycle", "fusion")) == 0


def test_what_is_compiled_can_be_kept_for_the_next_call(gpu, monkeypatch):
    name = "JAX_COMPILATION_CACHE_DIR"
    monkeypatch.delenv(name, raising=False)
    assert gpu._variables("cycle", "a folder")[name] == "a folder"
    monkeypatch.setenv(name, "the user's")
    assert gpu._variables("cycle", "a folder")[name] == "the user's"


def test_what_has_no_time_left_is_named(gpu, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "_LEAST", 0.1)
    monkeypatch.setattr(
        gpu,
        "_command",
        lambda question, args: [sys.executable, "-c", "import time; time.sleep(60)"],
    )
    assert gpu.run_all(settings(gpu, "cycle", "peers", limit=0.5)) == 2
    err = capfd.readouterr().err
    assert "cycle: stopped" in err and "peers: left out" in err
    assert "to ask again, --questions cycle peers" in err


def test_what_is_stopped_leaves_no_process_behind(gpu, monkeypatch, tmp_path):
    note = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(note)!r}, 'w')"
    parent = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    monkeypatch.setattr(gpu, "_LEAST", 0.1)
    monkeypatch.setattr(gpu, "_command", lambda *_: [sys.executable, "-c", parent])
    assert gpu.run_all(settings(gpu, "cycle", limit=1.0)) == 1
    time.sleep(2.5)
    assert not note.exists()


def test_every_question_of_the_gpu_is_asked(load, gpu):
    asked = set(load("gpu_questions").QUESTIONS) | set(gpu._SCRIPTS)
    assert asked == set(gpu._ORDER)
    for name in gpu._SCRIPTS:
        # Each takes the options that it is given.
        args = SimpleNamespace(size="tiny", target=None, rounds=1, output=Path("x"))
        command = gpu._command(name, args)
        assert load(name).parse(command[2:]).output == Path("x") / f"{name}.json"


def test_what_is_not_installed_is_no_failure(gpu, monkeypatch, capfd):
    monkeypatch.setitem(gpu._NEEDS, "against_torch", ("jax", "no_such_package"))
    assert gpu.run_all(settings(gpu, "against_torch")) == 0
    assert "against_torch: skipped, no_such_package not" in capfd.readouterr().out


def test_what_is_tried_spoils_no_kept_result(load, capsys):
    for name, *options in (
        ("gpu", "--size", "tiny"),
        ("cycle", "--contenders", JAXGA),
        ("cycle", "--accum-steps", "1", "2"),
        ("extras", "--extras", "four metrics"),
    ):
        with pytest.raises(SystemExit):
            load(name).parse(options)
        assert re.search("need(s|ed).*--output|--output is", capsys.readouterr().err)


@pytest.mark.long
def test_a_question_runs_and_is_kept(gpu, tmp_path):
    options = ("--size", "tiny", "--rounds", "1", "--question", "traced")
    result = run(gpu, tmp_path / "traced.json", *options)
    (found,) = result["settings"]
    contenders = found["contenders"]
    names = {JAXGA, "num_microbatches traced"}
    assert contenders.keys() == names | PARTS
    for name in names:
        assert np.isfinite(contenders[name]["time_to_parts"]["median"])
        assert contenders[name]["gradient_error"] < 1e-5
        # Parameters and two moments, donated and so counted once, beside temporaries.
        kept = contenders[name]["predicted_peak_bytes"] - contenders[name]["temp_bytes"]
        assert 3 * found["gradient_bytes"] < kept < 4 * found["gradient_bytes"]
    assert result["question"].startswith("What does a number of micro-batches cost")
    assert result["complete"] and "Cut off" not in gpu.table(result)
    assert "Cut off" in gpu.table(result | {"complete": False})


def test_a_peak_is_that_of_a_process_of_its_own(gpu, monkeypatch, tmp_path):
    asked, really_run = [], subprocess.run

    def answer(command, **options):
        if "--peak" not in command:
            return really_run(command, **options)
        asked.append(gpu.parse(command[2:]))
        found = {"temp_gradients": 1.0, "predicted_peak_bytes": 9}
        found["measured_peak_bytes"] = None
        return SimpleNamespace(stdout=f"of the compiler\n{json.dumps(found)}\n")

    monkeypatch.setattr(subprocess, "run", answer)
    options = ("--size", "tiny", "--question", "peaks")
    result = run(gpu, tmp_path / "peaks.json", *options)
    (found,) = result["settings"]
    assert [args.peak for args in asked] == list(found["contenders"])
    assert {args.size for args in asked} == {"tiny"} and len(asked) == 3
    assert gpu.table(result).count("not known") == 3


@pytest.mark.long
def test_a_peak_is_measured_where_the_device_tells(load, gpu, monkeypatch, capsys):
    held = iter((100, 700))
    monkeypatch.setattr(load("gpu_questions"), "_peak_so_far", lambda: next(held))
    gpu.main(["--peak", JAXGA, "--size", "tiny", "--output", os.devnull])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["measured_peak_bytes"] == 700
    assert found["predicted_peak_bytes"] > found["temp_bytes"] > 0


@pytest.mark.long
def test_a_program_that_leaves_a_microbatch_out_is_refused(load):
    gpt, to_measure = load("gpt"), load("gpu_measure")
    size = gpt.SIZES["tiny"]
    setting = to_measure.Setting(size, 3, True, gpt.TokenLosses())
    step = load("contenders").contenders(3, 2, setting.loss)[JAXGA]

    class Short(type(step)):
        def data(self, batch):
            return [jax.tree.map(lambda rows: rows.at[2::3].set(rows[1::3]), batch)]

    short = Short(step.make_step, step.make_state, step.read_opt_state)
    with pytest.raises(ValueError, match="'short' is .* away"):
        to_measure.measure(setting, {"short": short}, 1)


@pytest.mark.parametrize("scanned", (True, False))
def test_the_gpt_computes_the_same_in_all_its_forms(load, scanned):
    gpt, to_compare = load("gpt"), load("contenders")
    size = dataclasses.replace(gpt.SIZES["tiny"], layers=1)
    params, batch = gpt.make_params(size, scanned=scanned), gpt.make_batch(size, 2)
    assert "out" not in params

    def gradient(**losses):
        loss = to_compare.Loss(gpt.TokenLosses(**losses))
        return jax.jit(jax.grad(loss.mean))(params, batch)

    other = gradient(remat=True, float32_wgrad=True)
    assert load("harness").distance(other, gradient()) < 1e-6


def test_a_model_in_bfloat16_loses_in_float32(load):
    gpt = load("gpt")
    params = gpt.make_params(gpt.SIZES["tiny"], scanned=True)
    batch = gpt.make_batch(gpt.SIZES["tiny"], 2)
    losses = gpt.TokenLosses("bfloat16")
    assert jax.eval_shape(losses, params, batch).dtype == jnp.float32
    grads = jax.eval_shape(jax.grad(lambda params: losses(params, batch).sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype(np.float32)}


def test_without_pytorch_the_script_says_so(load, monkeypatch):
    against = load("against_torch")
    monkeypatch.setattr(against, "missing", lambda: ["torch", "accelerate"])
    with pytest.raises(SystemExit, match="needs torch and accelerate, not installed"):
        against.main([])


@pytest.mark.long
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "accelerate"))),
    reason="PyTorch or Accelerate is not installed",
)
def test_pytorch_computes_the_same_gradient(load):
    against = load("against_torch")
    size = against.gpt.SIZES["tiny"]
    params = against.gpt.make_params(size, scanned=False)
    batch = against.gpt.make_batch(size, 6)
    losses = against.Loss(against.gpt.TokenLosses())
    expected = against.in_parts(losses, params, batch, 1)
    makers = load("torch_peers").peers(params, batch, 3, "float32")
    for name in ("PyTorch, eager", "PyTorch, Accelerate"):
        peer = makers[name]()
        for _ in range(2):  # the second time from gradients that were cleared
            against.check_equal(name, peer.gradient(), expected)
        before = [p.detach().clone() for p in peer.bare.parameters()]
        peer.cycle()
        after = list(peer.bare.parameters())
        moved = [abs(a - b).max().item() for a, b in zip(after, before, strict=True)]
        # The first update of AdamW is the learning rate, once per cycle.
        assert all(0.9e-4 < most < 1.1e-4 for most in moved)
