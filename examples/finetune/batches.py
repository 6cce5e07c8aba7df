"""Batches for training, in one order for any number of processes, and for evaluation."""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from finetune.encoding import Encoded
from finetune.packing import Bin, Group, plan, rounded
from finetune.rows import DataError


class Batch(NamedTuple):
    """What the model reads, and which tokens it should predict from which.

    With accumulation every field has one more leading axis, of micro-batches.

    Attributes:
      tokens: int32 [B, T], padded on the right.
      segments: int32 [B, T]: the row within the bin, from 1; 0 is padding.
      offsets: int32 [B, T]: the place of each token in its row, from 0.
      positions: int32 [B, P]: where the model is asked.
      labels: int32 [B, P]: the right token after each position.
      weights: float32 [B, P]: 1 for what is asked, 0 for padding.
    """

    tokens: Any
    segments: Any
    offsets: Any
    positions: Any
    labels: Any
    weights: Any


class Stats(NamedTuple):
    """What one epoch holds.

    Attributes:
      rows: of the data.
      tokens: of all rows.
      answer_tokens: those that are learned.
      cut_rows, cut_tokens: rows that were too long, and what they lost.
      padding: the share of the arrays that holds nothing.
      shapes: `(T, P)` of the batches: each is compiled once.
    """

    rows: int
    tokens: int
    answer_tokens: int
    cut_rows: int
    cut_tokens: int
    padding: float
    shapes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        """One line."""
        cut = f"{self.cut_tokens:,} tokens cut from {self.cut_rows:,} rows that were too long"
        shapes = ", ".join(f"{width} ({asked} asked)" for width, asked in self.shapes)
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.answer_tokens:,} of them learned; "
            f"{cut}; batches {shapes} tokens wide, {self.padding:.0%} padding"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """All batches of a run, known from the start.

    Epoch follows epoch, each in an order of its own. A row is in exactly one batch of an epoch.

    Attributes:
      rows: the data.
      batch: rows of the arrays in a micro-batch.
      length: the most tokens in a row of the arrays; with packing the number of them.
      accumulation: micro-batches in a step.
      packing: whether several rows of the data share a row of the arrays.
      seed: of the order.
      epochs: how often each row is seen; a fraction ends within an epoch.
      steps: how many steps, instead of `epochs`; once made, how many there are.

    Raises:
      DataError: there are no rows, or one is longer than `length`.
    """

    rows: Sequence[Encoded]
    _: dataclasses.KW_ONLY
    batch: int
    length: int
    accumulation: int = 1
    packing: bool = True
    seed: int = 0
    epochs: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        """Plans all steps."""
        longest = max((len(row.tokens) for row in self.rows), default=0)
        if not 0 < longest <= self.length:
            found = f"one of {longest}" if longest else "no row"
            raise DataError(f"expected rows of at most {self.length} tokens, found {found}")
        object.__setattr__(self, "steps", len(self._groups))

    @functools.cached_property
    def stats(self) -> Stats:
        """What the first epoch holds."""
        groups, cuts = self._plan(0), [row.cut for row in self.rows]
        return Stats(
            rows=len(self.rows),
            tokens=sum(len(row.tokens) for row in self.rows),
            answer_tokens=sum(self._answers),
            cut_rows=sum(cut > 0 for cut in cuts),
            cut_tokens=sum(cuts),
            padding=1 - sum(self._sizes) / sum(len(bins) * width for bins, width in groups),
            shapes=tuple(sorted(self._asked.items())),
        )

    def fingerprint(self) -> str:
        """Tells whether another run would read the same batches."""
        found = hashlib.sha256(repr((self.accumulation, self._groups)).encode())
        for row in self.rows:
            found.update(row.tokens.tobytes() + row.answer.tobytes())
        return found.hexdigest()[:16]

    def read(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """The batch of a step, on the host.

        Args:
          step: from 0.
          rows: which rows of each micro-batch are wanted, such as `local_rows`; all by default.
        """
        bins, width = self._groups[step]
        wanted = range(self.batch) if rows is None else rows
        parts = [
            _collate(self.rows, [bins[n + row] for row in wanted], width, self._asked[width])
            for n in range(0, len(bins), self.batch)
        ]
        return parts[0] if len(parts) == 1 else Batch(*map(np.stack, zip(*parts, strict=True)))

    def iterator(
        self, state: dict[str, Any] | None = None, rows: Sequence[int] | None = None
    ) -> grain.DatasetIterator[Batch]:
        """Iterate over the batches, made ahead in a thread.

        Args:
          state: of an earlier iterator, `get_state()`, to go on after the batches that it gave.
          rows: as for `read`.

        Returns:
          An iterator with `get_state()` and `set_state(state)`; a state is small, and JSON.
        """
        made = grain.MapDataset.range(self.steps).map(lambda step: self.read(int(step), rows))
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        found = iter(made.to_iter_dataset(ahead))
        if state is not None:
            found.set_state(state)
        return found

    @functools.cached_property
    def _groups(self) -> list[Group]:
        plans = map(self._plan, itertools.count())
        if self.steps is not None:
            return list(itertools.islice(itertools.chain.from_iterable(plans), self.steps))
        *whole, last = itertools.islice(plans, math.ceil(self.epochs))
        part = math.ceil(round(len(last) * (self.epochs - len(whole)), 6))
        return [*itertools.chain.from_iterable(whole), *last[:part]]

    def _plan(self, epoch: int) -> list[Group]:
        width = self.length if self.packing else None
        return plan(self._sizes, self.batch * self.accumulation, width, self.seed, epoch)

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [len(row.tokens) - 1 for row in self.rows]  # the last token is only predicted

    @functools.cached_property
    def _answers(self) -> list[int]:
        return [int(row.answer.sum()) for row in self.rows]

    @functools.cached_property
    def _asked(self) -> dict[int, int]:
        """For each width, the most tokens that a bin asks for."""
        found: dict[int, int] = {}
        for bins, width in self._groups:
            asked = (sum(self._answers[row] for row in each) for each in bins)
            found[width] = max(found.get(width, 0), rounded(max(asked)))
        return found


def fixed(rows: Sequence[Encoded], batch: int, length: int) -> list[Batch]:
    """Batches for evaluation: each row once, by itself, in order, all of one shape.

    Args:
      rows: what to ask.
      batch: rows in a batch; the last one ends in rows of padding, of weight 0.
      length: the most tokens of a row.
    """
    width = min(rounded(max(len(row.tokens) - 1 for row in rows)), length)
    asked = rounded(max(int(row.answer.sum()) for row in rows))
    bins: list[Bin] = [(row,) for row in range(len(rows))]
    bins += [()] * (-len(bins) % batch)
    return [_collate(rows, bins[n : n + batch], width, asked) for n in range(0, len(bins), batch)]


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[int]:
    """Which rows of a global array, [.., B, T], the devices of this process hold."""
    places = np.arange(shape[-2])
    indices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([places[index[-2]] for index in indices if index])).tolist()


