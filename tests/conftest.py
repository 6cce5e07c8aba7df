"""Four CPU devices, so that sharded programs are sharded in the tests too."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
