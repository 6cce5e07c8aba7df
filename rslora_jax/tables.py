"""Tables: rows of named columns, printed as text and written as CSV or JSON lines."""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rslora_jax.extras import extra
from rslora_jax.files import whole_file
from rslora_jax.paths import AdapterError, nearest

__all__ = ["Table", "align", "cell"]


@dataclasses.dataclass(frozen=True)
class Table:
    """A tidy table: one observation a row, plain Python values in the cells.

    Attributes:
      columns: the names of the columns.
      rows: the rows, each with one value a column; None where there is none.

    Example:
      >>> table = Table.of([{"rank": 4, "loss": 1.25}, {"rank": 8, "loss": 0.5}])
      >>> print(table)
      rank  loss
      4     1.25
      8     0.5
      >>> table.select(rank=8).column("loss")
      [0.5]
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...] = ()

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> "Table":
        """Makes a table of mappings; the columns are all their keys, in order of appearance."""
        found = list(records)
        columns = tuple(dict.fromkeys(name for record in found for name in record))
        rows = [tuple(_plain(record.get(name)) for name in columns) for record in found]
        return cls(columns, tuple(rows))

    def records(self) -> list[dict[str, Any]]:
        """Each row as a mapping from column to value."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def column(self, name: str) -> list[Any]:
        """The values of one column.

        Raises:
          AdapterError: if there is no such column, with the nearest ones.
        """
        return [row[self._place(name)] for row in self.rows]

    def select(self, **equals: Any) -> "Table":
        """The rows whose columns have these values.

        Raises:
          AdapterError: if there is no such column, with the nearest ones.
        """
        places = [(self._place(name), value) for name, value in equals.items()]
        kept = [row for row in self.rows if all(row[k] == value for k, value in places)]
        return Table(self.columns, tuple(kept))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes a header and one line a row; an empty cell is None."""
        with whole_file(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(self.rows)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Writes one JSON object a row; a number that is not finite becomes a string."""
        with whole_file(path) as temporary, temporary.open("w") as file:
            for record in self.records():
                file.write(json.dumps({k: _json(v) for k, v in record.items()}) + "\n")

    def to_frame(self) -> Any:
        """The table as a `pandas.DataFrame`.

        Raises:
          AdapterError: if pandas is not installed.
        """
        pandas = extra("pandas", "pandas", "Table.to_frame")
        return pandas.DataFrame(list(self.rows), columns=list(self.columns))

    def _place(self, name: str) -> int:
        if name not in self.columns:
            raise AdapterError(
                f"The table has no column {name!r}. The nearest are {nearest(name, self.columns)}."
            )
        return self.columns.index(name)

    def __str__(self) -> str:
        return "\n".join(align([self.columns, *([cell(v) for v in row] for row in self.rows)]))


def align(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Text in columns: each cell padded to the widest of its column.

    Example:
      >>> align([["path", "rank"], ["layers/q", "8"]])
      ['path      rank', 'layers/q  8']
    """
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = (gap.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def _plain(value: Any) -> Any:
    """A scalar array as the Python number it holds."""
    if isinstance(value, str | int | float | bool | None):
        return value
    return np.asarray(value).item()


def cell(value: Any) -> str:
    """A value as the text of a cell: floats with four digits, None as nothing."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
