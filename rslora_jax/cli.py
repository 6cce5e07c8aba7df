"""The command `rslora`: each subcommand is one function of `COMMANDS`, its docstring the help."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rslora_jax.analysis.walkthrough import draw, sections
from rslora_jax.extras import extra
from rslora_jax.paths import AdapterError
from rslora_jax.tables import Table

__all__ = ["COMMANDS", "main", "show", "walkthrough"]

INSTALL = "rslora_jax[cli]"
BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # the last two as a shell reports the signals

DESCRIPTION = """Measure rank-stabilized LoRA: scale alpha/sqrt(r) against alpha/r.

Start with `rslora walkthrough`: it needs no model and no data, and shows in seconds what the
scale does and what it does not. `rslora COMMAND --help` explains a command.

Exit codes: 0 done, 2 bad input (one line on stderr says what to do), 130 interrupted."""


def walkthrough(output: Path = Path("outputs/walkthrough.png")) -> None:
    """Reproduce the popular simulation of style and facts, and correct it.

    Prints the published tables to the last digit, beside the numbers that say what they mean,
    then measures what the scale does to learning, and closes with a verdict on every claim.
    Draws the same as a figure: spectra, error by rank, scale by rank, captured energy.
    Everything is seeded: two runs print the same. Takes seconds; no GPU, no downloads.

    Args:
      output: The figure, a .png file. Its folder is made; an older file is replaced.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(output)
    for section in sections():
        show(section.table, section.title, section.note)
    print(f"figure: {output}")


# To add a command, write a function with annotated arguments and put it here.
COMMANDS = (walkthrough,)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments after the program's name; None means those of the process.

    Returns:
      The exit code: 0; 2 for bad input, 130 after Ctrl-C, each with one line on stderr.

    Raises:
      SystemExit: from the parser: 0 after ``--help``, 2 for a command or flag that it does
        not know, with a hint on stderr.

    Example:
      >>> main(["walkthrough", "--output", "figure.txt"])  # and says so on stderr
      2
    """
    try:
        _parse_and_run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted; no file is left half-written.", INTERRUPTED)
    except BrokenPipeError:  # the reader has left, as in `rslora walkthrough | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (AdapterError, OSError) as error:
        return _fail(" ".join(str(error).split()), BAD_INPUT)
    return 0


def _parse_and_run(argv: Sequence[str] | None) -> None:
    app = extra("tyro.extras", INSTALL, "The command rslora").SubcommandApp()
    for command in COMMANDS:
        app.command(command)
    app.cli(prog="rslora", description=DESCRIPTION, args=sys.argv[1:] if argv is None else argv)


def _fail(message: str, code: int) -> int:
    print(f"rslora: {message}", file=sys.stderr)
    return code


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


def _ruled(table: Table) -> Any:
    # Text, not str: rich would read "[4.99 3.5]" as markup.
    text = extra("rich.text", INSTALL, "A table on a terminal").Text
    cells = [[_cell(value) for value in row] for row in table.rows]
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


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
