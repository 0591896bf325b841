"""Eight CPU devices, and no silent broadcasting of ranks; before any array exists."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# One computation at a time: on few cores, eight devices can block each other for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
