"""How well a language model does: exact match, losses, and a few answers in its own words.

`predict(params, tokens, positions=...)` is any function that gives logits [N, P, vocab].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from facts import Batch

Predict = Callable[..., jax.Array]


class Scores(NamedTuple):
    """Exact match from 0 to 1, losses in nats per token, and decoded answers."""

    exact: float
    loss: float
    unrelated: float
    answers: list[str]


class Exam(NamedTuple):
    """What the model is asked.

    Attributes:
      facts: for exact match and loss.
      shown: the few facts whose answers are decoded.
      unrelated: text whose loss shows what is forgotten.
      tokenizer: turns tokens back into text.
    """

    facts: Batch
    shown: Batch
    unrelated: Batch
    tokenizer: Tokenizer


def examine(predict: Predict, params: Any, exam: Exam) -> Scores:
    """Ask everything once."""
    facts, _, unrelated, tokenizer = exam
    logits = predict(params, facts.tokens, positions=facts.positions)
    other = predict(params, unrelated.tokens, positions=unrelated.positions)
    return Scores(
        exact_match(logits, facts.labels),
        float(cross_entropy(logits, facts.labels)),
        float(cross_entropy(other, unrelated.labels)),
        tokenizer.decode_batch(greedy(predict, params, exam.shown).tolist()),
    )


def cross_entropy(logits: jax.Array, labels: jax.Array | np.ndarray) -> jax.Array:
    """Mean loss in nats per token: logits [N, P, vocab], labels [N, P] -> scalar."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def exact_match(logits: jax.Array, labels: np.ndarray) -> float:
    """Share of rows that greedy decoding gets right: logits [N, P, vocab], labels [N, P].

    The logits come from reading the right answer, and still this is exact: up to its first
    mistake greedy decoding reads the same tokens, and after it the row is wrong anyway.
    """
    return float(np.mean(np.all(np.argmax(logits, -1) == labels, axis=-1)))


def greedy(predict: Predict, params: Any, batch: Batch) -> np.ndarray:
    """Continue each prompt by as many tokens as its answer has: int32 [N, P]."""
    rows = np.arange(len(batch.tokens))
    tokens = np.pad(batch.tokens, ((0, 0), (0, 1)))
    # What still stands behind a position cannot be seen from it: attention is causal.
    for column, position in enumerate(batch.positions.T):
        logits = predict(params, tokens[:, :-1], positions=batch.positions)
        tokens[rows, position + 1] = np.argmax(logits[:, column], -1)
    return np.take_along_axis(tokens, batch.positions + 1, axis=1)
