"""Eight CPU devices, so that sharded programs are sharded in the tests too; XLA compiles fast.

Most of the tests' time is spent compiling tiny programs, also those of single operations.
"""

import os
from importlib.metadata import version

# Also for the processes that tests start: with libtpu installed JAX would load it in each of them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

# XLA ends the process at a flag that it does not know: each release gets those it was seen to know.
XLA_FLAGS = {
    "0.10": "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false",
    "0.12": "--xla_cpu_parallel_codegen_split_count=1",
}
FLAGS = XLA_FLAGS.get(".".join(version("jaxlib").split(".")[:2]), "")
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"  # the caller's win

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
