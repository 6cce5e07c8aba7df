"""Bits: how many parameters it takes to store what a task asks for."""

import math
from typing import NamedTuple

from rslora_jax.paths import AdapterError

__all__ = ["Bits", "bits_rank"]


class Bits(NamedTuple):
    """What a task asks to be stored, and how much of it one parameter holds.

    Attributes:
      bits: how many bits are to be learned: for random answers, log2 of the number of
        answers, times the number of facts.
      per_parameter: bits that one adapter parameter stores in this training. 0.35 is a
        recorded value of an earlier study of this project, which the repository does not
        reproduce: in a transformer of 115,000 parameters, at 50 exposures a fact and with one
        seed, it was 0.31 to 0.43 at ranks 1 to 4. Allen-Zhu and Li 2024 (arXiv 2404.05405)
        find about 1 at 100 exposures and 2 at 1000, in full training.
    """

    bits: float
    per_parameter: float = 0.35


def bits_rank(budget: Bits, parameters_per_rank: int) -> int:
    """The smallest rank with room for a number of bits: r >= bits / (c sum(d_in + d_out)).

    A bound on capacity, in the limit of enough training: not a promise that the run gets
    there, and no reason for a higher rank where the task stores little.

    Args:
      budget: bits and c, the bits per parameter.
      parameters_per_rank: the sum of inputs + outputs over all adapted modules.

    Returns:
      The rank, at least 1.

    Raises:
      AdapterError: if a number is not above 0.

    Example:
      >>> bits_rank(Bits(5120), parameters_per_rank=2304)
      7
    """
    if not (budget.bits > 0 and budget.per_parameter > 0 and parameters_per_rank > 0):
        raise AdapterError(
            f"bits_rank needs numbers above 0, found {budget} and {parameters_per_rank} parameters "
            "a rank."
        )
    return max(1, math.ceil(budget.bits / (budget.per_parameter * parameters_per_rank)))
