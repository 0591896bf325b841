"""Audits a trainer that is not jaxga."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .._checks import describe, place
from .causes import why_it_does_not_add_up
from .compare import Leaves, relative_error
from .cycles import on_host
from .factors import numbers_of
from .pieces import split
from .report import Cause, Entry
from .study import Study
from .trainer import Trainer, why_it_differs

# Up to as many, the gradient is taken apart row by row.
_MOST_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Returned:
    """A gradient as a trainer returned it, on the host.

    Attributes:
        leaves: the gradient.
        dtypes: the dtypes of its leaves.
        causes: what is wrong with it by itself.
    """

    leaves: Leaves
    dtypes: list[str]
    causes: list[Cause]


def study_trainer(
    study: Study, grad_fn: Callable, splits: Sequence[int], devices: Sequence[int]
) -> tuple[list[Entry], list[Cause]]:
    """Compares what a trainer returns with the truth, for this batch and another one.

    Args:
        study: the truth.
        grad_fn: `grad_fn(params, batch)`, the final mean gradient.
        splits: the numbers of micro-batches that it may use.
        devices: the numbers of devices that it may use.
    """
    problem = study.problem
    first = _call(study, grad_fn, problem.batch)
    if study.yardstick.is_loose:
        for cut in _cuts(study, splits, devices):
            study.look_along(split(problem, *cut))
    entries = [_entry(study.yardstick, first, "grad_fn")]
    causes = first.causes or _check_finite(study, first)
    if causes:
        return entries, causes
    again = _call(study, grad_fn, problem.batch)
    if not study.yardstick.agrees(again.leaves, first.leaves):
        return entries, [_not_deterministic(first.leaves, again.leaves)]
    other, batch = study.other_batch()
    second = _call(study, grad_fn, batch)
    entries.append(_entry(other, second, "another batch"))
    if all(
        np.array_equal(a, b) for a, b in zip(first.leaves, second.leaves, strict=True)
    ):
        text = (
            "grad_fn returned the very same gradient for another batch: it does not "
            "look at the batch, or hands out an old gradient."
        )
        return entries, [Cause("unchanged", "the whole gradient", text, 0.0)]
    if not entries[0].passed:
        trainer = _trainer(study, first, splits, devices)
        causes = why_it_differs(trainer)
        if causes[0].kind == "coupling":
            # Added up rightly, of micro-batches that are not parts of the full batch.
            losses = [study.loss_at(*cut) for cut in _cuts(study, splits, devices)]
            wrong = [loss for loss in losses if not loss.adds_up()]
            causes = why_it_does_not_add_up(wrong[0]) if wrong else causes
        return entries, causes
    if not entries[1].passed:
        worst = entries[1].worst
        text = (
            "grad_fn agrees on this batch, and not on another one, of some of its rows "
            f"twice: off by {entries[1].error:.2g}, furthest {worst.words}. It keeps "
            "something from one call to the next, or is right by chance."
        )
        return entries, [Cause("unknown", worst.path, text, entries[1].error)]
    return entries, []


def _call(study, grad_fn, batch) -> Returned:
    problem = study.problem
    grads = grad_fn(problem.params, batch)
    structure = jax.tree.structure(problem.params)
    if jax.tree.structure(grads) != structure:
        raise TypeError(
            f"grad_fn returned {jax.tree.structure(grads)}; it must return the final "
            f"mean gradient, of the structure of params, {structure}."
        )
    leaves, dtypes, causes = [], [], []
    triples = zip(
        jax.tree.leaves_with_path(grads), problem.paths, study.yardstick.truth,
        strict=True,
    )  # fmt: skip
    for (path, leaf), name, truth in triples:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"grad_fn returned {describe(leaf)} at {place(path)}, not an array."
            )
        causes += _check_devices(name, leaf, truth.shape)
        leaf = np.asarray(leaf)
        dtypes.append(str(leaf.dtype))
        leaf = leaf[0] if leaf.shape[1:] == truth.shape != leaf.shape else leaf
        if leaf.shape != truth.shape:
            raise ValueError(
                f"grad_fn returned shape {leaf.shape} at {place(path)}; the parameter "
                f"is of shape {truth.shape}."
            )
        leaves.append(leaf.astype(truth.dtype))
    return Returned(leaves, dtypes, causes[:1])


def _check_devices(name, leaf, shape) -> list[Cause]:
    """Copies of a gradient that differ, on devices or along a leading axis of them."""
    if leaf.ndim == len(shape) + 1 and leaf.shape[1:] == shape:
        copies = [np.asarray(copy) for copy in leaf]
    elif isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    else:
        return []
    for i, copy in enumerate(copies):
        if np.array_equal(copy, copies[0], equal_nan=True):
            continue
        error = relative_error([_wide(copy)], [_wide(copies[0])])
        text = (
            f"The devices are not synchronised: the gradient of {name} on device {i} "
            f"differs from that on device 0 by {error:.2g} of its norm. Each device "
            "would take a step of its own. Sum gradients and weights over the devices, "
            "once, before the division."
        )
        return [Cause("devices", name, text, error)]
    return []


def _wide(x: Any) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _cuts(study, splits, devices) -> list[tuple[int, int]]:
    """The ways to cut the rows: micro-batches and devices of each."""
    counts = sorted({n for n in (*splits, *devices) if n > 1})
    cuts = [cut for n in counts for cut in ((n, 1), (1, n))]
    cuts += [(s, n) for n in devices for s in splits if n > 1 and s > 1]
    return [(s, n) for s, n in cuts if study.problem.rows % (s * n) == 0]


def _entry(yardstick, returned, name):
    dtypes = " and ".join(sorted(set(returned.dtypes)))
    return yardstick.entry(
        returned.leaves, name, accum_steps=0, num_devices=0, precision=dtypes
    )


def _trainer(study, returned: Returned, splits, devices) -> Trainer:
    problem, full = study.problem, study.full
    numbers = numbers_of(problem, full.weights, tuple(splits), tuple(devices))
    pieces = [split(problem, *cut) for cut in _cuts(study, splits, devices)]
    return Trainer(
        returned.leaves,
        returned.dtypes,
        on_host(problem.params),
        study.yardstick,
        full,
        pieces,
        numbers,
        (lambda: split(problem, problem.rows)) if problem.rows <= _MOST_ROWS else None,
    )


def _check_finite(study, returned) -> list[Cause]:
    paths = study.problem.paths
    bad = [
        path
        for path, leaf in zip(paths, returned.leaves, strict=True)
        if not np.isfinite(leaf).all()
    ]
    if not bad:
        return []
    text = (
        f"The gradient of {bad[0]} is not finite, and the true one is. A mean over a "
        "micro-batch without any weight is 0 / 0: sum first, and divide once at the "
        "end, where the weight is not 0."
    )
    return [Cause("nan", bad[0], text, float("nan"))]


def _not_deterministic(first: Leaves, again: Leaves) -> Cause:
    size = relative_error(again, first)
    text = (
        "grad_fn is random: called twice with the same arguments it returned gradients "
        f"that are {size:.2g} of their norm apart. Fix its key, and give audit the "
        "same draws: a loss_fn with one key per row (per_example_keys=True), or none."
    )
    return Cause("randomness", "grad_fn", text, size)
