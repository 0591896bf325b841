"""The steps that `cycle.py` compares, each as its user would write it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxga
import optax
from jax import lax
from transformer import token_losses

FULL, FLOOR, UPDATE = "full batch", "one micro-batch", "update alone"


# The loss, in the three forms that the contenders take.


def sum_and_weight(params, batch):
    losses, mask = token_losses(params, batch), batch["mask"]
    return jnp.where(mask, losses, 0.0).sum(), mask.sum()


def mean_loss(params, batch):
    total, weight = sum_and_weight(params, batch)
    return total / weight


def loss_fn(params, batch):
    return jaxga.WeightedSum.of(token_losses(params, batch), where=batch["mask"])


# Loss and gradient of a batch, in the ways to be compared.


def full_batch():
    return jax.value_and_grad(mean_loss)


def hand_written_scan(accum_steps):
    grad_fn = jax.value_and_grad(sum_and_weight, has_aux=True)

    def split(leaf):
        return leaf.reshape(-1, accum_steps, *leaf.shape[1:]).swapaxes(0, 1)

    def gradient(params, batch):
        def body(sums, microbatch):
            return jax.tree.map(jnp.add, sums, grad_fn(params, microbatch)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        start = ((jnp.zeros(()), jnp.int32(0)), zeros)
        sums, _ = lax.scan(body, start, jax.tree.map(split, batch))
        return divide(sums)

    return gradient


def optax_microbatch(microbatch_size):
    summed = optax.microbatching.microbatch(
        jax.value_and_grad(sum_and_weight, has_aux=True),
        argnums=1,
        microbatch_size=microbatch_size,
        accumulator=optax.microbatching.AccumulationType.SUM,
    )
    return lambda params, batch: divide(summed(params, batch))


def jaxga_cycle(accum_steps):
    cycle = jaxga.value_and_grad(loss_fn, accum_steps=accum_steps)

    def gradient(params, batch):
        output, grads = cycle(params, batch)
        return output.loss, grads

    return gradient


def divide(sums):
    (total, weight), grads = sums
    # Dividing every entry by a traced number costs a CPU more than the whole update,
    # and none of the contenders shall lose by that.
    inverse = 1 / weight
    return total * inverse, jax.tree.map(lambda grad: grad * inverse, grads)


# Whole steps.


@dataclasses.dataclass(frozen=True)
class Contender:
    """A step `(state, data) -> (state, ...)`, and where its state comes from.

    Attributes:
        make_step: makes the step for an optimizer.
        make_state: makes a state of parameters and an optimizer.
        read_opt_state: the optimizer's state in it.
    """

    make_step: Callable
    make_state: Callable = lambda params, tx: (params, tx.init(params))
    read_opt_state: Callable = lambda state: state[1]


def contenders(accum_steps: int, microbatch_size: int) -> dict[str, Contender]:
    """All that compute the gradient of the whole batch, by name; the baseline first."""
    return {
        FULL: plain(full_batch()),
        "jaxga.value_and_grad": plain(jaxga_cycle(accum_steps)),
        "jaxga.make_train_step": Contender(
            lambda tx: jaxga.make_train_step(loss_fn, tx, accum_steps=accum_steps),
            jaxga.TrainState.create,
            lambda state: state.opt_state,
        ),
        "hand-written scan": plain(hand_written_scan(accum_steps)),
        "optax.microbatch": plain(optax_microbatch(microbatch_size)),
    }


def plain(gradient: Callable) -> Contender:
    def make_step(tx):
        def step(state, batch):
            loss, grads = gradient(state[0], batch)
            return apply(tx, state, grads), loss

        return step

    return Contender(make_step)


def update_alone() -> Contender:
    return Contender(lambda tx: lambda state, grads: (apply(tx, state, grads), 0))


def apply(tx, state, grads):
    params, opt_state = state
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