def place(batch: Batch, sharding: jax.sharding.Sharding, rows: int | None = None) -> Batch:
    """Make global arrays, of which every process supplies what its devices hold.

    Args:
      batch: `local_rows` alone, [.., b, T], or all rows, on every process.
      sharding: how a global array [.., B, T] lies on the devices of all processes.
      rows: B, if `batch` has not all of them.
    """

    def whole(field: np.ndarray) -> jax.Array:
        shape = (*field.shape[:-2], rows or field.shape[-2], field.shape[-1])
        return jax.make_array_from_process_local_data(sharding, field, shape)

    return Batch(*map(whole, batch))


def _collate(rows: Sequence[Encoded], bins: Sequence[Bin], width: int, asked: int) -> Batch:
    """Lay rows one after the other into the bins: arrays [len(bins), width] and [.., asked]."""
    tokens, segments, offsets = np.zeros((3, len(bins), width), np.int32)
    positions, labels = np.zeros((2, len(bins), asked), np.int32)
    weights = np.zeros((len(bins), asked), np.float32)
    for place, each in enumerate(bins):
        start = said = 0
        for segment, number in enumerate(each, start=1):
            row, where = rows[number].tokens, np.flatnonzero(rows[number].answer)
            read = slice(start, start + len(row) - 1)
            ask = slice(said, said + len(where))
            tokens[place, read], segments[place, read] = row[:-1], segment
            offsets[place, read] = np.arange(len(row) - 1)
            positions[place, ask], labels[place, ask] = start + where - 1, row[where]
            weights[place, ask] = 1
            start, said = read.stop, ask.stop
    return Batch(tokens, segments, offsets, positions, labels, weights)
