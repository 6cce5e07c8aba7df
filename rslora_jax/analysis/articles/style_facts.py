"""Style and facts: two made-up updates, and what truncating and scaling them shows.

Two random 64 x 64 matrices stand for what fine-tuning adds: "style" with four large singular
values, "facts" with 64 that fall slowly. The articles truncate them to rank r, multiply by alpha/r
or alpha/sqrt(r) and call the result's error the effect of the rank. The functions here give their
numbers to the last digit printed, with those that say what they mean; `walkthrough` shows them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rslora_jax.analysis.laws.closed_forms import reconstruction_error
from rslora_jax.analysis.spectra.effective_rank import effective_ranks, energy_by_rank
from rslora_jax.config import scale
from rslora_jax.tables import Table

__all__ = [
    "Updates",
    "energy_table",
    "error_table",
    "errors",
    "rank_table",
    "scale_table",
    "singular_values",
    "updates",
    "value_table",
    "wide_style_energy",
    "width_table",
]

SEED, WIDTH, ALPHA = 42, 64, 16.0
SCALINGS = ("lora", "rslora")
ERROR_RANKS = (2, 4, 8, 16, 32, 48)
SCALE_RANKS = (1, 4, 8, 16, 32, 64)
ENERGY_RANKS = (2, 4, 8, 16, 32)
WIDTHS = (64, 128, 256)
STYLE_VALUES, NOISE = np.linspace(5, 0.5, 4), 0.01
SIGNAL = float((STYLE_VALUES**2).sum())


class Updates(NamedTuple):
    """One array for each of the two updates: the matrices [d, d], or their singular values [d]."""

    style: np.ndarray
    facts: np.ndarray


def updates(width: int = WIDTH, seed: int = SEED) -> Updates:
    """Draws the two matrices in the articles' order, from NumPy's legacy generator.

    Args:
      width: d, the articles' is 64.
      seed: the articles' is 42.

    Returns:
      The matrices, float64 [d, d]: Q_u diag(values) Q_v^T plus noise of 0.01 an entry.

    Example:
      >>> updates().style.shape
      (64, 64)
    """
    # The legacy generator is what makes the articles' numbers; a local one leaves the global
    # state alone.
    rng = np.random.RandomState(seed)
    style = _update(rng, width, STYLE_VALUES)
    return Updates(style, _update(rng, width, np.linspace(3, 0.5, width)))


def _update(rng: np.random.RandomState, width: int, values: np.ndarray) -> np.ndarray:
    u, v = rng.randn(width, len(values)), rng.randn(width, len(values))
    low_rank = np.linalg.qr(u)[0] @ np.diag(values) @ np.linalg.qr(v)[0].T
    return low_rank + NOISE * rng.randn(width, width)


def singular_values(found: Updates | None = None) -> Updates:
    """The singular values [d] of both updates, falling; of `updates()` by default.

    Example:
      >>> singular_values().style[:3].round(2).tolist()
      [4.99, 3.5, 2.01]
    """
    return Updates(*(np.linalg.svd(matrix, compute_uv=False) for matrix in found or updates()))


def value_table(count: int = 10) -> Table:
    """The first `count` singular values of each update, rounded as the articles print them.

    Example:
      >>> value_table(4).column("singular values")
      ['[4.99 3.5  2.01 0.52]', '[3.   2.96 2.91 2.87]']
    """
    found = singular_values()._asdict().items()
    return Table.of({"update": n, "singular values": str(s[:count].round(2))} for n, s in found)


def errors(ranks: Sequence[int] = ERROR_RANKS, alpha: float = ALPHA) -> Table:
    """The error of s W_r as an approximation of W, measured and taken apart.

    Args:
      ranks: how many singular values W_r keeps.
      alpha: the numerator of s.

    Returns:
      One row an update, rank and scaling: ``s``; ``captured``, the share c of |W|_F^2 that W_r
      holds; ``error``, |W - s W_r|_F / |W|_F, measured on the matrices; ``identity``, the same
      from err^2 = (s - 1)^2 c + 1 - c; ``scale`` and ``rank_part``, the two terms.

    Example:
      >>> row = errors([4]).records()[0]
      >>> row["update"], row["s"], round(row["error"], 3), round(row["identity"], 3)
      ('style', 4.0, 2.989, 2.989)
    """
    return Table.of(
        {"update": name, "rank": rank, "scaling": scaling, **_error(matrix, svd, rank, s)}
        for name, matrix in updates()._asdict().items()
        for svd in [np.linalg.svd(matrix)]
        for rank in ranks
        for scaling in SCALINGS
        for s in [scale(alpha, rank, scaling)]
    )


def _error(matrix: np.ndarray, svd: Any, rank: int, s: float) -> dict[str, float]:
    captured = float(energy_by_rank(svd.S)[rank - 1])
    identity, scale_part, rank_part = reconstruction_error(captured, s)
    kept = (svd.U[:, :rank] * svd.S[:rank]) @ svd.Vh[:rank]
    missing = np.linalg.norm(matrix - s * kept) / np.linalg.norm(matrix)
    parts = {"identity": identity, "scale_part": scale_part, "rank_part": rank_part}
    return {"s": s, "captured": captured, "error": float(missing), **parts}


def error_table(ranks: Sequence[int] = ERROR_RANKS) -> Table:
    """The articles' table of errors, completed: one row a rank.

    Columns: the four errors (``style_rslora`` was computed by the articles and not printed);
    ``s_lora`` and ``s_rslora``, the factors that make them; ``style_best`` and ``facts_best``, the
    errors at s = 1, which either rule reaches once `b` is trained. No update at all has 1.0.

    Example:
      >>> [round(value, 3) for value in error_table([8]).rows[0]]
      [8, 1.0, 1.0, 2.62, 4.642, 2.0, 5.657, 0.081, 0.847]
    """
    found = {(r["update"], r["scaling"], r["rank"]): r for r in errors(ranks).records()}
    order = (("style", "lora"), ("facts", "lora"), ("facts", "rslora"), ("style", "rslora"))
    return Table.of(
        {
            "rank": rank,
            **{f"{update}_{rule}": found[update, rule, rank]["error"] for update, rule in order},
            **{f"s_{rule}": found["style", rule, rank]["s"] for rule in SCALINGS},
            **{f"{n}_best": found[n, "lora", rank]["rank_part"] ** 0.5 for n in Updates._fields},
        }
        for rank in ranks
    )


def scale_table(ranks: Sequence[int] = SCALE_RANKS, alpha: float = ALPHA) -> Table:
    """The scale by rank: ``lora`` is alpha/r, ``rslora`` is alpha/sqrt(r).

    Example:
      >>> scale_table([64]).rows
      ((64, 0.25, 2.0),)
    """
    return Table.of(
        {"rank": rank, **{rule: scale(alpha, rank, rule) for rule in SCALINGS}} for rank in ranks
    )


def energy_table(ranks: Sequence[int] = ENERGY_RANKS) -> Table:
    """The share of |W|_F^2 that rank r can hold, in percent.

    Example:
      >>> [round(value, 1) for value in energy_table([4]).rows[0]]
      [4, 99.2, 14.9]
    """
    held = {n: 100 * energy_by_rank(s) for n, s in singular_values()._asdict().items()}
    return Table.of({"rank": r, **{n: float(held[n][r - 1]) for n in held}} for r in ranks)


def width_table(widths: Sequence[int] = WIDTHS, rank: int = 4) -> Table:
    """What rank 4 holds of the style update when the same recipe is drawn wider, in percent.

    ``measured`` is one draw; ``law`` is 41.5 / (41.5 + d^2 / 10^4): the energy of the four
    singular values stays, that of the noise grows with the number of entries.

    Example:
      >>> [round(value, 1) for value in width_table([128]).rows[0]]
      [128, 96.4, 96.2]
    """
    rows = []
    for width in widths:
        law = SIGNAL / (SIGNAL + (NOISE * width) ** 2)
        rows.append((width, 100 * float(wide_style_energy(width)[rank - 1]), 100 * law))
    return Table(("width", "measured", "law"), tuple(rows))


def wide_style_energy(width: int) -> np.ndarray:
    """The share of |W|_F^2 that rank 1, 2, ... can hold of a style update `width` wide.

    Example:
      >>> round(float(wide_style_energy(64)[3]), 4)
      0.9915
    """
    matrix = _update(np.random.RandomState(SEED), width, STYLE_VALUES)
    squares = np.linalg.eigvalsh(matrix @ matrix.T)[::-1]  # several times faster than an SVD
    return energy_by_rank(np.sqrt(np.maximum(squares, 0)))


def rank_table() -> Table:
    """The effective ranks of both updates, by every definition of `effective_ranks`.

    Example:
      >>> rank_table().column("energy_90")
      [3, 41]
    """
    return Table.of(
        {"update": name, "norm": float(np.linalg.norm(s)), **_ranks(s)}
        for name, s in singular_values()._asdict().items()
    )


def _ranks(s: np.ndarray) -> dict[str, Any]:
    return {n: v for n, v in effective_ranks(s)._asdict().items() if n != "truncated"}
