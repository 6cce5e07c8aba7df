"""Curves: loss, held-out loss and gradient norm over the steps of a run, as one picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.metrics import column
from rslora_jax.files import whole_file

SMOOTH = 0.9  # weight of the past in the smoothed loss


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the metrics of a run; the file appears whole or not at all.

    Args:
      rows: as `Metrics` writes them, with loss, held_out/loss and grad_norm where there are any.
      path: where the picture goes, such as ``curves.png``.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    _losses(above, rows)
    _norms(below, rows)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean that does not start at zero; what is not finite is passed over.

    Example:
      >>> smoothed([2.0, 2.0, float("nan"), 2.0])
      [2.0, 2.0, 2.0, 2.0]
    """
    found, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = SMOOTH * total + value, SMOOTH * weight + 1.0
        found.append(total / weight if weight else math.nan)
    return found


def _losses(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = column(rows, "loss")
    axes.plot(steps, losses, color="C0", alpha=0.3, label="each step")
    axes.plot(steps, smoothed(losses), color="C0", label="smoothed")
    axes.plot(*column(rows, "held_out/loss"), color="C1", marker="o", label="held out")
    axes.set(ylabel="loss (nats per answer token)", ylim=(0, None))
    axes.legend()


def _norms(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    steps, norms = column(rows, "grad_norm")
    axes.plot(steps, norms, color="C2")
    axes.set(xlabel="step", ylabel="gradient norm")
    if any(norm > 0 for norm in norms):
        axes.set_yscale("log")
