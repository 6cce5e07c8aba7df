"""Plots: the figures of a sweep, both scalings side by side."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rslora_jax.analysis.sweeps.slopes import STARTS, series, slopes
from rslora_jax.analysis.sweeps.sweep import Sweep
from rslora_jax.extras import extra

__all__ = ["against_rank", "against_step"]

LABELS = {
    "loss": "loss",
    "grad": "gradient norm",
    "grad_a": "gradient norm of a",
    "grad_b": "gradient norm of b",
    "grad_b_rms": "rms gradient of b",
    "delta": "norm of the change of a weight",
    "predicted_fall": "predicted fall of the loss",
    "output_trained": "rms adapter output",
    "input_grad": "rms gradient into the input",
}
# Okabe & Ito's palette, made to be told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^v*"


def against_step(sweep: Sweep, quantity: str = "grad", learning_rate: float | None = None) -> Any:
    """A quantity against the step, one line a rank: the paper's figures 2 and 3.

    A line is the mean over seeds of the logarithm, and a band spans the seeds.

    Args:
      sweep: a sweep that recorded the quantity.
      quantity: such as ``"grad"`` or ``"loss"``.
      learning_rate: which of the sweep's; None is the first.

    Returns:
      A `matplotlib.figure.Figure`; save it with ``figure.savefig(path)``.

    Raises:
      AdapterError: if matplotlib is not installed, or the quantity was not recorded.

    Example:
      >>> from rslora_jax.analysis.sweeps.budget import Budget
      >>> from rslora_jax.analysis.sweeps.runs import grid
      >>> runs = grid((4, 16), ("lora", "rslora"), (0,), (0.1,))
      >>> sweep = Sweep(runs, {"loss": np.ones((4, 3))}, Budget(0, 0, 4, 1, 1), {}, "sgd", "normal")
      >>> [panel.get_title() for panel in against_step(sweep, "loss").axes]
      ['lora', 'rslora']
    """
    values = series(sweep, quantity)
    figure, panels = _panels(sweep)
    ranks = list(dict.fromkeys(run.rank for run in sweep.runs))
    colours = _shades(len(ranks))
    for scaling, panel in panels:
        for rank, colour in zip(ranks, colours, strict=True):
            chosen = sweep.select(
                rank=rank, scaling=scaling, learning_rate=_rate(sweep, learning_rate)
            )
            low, middle, high = _spread(values[chosen])
            steps = np.arange(sweep.steps)
            panel.plot(steps, middle, color=colour, label=f"r = {rank}", linewidth=1.4)
            panel.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.set_yscale("log", nonpositive="mask")
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0][1].set_ylabel(LABELS.get(quantity, quantity))
    panels[-1][1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def against_rank(
    sweep: Sweep,
    quantities: Sequence[str] = ("grad_b", "grad", "predicted_fall", "delta"),
    learning_rate: float | None = None,
    optimizer: str | None = None,
) -> Any:
    """Quantities around the first step against the rank, with their slopes and the theory's.

    Each is divided by its value at the smallest rank, so that the slopes can be compared.

    Args:
      sweep: a sweep that recorded them, over two steps or more.
      quantities: of `slopes.STARTS`.
      learning_rate: which of the sweep's; None is the first.
      optimizer: as in `slopes`.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      AdapterError: if matplotlib is not installed, or a quantity was not recorded.
    """
    rate = _rate(sweep, learning_rate)
    table = slopes(sweep, optimizer=optimizer).select(time="start", learning_rate=rate)
    figure, panels = _panels(sweep, height=4.6)
    ranks = list(dict.fromkeys(run.rank for run in sweep.runs))
    for scaling, panel in panels:
        for k, name in enumerate(quantities):
            values = series(sweep, name)[:, STARTS[name]]
            at = [sweep.select(rank=r, scaling=scaling, learning_rate=rate) for r in ranks]
            low, middle, high = (
                np.array(x) for x in zip(*(_spread(values[c]) for c in at), strict=True)
            )
            (row,) = table.select(scaling=scaling, quantity=name).records()
            look = {"color": COLOURS[k % 6], "marker": MARKERS[k % 6], "capsize": 3}
            bars = [(middle - low) / middle[0], (high - middle) / middle[0]]
            panel.errorbar(ranks, middle / middle[0], bars, label=_legend(row), **look)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", nonpositive="mask")
        panel.set_xlabel("rank")
        panel.set_xticks(ranks, [str(rank) for rank in ranks])
        panel.minorticks_off()
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.17))
    panels[0][1].set_ylabel("over its value at the smallest rank")
    return figure


def _panels(sweep: Sweep, height: float = 3.6) -> tuple[Any, list[tuple[str, Any]]]:
    """A figure without pyplot, which would keep it alive, and a panel for each scaling."""
    matplotlib = extra("matplotlib.figure", "rslora_jax[cli]", "A plot of a sweep")
    names = list(dict.fromkeys(run.scaling for run in sweep.runs))
    figure = matplotlib.Figure(figsize=(4.2 * len(names) + 1.2, height), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, panel in zip(names, axes, strict=True):
        panel.set_title(name)
        panel.grid(alpha=0.3)
    return figure, list(zip(names, axes, strict=True))


def _shades(count: int) -> Any:
    """Dark for low ranks to bright for high ones, in order for any colour vision."""
    colormaps = extra("matplotlib", "rslora_jax[cli]", "A plot of a sweep").colormaps
    return colormaps["viridis"](np.linspace(0, 0.92, count))


def _rate(sweep: Sweep, learning_rate: float | None) -> float:
    return sweep.runs[0].learning_rate if learning_rate is None else learning_rate


def _spread(values: np.ndarray) -> Iterator[np.ndarray]:
    """The least, geometric mean and greatest over seeds (axis 0); NaN where not positive."""
    known = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    low, high = known.min(0), known.max(0)
    yield low
    yield np.clip(np.exp(np.log(known).mean(0)), low, high)  # rounding may leave the range
    yield high


def _legend(row: dict[str, Any]) -> str:
    error = "" if row["error"] is None else f" ± {row['error']:.1g}"
    found = f"{LABELS[row['quantity']]}: {round(row['slope'], 2) + 0.0:+.2f}{error}"
    if row["low"] is None:
        return found
    ends = dict.fromkeys((f"{row['low']:g}", f"{row['high']:g}"))
    return f"{found} (theory {' to '.join(ends)})"
