"""The benchmarks run, keep what they say they keep, and refuse a wrong answer."""

import copy
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

# The fixtures run whole scripts.
pytestmark = pytest.mark.long
ROOT = Path(__file__).parent.parent / "benchmarks"
KEPT = ROOT / "results"
EXACT = {
    "jaxga.value_and_grad",
    "jaxga.make_train_step",
    "jaxga.accumulate",
    "hand-written scan",
    "MaxText's form",
    "optax.microbatch",
}
PARTS = {"plain step", "gradient of a micro-batch", "update alone"}
CUT = EXACT | {"loop of means", "optax.MultiSteps"}
PSUM = "loop under pmap, psum in it"
TINY = ("--size", "tiny", "--models", "scanned", "--rounds", "2")


def run_script(folder, script, *options):
    path = folder.mktemp("benchmarks") / "result.json"
    command = [sys.executable, "-W", "error", str(ROOT / script), *options]
    # A short compilation is worth more here than a fast program.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes"
    env = os.environ | {"XLA_FLAGS": flags}
    command += ["--output", str(path)]
    subprocess.run(command, check=True, timeout=240, env=env)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_script(tmp_path_factory, "cycle.py", *TINY)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    options = ("--size", "tiny", "--rounds", "2")
    return run_script(tmp_path_factory, "streaming.py", *options)


@pytest.fixture(scope="module")
def precise(tmp_path_factory):
    names = ("float32", "bfloat16 parameters and sums", SCALED)
    options = ("--accum-steps", "16", "--precisions", *names)
    return run_script(tmp_path_factory, "precision.py", *options)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    options = ("--accum-steps", "2", "4", "--unrolled-up-to", "2", "--rounds", "1")
    return run_script(tmp_path_factory, "compile_time.py", *options)


@pytest.fixture(scope="module")
def communicated(tmp_path_factory):
    options = ("--devices", "2", "--steps", PSUM, "zero=0", "zero=1")
    return run_script(tmp_path_factory, "communication.py", *options)


