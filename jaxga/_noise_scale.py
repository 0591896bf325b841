"""Gradient noise scale: how large the batch should be, read off the sums of a cycle.

A cycle is made of parts, micro-batches or devices, and each has a sum of gradients
`s_i` with its weight `w_i`. How far the parts' means are from the mean of all is an
estimate of the gradient's variance, and the variance, taken off the mean's square,
leaves that of the true gradient: with `n` parts, `S` and `W` their sums,

    noise  = (sum(|s_i|^2 / w_i) - |S|^2 / W) / (n - 1)     trace of the covariance
    signal = |S|^2 / W^2 - noise / W                        square of the true gradient

Both are unbiased: the estimate of McCandlish et al. (arXiv 1812.06162, appendix A.1)
from two batch sizes, here for parts of unequal weight. Their ratio is not, so numerator
and denominator are averaged over cycles apart.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._axes import varying
from ._checks import PyTree, describe
from ._loss import terms_of
from ._merge import MergeType
from ._stages import Stage0

_PARTS = ("device", "microbatch")


def _zero():
    return jnp.zeros((), jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale of a run: `TrainState.create(..., noise_scale=...)`.

    The batch size at which the noise of the gradient, and the gradient itself, are of
    one size. Much smaller batches take proportionally more updates, much larger ones
    hardly fewer (McCandlish et al., arXiv 1812.06162). It grows during training. The
    step estimates it from parts of each cycle, averages over cycles, and adds
    `noise_scale` to its record, in the unit of the loss's weight: tokens, if the loss
    is averaged over tokens; of a loss of several terms, in examples. It takes tokens
    for independent of each other.

    What it costs: by device, one more pass over the gradient per cycle. By micro-batch,
    one more per micro-batch; and with scanned layers memory for one more gradient,
    because the gradient of a micro-batch must then be held before it is added.

    Attributes:
        per: what the parts are. `"device"`: each device's sum of the whole cycle; there
            must be two devices, and `zero=2` and `zero=3` leave no device its own sum.
            `"microbatch"`: each micro-batch, on each device; or, where `zero` is 2 or
            3, on the devices that a gradient is divided over together.
        decay: of the averages, from 0 (the last cycle alone) to 1 (all alike).
        noise: float32 scalar, average of the estimates of the trace of the gradient's
            covariance, for weight 1.
        signal: float32 scalar, average of the estimates of the squared norm of the true
            gradient. Estimates can be negative.
        total: float32 scalar, the weight of the two averages; 0 before the first.

    Raises:
        ValueError: `per` is none of the two; `decay` is not from 0 to 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> import optax
        >>> def loss_fn(params, x):
        ...     return jaxga.WeightedSum.of((x - params) ** 2 / 2)
        >>> tx = optax.sgd(0.0)
        >>> step = jaxga.make_train_step(loss_fn, tx, accum_steps=4)
        >>> state = jaxga.TrainState.create(
        ...     jnp.zeros(()), tx, noise_scale=jaxga.NoiseScale(per="microbatch"))
        >>> state, metrics = step(state, jnp.array([1.0, 2.0, 3.0, 4.0]))
        >>> print(metrics["noise_scale"])  # variance 5/3 over mean^2 - 5/12
        0.28571427
    """

    per: str = dataclasses.field(default="device", metadata={"static": True})
    decay: float = dataclasses.field(default=0.95, metadata={"static": True})
    noise: jax.Array = dataclasses.field(default_factory=_zero)
    signal: jax.Array = dataclasses.field(default_factory=_zero)
    total: jax.Array = dataclasses.field(default_factory=_zero)

    def __post_init__(self):
        if self.per not in _PARTS:
            raise ValueError(
                f"NoiseScale: per={self.per!r} must be 'device' or 'microbatch'."
            )
        is_number = isinstance(self.decay, int | float) and self.decay is not True
        if not is_number or not 0 <= self.decay <= 1:
            raise ValueError(
                f"NoiseScale: decay={self.decay!r} must be a number from 0 to 1."
            )

    @property
    def value(self) -> jax.Array:
        """The noise scale, in the unit of the loss's weight.

        0 before the first estimate (bound from below what follows it); infinite while
        the noise hides the gradient (the average of `signal` is not positive).
        """
        is_seen = self.signal > 0
        ratio = jnp.maximum(self.noise, 0) / jnp.where(is_seen, self.signal, 1)
        return jnp.where(self.total > 0, jnp.where(is_seen, ratio, jnp.inf), 0)

    def add(self, parts: "Parts", norm: jax.Array, weight: jax.Array) -> "NoiseScale":
        """With the estimate of one more cycle.

        Args:
            parts: those of the cycle, over all devices.
            norm: of the summed gradient.
            weight: of the summed gradient: that of the parts, or 1 if it is divided.

        Returns:
            The new averages; the old ones, if the cycle had fewer than two parts, or
            was not finite.
        """
        safe = jnp.where(parts.count > 1, parts.weight, 1)
        # By what the sums of the parts were divided already.
        divided_by = safe / weight.astype(jnp.float32)
        square = jnp.square(norm).astype(jnp.float32)
        among = parts.squares - square / safe
        noise = among * divided_by**2 / jnp.maximum(parts.count - 1, 1)
        signal = square * (divided_by / safe) ** 2 - noise / safe
        total = 1 + self.decay * self.total
        new = dataclasses.replace(
            self,
            noise=self.noise + (noise - self.noise) / total,
            signal=self.signal + (signal - self.signal) / total,
            total=total,
        )
        # One NaN would stay for ever, where cycles that are not finite are applied.
        good = (parts.count > 1) & jnp.isfinite(noise) & jnp.isfinite(signal)
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, self)


