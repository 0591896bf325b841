"""The steps that are compared, each as its user would write it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxga
import optax
from harness import full_precision
from jax import lax
from transformer import token_losses

FULL, PLAIN = "full batch", "plain step"
# What a cycle is made of.
GRADIENT, UPDATE = "gradient of a micro-batch", "update alone"
# Each micro-batch's mean weighs alike in these, however many tokens it holds.
MEAN_OF_MEANS = ("loop of means", "optax.MultiSteps")


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss in the three forms that the contenders take.

    Attributes:
        token_losses: the losses of `(params, batch)`, as shaped as `batch["mask"]`.
    """

    token_losses: Callable = token_losses

    def sum_and_weight(self, params, batch):
        losses, mask = self.token_losses(params, batch), batch["mask"]
        return jnp.where(mask, losses, 0.0).sum(), mask.sum()

    def mean(self, params, batch):
        total, weight = self.sum_and_weight(params, batch)
        return total / weight

    def weighted_sum(self, params, batch):
        losses = self.token_losses(params, batch)
        return jaxga.WeightedSum.of(losses, where=batch["mask"])


_SMALL = Loss()

# Loss and gradient of a batch, in the ways to be compared.


def full_batch(loss: Loss = _SMALL):
    return jax.value_and_grad(loss.mean)


