"""Generation with a cache, against whole forward passes without one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from attention import Cache
from generate import Answers, empty_cache, generate, left_padded
from llama import SPECS, Llama, LlamaConfig
from rslora_jax.sharding import shard
from tests.quick import compiled

TINY = LlamaConfig(
    vocab_size=24, d_model=16, d_ff=20, layers=2, heads=4, kv_heads=2, head_dim=4, tied=True
)
VARIANTS = {
    "plain": TINY,
    "windowed": dataclasses.replace(TINY, sliding_window=3, tied=False, qkv_bias=True),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
LIMIT = 6


@functools.cache
def adapted(config, dtype=jnp.float32):
    """Parameters with nonzero factors, the adapted function and its sites."""
    model = Llama(config, dtype)
    structs = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))
    wanted = rl.LoraConfig(rank=2, alpha=3.0, targets=".*(kernel|embedding)")
    example = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    found = rl.adapt(model.apply, structs, example, config=wanted, key=jax.random.key(0))
    rng = np.random.default_rng(1)
    return found._replace(
        params=jax.tree.map(lambda s: np.float32(rng.normal(0, 0.4, s.shape)), found.params)
    )


@functools.cache
def whole(config):
    return compiled(adapted(config).apply)


def greedy_without_a_cache(config, prompt, limit):
    """One whole forward pass for each token."""
    row = np.zeros((1, 12), np.int32)
    row[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + limit):
        row[0, at] = whole(config)(adapted(config).params, row)[0, at - 1].argmax()
    return row[0, len(prompt) : len(prompt) + limit].tolist()


def continued(config, prompts, *, width=5, **options):
    """Answers of the adapted tiny model."""
    tokens, lengths = left_padded(prompts, width)
    cache = empty_cache(config, len(prompts), width + LIMIT)
    found = adapted(config)
    return generate(found.apply, found.params, cache, tokens, lengths, limit=LIMIT, **options)


@functools.cache
def greedy(name):
    return continued(VARIANTS[name], PROMPTS).rows()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_padded_batch_continues_as_each_prompt_alone_without_a_cache(name):
    expected = [greedy_without_a_cache(VARIANTS[name], row, LIMIT) for row in PROMPTS]
    assert greedy(name) == expected


def test_cached_logits_of_padded_rows_are_those_of_whole_rows():
    config = VARIANTS["windowed"]
    found = adapted(config)
    rows = np.random.default_rng(2).integers(0, TINY.vocab_size, (2, 12), np.int32)
    padded = np.where(np.arange(12) < 3, 0, np.roll(rows, 3, axis=1))
    tokens = np.stack([rows[0], padded[1]])
    expected = np.asarray(whole(config)(found.params, rows))
    expected = np.stack([expected[0], np.roll(expected[1], 3, axis=0)])
    cache = empty_cache(config, 2, 13)._replace(starts=jnp.array([0, 3]))
    step = compiled(lambda params, tokens, cache: found.apply(params, tokens, cache=cache))
    parts = []
    for part in (tokens[:, :5], tokens[:, 5:7], tokens[:, 7:9]):
        logits, cache = step(found.params, part, cache)
        parts.append(logits)
    logits = np.concatenate(parts, axis=1)
    assert int(cache.used) == 9
    np.testing.assert_allclose(logits[0], expected[0, :9], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(logits[1, 3:], expected[1, 3:9], rtol=1e-5, atol=2e-5)


def test_bfloat16_generation_takes_tokens_that_are_likeliest_up_to_rounding():
    found = adapted(TINY, jnp.bfloat16)
    tokens, lengths = left_padded([*PROMPTS[:1], [1]])
    cache = empty_cache(TINY, 2, 11, jnp.bfloat16)
    answers = generate(found.apply, found.params, cache, tokens, lengths, limit=LIMIT)
    told, _ = jax.eval_shape(lambda cache: found.apply(found.params, tokens, cache=cache), cache)
    assert told.dtype == jnp.float32, "as in `scores`: bfloat16 would round the likeliest away"
    row = np.zeros((1, 12), np.int32)
    row[0, :11] = [*PROMPTS[0], *answers.rows()[0]]
    logits = np.asarray(whole(TINY)(found.params, row)[0, 4:10])
    chosen = np.take_along_axis(logits, row[0, 5:11, None], axis=1)[:, 0]
    assert np.all(logits.max(-1) - chosen <= 0.05 * np.abs(logits).max())


def test_other_adapters_give_other_answers_of_the_same_program():
    found = adapted(TINY)
    tokens, lengths = left_padded(PROMPTS)
    flipped = jax.tree.map_with_path(
        lambda path, leaf: -leaf if path[-1].key == "b" else leaf, found.params.lora
    )
    params, cache = found.params._replace(lora=flipped), empty_cache(TINY, 3, 5 + LIMIT)
    answers = generate(found.apply, params, cache, tokens, lengths, limit=LIMIT)
    assert answers.rows() != greedy("plain")


# A model that says the next number, scaled by its parameter.


def count(calls):
    """Its apply function, which notes when it is traced and when it runs."""

    def apply(params, tokens, *, positions=None, cache):
        calls.append("traced")
        jax.debug.callback(lambda: calls.append("run"))
        newest = tokens[:, -1:]
        return params * jax.nn.one_hot(newest + 1, 24), cache

    return apply


def counted(calls, params=1.0, **options):
    cache = empty_cache(dataclasses.replace(TINY, layers=1), 2, 10)
    return generate(count(calls), params, cache, [[0, 3], [7, 8]], [1, 2], **options)


def test_answers_end_at_a_stop_token_and_the_others_go_on():
    answers = counted([], limit=5, eos=(6, 23))
    assert answers.rows() == [[4, 5], [9, 10, 11, 12, 13]]
    np.testing.assert_array_equal(answers.tokens[0], [4, 5, 0, 0, 0])


def test_the_loop_ends_once_all_rows_have_ended():
    calls = []
    answers = counted(calls, limit=8, eos=(5, 10))
    assert answers.rows() == [[4], [9]]
    jax.effects_barrier()
    assert calls.count("run") == 2


def test_parameters_and_temperatures_are_arguments_of_one_compiled_program():
    calls, key = [], jax.random.key(0)
    apply, cache = count(calls), empty_cache(dataclasses.replace(TINY, layers=1), 1, 6)
    options = {"limit": 5, "key": key}
    prompt = ([[1]], [1])
    generate(apply, jnp.float32(1), cache, *prompt, temperature=2.0, **options)
    traced = calls.count("traced")
    found = generate(apply, jnp.float32(99), cache, *prompt, temperature=1.0, top_p=0.9, **options)
    assert found.rows() == [[2, 3, 4, 5, 6]]
    assert calls.count("traced") == traced


def test_drawn_tokens_follow_the_temperature_and_the_nucleus():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])

    def apply(params, tokens, *, positions=None, cache):
        return jnp.broadcast_to(params, (len(tokens), 1, 4)), cache

    def shares(**options):
        cache = empty_cache(dataclasses.replace(TINY, layers=1, kv_heads=1, head_dim=1), 500, 9)
        tokens, lengths = left_padded([[0]] * 500)
        logits, key = jnp.log(probabilities), jax.random.key(0)
        answers = generate(apply, logits, cache, tokens, lengths, limit=8, key=key, **options)
        return np.bincount(np.ravel(answers.tokens), minlength=4) / 4000

    np.testing.assert_allclose(shares(temperature=1.0), probabilities, atol=0.03)
    sharp = probabilities**2 / np.sum(probabilities**2)
    np.testing.assert_allclose(shares(temperature=0.5), sharp, atol=0.03)
    nucleus = shares(temperature=1.0, top_p=0.7)
    np.testing.assert_allclose(nucleus, [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_array_equal(shares(temperature=1.0, top_p=0.1), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(temperature=0.0), [1, 0, 0, 0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parameters_that_lie_on_a_mesh_give_the_same_answers(kind):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    rows = P(("data", "fsdp"))
    found = adapted(TINY)
    apply = rl.attach(Llama(TINY, activations=rows).apply, found.sites)
    tokens, lengths = left_padded([*PROMPTS, PROMPTS[0]])
    heads = NamedSharding(mesh, P(None, *rows, None, "tensor"))
    places = Cache(heads, heads, NamedSharding(mesh, rows), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        params = shard(found.params, mesh, found.sites, SPECS)
        cache = jax.device_put(empty_cache(TINY, 4, 5 + LIMIT), places)
        prompts = jax.device_put(tokens, NamedSharding(mesh, rows))
        answers = generate(apply, params, cache, prompts, lengths, limit=LIMIT)
    assert answers.rows() == [*greedy("plain"), greedy("plain")[0]]


def test_prompts_are_padded_on_the_left():
    tokens, lengths = left_padded([[1, 2, 3], [4]], 4)
    np.testing.assert_array_equal(tokens, [[0, 1, 2, 3], [0, 0, 0, 4]])
    np.testing.assert_array_equal(lengths, [3, 1])


def test_answers_are_read_as_lists():
    answers = Answers(np.array([[5, 6, 0], [7, 0, 0]]), np.array([2, 0]))
    assert answers.rows() == [[5, 6], []]


def test_a_cache_takes_no_segments():
    cache, row = empty_cache(TINY, 1, 2), np.ones((1, 1), np.int32)
    with pytest.raises(ValueError, match="segments and cache exclude each other"):
        Llama(TINY).apply(adapted(TINY).params.base, row, segments=row, cache=cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1, 2], []]}, "prompt 1 has 0 tokens; each must have from 1 to the 5"),
        ({"prompts": [[1] * 6]}, "prompt 0 has 6 tokens; each must have from 1 to the 5"),
        ({"temperature": -1.0}, r"temperature must be 0 or above, found -1\.0"),
        ({"temperature": 0.5}, r"temperature=0\.5 draws tokens: pass key="),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, found 0\.0"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_found(change, message):
    with pytest.raises(ValueError, match=message):
        continued(TINY, **{"prompts": PROMPTS} | change)


@pytest.mark.parametrize(
    ("limit", "message"),
    [(0, "limit must be at least 1, found 0"), (4, "room for 5 tokens, and 2 of the prompts")],
)
def test_limits_that_do_not_fit_are_refused(limit, message):
    cache = empty_cache(TINY, 1, 5)
    with pytest.raises(ValueError, match=message):
        generate(Llama(TINY).apply, None, cache, [[1, 2]], [2], limit=limit)
