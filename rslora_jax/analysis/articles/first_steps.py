"""First steps: how much an adapter on one linear layer learns in a step, rank by rank, measured.

The measured side of `theory`, small enough to run while one reads: NumPy, a fraction of a second.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rslora_jax.analysis.laws.theory import theory, verdict
from rslora_jax.config import scale
from rslora_jax.paths import AdapterError
from rslora_jax.tables import Table

__all__ = ["first_steps"]

RANKS = (4, 16, 64, 256)
INPUTS, OUTPUTS, SAMPLES = 1024, 16, 64
SCALINGS = ("lora", "rslora")


def first_steps(
    ranks: Sequence[int] = RANKS, alpha: float = 16.0, draws: int = 8, seed: int = 42
) -> Table:
    """One step of SGD and of Adam on y = x (W + s a b), with `b` = 0, at several ranks.

    The layer is 1024 x 16, its loss the mean squared error on 64 random samples, and `a` is
    normal with standard deviation 1/sqrt(1024). The learning rate is the same at every rank, and
    Adam has eps = 0: every entry of `b` moves by the learning rate. Numbers are means over
    draws of `a`; rank r has the first r columns of the largest rank's.

    Args:
      ranks: rising, at least two.
      alpha: the numerator of the scale.
      draws: of `a`.
      seed: of the samples and of `a`.

    Returns:
      One row a quantity and scaling. ``quantity`` is ``grad_b`` (the norm of `b`'s gradient, at
      the start and so the same for both optimizers), ``signal`` (<dW, -G>, the predicted fall of
      the loss) or ``delta`` (|dW|_F, everything that moved); ``r4``, ``r16``, ... its size over
      that at the first rank; ``slope`` that of log(size) against log(rank); ``law`` the exponent
      of `theory` (ranks below the width of the input); ``verdict`` what the slope means.

    Raises:
      AdapterError: for ranks that do not rise, or no draws.

    Example:
      >>> table = first_steps()
      >>> [round(slope, 1) for slope in table.select(quantity="grad_b").column("slope")]
      [-0.5, 0.0]
    """
    _check(ranks, draws)
    gradient, a = _layer(max(ranks), draws, seed)
    projected = a.swapaxes(1, 2) @ gradient
    found = {
        scaling: [_sizes(a[..., :r], projected[:, :r], scale(alpha, r, scaling)) for r in ranks]
        for scaling in SCALINGS
    }
    return Table.of(
        _row(ranks, scaling, *name, [sizes[name] for sizes in found[scaling]])
        for name in found["lora"][0]
        for scaling in SCALINGS
    )


def _check(ranks: Sequence[int], draws: int) -> None:
    rising = all(low < high for low, high in itertools.pairwise(ranks))
    if len(ranks) < 2 or not rising or draws < 1:
        raise AdapterError(
            f"first_steps needs at least two rising ranks and one draw, found ranks {tuple(ranks)} "
            f"and {draws} draws. Pass ranks such as {RANKS}."
        )


def _layer(rank: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of the mean squared error in W, [in, out], and draws of `a`, [draws, in, r]."""
    rng = np.random.default_rng(seed)
    x, missing = rng.standard_normal((SAMPLES, INPUTS)), rng.standard_normal((SAMPLES, OUTPUTS))
    return -x.T @ missing / SAMPLES, rng.standard_normal((draws, INPUTS, rank)) / INPUTS**0.5


def _sizes(a: np.ndarray, projected: np.ndarray, factor: float) -> dict[tuple[str, str], float]:
    """By quantity and optimizer, at a learning rate of 1: means over the draws."""
    grad_b = factor * projected
    found = {("grad_b", "both"): _norm(grad_b)}
    for optimizer, step in (("sgd", grad_b), ("adam", np.sign(grad_b))):
        # <dW, -G> = <s a step, G> = <step, s a^T G>
        found["signal", optimizer] = (step * grad_b).sum((1, 2))
        found["delta", optimizer] = _norm(factor * a @ step)
    return {name: float(values.mean()) for name, values in found.items()}


def _norm(matrices: np.ndarray) -> np.ndarray:
    return np.sqrt((matrices**2).sum((1, 2)))


def _row(
    ranks: Sequence[int], scaling: str, quantity: str, optimizer: str, sizes: Sequence[float]
) -> dict[str, Any]:
    slope = float(np.polyfit(np.log(ranks), np.log(sizes), 1)[0])
    law = theory(scaling, "sgd" if optimizer == "both" else optimizer)[quantity]
    return {
        "quantity": quantity,
        "optimizer": optimizer,
        "scaling": scaling,
        **{f"r{rank}": size / sizes[0] for rank, size in zip(ranks, sizes, strict=True)},
        "slope": slope,
        "law": law.low,
        "verdict": verdict(slope),
    }