def hand_written_scan(accum_steps, loss: Loss = _SMALL):
    grad_fn = jax.value_and_grad(loss.sum_and_weight, has_aux=True)

    def gradient(params, batch):
        def body(sums, microbatch):
            return jax.tree.map(jnp.add, sums, grad_fn(params, microbatch)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        start = ((jnp.zeros(()), jnp.int32(0)), zeros)
        sums, _ = lax.scan(body, start, cut(batch, accum_steps))
        return divide(sums)

    return gradient


def loop_of_means(accum_steps, loss: Loss = _SMALL):
    """The mean over micro-batches of their means, as most trainers take it."""
    grad_fn = jax.value_and_grad(loss.mean)

    def gradient(params, batch):
        def body(sums, microbatch):
            return jax.tree.map(jnp.add, sums, grad_fn(params, microbatch)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        sums, _ = lax.scan(body, (jnp.zeros(()), zeros), cut(batch, accum_steps))
        return jax.tree.map(lambda leaf: leaf / accum_steps, sums)

    return gradient


def maxtext_form(accum_steps, loss: Loss = _SMALL, dtype=None):
    """Sums in the parameters' dtype, and all beside the gradient stacked.

    With `dtype` the parameters are cast once, before the loop: gradients and their
    sums are then of that dtype too, as in MaxText with a sharded optimizer.
    """
    grad_fn = jax.value_and_grad(
        lambda params, batch: beside(*loss.sum_and_weight(params, batch)), has_aux=True
    )

    def beside(total, weight):
        return total, {"total": total, "weight": weight}

    def gradient(params, batch):
        if dtype is not None:
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)

        def body(sums, microbatch):
            (_, parts), grads = grad_fn(params, microbatch)
            return jax.tree.map(jnp.add, sums, grads), parts

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, stacked = lax.scan(body, zeros, cut(batch, accum_steps))
        parts = jax.tree.map(lambda leaf: leaf.sum(0), stacked)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        return divide(((parts["total"], jnp.maximum(parts["weight"], 1)), grads))

    return gradient


def optax_microbatch(microbatch_size, loss: Loss = _SMALL):
    summed = optax.microbatching.microbatch(
        jax.value_and_grad(loss.sum_and_weight, has_aux=True),
        argnums=1,
        microbatch_size=microbatch_size,
        accumulator=optax.microbatching.AccumulationType.SUM,
    )
    return lambda params, batch: divide(summed(params, batch))


def jaxga_cycle(accum_steps, loss: Loss = _SMALL):
    cycle = jaxga.value_and_grad(loss.weighted_sum, accum_steps=accum_steps)

    def gradient(params, batch):
        output, grads = cycle(params, batch)
        return output.loss, grads

    return gradient


def in_parts(loss: Loss, params, batch, number: int):
    """The gradient for comparison: in float32, of one part of the rows after another.

    For a batch that is too large to be computed at once.
    """
    with full_precision():
        grad_fn = jax.jit(jax.grad(loss.sum_and_weight, has_aux=True))
        parts = cut(batch, number)
        sums = jax.tree.map(jnp.zeros_like, params)
        for i in range(number):
            grads, _ = grad_fn(params, jax.tree.map(lambda x, i=i: x[i], parts))
            sums = jax.tree.map(jnp.add, sums, grads)
    weight = batch["mask"].sum()
    return jax.tree.map(lambda total: total / weight, sums)


def cut(batch, accum_steps):
    """Micro-batches along a leading axis, each of every `accum_steps`-th row."""

    def split(leaf):
        return leaf.reshape(-1, accum_steps, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


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
        calls: how many calls of the step make one cycle, on a micro-batch each; None
            for one call on the whole batch.
    """

    make_step: Callable
    make_state: Callable = lambda params, tx: (params, tx.init(params))
    read_opt_state: Callable = lambda state: state[1]
    calls: int | None = None

    def data(self, batch) -> list:
        """What the calls of one cycle are given."""
        if self.calls is None:
            return [batch]
        stacked = cut(batch, self.calls)
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.calls)]


def contenders(
    accum_steps: int, microbatch_size: int, loss: Loss = _SMALL
) -> dict[str, Contender]:
    """All that compute the gradient of the whole batch, by name; the baseline first."""
    return {
        FULL: plain(full_batch(loss)),
        "jaxga.value_and_grad": plain(jaxga_cycle(accum_steps, loss)),
        "jaxga.make_train_step": Contender(
            lambda tx: jaxga.make_train_step(
                loss.weighted_sum, tx, accum_steps=accum_steps
            ),
            jaxga.TrainState.create,
            lambda state: state.opt_state,
        ),
        "hand-written scan": plain(hand_written_scan(accum_steps, loss)),
        "MaxText's form": plain(maxtext_form(accum_steps, loss)),
        "optax.microbatch": plain(optax_microbatch(microbatch_size, loss)),
        "jaxga.accumulate": jaxga_calls(accum_steps, loss),
        "loop of means": plain(loop_of_means(accum_steps, loss)),
        "optax.MultiSteps": multisteps_calls(accum_steps, loss),
    }


def plain(gradient: Callable) -> Contender:
    def make_step(tx):
        def step(state, batch):
            loss, grads = gradient(state[0], batch)
            return apply(tx, state, grads), loss

        return step

    return Contender(make_step)


def multisteps_calls(accum_steps: int, loss: Loss = _SMALL) -> Contender:
    """Micro-batch by micro-batch: `optax.MultiSteps` says when there is an update."""

    def make_step(tx):
        return plain(full_batch(loss)).make_step(optax.MultiSteps(tx, accum_steps))

    return Contender(
        make_step,
        lambda params, tx: (params, optax.MultiSteps(tx, accum_steps).init(params)),
        lambda state: state[1].inner_opt_state,
        accum_steps,
    )


def jaxga_calls(accum_steps: int, loss: Loss = _SMALL) -> Contender:
    """Micro-batch by micro-batch: `jaxga.accumulate` is given sums and weights."""
    grad_fn = jax.value_and_grad(loss.sum_and_weight, has_aux=True)

    def make_step(tx):
        tx = jaxga.accumulate(tx, accum_steps)

        def step(state, microbatch):
            (total, weight), grads = grad_fn(state[0], microbatch)
            return tx.step(*state, grads, weight), total / weight

        return step

    return Contender(
        make_step,
        lambda params, tx: (params, jaxga.accumulate(tx, accum_steps).init(params)),
        lambda state: state[1].inner_state,
        accum_steps,
    )


def keep_gradient() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the last gradient."""

    def zeros(params):
        return jax.tree.map(jnp.zeros_like, params)

    return optax.GradientTransformation(
        zeros, lambda grads, state, params=None: (zeros(grads), grads)
    )


def first_gradient(opt_state):
    """The gradient of AdamW's very first update: its first moment is a tenth of it."""
    moment = optax.tree.get(opt_state, "mu")
    return jax.tree.map(lambda mu: mu / 0.1, moment)


def gradient_alone(loss: Loss = _SMALL) -> Contender:
    """Forward and backward pass: the parameters stay."""
    gradient = full_batch(loss)
    return Contender(lambda tx: lambda state, batch: (state, gradient(state[0], batch)))


def update_alone() -> Contender:
    return Contender(lambda tx: lambda state, grads: (apply(tx, state, grads), 0))


def apply(tx, state, grads):
    params, opt_state = state
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
