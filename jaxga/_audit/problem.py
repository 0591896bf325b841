"""What an audit examines: sums of a loss and of its gradient over any of the rows.

One trace for every number of rows, in the user's precision; evaluated as it is, or
widened to float64. Nothing of the loop that is audited is used here.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from .._batches import as_rows, count_rows
from .._checks import PyTree, is_key, place
from .._cycle_settings import check_arguments
from .._keys import check_key, keys_of_rows, microbatch_key
from .._loss import read_loss, terms_of
from .._model_state import check_unchanged
from .._params import OVERWRITTEN, check_params
from .widen import Widened


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over some rows, on the host.

    Attributes:
        grads: the gradient of each term's total, as flat leaves.
        totals: the total of each term.
        weights: the weight of each term.
        state: the floating-point leaves of the new model state, by path.
    """

    grads: dict[str, list[np.ndarray]]
    totals: dict[str, float]
    weights: dict[str, float]
    state: dict[str, np.ndarray]

    def mean_gradient(self, weights: dict[str, float] | None = None):
        """The terms' gradients over their weights, added: the objective's gradient."""
        weights = self.weights if weights is None else weights
        parts = [
            [grad / weights[name] if weights[name] else grad * 0 for grad in grads]
            for name, grads in self.grads.items()
        ]
        return [sum(leaves) for leaves in zip(*parts, strict=True)]

    def loss(self) -> float:
        weights = self.weights
        return sum(t / weights[n] for n, t in self.totals.items() if weights[n])


@dataclasses.dataclass
class Program:
    """The sums over a number of rows, traced once."""

    traced: Any
    treedef: Any
    is_wide: bool

    def __post_init__(self):
        if not self.is_wide:
            self._run, self.kept = jax.jit(core.jaxpr_as_fun(self.traced)), set()
            return
        widened = Widened(self.traced)
        self._run, self.kept = jax.jit(lambda *xs: widened(*xs)), widened.kept

    def __call__(self, *args):
        leaves = jax.tree.leaves(args)
        with jax.enable_x64(self.is_wide or jax.config.jax_enable_x64):
            outputs = self._run(*leaves)
        return jax.tree.unflatten(self.treedef, map(np.asarray, outputs))


