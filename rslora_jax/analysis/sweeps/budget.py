"""Budget: how much memory one run of a sweep needs, and so how many can go side by side."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, jaxprs_in_params

from rslora_jax.paths import AdapterError
from rslora_jax.tracing import open_jaxpr

__all__ = ["Budget", "available_bytes", "divide", "peak_bytes"]

CACHES = 32 * 2**20
"""Bytes that the caches of a CPU hold: more runs side by side would wait for its memory."""


class Budget(NamedTuple):
    """How the runs of a sweep are divided.

    Attributes:
      memory: bytes that the runs on one device may use together.
      per_run: bytes that one run needs, estimated from its program.
      chunk: how many runs go side by side on one device.
      rounds: how many chunks follow one another.
      shards: over how many devices the runs are spread.
    """

    memory: int
    per_run: int
    chunk: int
    rounds: int
    shards: int

    def __str__(self) -> str:
        return (
            f"{self.rounds} x {self.chunk} runs on {self.shards} device(s), "
            f"{_mib(self.per_run)} a run of {_mib(self.memory)}"
        )


def divide(runs: int, per_run: int, memory: int | None, shards: int = 1) -> Budget:
    """The fewest chunks that fit, of equal size.

    Args:
      runs: how many runs there are.
      per_run: bytes that one needs.
      memory: bytes that they may use on one device; None means `available_bytes`.
      shards: over how many devices they are spread.

    Raises:
      AdapterError: if not even one run fits, with the bytes.

    Example:
      >>> print(divide(48, per_run=2**20, memory=10 * 2**20))
      5 x 10 runs on 1 device(s), 1.0 MiB a run of 10.0 MiB
    """
    memory = available_bytes(per_run) if memory is None else memory
    most = int(memory // max(per_run, 1))
    if most < 1:
        raise AdapterError(
            f"The sweep was given {_mib(memory)} for its runs, but one run needs about "
            f"{_mib(per_run)}. Raise `memory`, or use smaller batches or a smaller largest rank."
        )
    each = math.ceil(runs / shards)
    rounds = math.ceil(each / most)
    return Budget(int(memory), per_run, math.ceil(each / rounds), rounds, shards)


def available_bytes(per_run: int) -> int:
    """Half of the memory of the first device; on a CPU `CACHES`, or one run if it needs more."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return max(CACHES, per_run) if limit is None else int(limit) // 2


def peak_bytes(closed: Any) -> int:
    """The most that a program's values take together, without its arguments.

    Values live from where they are made to their last use; a program inside an equation adds
    its own peak. XLA fuses operations, so the compiled program mostly needs less.

    Example:
      >>> import jax.numpy as jnp
      >>> closed = jax.make_jaxpr(lambda x: jnp.sin(x).sum())(jnp.zeros((256, 4), jnp.float32))
      >>> peak_bytes(closed)
      4100
    """
    jaxpr, _ = open_jaxpr(closed)
    last = _last_uses(jaxpr)
    living: dict[Any, int] = {}
    peak = 0
    for place, eqn in enumerate(jaxpr.eqns):
        inside = max((peak_bytes(inner) for inner in jaxprs_in_params(eqn.params)), default=0)
        living.update({var: _bytes(var.aval) for var in eqn.outvars})
        peak = max(peak, sum(living.values()) + inside)
        used = (var for var in [*eqn.invars, *eqn.outvars] if not isinstance(var, Literal))
        for var in used:
            if last.get(var, place) <= place:
                living.pop(var, None)
    return peak


def _last_uses(jaxpr: Any) -> Mapping[Any, int]:
    last: dict[Any, int] = {}
    for place, eqn in enumerate(jaxpr.eqns):
        last.update({var: place for var in eqn.invars if not isinstance(var, Literal)})
    last.update({v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)})
    return last


def _bytes(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    return math.prod(getattr(aval, "shape", ())) * getattr(dtype, "itemsize", 0)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
