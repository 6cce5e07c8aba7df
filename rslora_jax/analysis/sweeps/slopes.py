"""Slopes: the exponent of the rank in each quantity of a sweep, beside the theory's."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from rslora_jax.analysis.laws.exponents import SCALINGS, Exponent, verdict
from rslora_jax.analysis.laws.theory import theory
from rslora_jax.analysis.sweeps.sweep import Sweep
from rslora_jax.paths import AdapterError
from rslora_jax.tables import Table

__all__ = ["FAMILIES", "Slope", "fit", "judged", "series", "slopes"]

STARTS = {"grad_b": 0, "grad_b_rms": 0, "grad_a": 1, "grad": 1, "predicted_fall": 0, "delta": 1,
          "output_trained": 1, "input_grad": 1}  # fmt: skip
"""The step at which the theory speaks of a quantity. `predicted_fall` is -<g, u>, the fall of
the loss that the optimizer's own update predicts on its batch: for the first step, the signal
of the theory."""

THEORY = {"predicted_fall": "signal"}
"""The theory's name of a quantity, where it is another."""

COLUMNS = ("scaling", "learning_rate", "quantity", "time", "slope", "error", "ranks", "verdict",
           "low", "high")  # fmt: skip

FAMILIES = {
    **dict.fromkeys(("sgd", "noisy_sgd"), "sgd"),
    **dict.fromkeys(("adam", "adamw", "adamax", "nadam", "nadamw", "lion", "sign_sgd"), "adam"),
    **dict.fromkeys(("amsgrad", "adabelief", "radam", "rmsprop", "adagrad"), "adam"),
}
"""What the theory calls an optimizer, by the name of the function that makes it."""


class Slope(NamedTuple):
    """A fitted exponent of the rank.

    Attributes:
      mean: the mean over seeds; NaN where fewer than two ranks have a positive value.
      error: its standard error over seeds; None for a single seed.
      ranks: the fewest ranks that a fit used.
    """

    mean: float
    error: float | None
    ranks: int


def slopes(
    sweep: Sweep,
    *,
    optimizer: str | None = None,
    regime: str | None = None,
    tolerance: float = 0.1,
) -> Table:
    """Fits log(quantity) = slope log(rank) + constant for each scaling and learning rate.

    Args:
      sweep: with at least two ranks, and two steps for `grad_a`, `grad` and `delta`.
      optimizer: the theory's name of the optimizer (``"sgd"``, ``"adam"``, ``"normalized"``);
        None looks the sweep's optimizer up in `FAMILIES`, and leaves the theory out where it
        is not there.
      regime: as in `theory.theory`; None is the range from low ranks to high ones.
      tolerance: slopes up to this size count as stable.

    Returns:
      One row for each scaling, learning rate, quantity and time: ``"start"``, the step around
      which the theory speaks, and ``"run"``, the geometric mean over all later steps. A row
      holds the slope, its standard error over seeds, the verdict, and the theory's `low` and
      `high`, which are None where it says nothing.

    Raises:
      AdapterError: for a sweep of a single rank, or an optimizer the theory does not know.

    Example:
      >>> from rslora_jax.analysis.sweeps.budget import Budget
      >>> from rslora_jax.analysis.sweeps.runs import grid
      >>> runs = grid((4, 16), ("lora",), (0,), (0.1,))
      >>> seen = {"loss": np.ones((2, 1)), "grad_b": np.array([[1.0], [0.5]])}
      >>> sweep = Sweep(runs, seen, Budget(0, 0, 2, 1, 1), {}, "sgd", "kaiming")
      >>> slopes(sweep).select(time="start").records()[0]["slope"]
      -0.5
    """
    if len({run.rank for run in sweep.runs}) < 2:
        raise AdapterError("A slope needs at least two ranks. Sweep over more of them.")
    family = optimizer or FAMILIES.get(sweep.optimizer)
    table = Table.of(
        {
            "scaling": scaling,
            "learning_rate": rate,
            "quantity": quantity,
            "time": time,
            **_row(fit(sweep, logs, scaling, rate), tolerance),
            **_theory(scaling, family, (sweep.init, regime), quantity if time == "start" else ""),
        }
        for scaling, rate in dict.fromkeys((r.scaling, r.learning_rate) for r in sweep.runs)
        for quantity, time, logs in _series(sweep)
    )
    return table if table.rows else Table(COLUMNS)


