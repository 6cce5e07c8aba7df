"""The tables of the experiment, as they are printed: narrow enough for 80 columns."""

from rich.box import SIMPLE
from rich.table import Table as Grid

from panels import ASKED, OPTIMIZERS
from readings import NAMES, Curve, curves
from rslora_jax.tables import Table


def by_rank(runs: Table, quantity: str, title: str) -> Grid:
    """A row for each lesson, optimizer and scaling, a column for each rank."""
    ranks = sorted(set(runs.column("rank")))
    grid = grid_of(title, ["", "", "", *(f"r={rank}" for rank in ranks)])
    # No optimizer has moved anything at the first step.
    optimizers = {"adam": "either"} if quantity == "onset" else OPTIMIZERS
    for lesson, asked in ASKED.items():
        for optimizer, name in optimizers.items():
            for scaling, curve in curves(runs, lesson, optimizer, quantity).items():
                what = asked if quantity == "accuracy" else lesson
                grid.add_row(what, name, NAMES[scaling], *cells(curve, quantity == "accuracy"))
            grid.add_section()
    return grid


def grid_of(title: str, head: list[str]) -> Grid:
    """An empty table, narrow enough for 80 columns."""
    style = {
        "box": SIMPLE,
        "show_edge": False,
        "pad_edge": False,
        "padding": (0, 1, 0, 0),
        "title_justify": "left",
    }
    return Grid(*head, title=title, **style)


def cells(curve: Curve, percent: bool) -> list[str]:
    """The mean with its spread, at each rank."""
    pairs = zip(curve.mean, curve.spread, strict=True)
    if percent:
        return [f"{100 * mean:.0f}±{100 * spread:.0f}" for mean, spread in pairs]
    return [f"{mean:.2g}±{spread:.1g}" for mean, spread in pairs]


def by_truncation(truncated: dict[str, Table]) -> Grid:
    """Function beside energy, by rank."""
    ranks = truncated["facts"].column("rank")
    title = "Full tuning with Adam, its change cut to rank r: percent"
    grid = grid_of(title, ["", "", *(f"r={rank}" for rank in ranks)])
    for lesson, table in truncated.items():
        rows = {"accuracy": ASKED[lesson], "taught": f"{lesson}, taught", "energy": lesson}
        for quantity, what in rows.items():
            if quantity == "taught" and lesson == "facts":
                continue  # all that is taught is asked
            kind = "energy" if quantity == "energy" else "accuracy"
            grid.add_row(what, kind, *(f"{100 * v:.0f}" for v in table.column(quantity)))
        grid.add_section()
    return grid
