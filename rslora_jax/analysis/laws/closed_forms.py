"""Closed forms: exact means of an adapter's first step, and of a truncated update's error.

All are for one adapted product y = x (W + scale * a @ b) with `a` [in, r] of iid entries of mean
0, b = 0, and the gradient G = dL/dW [in, out] held fixed: the means are over draws of `a`. `b`'s
gradient is scale a^T G, so that one step of SGD leaves dW = -lr scale^2 a a^T G, and one step of
Adam (every entry moves by the learning rate) dW = -lr scale a sign(a^T G).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rslora_jax.paths import AdapterError

__all__ = [
    "FirstStep",
    "ReconstructionError",
    "adam_first_step",
    "crossover_rank",
    "grad_b_square",
    "reconstruction_error",
    "sgd_first_step",
]


class FirstStep(NamedTuple):
    """Means over draws of `a` after one step.

    Attributes:
      delta_square: E |dW|_F^2: everything that moved.
      signal: E <dW, -G>: what moved along the gradient; the predicted fall of the loss.
    """

    delta_square: jax.Array
    signal: jax.Array


class ReconstructionError(NamedTuple):
    """The relative error of an update kept at rank r and multiplied by s, by cause.

    Attributes:
      error: |W - s W_r|_F / |W|_F.
      scale: the share of its square that a wrong factor causes, (s - 1)^2 c.
      rank: the share that the truncation causes, 1 - c.
    """

    error: float
    scale: float
    rank: float


def grad_b_square(gradient: jax.Array, scale: float, std: float, rank: int) -> jax.Array:
    """E |gB|_F^2 at the start: scale^2 std^2 r |G|_F^2, for any distribution of `a`.

    Each of the r columns of `a` has E[a_k a_k^T] = std^2 I, so that E|a_k^T G|^2 = std^2 |G|^2.

    Args:
      gradient: G, [in, out].
      scale: the site's scale, from `config.scale`.
      std: the standard deviation of the entries of `a`.
      rank: r.

    Returns:
      A scalar, in the square of the gradient's units.

    Raises:
      AdapterError: if the gradient is no matrix or the rank is below 1.

    Example:
      >>> float(grad_b_square(jnp.ones((4, 2)), scale=2.0, std=0.5, rank=3))
      24.0
    """
    _check(gradient, rank)
    return (scale * std) ** 2 * rank * jnp.sum(gradient**2)


def sgd_first_step(
    gradient: jax.Array,
    learning_rate: float,
    scale: float,
    std: float,
    rank: int,
    kurtosis: float = 3.0,
) -> FirstStep:
    """The mean update of one SGD step.

    E <dW, -G> = lr E|gB|^2, and E|dW|^2 = lr^2 scale^4 tr(G^T E[(a a^T)^2] G), where
    E[(a a^T)^2] = std^4 r (in + r + kurtosis - 2) I: the second moment of a Wishart matrix
    for Gaussian entries (kurtosis 3), and the same sum over fourth moments for others.

    Args:
      gradient: G, [in, out].
      learning_rate: of `b`.
      scale: the site's scale, from `config.scale`.
      std: the standard deviation of the entries of `a`: 1/sqrt(in) for ``"normal"``,
        1/sqrt(3 in) for ``"kaiming"``.
      rank: r.
      kurtosis: the fourth moment of the entries over std^4: 3 for a normal distribution,
        1.8 for a uniform one.

    Returns:
      `FirstStep`, exact for every shape and rank.

    Raises:
      AdapterError: if the gradient is no matrix or the rank is below 1.

    Example:
      >>> step = sgd_first_step(jnp.ones((4, 2)), 0.5, scale=2.0, std=0.5, rank=3)
      >>> float(step.delta_square), float(step.signal)
      (48.0, 12.0)
    """
    squared = grad_b_square(gradient, scale, std, rank)
    spread = (learning_rate * scale * std) ** 2 * (gradient.shape[0] + rank + kurtosis - 2)
    return FirstStep(spread * squared, learning_rate * squared)


def adam_first_step(
    gradient: jax.Array, learning_rate: float, scale: float, std: float, rank: int
) -> FirstStep:
    """The mean update of one Adam step with eps = 0, for Gaussian `a`.

    With g_j a column of G and s_kj = sign(a_k . g_j): E[s_kj a_k] = std sqrt(2/pi) g_j/|g_j|,
    so that E <dW, -G> = lr scale std sqrt(2/pi) r sum_j |g_j| and, column by column of dW,
    E |sum_k s_kj a_k|^2 = std^2 [r in + r (r - 1) 2/pi]. For a uniform `a` both hold as the
    number of inputs grows (central limit theorem).

    Args:
      gradient: G, [in, out], without a column of zeros.
      learning_rate: of `b`.
      scale: the site's scale, from `config.scale`.
      std: the standard deviation of the entries of `a`.
      rank: r.

    Returns:
      `FirstStep`.

    Raises:
      AdapterError: if the gradient is no matrix or the rank is below 1.

    Example:
      >>> step = adam_first_step(jnp.ones((4, 1)), 0.5, scale=2.0, std=0.5, rank=1)
      >>> round(float(step.delta_square), 3), round(float(step.signal), 3)
      (1.0, 0.798)
    """
    _check(gradient, rank)
    inputs, outputs = gradient.shape
    move = learning_rate * scale * std
    square = move**2 * outputs * (rank * inputs + rank * (rank - 1) * 2 / math.pi)
    columns = jnp.sum(jnp.linalg.norm(gradient, axis=0))
    return FirstStep(jnp.asarray(square), move * math.sqrt(2 / math.pi) * rank * columns)


def crossover_rank(inputs: int, optimizer: str) -> float:
    """The rank at which the two terms of E|dW|^2 are equal: random spread below, signal above.

    Args:
      inputs: the width of the layer's input.
      optimizer: ``"sgd"`` or ``"normalized"`` (r = in), ``"adam"`` (r = in pi/2).

    Returns:
      The rank, up to 1, between `theory`'s regimes ``"low"`` and ``"high"``.

    Raises:
      AdapterError: for another optimizer, or fewer than one input.

    Example:
      >>> crossover_rank(1024, "sgd"), round(crossover_rank(1024, "adam"))
      (1024.0, 1608)
    """
    factors = {"sgd": 1.0, "normalized": 1.0, "adam": math.pi / 2}
    if optimizer not in factors:
        raise AdapterError(f"optimizer must be one of {tuple(factors)}, found {optimizer!r}.")
    if inputs < 1:
        raise AdapterError(f"crossover_rank needs at least 1 input, found {inputs!r}.")
    return inputs * factors[optimizer]


def reconstruction_error(captured: float, factor: float) -> ReconstructionError:
    """The error of s W_r as an approximation of W: err^2 = (s - 1)^2 c + 1 - c.

    W_r, the best approximation of rank r, is orthogonal to W - W_r (Eckart and Young), so the
    two causes add up. A table that truncates an update and *then* multiplies it by alpha/r or
    alpha/sqrt(r) shows |s - 1|, not the rank: a trained `b` absorbs s. 1.0 is the error of no
    update at all.

    Args:
      captured: c, the share of |W|_F^2 that the first r singular values hold, in [0, 1].
      factor: s.

    Returns:
      `ReconstructionError`; the best s is 1, with the error sqrt(1 - c).

    Raises:
      AdapterError: if `captured` is no share.

    Example:
      >>> error = reconstruction_error(captured=0.75, factor=2.0)
      >>> error.error, error.scale, error.rank
      (1.0, 0.75, 0.25)
    """
    if not 0 <= captured <= 1:
        raise AdapterError(
            f"captured must be a share of the energy between 0 and 1, found {captured!r}."
        )
    scale, rank = (factor - 1) ** 2 * captured, 1 - captured
    return ReconstructionError(math.sqrt(scale + rank), scale, rank)


def _check(gradient: jax.Array, rank: int) -> None:
    if jnp.ndim(gradient) != 2:
        raise AdapterError(
            f"The closed forms need the gradient of one matrix, [in, out], found the shape "
            f"{jnp.shape(gradient)}. Reshape, or vmap over the stacked axes."
        )
    if rank < 1:
        raise AdapterError(f"rank must be at least 1, found {rank!r}.")
