"""Counting: what one run of a compiled program costs one device."""

from typing import NamedTuple

from rslora_jax.plan.flops import flops, uncounted
from rslora_jax.plan.hlo import Computation, Instruction, Module, parse
from rslora_jax.plan.runs import runs
from rslora_jax.plan.traffic import traffic

__all__ = ["Count", "count", "count_of"]


class Count(NamedTuple):
    """What one run costs one device, loops multiplied.

    Attributes:
      flops: multiplications and additions of its matrix products and convolutions.
      hbm_bytes: bytes read from and written to main memory.
      unknown: what the figures leave out, in words; with any of these they are lower bounds.
    """

    flops: float
    hbm_bytes: float
    unknown: tuple[str, ...] = ()


def count(text: str) -> Count:
    """Counts the FLOPs and the memory traffic of a compiled program.

    XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it
    runs. See `flops` and `traffic` for what is counted. Of a conditional the branch with the
    most FLOPs and bytes counts.

    Args:
      text: ``compiled.as_text()``.

    Returns:
      `Count(flops, hbm_bytes, unknown)`.

    Raises:
      AdapterError: if the text cannot be read.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def f(ws, x):
      ...     return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]
      >>> compiled = jax.jit(f).lower(jnp.ones((5, 16, 16)), jnp.ones((8, 16))).compile()
      >>> found = count(compiled.as_text())
      >>> found.flops == 5 * 2 * 8 * 16 * 16, found.unknown
      (True, ())
    """
    return count_of(parse(text))


def count_of(module: Module) -> Count:
    """`count` of a text that was parsed."""

    def weigh(computation: Computation, step: Instruction) -> float:
        return flops(module, computation, step) + traffic(module, computation, step)

    followed = runs(module, weigh)
    unknown = [f"%{step.name}, a {step.opcode}, is not followed" for step in followed.unfollowed]
    computed = moved = 0.0
    for run, step in followed.steps():
        computed += run.times * flops(module, run.computation, step)
        moved += run.times * traffic(module, run.computation, step)
        unknown += [f"FLOPs of {what}" for what in uncounted(module, step)]
    if not all(run.exact for run in followed.runs):
        unknown.append("rounds of a loop whose count depends on data, taken as one")
    return Count(computed, moved, tuple(dict.fromkeys(unknown)))
