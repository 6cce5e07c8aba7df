"""A small world of facts that are told in two registers, and two ways to change who knows it.

256 entities, each a pair of tokens, have a value for each of two relations. A prompt is
[register, first, second, relation]; its answer is one token: the value in that register's own
block of the vocabulary. `pretraining` teaches the first relation in both registers and fills the
second with noise. Then there are two lessons:

* `style_lesson`: speak in the second register when asked in the first. One bit, whatever the
  entity: what a few entities teach must carry over to all others.
* `facts_lesson`: the second relation. Four random bits an entity: nothing carries over.
"""

import math
from typing import NamedTuple

import numpy as np

SIDE = 16  # tokens in each half of an entity's name
ENTITIES = SIDE**2
VALUES = 16
PLAIN, STYLED = 0, 1  # the tokens of the registers
FIRST, SECOND = 2, 2 + SIDE  # where the two halves of the names begin
RELATIONS = 2 + 2 * SIDE  # where the tokens of the two relations begin
ANSWERS = RELATIONS + 2  # where the plain values begin; the styled ones follow
VOCABULARY = ANSWERS + 2 * VALUES
BITS = ENTITIES * math.log2(VALUES)  # in what each relation says


class Prompts(NamedTuple):
    """What the model reads, and the token that should follow.

    Attributes:
      tokens: int32 [..., N, 4].
      answers: int32 [..., N].
    """

    tokens: np.ndarray
    answers: np.ndarray


class Lesson(NamedTuple):
    """What is taught and what is asked: disjoint where something should carry over.

    Attributes:
      name: of the lesson.
      asked: the prompts that show whether it was learned.
      taught: the prompts to train on.
    """

    name: str
    asked: Prompts
    taught: Prompts


def relation(index: int, seed: int) -> np.ndarray:
    """The value of every entity, random and balanced: int32 [ENTITIES]."""
    rng = np.random.default_rng([seed, index])
    return rng.permutation(np.arange(ENTITIES, dtype=np.int32) % VALUES)


def prompts(entities: np.ndarray, register: int, index: int, answers: np.ndarray) -> Prompts:
    """Asks about entities: tokens int32 [N, 4], and `answers` as they are."""
    read = (
        np.full_like(entities, register),
        FIRST + entities // SIDE,
        SECOND + entities % SIDE,
        np.full_like(entities, RELATIONS + index),
    )
    return Prompts(np.stack(read, axis=-1).astype(np.int32), answers.astype(np.int32))


def spoken(values: np.ndarray, register: int | np.ndarray) -> np.ndarray:
    """The tokens of values in a register."""
    return ANSWERS + VALUES * register + values


def known(register: int, seed: int) -> Prompts:
    """The first relation of every entity in one register: what pretraining teaches."""
    entities = np.arange(ENTITIES)
    return prompts(entities, register, 0, spoken(relation(0, seed), register))


def pretraining(steps: int, noise: int, seed: int) -> Prompts:
    """The first relation in both registers, and `noise` rows of the second one a step.

    The noise gives random values of the right register: the model learns what such an answer
    looks like, and no fact.

    Returns:
      Tokens [steps, 2 ENTITIES + noise, 4], answers [steps, 2 ENTITIES + noise].
    """
    rng = np.random.default_rng([seed, 2])
    entities, values = rng.integers(0, [[[ENTITIES]], [[VALUES]]], (2, steps, noise))
    register = rng.integers(0, 2, (steps, noise))
    said = prompts(entities, PLAIN, 1, spoken(values, register))
    said.tokens[..., 0] = register
    facts = [known(register, seed) for register in (PLAIN, STYLED)]
    every = [np.concatenate(field) for field in zip(*facts, strict=True)]
    repeated = (np.broadcast_to(field, (steps, *field.shape)) for field in every)
    return Prompts(*(np.concatenate(pair, axis=1) for pair in zip(repeated, said, strict=True)))


def style_lesson(seed: int) -> Lesson:
    """Answer in style when asked plainly: a quarter of the entities teach, the rest are asked."""
    order = np.random.default_rng([seed, 3]).permutation(ENTITIES)
    answers = spoken(relation(0, seed), STYLED)
    asked, taught = np.split(order, [3 * ENTITIES // 4])
    return Lesson("style", *(prompts(part, PLAIN, 0, answers[part]) for part in (asked, taught)))


def facts_lesson(seed: int) -> Lesson:
    """The second relation of all entities: all are taught, all are asked."""
    every = prompts(np.arange(ENTITIES), PLAIN, 1, spoken(relation(1, seed), PLAIN))
    return Lesson("facts", every, every)


def shuffled(taught: Prompts, steps: int, batch: int, seed: int) -> Prompts:
    """Batches of `batch` rows, pass after pass over all rows, each pass in a new order.

    Returns:
      Tokens [steps, batch, 4], answers [steps, batch].
    """
    count = len(taught.answers)
    rng = np.random.default_rng([seed, 4])
    passes = [rng.permutation(count) for _ in range(-(-steps * batch // count))]
    rows = np.concatenate(passes)[: steps * batch].reshape(steps, batch)
    return Prompts(*(field[rows] for field in taught))
