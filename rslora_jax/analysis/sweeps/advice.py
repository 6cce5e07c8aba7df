"""Advice: what the slopes of a sweep mean for the run that it was made for, in sentences."""

import numpy as np

from rslora_jax.analysis.sweeps.slopes import slopes
from rslora_jax.analysis.sweeps.sweep import Sweep

__all__ = ["advice"]

GRADIENT = {
    "stable": "Gradient norms do not depend on the rank",
    "collapsing": "Gradient norms shrink as the rank grows, so that clipping thresholds and "
    "Adam's eps lose their meaning, and plain SGD learns ever more slowly",
    "exploding": "Gradient norms grow with the rank, so that a clip comes to rule the step",
    "unresolved": "Whether gradient norms depend on the rank is not clear from these seeds",
    "unknown": "Gradient norms were not measured at two ranks",
}
PROGRESS = {
    "stable": "the first step is predicted to lower the loss equally at every rank: one learning "
    "rate suits them all at the start",
    "collapsing": "the first step is predicted to do less at high ranks: raise their learning "
    "rate, or use a scale that falls more slowly with the rank",
    "exploding": "the first step is predicted to do more at high ranks: they diverge first, and "
    "need a lower learning rate",
    "unresolved": "whether the first step's predicted progress depends on the rank is not clear "
    "from these seeds",
    "unknown": "the first step's predicted progress could not be fitted",
}


def advice(sweep: Sweep, optimizer: str | None = None) -> dict[str, str]:
    """A recommendation for each scaling, from the verdicts at its first learning rate.

    Args:
      sweep: with `grad_b` and `predicted_change` among its quantities.
      optimizer: as in `slopes`.

    Returns:
      ``{scaling: sentences}``.

    Example:
      >>> from rslora_jax.analysis.sweeps.budget import Budget
      >>> from rslora_jax.analysis.sweeps.runs import grid
      >>> runs = grid((4, 16), ("rslora",), (0,), (0.1,))
      >>> seen = {"loss": np.ones((2, 2)), "grad_b": np.ones((2, 2))}
      >>> sweep = Sweep(runs, seen, Budget(0, 0, 2, 1, 1), {}, "sgd", "kaiming")
      >>> advice(sweep)["rslora"].split(" (")[0]
      'Gradient norms do not depend on the rank'
    """
    table = slopes(sweep, optimizer=optimizer).select(time="start")
    rate = sweep.runs[0].learning_rate
    names = dict.fromkeys(run.scaling for run in sweep.runs)
    found = {name: table.select(scaling=name, learning_rate=rate).records() for name in names}
    return {name: _sentences(sweep, name, rows) for name, rows in found.items()}


def _sentences(sweep: Sweep, scaling: str, rows: list[dict[str, object]]) -> str:
    by_name = {row["quantity"]: row for row in rows}
    gradient = _judged(GRADIENT, by_name.get("grad_b"))
    progress = _judged(PROGRESS, by_name.get("predicted_fall"))
    return f"{gradient}; {progress}. {_best(sweep, scaling)}{_failed(sweep, scaling)}"


def _judged(phrases: dict[str, str], row: dict[str, object] | None) -> str:
    if row is None or row["verdict"] == "unknown":
        return phrases["unknown"]
    slope = round(float(str(row["slope"])), 2) + 0.0  # no -0.00
    return f"{phrases[str(row['verdict'])]} (slope {slope:+.2f})"


def _best(sweep: Sweep, scaling: str) -> str:
    """The run that ended lowest, by the mean training loss of the last tenth of its steps."""
    tail = sweep.traces["loss"][:, -max(1, sweep.steps // 10) :].mean(1)
    places = [k for k in sweep.select(scaling=scaling) if np.isfinite(tail[k])]
    if not places:
        return "No run ended with a finite loss."
    best = min(places, key=lambda k: tail[k])
    run = sweep.runs[best]
    return (
        f"The lowest training loss at the end was {tail[best]:.4g}, at rank {run.rank} and "
        f"learning rate {run.learning_rate:g}."
    )


def _failed(sweep: Sweep, scaling: str) -> str:
    rows = [row for row in sweep.failures.records() if row["scaling"] == scaling]
    if not rows:
        return ""
    ranks = sorted({row["rank"] for row in rows})
    return f" {len(rows)} runs met values that are not finite, at the ranks {ranks}."