@pytest.fixture(scope="module")
def extra(tmp_path_factory):
    options = ("--size", "tiny", "--rounds", "2", "--extras", NOISE)
    return run_script(tmp_path_factory, "extras.py", *options)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Into a file that has kept another example, and an earlier run of this one."""
    path = tmp_path_factory.mktemp("examples") / "result.json"
    path.write_text(json.dumps({"examples": {"contrastive": {}, "byte_lm": BEFORE}}))
    flags = ("--updates", "2", "--seeds", "2", "--batch-sizes", "8")
    options = ("--only", "contrastive", "--output", str(path), "--", *flags)
    command = [sys.executable, "-W", "error", str(ROOT / "examples.py"), *options]
    subprocess.run(command, check=True, timeout=240)
    assert (path.parent / "contrastive.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text())


BEFORE = {
    "seconds": 120,
    "environment": {"python": "3.99", "jax": "0.99", "cpu_count": 7},
    "runs": {"(1)": {"loss": 0.5}, "(2)": {"loss": 0.25}},
    "printed": ["samples", "run  loss", "(1)  0.50000", "(2)  0.25000"],
}
WAYS = ("microbatch_map", "plain accumulation")
# What `publish` prints of it.
BEFORE["environment"] |= {"device_kind": "cpu", "backend": "cpu", "jaxlib": "0.99"}
BEFORE["environment"] |= {"optax": "0.99", "jaxga": "0.99", "commit": None}
SCALED = "float16 computation, loss scale 2^15"
NOISE = "noise scale, of micro-batches"
SCRIPTS = ("result", "streamed", "precise", "compiled", "communicated", "extra")
SCRIPTS += ("example",)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_ran_on(script, request):
    result = request.getfixturevalue(script)
    assert {"question", "environment"} < result.keys()
    versions = {"python", "jax", "jaxlib", "optax", "jaxga"}
    machine = {"device_kind", "backend", "processor", "cpu_count", "xla_flags"}
    assert versions | machine | {"commit"} == result["environment"].keys()
    assert result["environment"]["jax"] == jax.__version__


def test_cycle_measures_all_contenders(result):
    assert result.keys() == {"question", "environment", "models"}
    (model,) = result["models"]
    assert (model["model"], model["rounds"], model["accum_steps"]) == ("scanned", 2, 8)
    found = model["contenders"]
    assert found.keys() == CUT | {"full batch", *PARTS}
    for contender in found.values():
        ratio = contender["time_to_full_batch"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert contender["median_seconds"] > 0
        assert contender["compile_seconds"] > 0
        assert contender["total_bytes"] > contender["temp_bytes"] >= 0
    for name in CUT:
        is_exact = found[name]["gradient_error"] <= 1e-5
        assert is_exact == (name in EXACT) and found[name]["gradient_error"] >= 0
        # Of two rounds of a tiny model: any number, as long as it is one.
        assert np.isfinite(found[name]["time_to_parts"]["median"])


def test_cutting_a_batch_saves_memory_in_what_is_measured(result):
    (model,) = result["models"]
    temp = {name: found["temp_bytes"] for name, found in model["contenders"].items()}
    assert all(temp[name] < temp["full batch"] / 2 for name in CUT)


def test_streaming_measures_all_contenders(streamed):
    setting = {"question", "environment", "parameters", "shapes"}
    setting |= {"accum_steps", "rounds"}
    assert streamed.keys() == setting | {"multisteps_to_step", "contenders"}
    found, multisteps = streamed["contenders"], streamed["multisteps_to_step"]
    assert (streamed["accum_steps"], streamed["rounds"]) == (8, 2)
    sizes = [np.prod(shape) for shape in streamed["shapes"]]
    assert sum(sizes) == streamed["parameters"] and len(set(sizes)) > 1
    others = {"jaxga step", "jaxga update", "optax.MultiSteps"}
    assert found.keys() == others | {"bare add + AdamW"}
    for ratio in (multisteps, *(each["time_to_floor"] for each in found.values())):
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"] < np.inf
    times = {"median_seconds", "mid_call_ms", "closing_call_ms", "compile_seconds"}
    known = {"bytes_per_parameter", "temp_per_parameter", "leaf_copies"}
    errors = {"parameters_error", "moments_error"}
    for name, contender in found.items():
        assert contender.keys() == times | known | errors | {"time_to_floor"}
        assert all(0 < contender[key] < np.inf for key in times)
        assert all(0 <= contender[key] < np.inf for key in known)
        for key in errors:
            error = contender[key]
            assert error is None if name not in others else 0 <= error <= 1e-6


def test_streaming_counts_the_copies_of_multisteps(streamed):
    copies = {k: found["leaf_copies"] for k, found in streamed["contenders"].items()}
    assert copies["bare add + AdamW"] == copies["jaxga step"] == 0
    assert copies["optax.MultiSteps"] > 0


@pytest.mark.parametrize("accum_steps, mean", ((7, True), (8, False)))
def test_another_cycle_is_found_out(load, accum_steps, mean):
    """One call short; and a sum, whose first AdamW update is that of the mean."""
    streaming, transformer = map(load, ("streaming", "transformer"))
    params = transformer.make_params(transformer.SIZES["tiny"], scanned=True)
    adamw = optax.adamw(1e-4)
    wrong = optax.MultiSteps(adamw, accum_steps, use_grad_mean=mean)
    entrants = {
        streaming.FLOOR: streaming.Floor(adamw, params, params),
        "wrong": streaming.OneFunction(
            wrong, streaming.updating(wrong), params, params
        ),
    }
    with pytest.raises(ValueError, match="'wrong' is .* away"):
        streaming.check_cycle(entrants, [params, jax.tree.map(jnp.square, params)])


@pytest.mark.parametrize(
    "wrong",
    (
        {"w": np.array([3.0, 4.001])},
        {"w": np.array([3.0, np.nan])},
        {"w": np.array([3.0])},
        {"v": np.array([3.0, 4.0])},
    ),
)
def test_a_wrong_gradient_is_not_timed(load, wrong):
    match = "is not timed|has shape|differ in structure"
    with pytest.raises(ValueError, match=match):
        load("harness").check_equal("a name", wrong, {"w": np.array([3.0, 4.0])})


def test_equality_with_nothing_is_refused(load):
    check_equal = load("harness").check_equal
    with pytest.raises(ValueError, match="nothing to compare"):
        check_equal("a name", {"w": np.zeros(2)}, {"w": np.zeros(2)})
    right = {"w": np.array([3.0, 4.0])}
    assert check_equal("a name", right, right) == 0


def test_a_mean_of_means_is_found_out(load):
    cycle, to_compare, transformer = map(load, ("cycle", "contenders", "transformer"))
    size = dataclasses.replace(transformer.SIZES["tiny"], layers=1)
    params = transformer.make_params(size, scanned=False)
    batch = transformer.make_batch(size, 4)

    def mean_of_means(params, batch):
        first = jax.tree.map(lambda leaf: leaf[:2], batch)
        second = jax.tree.map(lambda leaf: leaf[2:], batch)
        losses = (to_compare.Loss().mean(params, half) for half in (first, second))
        return sum(losses) / 2

    entrants = {
        to_compare.FULL: to_compare.plain(to_compare.full_batch()),
        "mean of means": to_compare.plain(jax.value_and_grad(mean_of_means)),
    }
    with pytest.raises(ValueError, match="'mean of means' is .* away"):
        cycle.check_gradients(entrants, params, batch)


def test_precision_compares_with_float64(precise):
    errors = {name: found["16"] for name, found in precise["errors"].items()}
    assert errors.keys() == {"float32", "bfloat16 parameters and sums", SCALED}
    assert 0 < errors["float32"] <= 1e-6
    assert 1e-4 < errors[SCALED] < 2e-3
    assert 1e-3 < errors["bfloat16 parameters and sums"] < 1e-1


@pytest.mark.parametrize("steps, error", (("64", 2e-6), ("1024", 2e-5), ("16", np.nan)))
def test_precision_stops_at_its_bounds(load, steps, error):
    check_bounds = load("precision").check_bounds
    check_bounds({"float32": {"64": 9e-7, "256": 2e-6, "1024": 9e-6, "4096": 2e-5}})
    with pytest.raises(ValueError, match=f"from float64 over {steps} micro-batches"):
        check_bounds({"float32": {steps: error}})


def test_compile_time_is_that_of_every_contender(compiled):
    found = compiled["contenders"]
    loops = {"jaxga.value_and_grad", "hand-written scan"}
    assert found.keys() == loops | {"loop in Python"}
    assert all(found[name].keys() == {"2", "4"} for name in loops)
    assert found["loop in Python"].keys() == {"2"}
    for known in (each for steps in found.values() for each in steps.values()):
        assert 0 < known["trace_seconds"] < known["total_seconds"]
        assert known["instructions"] > 100
    # A loop is one program, however often it runs; copies are not.
    for name in loops:
        two, four = (found[name][n]["instructions"] for n in ("2", "4"))
        assert two == four < found["loop in Python"]["2"]["instructions"] * 1.1


def moved(result, step, devices, in_loop):
    groups = result["steps"][step][devices]
    size = sum(g["bytes_per_update"] for g in groups if g["in_loop"] == in_loop)
    return size / result["gradient_bytes"]


def test_communication_counts_what_is_moved(communicated):
    steps = communicated["accum_steps"]
    assert steps <= moved(communicated, PSUM, "2", True) < steps + 0.1
    assert 1 <= moved(communicated, "zero=0", "2", False) < 1.1
    assert moved(communicated, "zero=0", "2", True) == 0
    assert 2 <= moved(communicated, "zero=1", "2", False) < 2.1


def test_extras_are_beside_the_step_without(extra):
    assert extra["extras"].keys() == {NOISE}
    noise = extra["extras"][NOISE]
    assert noise["beside"] == "none" and 0 <= noise["update_error"] <= 1e-6
    # The norm of every micro-batch's gradient is a pass over it.
    assert noise["bytes"] > 1
    ratio = noise["time"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"] < np.inf


def test_an_extra_brings_what_it_is_beside(load):
    chosen = load("extras").chosen
    names = {"per_example_keys", "one key per micro-batch", "none"}
    assert chosen(["per_example_keys"]).keys() == names
    assert chosen([NOISE]).keys() == {NOISE, "none"}


def test_an_extra_that_changes_the_update_is_found_out(load):
    extras, transformer = map(load, ("extras", "transformer"))
    size = dataclasses.replace(transformer.SIZES["tiny"], layers=1)
    twice = extras.Extra(lambda params, batch: 2.0 * extras.loss_fn(params, batch))
    with pytest.raises(ValueError, match="'twice' is .* away"):
        extras.check_updates(
            {extras.NONE: extras.Extra(), "twice": twice},
            transformer.make_params(size, scanned=True),
            transformer.make_batch(size, 8),
        )


def test_a_step_that_does_not_add_up_is_not_counted(load, monkeypatch):
    communication = load("communication")

    def without_psum(mesh, params, batch):
        with monkeypatch.context() as patch:
            patch.setattr(communication.lax, "psum", lambda x, axis: 2 * x)
            return communication.by_pmap(mesh, params, batch, in_loop=True)

    monkeypatch.setitem(communication.STEPS, "alone", (without_psum, {}))
    with pytest.raises(ValueError, match="'alone' is .* away"):
        communication.measure(["alone"], [2])


def test_another_gradient_is_not_compared(load, monkeypatch):
    compile_time = load("compile_time")
    right = compile_time.full_batch()

    def of_half(params, batch):
        return right(params, jax.tree.map(lambda leaf: leaf[::2], batch))

    monkeypatch.setattr(compile_time, "CONTENDERS", {"half": lambda steps: of_half})
    with pytest.raises(ValueError, match="'half' is .* away"):
        compile_time.measure([2], 2, 1)


def test_an_example_is_kept_beside_the_others(example):
    assert list(example["examples"]) == ["byte_lm", "contrastive"]
    assert example["examples"]["byte_lm"] == BEFORE
    found = example["examples"]["contrastive"]
    assert (found["updates"], found["batch_size"], found["microbatch_size"]) == (
        2,
        8,
        8,
    )
    assert found["flags"][:2] == ["--updates", "2"] and found["seconds"] > 0
    assert found["environment"] == example["environment"]
    assert found["runs"].keys() == {f"8 images, {way}" for way in WAYS}
    # The mean of both seeds: as it was printed, to its digits.
    means = [
        run[key] for key in ("other_view", "label") for run in found["runs"].values()
    ]
    (row,) = (line.split() for line in found["printed"] if line.startswith("    8 "))
    assert row[1:5] == [f"{mean:.3f}" for mean in means]


def test_the_readme_tells_of_an_example(load, example):
    parts, example = load("paragraphs").example_parts, copy.deepcopy(example)
    found = example["examples"]["contrastive"]
    mapped, plain = (found["runs"][f"8 images, {way}"] for way in WAYS)
    mapped["other_view"], plain["other_view"] = 0.834, 0.696
    (text,) = parts("contrastive", [{"examples": {}}, example])
    text = " ".join(text.split())
    assert "after 2 updates with 8 digits, in micro-batches of 8," in text
    assert "found for 83 % of them; with plain" in text and text.endswith(", for 70 %.")
    head, table = parts("byte_lm", [example])
    assert head == "It prints, after 2 minutes (Python 3.99, jax 0.99, 7 CPU cores):"
    assert table == "```\nrun  loss\n(1)  0.50000\n(2)  0.25000\n```"
    assert parts("experts", [example]) == ["Not measured yet."]


@pytest.mark.parametrize("argv", (["--", "--updates", "1"], ["--only", "lora"]))
def test_only_the_defaults_of_known_examples_are_kept(load, argv, capsys):
    with pytest.raises(SystemExit):
        load("examples").main(argv)
    error = capsys.readouterr().err
    assert "need --output: the defaults" in error or "choice: 'lora'" in error


def kept(name):
    return json.loads((KEPT / "cpu" / f"{name}.json").read_text())


def test_kept_precision_holds_the_bounds(load):
    errors = kept("precision")["errors"]
    load("precision").check_bounds(errors)
    assert list(errors["float32"])[-1] == "4096"
    # Rounding of the micro-batches, not of the sum: it does not grow.
    for name in ("bfloat16 computation", "bfloat16 parameters", SCALED):
        assert errors[name]["4096"] <= 1.1 * errors[name]["1"]
    assert errors["float32, sums in bfloat16"]["4096"] > 0.1


def test_kept_communication_is_once_per_update():
    result = kept("communication")
    for devices in ("2", "4", "8"):
        assert moved(result, "zero=0", devices, in_loop=True) == 0
        assert moved(result, "zero=0", devices, in_loop=False) < 1.01
        for loop in ("loop under jit", PSUM):
            assert moved(result, loop, devices, in_loop=True) > 7.9
        after = "loop under pmap, psum after it"
        assert moved(result, after, devices, in_loop=True) == 0


@pytest.mark.parametrize(
    "path, function",
    ((ROOT / "README.md", "readme"), (ROOT.parent / "README.md", "root_readme")),
)
def test_a_readme_shows_the_kept_results(load, path, function):
    text = path.read_text()
    assert getattr(load("tables"), function)(text) == text


@pytest.mark.parametrize("parts, expected", (([], ""), (["x", "y"], "x\n\ny\n\n")))
def test_what_is_between_markers_is_replaced(load, parts, expected):
    begin, end = "<!-- it: begin -->", "<!-- it: end -->"
    text = f"before\n{begin}\nold\n{end}\nafter"
    between = load("tables").between
    new = between(text, "it", parts)
    assert new == f"before\n{begin}\n\n{expected}{end}\nafter"
    assert between(new, "it", parts) == new


@pytest.mark.parametrize("text", ("{end} {begin}", "{begin}", "{begin} {begin} {end}"))
def test_markers_that_are_missing_are_asked_for(load, text):
    text = text.format(begin="<!-- it: begin -->", end="<!-- it: end -->")
    with pytest.raises(ValueError, match="needs <!-- it: begin --> and, after it"):
        load("tables").between(text, "it", [])


def sweep():
    """The kept cycles, as if they had been found for two numbers of micro-batches."""
    result = kept("cycle")
    models = [copy.deepcopy(model) for model in result["models"] for _ in range(2)]
    for number, model in enumerate(models):
        model["accum_steps"] = 8 * (1 + number % 2)
    return result | {"models": models}


def test_memory_is_beyond_that_of_a_plain_step(load):
    result = sweep()
    model = result["models"][0]
    model["gradient_bytes"] = 100
    for name, found in model["contenders"].items():
        found["total_bytes"] = 475 if name == "jaxga.make_train_step" else 450
    row = load("tables").memory_table(result).splitlines()[4]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:4] == ["scanned", "8", "256", "4.50"]
    assert cells.count("+0.25") == 1 and set(cells[4:]) == {"+0.25", "+0.00"}


def test_a_summary_has_a_table_for_every_machine(load):
    summary, result = load("summary"), kept("cycle")
    elsewhere = copy.deepcopy(result)
    elsewhere["environment"]["device_kind"] = "another"
    text = summary.summary_table({"cycle": [result, elsewhere, result]})
    assert text.count("beside it") == 2
    assert text.index("**cpu**") < text.index("**another**")
    ratio = result["models"][0]["contenders"]["jaxga.make_train_step"]["time_to_parts"]
    told = f" {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) "
    assert text.count(told) == 3


def test_what_a_ring_sends(load):
    """A device keeps its own part of what is scattered or gathered."""
    sent = load("summary")._sent
    kinds = ("all-reduce", "reduce-scatter", "all-gather")
    groups = [{"kind": kind, "bytes_per_update": 100} for kind in kinds]
    assert [sent([group], 4) for group in groups] == [150, 75, 75]
    assert sent(groups, 4) == 300


@pytest.mark.parametrize("compiled_only", (True, False))
def test_a_gpu_that_was_not_there_has_no_times(load, compiled_only):
    def found(peak, ratio):
        time = {"median": ratio, "min": ratio, "max": ratio}
        time = {} if compiled_only else {"time_to_parts": time}
        return {"predicted_peak_bytes": peak} | time

    setting = {
        **{"accum_steps": 8, "tokens": 2048, "parameters": 3e6, "model": "scanned"},
        **{"gradient_bytes": 100, "compiled_only": compiled_only},
        "contenders": {
            "plain step": found(500, 1.0),
            "jaxga.make_train_step": found(525, 1.01),
            "hand-written scan": found(600, 1.02),
        },
    }
    rows = list(load("summary")._gpu({"settings": [setting]}))
    what, *memory = rows[-1]
    assert memory == ["0.25", "hand-written scan 1.00"]
    assert what.endswith("(compiled, not run)") == compiled_only
    if compiled_only:
        assert len(rows) == 1
    else:
        assert rows[0][1].startswith("1.01 (") and "scan 1.02 (" in rows[0][2]


def test_pictures_are_drawn_beside_the_results(load, tmp_path):
    folder = tmp_path / "a-device"
    folder.mkdir()
    for name, result in (("precision", kept("precision")), ("cycle_sweep", sweep())):
        (folder / f"{name}.json").write_text(json.dumps(result))
    drawn = load("pictures").draw(tmp_path)
    assert drawn == [folder / "precision.png", folder / "cycle_sweep.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.fixture
def runner(monkeypatch):
    """`python -m benchmarks`, as a module."""
    spec = importlib.util.spec_from_file_location(
        "all_benchmarks", ROOT / "__main__.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_all_scripts_are_run(runner, load):
    scripts = {script.arguments[0] for script in runner.SCRIPTS}
    runs = {
        path.name
        for path in ROOT.glob("[a-z]*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    # That one compiles for GPUs that a file describes.
    assert scripts == runs - {"layouts.py"}
    assert runner.SCRIPTS[-1].arguments == ("tables.py",)
    for script in runner.SCRIPTS[:3]:
        load("cycle").parse(script.arguments[1:])  # what is kept needs no --output
    assert set(runner.GPU_ONLY) == set(load("gpu_questions").QUESTIONS)


def test_what_a_machine_lacks_is_said_and_the_others_run(
    runner, monkeypatch, tmp_path, capfd
):
    for name, code in (("fails", "raise SystemExit(3)"), ("runs", "print('here')")):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(runner, "_HERE", tmp_path)
    monkeypatch.setattr(runner, "_backend", lambda: "cpu")
    scripts = [
        runner.Script(("lacks.py",), module="no_such_package"),
        runner.Script(("large.py", "--size", "large"), on_gpu=True),
        runner.Script(("fails.py",), module="json"),
        runner.Script(("runs.py",)),
    ]
    monkeypatch.setattr(runner, "SCRIPTS", scripts)
    with pytest.raises(SystemExit, match=r"^failed: fails\.py$"):
        runner.main()
    out = capfd.readouterr().out
    assert "lacks.py: skipped, no_such_package is not installed" in out
    assert "large.py --size large: skipped, there is no GPU" in out
    assert out.endswith("== runs.py\nhere\n\n")
