"""The benchmark of layouts finds what is in a compiled step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jaxga
import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).parent.parent / "benchmarks"
NAMES = ("GSPMD loop", "zero=0", "zero=3")
HLO = """\
HloModule step, is_scheduled=true, num_partitions=8

%body (t: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %t = (s32[], f32[1024]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[1024] get-tuple-element(%t), index=1
  %all-gather-start.1 = ((f32[128]), f32[1024]) all-gather-start(%x), dimensions={0}
  %gemm_fusion_dot.3 = f32[1024] fusion(%x), kind=kCustom, calls=%f
  %all-gather-done.1 = f32[1024] all-gather-done(%all-gather-start.1)
  ROOT %r = (s32[], f32[1024]) tuple(%i, %all-gather-done.1)
}

ENTRY %main (p: f32[1024]) -> f32[1024] {
  %p = f32[1024] parameter(0)
  %init = (s32[], f32[1024]) tuple(%p)
  %all-reduce-start = f32[1024] all-reduce-start(%p), metadata={op_name="psum"}
  %add = f32[1024] fusion(%p), kind=kLoop, calls=%g
  %slice = f32[1024] bitcast(%gemm_fusion_dot.3), metadata={op_name="dot"}
  %all-reduce-done = f32[1024] all-reduce-done(%all-reduce-start)
  %all-reduce-start.2 = f32[1024] all-reduce-start(%add)
  %loop = (s32[], f32[1024]) while(%init), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"18"}}
  %all-reduce-done.2 = f32[1024] all-reduce-done(%all-reduce-start.2)
  %all-reduce.5 = f32[1024] all-reduce(%add)
  ROOT %dot = f32[1024] dot(%all-reduce-done.2, %all-reduce.5)
}
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "result.json"
    command = (sys.executable, "-W", "error", str(ROOT / "layouts.py"))
    options = ("--layouts", *NAMES, "--output", str(path))
    # The program is not run, so that it need not be fast.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes"
    env = os.environ | {"XLA_FLAGS": flags}
    subprocess.run([*command, *options], check=True, timeout=240, env=env)
    return json.loads(path.read_text())


def moved(found, kind, in_loop):
    return sum(
        group["bytes_per_update"]
        for group in found["collectives"]
        if (group["kind"], group["in_loop"]) == (kind, in_loop)
    )


def test_it_says_that_nothing_ran(result):
    assert result["compiled_only"] is True
    assert result["environment"]["device_kind"] == "8 x cpu"
    assert "seconds" not in json.dumps(result)
    scanned, unrolled = result["models"]
    assert (scanned["model"], unrolled["model"]) == ("scanned", "unrolled")
    assert scanned["layouts"].keys() == set(NAMES)
    # Both are the same model.
    for of_both in ("parameters", "gradient_bytes", "layers"):
        assert scanned[of_both] == unrolled[of_both]
    assert unrolled["layouts"].keys() == {"zero=0"}


def test_memory_is_that_of_one_device(result):
    model = result["models"][0]
    for found in model["layouts"].values():
        kept = found["argument_bytes"] + found["output_bytes"] - found["alias_bytes"]
        assert found["peak_bytes"] == kept + found["temp_bytes"]
        assert found["temp_bytes"] > 0
    whole, divided = (
        model["layouts"][name]["argument_bytes"] / model["gradient_bytes"]
        for name in ("zero=0", "zero=3")
    )
    # Parameters and two moments; and the tokens, which are not nothing beside them.
    assert 3 < whole < 3.1 and 3 / 8 < divided < 3 / 8 + 0.1


def test_collectives_are_those_of_the_layout(result):
    model = result["models"][0]
    gradient, steps = model["gradient_bytes"], model["accum_steps"]
    by_hand, whole, divided = (model["layouts"][name] for name in NAMES)
    assert 1 <= moved(whole, "all-reduce", in_loop=False) / gradient < 1.01
    assert not moved(whole, "all-reduce", in_loop=True)
    assert moved(divided, "reduce-scatter", in_loop=True) == steps * gradient
    assert moved(by_hand, "all-reduce", in_loop=True) > steps * gradient / 2


def test_its_table_has_a_row_for_every_layout(result, load):
    table = load("tables").layouts_table(result)
    assert table.count("Compiled, not run") == 2
    for name in NAMES:
        assert f"| {name} " in table


def test_hidden_is_what_has_work_between_start_and_done(load):
    found = jaxga.collectives(load("compiled").mark_hidden(HLO))
    # The first has an addition to hide behind, and something named after a product; the
    # second a loop, the one in the loop a product; the last is not split.
    kinds = [each.kind for each in found]
    assert kinds == ["all-reduce", "all-reduce", "all-gather", "all-reduce"]
    hidden = [each.op_name == "behind a matrix product" for each in found]
    assert hidden == [False, True, True, False]
    assert [each.times for each in found] == [1, 1, 18, 1]
