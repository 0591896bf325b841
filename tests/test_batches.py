"""The arithmetic of a batch, and padding that loses no row."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.anywhere


@pytest.mark.parametrize(
    "given_sizes, expected",
    [
        (dict(global_batch_size=384, microbatch_size=6), (384, 6, 8, 8)),
        (dict(global_batch_size=384, accum_steps=4), (384, 12, 4, 8)),
        (dict(microbatch_size=3, accum_steps=5, num_devices=2), (30, 3, 5, 2)),
        (
            dict(global_batch_size=30, microbatch_size=3, accum_steps=5, num_devices=2),
            (30, 3, 5, 2),
        ),
        (dict(global_batch_size=np.int64(8), microbatch_size=1), (8, 1, 1, 8)),
    ],
)
def test_two_numbers_give_the_third(given_sizes, expected):
    sizes = jaxga.BatchSizes(**given_sizes)
    found = (
        sizes.global_batch_size,
        sizes.microbatch_size,
        sizes.accum_steps,
        sizes.num_devices,
    )
    assert found == expected


def test_sizes_start_no_backend_where_devices_are_given():
    script = (
        "import jax, jaxga\n"
        "jaxga.BatchSizes(global_batch_size=8, accum_steps=2, num_devices=4)\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"  # raises once a backend runs
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_sizes_print_as_one_line_of_arithmetic():
    sizes = jaxga.BatchSizes(microbatch_size=4, accum_steps=1, num_devices=1)
    line = "4 examples per update = 4 per micro-batch * 1 accumulation step * 1 device"
    assert str(sizes) == line


@settings(max_examples=100, deadline=None)
@given(
    accum_steps=st.integers(1, 7),
    per_microbatch=st.integers(1, 7),
    data=st.data(),
)
def test_padding_loses_no_row_and_fills_the_first_microbatches(
    accum_steps, per_microbatch, data
):
    rows = accum_steps * per_microbatch
    real = data.draw(st.integers(1, rows))
    batch = {"x": np.arange(real), "y": np.arange(real * 2).reshape(real, 2)}
    padded, mask = jaxga.pad_batch(batch, rows, accum_steps=accum_steps)
    assert mask.dtype == bool and mask.shape == (rows,) and mask.sum() == real
    assert sorted(padded["x"][mask]) == list(range(real))
    assert set(padded["x"]) <= set(range(real))  # padding is a real row
    assert padded["y"].shape == (rows, 2)
    needed = -(-real // per_microbatch)
    for i in range(accum_steps):
        assert mask[i::accum_steps].any() == (i < needed)


def test_padded_batch_in_a_short_cycle_is_exact():
    rows = np.arange(1.0, 8.0, dtype=np.float32)
    padded, mask = jaxga.pad_batch(rows, 12, accum_steps=4)

    def loss_fn(params, batch):
        rows, mask = batch
        return jaxga.WeightedSum.of(params * rows, where=mask)

    cycle = jaxga.value_and_grad(loss_fn, accum_steps=4)
    short, grads = cycle(jnp.float32(1), (padded, mask), num_microbatches=3)
    assert short.weight == 7 and grads == 4


def test_padding_takes_jax_arrays_and_keys_too():
    batch = {"key": jax.random.split(jax.random.key(0), 3), "x": jnp.arange(3)}
    padded, mask = jaxga.pad_batch(batch, 4, accum_steps=2)
    assert padded["key"].shape == (4,) and isinstance(padded["x"], jax.Array)
