"""The record of metrics that a step returns: one per call, each name once."""

from collections.abc import Mapping
from typing import Any

from ._checks import PyTree
from ._value_and_grad import CycleOutput


def check_names(metrics: PyTree) -> None:
    """Refuses metrics that a record has no names for."""
    if not isinstance(metrics, Mapping | None):
        raise TypeError(
            f"loss_fn returned metrics of type {type(metrics).__name__}; a training "
            "step needs a dict of metrics by name."
        )
    for name in metrics or ():
        if not isinstance(name, str):
            raise TypeError(f"loss_fn returned a metric named {name!r}; use a string.")


def make_record(output: CycleOutput, has_terms: bool, **counts) -> dict[str, Any]:
    """One record per update, each name once."""
    metrics = output.metrics or {}
    weights = output.weights if len(output.weights) > 1 else output.weight
    record = {"loss": output.loss, "weight": weights} | counts
    terms = output.terms if has_terms else {}
    if list(terms) == ["loss"]:
        terms = {}  # the only term is the objective
    for what, entries in (("term", terms), ("metric", metrics)):
        for name, value in entries.items():
            if name in record:
                raise ValueError(
                    f"The {what} {name!r} has the name of another entry of the step's "
                    f"record, {sorted(record)}. Give it another name."
                )
            record[name] = value
    return record
