"""Cycles from streams: their rows, their positions, their threads, their processes."""

import copy
import gc
import json
import socket
import subprocess
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
import problems
import pytest
import streams
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from streams import PROCESSES, Source, numbers

pytestmark = pytest.mark.anywhere


def as_lists(stream):
    """Each cycle as the first row of each micro-batch that it has, and its shape."""
    found = []
    for batch, count in stream:
        assert type(count) is np.int32
        found.append((batch["x"][: int(count)].tolist(), batch["x"].shape))
    return found


def join_threads():
    for thread in threading.enumerate():
        if thread.name == "jaxga.cycles":
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    join_threads()


# Rows.


def cut(batch, microbatch_size):
    rows = len(jax.tree.leaves(batch)[0])
    for start in range(0, rows, microbatch_size):
        yield jax.tree.map(lambda x: x[start : start + microbatch_size], batch)  # noqa: B023


@pytest.mark.parametrize(
    "length, accum_steps, num_devices",
    [(12, 5, None), (12, 5, 1), (12, 5, 2), (12, 5, 8), (10, 5, None), (4, 1, 2)],
)
def test_a_stream_has_the_gradient_of_its_rows(length, accum_steps, num_devices):
    params = problems.make_params()
    batch = jax.tree.map(lambda x: x[: 8 * length], problems.make_batch())
    parallel = num_devices and jaxga.DataParallel(problems.make_mesh(num_devices))
    tx = optax.sgd(1024.0)
    step = jaxga.make_train_step(
        problems.counted, tx, accum_steps=accum_steps, parallel=parallel or None
    )
    counts, total, weight = [], None, 0
    stream = jaxga.cycles(cut(batch, 8), accum_steps, parallel=parallel or None)
    for cycle, count in stream:
        state = jaxga.TrainState.create(jax.tree.map(jnp.asarray, params), tx)
        if parallel:
            state = parallel.shard_state(state)
        state, metrics = step(state, cycle, num_microbatches=count)
        moved = jax.tree.map(
            lambda new, old, w=metrics["weight"]: (old - np.asarray(new)) * int(w),
            state.params,
            params,
        )
        total = moved if total is None else jax.tree.map(np.add, total, moved)
        weight += int(metrics["weight"])
        counts.append(int(count))
    tail = length % accum_steps
    assert counts == [accum_steps] * (length // accum_steps) + [tail] * bool(tail)
    assert weight == batch["mask"].sum()
    _, expected = problems.truth(problems.counted_mean, params, batch)
    grads = jax.tree.map(lambda g: g / (weight * 1024.0), total)
    assert problems.distance(grads, expected) < 1e-6


def test_a_short_cycle_is_exact_in_value_and_grad():
    params = problems.make_params()
    batch = jax.tree.map(lambda x: x[:24], problems.make_batch())
    ((cycle, count),) = jaxga.cycles(cut(batch, 8), 7)
    assert count == 3
    function = jaxga.value_and_grad(problems.three_terms, accum_steps=7)
    output, grads = jax.jit(function)(params, cycle, num_microbatches=count)
    loss, expected = problems.truth(problems.three_terms_mean, params, batch)
    assert abs(output.loss - loss) < 1e-6 * loss
    assert problems.distance(grads, expected) < 1e-6


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_microbatch_i_is_every_kth_row_of_each_device(num_devices):
    parallel = jaxga.DataParallel(problems.make_mesh(num_devices))
    microbatches = [np.arange(8.0).reshape(4, 2) + 100 * i for i in range(5)]
    (full, n), (short, m) = jaxga.cycles(microbatches, 3, parallel=parallel)
    assert (n, m) == (3, 2)
    for batch, present in ((full, microbatches[:3]), (short, microbatches[3:])):
        assert batch.shape == (12, 2)
        assert len(batch.sharding.device_set) == num_devices
        for shard in batch.addressable_shards:
            rows = slice(*(at and at // 3 for at in shard.index[0].indices(12)[:2]))
            for i, microbatch in enumerate(present):
                np.testing.assert_array_equal(shard.data[i::3], microbatch[rows])
    np.testing.assert_array_equal(short[2::3], microbatches[3])  # real rows fill it


def test_dtypes_structure_and_default_device():
    microbatch = {
        "tokens": np.arange(4),
        "mask": (np.arange(4) > 1, None),
        "half": np.ones((4, 2), jnp.bfloat16),
    }
    with jax.default_device(jax.devices()[3]):
        ((batch, _),) = jaxga.cycles([microbatch], 2)
    assert jax.tree.structure(batch) == jax.tree.structure(microbatch)
    dtypes = jax.tree.map(lambda x: str(x.dtype), batch)
    assert dtypes == {"tokens": "int32", "mask": ("bool", None), "half": "bfloat16"}
    assert batch["tokens"].devices() == {jax.devices()[3]}


def test_x64_of_the_consumer_holds_in_the_thread():
    with jax.enable_x64(True):
        for batch, _ in jaxga.cycles([np.array([2**40]), np.array([2**41])], 1):
            assert batch.dtype == np.int64 and batch[0] >= 2**40


def test_nothing_is_moved_implicitly():
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        assert [int(n) for _, n in jaxga.cycles([np.ones(2), np.zeros(2)], 2)] == [2]
    finally:
        jax.config.update("jax_transfer_guard", None)


def test_a_source_may_reuse_its_buffer():
    def source():
        buffer = np.zeros(2, np.int32)
        for i in range(5):
            buffer[:] = i
            yield buffer

    batches = [batch.tolist() for batch, _ in jaxga.cycles(source(), 2)]
    assert batches == [[0, 1] * 2, [2, 3] * 2, [4, 4] * 2]


def test_also_where_the_first_is_an_array_of_jax():
    def source():
        buffer = np.zeros(200, np.int32)
        yield jnp.zeros(200, jnp.int32)
        for i in (1, 2):
            buffer[:] = i
            yield buffer

    ((batch, _),) = jaxga.cycles(source(), 3)
    assert batch.tolist() == [0, 1, 2] * 200


def test_arrays_on_a_device_stay_there():
    device = jax.devices()[5]
    source = (jax.device_put(np.array([i, 10 * i]), device) for i in range(1, 4))
    (full, _), (short, _) = jaxga.cycles(source, 2)
    assert full.devices() == {device}
    assert full.tolist() == [1, 2, 10, 20] and short.tolist() == [3, 3, 30, 30]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_arrays_that_are_sharded_already(axis_type):
    parallel = jaxga.DataParallel(problems.make_mesh(2, axis_type))
    source = (parallel.shard_batch(np.array([i, 10 * i])) for i in range(1, 4))
    (full, _), (short, _) = jaxga.cycles(source, 2, parallel=parallel)
    assert full.tolist() == [1, 2, 10, 20] and short.tolist() == [3, 3, 30, 30]
    rows = NamedSharding(parallel.mesh, PartitionSpec("data"))
    assert full.sharding.is_equivalent_to(rows, 1)


def test_random_keys_are_rows_too():
    keys = [jax.random.split(jax.random.key(i), 2) for i in range(3)]
    (full, _), (short, _) = jaxga.cycles(keys, 2)
    assert (full[1::2] == keys[1]).all() and (short[::2] == keys[2]).all()


def test_what_numpy_can_read_is_an_array():
    class Tensor:
        shape, dtype = (2,), "a dtype of its own"

        def __array__(self, dtype=None, copy=None):
            return np.array([1, 2])

    ((batch, _),) = jaxga.cycles([Tensor(), np.array([3, 4])], 2)
    assert batch.tolist() == [1, 3, 2, 4]


def test_drop_last():
    stream = jaxga.cycles(Source(numbers(5)), 2, drop_last=True)
    assert [int(n) for _, n in stream] == [2, 2]
    assert next(stream, "ended") == "ended"
    assert stream.get_state() == {"source": {"next": 4}, "updates": 2}


def test_an_empty_stream_has_no_cycles():
    assert list(jaxga.cycles([], 3)) == []


# Batch sizes that grow.


def test_warm_up_traces_once_and_takes_each_row_once():
    rng = np.random.default_rng(0)
    stream = [rng.normal(size=(4, 2)).astype(np.float32) for _ in range(13)]
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return jaxga.WeightedSum.of(((batch @ params) - 1) ** 2)

    tx = optax.sgd(0.1)
    state = jaxga.TrainState.create(jnp.zeros(2), tx)
    step = jaxga.make_train_step(loss_fn, tx, accum_steps=4)
    counts, traced = [], None
    plan = (lambda updates: jnp.minimum(updates + 1, 4), 4)
    for batch, count in jaxga.cycles(stream, plan):
        state, _ = step(state, batch, num_microbatches=count)
        counts.append(int(count))
        traced = traced or len(traces)
    assert counts == [1, 2, 3, 4, 3] and len(traces) == traced

    params, start = jnp.zeros(2), 0
    for count in counts:
        rows = jnp.concatenate(stream[start : start + count])
        grad = jax.grad(lambda p, rows=rows: jnp.mean((rows @ p - 1) ** 2))(params)
        params, start = params - 0.1 * grad, start + count
    np.testing.assert_allclose(state.params, params, rtol=2e-6)


@pytest.mark.parametrize(
    "value, error, words",
    [
        (0, ValueError, r"for update 2, function\(2\)=0 must be .* at least 1"),
        (2.5, TypeError, r"for update 2, function\(2\)=2.5 must be an integer"),
        (True, TypeError, r"function\(2\)=True must be an integer.*boolean"),
        (5, ValueError, r"function\(2\)=5, is more than the maximum=4"),
        (jnp.float32(2), TypeError, r"function\(2\)=Array\(2., dtype=float32\) must"),
    ],
)
def test_values_of_the_function_are_checked(value, error, words):
    plan = (lambda updates: value if updates == 2 else 1, 4)
    stream = jaxga.cycles(numbers(9), plan)
    next(stream), next(stream)
    with pytest.raises(error, match=words):
        next(stream)


def test_the_function_is_asked_for_cycles_that_exist_alone():
    sizes = [1, 3]
    stream = jaxga.cycles(numbers(4), (lambda updates: sizes[updates], 3))
    assert [int(n) for _, n in stream] == [1, 3]


def test_a_function_cannot_end_the_stream_in_silence():
    stream = jaxga.cycles(numbers(3), (lambda updates: next(iter(())), 2))
    with pytest.raises(RuntimeError, match="accum_steps raised StopIteration"):
        next(stream)


# Positions.


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(0, 13),
    accum_steps=st.integers(1, 4),
    warm_up=st.booleans(),
    drop_last=st.booleans(),
    handed_out=st.integers(0, 14),
    fail_at=st.none() | st.integers(0, 12),
)
def test_a_restored_position_continues_as_if_never_interrupted(
    length, accum_steps, warm_up, drop_last, handed_out, fail_at
):
    plan = accum_steps
    if warm_up:
        plan = (lambda updates: min(1 + updates // 2, accum_steps), accum_steps)

    def make(fail_at=None):
        source = Source(numbers(length), fail_at)
        return jaxga.cycles(source, plan, drop_last=drop_last)

    def read(stream, most=1000):
        found = []
        while len(found) < most:
            try:
                found += as_lists([next(stream)])
            except OSError:  # tries again
                continue
            except StopIteration:
                break
        return found

    whole = as_lists(make())
    stream = make(fail_at)
    before = read(stream, handed_out)
    state = copy.deepcopy(stream.get_state())
    assert before == whole[:handed_out]
    assert state["updates"] == len(before)
    resumed = make()
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert before + as_lists(resumed) == whole
    stream.set_state(state)  # what was read ahead is read again
    assert before + read(stream) == whole


def test_a_source_is_not_moved_while_it_is_being_read():
    entered, gate, inside = threading.Event(), threading.Event(), []

    class Slow(Source):
        def __next__(self):
            if self.position["next"] == 3:
                inside.append(True)
                entered.set()
                assert gate.wait(30)
                inside.clear()
            return super().__next__()

        def set_state(self, state):
            assert not inside
            super().set_state(state)

    stream = jaxga.cycles(Slow(numbers(5)), 2)
    start = stream.get_state()
    next(stream)
    assert entered.wait(30)
    mover = threading.Thread(target=stream.set_state, args=[start])
    mover.start()
    mover.join(0.2)
    gate.set()
    mover.join(30)
    assert as_lists(stream) == as_lists(jaxga.cycles(numbers(5), 2))


def test_a_position_does_not_change_when_the_source_goes_on():
    stream = jaxga.cycles(Source(numbers(6)), 2)
    start = stream.get_state()
    next(stream)
    first = stream.get_state()
    next(stream)
    join_threads()
    assert start == {"source": {"next": 0}, "updates": 0}
    assert first == {"source": {"next": 2}, "updates": 1}
    assert stream.get_state() == {"source": {"next": 4}, "updates": 2}


def test_positions_that_a_source_cannot_tell_hurt_only_who_asks():
    class Unable(Source):
        def get_state(self):
            raise NotImplementedError("no state here")

    stream = jaxga.cycles(Unable(numbers(3)), 2)
    assert [int(n) for _, n in stream] == [2, 1]
    with pytest.raises(NotImplementedError, match="no state here"):
        stream.get_state()


@pytest.mark.parametrize("method", ["get_state", "set_state"])
def test_a_source_without_position(method):
    stream = jaxga.cycles((x for x in numbers(3)), 2)
    args = [{"source": None, "updates": 0}] * (method == "set_state")
    words = f"{method}: .* of type generator, has no get_state and set_state"
    with pytest.raises(TypeError, match=words):
        getattr(stream, method)(*args)


@pytest.mark.parametrize(
    "state, error, words",
    [
        (None, ValueError, "the state is None of type NoneType; it must be a dict of"),
        ({"next": 3}, ValueError, "it must be a dict of"),
        ({"source": 0, "updates": -1}, ValueError, "updates.*at least 0"),
        ({"source": 0, "updates": 1.5}, TypeError, "updates.*must be an integer"),
    ],
)
def test_states_of_something_else(state, error, words):
    with pytest.raises(error, match=words):
        jaxga.cycles(Source(numbers(3)), 2).set_state(state)


# The thread.


def test_the_next_cycle_is_read_and_moved_while_the_consumer_has_this_one(monkeypatch):
    read, moved, put = [], threading.Semaphore(0), jax.device_put

    def source():
        for i in range(12):
            read.append(i)
            yield np.array([i])

    def device_put(batch):
        moved.release()
        return put(batch)

    monkeypatch.setattr(jax, "device_put", device_put)
    stream = jaxga.cycles(source(), 3)
    assert not read, "read before it was asked"
    next(stream)
    assert moved.acquire(timeout=30) and moved.acquire(timeout=30)
    join_threads()
    assert len(read) == 6, "one cycle ahead, and no more"
    assert [int(n) for _, n in stream] == [3, 3, 3]


@pytest.mark.parametrize("accum_steps", [2, 4])
def test_the_source_is_not_asked_again_once_it_has_ended(accum_steps):
    class Endless:
        asked = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.asked += 1
            if self.asked == 3:
                raise StopIteration
            return np.array([self.asked])

    source = Endless()
    stream = jaxga.cycles(source, accum_steps)
    assert [int(n) for _, n in stream] == [2]
    assert next(stream, None) is None and source.asked == 3


def test_an_error_comes_in_place_of_its_cycle_and_loses_nothing():
    stream = jaxga.cycles(Source(numbers(8), fail_at=4), 3)
    next(stream)
    join_threads()  # it has happened
    assert stream.get_state()["source"] == {"next": 3}
    with pytest.raises(OSError, match="cannot read 4"):
        next(stream)
    assert stream.get_state() == {"source": {"next": 3}, "updates": 1}
    rest = [batch["x"].tolist() for batch, _ in stream]
    assert rest == [[40, 50, 60, 41, 51, 61], [70, 80, 70, 71, 81, 71]]


def test_exits_of_the_source_reach_the_consumer():
    def source():
        yield np.ones(1)
        raise SystemExit(3)

    stream = jaxga.cycles(source(), 1)
    next(stream)
    with pytest.raises(SystemExit):
        next(stream)


@pytest.mark.parametrize("leave", ["del", "break"])
def test_the_thread_ends_with_its_consumer(leave):
    entered, gate, asked = threading.Event(), threading.Event(), []

    def source():
        for i in range(1000):
            asked.append(i)
            if i == 4:
                entered.set()
                assert gate.wait(30)
            yield np.array([i])

    stream = jaxga.cycles(source(), 3)
    for _ in stream:
        break
    assert entered.wait(30)
    gone = weakref.ref(stream)
    if leave == "del":
        del stream
        gc.collect()
        assert gone() is None, "the thread keeps its consumer alive"
    gate.set()
    join_threads()
    assert len(asked) == (5 if leave == "del" else 6)


def test_the_interpreter_exits_while_threads_wait_or_work():
    # One thread waits for ever; one is inside JAX all the time, where being killed
    # would abort the process.
    script = """if True:
        import threading, jax, jax.numpy as jnp, jaxga, numpy as np
        def waits():
            yield np.ones(1)
            entered.set()
            threading.Event().wait()
        def works():
            while True:
                x = jnp.ones((200, 200))
                for _ in range(20):
                    x = jnp.sin(x @ x)
                yield np.asarray(x)
        entered = threading.Event()
        streams = jaxga.cycles(waits(), 1), jaxga.cycles(works(), 1000)
        next(streams[0])
        assert entered.wait(30)
        streams[1]._reader.start(0)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


# Misuse.


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(accum_steps=0), ValueError, "accum_steps=0 must be .* at least 1"),
        (dict(accum_steps=-1), ValueError, "accum_steps=-1 must be .* at least 1"),
        (dict(accum_steps=2.5), TypeError, "accum_steps=2.5 must be an integer"),
        (dict(accum_steps="2"), TypeError, "accum_steps='2' must be an integer"),
        (dict(accum_steps=None), TypeError, "accum_steps=None must be an integer"),
        (dict(accum_steps=True), TypeError, "accum_steps=True .* not a boolean"),
        (dict(accum_steps=abs), TypeError, r"without a maximum; give \(function, max"),
        (dict(accum_steps=(abs,)), TypeError, r"must be an integer or \(function, max"),
        (dict(accum_steps=(4, abs)), TypeError, r"or \(function, maximum\)"),
        (dict(accum_steps=(abs, 0)), ValueError, "maximum of accum_steps=0 must be"),
        (dict(accum_steps=(abs, 2.0)), TypeError, "maximum of accum_steps=2.0 must"),
        (dict(iterable=3), TypeError, "is 3 of type int, which cannot be iterated"),
        (dict(iterable={"x": np.ones(2)}), TypeError, "of type dict: one batch, or no"),
        (dict(iterable=np.ones((4, 2))), TypeError, r"shape \(4, 2\) .*: one batch"),
        (dict(iterable=jnp.ones((4, 2))), TypeError, r"shape \(4, 2\) .*: one batch"),
        (dict(iterable=(np.ones(2), np.ones(2))), TypeError, "type tuple: one batch"),
        (dict(iterable="data.npz"), TypeError, "'data.npz' of type str: one batch, or"),
        (dict(parallel=8), TypeError, "parallel is 8 .* must be a jaxga.DataParallel"),
        (dict(drop_last="no"), TypeError, "drop_last='no' must be True or False"),
    ],
)
def test_misuse_at_the_call(change, error, words):
    arguments = dict(iterable=numbers(3), accum_steps=2) | change
    with pytest.raises(error, match=words):
        jaxga.cycles(**arguments)


@pytest.mark.parametrize(
    "third, error, words",
    [
        (
            {"x": np.ones((3, 5)), "y": np.ones(3)},
            ValueError,
            r"cycle 1: microbatch\[1\]\['x'\] has shape \(3, 5\) and dtype float64, "
            r"but in microbatch\[0\] it has \(4, 5\).*must be alike. If it is a "
            r"loader's shorter last batch, pad it, .*jaxga.pad_batch\(batch, 4, "
            r"accum_steps=1\)`"
            ".* mask",
        ),
        (
            {"x": np.ones((4, 6)), "y": np.ones(4)},
            ValueError,
            r"\['x'\] has shape \(4, 6\) .* it has \(4, 5\) .* must be alike.$",
        ),
        (
            {"x": np.ones((4, 5)), "y": np.ones(4, np.float32)},
            ValueError,
            r"\['y'\] has shape \(4,\) and dtype float32, but .* \(4,\) and float64",
        ),
        ({"x": np.ones((4, 5))}, ValueError, r"microbatch\[1\] has the structure"),
        (
            {"x": np.ones((4, 5)), "y": "four"},
            TypeError,
            r"microbatch\[1\]\['y'\] is 'four' of type str, not an array of JAX",
        ),
        ({"x": np.ones((4, 5)), "y": 4}, ValueError, r"\['y'\] has shape \(\)"),
    ],
)
def test_microbatches_of_a_cycle_must_be_alike(third, error, words):
    alike = {"x": np.ones((4, 5)), "y": np.ones(4)}
    stream = jaxga.cycles([alike, alike, alike, third, alike], 2)
    next(stream)
    for _ in range(2):  # it is not passed over at the second attempt
        with pytest.raises(error, match=words):
            next(stream)


@pytest.mark.parametrize(
    "microbatch, error, words",
    [
        ("inputs", TypeError, "is the string 'inputs': is the iterable one batch"),
        ({"x": 3}, TypeError, r"microbatch\[0\]\['x'\] is 3 of type int, not an array"),
        ({"x": np.float32(3)}, ValueError, r"\['x'\] is a scalar"),
        ({}, ValueError, "holds no arrays"),
        ({"x": np.ones((0, 2))}, ValueError, "has no rows"),
        ({"x": np.ones(2), "y": np.ones(3)}, ValueError, "same number of rows"),
        ({"x": np.array(["a"])}, TypeError, r"\['x'\] is .* <U1, not an array of JAX"),
        ({"x": np.array([{}])}, TypeError, "dtype object, not an array of JAX"),
        ({"x": jax.ShapeDtypeStruct((2,), "f4")}, TypeError, "a shape without values"),
    ],
)
def test_what_is_no_microbatch(microbatch, error, words):
    with pytest.raises(error, match=words):
        next(jaxga.cycles([microbatch], 2))


def test_rows_that_do_not_divide_over_the_devices():
    parallel = jaxga.DataParallel(problems.make_mesh(4))
    words = r"has 6 rows, which do not divide over .* 4 devices.*pad_batch\(batch, 8,"
    with pytest.raises(ValueError, match=words):
        # The 24 rows of the whole cycle would divide.
        next(jaxga.cycles(numbers(4, rows=6), 4, parallel=parallel))


# Several processes.


def test_processes_agree_and_end_together():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "error", streams.__file__, str(port)]
    workers = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    try:
        outputs = [worker.communicate(timeout=90)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * PROCESSES
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    surplus = "ValueError: The processes' streams have different lengths. In the last "
    for found, own_error in ((first, None), (second, "OSError: cannot read 4")):
        assert found["equal"] == [[3, 3], [2, 5], "end", "end"]
        assert found["steps"] == [35, 85]  # means over both processes' rows
        assert found["on devices"] == [[2, 2], [1, 3], "end", "end"]
        # The second process has one micro-batch fewer.
        error = surplus + "cycle they had 2 on process 0, 1 on process 1"
        assert found["surplus"][:2] == [[3, 3], [1, 4]]
        assert found["surplus"][2].startswith(error)
        assert found["surplus"][3:] == ["end", "end"]
        assert found["drop_last"] == [[3, 3], "end", "end", "end"]
        error = surplus + "cycle they had 2 on process 0, 0 on process 1"
        assert found["empty"][0].startswith(error)
        assert found["empty"][1:] == ["end", "end", "end"]
        # The second process fails once.
        error = own_error or "RuntimeError: Process 1 failed to read its next cycle"
        assert found["failure"][0] == [3, 3]
        assert found["failure"][1].startswith(error)
        assert found["failure"][2:] == [[2, 5], "end"]
        assert "micro-batches of different structures, shapes" in found["shapes"][0]
        error = "same cycle: 1 on process 0, 2 on process 1"
        assert error in found["plans"][0]
