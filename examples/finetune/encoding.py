"""Rows as tokens, with a mark on those that are learned: the answers and the end after them.

What is learned continues exactly the tokens that a generating model would be given: the tokens of
the prompt alone come first. Where the tokenizer would merge a prompt's end with the beginning of
its answer, the answer is encoded by itself instead: after something that it does not merge with,
since some tokenizers put a space in front of a text.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from finetune.rows import DataError, Row

ANCHORS = ("\n", ".", "0")  # what an answer is put after, for its own tokens


class Encoded(NamedTuple):
    """One row.

    Attributes:
      tokens: int32 [n], n at least 2.
      answer: which tokens are learned, bool [n]; never the first, which nothing predicts.
      cut: tokens that the row was too long for, from the left.
    """

    tokens: np.ndarray
    answer: np.ndarray
    cut: int = 0

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the last answer."""
        inside = np.flatnonzero(~self.answer)
        return self.tokens[: inside[-1] + 1]


class EncodedRows(NamedTuple):
    """Many rows.

    Attributes:
      rows: those that can be used.
      skipped: what is wrong with the others.
    """

    rows: tuple[Encoded, ...]
    skipped: tuple[str, ...] = ()


class Piece(NamedTuple):
    """A stretch of a row's text that is read, or learned."""

    text: str
    answer: bool


class Encoder:
    """Turns rows into tokens.

    Prompts and completions are encoded as they are. Chats go through the model's own template. A
    row of more than `length` tokens loses the beginning of what comes before its last answer, never
    an answer's end; a token that the tokenizer puts in front of every text stays.
    """

    def __init__(
        self, tokenizer: Any, chat: Any, eos: tuple[int, ...], bos: int | None, length: int
    ):
        """Checks what every row needs.

        Args:
          tokenizer: of the package `tokenizers`.
          chat: has `render(messages, *, generate) -> str`; None without a chat template.
          eos: tokens that end an answer; the first is appended where a row has none.
          bos: the token in front of every text, if the tokenizer adds one.
          length: the most tokens of a row.

        Raises:
          DataError: no token ends an answer, or no row can be that short.
        """
        if not eos:
            raise DataError(
                "the tokenizer names no token that ends an answer, so the model would never learn "
                "to stop: name it as eos_token in tokenizer_config.json (or as "
                "tokenizer.ggml.eos_token_id in a GGUF file)"
            )
        if length < 3:
            raise DataError(f"length must be at least 3 tokens, found {length}")
        self._tokenizer, self._chat = tokenizer, chat
        self._eos, self._bos, self._length = eos, bos, length

    def encode(self, row: Row) -> Encoded:
        """Encode a row.

        Raises:
          DataError: a chat without a template, one that the template refuses, or an answer that is
            longer than a row may be.
        """
        pieces = (Piece(row.prompt, False), Piece(row.answer, True))
        tokens, marks = self._tokens(self._turns(row) if row.messages else pieces)
        answer = np.asarray(marks)
        answer[0] = False
        if not answer.any():
            raise DataError(f"{row.where}: the tokenizer finds no token in it: {row.answer!r}")
        return self._shorten(Encoded(np.asarray(tokens, np.int32), answer), row)

    def _turns(self, row: Row) -> tuple[Piece, ...]:
        """The rendered chat, cut where answers begin and end."""
        if self._chat is None:
            raise DataError(
                f"{row.where}: the model has no chat template for messages: give prompt and "
                "completion, or take a model that was tuned to chat"
            )
        turns = [message._asdict() for message in row.messages]
        ends, whole = [0], self._render(turns, False, row)
        for place, turn in enumerate(turns):
            if place and turn["role"] == "assistant":  # a greeting answers nothing
                ends.append(len(self._prefix(whole, turns[:place], True, row)))
                ends.append(len(self._prefix(whole, turns[: place + 1], False, row)))
        return tuple(
            Piece(whole[start:stop], bool(number % 2))
            for number, (start, stop) in enumerate(pairwise(ends))
        )

    def _prefix(self, whole: str, turns: list[dict[str, str]], generate: bool, row: Row) -> str:
        text = self._render(turns, generate, row)
        if not whole.startswith(text):
            raise DataError(
                f"{row.where}: the chat template does not render the first {len(turns)} messages "
                "as the beginning of the whole chat, so what the model would be asked is not what "
                "it would learn from: give prompt and completion instead"
            )
        return text

    def _render(self, turns: list[dict[str, str]], generate: bool, row: Row) -> str:
        try:
            return self._chat.render(turns, generate=generate)
        except ValueError as error:
            raise DataError(f"{row.where}: {error}") from error

    def _tokens(self, pieces: Iterable[Piece]) -> tuple[list[int], list[bool]]:
        """All tokens up to the end of the last answer, and which are learned."""
        text, tokens, marks = "", [], []
        for piece in pieces:
            text += piece.text
            more = self._continuation(tokens, text, piece.text)
            tokens = tokens + more
            marks += self._marks(more) if piece.answer else [False] * len(more)
        stop = 1 + max((place for place, mark in enumerate(marks) if mark), default=len(marks) - 1)
        tokens, marks = tokens[:stop], marks[:stop]
        if not tokens or tokens[-1] not in self._eos:
            tokens, marks = [*tokens, self._eos[0]], [*marks, True]
        if self._bos is not None and tokens[0] != self._bos:
            tokens, marks = [self._bos, *tokens], [False, *marks]
        return tokens, marks

    def _continuation(self, tokens: list[int], text: str, end: str) -> list[int]:
        """What follows `tokens` when `text`, of which they are the beginning, ends with `end`."""
        whole = self._ids(text)
        if whole[: len(tokens)] == tokens:
            return whole[len(tokens) :]
        for anchor in ANCHORS:
            before, whole = self._ids(anchor), self._ids(anchor + end)
            if whole[: len(before)] == before and self._text(whole) == self._text(before) + end:
                return whole[len(before) :]
        return self._ids(end)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _marks(self, answer: list[int]) -> list[bool]:
        """An answer is learned up to the first token that ends one: templates write more."""
        stop = next((n for n, token in enumerate(answer, 1) if token in self._eos), len(answer))
        return [True] * stop + [False] * (len(answer) - stop)

    def _shorten(self, whole: Encoded, row: Row) -> Encoded:
        excess = len(whole.tokens) - self._length
        if excess <= 0:
            return whole
        before, kept = len(whole.prompt), int(whole.tokens[0] == self._bos)
        if excess > before - 1:
            raise DataError(
                f"{row.where}: the last answer has {len(whole.tokens) - before} tokens, but a row "
                f"may have {self._length}, one of the prompt among them: raise length, "
                "or leave such rows out by --skip-bad"
            )
        gone = slice(kept, kept + excess)
        tokens, answer = np.delete(whole.tokens, gone), np.delete(whole.answer, gone)
        answer[0] = False
        return Encoded(tokens, answer, excess)


def encode_rows(encoder: Encoder, rows: Iterable[Row], skip_bad: bool = False) -> EncodedRows:
    """Encode many rows.

    Args:
      encoder: of the model.
      rows: what to encode.
      skip_bad: whether rows that cannot be encoded are listed in `skipped` instead of an error.

    Raises:
      DataError: a row cannot be encoded, or none is left.
    """
    encoded, skipped = [], []
    for row in rows:
        try:
            encoded.append(encoder.encode(row))
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
    if not encoded:
        raise DataError(f"no row can be used; the first: {skipped[0]}" if skipped else "no rows")
    return EncodedRows(tuple(encoded), tuple(skipped))
