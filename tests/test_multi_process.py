"""Several processes compute what one does, refuse alike, and survive a kill.

As a script this file is one of the processes.
"""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jaxga
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from problems import ROWS, counted, distance, make_batch, make_mesh, make_params

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "multi_process.py"
TX = optax.sgd(0.1, momentum=0.9)  # Adam would hide a gradient N times too large
DEVICES, ACCUM_STEPS, UPDATES = 2, 6, 2
STAGES = {2: (0, 3), 4: (3,)}  # by the number of processes
TIMEOUT = 100  # seconds: a process that hangs fails its test


def rows_of(batch, number, count):
    """The rows of one process of `count`; together they are the batch, in order."""
    size = ROWS // count
    return jax.tree.map(lambda x: x[number * size : (number + 1) * size], batch)


def train(zero, mesh, batch):
    """The parameters after some updates, whole, on the host."""
    parallel = jaxga.DataParallel(mesh, zero=zero)
    step = jaxga.make_train_step(
        counted, TX, accum_steps=ACCUM_STEPS, parallel=parallel
    )
    state = parallel.shard_state(jaxga.TrainState.create(make_params(), TX))
    for _ in range(UPDATES):
        state, _ = step(state, parallel.shard_batch(batch))
    return jax.device_get(multihost_utils.process_allgather(state.params, tiled=True))


# ---- One process ---------------------------------------------------------------------


def refusals(parallel, number):
    """What `shard_batch` says of batches that do not fit those of other processes."""
    batches = {
        "rows": np.zeros((8 * (1 + number), 3), np.float32),
        "shapes": np.zeros((8, 3 + number), np.float32),
        "dtypes": np.zeros((8, 3), (np.float32, np.int32)[number % 2]),
        "indivisible": np.zeros((3, 3), np.float32),
    }
    for name, batch in batches.items():
        try:
            parallel.shard_batch(batch)
        except ValueError as error:
            yield name, str(error)


def be_a_process(address, count, number, folder):
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(address, int(count), int(number))
    mesh = make_mesh(jax.device_count())
    said = dict(refusals(jaxga.DataParallel(mesh), int(number)))
    np.savez(f"{folder}/said-{number}.npz", **said)
    batch = rows_of(make_batch(), int(number), int(count))  # nobody is out of step
    for zero in STAGES[int(count)]:
        leaves = jax.tree.leaves(train(zero, mesh, batch))
        np.savez(f"{folder}/zero-{zero}-{number}.npz", *leaves)
    jax.distributed.shutdown()


# ---- What starts them ----------------------------------------------------------------


@contextlib.contextmanager
def none_left(processes):
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def start_processes(count, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, address, str(count)]
    return [
        subprocess.Popen(
            [*command, str(number), folder],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]


def run_processes(count, folder):
    processes = start_processes(count, folder)
    with none_left(processes):
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs


REFUSED = {
    "rows": r"different numbers of rows: 8 on process 0, 16 on process 1",
    "shapes": r"different structures, shapes or dtypes\. This process has .*\({0},\)",
    "dtypes": r"different structures, shapes or dtypes\. This process has .*'{1}'",
    "indivisible": r"3 rows, which do not divide over 2 devices",
}


@pytest.mark.long
@pytest.mark.parametrize("count", STAGES)
def test_processes_equal_one_process(tmp_path, count):
    run_processes(count, tmp_path)
    for number in range(count):
        said = np.load(tmp_path / f"said-{number}.npz")
        assert sorted(said.files) == sorted(REFUSED)
        for name, pattern in REFUSED.items():
            dtype = ("float32", "int32")[number % 2]
            pattern = pattern.replace("{0}", str(3 + number)).replace("{1}", dtype)
            assert re.search(pattern, str(said[name])), (number, said[name])

    start, treedef = jax.tree.flatten(make_params())
    for zero in STAGES[count]:
        expected = train(zero, make_mesh(DEVICES * count), make_batch())
        moved = jax.tree.map(np.subtract, expected, make_params())
        found = [np.load(tmp_path / f"zero-{zero}-{n}.npz") for n in range(count)]
        for arrays in found:
            leaves = [arrays[name] - x for name, x in zip(arrays, start, strict=True)]
            assert distance(treedef.unflatten(leaves), moved) <= 1e-6


# ---- The example ---------------------------------------------------------------------

ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR"))
}


def run_example(*flags, **environment):
    return subprocess.run(
        [sys.executable, EXAMPLE, *flags],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
    )


def processes_with(word):
    """Those in whose command line it stands."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(word).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_for(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """The example kills one of its processes at a random moment."""
    folder = tmp_path / "runs"
    result = run_example("--updates", "6", "--save-every", "2", "--folder", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    killed = r"^process [01] killed [\d.]+ s after 'update 4, "
    assert re.search(killed, result.stdout, re.M), result.stdout
    left = re.search(r"checkpoints that it left, by updates: \[(.*)\]", result.stdout)
    assert "2" in left[1].split(", "), result.stdout
    assert re.search(r"all \d+ arrays .* are equal bit for bit", result.stdout)
    assert result.stderr.count("undisturbed:   0%") == 1, "one bar, of process 0"

    first, second = (
        np.load(folder / run / "final.npz") for run in ("undisturbed", "killed")
    )
    assert first[".update"] == 6 and first.files == second.files
    for name in first.files:
        assert first[name].tobytes() == second[name].tobytes(), name
    assert not processes_with(folder)


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="looks into /proc")
def test_no_process_outlives_its_parent(tmp_path):
    folder, for_ever = tmp_path / "runs", ("--updates", "1000000")
    command = [sys.executable, EXAMPLE, "--no-kill", "--folder", folder, *for_ever]
    parent = subprocess.Popen(
        [*command, "--save-every", "300000"],  # and no word in between
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(processes_with(folder / "undisturbed")) == 2)
        parent.kill()  # it cannot clean up
        parent.wait()
        wait_for(lambda: not processes_with(folder))
    finally:
        for number in {parent.pid, *processes_with(folder)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(
    "flags, environment, message",
    (
        (("--updates", "14"), {}, "--updates 14 --save-every 5: .* needs three saves"),
        (("--coordinator", "host0:1"), {}, "--process-id belongs to --coordinator"),
        ((), {"SLURM_STEP_NODELIST": "a[1-2]"}, "--folder is needed: one that all"),
    ),
)
def test_wrong_flags(flags, environment, message):
    result = run_example(*flags, **environment)
    assert result.returncode == 2, result.stderr
    assert re.search(f"error: {message}", result.stderr), result.stderr


if __name__ == "__main__":
    be_a_process(*sys.argv[1:])
