"""Walkthrough: the articles' simulation of style and facts, reproduced, corrected and drawn."""

import itertools
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rslora_jax.analysis.articles.claims import claims
from rslora_jax.analysis.articles.first_steps import first_steps
from rslora_jax.analysis.articles.style_facts import (
    energy_table,
    error_table,
    errors,
    rank_table,
    scale_table,
    singular_values,
    value_table,
    wide_style_energy,
    width_table,
)
from rslora_jax.extras import extra
from rslora_jax.files import whole_file
from rslora_jax.paths import AdapterError
from rslora_jax.tables import Table

__all__ = ["Section", "draw", "sections"]


class Section(NamedTuple):
    """A part of the walkthrough as it is shown: a title, a table with fixed decimals, a note."""

    title: str
    table: Table
    note: str

    def __str__(self) -> str:
        return f"{self.title}\n\n{self.table}\n\n{self.note}"


def sections() -> tuple[Section, ...]:
    """The whole walkthrough, part by part, in the order in which it is shown.

    Example:
      >>> print(sections()[2])
      3. The scale
      <BLANKLINE>
      rank  lora     rslora
      1     16.0000  16.0000
      4     4.0000   8.0000
      8     2.0000   5.6569
      16    1.0000   4.0000
      32    0.5000   2.8284
      64    0.2500   2.0000
      <BLANKLINE>
      lora is alpha/r, rslora is alpha/sqrt(r), alpha = 16.
    """
    gap = max(abs(row["error"] - row["identity"]) for row in errors().records())
    shown = (
        ("Two updates and their first ten singular values", value_table(), None, _UPDATES),
        ("Error by rank, as in the articles; 1.0 = no update", error_table(), 3, _ERRORS % gap),
        ("The scale", scale_table(), 4, _SCALES),
        ("The energy that rank r can hold, in percent", energy_table(), 1, _ENERGY),
        ("Rank 4 of the style update, drawn wider, in percent", width_table(), 1, _WIDTHS),
        ("How many ranks the updates have", rank_table(), None, _RANKS),
        ("What the articles meant: one step, by rank", first_steps(), 3, _STEPS),
        ("Claims and verdicts", claims(), None, _CLAIMS),
    )
    return tuple(
        Section(f"{n}. {title}", table if digits is None else _fixed(table, digits), note)
        for n, (title, table, digits, note) in enumerate(shown, start=1)
    )


def _fixed(table: Table, digits: int) -> Table:
    """The table with its floats as text of so many decimals, as the articles print them."""
    rows = (tuple(_text(value, digits) for value in row) for row in table.rows)
    return Table(table.columns, tuple(rows))


def _text(value: Any, digits: int) -> Any:
    # + 0.0 turns a negative zero into 0
    return f"{round(value, digits) + 0.0:.{digits}f}" if isinstance(value, float) else value


_UPDATES = (
    "Random 64 x 64 matrices, seed 42: style has four large singular values, facts has 64 that "
    "fall slowly, both have noise of 0.01 an entry. They stand for fine-tuning; no model is in it."
)
_ERRORS = (
    "Error = |W - s W_r| / |W|, and 1.0 is that of no update at all. Every number is "
    "err^2 = (s - 1)^2 c + 1 - c, with c the energy that rank r holds (largest difference "
    "%.0e): the table shows s. s = 1 gives the best columns, and training b finds it."
)
_SCALES = "lora is alpha/r, rslora is alpha/sqrt(r), alpha = 16."
_ENERGY = "By construction: the singular values were chosen, not measured on a model."
_WIDTHS = (
    "The same recipe at other widths: the noise has d^2 entries, the signal four numbers. "
    "law = 41.5 / (41.5 + d^2 / 10^4)."
)
_RANKS = (
    "Definitions of the rank of a spectrum disagree by up to ten times on one matrix: see "
    "rslora_jax.analysis.spectra.effective_rank."
)
_STEPS = (
    "A linear layer of 1024 x 16, b = 0, one step; sizes over those at rank 4. grad_b is the norm "
    "of b's gradient: r^-0.5 under alpha/r, stable under alpha/sqrt(r). signal is the loss that "
    "the step saves: SGD inherits the collapse twice (r^-1), and alpha/sqrt(r) heals it. Adam "
    "divides the gradient's size out: with it the signal of alpha/r is the stable one, and that "
    "of alpha/sqrt(r) grows as r^0.5. delta is |dW|, everything that moved."
)
_CLAIMS = "half: true of these numbers, or in part, but not what it is used to show."


