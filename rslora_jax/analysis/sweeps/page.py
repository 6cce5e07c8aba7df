"""Page: a sweep as one HTML file that needs nothing beside it."""

import base64
import html
import io
import os
from collections.abc import Mapping
from typing import Any

from rslora_jax.analysis.sweeps.advice import advice
from rslora_jax.analysis.sweeps.plots import against_rank, against_step
from rslora_jax.analysis.sweeps.slopes import STARTS, slopes
from rslora_jax.analysis.sweeps.sweep import Sweep
from rslora_jax.extras import extra
from rslora_jax.files import whole_file
from rslora_jax.tables import Table

__all__ = ["write"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; font-size: .875rem; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; }
.exploding, .collapsing { font-weight: 600; }
.exploding::before { content: "\\2191\\00a0"; }
.collapsing::before { content: "\\2193\\00a0"; }
"""

TITLES = {
    "grad": "Gradient norm against the step, for each rank",
    "loss": "Loss against the step, for each rank",
}


def write(
    path: str | os.PathLike[str],
    sweep: Sweep,
    *,
    title: str = "Rank stability",
    optimizer: str | None = None,
    learning_rate: float | None = None,
) -> None:
    """Writes the report of a sweep: advice, figures, slopes beside the theory's, failures.

    Args:
      path: the HTML file; figures are inside it, and it loads nothing.
      sweep: a sweep over two ranks or more.
      title: of the page.
      optimizer: as in `slopes.slopes`.
      learning_rate: which of the sweep's the figures show; None is the first.

    Raises:
      AdapterError: if matplotlib is not installed.
      OSError: if the file cannot be written; it is then as it was before.

    Example:
      >>> import tempfile, numpy as np
      >>> from pathlib import Path
      >>> from rslora_jax.analysis.sweeps.budget import Budget
      >>> from rslora_jax.analysis.sweeps.runs import grid
      >>> runs = grid((4, 16), ("lora",), (0,), (0.1,))
      >>> sweep = Sweep(runs, {"loss": np.ones((2, 3))}, Budget(0, 0, 2, 1, 1), {}, "sgd", "normal")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(Path(folder, "report.html"), sweep, title="a < b")
      ...     "<title>a &lt; b</title>" in Path(folder, "report.html").read_text()
      True
    """
    with whole_file(path) as temporary:
        temporary.write_text(_page(sweep, title, optimizer, learning_rate), encoding="utf-8")


def _page(sweep: Sweep, title: str, optimizer: str | None, rate: float | None) -> str:
    failures = sweep.failures
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(_setting(sweep))}</p>",
        "<h2>What to do</h2>",
        _definitions(advice(sweep, optimizer)),
        *_figures(sweep, optimizer, rate),
        "<h2>Slopes of log(quantity) against log(rank)</h2>",
        _table(slopes(sweep, optimizer=optimizer)),
    ]
    if failures.rows:
        parts += ["<h2>Runs with values that are not finite</h2>", _table(failures)]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _setting(sweep: Sweep) -> str:
    ranks, scalings, seeds, rates = (
        ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        for values in (dict.fromkeys(column) for column in zip(*sweep.runs, strict=True))
    )
    return (
        f"{len(sweep.runs)} runs of {sweep.steps} steps in one compilation: ranks {ranks}; "
        f"scalings {scalings}; seeds {seeds}; learning rates {rates}; optimizer "
        f"{sweep.optimizer}; a drawn as {sweep.init}."
    )


def _definitions(sentences: Mapping[str, str]) -> str:
    rows = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in sentences.items())
    return f"<dl>{''.join(rows)}</dl>"


def _figures(sweep: Sweep, optimizer: str | None, rate: float | None) -> list[str]:
    found = []
    for quantity, caption in TITLES.items():
        if quantity in sweep.traces:
            found.append(_figure(against_step(sweep, quantity, rate), caption))
    names = [n for n, start in STARTS.items() if n in {"grad_b", "grad", "delta"} & {*sweep.traces}
             and sweep.steps > start]  # fmt: skip
    names += ["predicted_fall"] if "predicted_change" in sweep.traces else []
    if names:
        plot = against_rank(sweep, names, rate, optimizer)
        found.append(_figure(plot, "Magnitudes around the first step against the rank"))
    return found


def _figure(figure: Any, caption: str) -> str:
    """An image inside the page: the identifiers of two SVGs in one document would collide."""
    buffer = io.BytesIO()
    matplotlib = extra("matplotlib", "rslora_jax[cli]", "A report page")
    with matplotlib.rc_context({"svg.hashsalt": caption}):  # the same sweep, the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = html.escape(caption)
    return f'<h2>{text}</h2><img alt="{text}" src="data:image/svg+xml;base64,{data}">'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"<td>{value:.4g}</td>"
    text = "" if value is None else html.escape(str(value))
    mark = f' class="{text}"' if text in ("exploding", "collapsing") else ""
    return f"<td{mark}>{text}</td>"
