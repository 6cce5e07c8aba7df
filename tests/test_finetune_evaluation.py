"""Held-out numbers and generated answers: right by hand, and as generation would have it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import rslora_jax as rl
from finetune import evaluation
from finetune.batches import fixed
from finetune.encoding import Encoded
from finetune.evaluation import Answer, Held, evaluate
from finetune.rows import DataError
from finetune.step import scores_of
from llama import Llama, LlamaConfig

EOS = 1
CONFIG = LlamaConfig(24, d_model=16, d_ff=32, layers=2, heads=2, kv_heads=1, head_dim=8)


class Batch(NamedTuple):
    weights: np.ndarray
    losses: np.ndarray
    hits: np.ndarray


def known(params, batch):
    """Scores that the batch brings along."""
    return jnp.asarray(batch.losses, jnp.float32), jnp.asarray(batch.hits, bool)


def encoded(prompt, right):
    return Encoded(
        np.array([*prompt, *right], np.int32), np.arange(len(prompt + right)) >= len(prompt)
    )


def test_losses_hits_and_rows_are_counted_where_there_is_weight():
    batches = [
        Batch(
            [[1, 1, 0], [1, 0, 0]],
            [[1.0, 2.0, 99.0], [3.0, math.nan, 99.0]],
            [[1, 1, 0], [0, 1, 1]],
        ),
        Batch([[1, 1, 1], [0, 0, 0]], [[1.0, 1.0, 4.0], [9.0, 9.0, 9.0]], [[1, 0, 1], [1, 1, 1]]),
    ]
    batches = [Batch(*(np.array(field, np.float32) for field in batch)) for batch in batches]
    held = evaluate(known, None, batches)
    assert held == Held(loss=12 / 6, token_accuracy=4 / 6, exact_match=1 / 3, rows=3)
    assert held == evaluate(known, None, reversed(batches))
    assert held.metrics() == {
        "held_out/loss": 2.0,
        "held_out/token_accuracy": 4 / 6,
        "held_out/exact_match": 1 / 3,
        "held_out/rows": 3,
    }
    assert Held.of(held.metrics()) == held


def test_a_loss_that_is_not_finite_stays_so():
    held = evaluate(known, None, [Batch(np.ones((1, 2)), np.full((1, 2), np.inf), np.ones((1, 2)))])
    assert math.isinf(held.loss)
    assert math.isnan(Held.of({**held.metrics(), "held_out/loss": None}).loss)


@pytest.mark.parametrize("batches", [[], [Batch(*np.zeros((3, 2, 4)))]])
def test_without_an_answer_to_predict_there_is_an_error(batches):
    with pytest.raises(DataError, match="held-out rows have no answer token"):
        evaluate(known, None, batches)


def test_the_last_answer_of_a_conversation_is_what_is_asked():
    tokens, answer = np.arange(8), np.array([0, 0, 1, 1, 0, 1, 1, 0], bool)
    prompt, right = evaluation.last_answer(tokens, answer)
    assert prompt.tolist() == [0, 1, 2, 3, 4] and right.tolist() == [5, 6]
    with pytest.raises(ValueError, match="8 tokens has no answer"):
        evaluation.last_answer(tokens, np.zeros(8, bool))


def words():
    made = Tokenizer(models.WordLevel({f"w{k}": k for k in range(24)}, "w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["w1"])
    return made


def test_answers_are_shown_as_text_beside_the_right_ones():
    asked = []

    def write(prompts, limit):
        asked.append(([prompt.tolist() for prompt in prompts], limit))
        return [[7, EOS], [9, 9]]

    rows = [encoded([2, 3], [7, EOS]), encoded([4], [8, 8, EOS])]
    assert evaluation.answer(write, rows, words()) == (
        Answer("w2 w3", "w7", "w7"),
        Answer("w4", "w8 w8", "w9 w9"),
    )
    assert asked == [([[2, 3], [4]], 3 + evaluation.SLACK)]
    assert evaluation.answer(write, [], words()) == ()


def greedy(apply, params, prompt, count):
    """Generates by reading everything again for each token."""
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(prompt)] = prompt
    for place in range(len(prompt), len(prompt) + count):
        tokens[0, place] = np.argmax(apply(params, tokens)[0, place - 1])
    return tokens[0, len(prompt) : place + 1].tolist()


def test_exact_match_is_what_greedy_generation_gets_right():
    model, tokens = Llama(CONFIG), np.ones((2, 8), np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    config, key = rl.LoraConfig(rank=2, alpha=4.0), jax.random.key(1)
    params, apply, _ = rl.adapt(model.apply, variables, tokens, config=config, key=key)
    apply = jax.jit(apply, static_argnames="method")
    prompts = [[2, 3, 4], [5, 6], [7, 8, 9, 10]]
    rights = [greedy(apply, params, prompt, 3) for prompt in prompts]
    rights[1][0] = (rights[1][0] + 1) % 24
    rows = [encoded(prompt, right) for prompt, right in zip(prompts, rights, strict=True)]
    held = evaluate(
        lambda params, batch: scores_of(apply, params, batch), params, fixed(rows, 2, 8)
    )
    assert held.rows == 3 and held.exact_match == pytest.approx(2 / 3)
    assert 6 / 9 <= held.token_accuracy < 1
