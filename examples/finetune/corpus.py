"""Corpus: the rows of a run as tokens, those to learn from and those that are held out."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any, NamedTuple

from finetune.batches import Batches
from finetune.beginning import beginning
from finetune.encoding import Encoded, Encoder, encode_rows
from finetune.rows import DataError, Row, Rows, hold_out, read_rows
from finetune.settings import ConfigError, Settings


class Corpus(NamedTuple):
    """What a run reads.

    Attributes:
      train: rows to learn from.
      held: rows that are held out; none if none are asked for.
      skipped: what is wrong with the lines that were left out.
      now: the time that chats were told.
    """

    train: tuple[Encoded, ...]
    held: tuple[Encoded, ...]
    skipped: tuple[str, ...]
    now: datetime.datetime

    @property
    def cut(self) -> int:
        """How many held-out rows were too long and lost their beginning."""
        return sum(row.cut > 0 for row in self.held)

    def describe(self) -> str:
        """A line about the rows that are not learned."""
        cut = f" ({self.cut:,} cut to fit length)" if self.cut else ""
        return f"held out: {len(self.held):,} rows{cut}; left out: {len(self.skipped):,} bad lines"


def read(settings: Settings, source: Any) -> Corpus:
    """Reads, splits and encodes all rows.

    Raises:
      ConfigError: if rows may be longer than the model's context.
      DataError: if a file is missing, a line of it is bad, or no row is left.
    """
    if settings.length > source.context:
        raise ConfigError(
            f"length {settings.length} is more than the context of {settings.model}, "
            f"{source.context} tokens; set length to that at most"
        )
    now = beginning(settings.output)
    chat = source.chat and dataclasses.replace(source.chat, now=now)
    encoder = Encoder(source.tokenizer, chat, source.eos, source.bos, settings.length)
    found, held = _split(settings)
    train = encode_rows(encoder, found.rows, settings.skip_bad)
    asked = encode_rows(encoder, held.rows, settings.skip_bad) if held.rows else Rows(())
    _check_vocabulary(train.rows, settings, source)
    skipped = (*found.skipped, *held.skipped, *train.skipped, *asked.skipped)
    return Corpus(train.rows, asked.rows, skipped, now)


def batches_of(settings: Settings, corpus: Corpus) -> Batches:
    """The order in which the rows are learned."""
    return Batches(
        corpus.train,
        batch=settings.batch,
        length=settings.length,
        accumulation=settings.accumulation,
        packing=settings.packing,
        seed=settings.seed,
        epochs=settings.epochs,
        steps=settings.steps,
    )


def _split(settings: Settings) -> tuple[Rows, Rows]:
    found = read_rows(Path(settings.dataset), settings.skip_bad)
    if settings.eval_dataset is not None:
        held = read_rows(Path(settings.eval_dataset), settings.skip_bad)
        return found, held._replace(rows=_most(held.rows, settings))
    if not settings.eval_fraction:
        return found, Rows(())
    rows, held = hold_out(found.rows, settings.eval_fraction, settings.seed)
    return found._replace(rows=rows), Rows(_most(held, settings))


def _most(rows: tuple[Row, ...], settings: Settings) -> tuple[Row, ...]:
    """The rows to evaluate on: evenly from all of them, where there are more than asked for."""
    count = min(settings.eval_rows, len(rows))
    return tuple(rows[place * len(rows) // count] for place in range(count))


def _check_vocabulary(rows: tuple[Encoded, ...], settings: Settings, source: Any) -> None:
    largest = max(int(row.tokens.max()) for row in rows)
    if largest >= source.config.vocab_size:
        raise DataError(
            f"the tokenizer of {settings.model} gives the token {largest}, and the embedding has "
            f"{source.config.vocab_size} rows: they are of different models"
        )
