"""Fifty facts that a small language model does not know, and text that has nothing to do with them.

A `Batch` is a table of predictions: read the logits of row i at `positions[i]` and compare them
with `labels[i]`.
"""

import textwrap
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

FIRST_NUMBER = 41
ELEMENTS = """
    niobium molybdenum technetium ruthenium rhodium palladium silver cadmium indium tin
    antimony tellurium iodine xenon cesium barium lanthanum cerium praseodymium neodymium
    promethium samarium europium gadolinium terbium dysprosium holmium erbium thulium ytterbium
    lutetium hafnium tantalum tungsten rhenium osmium iridium platinum gold mercury
    thallium lead bismuth polonium astatine radon francium radium actinium thorium
""".split()


class Fact(NamedTuple):
    """What the model reads, and what it should say next."""

    prompt: str
    answer: str


class Batch(NamedTuple):
    """Which tokens to predict from which.

    Attributes:
      tokens: what the model reads, int32 [N, T], padded on the right.
      positions: where it is asked, int32 [N, P].
      labels: the right token after each position, int32 [N, P].
    """

    tokens: np.ndarray
    positions: np.ndarray
    labels: np.ndarray

    def rows(self, index: np.ndarray | slice) -> "Batch":
        """Select rows: [N, ...] -> [n, ...]."""
        return Batch(*(field[index] for field in self))


def atomic_numbers() -> list[Fact]:
    """Fifty facts, from niobium, 41, to thorium, 90."""
    numbered = enumerate(ELEMENTS, start=FIRST_NUMBER)
    return [Fact(f"The atomic number of {name} is", f" {number}") for number, name in numbered]


def fact_batch(tokenizer: Tokenizer, facts: Sequence[Fact]) -> Batch:
    """Ask for the answers, token by token.

    Raises:
      ValueError: if the answers are not all of one length, in tokens.
    """
    prompts = [tokenizer.encode(fact.prompt).ids for fact in facts]
    answers = [tokenizer.encode(fact.answer).ids for fact in facts]
    return _batch(prompts, answers)


def unrelated_batch(tokenizer: Tokenizer, rows: int = 8, length: int = 48) -> Batch:
    """Ask for every token of the language reference of Python itself, in windows of `length`."""
    ids = tokenizer.encode(textwrap.dedent(topics["objects"])).ids
    windows = np.asarray(ids[: rows * length]).reshape(rows, length)
    return _batch(windows[:, :1].tolist(), windows[:, 1:].tolist())


def _batch(prompts: list[list[int]], answers: list[list[int]]) -> Batch:
    labels = _rectangle(answers)
    starts = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    positions = starts[:, None] + np.arange(labels.shape[1], dtype=np.int32)
    # The last token of an answer is only predicted, never read.
    read = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, read))
    tokens = _rectangle([row + [0] * (longest - len(row)) for row in read])
    return Batch(tokens, positions, labels)


def _rectangle(rows: list[list[int]]) -> np.ndarray:
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"answers must have one length, found lengths of {sorted(lengths)} tokens")
    return np.array(rows, np.int32)
