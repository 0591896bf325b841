"""Proof that accumulation equals the full batch, on the user's own model."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike

from .._batches import count_rows
from .._checks import PyTree, check_count, check_flag, describe
from .._model_state import check_rule
from .._params import check_accum_dtype
from .cycles import Settings
from .problem import Problem
from .report import AuditReport, Cause
from .study import Study, study_cycles
from .trainer_study import study_trainer


def audit(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    *args: Any,
    model_state: PyTree = None,
    key: jax.Array | None = None,
    accum_steps: int | Sequence[int] = (1, 2, 4),
    num_devices: int | Sequence[int] | None = None,
    grad_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
    per_example_keys: bool = False,
    model_state_merge: str | Mapping[str, str] = "carry",
    accum_dtype: DTypeLike | None = None,
    tolerance: float = 1e-5,
    float64: bool = True,
) -> AuditReport:
    """Compares the accumulated gradient with the full batch's, and says why it differs.

    The truth is the gradient of all rows at once, computed without any loop, in
    float64: what the model computes in float32 or bfloat16 by its own choice is widened
    too, and random draws stay what they are. Compared are, leaf by leaf, the sum of
    micro-batches in float64 (whether the loss is a sum over examples at all), and the
    cycle of `jaxga.value_and_grad` as it trains, for several splits and on several
    devices.

    It costs some compilations, and the memory of the full batch in float64: use a model
    and a batch of modest size, and rows that differ, with masks as uneven as in
    training.

    Args:
        loss_fn: as for `jaxga.value_and_grad`.
        params: the parameters. Ones at which gradients are not zero: a layer that is
            initialised to zero hides those before it.
        batch: pytree of arrays with a leading axis of rows, which every entry of
            `accum_steps` divides.
        *args: handed to `loss_fn` after the batch.
        model_state: as for `jaxga.value_and_grad`. Floating-point leaves are compared
            too; counters and keys are not.
        key: as for `jaxga.value_and_grad`.
        accum_steps: the numbers of micro-batches to try.
        num_devices: the numbers of devices to try; by default one, with each entry of
            `accum_steps`, and the most that divide the rows, with the largest that they
            allow.
        grad_fn: `grad_fn(params, batch)`, a trainer that is not jaxga, returning its
            final mean gradient: audited in place of jaxga's cycle, on this batch and on
            another one. `loss_fn` then says what is right, and `accum_steps` and
            `num_devices` in which ways it may have cut the batch.
        per_example_keys: as for `jaxga.value_and_grad`.
        model_state_merge: as for `jaxga.value_and_grad`.
        accum_dtype: as for `jaxga.value_and_grad`.
        tolerance: what each leaf may differ by, relative to its norm, besides several
            times the rounding of the full batch's own gradient. The same bound holds
            for the projections of the whole gradient on the true one, its terms and
            its micro-batches: there rounding averages out, and small faults show.
        float64: whether to compute the truth in float64. False takes less memory, and
            finds errors that are larger than rounding only.

    Returns:
        An `AuditReport`: `.passed`, the comparisons as `.entries`, and `.causes`, each
        with its `kind`, `where`, `text` and `size`. Printed, a table. It does not pass
        on nothing: on a gradient of zero, of NaN, or one that is the same for another
        batch; nor where nothing is cut, with `accum_steps=1` on one device. What jaxga
        refuses when it traces is reported as a cause.

    Raises:
        TypeError: a number that is no integer; a `grad_fn` that returns something else
            than a gradient; and whatever `loss_fn` itself raises.
        ValueError: rows that a number does not divide; too many devices.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxga
        >>> def loss_fn(params, batch):
        ...     x = batch["x"] / batch["x"].std(axis=0, keepdims=True)
        ...     return jaxga.WeightedSum.of((x @ params - batch["y"]) ** 2)
        >>> batch = {"x": jnp.arange(24.0).reshape(8, 3) ** 2, "y": jnp.ones(8)}
        >>> report = jaxga.audit(loss_fn, jnp.arange(3.0), batch, accum_steps=2)
        >>> report.passed, report.causes[0].kind
        (False, 'coupling')
    """
    steps = _counts("accum_steps", accum_steps)
    rows = count_rows(batch)
    _check_divides(rows, "accum_steps", steps)
    runs = _plan(rows, steps, num_devices)
    check_flag("per_example_keys", per_example_keys)
    check_flag("float64", float64)
    _check_tolerance(tolerance)
    for name, function in (("loss_fn", loss_fn), ("grad_fn", grad_fn)):
        if not callable(function) and not (name == "grad_fn" and function is None):
            raise TypeError(f"{name} is {describe(function)}, not a function.")
    settings = Settings(
        check_accum_dtype(accum_dtype), check_rule(model_state_merge), per_example_keys
    )
    try:
        problem = Problem(
            loss_fn,
            params,
            batch,
            args,
            model_state=model_state,
            key=key,
            per_example_keys=per_example_keys,
            is_wide=float64,
        )
        study = Study(problem, tolerance)
        if grad_fn is None and num_devices is None and max(n for _, n in runs) == 1:
            study.notes.append(_why_one_device(rows))
        return _report(study, settings, runs, grad_fn)
    except (TypeError, ValueError) as error:
        if not _is_refusal(error):
            raise
        return AuditReport((), (_refused(error),), (), "")


def _report(study, settings, runs, grad_fn):
    entries, causes = [], study.nothing_to_compare()
    if grad_fn is None and all(steps * n == 1 for steps, n in runs):
        causes = [_nothing_is_cut(study.problem.rows)]
    if not causes:
        study.note_what_is_hidden()
        if grad_fn is None:
            entries, causes = study_cycles(study, settings, runs)
        else:
            splits, devices = (
                sorted(set(numbers)) for numbers in zip(*runs, strict=True)
            )
            entries, causes = study_trainer(study, grad_fn, splits, devices)
    return AuditReport(
        tuple(entries), tuple(causes), tuple(study.notes), study.describe()
    )


def _nothing_is_cut(rows):
    numbers = [n for n in range(2, rows + 1) if rows % n == 0]
    cure = f"accum_steps={numbers[0]}" if numbers else "a batch of more rows"
    text = (
        "One micro-batch on one device is the full batch itself: nothing is added up, "
        f"and any loss agrees. Give {cure}, or num_devices."
    )
    return Cause("nothing", "accum_steps", text, 1.0)


def _counts(name, value):
    values = value if isinstance(value, tuple | list) else (value,)
    if not values:
        raise ValueError(f"{name}={value!r} holds no number; give at least one.")
    return sorted({check_count(name, one) for one in values})


def _check_divides(rows, name, numbers):
    for number in numbers:
        if rows % number:
            raise ValueError(
                f"The batch has {rows} rows, which are not a multiple of {number} of "
                f"{name}={tuple(numbers)}. Use {-(-rows // number) * number} rows, or "
                f"{name} that divide them."
            )


def _check_tolerance(tolerance):
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not is_number or not 0 < tolerance < 1:
        raise ValueError(f"{tolerance=!r} must be a number between 0 and 1.")


def _plan(rows: int, steps: list[int], num_devices) -> list[tuple[int, int]]:
    """The cycles to compare: micro-batches and devices of each."""
    available = jax.local_device_count()
    if num_devices is None:
        most = max(n for n in range(1, available + 1) if rows % n == 0)
        plan = [(count, 1) for count in steps]
        fitting = [count for count in steps if rows % (most * count) == 0]
        return plan + ([(max(fitting), most)] if most > 1 and fitting else [])
    counts = _counts("num_devices", num_devices)
    if counts[-1] > available:
        raise ValueError(f"{num_devices=!r}, but there are {available} devices.")
    for count in counts:
        _check_divides(rows, "num_devices", [count])
        _check_divides(rows // count, "accum_steps", steps)
    return [(count, n) for n in counts for count in steps]


def _why_one_device(rows):
    available = jax.local_device_count()
    if available == 1:
        return "compared on one device, the only one here"
    return (
        f"compared on one device: no number of the {available} here divides the {rows} "
        "rows and leaves a number that accum_steps divides"
    )


_PACKAGE = pathlib.Path(__file__).parents[1]


def _is_refusal(error: BaseException) -> bool:
    """Whether jaxga raised it: an error of the loss function's own is not a finding."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    # In the audit itself, a folder further down, it would be a mistake of ours.
    return pathlib.Path(traceback.tb_frame.f_code.co_filename).parent == _PACKAGE


def _refused(error: BaseException) -> Cause:
    return Cause("refused", "loss_fn", f"jaxga refuses it: {error}", float("nan"))
