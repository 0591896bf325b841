"""Where the parameters and the accumulators of a cycle lie: a class for each stage.

The stages are those of ZeRO (Rajbhandari et al., arXiv 1910.02054): 1 divides the
optimizer's state over the devices, 2 the accumulators too, 3 the parameters too.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import PyTree
from ._lazy import Lazy
from ._norms import norm_over_shards
from ._shards import Shard


class Stage0:
    """All whole on every device; gradients are summed over the devices at the end.

    Attributes:
        params: this device's parameters, as a list of leaves.
        axes: the mesh axes over which the batch is divided.
        grad_dtypes: in which the gradient of each parameter shall come.
        hows: how each parameter is divided, under the stages from 1 on.
        overlap_last: whether to compute the last micro-batch outside the loop.
    """

    def __init__(
        self,
        params: list[jax.Array],
        axes: tuple[str, ...],
        grad_dtypes: Sequence,
        hows: Sequence[Shard] = (),
        overlap_last: bool = False,
    ):
        self.params, self.axes, self.grad_dtypes = params, axes, grad_dtypes
        self.hows, self.overlap_last = hows, overlap_last

    def wide(self) -> list[jax.Array]:
        """What is differentiated by: parameters in the dtypes of their gradients.

        Widened in each micro-batch, where XLA drops it: done once for all of them, it
        would be a second copy.
        """
        return self._widened(self.params)

    def wide_at(self, index: jax.Array) -> list[jax.Array]:
        """The same, for micro-batch `index`."""
        return self.wide()

    def whole(self) -> list[jax.ShapeDtypeStruct | jax.Array]:
        """The same whole, or its types: what the loss function is traced with."""
        return self.wide()

    def for_use(self, wide: list[jax.Array]) -> list[jax.Array | Lazy]:
        """What the traced loss function is evaluated with."""
        return wide

    def zeros(self, dtypes: Sequence) -> list[jax.Array]:
        """Accumulators, with the sharding and the varying axes of the parameters."""
        return [
            jnp.zeros_like(x, dtype=dtype)
            for x, dtype in zip(self._accumulated(), dtypes, strict=True)
        ]

    def all_reduce(
        self, grads: list[jax.Array], loss: PyTree
    ) -> tuple[list[jax.Array], PyTree]:
        """Sums over the devices what each has accumulated, and the loss with it."""
        return self._psum((grads, loss), self.axes)

    @property
    def shared_axes(self) -> tuple[str, ...]:
        """Axes whose devices hold the gradient of a micro-batch together."""
        return ()

    def square(self, grads: list[jax.Array]) -> jax.Array:
        """The squared norm of a gradient before `all_reduce`."""
        return norm_over_shards(grads, self.axes) ** 2

    def _widened(self, params):
        pairs = zip(params, self.grad_dtypes, strict=True)
        return [param.astype(dtype) for param, dtype in pairs]

    def _accumulated(self):
        return self.params

    def _psum(self, tree, axes):
        if self.hows:
            # XLA fails on a sum over one device of what an automatic axis divides.
            axes = tuple(name for name in axes if lax.axis_size(name) > 1)
        return lax.psum(tree, axes) if axes else tree


class Stage1(Stage0):
    """Accumulators whole; each device ends with its shard of the sum."""

    def all_reduce(self, grads, loss):
        scattered = {i: how.scatter(grads[i]) for i, how in self._divided()}
        return self._sum_the_rest(grads, scattered, loss)

    def _divided(self):
        hows = enumerate(self.hows)
        return [(i, how) for i, how in hows if how.dim is not None]

    def _sum_the_rest(self, grads, scattered, loss):
        """Sums shards over the axes that do not divide, whole leaves over all."""
        rest = tuple(name for name in self.axes if name not in self.hows[0].axes)
        if scattered:
            scattered = self._psum(scattered, rest)
        whole = {i: grad for i, grad in enumerate(grads) if i not in scattered}
        whole, loss = self._psum((whole, loss), self.axes)
        summed = whole | scattered
        return [summed[i] for i in range(len(grads))], loss


class Stage2(Stage1):
    """Accumulators divided: gradients are scattered as the backward pass makes them."""

    def wide(self):
        return self._widened(self._accumulated())

    def whole(self):
        return self._widened(self.params)

    def for_use(self, wide):
        used, whole = list(wide), self.whole()
        for i, how in self._divided():
            used[i] = Lazy(wide[i], whole[i], how)
        return used

    def all_reduce(self, grads, loss):
        scattered = {i: grads[i] for i, _ in self._divided()}
        return self._sum_the_rest(grads, scattered, loss)

    @property
    def shared_axes(self):
        return self.hows[0].axes if self.hows else ()

    def square(self, grads):
        scattered = {i: grads[i] for i, _ in self._divided()}
        rest = [grad for i, grad in enumerate(grads) if i not in scattered]
        shards = norm_over_shards(scattered, self.axes) ** 2
        shards, rest = self._psum((shards, rest), self.shared_axes)
        return shards + norm_over_shards(rest, self.axes) ** 2

    def _accumulated(self):
        shards = list(self.params)
        for i, how in self._divided():
            shards[i] = how.take(self.params[i])
        return shards


class Stage3(Stage2):
    """Parameters divided too: gathered where they are used, in every micro-batch."""

    def wide_at(self, index):
        # Tied to the loop's index, or XLA gathers all parameters in front of the loop.
        # Here, not where they are gathered: a barrier cannot be transposed in place.
        return self._widened(lax.optimization_barrier((self.params, index))[0])

    def whole(self):
        types = self.wide()
        for i, how in self._divided():
            types[i] = jax.eval_shape(how.gather, types[i])
        return types

    def for_use(self, wide):
        used = list(wide)
        for i, how in self._divided():
            used[i] = Lazy(wide[i], None, how)
        return used

    def _accumulated(self):
        return self.params


class GatheredOnce(Stage2):
    """Parameters divided outside the cycle; gathered before it, they stay whole."""

    def __init__(self, params, axes, grad_dtypes, hows, overlap_last=False):
        pairs = zip(params, hows, strict=True)
        whole = [x if how.dim is None else how.gather(x) for x, how in pairs]
        super().__init__(whole, axes, grad_dtypes, hows, overlap_last)
