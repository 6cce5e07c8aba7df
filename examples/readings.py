"""What the numbers of a sweep over ranks say: curves, and the one sentence that each supports.

No sentence is written beforehand: its words follow from the numbers, for and against. All ranks
and scalings share their seeds, so differences are taken seed by seed; one counts if its mean is
above twice its standard deviation, and above `LEAST`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rslora_jax.analysis.laws.theory import theory, verdict
from rslora_jax.tables import Table

NAMES = {"lora": "LoRA", "rslora": "rsLoRA"}
LEAST = 0.02  # differences of accuracy below two points are not spoken of
TOLERANCE = 0.1  # slopes that differ by less are the same
ALIKE = 1.5  # ratios that differ by a smaller factor are the same
APART = 4  # ranks that differ by this factor are not the same


class Curve(NamedTuple):
    """A quantity by rank, for one scaling.

    Attributes:
      ranks: rising.
      values: [ranks, seeds].
    """

    ranks: tuple[int, ...]
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over the seeds: [ranks]."""
        return self.values.mean(1)

    @property
    def spread(self) -> np.ndarray:
        """The standard deviation over the seeds, [ranks]; 0 if there is but one."""
        many = self.values.shape[1] > 1
        return self.values.std(1, ddof=1) if many else np.zeros(len(self.ranks))

    @property
    def slope(self) -> tuple[float, float]:
        """The slope of log(value) against log(rank): the mean over the seeds, its standard error.

        NaN if a value is not above 0; the error is NaN for a single seed.
        """
        if not (self.values > 0).all():
            return math.nan, math.nan
        slopes = np.polyfit(np.log(self.ranks), np.log(self.values), 1)[0]
        error = slopes.std(ddof=1) / math.sqrt(len(slopes)) if len(slopes) > 1 else math.nan
        return float(slopes.mean()), float(error)


Curves = dict[str, Curve]
"""One curve for each scaling."""


def curves(runs: Table, lesson: str, optimizer: str, quantity: str) -> Curves:
    """Reads the curves of both scalings from the rows of all runs."""
    picked = runs.select(lesson=lesson, optimizer=optimizer)
    ranks = tuple(sorted(set(picked.column("rank"))))

    def values(scaling: str) -> np.ndarray:
        return np.array(
            [picked.select(scaling=scaling, rank=rank).column(quantity) for rank in ranks]
        )

    return {scaling: Curve(ranks, values(scaling)) for scaling in NAMES}


def accuracy_sentence(what: str, found: Curves) -> str:
    """Does more rank help, and under which scaling more?"""
    ranks = found["lora"].ranks
    changes = {scaling: _change(curve) for scaling, curve in found.items()}
    moves = " and ".join(f"{NAMES[s]} {_move(found[s], change)}" for s, change in changes.items())
    return (
        f"{what}: from rank {ranks[0]} to {ranks[-1]} {moves}: more rank {_effect(changes)}; "
        f"at rank {ranks[-1]} {_lead(found)}."
    )


def onset_sentence(what: str, found: Curves, optimizer: str = "sgd") -> str:
    """Does the gradient keep its size as the rank grows? `b` is 0, so it is all of `b`."""
    parts = []
    for scaling, curve in found.items():
        slope, error = curve.slope
        law = theory(scaling, optimizer)["grad_b"]
        allowed = TOLERANCE + (0 if math.isnan(error) else 2 * error)
        met = "as in theory" if law.distance(slope) <= allowed else f"against {law} in theory"
        parts.append(f"rank^{_signed(slope, error)} under {NAMES[scaling]} ({met})")
    verdicts = {scaling: verdict(curve.slope[0], TOLERANCE) for scaling, curve in found.items()}
    return f"{what}: |grad| goes as {' and '.join(parts)}: {_agreement(verdicts)}."


