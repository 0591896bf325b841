"""Gradient accumulation for JAX and Flax, done exactly and at hardware cost."""

from importlib.metadata import version as _version

from ._accumulate import accumulate as accumulate
from ._accumulate_state import has_updated as has_updated
from ._accumulate_state import state_specs as state_specs
from ._audit.audit import audit as audit
from ._batch_sizes import BatchSizes as BatchSizes
from ._batches import pad_batch as pad_batch
from ._collectives import collectives as collectives
from ._cycles import cycles as cycles
from ._loss import LossOutput as LossOutput
from ._memory.plan_memory import plan_memory as plan_memory
from ._merge import merge as merge
from ._metrics import Max as Max
from ._metrics import Min as Min
from ._metrics import Stack as Stack
from ._metrics import Sum as Sum
from ._microbatch_map import microbatch_map as microbatch_map
from ._noise_scale import NoiseScale as NoiseScale
from ._parallel import DataParallel as DataParallel
from ._sums import WeightedSum as WeightedSum
from ._train_state import TrainState as TrainState
from ._train_step import make_train_step as make_train_step
from ._value_and_grad import value_and_grad as value_and_grad
from ._value_and_grad import value_and_grad_sums as value_and_grad_sums
from ._wgrad import float32_wgrad_dot_general as float32_wgrad_dot_general

__version__ = _version("jaxga")
