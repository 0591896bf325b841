"""The benchmarks run, keep what they say they keep, and refuse a wrong answer."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent / "benchmarks"
CUT = {
    "jaxga.value_and_grad",
    "jaxga.make_train_step",
    "hand-written scan",
    "optax.microbatch",
}
TINY = ("--size", "tiny", "--models", "scanned", "--rounds", "2")


@pytest.fixture
def load(monkeypatch):
    """Imports a script as Python finds it when it is run."""
    monkeypatch.syspath_prepend(ROOT)
    yield importlib.import_module
    for script in ROOT.glob("[a-z]*.py"):
        # Names as short as these must not stand in the way of anyone's.
        sys.modules.pop(script.stem, None)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "cycle.json"
    command = [sys.executable, "-W", "error", str(ROOT / "cycle.py"), *TINY]
    subprocess.run([*command, "--output", str(path)], check=True, timeout=120)
    return json.loads(path.read_text())


def test_cycle_says_what_it_ran_on(result):
    assert {"question", "environment", "models"} == result.keys()
    versions = {"python", "jax", "jaxlib", "optax", "jaxga"}
    others = {"device_kind", "backend", "cpu_count", "commit"}
    assert versions | others == result["environment"].keys()
    assert result["environment"]["jax"] == jax.__version__


def test_cycle_measures_all_contenders(result):
    (model,) = result["models"]
    assert (model["model"], model["rounds"], model["accum_steps"]) == ("scanned", 2, 8)
    found = model["contenders"]
    assert found.keys() == CUT | {"full batch", "one micro-batch", "update alone"}
    for contender in found.values():
        ratio = contender["time_to_full_batch"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert contender["median_seconds"] > 0
        assert contender["compile_seconds"] > 0
        assert contender["total_bytes"] > contender["temp_bytes"] >= 0
    for name in CUT:
        assert 0 <= found[name]["gradient_error"] <= 1e-5
        # Of two rounds of a tiny model: any number, as long as it is one.
        assert np.isfinite(found[name]["time_to_parts"]["median"])


def test_cutting_a_batch_saves_memory_in_what_is_measured(result):
    (model,) = result["models"]
    temp = {name: found["temp_bytes"] for name, found in model["contenders"].items()}
    assert all(temp[name] < temp["full batch"] / 2 for name in CUT)


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
        losses = (to_compare.mean_loss(params, half) for half in (first, second))
        return sum(losses) / 2

    entrants = {
        to_compare.FULL: to_compare.plain(to_compare.full_batch()),
        "mean of means": to_compare.plain(jax.value_and_grad(mean_of_means)),
    }
    with pytest.raises(ValueError, match="'mean of means' is .* away"):
        cycle.check_gradients(entrants, params, batch)


def test_readme_shows_the_kept_results(load):
    text = (ROOT / "README.md").read_text()
    assert load("tables").readme(text) == text
