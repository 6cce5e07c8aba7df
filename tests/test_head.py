"""Losses of which only a block's logits exist at a time, against those of whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rslora_jax as rl
from head import score
from llama import Llama, LlamaConfig
from tests.quick import run

TINY = LlamaConfig(
    vocab_size=23, d_model=12, d_ff=20, layers=2, heads=2, kv_heads=1, head_dim=6, tied=True
)
TOKENS = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 8), np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 6], [6, 0, 5, 1, 4, 2, 3]])
LABELS = np.take_along_axis(TOKENS, POSITIONS + 1, axis=1)


def numbers(structs, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: np.float32(rng.normal(0, 0.3, s.shape)), structs)


def test_scores_of_an_adapted_model_are_those_of_its_logits_and_so_are_their_gradients():
    model = Llama(TINY, remat=True, logits_bytes=2 * 4 * 2 * TINY.vocab_size)  # two positions
    structs = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    config = rl.LoraConfig(rank=2, alpha=3.0, targets=".*(kernel|embedding)")
    params, apply, _ = rl.adapt(model.apply, structs, TOKENS, config=config, key=jax.random.key(0))
    params = rl.LoraParams(*map(numbers, params, (1, 2)))

    def whole(params):
        logits = apply(params, TOKENS, positions=POSITIONS)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return jnp.sum(jnp.sin(losses)), (losses, logits.argmax(-1) == LABELS)

    def in_blocks(params):
        scores = apply(params, TOKENS, LABELS, POSITIONS, method="scores")
        return jnp.sum(jnp.sin(scores.losses)), tuple(scores)

    results = [run(rl.value_and_grad(loss, has_aux=True), params) for loss in (in_blocks, whole)]
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_likeliest_label_is_a_hit_and_others_are_not():
    kernel = np.eye(3, dtype=np.float32)
    x = np.array([[[1, 2, 0], [3, 0, 0], [0, 0, 5]]], np.float32)
    found = score(x, kernel, np.array([[1, 1, 2]]), 12)
    np.testing.assert_array_equal(found.hits, [[True, False, True]])


def test_losses_are_float32_where_activations_are_bfloat16():
    x, kernel = jnp.ones((1, 2, 4), jnp.bfloat16), jnp.ones((4, 300), jnp.bfloat16)
    losses = score(x, kernel, np.zeros((1, 2), int), 2**20).losses
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.log(300), rtol=1e-6)


def test_blocks_give_the_whole_losses_and_gradients_in_a_fraction_of_the_memory():
    shape = (2, 255, 8)  # the last of 16 blocks is not full
    rng = np.random.default_rng(3)
    x, kernel = np.float32(rng.normal(size=shape)), np.float32(rng.normal(size=(8, 2048)))
    labels = rng.integers(0, 2048, shape[:2])
    whole = 4 * labels.size * 2048

    def compiled(logits_bytes):
        def loss(x, kernel):
            losses = score(x, kernel, labels, logits_bytes).losses
            return jnp.sum(jnp.sin(losses)), losses

        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        return step.lower(x, kernel).compile()

    steps = compiled(whole), compiled(whole // 16)
    results = [step(x, kernel) for step in steps]
    for expected, found in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    temporaries = [step.memory_analysis().temp_size_in_bytes for step in steps]
    assert temporaries[0] > whole
    assert temporaries[1] < whole / 4