def draw(path: str | os.PathLike[str]) -> None:
    """Draws the walkthrough: spectra, error by rank, scale by rank, captured energy.

    Args:
      path: the PNG to write; its folder must exist. An older file is replaced, whole.

    Raises:
      AdapterError: if `path` does not end in .png, or matplotlib is not installed.
      OSError: if the file cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     draw(Path(folder, "walkthrough.png"))
      ...     [file.name for file in Path(folder).iterdir()]
      ['walkthrough.png']
    """
    if Path(path).suffix.lower() != ".png":
        raise AdapterError(f"The walkthrough is drawn as a .png file, found {os.fspath(path)!r}.")
    module = extra("matplotlib.figure", "rslora_jax[cli]", "The walkthrough's figure")
    figure = module.Figure(figsize=(11, 8))
    panels = figure.subplots(2, 2, gridspec_kw=MARGINS)
    for axes, fill in zip(panels.flat, (_spectra, _errors, _scales, _energy), strict=True):
        fill(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=1 if fill is not _errors else 2)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)


# Fixed: to let matplotlib compute them takes longer than the drawing.
MARGINS = {"left": 0.07, "right": 0.98, "bottom": 0.06, "top": 0.95, "hspace": 0.25, "wspace": 0.2}
COLORS = {"style": "tab:blue", "facts": "tab:orange"}
LINES = {"lora": "-", "rslora": "--"}
RULES = {"lora": "alpha/r", "rslora": "alpha/sqrt(r)"}
ALL_RANKS = range(1, 65)


def _spectra(axes: Any) -> None:
    for name, s in singular_values()._asdict().items():
        axes.semilogy(ALL_RANKS, s, ".-", color=COLORS[name], label=name)
    axes.set(title="Singular values of the two updates", xlabel="index", ylabel="singular value")


def _errors(axes: Any) -> None:
    table = errors(ALL_RANKS)
    for (name, color), (rule, line) in itertools.product(COLORS.items(), LINES.items()):
        error = table.select(update=name, scaling=rule).column("error")
        axes.semilogy(ALL_RANKS, error, line, color=color, label=f"{name}, s = {RULES[rule]}")
    for name, color in COLORS.items():
        best = np.sqrt(table.select(update=name, scaling="lora").column("rank_part"))
        axes.semilogy(ALL_RANKS[:-1], best[:-1], ":", color=color, label=f"{name}, s = 1 (best)")
    axes.axhline(1, color="black", lw=1.5, label="1.0 = no update")
    axes.set(title="Error of s W_r: it shows |s - 1|", xlabel="rank", ylabel="|W - s W_r| / |W|")
    axes.set_ylim(0.001, 20)


def _scales(axes: Any) -> None:
    table = scale_table(ALL_RANKS)
    for rule, line in LINES.items():
        axes.loglog(ALL_RANKS, table.column(rule), line, color="tab:green", label=RULES[rule])
    axes.axhline(1, color="black", lw=1, label="s = 1: alpha/r at rank 16")
    axes.set(title="Scale s, alpha = 16", xlabel="rank", ylabel="s")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], minor=False)
    axes.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], minor=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.minorticks_off()


def _energy(axes: Any) -> None:
    table = energy_table(ALL_RANKS)
    for name, color in COLORS.items():
        axes.plot(ALL_RANKS, table.column(name), color=color, label=name)
    wide = 100 * wide_style_energy(256)
    wide_label = "style drawn 256 x 256, same noise per entry"
    axes.plot(ALL_RANKS, wide[: len(ALL_RANKS)], ":", color=COLORS["style"], label=wide_label)
    marked = (4, table.column("style")[3]), (8, table.column("facts")[7])
    for (rank, held), color in zip(marked, COLORS.values(), strict=True):
        axes.plot(rank, held, "o", color=color, label=f"rank {rank}: {held:.1f} %")
    axes.set(title="Energy that rank r can hold", xlabel="rank", ylabel="% of |W|^2", ylim=(0, 105))