def series(sweep: Sweep, quantity: str) -> np.ndarray:
    """A quantity as [runs, steps]; `predicted_fall` is minus `predicted_change`.

    Raises:
      AdapterError: if the sweep did not record it.
    """
    source = "predicted_change" if quantity == "predicted_fall" else quantity
    if source not in sweep.traces:
        raise AdapterError(
            f"The sweep did not record {source!r}, only {tuple(sweep.traces)}. Add it to "
            "rank_sweep's `quantities`."
        )
    values = np.asarray(sweep.traces[source], float)
    return -values if quantity == "predicted_fall" else values


def fit(sweep: Sweep, logs: np.ndarray, scaling: str, learning_rate: float) -> Slope:
    """Least squares of logarithms [runs] on log(rank), seed by seed.

    Values that are not finite are left out.
    """
    chosen = sweep.select(scaling=scaling, learning_rate=learning_rate)
    found = []
    used = []
    for seed in dict.fromkeys(sweep.runs[k].seed for k in chosen):
        places = [k for k in chosen if sweep.runs[k].seed == seed and np.isfinite(logs[k])]
        used.append(len(places))
        ranks = np.log([sweep.runs[k].rank for k in places])
        found.append(np.polyfit(ranks, logs[places], 1)[0] if len(places) > 1 else np.nan)
    error = np.std(found, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else None
    return Slope(float(np.mean(found)), error if error is None else float(error), min(used))


def _series(sweep: Sweep) -> Iterator[tuple[str, str, np.ndarray]]:
    """The logarithms [runs] of each quantity, at the start and over the run."""
    for quantity, start in STARTS.items():
        source = "predicted_change" if quantity == "predicted_fall" else quantity
        if source not in sweep.traces:
            continue
        logs = _logs(series(sweep, quantity))
        if sweep.steps > start:
            yield quantity, "start", logs[:, start]
        if sweep.steps > 2:
            yield quantity, "run", _mean(logs[:, 1:])


def _logs(values: np.ndarray) -> np.ndarray:
    """NaN where there is no logarithm."""
    positive = np.isfinite(values) & (values > 0)
    return np.where(positive, np.log(np.where(positive, values, 1)), np.nan)


def _mean(logs: np.ndarray) -> np.ndarray:
    """The mean over the steps that have one; NaN for a run without any."""
    known = np.isfinite(logs)
    count = known.sum(1)
    total = np.where(known, logs, 0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _row(slope: Slope, tolerance: float) -> Mapping[str, Any]:
    return {
        "slope": round(slope.mean, 12),
        "error": slope.error,
        "ranks": slope.ranks,
        "verdict": judged(slope, tolerance),
    }


def judged(slope: Slope, tolerance: float) -> str:
    """The verdict, or ``"unresolved"`` where two standard errors lead to another one."""
    spread = 2 * (slope.error or 0.0)
    found = {verdict(slope.mean + shift, tolerance) for shift in (-spread, 0.0, spread)}
    return found.pop() if len(found) == 1 else "unresolved"


def _theory(
    scaling: str, family: str | None, setting: tuple[str, str | None], quantity: str
) -> Mapping[str, Any]:
    init, regime = setting
    found: Exponent | None = None
    if family is not None and quantity and scaling in SCALINGS:
        found = theory(scaling, family, init, regime)[THEORY.get(quantity, quantity)]
    return {"low": found and found.low, "high": found and found.high}
