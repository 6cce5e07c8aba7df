"""The planner's models: published sizes, config.json files, and the function itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama as example
from rslora_jax.paths import AdapterError
from rslora_jax.plan import llama
from rslora_jax.plan.layout import Layout
from rslora_jax.plan.models import MODELS, find_model
from rslora_jax.plan.sizes import Model, RopeScaling
from tests.quick import compiled

TINY = Model("tiny", 24, 12, 20, 3, 4, 2, 6, theta=100.0)
TOKENS = np.random.default_rng(1).integers(0, TINY.vocab, (2, 8), np.int32)
BLOCKS = Layout("full", block=2, dtype=jnp.float32)
VARIANTS = {
    "tied": (dataclasses.replace(TINY, tied=True), Layout("none", block=8, dtype=jnp.float32)),
    "biases": (dataclasses.replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True), BLOCKS),
    "scaled rope": (dataclasses.replace(TINY, scaling=RopeScaling(8.0, original=64)), BLOCKS),
}


LLAMA3 = {"rope_type": "llama3"}


def weights(model):
    """Random parameters, none of them zero or one: biases and norms must count."""
    rng = np.random.default_rng(2)
    structs = llama.structs(model, jnp.float32)
    return jax.tree.map(lambda s: np.float32(rng.normal(0, 0.3, s.shape)), structs)


def as_example(m):
    """The same sizes for `examples/llama.py`."""
    s = m.scaling
    rope = s and example.RopeScaling(s.factor, s.low, s.high, s.original)
    sizes = (m.vocab, m.width, m.ff, m.layers, m.heads, m.kv_heads, m.head_dim)
    rest = (m.theta, m.eps, m.tied, m.o_bias, m.mlp_bias, rope)
    return example.Llama(example.LlamaConfig(*sizes, *rest))


def written(folder, **changes):
    """A config.json of Llama-3.2-1B with changes; None leaves a key out."""
    config = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    } | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


# Published totals: the number of parameters that the Hub shows for each checkpoint.
TOTALS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_model_has_as_many_parameters_as_published():
    assert {name: model.parameters for name, model in MODELS.items()} == TOTALS
    for model in MODELS.values():
        sizes = [leaf.size for leaf in jax.tree.leaves(llama.structs(model))]
        assert sum(sizes) == model.parameters


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Llama 3.1 8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-405B", "llama-3.1-405b"),
        ("llama3.2:1b", "llama-3.2-1b"),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2-1.7b"),
    ],
)
def test_names_are_forgiving(name, found):
    assert find_model(name).name == found


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(AdapterError, match=r"No model 'llama-3.1-7b' .* 'llama-3.1-70b'"):
        find_model("llama-3.1-7b")


def test_a_config_json_is_the_model_of_that_name(tmp_path):
    read, known = find_model(str(written(tmp_path))), find_model("llama-3.2-1b")
    assert dataclasses.replace(read, name=known.name, source=known.source) == known
    assert find_model(str(tmp_path / "config.json")) == read
    rope = {**json.loads((tmp_path / "config.json").read_text())["rope_scaling"]}
    moved = written(tmp_path, rope_scaling=None, rope_theta=None)
    newer = written(moved, rope_scaling=None, rope_parameters={**rope, "rope_theta": 5e5})
    assert find_model(str(newer)) == read


def test_other_families_keep_what_sets_them_apart(tmp_path):
    qwen = find_model(str(written(tmp_path, model_type="qwen2", sliding_window=4096)))
    assert (qwen.qkv_bias, qwen.o_bias, qwen.window) == (True, False, None)
    mistral = find_model(str(written(tmp_path, model_type="mistral", sliding_window=4096)))
    assert (mistral.window, mistral.qk_norm) == (4096, False)
    qwen3 = find_model(str(written(tmp_path, model_type="qwen3")))
    assert qwen3.parameters == find_model("llama-3.2-1b").parameters + 16 * 2 * 64
    old = find_model(str(written(tmp_path, num_key_value_heads=None, head_dim=None)))
    assert (old.kv_heads, old.head_dim) == (32, 64)


def test_null_is_as_good_as_no_key(tmp_path):
    nulls = {"rope_scaling": LLAMA3 | {"factor": None}}
    file = written(tmp_path, **nulls) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": None}))
    found = find_model(str(file))
    assert (found.eps, found.scaling) == (1e-6, RopeScaling(8.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, r"config.json has model_type 'mixtral', .*\['llama', "),
        ({"hidden_size": None}, r"config.json lacks \['hidden_size'\], found \["),
        ({"hidden_size": "big"}, r"config.json: hidden_size must be an integer .*'big'"),
        ({"num_key_value_heads": 5}, r"config.json: num_attention_heads must be .* 32 and 5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "mixes layers of the kinds"),
        ({"layer_types": 5}, "config.json: layer_types must be a list of names, found 5"),
        ({"rope_theta": "x"}, "config.json: rope_theta must be a number above 0, found 'x'"),
        ({"rms_norm_eps": -1}, "config.json: rms_norm_eps must be a number above 0, found -1"),
        ({"rope_scaling": [1]}, r"config.json: rope_scaling must be an object, found \[1\]"),
        ({"rope_scaling": LLAMA3 | {"factor": True}}, "factor must be a number above 0, found Tr"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "8k"}},
            "original_max_position_embeddings must be an integer of at least 1, found '8k'",
        ),
        (
            {"model_type": "mistral", "sliding_window": "a"},
            "config.json: sliding_window must be an integer of at least 1, found 'a'",
        ),
    ],
)
def test_a_config_that_cannot_be_planned_says_what_was_found(tmp_path, changes, message):
    with pytest.raises(AdapterError, match=message):
        find_model(str(written(tmp_path, **changes)))


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"holds no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(AdapterError, match="must hold a JSON object, found list"):
        find_model(str(tmp_path / "list.json"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_is_that_of_the_example(variant):
    (model, layout), known = VARIANTS[variant], as_example(VARIANTS[variant][0])
    base = weights(model)

    def all_three(base):
        loss = llama.loss(model, base, (TOKENS, TOKENS), layout)
        return (
            known.apply({"params": base}, TOKENS),
            llama.logits(model, base, TOKENS, layout),
            loss,
        )

    wanted, found, loss = compiled(all_three)(base)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    picked = jnp.take_along_axis(jax.nn.log_softmax(wanted), TOKENS[..., None], -1)
    np.testing.assert_allclose(loss, -picked.mean(), rtol=1e-5)


def test_its_tree_is_that_of_the_example():
    for model, _ in VARIANTS.values():
        shapes = jax.eval_shape(as_example(model).init, jax.random.key(0), TOKENS)["params"]
        found = llama.structs(model, jnp.float32)
        assert jax.tree.map(lambda leaf: leaf.shape, found) == jax.tree.map(
            lambda leaf: leaf.shape, shapes
        )


def test_a_window_hides_what_is_further_back_and_a_norm_hides_the_size_of_queries():
    model = dataclasses.replace(TINY, window=2, qk_norm=True, eps=1e-12, layers=1)
    base, moved = weights(model), TOKENS.copy()
    moved[:, 0] = (moved[:, 0] + 1) % TINY.vocab
    louder = jax.tree.map(lambda leaf: leaf, base)
    louder["layers"]["self_attn"]["q_proj"]["kernel"] *= 10
    read = compiled(lambda base, tokens: llama.logits(model, base, tokens, BLOCKS))
    plain = read(base, TOKENS)
    np.testing.assert_allclose(read(louder, TOKENS), plain, rtol=1e-4, atol=1e-4)
    apart = np.abs(read(base, moved) - plain).max((0, 2))
    assert (apart[:2] > 1e-3).all() and apart[2:].max() == 0