def check_noise_scale(value: Any) -> NoiseScale:
    """Refuses what is no `NoiseScale`."""
    if not isinstance(value, NoiseScale):
        raise TypeError(
            f"noise_scale is {describe(value)}; it must be a jaxga.NoiseScale(), "
            "which says what to compare, and holds the averages."
        )
    return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts(MergeType):
    """What the parts of a cycle say together.

    Attributes:
        squares: the sum of `|s_i|^2 / w_i`.
        weight: the sum of `w_i`.
        count: how many have any weight.
    """

    squares: jax.Array
    weight: jax.Array
    count: jax.Array

    def merge(self, other: "Parts") -> "Parts":
        return jax.tree.map(jnp.add, self, other)

    def unscaled(self, loss_scale: Any) -> "Parts":
        """Of gradients that were computed with a loss scale, without it."""
        squares = loss_scale.unscale(loss_scale.unscale(self.squares))
        return dataclasses.replace(self, squares=squares)


class PartsOfCycle:
    """How a cycle measures its parts: by `per`, or not at all if that is None.

    Each device has parts of its own, but where a stage scatters the gradient of each
    micro-batch: there all devices that share it are one part.
    """

    def __init__(self, per: str | None, stage: Stage0, rows: int, accum_steps: int):
        self.per, self._stage, self._rows = per, stage, rows
        self._axes = tuple(n for n in stage.axes if n not in stage.shared_axes)
        devices = math.prod(map(lax.axis_size, self._axes))
        if per == "device" and devices == 1:
            raise ValueError(self._why_no_devices())
        if per == "microbatch" and devices * accum_steps == 1:
            raise ValueError(
                "noise_scale compares micro-batches (NoiseScale(per='microbatch')), "
                "but the cycle is one micro-batch on one device: there is nothing to "
                f"compare {rows} rows with. Use accum_steps=2 or more."
            )

    def start(self) -> Parts | None:
        if self.per is None:
            return None
        return varying(Parts(_zero(), _zero(), _zero()), self._stage.axes)

    def add_microbatch(self, parts: Parts | None, grads: list, weights: PyTree):
        """With the gradient of one micro-batch."""
        if self.per != "microbatch":
            return parts
        return parts.merge(self._part(grads, weights, 1))

    def add_device(self, parts: Parts | None, grads: list, loss: PyTree, num):
        """With the sums of this device's `num` micro-batches."""
        if self.per != "device":
            return parts
        weights = {name: term.weight for name, term in terms_of(loss).items()}
        return parts.merge(self._part(grads, weights, num))

    def all_reduce(self, parts: Parts | None) -> Parts | None:
        return lax.psum(parts, self._axes) if self._axes else parts

    def _part(self, grads, weights, num_microbatches):
        weights = terms_of(weights)
        # Terms have weights of their own: what they share is the rows.
        weight = jnp.asarray(self._rows * num_microbatches, jnp.float32)
        if len(weights) == 1:
            weight = next(iter(weights.values())).astype(jnp.float32)
        if self._stage.shared_axes:
            weight = lax.psum(weight, self._stage.shared_axes)
        has_any = weight > 0
        square = self._stage.square(grads).astype(jnp.float32)
        squares = jnp.where(has_any, square / jnp.where(has_any, weight, 1), 0)
        part = Parts(squares, weight, has_any.astype(jnp.float32))
        return varying(part, self._stage.axes)

    def _why_no_devices(self):
        shared = self._stage.shared_axes
        why = "the batch is on one device"
        if shared:
            why = f"here the gradient of every micro-batch is divided over {shared}"
        return (
            "noise_scale compares devices (NoiseScale(per='device')), but no two have "
            f"sums of their own: {why}. Use jaxga.NoiseScale(per='microbatch')."
        )
