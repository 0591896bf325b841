"""The arithmetic of a batch: examples, micro-batches, devices."""

import dataclasses

import jax

from ._checks import check_count


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """How a global batch is made up. Any two of the first three give the third.

    `global_batch_size = microbatch_size * accum_steps * num_devices`.

    Attributes:
        global_batch_size: examples per update, over all devices.
        microbatch_size: examples per device and forward pass.
        accum_steps: micro-batches per update.
        num_devices: devices that the batch is divided over; by default
            `jax.device_count()`, asked when the object is made.

    Raises:
        TypeError: a number is no integer.
        ValueError: a number is less than 1; fewer than two of the first three are
            given; they contradict each other, or do not divide (the message names the
            nearest numbers that do).

    Example:
        >>> import jaxga
        >>> sizes = jaxga.BatchSizes(global_batch_size=384, microbatch_size=6,
        ...                          num_devices=8)
        >>> print(sizes)
        384 examples per update = 6 per micro-batch * 8 accumulation steps * 8 devices
        >>> sizes.accum_steps
        8
    """

    global_batch_size: int | None = None
    microbatch_size: int | None = None
    accum_steps: int | None = None
    num_devices: int | None = None

    def __post_init__(self):
        given = {
            field.name: check_count(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        }
        if "num_devices" not in given:
            given["num_devices"] = jax.device_count()  # starts the backend
        for name, value in _complete(given).items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} examples per update = "
            f"{self.microbatch_size} per micro-batch * "
            f"{_plural(self.accum_steps, 'accumulation step')} * "
            f"{_plural(self.num_devices, 'device')}"
        )


_THREE = ("global_batch_size", "microbatch_size", "accum_steps")


def _complete(given: dict[str, int]) -> dict[str, int]:
    missing = [name for name in _THREE if name not in given]
    if len(missing) > 1:
        raise ValueError(
            f"BatchSizes needs two of {', '.join(_THREE)} to find the third; "
            f"{' and '.join(missing)} are missing."
        )
    if "global_batch_size" in missing:
        product = given["microbatch_size"] * given["accum_steps"] * given["num_devices"]
        return given | {"global_batch_size": product}
    total, factors = given["global_batch_size"], dict(given)
    del factors["global_batch_size"]
    product = 1
    for factor in factors.values():
        product *= factor
    if total % product or (not missing and total != product):
        raise ValueError(_contradiction(total, factors, product, bool(missing)))
    return given | {name: total // product for name in missing}


def _contradiction(total, factors, product, any_multiple):
    names, values = " * ".join(factors), " * ".join(map(str, factors.values()))
    found = f"global_batch_size={total}, but {names} = {values} = {product}"
    if not any_multiple:
        return f"{found}. Leave one of them out, or use global_batch_size={product}."
    below, above = total // product * product, -(-total // product) * product
    nearest = f"{below} or {above}" if below else f"{above}"
    return (
        f"{found}, which does not divide it. Use global_batch_size={nearest}, or "
        f"another {' or '.join(factors)}."
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