class Problem:
    """A loss function with its arguments.

    Attributes:
        rows: how many the batch has.
        paths: where each parameter stands.
        cycles: the cycles that were compiled for it.
        loss_fn, params, batch, args, model_state, key, per_example_keys: as given.
    """

    def __init__(
        self,
        loss_fn: Callable,
        params: PyTree,
        batch: PyTree,
        args: tuple,
        *,
        model_state: PyTree,
        key: jax.Array | None,
        per_example_keys: bool,
        is_wide: bool,
    ):
        check_key(key, per_example_keys)
        keywords = {"key": key, "model_state": model_state}
        given = {name for name, value in keywords.items() if value is not None}
        check_arguments(loss_fn, len(args), given)
        self.loss_fn = loss_fn
        self.args, self.model_state, self.key = args, model_state, key
        self.per_example_keys, self.is_wide = per_example_keys, is_wide
        self._put(params, batch)
        self._state = list(map(_on_host, jax.tree.leaves(model_state)))
        self._args = [
            jnp.asarray(x) if _is_array(x) else x for x in jax.tree.leaves(args)
        ]
        self._programs: dict[tuple, Program] = {}
        self._traces: dict[int, Any] = {}
        self.cycles: dict[tuple, Callable] = {}

    def _put(self, params, batch):
        self.params, self.batch, self.rows = params, batch, count_rows(batch)
        self.paths = [
            f"params{place(path)}" for path, _ in jax.tree.leaves_with_path(params)
        ]
        self._params = list(map(_on_host, check_params(params)))
        self._batch = list(map(_on_host, jax.tree.leaves(as_rows(batch))))

    def on(self, params: PyTree, batch: PyTree) -> "Problem":
        """The same loss function with other values, without another compilation."""
        other = copy.copy(self)
        other._put(params, batch)
        return other

    def sums(
        self,
        which: np.ndarray | None = None,
        *,
        index: int = 0,
        wide: bool | None = None,
        scale: float = 1.0,
        stretch: bool = False,
    ) -> Sums:
        """The sums over some rows.

        Args:
            which: their indices; all by default.
            index: of the micro-batch that they are said to be: its key depends on it.
            wide: whether to compute in float64; by default if that was asked for.
            scale: what the gradient is multiplied by on its way, and divided by at the
                end: it changes nothing but its rounding.
            stretch: whether to change the batch's numbers a little.
        """
        which = np.arange(self.rows) if which is None else which
        wide = self.is_wide if wide is None else wide
        rows = self.take(which, stretch)
        dtype = np.float64 if wide else np.float32
        outputs = self.program(len(which), wide)(
            self._params, rows, np.int32(which), np.int32(index), dtype(scale),
            self._state, self.arrays,
        )  # fmt: skip
        grads = {
            name: [leaf.astype(_wide(leaf)) / scale for leaf in leaves]
            for name, leaves in outputs["grads"].items()
        }
        state = self._floats_of_state(outputs["state"])
        numbers = (
            {name: float(value) for name, value in outputs[kind].items()}
            for kind in ("totals", "weights")
        )
        return Sums(grads, *numbers, state)

    def take(self, which: np.ndarray, stretch: bool = False) -> list[Any]:
        """The leaves of the batch at some rows."""
        leaves = [leaf[which] for leaf in self._batch]
        if not stretch:
            return leaves
        return [
            (leaf * 1.5 + 0.25).astype(leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
            else leaf
            for leaf in leaves
        ]

    @property
    def arrays(self) -> list[jax.Array]:
        """The arrays among the further arguments."""
        return [x for x in self._args if _is_array(x)]

    def args_with(self, arrays: list[jax.Array]) -> tuple:
        """The further arguments, with other arrays in place of theirs."""
        arrays = iter(arrays)
        leaves = [next(arrays) if _is_array(x) else x for x in self._args]
        return like(self.args, leaves)

    def on_host(self) -> tuple[PyTree, PyTree, PyTree]:
        """Parameters, batch and model state, on no device in particular."""
        return (
            like(self.params, self._params),
            like(self.batch, self._batch),
            like(self.model_state, self._state),
        )

    @property
    def precision(self) -> str:
        """The dtypes of the parameters."""
        return " and ".join(sorted({str(leaf.dtype) for leaf in self._params}))

    def sizes(self) -> dict[str, int]:
        """The entries of each leaf of the batch."""
        paths = [f"batch{place(p)}" for p, _ in jax.tree.leaves_with_path(self.batch)]
        return {p: x.size for p, x in zip(paths, self._batch, strict=True)}

    @property
    def kept(self) -> set[str]:
        """The primitives that could not be computed in float64."""
        return set().union(*(program.kept for program in self._programs.values()))

    def program(self, rows: int, wide: bool) -> Program:
        """The compiled sums over a number of rows, made once."""
        if (rows, wide) not in self._programs:
            if rows not in self._traces:
                self._traces[rows] = self.trace(self._sums, rows, scale=True)
            traced, shapes = self._traces[rows]
            made = Program(traced, jax.tree.structure(shapes), wide)
            self._programs[rows, wide] = made
        return self._programs[rows, wide]

    def trace(self, function: Callable, rows: int, scale: bool = False):
        """The jaxpr of a function of this problem's arrays, and the outputs' shapes."""
        which = np.arange(rows)
        arguments = [self._params, self.take(which), np.int32(which), np.int32(0)]
        arguments += [np.float32(1)] if scale else []
        arguments += [self._state, self.arrays]
        return jax.make_jaxpr(function, return_shape=True)(*arguments)

    def arguments(self, rows: list[Any], ids: np.ndarray) -> list[Any]:
        """What a traced function without a scale takes, in tree form."""
        index = np.int32(0)
        return [self._params, rows, np.int32(ids), index, self._state, self.arrays]

    def forward(self, params, rows, ids, index, state, arrays):
        """Totals; weights and the new state beside them. To be traced."""
        keywords = {}
        if self.key is not None:
            keywords["key"] = (
                keys_of_rows(self.key, ids)
                if self.per_example_keys
                else microbatch_key(self.key, index, ())
            )
        if self.model_state is not None:
            keywords["model_state"] = like(self.model_state, state)
        params, batch = like(self.params, params), like(self.batch, rows)
        returned = self.loss_fn(params, batch, *self.args_with(arrays), **keywords)
        output = read_loss(returned, with_state=self.model_state is not None)
        terms = terms_of(output.loss)
        totals = {name: term.total for name, term in terms.items()}
        weights = {name: term.weight for name, term in terms.items()}
        new = check_unchanged(self.model_state, output.model_state)
        return totals, (
            weights,
            [jax.random.key_data(x) if is_key(x) else x for x in new],
        )

    def _sums(self, params, rows, ids, index, scale, state, arrays):
        totals, pullback, (weights, new_state) = jax.vjp(
            lambda leaves: self.forward(leaves, rows, ids, index, state, arrays),
            params,
            has_aux=True,
        )
        grads = {}
        for name in totals:
            cotangents = {
                n: (scale if n == name else scale * 0).astype(total.dtype)
                for n, total in totals.items()
            }
            (grads[name],) = pullback(cotangents)
        return {
            "grads": grads,
            "totals": totals,
            "weights": weights,
            "state": new_state,
        }

    def _floats_of_state(self, leaves):
        """Counters and keys count calls, and are no matter of the gradient."""
        paths = jax.tree.leaves_with_path(self.model_state)
        return {
            f"model_state{place(path)}": leaf.astype(_wide(leaf))
            for (path, old), leaf in zip(paths, leaves, strict=True)
            if jnp.issubdtype(old.dtype, jnp.inexact) and not _is_overwritten(path)
        }

    def floats_of_state(self, tree: PyTree) -> dict[str, np.ndarray]:
        """The leaves of a model state that are compared."""
        leaves = jax.tree.leaves(tree)
        return self._floats_of_state(
            [None if is_key(leaf) else np.asarray(leaf) for leaf in leaves]
        )


def like(tree: PyTree, leaves: list[Any]) -> PyTree:
    """The leaves in the structure of a tree."""
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _is_overwritten(path):
    # fp8: the gradient takes their place, which is not in the forward pass's output.
    return bool(path) and getattr(path[0], "key", None) == OVERWRITTEN


def _on_host(leaf):
    if is_key(leaf):
        return leaf
    return np.asarray(jnp.asarray(leaf))


def _wide(leaf):
    is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    return np.complex128 if is_complex else np.float64


def _is_array(x):
    return isinstance(x, jax.Array | np.ndarray | np.generic)
