"""Learning-rate laws: how the best learning rate goes with the rank, in theory and as recorded.

The recorded exponents are those of an earlier study of this project: a linear teacher, one
learning rate for both factors, the best one from a fitted parabola, two seeds; 100 steps and, for
the early regimes, 8. The repository does not reproduce them: no command of it prints them.
"""

from typing import NamedTuple

__all__ = ["LR_LAWS", "LR_REGIMES", "LrLaw"]


class LrLaw(NamedTuple):
    """One law: the best learning rate goes as (gamma^gamma_power r^rank_power)^-power.

    Attributes:
      gamma_power: the power of the scale gamma.
      rank_power: the power of the rank beside it.
      power: the power of both.
      recorded: the exponents that the earlier study found, in the order of `SCALINGS`.
      reason: where the law comes from.
    """

    gamma_power: float
    rank_power: float
    power: float
    recorded: tuple[float, float, float]
    reason: str

    def exponent(self, gamma: float) -> float:
        """The exponent of the rank in the best learning rate, for a scale that goes as r^gamma.

        Example:
          >>> LR_LAWS["adam", "coherent"].exponent(-0.5)
          -0.25
        """
        return -self.power * (self.gamma_power * gamma + self.rank_power) + 0.0


_MUA = "once a has moved, LR ~ r^-(1-g)/2 for a scale r^-g (muA, arXiv 2602.06204)"
_SIGNAL = "before a has moved, the function moves as gamma r"
_SPREAD = "the update is spread over random directions and moves as gamma sqrt(r)"
_SHARP = "the curvature in b at the start, gamma^2 sigma^2 (r |S| + tr S), sets the limit"
LR_LAWS = {
    ("adam", "coherent"): LrLaw(1, 1, 0.5, (0.0, -0.22, -0.50), _MUA),
    ("adam", "coherent-early"): LrLaw(1, 1, 1, (-0.12, -0.38, -0.61), _SIGNAL),
    ("adam", "incoherent"): LrLaw(
        1, 0.5, 0.5, (0.25, 0.02, -0.22), f"{_SPREAD}, halved once a moves"
    ),
    ("adam", "incoherent-early"): LrLaw(1, 0.5, 1, (0.32, 0.09, -0.16), _SPREAD),
    ("sgd", "coherent"): LrLaw(2, 1, 1, (0.95, 0.34, -0.21), _SHARP),
    ("sgd", "coherent-early"): LrLaw(2, 1, 1, (0.96, 0.47, -0.23), _SHARP),
    ("sgd", "incoherent"): LrLaw(2, 0, 1, (1.15, 0.59, 0.22), _SHARP),
    ("sgd", "incoherent-early"): LrLaw(2, 0, 1, (1.00, 0.57, 0.11), _SHARP),
}
LR_REGIMES = tuple(regime for optimizer, regime in LR_LAWS if optimizer == "adam")
