"""The example's Llama against closed forms and an unrolled computation in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama import Llama, LlamaConfig, RopeScaling, rope_frequencies, rotate
from tests.quick import compiled as quick
from tests.quick import run

TINY = LlamaConfig(
    vocab_size=23,
    d_model=12,
    d_ff=20,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=6,
    rope_theta=100.0,
    norm_eps=1e-5,
    tied=True,
)
TOKENS = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 7), np.int32)
VARIANTS = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tied=False),
    "biases": dataclasses.replace(TINY, attention_bias=True, mlp_bias=True),
    "biases of q, k and v": dataclasses.replace(TINY, qkv_bias=True),
    "sliding window": dataclasses.replace(TINY, sliding_window=3),
    "one kv head": dataclasses.replace(TINY, kv_heads=1),
    "scaled rope": dataclasses.replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)),
}


@functools.cache
def compiled(config, dtype=jnp.float32):
    """The apply function of a Llama, compiled once for the whole file."""
    return quick(Llama(config, dtype=dtype).apply)


@functools.cache
def variables_of(config):
    """Random parameters, none of them zero or one: biases and norms must count."""
    structs = jax.eval_shape(Llama(config).init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda s: np.float32(rng.normal(0, 0.3, s.shape)), structs)


def numpy_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def numpy_linear(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def numpy_rotate(x, frequencies):
    """Each pair as a complex number, turned by position times frequency: [T, heads, head_dim]."""
    half = x.shape[-1] // 2
    turns = np.exp(1j * np.arange(x.shape[0])[:, None, None] * frequencies)
    turned = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([turned.real, turned.imag], -1)


def numpy_attention(x, layer, c):
    """Head by head and query by query: [T, d] -> [T, d]."""
    frequencies = np.asarray(rope_frequencies(c), np.float64)
    q = numpy_linear(x, layer["q_proj"]).reshape(len(x), c.heads, c.head_dim)
    k = numpy_linear(x, layer["k_proj"]).reshape(len(x), c.kv_heads, c.head_dim)
    v = numpy_linear(x, layer["v_proj"]).reshape(len(x), c.kv_heads, c.head_dim)
    q, k = numpy_rotate(q, frequencies), numpy_rotate(k, frequencies)
    mixed = np.zeros_like(q)
    for t in range(len(x)):
        for head in range(c.heads):
            shared = head // (c.heads // c.kv_heads)
            seen = slice(max(0, t + 1 - (c.sliding_window or len(x))), t + 1)
            scores = np.exp(k[seen, shared] @ q[t, head] / np.sqrt(c.head_dim))
            mixed[t, head] = scores @ v[seen, shared] / scores.sum()
    return numpy_linear(mixed.reshape(len(x), -1), layer["o_proj"])


def numpy_llama(variables, tokens, c):
    """One row of tokens, layer by layer, in float64: [T] -> [T, vocab]."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    embedding = params["embed_tokens"]["embedding"]
    x = embedding[np.asarray(tokens)]
    for index in range(c.layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        seen = numpy_norm(x, layer["input_layernorm"]["scale"], c.norm_eps)
        x = x + numpy_attention(seen, layer["self_attn"], c)
        seen = numpy_norm(x, layer["post_attention_layernorm"]["scale"], c.norm_eps)
        gate = numpy_linear(seen, layer["mlp"]["gate_proj"])
        up = numpy_linear(seen, layer["mlp"]["up_proj"])
        x = x + numpy_linear(gate / (1 + np.exp(-gate)) * up, layer["mlp"]["down_proj"])
    x = numpy_norm(x, params["norm"]["scale"], c.norm_eps)
    return x @ (embedding.T if c.tied else params["lm_head"]["kernel"])


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_scanned_model_equals_an_unrolled_one_in_numpy(config):
    variables = variables_of(config)
    logits = compiled(config)(variables, TOKENS)
    expected = np.stack([numpy_llama(variables, row, config) for row in TOKENS])
    np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-5)


def test_rope_turns_the_first_pair_by_one_radian_per_position():
    x = jnp.zeros((1, 4, 1, 6)).at[..., 0].set(1.0)
    angles = jnp.outer(jnp.arange(4), rope_frequencies(TINY))
    turned = rotate(x, angles)[0, :, 0]
    np.testing.assert_allclose(turned[:, 0], np.cos(np.arange(4)), atol=1e-6)
    np.testing.assert_allclose(turned[:, 3], np.sin(np.arange(4)), atol=1e-6)
    np.testing.assert_array_equal(turned[:, [1, 2, 4, 5]], 0.0)


def test_rope_frequencies_fall_geometrically_from_one():
    expected = 100.0 ** -np.array([0.0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(rope_frequencies(TINY), expected, rtol=1e-6)


def test_scaled_rope_keeps_fast_pairs_and_slows_slow_ones():
    config = dataclasses.replace(
        TINY, head_dim=64, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)
    )
    plain = np.asarray(rope_frequencies(dataclasses.replace(config, rope_scaling=None)))
    ratio = np.asarray(rope_frequencies(config)) / plain
    wavelengths = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelengths < 8192 / 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelengths > 8192], 1 / 8, rtol=1e-6)
    between = ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert between.size
    assert np.all((between > 1 / 8) & (between < 1.0))


