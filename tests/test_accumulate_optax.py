"""optax's own tests of `MultiSteps`, on `accumulate` behind a thin shim."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxga
import optax
import pytest
from optax.transforms import _accumulation, _accumulation_test

pytestmark = pytest.mark.anywhere


class State(NamedTuple):
    """The names of optax."""

    state: NamedTuple

    mini_step = property(lambda self: self.state.num_microbatches)
    acc_grads = property(lambda self: self.state.sums)


class MultiSteps:
    """`optax.MultiSteps`, as `accumulate` would have it."""

    def __init__(
        self,
        opt,
        every_k_schedule,
        use_grad_mean=True,
        should_skip_update_fn=None,
        accumulator_dtype=None,
    ):
        assert use_grad_mean
        self.tx = jaxga.accumulate(
            opt,
            every_k_schedule,
            accum_dtype=accumulator_dtype,
            nonfinite="drop_microbatch" if should_skip_update_fn else "propagate",
        )

    def gradient_transformation(self):
        @jax.jit
        def update(grads, state, params=None, **extra_args):
            updates, state = self.tx.update(grads, state.state, params, **extra_args)
            return updates, State(state)

        return (lambda params: State(self.tx.init(params))), update

    def has_updated(self, state):
        return jaxga.has_updated(state)


def run(name):
    # Named by its module: pytest would collect it as ours.
    getattr(_accumulation_test.AccumulationTest(name), name)()


@pytest.fixture(autouse=True)
def in_place_of_theirs(monkeypatch):
    monkeypatch.setattr(_accumulation, "MultiSteps", MultiSteps)


OURS = (
    "test_multi_steps",
    "test_multi_steps_every_k_schedule",
    "test_multi_steps_scan_dtype_stability",
    "test_multi_steps_zero_nans",
    "test_multi_steps_computes_mean",
    "test_multi_steps_mixed_precision1",  # Adam's moment in a dtype of its own
)

DIFFERENT = (
    "test_multi_steps_skip_not_finite",
    "test_multi_steps_mixed_precision0",
)


def test_none_is_left_out():
    names = dir(_accumulation_test.AccumulationTest)
    theirs = {name for name in names if name.startswith("test_multi")}
    assert theirs == {*OURS, *DIFFERENT}


@pytest.mark.parametrize("name", OURS)
def test_passes(name):
    run(name)


def test_a_dropped_microbatch_counts_as_a_call():
    """There, a bad micro-batch is waited for again; here, the cycle goes on without.

    A cycle has the calls that were planned, and loaders and logs stay in step.
    """
    with pytest.raises(AssertionError, match="1 != 0"):
        run("test_multi_steps_skip_not_finite")


def test_updates_are_made_of_sums_in_float32():
    """There, the mean is cast to the gradients' dtype before the optimizer sees it.

    Here it stays as it was summed, and the optimizer's state keeps its dtypes.
    """
    with pytest.raises(AssertionError, match="updates dtype must match"):
        run("test_multi_steps_mixed_precision0")
    tx = jaxga.accumulate(optax.adam(0.1), 1)
    params = jnp.zeros(3, jnp.bfloat16)
    state = tx.init(params)
    updates, new = tx.update(jnp.ones(3, jnp.bfloat16), state, params)
    assert updates.dtype == jnp.float32
    dtypes = [jax.tree.map(lambda x: x.dtype, s) for s in (state, new)]
    assert dtypes[0] == dtypes[1]
