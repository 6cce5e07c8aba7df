"""The hard threshold of Gavish and Donoho: above it a singular value is no noise."""

import functools
import math

import numpy as np

from rslora_jax.paths import AdapterError

__all__ = ["gavish_donoho_threshold"]


@functools.cache
def gavish_donoho_threshold(beta: float) -> float:
    """omega(beta): the optimal hard threshold over the median singular value.

    omega(beta) = lambda(beta) / sqrt(mu_beta), with lambda the optimal threshold for known
    noise and mu_beta the median of the Marchenko-Pastur law (Gavish and Donoho 2014, arXiv
    1305.5870). The median is found numerically.

    Args:
      beta: the smaller side over the larger, above 0 and at most 1.

    Returns:
      The factor, dimensionless; 2.858 for a square matrix.

    Raises:
      AdapterError: if `beta` is out of range.

    Example:
      >>> round(gavish_donoho_threshold(1.0), 3)
      2.858
    """
    if not 0 < beta <= 1:
        raise AdapterError(f"beta is the smaller side over the larger, in (0, 1], found {beta!r}.")
    root = math.sqrt(beta**2 + 14 * beta + 1)
    known_noise = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
    return known_noise / math.sqrt(_marchenko_pastur_median(beta))


def _marchenko_pastur_median(beta: float) -> float:
    # With t = 1 + beta + 2 sqrt(beta) cos(angle) the density is smooth at both edges.
    angle = np.linspace(0, np.pi, 20_001)[1:-1]
    t = 1 + beta + 2 * math.sqrt(beta) * np.cos(angle)
    mass = np.cumsum(np.sin(angle) ** 2 / t)
    return float(np.interp(0.5 * mass[-1], mass, t))