def test_a_token_never_sees_what_follows_it():
    variables = variables_of(TINY)
    changed = np.where(np.arange(7) < 4, TOKENS, (TOKENS + 1) % TINY.vocab_size)
    before = compiled(TINY)(variables, TOKENS)
    after = compiled(TINY)(variables, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.any(before[:, 4:] != after[:, 4:], axis=-1))


def test_grouped_queries_equal_full_attention_with_repeated_key_heads():
    grouped, full = TINY, dataclasses.replace(TINY, kv_heads=TINY.heads)
    variables = variables_of(grouped)
    attention = dict(variables["params"]["layers"]["self_attn"])
    for name in ("k_proj", "v_proj"):
        kernel = attention[name]["kernel"].reshape(3, 12, grouped.kv_heads, grouped.head_dim)
        kernel = np.repeat(kernel, grouped.heads // grouped.kv_heads, axis=2)
        attention[name] = {"kernel": kernel.reshape(3, 12, -1)}
    layers = {**variables["params"]["layers"], "self_attn": attention}
    repeated = {"params": {**variables["params"], "layers": layers}}
    expected = compiled(grouped)(variables, TOKENS)
    found = compiled(full)(repeated, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_positions_pick_logits_without_computing_the_others():
    variables = variables_of(TINY)
    positions = np.array([[6, 0], [2, 2]])
    logits = compiled(TINY)(variables, TOKENS)
    picked = quick(functools.partial(Llama(TINY).apply, positions=positions))(variables, TOKENS)
    assert picked.shape == (2, 2, TINY.vocab_size)
    expected = np.take_along_axis(logits, positions[..., None], axis=1)
    np.testing.assert_allclose(picked, expected, rtol=1e-5, atol=1e-6)


def test_only_the_biases_that_were_asked_for_exist():
    attention = variables_of(VARIANTS["biases of q, k and v"])["params"]["layers"]["self_attn"]
    assert {name for name, layer in attention.items() if "bias" in layer} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }


def test_rematerialization_changes_neither_logits_nor_gradients():
    variables = variables_of(TINY)

    def loss(variables, remat):
        return jnp.sum(jnp.sin(Llama(TINY, remat=remat).apply(variables, TOKENS)))

    def results(remat):
        return run(jax.value_and_grad(functools.partial(loss, remat=remat)), variables)

    plain, plain_grads = results(False)
    for remat in (True, "dots"):
        found, grads = results(remat)
        np.testing.assert_allclose(found, plain, rtol=1e-5)
        for one, expected in zip(*map(jax.tree.leaves, (grads, plain_grads)), strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_activations_give_bfloat16_logits_near_the_float32_ones():
    variables = variables_of(TINY)
    logits = compiled(TINY, jnp.bfloat16)(variables, TOKENS)
    assert logits.dtype == jnp.bfloat16
    expected = compiled(TINY)(variables, TOKENS)
    gap = jnp.max(jnp.abs(logits.astype(jnp.float32) - expected)) / jnp.max(jnp.abs(expected))
    assert gap < 0.05


def test_query_heads_that_key_heads_cannot_share_are_refused():
    with pytest.raises(ValueError, match="heads=4 must be a multiple of kv_heads=3"):
        dataclasses.replace(TINY, kv_heads=3)


def test_a_window_without_a_token_is_refused():
    with pytest.raises(
        ValueError, match="sliding_window=0 must be at least 1: a token sees itself"
    ):
        dataclasses.replace(TINY, sliding_window=0)


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="remat='dot' is not known: use True, False, none, full"):
        Llama(TINY, remat="dot").init(jax.random.key(0), TOKENS)


# Rows that hold several texts.


PACKED = np.array([[3, 9, 1, 4, 7, 7, 2, 0], [5, 6, 8, 2, 1, 1, 0, 0]])
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3, 0, 0]])
OFFSETS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 0, 1, 2, 0, 0]])


@pytest.mark.parametrize("name", ["untied", "sliding window"])
def test_texts_packed_into_a_row_have_the_losses_of_each_alone(name):
    variables, labels = variables_of(VARIANTS[name]), (PACKED * 5 + 3) % TINY.vocab_size
    positions = np.broadcast_to(np.arange(8), (2, 8))

    @quick
    def score(*args):
        return Llama(VARIANTS[name]).apply(*args[:4], **args[4], method="scores")

    packed = score(variables, PACKED, labels, positions, {"segments": SEGMENTS, "offsets": OFFSETS})
    alone = np.zeros((2, 8), np.float32)
    for row, segment in [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]:
        (at,) = np.nonzero(SEGMENTS[row] == segment)
        text, wanted = np.zeros((2, 2, 8), np.int64)
        text[:, : len(at)], wanted[:, : len(at)] = PACKED[row, at], labels[row, at]
        losses = score(variables, text, wanted, positions, {}).losses
        alone[row, at] = losses[0, : len(at)]
    real = SEGMENTS > 0
    np.testing.assert_allclose(packed.losses[real], alone[real], rtol=2e-6, atol=2e-6)
