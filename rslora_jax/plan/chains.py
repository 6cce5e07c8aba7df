"""Chains: a collective that a TPU runs beside other work, as fusions that follow one another.

Each link of the chain is a fusion that holds the collective again, beside the work; the first
also holds the call that starts it, the last the one that waits for it. It runs once.
"""

from rslora_jax.plan.hlo import Computation, Instruction

__all__ = ["begins", "is_chained", "is_link"]

START = "AsyncCollectiveStart"
CALLS = (START, "AsyncCollectiveDone")


def is_link(step: Instruction) -> bool:
    """Whether a step inside a fusion is a part of a chain: the collective, a start or a wait.

    Example:
      >>> is_link(Instruction("all-gather.1", "all-gather", (), (), "", 'x={chain_id="0"}'))
      True
    """
    return is_chained(step) or (
        step.opcode == "custom-call" and any(f'"{name}"' in step.tail for name in CALLS)
    )


def is_chained(step: Instruction) -> bool:
    """Whether a step is a collective that a chain repeats."""
    return step.opcode != "custom-call" and "chain_id=" in step.tail


def begins(inside: Computation) -> bool:
    """Whether a fusion is the first link of its chain."""
    return any(START in step.tail for step in inside.instructions.values())
