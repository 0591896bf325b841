"""Refuses what a loss function has summed over the devices before it returned it."""

import jax

from ._checks import PyTree, place
from ._data_flow import Flow
from ._loss import terms_of, words_for
from ._merge import is_merge_type
from ._metrics import Sum
from ._sums import WeightedSum


def check_sums_differ(
    totals: PyTree, weights: PyTree, metrics: PyTree, axes: frozenset[str]
) -> None:
    """What is summed over `axes` must be of a device's own rows.

    Args:
        totals: the `Flow` of the loss's total, or of each term's.
        weights: of its weight, or of each term's.
        metrics: the metrics, of `Flow`s.
        axes: those over which the batch is divided.
    """
    _check_terms_differ(terms_of(totals), terms_of(weights), axes)
    _check_metrics_differ(metrics, axes)


def _check_terms_differ(totals, weights, axes):
    """Each total and each weight must be of a device's own rows, over all of `axes`."""
    for what, flows in (("total", totals), ("weight", weights)):
        for name, flow in flows.items():
            if flow.from_data and not axes <= flow.differs:
                words = f"The {what} of {words_for(name)}"
                raise ValueError(_message(words, axes - flow.differs))


def _check_metrics_differ(metrics, axes):
    """So must metrics that add up. A mean of which both parts were summed is right."""
    for path, metric in jax.tree.leaves_with_path(metrics, is_leaf=is_merge_type):
        words = f"metrics{place(path)}"
        if isinstance(metric, Sum):
            _check_against(words, metric.value, axes)
        elif isinstance(metric, WeightedSum):
            for total in jax.tree.leaves(metric.total, is_leaf=_is_flow):
                _check_against(words, total, metric.weight.differs & axes)
                _check_against(words, metric.weight, total.differs & axes)


def _check_against(words, flow, axes):
    if flow.from_data and not axes <= flow.differs:
        raise ValueError(_message(words, axes - flow.differs))


def _is_flow(x):
    return isinstance(x, Flow)


def _message(words, axes):
    return (
        f"{words} is the same on all devices of {sorted(axes)}: loss_fn has summed or "
        "gathered it over them already (psum, pmean, all_gather). It would be counted "
        "once for every device. Return the sum over this device's own rows; the cycle "
        "sums over the devices, once."
    )
