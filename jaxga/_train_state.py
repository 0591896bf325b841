"""All that a training run changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import PyTree
from ._keys import check_key
from ._loss_scale import check_loss_scale
from ._noise_scale import NoiseScale, check_noise_scale
from ._optimizer import check_transformation, settled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training run changes. Make one with `TrainState.create`.

    Attributes:
        params: the parameters.
        opt_state: the optimizer's state.
        model_state: what the forward pass changes (batch statistics); None without.
        key: random key of the run, never advanced: a step folds it with the number of
            cycles so far. None without.
        loss_scale: for float16, what the loss is multiplied with before it is
            differentiated. None without.
        noise_scale: what the step estimates the gradient noise scale with: a
            `NoiseScale`. None without.
        update: int32 scalar, optimizer updates so far.
        skipped: int32 scalar, cycles so far that changed nothing, because their
            gradient was not finite or no weight arrived.
    """

    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    key: jax.Array | None
    loss_scale: Any
    noise_scale: NoiseScale | None
    update: jax.Array
    skipped: jax.Array

    @classmethod
    def create(
        cls,
        params: PyTree,
        tx: optax.GradientTransformation,
        *,
        model_state: PyTree = None,
        key: jax.Array | None = None,
        loss_scale: Any = None,
        noise_scale: NoiseScale | None = None,
    ) -> "TrainState":
        """A state before the first update.

        Args:
            params: pytree of floating-point arrays. The state takes them over: a step
                that donates its state deletes these very arrays.
            tx: the optimizer, an optax gradient transformation.
            model_state: what the forward pass changes, if anything.
            key: a random key for the run, if the loss function takes `key=`.
            loss_scale: for float16 computation, an object with the methods of
                `jmp.DynamicLossScale`: `scale(tree)`, `unscale(tree)` and
                `adjust(grads_finite)`. It scales the mean of the cycle, not the sums
                of its micro-batches, which would overflow long before.
            noise_scale: a `jaxga.NoiseScale()`, for the record's `noise_scale`: how
                large the batch should be.

        Raises:
            TypeError: `tx` is no gradient transformation; `loss_scale` lacks a method;
                `noise_scale` is no `NoiseScale`.
            ValueError: `loss_scale` has a field that gets lost in a jitted function.

        Example:
            >>> import jax.numpy as jnp
            >>> import jaxga
            >>> import optax
            >>> state = jaxga.TrainState.create(jnp.zeros(3), optax.adam(1e-3))
            >>> print(state.update, state.skipped)
            0 0
        """
        check_transformation("tx", tx)
        if noise_scale is not None:
            noise_scale = check_noise_scale(noise_scale)
        if loss_scale is not None:
            loss_scale = check_loss_scale(loss_scale)
        check_key(key, per_example=False)
        state = cls(
            params=params,
            opt_state=tx.init(params),
            model_state=model_state,
            key=None if key is None else jnp.copy(key),
            loss_scale=loss_scale,
            noise_scale=noise_scale,
            update=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
        )
        return settled(state, ())