def late_sentence(what: str, found: Curves) -> str:
    """How far apart are the ranks once they have trained?"""
    ratios = {s: float(c.mean.max() / c.mean.min()) for s, c in found.items()}
    listed = " and ".join(f"{ratio:.1f} under {NAMES[s]}" for s, ratio in ratios.items())
    text = f"{what}: |grad| differs between the ranks by a factor of {listed}"
    if not all(map(math.isfinite, ratios.values())):
        return f"{text}: no comparison, for a run was lost."
    flat, steep = sorted(ratios, key=lambda s: ratios[s])
    if ratios[steep] < ALIKE * ratios[flat]:
        return f"{text}: neither keeps it steadier than the other."
    return f"{text}: {NAMES[flat]} keeps it steadier."


def truncation_sentence(found: dict[str, Table], share: float = 0.9) -> str:
    """Does the energy of the change tell the lessons apart, as the function does?"""
    needs = {}
    for quantity in ("accuracy", "energy"):
        needs[quantity] = {n: _needed(table, quantity, share) for n, table in found.items()}
    apart = {q: max(n.values()) >= APART * min(n.values()) for q, n in needs.items()}
    listed = {q: ", ".join(f"{n} {r}" for n, r in need.items()) for q, need in needs.items()}
    reading = {
        (True, True): "the lessons differ in function, and in the spectrum too",
        (True, False): "the lessons differ in function, and hardly in the spectrum",
        (False, True): "the lessons differ in the spectrum, and hardly in function",
        (False, False): "the lessons differ neither in function nor in the spectrum",
    }[apart["accuracy"], apart["energy"]]
    return (
        f"Full tuning, truncated: the rank for {share:.0%} of the full accuracy is "
        f"{listed['accuracy']}; for {share:.0%} of the energy {listed['energy']}: {reading}."
    )


def _effect(changes: dict[str, float]) -> str:
    """What more rank does to each scaling, in words."""
    words = {0.0: "has no sure effect on", 1.0: "helps", -1.0: "hurts"}
    effects = {NAMES[s]: words[float(np.sign(change))] for s, change in changes.items()}
    if len(set(effects.values())) == 1:
        return f"{effects['LoRA']} both"
    return " and ".join(f"{effect} {name}" for name, effect in effects.items())


def _change(curve: Curve) -> float:
    """From the lowest to the highest rank; 0 if it does not stand out."""
    return _standing_out(curve.values[-1] - curve.values[0])


def _standing_out(differences: np.ndarray) -> float:
    """The mean of the differences [seeds]; 0 if it does not stand out."""
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return mean if abs(mean) > max(LEAST, 2 * spread) else 0.0


def _move(curve: Curve, change: float) -> str:
    verb = "rises" if change > 0 else "falls" if change < 0 else "stays within its spread,"
    return f"{verb} from {curve.mean[0]:.0%} to {curve.mean[-1]:.0%}"


def _lead(found: Curves) -> str:
    gap = _standing_out(found["rslora"].values[-1] - found["lora"].values[-1])
    if not gap:
        return "they do not differ beyond the spread"
    return f"{NAMES['rslora' if gap > 0 else 'lora']} is {abs(100 * gap):.0f} points ahead"


def _signed(slope: float, error: float) -> str:
    if math.isnan(slope):
        return "nan"
    shown = "0.00" if abs(slope) < 0.005 else f"{slope:+.2f}"
    return shown if math.isnan(error) else f"{shown}±{error:.2f}"


def _agreement(verdicts: dict[str, str]) -> str:
    stable = [NAMES[scaling] for scaling, found in verdicts.items() if found == "stable"]
    if len(stable) == 1:
        return f"rank-stable under {stable[0]} alone"
    return f"rank-stable under {'both' if stable else 'neither'}"


def _needed(table: Table, quantity: str, share: float) -> int:
    """The lowest rank that reaches `share` of what the highest rank has."""
    values: Sequence[float] = table.column(quantity)
    ranks = table.column("rank")
    return next(r for r, value in zip(ranks, values, strict=True) if value >= share * values[-1])
