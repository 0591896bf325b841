"""Loss and gradient of a batch that is computed micro-batch by micro-batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.typing import DTypeLike

from ._axes import AxisNames
from ._checks import PyTree, check_flag
from ._cycle import Cycle
from ._cycle_settings import CycleSettings
from ._dtypes import as_weight
from ._loss import LossOutput, terms_of
from ._merge import is_merge_type
from ._sums import WeightedSum, divide_gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CycleOutput:
    """What a cycle found besides the gradient.

    Attributes:
        loss: scalar, the objective: the sum of the terms' means.
        terms: the mean of each term by name; of a loss that is no dict, `"loss"`.
        weights: the weight of each term over the whole cycle and all devices.
        metrics: the loss function's metrics, merged and finalized.
        model_state: the model state after the cycle; None if there is none.
    """

    loss: jax.Array
    terms: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    metrics: PyTree
    model_state: PyTree

    @property
    def weight(self) -> jax.Array:
        """The weight of the only term."""
        if len(self.weights) > 1:
            raise ValueError(
                f"The loss has the terms {sorted(self.weights)}, each with a weight of "
                "its own: see weights."
            )
        (weight,) = self.weights.values()
        return weight


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    accum_steps: int | None = None,
    microbatch_size: int | None = None,
    axis_name: AxisNames | None = None,
    accum_dtype: DTypeLike | None = None,
    model_state_merge: str | Mapping[str, str] = "carry",
    per_example_keys: bool = False,
) -> Callable[..., tuple[CycleOutput, PyTree]]:
    """Like `jax.value_and_grad`, at the memory of one micro-batch.

    The batch is cut into micro-batches; the gradients of their summed losses are
    summed, merged over devices once, and divided once. The result is that of the full
    batch, to rounding, however unevenly tokens are spread over micro-batches and
    devices. (Merged once: with `axis_name`, or in a step with `parallel`. Under plain
    `jit`, with a batch that is sharded over devices, the result is the same, but the
    compiler may reduce in every micro-batch.)

    Args:
        loss_fn: `loss_fn(params, microbatch, *args)`, with `key=` and `model_state=`
            added where the cycle was given them. Returns a `WeightedSum`, a dict of
            them (terms with denominators of their own), or a `LossOutput`. The weights
            of several terms are counted in a first pass, without a forward pass: only
            where one depends on the parameters it runs twice, and a warning says so.
        accum_steps: micro-batches per cycle. Must divide the rows of the batch. Give
            this or `microbatch_size`.
        microbatch_size: rows per micro-batch, of the array that the call sees: one
            device's inside `pmap` and `shard_map`, all devices' under plain `jit`.
        axis_name: inside `pmap` or `shard_map`, the mesh axis or axes over which the
            batch is divided: sums are merged over them, once, after the loop. `()`
            keeps everything local.
        accum_dtype: dtype of the sums of gradients; by default float32, or a
            parameter's own dtype where that is wider.
        model_state_merge: what becomes of the model state of several micro-batches:
            `"carry"` (threaded through them in order), `"mean"` (each starts from the
            cycle's first, the results are averaged), `"max"`, or `"batch_norm"`
            (running means and variances as the full batch would have left them); or a
            dict of these by top-level key. Over devices `"carry"` and `"mean"` average,
            `"max"` takes the largest. Integers, booleans and random keys must agree.
        per_example_keys: hand the loss function one random key per row, folded with the
            row's index in the global batch, instead of one per micro-batch: the result
            then does not depend on how the batch is cut.

    Returns:
        `cycle(params, batch, *args, model_state=None, key=None, num_microbatches=None,
        term_weights=None)`, which returns `(CycleOutput, grads)`. `batch` is any pytree
        of arrays with a leading axis of rows; micro-batch `i` holds rows
        `i, i + accum_steps, ...`. `num_microbatches`, which may be traced, computes
        only that many micro-batches, without a recompilation (a traced number above
        `accum_steps` counts as `accum_steps`). `term_weights`: the weight of each term
        over the whole cycle and all devices, where the loader knows it. `grads` has the
        structure of `params`, divided, in the dtype in which it was summed. Wrap it in
        `jax.jit`, `jax.pmap` or `jax.shard_map`; for an ensemble, in `jax.vmap`, and
        that in `jax.jit`.

    Raises:
        TypeError: a size is no integer; parameters that are no floating-point arrays;
            a loss, a metric or a dtype of another kind than said above.
        ValueError: neither or both sizes; leaves of the batch that disagree or do not
            divide; an axis that is not in scope, or one that is and was not named; a
            loss that was summed over devices already; model state that is not returned,
            or changes its shape.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> def loss_fn(params, batch):
        ...     losses = (batch["x"] @ params - batch["y"]) ** 2
        ...     return jaxga.WeightedSum.of(losses, where=batch["mask"])
        >>> batch = {
        ...     "x": jnp.arange(12.0).reshape(6, 2),
        ...     "y": jnp.ones(6),
        ...     "mask": jnp.array([True, True, True, False, True, False]),
        ... }
        >>> cycle = jax.jit(jaxga.value_and_grad(loss_fn, accum_steps=3))
        >>> output, grads = cycle(jnp.zeros(2), batch)
        >>> print(output.loss, output.weight, grads)
        1.0 4 [-7. -9.]
    """
    settings = CycleSettings(
        loss_fn,
        accum_steps=accum_steps,
        microbatch_size=microbatch_size,
        axis_name=axis_name,
        accum_dtype=accum_dtype,
        model_state_merge=model_state_merge,
        per_example_keys=per_example_keys,
    )
    return _cycle_function(settings, merge_and_divide=True)


def value_and_grad_sums(
    loss_fn: Callable[..., Any],
    *,
    accum_steps: int | None = None,
    microbatch_size: int | None = None,
    axis_name: AxisNames | None = None,
    accum_dtype: DTypeLike | None = None,
    model_state_merge: str | Mapping[str, str] = "carry",
    per_example_keys: bool = False,
    separate_terms: bool = False,
) -> Callable[..., tuple[LossOutput, WeightedSum | dict[str, WeightedSum]]]:
    """`value_and_grad`, neither divided nor merged over devices.

    For a merge of your own: over several calls, or over devices at another place.
    `axis_name` only says over which axes the batch is divided.

    Args:
        loss_fn: as for `value_and_grad`. If it returns several terms, the cycle needs
            `term_weights=`, or `separate_terms`.
        accum_steps: as for `value_and_grad`.
        microbatch_size: as for `value_and_grad`.
        axis_name: as for `value_and_grad`.
        accum_dtype: as for `value_and_grad`.
        model_state_merge: as for `value_and_grad`.
        per_example_keys: as for `value_and_grad`.
        separate_terms: sum the gradient of each term for itself, where the weights by
            which they are to be divided are not known yet (the cycle goes on in further
            calls). It takes a buffer and a backward pass for each term; `term_weights`
            takes one for all.

    Returns:
        `cycle`, of the same arguments as the one that `value_and_grad` makes. It
        returns `(LossOutput, WeightedSum)`: the sums of the loss and of the metrics,
        with this device's model state; and the summed gradient with its weight. With
        `term_weights` each term has been divided by its own already, and the gradient
        has weight 1 (over all devices: add them, and do not divide again). With
        `separate_terms` the second is a dict with a `WeightedSum` for each term: merge
        them with `jaxga.merge`, or hand them to an optimizer made by
        `jaxga.accumulate(..., terms=...)`; the gradient is the sum of their means.

    Raises:
        TypeError: as for `value_and_grad`.
        ValueError: as for `value_and_grad`; several terms without `term_weights` or
            `separate_terms`, or both of these; `separate_terms` with fp8 histories.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> def loss_fn(params, x):
        ...     return jaxga.WeightedSum.of((x - params) ** 2)
        >>> cycle = jaxga.value_and_grad_sums(loss_fn, accum_steps=2)
        >>> first, second = (
        ...     cycle(jnp.zeros(()), x) for x in (jnp.arange(4.0), jnp.arange(2.0))
        ... )
        >>> grads = first[1].merge(second[1])
        >>> print(grads.total, grads.weight, grads.mean())
        -14.0 6 -2.3333333
    """
    settings = CycleSettings(
        loss_fn,
        accum_steps=accum_steps,
        microbatch_size=microbatch_size,
        axis_name=axis_name,
        accum_dtype=accum_dtype,
        model_state_merge=model_state_merge,
        per_example_keys=per_example_keys,
    )
    check_flag("separate_terms", separate_terms)
    return _cycle_function(settings, False, separate_terms)


def _cycle_function(
    settings: CycleSettings, merge_and_divide: bool, separate_terms: bool = False
) -> Callable:
    def cycle(
        params: PyTree,
        batch: PyTree,
        *args: Any,
        model_state: PyTree = None,
        key: jax.Array | None = None,
        num_microbatches: int | jax.Array | None = None,
        term_weights: Mapping[str, Any] | None = None,
    ):
        cycle = Cycle(
            settings,
            params,
            batch,
            args,
            model_state=model_state,
            key=key,
            num_microbatches=num_microbatches,
        )
        output, grads, _ = cycle.run(
            reduce=merge_and_divide,
            term_weights=term_weights,
            separate_terms=separate_terms,
        )
        if not merge_and_divide:
            return output, grads
        return finish_output(output, term_weights), divide_gradient(grads)

    return cycle


def finish_output(output: LossOutput, term_weights: Mapping | None) -> CycleOutput:
    """Divides the merged sums, once."""
    sums = terms_of(output.loss)
    weights = {name: as_weight(w) for name, w in (term_weights or {}).items()}
    terms = {
        name: WeightedSum(term.total, weights.get(name, term.weight)).mean()
        for name, term in sums.items()
    }
    return CycleOutput(
        loss=sum(terms.values()),
        terms=terms,
        weights={name: term.weight for name, term in sums.items()},
        metrics=jax.tree.map(
            lambda metric: metric.finalize(), output.metrics, is_leaf=is_merge_type
        ),
        model_state=output.model_state,
    )
