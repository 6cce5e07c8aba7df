"""The figure of the experiment: a panel for each thing that a rank can change."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from readings import NAMES, Curves, curves
from rslora_jax.files import whole_file
from rslora_jax.tables import Table

COLOURS = {"lora": "#d95f02", "rslora": "#1b6ca8"}
MARKERS = {"lora": "o", "rslora": "s"}
LESSONS = {"facts": "#6a3d9a", "style": "#33a02c"}
OPTIMIZERS = {"adam": "Adam", "sgd": "SGD"}
ASKED = {"facts": "facts", "style": "style, held out"}


def draw(runs: Table, truncated: Mapping[str, Table], path: Path) -> None:
    """Draws everything into one .png file, which appears whole or not at all."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    grid = figure.subplots(2, 4)
    for row, (optimizer, name) in enumerate(OPTIMIZERS.items()):
        for column, (lesson, asked) in enumerate(ASKED.items()):
            axes = grid[row, column]
            _accuracy(axes, curves(runs, lesson, optimizer, "accuracy"), f"{asked}, {name}")
    _gradient(grid[0, 2], curves(runs, "facts", "sgd", "onset"), "facts: |grad|, first step")
    _gradient(grid[1, 2], curves(runs, "facts", "sgd", "late"), "facts: |grad|, last steps, SGD")
    _truncated(grid[0, 3], truncated, "accuracy", "full tuning cut to rank r")
    _truncated(grid[1, 3], truncated, "energy", "energy held at rank r")
    grid[0, 0].legend(frameon=False)
    grid[0, 3].legend(frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _lines(axes: Any, found: Curves) -> None:
    """A line for each scaling, with the spread over the seeds."""
    for scaling, curve in found.items():
        colour, marker = COLOURS[scaling], MARKERS[scaling]
        axes.plot(curve.ranks, curve.mean, marker=marker, color=colour, label=NAMES[scaling])
        low, high = curve.mean - curve.spread, curve.mean + curve.spread
        axes.fill_between(curve.ranks, low, high, color=colour, alpha=0.2, linewidth=0)


def _accuracy(axes: Any, found: Curves, title: str) -> None:
    _lines(axes, found)
    _finish(axes, found["lora"].ranks, title)
    _percent(axes, "right answers")


def _gradient(axes: Any, found: Curves, title: str) -> None:
    _lines(axes, found)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("gradient norm")
    _finish(axes, found["lora"].ranks, title)


def _truncated(axes: Any, found: Mapping[str, Table], quantity: str, title: str) -> None:
    for lesson, table in found.items():
        ranks, colour = table.column("rank"), LESSONS[lesson]
        axes.plot(ranks, table.column(quantity), marker="D", color=colour, label=ASKED[lesson])
        _finish(axes, ranks, title)
    _percent(axes, "right answers" if quantity == "accuracy" else "share of |change|²")


def _percent(axes: Any, label: str) -> None:
    axes.set_ylim(0, 1.04)
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _finish(axes: Any, ranks: Any, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, labels=[str(rank) for rank in ranks])
    axes.set_xlabel("rank")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
