"""Eight CPU devices, and no silent broadcasting of ranks, before any array exists."""

import importlib
import os
import sys
from pathlib import Path

import jax
import pytest

flags = os.environ.get("XLA_FLAGS", "")
# Most of the tests' time is LLVM's: less of it. The programs that the tests read are
# made before that. Of this process only: the examples run as they are.
os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# One computation at a time: on few cores, eight devices can block each other for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 8
os.environ["XLA_FLAGS"] = flags


@pytest.fixture
def load(monkeypatch):
    """Imports a script of the benchmarks as Python finds it when it is run."""
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for script in folder.glob("[a-z]*.py"):
        # Names as short as these must not stand in the way of anyone's.
        sys.modules.pop(script.stem, None)
