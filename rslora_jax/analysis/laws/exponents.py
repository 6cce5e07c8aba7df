"""Exponents: powers of the rank, as numbers or ranges, by name, and what they mean for a run."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

from rslora_jax.paths import AdapterError

__all__ = ["INITS", "SCALINGS", "Exponent", "Verdict", "named_exponent", "verdict"]

Verdict: TypeAlias = Literal["stable", "collapsing", "exploding", "unknown"]

SCALINGS = {"lora": -1.0, "rslora": -0.5, "constant": 0.0}
INITS = {"kaiming": 0.0, "normal": 0.0, "fan_out": -0.5, "gaussian": -1.0}


@dataclasses.dataclass(frozen=True)
class Exponent:
    """The exponent of r, or the range that it lies in.

    Attributes:
      low: the lower end.
      high: the upper end; the same number where the exponent is known.

    Example:
      >>> print(Exponent(-0.5, 0.0), Exponent(0.5, 0.5))
      -0.5..0 0.5
      >>> Exponent(-0.5, 0.0).distance(0.25)
      0.25
    """

    low: float
    high: float

    def distance(self, measured: float) -> float:
        """How far a measured exponent lies outside; 0 inside the range."""
        return max(self.low - measured, measured - self.high, 0.0)

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g}..{self.high:g}"


def named_exponent(value: str | float, names: Mapping[str, float], what: str) -> float:
    """The exponent that a name stands for, or the number itself.

    Args:
      value: a key of `names`, or a finite number.
      names: `SCALINGS` or `INITS`.
      what: the argument's name, for the message.

    Raises:
      AdapterError: for any other value.

    Example:
      >>> named_exponent("rslora", SCALINGS, "scaling"), named_exponent(-0.75, SCALINGS, "scaling")
      (-0.5, -0.75)
    """
    if isinstance(value, str) and value in names:
        return names[value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(float(value)):
        return float(value)
    raise AdapterError(
        f"{what} must be one of {tuple(names)} or the exponent of the rank as a finite number, "
        f"found {value!r}."
    )


def verdict(exponent: Exponent | float, tolerance: float = 0.1) -> Verdict:
    """What an exponent of the rank means for a run at a high rank.

    Args:
      exponent: from `theory`, or a measured slope of log(quantity) against log(rank). A range
        is judged by its worse end, and growth is the worse of the two.
      tolerance: exponents up to this size count as 0.

    Returns:
      ``"stable"``, ``"collapsing"`` or ``"exploding"``; ``"unknown"`` for a slope that is NaN.

    Raises:
      AdapterError: if the tolerance is not a number of at least 0.

    Example:
      >>> verdict(0.02), verdict(-0.5), verdict(Exponent(-0.5, 0.5))
      ('stable', 'collapsing', 'exploding')
    """
    if not tolerance >= 0:
        raise AdapterError(f"verdict needs a tolerance of at least 0, found {tolerance!r}.")
    ends = (exponent.low, exponent.high) if isinstance(exponent, Exponent) else (exponent,) * 2
    if any(math.isnan(end) for end in ends):
        return "unknown"
    if ends[1] > tolerance:
        return "exploding"
    return "collapsing" if ends[0] < -tolerance else "stable"
