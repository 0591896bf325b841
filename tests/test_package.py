"""The shape of the package: layers, what an import costs, what is documented."""

import ast
import inspect
import pathlib
import subprocess
import sys

import jaxga
import jaxga.checkpointing
import jaxga.linen
import jaxga.nnx
import pytest

ROOT = pathlib.Path(jaxga.__file__).parent

# A file imports only from files further down.
LAYERS = [
    ["__init__"],
    ["_audit/audit"],
    ["_audit/trainer_study"],
    ["_audit/study"],
    ["_audit/causes", "_audit/state", "_audit/trainer"],
    ["_audit/coupling", "_audit/cycles", "_audit/factors", "_audit/pieces"],
    ["_audit/compare", "_audit/problem"],
    ["checkpointing", "linen", "nnx"],
    ["_nnx_step", "_train_step"],
    ["_auto_size", "_memory/plan_memory"],
    ["_nnx_loss", "_nnx_per_example", "_step"],
    ["_devices", "_feeding", "_nnx_state", "_placed_step", "_record"],
    ["_accumulate"],
    ["_open_cycle", "_restored_leaves"],
    ["_closing", "_named_leaves"],
    ["_accumulate_state", "_contribution", "_cycle_end"],
    ["_cycles"],
    ["_cycle_reader"],
    ["_interleave", "_microbatch_map", "_parallel", "_train_state", "_value_and_grad"],
    ["_cycle", "_layout", "_microbatch_map_rule"],
    ["_cycle_settings", "_noise_scale", "_objective", "_summed_already"],
    ["_term_weights"],
    ["_accumulators", "_compensated", "_loss", "_model_state", "_stages"],
    ["_state_merges"],
    ["_batch_norm"],
    ["_metrics", "_forward", "_keys", "_params", "_batches"],
    ["_lazy", "_memory/planner", "_norms", "_sums"],
    [
        "_collectives",
        "_linen_wgrad",
        "_memory/plan",
        "_merge",
        "_nnx_wgrad",
        "_shards",
    ],
    [
        "_agreement",
        "_audit/widen",
        "_axes",
        "_batch_sizes",
        "_data_flow",
        "_dtypes",
        "_fingerprint",
        "_hlo",
        "_linen_per_example",
        "_loss_scale",
        "_memory/budget",
        "_memory/flops",
        "_memory/search",
        "_optimizer",
        "_position",
        "_unchanged",
        "_uses",
        "_wgrad",
    ],
    ["_audit/report", "_checks", "_jaxprs"],
]

SUBMODULES = ("checkpointing", "linen", "nnx")
PUBLIC = [
    name for name in vars(jaxga) if not name.startswith("_") and name not in SUBMODULES
]
OF_SUBMODULES = [
    "checkpointing.restore",
    "checkpointing.save",
    "linen.float32_wgrad",
    "linen.make_train_step",
    "linen.per_example",
    "nnx.float32_wgrad",
    "nnx.make_train_step",
    "nnx.per_example",
    "nnx.value_and_grad",
]


def test_imports_point_down():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    files = {name_of(path): path for path in ROOT.rglob("*.py")}
    assert level.keys() == {name for name in files if not name.endswith("/__init__")}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = path.parents[node.level - 1]
                imported = name_of(folder / node.module.replace(".", "/"))
                assert level[name] < level[imported], (name, imported)


def name_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


def test_import_starts_no_backend_and_loads_neither_flax_nor_orbax():
    script = (
        "import jaxga, jax, sys\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"  # raises once a backend runs
        "loaded = {'flax', 'orbax'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert jax.device_count() == 2\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_that_check_can_fail():
    script = (
        "import jax; jax.numpy.zeros(1); jax.config.update('jax_num_cpu_devices', 2)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode and b"jax_num_cpu_devices" in done.stderr


def test_public_names():
    assert set(PUBLIC) == set(
        "BatchSizes DataParallel LossOutput Max Min NoiseScale Stack Sum "
        "TrainState WeightedSum accumulate audit collectives cycles "
        "float32_wgrad_dot_general has_updated make_train_step merge "
        "microbatch_map pad_batch plan_memory state_specs value_and_grad "
        "value_and_grad_sums".split()
    )


@pytest.mark.parametrize("name", [*PUBLIC, *OF_SUBMODULES])
def test_public_names_are_documented_with_an_example(name):
    thing = jaxga
    for part in name.split("."):
        thing = getattr(thing, part)
    doc = inspect.getdoc(thing)
    if name == "TrainState":
        doc += inspect.getdoc(jaxga.TrainState.create)
    assert ">>>" in doc
    if not inspect.isclass(thing):
        for argument in inspect.signature(thing).parameters:
            assert f"{argument}: " in doc, f"{name} does not say what {argument} is"


def test_functions_and_files_stay_small():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 320, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body:
                    assert body[-1].end_lineno - body[0].lineno < 45, node.name
