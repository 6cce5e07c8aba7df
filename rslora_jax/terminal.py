"""Terminal: tables and progress, ruled on a terminal and plain where output is piped."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rslora_jax.extras import extra
from rslora_jax.tables import Table, cell

__all__ = ["INSTALL", "progress", "show"]

INSTALL = "rslora_jax[cli]"
"""What pip is to install for the command line."""


def show(table: Table, title: str = "", note: str = "") -> None:
    """Prints a table: ruled and fitted to a terminal's width, plain text anywhere else.

    Args:
      table: the table; floats are shown with four digits.
      title: a line above it.
      note: a paragraph below it.

    Raises:
      AdapterError: if the output is a terminal and rich is not installed.

    Example:
      >>> show(Table.of([{"rank": 4, "loss": 1.25}]), note="One run.")
      rank  loss
      4     1.25
      <BLANKLINE>
      One run.
      <BLANKLINE>
    """
    if not sys.stdout.isatty():
        print("\n\n".join(part for part in (title, str(table), note) if part), end="\n\n")
        return
    console = extra("rich.console", INSTALL, "A table on a terminal").Console(file=sys.stdout)
    text = extra("rich.text", INSTALL, "A table on a terminal").Text
    parts = (text(title, style="bold"), _ruled(table), text(note))
    for part in parts:
        if part:
            console.print(part, highlight=False)
    console.print()


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error while work goes on; nothing where that is no terminal.

    Yields:
      ``report(done, total, what)``, to be called as the work goes on.
    """
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    rich = extra("rich.progress", INSTALL, "A progress bar")
    console = extra("rich.console", INSTALL, "A progress bar").Console(stderr=True)
    with rich.Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=f"{title}: {what}"
        )


def _ruled(table: Table) -> Any:
    # Text, not str: rich would read "[4.99 3.5]" as markup.
    text = extra("rich.text", INSTALL, "A table on a terminal").Text
    cells = [[cell(value) for value in row] for row in table.rows]
    made = _empty(
        len(table.columns), has_prose=any(len(cell) > 60 for row in cells for cell in row)
    )
    for n, name in enumerate(table.columns):
        # A header breaks at its spaces, so that numbers need not.
        justify = "right" if all(_is_number(row[n]) for row in cells) else "left"
        made.add_column(text(name.replace("_", " ")), justify=justify, overflow="fold")
    for row in cells:
        made.add_row(*map(text, row))
    return made


def _empty(columns: int, has_prose: bool) -> Any:
    """A rich table that wastes no width: ten columns of numbers fit into 80 characters."""
    box = extra("rich.box", INSTALL, "A table on a terminal").SIMPLE_HEAD
    layout = {"padding": (0, 1 if columns < 10 else 0), "leading": 1 if has_prose else 0}
    made = extra("rich.table", INSTALL, "A table on a terminal").Table
    return made(box=box, show_edge=False, **layout)


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True
