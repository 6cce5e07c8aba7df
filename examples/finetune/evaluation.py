"""Evaluation: how well held-out answers are predicted, and a few answers in the model's own words.

The numbers are teacher-forced: every token is predicted from the right ones before it. For exact
match that says as much as generating: up to its first mistake greedy decoding reads the same
tokens, and after it the row is wrong anyway. (Both take the largest of float32 logits. Where two
are within rounding of each other, more often in bfloat16, the cache may tip the balance.)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from finetune.metrics import ANSWERS, METRICS, read_lines
from finetune.rows import DataError

SLACK = 8  # tokens that a generated answer may have beyond the longest right one
MOST = 256  # tokens of a generated answer, whatever is right


class Held(NamedTuple):
    """The numbers of one evaluation.

    Attributes:
      loss: mean cross entropy in nats per answer token, the one that ends the answer included.
      token_accuracy: share of answer tokens that were the likeliest one, from 0 to 1.
      exact_match: share of rows whose answer tokens all were, from 0 to 1.
      rows: how many rows were read.
    """

    loss: float
    token_accuracy: float
    exact_match: float
    rows: int

    def metrics(self) -> dict[str, float]:
        """The numbers as `Metrics.write` takes them."""
        return {f"{PREFIX}{name}": value for name, value in self._asdict().items()}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Held":
        """What `metrics` gave, read from a row of `metrics.jsonl`."""
        values = (row[f"{PREFIX}{name}"] for name in cls._fields)
        return cls(*(float("nan") if value is None else value for value in values))


PREFIX = "held_out/"
"""Before the names of held-out numbers among the metrics."""


class Answer(NamedTuple):
    """The end of one conversation, as text: what was asked, what is right, what the model said."""

    prompt: str
    right: str
    said: str

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> "Answer":
        """From its fields by name, as `answers.jsonl` holds them."""
        return cls(*(fields[name] for name in cls._fields))


class Evaluation(NamedTuple):
    """What was found at one step."""

    step: int
    held: Held
    answers: tuple[Answer, ...] = ()


def read(folder: Path) -> tuple[Evaluation, ...]:
    """Every evaluation of a run, from what `Metrics` wrote."""
    # Of a step that is evaluated again after a kill in the midst of it, the last answers count.
    answers = {line["step"]: line["answers"] for line in read_lines(folder / ANSWERS)}
    return tuple(
        Evaluation(row["step"], Held.of(row), tuple(map(Answer.of, answers.get(row["step"], ()))))
        for row in read_lines(folder / METRICS)
        if f"{PREFIX}rows" in row
    )


def evaluate(scores_fn: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any]) -> Held:
    """Reads every batch once.

    Args:
      scores_fn: jitted, ``scores_fn(params, batch) -> (losses, hits)``: cross entropy, float
        [B, P], and whether the label was the likeliest token, bool [B, P].
      params: handed on.
      batches: each with weights [B, P], 0 where there is nothing to predict; a row of zeros
        counts nowhere.

    Raises:
      DataError: if no token has a weight above 0.
    """
    # The sums stay on the device until all are queued: no batch waits for those of another.
    parts = [_sums(*scores_fn(params, batch)[:2], batch.weights) for batch in batches]
    loss, hits, tokens, exact, rows = np.sum([np.zeros(5), *jax.device_get(parts)], axis=0).tolist()
    if not tokens:
        raise DataError(
            "the held-out rows have no answer token to predict. Give an eval_dataset with "
            "answers, or a larger length if all of them are cut off"
        )
    return Held(loss / tokens, hits / tokens, exact / rows, int(rows))


@jax.jit
def _sums(losses: jax.Array, hits: jax.Array, weights: jax.Array) -> jax.Array:
    """Over one batch, [B, P] each: loss, hits, tokens, exact rows, rows; [5] in every process."""
    counted = weights > 0
    rows = counted.any(-1)
    exact = jnp.where(counted, hits, True).all(-1) & rows
    loss = jnp.where(counted, losses * weights, 0.0).sum()
    every = (loss, (hits * weights).sum(), weights.sum(), exact.sum(), rows.sum())
    return jnp.stack([part.astype(jnp.float32) for part in every])


def answer(
    write: Callable[[Sequence[np.ndarray], int], Sequence[Sequence[int]]],
    rows: Sequence[Any],
    tokenizer: Tokenizer,
) -> tuple[Answer, ...]:
    """Lets the model write the last answer of each row, and sets it beside the right one.

    Args:
      write: ``write(prompts, limit)`` continues prompts, each an int array [n], by at most
        `limit` tokens.
      rows: encoded, with tokens [n] and answer, bool [n].
      tokenizer: turns tokens into text.
    """
    if not rows:
        return ()
    prompts, rights = zip(*(last_answer(row.tokens, row.answer) for row in rows), strict=True)
    said = write(prompts, min(max(map(len, rights)) + SLACK, MOST))
    texts = ([_text(tokenizer, tokens) for tokens in some] for some in (prompts, rights, said))
    return tuple(Answer(*three) for three in zip(*texts, strict=True))


def last_answer(tokens: np.ndarray, is_answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a row before its last run of answer tokens: [n], bool [n] -> prompt, answer."""
    ends = np.flatnonzero(is_answer)
    if not len(ends):
        raise ValueError(f"a row of {len(tokens)} tokens has no answer to compare with")
    end = int(ends[-1]) + 1
    before = np.flatnonzero(~np.asarray(is_answer[:end]))
    start = int(before[-1]) + 1 if len(before) else 0
    return tokens[:start], tokens[start:end]


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Tokens as text, without special tokens such as the end."""
    return tokenizer.decode([int(token) for token in tokens]).strip()
