"""Definition: rank stability as the paper defines it, checked over many draws of `a`.

Definition 3.1 of Kalajdzievski 2023 (arXiv 2312.03732) calls an adapter rank-stabilized if (1) for
inputs whose entries have moments of order 1, its outputs have moments of order 1, and (2) for a
gradient into its outputs of order 1, the gradient into its input is of order 1, as r grows.
Theorem 3.2 proves it for 1/sqrt(r) *in expectation over `a`*. That leaves two ways to measure:

* the norm of the mean over draws, which the theorem is about, and
* the mean over draws of the norm, which is what one training run sees.

They differ by what the draws do not share: rsLoRA keeps the first, while the second falls as
1/sqrt(r) for the gradient into the input until r is above the input's width.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.analysis.laws.exponents import INITS, SCALINGS, Exponent, named_exponent, verdict
from rslora_jax.analysis.laws.random_adapters import (
    OPTIMIZERS,
    Cases,
    Data,
    Setting,
    outputs_and_gradients,
)
from rslora_jax.analysis.laws.theory import theory
from rslora_jax.config import scale
from rslora_jax.paths import AdapterError
from rslora_jax.tables import Table

__all__ = ["definition_check", "definition_slopes"]

ALPHA, OUTPUTS = 16.0, 32
MOMENTS = {"output_trained": (1, 2, 4), "output": (1, 2, 4), "input_grad": (2,)}


def definition_check(  # noqa: PLR0913 - every argument is a choice of the experiment
    ranks: Sequence[int],
    scaling: str | float = "rslora",
    optimizer: str = "sgd",
    init: str | float = "kaiming",
    *,
    draws: int = 256,
    steps: int = 1,
    n: int = 512,
    key: jax.Array | None = None,
) -> Table:
    """Trains y = scale x a b from many draws of `a`, and measures outputs and gradients.

    The gradient into the outputs is held fixed, with entries of order 1, as the definition
    assumes; so is the input x, with entries from N(0, 1). All ranks share one compiled program
    (factors padded to the largest rank, rank r's `a` being its first r columns), which is
    vmapped over the draws.

    Args:
      ranks: increasing ranks, each at least 1.
      scaling: ``"lora"``, ``"rslora"``, ``"constant"``, or the exponent of the scale; alpha is 16.
      optimizer: ``"sgd"``, ``"adam"`` or ``"normalized"``, with a learning rate of 1e-4 for both
        factors.
      init: as in `theory`: ``"kaiming"`` is uniform, all others are normal.
      draws: how many `a` are drawn. The mean of the gradient into the input stands out of the
        noise once draws * rank is above n.
      steps: steps of the optimizer, at least 1: at the start b = 0 and so is everything. The
        theory is for steps so few that `a` hardly moves.
      n: the width of the input. The output has 32 entries.
      key: a typed PRNG key; None is ``jax.random.key(0)``.

    Returns:
      One row for each quantity, moment and rank. ``output_trained`` and ``output`` are the
      adapter's outputs on x and on an input orthogonal to it, ``input_grad`` is the gradient into
      x. ``mean_of_norm`` and ``norm_of_mean`` are in terms of the m-th absolute moment of the
      entries to the power 1/m, so that exponents can be compared. ``noise`` is what a finite number
      of draws adds to the norm of the mean; it has been taken out (exactly so, on average, for
      m = 2). ``finite`` is the share of draws without a NaN or infinity; where it is below 1 the
      numbers are NaN.

    Raises:
      AdapterError: for an unknown name, ranks that do not increase, or a number below 1.

    Example:
      >>> table = definition_check((4, 16, 64), draws=64, n=64)
      >>> norms = table.select(quantity="input_grad").column("mean_of_norm")
      >>> [round(norm / norms[0], 1) for norm in norms]
      [1.0, 0.6, 0.4]
    """
    ranks = _check(ranks, optimizer, draws=draws, steps=steps, n=n)
    cases = _cases(ranks, scaling, init, n)
    keys = jax.random.split(jax.random.key(0) if key is None else key)
    found = outputs_and_gradients(
        jax.random.split(keys[0], draws),
        _data(keys[1], n),
        cases,
        Setting(init == "kaiming", steps),
        optimizer=optimizer,
        largest=ranks[-1],
    )
    found = {name: np.asarray(vectors, np.float64) for name, vectors in found.items()}
    named = {"scaling": scaling, "optimizer": optimizer, "init": init, "steps": steps}
    return Table.of(
        {**named, "quantity": name, "moment": m, "rank": r, **_summary(found[name][:, k], m)}
        for name, moments in MOMENTS.items()
        for m in moments
        for k, r in enumerate(ranks)
    )


def definition_slopes(table: Table) -> Table:
    """The exponents of the rank in what `definition_check` found, beside the theory's.

    Args:
      table: from `definition_check`, or rows of several such tables with the same columns.

    Returns:
      One row for each setting, quantity and moment: the slopes of log(norm of the mean) and
      log(mean of the norm) against log(rank) over the ranks where both are finite (``ranks``
      counts them), the theory's exponents and the verdicts. The mean of the output on an
      orthogonal input is 0 by symmetry and has no slope; nor has a single rank.

    Raises:
      AdapterError: if the table lacks a column.

    Example:
      >>> slopes = definition_slopes(definition_check((4, 16, 64), "lora", draws=64, n=64))
      >>> slopes.select(quantity="output_trained", moment=2).column("verdict_of_mean")
      ['collapsing']
    """
    names = ("scaling", "optimizer", "init", "steps", "quantity", "moment")
    settings = dict.fromkeys(zip(*(table.column(name) for name in names), strict=True))
    return Table.of(_slopes(table, dict(zip(names, s, strict=True))) for s in settings)


def _slopes(table: Table, setting: dict[str, Any]) -> dict[str, Any]:
    rows = table.select(**setting)
    numbers = [rows.column(name) for name in ("rank", "norm_of_mean", "mean_of_norm")]
    used = [row for row in zip(*numbers, strict=True) if all(0 < v < np.inf for v in row)]
    name = setting["quantity"]
    if name == "output":  # its mean is 0
        used = [(r, 1.0, norm) for r, _, norm in zip(*numbers, strict=True) if 0 < norm < np.inf]
    mean, norm = (_fit(used, k) for k in (1, 2))
    laws = [
        theory(setting["scaling"], setting["optimizer"], setting["init"], regime)
        for regime in ("low", None)
    ]
    of_mean = None if name == "output" else laws[0]["signal"]
    of_norm = laws[1][name] if name == "input_grad" else laws[0][name]
    return {
        **setting,
        "ranks": len(used),
        **_row("mean", None if of_mean is None else mean, of_mean),
        **_row("norm", norm, of_norm),
    }


def _row(what: str, slope: float | None, law: Exponent | None) -> dict[str, Any]:
    return {
        f"slope_of_{what}": slope,
        f"theory_of_{what}": None if law is None else str(law),
        f"verdict_of_{what}": None if slope is None else verdict(slope),
    }


def _fit(rows: list[tuple[float, ...]], column: int) -> float | None:
    if len(rows) < 2:
        return None
    logs = np.log(np.array(rows, np.float64))
    return float(np.polyfit(logs[:, 0], logs[:, column], 1)[0])


def _summary(vectors: np.ndarray, moment: int) -> dict[str, float]:
    """Both norms of vectors [draws, size], and the noise in the first."""
    finite = float(np.isfinite(vectors).all(1).mean())
    if finite < 1:
        return {
            **dict.fromkeys(("norm_of_mean", "mean_of_norm", "noise"), np.nan),
            "finite": finite,
        }
    error = vectors.std(0, ddof=1) / np.sqrt(len(vectors)) if len(vectors) > 1 else vectors[0] * 0
    mean, noise = _norm(vectors.mean(0), moment), _norm(error, moment)
    return {
        "norm_of_mean": float(np.sqrt(max(mean**2 - noise**2, 0.0))),
        "mean_of_norm": float(_norm(vectors, moment).mean()),
        "noise": float(noise),
        "finite": finite,
    }


def _norm(vectors: np.ndarray, moment: int) -> Any:
    return (np.abs(vectors) ** moment).mean(-1) ** (1 / moment)


def _cases(ranks: Sequence[int], scaling: str | float, init: str | float, n: int) -> Cases:
    gamma = named_exponent(scaling, SCALINGS, "scaling")
    is_known = scaling in ("lora", "rslora")
    scales = [scale(ALPHA, r, str(scaling)) if is_known else ALPHA * r**gamma for r in ranks]
    stds = [_std(init, n, r) for r in ranks]
    return Cases(*(jnp.array(column) for column in (ranks, scales, stds)))


def _std(init: str | float, n: int, rank: int) -> float:
    if init in ("kaiming", "normal"):
        return (3 * n if init == "kaiming" else n) ** -0.5
    return rank ** named_exponent(init, INITS, "init")


def _data(key: jax.Array, n: int) -> Data:
    x, other, gradient = (
        jax.random.normal(k, (size,))
        for k, size in zip(jax.random.split(key, 3), (n, n, OUTPUTS), strict=True)
    )
    return Data(x, other - x * (x @ other) / (x @ x), gradient)


def _check(ranks: Sequence[int], optimizer: str, **numbers: int) -> tuple[int, ...]:
    found = tuple(ranks)
    if not found or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in found):
        raise AdapterError(f"ranks must be ints of at least 1, found {found!r}.")
    if any(low >= high for low, high in itertools.pairwise(found)):
        raise AdapterError(f"ranks must increase, found {found!r}. Sort them.")
    if optimizer not in OPTIMIZERS:
        raise AdapterError(f"optimizer must be one of {tuple(OPTIMIZERS)}, found {optimizer!r}.")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AdapterError(f"{name} must be an int of at least 1, found {value!r}.")
    return found
