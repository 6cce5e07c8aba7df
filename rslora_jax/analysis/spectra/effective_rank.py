"""Effective ranks: how many directions a spectrum has, by every definition in use.

They disagree by a factor of ten on one matrix: read them side by side (`effective_ranks`). Each
takes singular values [..., k], falling, of NumPy or JAX (also traced), and keeps their precision.
The zero matrix has rank 0 by every definition.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.analysis.spectra.gavish_donoho import gavish_donoho_threshold
from rslora_jax.paths import AdapterError

__all__ = [
    "EffectiveRanks",
    "effective_ranks",
    "energy_by_rank",
    "energy_rank",
    "entropy_rank",
    "gavish_donoho_rank",
    "participation_rank",
    "stable_rank",
]


class EffectiveRanks(NamedTuple):
    """The effective ranks of one or many spectra, each of shape [...].

    Attributes:
      stable: |W|_F^2 / |W|_2^2.
      entropy: exp H(s / sum s).
      entropy_energy: exp H(s^2 / sum s^2).
      participation: (sum s^2)^2 / sum s^4.
      energy_90: the smallest rank that holds 90 % of |W|_F^2; so `energy_95`, `energy_99`.
      gavish_donoho: how many singular values stand above the noise.
      truncated: only the first k singular values were known. `stable` is exact all the same,
        and so are energy ranks up to k; everything else is a lower bound.
    """

    stable: Any
    entropy: Any
    entropy_energy: Any
    participation: Any
    energy_90: Any
    energy_95: Any
    energy_99: Any
    gavish_donoho: Any
    truncated: bool


def effective_ranks(
    s: Any, *, total: Any = None, shape: Sequence[int] | None = None
) -> EffectiveRanks:
    """Every effective rank of a spectrum, side by side.

    Args:
      s: singular values [..., k], falling.
      total: the Frobenius norm [...] of the whole matrix, if `s` holds only its first k values;
        None means that all others are zero.
      shape: the matrix's shape; None means k x k.

    Returns:
      `EffectiveRanks`, with `truncated` set if `total` was given and k is below the
      matrix's smaller side (or that side is unknown).

    Raises:
      AdapterError: if there are more singular values than `shape` allows, or none at all.

    Example:
      >>> ranks = effective_ranks(np.array([2.0, 2.0, 2.0, 0.0]))
      >>> round(float(ranks.stable), 6), int(ranks.energy_90), int(ranks.gavish_donoho)
      (3.0, 3, 0)
    """
    s = _spectrum(s, shape)
    return EffectiveRanks(
        stable=stable_rank(s, total=total),
        entropy=entropy_rank(s),
        entropy_energy=entropy_rank(s, power=2),
        participation=participation_rank(s),
        energy_90=energy_rank(s, 0.90, total=total),
        energy_95=energy_rank(s, 0.95, total=total),
        energy_99=energy_rank(s, 0.99, total=total),
        gavish_donoho=gavish_donoho_rank(s, shape=shape, truncated=total is not None),
        truncated=total is not None and (shape is None or s.shape[-1] < min(shape)),
    )


def energy_by_rank(s: Any, *, total: Any = None) -> Any:
    """The share of |W|_F^2 that the best approximation of rank 1, 2, ... k holds.

    Args:
      s: singular values [..., k], falling.
      total: the Frobenius norm [...] of the whole matrix; None means that of `s`.

    Returns:
      Shares [..., k], rising, at most 1 (Eckart and Young 1936).

    Example:
      >>> energy_by_rank(np.array([2.0, 1.0, 1.0])).round(3).tolist()
      [0.667, 0.833, 1.0]
    """
    s = _spectrum(s)
    xp = _namespace(s)
    held = xp.cumsum(s * s, axis=-1)
    return xp.minimum(_ratio(held, _total_energy(s, total)[..., None]), 1)


def energy_rank(s: Any, share: float, *, total: Any = None) -> Any:
    """The smallest rank whose best approximation holds `share` of |W|_F^2.

    Args:
      s: singular values [..., k], falling.
      share: above 0 and at most 1, such as 0.9.
      total: the Frobenius norm [...] of the whole matrix; None means that of `s`.

    Returns:
      Integers [...]; k + 1 where the k known values do not suffice: a lower bound.

    Raises:
      AdapterError: if `share` is out of range.

    Example:
      >>> int(energy_rank(np.array([2.0, 1.0, 1.0]), 0.8))
      2
    """
    if not 0 < share <= 1:
        raise AdapterError(f"share is a part of the energy, in (0, 1], found {share!r}.")
    s = _spectrum(s)
    held = energy_by_rank(s, total=total)
    rounding = 4 * s.shape[-1] * float(np.finfo(s.dtype).eps)
    ranks = (held < share - rounding).sum(-1) + 1
    return _namespace(s).where(_total_energy(s, total) > 0, ranks, 0)


def stable_rank(s: Any, *, total: Any = None) -> Any:
    """|W|_F^2 / |W|_2^2 (Rudelson and Vershynin 2007): at most the rank, blind to the tail.

    Args:
      s: singular values [..., k], falling.
      total: the Frobenius norm [...] of the whole matrix; None means that of `s`.

    Returns:
      Numbers [...].

    Example:
      >>> float(stable_rank(np.array([2.0, 1.0, 1.0])))
      1.5
    """
    s = _spectrum(s)
    return _ratio(_total_energy(s, total), s[..., 0] ** 2)


def entropy_rank(s: Any, *, power: int = 1) -> Any:
    """exp of the Shannon entropy of s^power / sum s^power.

    Args:
      s: singular values [..., k].
      power: 1 is the effective rank of Roy and Vetterli 2007 (EUSIPCO); 2 weighs by energy.

    Returns:
      Numbers [...], between 1 and k.

    Example:
      >>> round(float(entropy_rank(np.array([1.0, 1.0, 1.0, 1.0]))), 6)
      4.0
    """
    s = _spectrum(s)
    xp = _namespace(s)
    weights = s**power
    p = _ratio(weights, weights.sum(-1, keepdims=True))
    entropy = -(p * xp.log(xp.where(p > 0, p, 1))).sum(-1)
    return xp.where(weights.sum(-1) > 0, xp.exp(entropy), 0)


def participation_rank(s: Any) -> Any:
    """The participation ratio (sum s^2)^2 / sum s^4: the inverse of the mean energy share.

    Example:
      >>> float(participation_rank(np.array([1.0, 1.0, 0.0])))
      2.0
    """
    s = _spectrum(s)
    p = _ratio(s, _namespace(s).sqrt(_total_energy(s, None))[..., None]) ** 2
    return _ratio(p.sum(-1) ** 2, (p * p).sum(-1))


def gavish_donoho_rank(
    s: Any, *, shape: Sequence[int] | None = None, truncated: bool = False
) -> Any:
    """How many singular values exceed the optimal hard threshold, the noise being unknown.

    The threshold is omega(beta) times the median of all min(m, n) singular values (Gavish and
    Donoho 2014, arXiv 1305.5870). It presumes white noise of full rank: without noise the median
    is 0 and every singular value above 0 counts.

    Args:
      s: singular values [..., k], falling.
      shape: the matrix's shape; None means k x k.
      truncated: the values beyond the first k are unknown, not zero. If the median is among them,
        the last known value stands for it, and the count is a lower bound.

    Returns:
      Integers [...].

    Example:
      >>> int(gavish_donoho_rank(np.array([9.0, 1.1, 1.0, 0.9])))
      1
    """
    s = _spectrum(s, shape)
    xp = _namespace(s)
    k, small = s.shape[-1], min(shape or s.shape[-1:])
    rest = s[..., -1:] if truncated else xp.zeros_like(s[..., -1:])
    places = [(small - 1) // 2, small // 2]
    middle = [s[..., p] if p < k else rest[..., 0] for p in places]
    threshold = gavish_donoho_threshold(min(shape) / max(shape) if shape else 1.0)
    return (s > threshold * (middle[0] + middle[1])[..., None] / 2).sum(-1)


def _spectrum(s: Any, shape: Sequence[int] | None = None) -> Any:
    """The singular values as a floating array of their own kind."""
    array = s if isinstance(s, jax.Array) else np.asarray(s)
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32 if isinstance(s, jax.Array) else np.float64)
    most = array.shape[-1] if array.ndim and shape is None else min(shape or [0])
    if array.ndim == 0 or not 1 <= array.shape[-1] <= most:
        raise AdapterError(
            f"Effective ranks need singular values [..., k], with k from 1 to {most} "
            f"(shape {shape}), found an array of shape {array.shape}."
        )
    return array


def _namespace(s: Any) -> Any:
    return jnp if isinstance(s, jax.Array) else np


def _total_energy(s: Any, total: Any) -> Any:
    if total is None:
        return (s * s).sum(-1)
    return _namespace(s).asarray(total, s.dtype) ** 2


def _ratio(above: Any, below: Any) -> Any:
    """above / below, and 0 where `below` is 0."""
    xp = _namespace(below)
    return xp.where(below > 0, above / xp.where(below > 0, below, 1), 0)
