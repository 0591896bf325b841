"""How much memory a device has, and what several processes make of it."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from .._checks import PyTree


def find_budget(devices: Iterable[Any], given: int | None) -> int:
    """Bytes of one device: those given, or the least limit; on all processes the same.

    Raises:
        ValueError: none were given, and a device does not say.
    """
    devices = list(devices)
    here = [d for d in devices if d.process_index == jax.process_index()]
    budget = min(map(_limit, here or devices)) if given is None else given
    return -largest_everywhere(-budget, devices)


def devices_of(tree: PyTree) -> set[Any]:
    """The devices on which the arrays lie, or would; else that of a new array."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    found = [sharding.device_set for sharding in shardings if sharding is not None]
    return set().union(*found) or jnp.zeros(()).devices()


def largest_everywhere(number: int, devices: Iterable[Any]) -> int:
    """The largest of the numbers that the processes with these devices have.

    A collective over all devices, if they belong to several processes.
    """
    if len({device.process_index for device in devices}) == 1:
        return number
    halves = np.array(divmod(number, 2**31), np.int32)  # JAX has no int64 as a rule
    with jax.transfer_guard("allow"):  # it fetches the result implicitly
        gathered = multihost_utils.process_allgather(halves)
    return max(int(high) * 2**31 + int(low) for high, low in gathered)


def _limit(device):
    limit = (_stats(device) or {}).get("bytes_limit")
    if not limit:
        raise ValueError(
            f"{device} does not say how much memory it has: a CPU has no limit of its "
            "own, and a device that is not there has none yet. Give budget_bytes, the "
            "bytes of one device that may be used, to jaxga.plan_memory. (A GPU offers "
            "75 % of its memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.)"
        )
    return limit


def _stats(device):
    try:
        return device.memory_stats()
    except jax.errors.JaxRuntimeError:
        return None  # one that can only be compiled for
