"""Hugging Face folders: what is read, and what is refused with a word of what was found."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import processors

from llama import RopeScaling
from pretrained import ModelError, open_model
from tests.checkpoints import (
    SETTINGS,
    TINY,
    VOCABULARY,
    tensors_of,
    tokenizer_of,
    variables_of,
    write_folder,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
KINDS = {
    "untied": ({}, {}),
    "tied": ({"tied": True}, {"tie_word_embeddings": True}),
    "biased": (
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True},
    ),
    "head_dim": ({"head_dim": 6}, {"head_dim": 6}),
    "llama3": ({"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)}, {"rope_scaling": LLAMA3}),
    "transformers 5": (
        {"rope_theta": 7.0, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)},
        {"rope_theta": ..., "rope_parameters": {**LLAMA3, "rope_theta": 7.0}},
    ),
    "qwen2": ({"qkv_bias": True}, {**QWEN2, "use_sliding_window": False, "sliding_window": 9}),
    "mistral": ({}, {**MISTRAL, "sliding_window": None}),
    "windowed mistral": ({"sliding_window": 3}, {**MISTRAL, "sliding_window": 3}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_llama_is_read_as_it_was_written(tmp_path, kind):
    changes, settings = KINDS[kind]
    config = dataclasses.replace(TINY, **changes)
    source = open_model(write_folder(tmp_path / "tiny", config, **settings))
    assert source.config == config
    assert source.family == settings.get("model_type", "llama")
    assert source.context == 64
    jax.tree.map(np.testing.assert_array_equal, source.load(), variables_of(config))


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_numbers_are_cast_once_to_the_dtype_that_is_asked_for(tmp_path, stored, wanted):
    tensors = tensors_of(TINY, jnp.dtype(stored))
    source = open_model(write_folder(tmp_path / "tiny", TINY, tensors), jnp.dtype(wanted))
    loaded = source.load()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {wanted}
    assert jax.tree.map(jax.typeof, loaded) == jax.tree.map(jax.typeof, source.structs)
    embedding = tensors["model.embed_tokens.weight"].astype(jnp.dtype(wanted))
    np.testing.assert_array_equal(loaded["params"]["embed_tokens"]["embedding"], embedding)


def sharded(folder, tensors):
    """The tensors over two files and an index."""
    write_folder(folder)
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{at % 2 + 1}-of-2.safetensors" for at, name in enumerate(tensors)}
    for file in set(places.values()):
        held = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(held, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return folder


def test_a_folder_of_shards_is_read_by_its_index(tmp_path):
    source = open_model(sharded(tmp_path / "tiny", tensors_of(TINY)))
    jax.tree.map(np.testing.assert_array_equal, source.load(), variables_of(TINY))


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "tiny", tensors_of(TINY))
    (folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names 'model-2-of-2\.safetensors', which is not in"):
        open_model(folder)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    folder = sharded(tmp_path / "tiny", tensors_of(TINY))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"names '\.\./other\.safetensors', which is not in"):
        open_model(folder)


REFUSED = [
    ({"model_type": "gemma"}, r"model_type is 'gemma'; supported are llama \(LlamaForCausalLM\)"),
    ({"architectures": ["LlamaForTokenClassification"]}, r"architectures is \['LlamaForToken"),
    ({"quantization_config": {"quant_method": "awq"}}, r"weights are quantized \('awq'\)"),
    ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; supported is 'silu'"),
    ({"rope_scaling": {"type": "yarn"}}, r"rope_type is 'yarn'; supported are 'default' and"),
    ({"rope_scaling": {"rope_type": "llama3"}}, r"'llama3', but factor, low_freq_factor, .* is"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; only whole heads"),
    ({"rope_parameters": {"full_attention": {}}}, r"frequencies differ from layer to layer"),
    ({"hidden_size": ...}, r"hidden_size must be a whole number above 0, found None"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, r"heads=3 must be a multiple of"),
    (
        {**QWEN2, "use_sliding_window": True, "max_window_layers": 1},
        r"layer_types is \['full_attention', 'sliding_attention'\]; only layers that are all alike",
    ),
    ({"num_hidden_layers": 3}, r"the tensor 'model\.layers\.2\.[a-z._]+' is missing"),
    ({"num_hidden_layers": 1}, r"tensors that this Llama does not have: model\.layers\.1\."),
    ({"attention_bias": True}, r"the tensor 'model\.layers\.0\.self_attn\..*bias' is missing"),
    ({"vocab_size": 12}, r"'model\.embed_tokens\.weight' is \[11, 8\]; .* ask for \[12, 8\]"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_is_not_supported_is_named(tmp_path, settings, message):
    folder = write_folder(tmp_path / "tiny", **settings)
    with pytest.raises(ModelError, match=r"tiny: .*" + message):
        open_model(folder)


def test_a_buffer_of_old_checkpoints_and_the_head_of_a_tied_model_are_left(tmp_path):
    tensors = tensors_of(TINY)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    source = open_model(write_folder(tmp_path / "tiny", TINY, tensors, tie_word_embeddings=True))
    assert source.config.tied and "lm_head" not in source.load()["params"]


def test_integers_are_refused(tmp_path):
    tensors = {**tensors_of(TINY), "model.norm.weight": np.ones(8, np.int8)}
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is I8; supported are F64"):
        open_model(write_folder(tmp_path / "tiny", TINY, tensors))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    file = write_folder(tmp_path / "tiny") / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError, match=r"model\.safetensors \([\d,]+ bytes\) is no whole"):
        open_model(file.parent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"config\.json is missing"),
        ("config.json", "{", r"config\.json is no JSON"),
        ("config.json", "[]", r"config\.json must hold an object, found list"),
        ("model.safetensors", None, r"neither model\.safetensors nor .*\.index\.json is in"),
        ("tokenizer.json", None, r"tokenizer\.json is missing\. A tokenizer of another form"),
        ("tokenizer.json", "{}", r"tokenizer\.json is no tokenizer"),
        ("tokenizer_config.json", "?", r"tokenizer_config\.json is no JSON"),
        ("chat_template.jinja", "{% if %}", r"line 1 of the chat template"),
    ],
)
def test_a_missing_or_broken_file_is_named(tmp_path, name, content, message):
    file = write_folder(tmp_path / "tiny") / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(ModelError, match=message):
        open_model(file.parent)


def test_a_pickle_is_not_read(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which can run code"):
        open_model(folder)


def test_a_model_that_is_not_there_is_refused_with_what_would_do():
    with pytest.raises(ModelError, match=r"No model 'meta-llama/Llama-3\.1-8B': .*downloaded here"):
        open_model("meta-llama/Llama-3.1-8B")


def test_one_file_of_a_folder_is_refused_with_the_folder(tmp_path):
    file = write_folder(tmp_path / "tiny") / "model.safetensors"
    with pytest.raises(ModelError, match=r"one file of a model\. Pass its folder, .*tiny"):
        open_model(file)


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    tokenizer_of([*VOCABULARY, "f"]).save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"a token 11, but the embedding has 11 rows"):
        open_model(folder)


def test_rows_of_the_embedding_beyond_the_tokenizer_do_no_harm(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    tokenizer_of(VOCABULARY[:-2]).save(str(folder / "tokenizer.json"))
    assert open_model(folder).tokenizer.encode("ab c").ids == [5, 6]


def test_the_tokenizers_own_eos_comes_first(tmp_path):
    folder = write_folder(tmp_path / "tiny", eos_token_id=[1, 2], pad_token_id=-1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 9]}))
    said = {"eos_token": {"content": "e"}, "chat_template": "{{ eos_token }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    source = open_model(folder)
    assert (source.eos, source.bos, source.pad) == ((10, 3, 9, 1, 2), None, 10)
    assert source.chat.render([], generate=True) == "e"


def test_a_first_token_is_what_the_tokenizer_puts_in_front(tmp_path):
    folder = write_folder(tmp_path / "tiny", eos_token_id=..., pad_token_id=9)
    tokenizer = tokenizer_of()
    opening = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.post_processor = opening
    tokenizer.save(str(folder / "tokenizer.json"))
    source = open_model(folder)
    assert (source.eos, source.bos, source.pad) == ((), 0, 9)


def test_the_files_to_keep_are_those_of_the_tokenizer_and_the_settings(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    (folder / "README.md").write_text("Nothing of interest.")
    source = open_model(folder)
    assert [file.name for file in source.files] == ["config.json", "tokenizer.json"]
    assert source.settings == SETTINGS


def test_the_files_are_written_beside_merged_weights(tmp_path):
    source = open_model(write_folder(tmp_path / "tiny", torch_dtype="float16"))
    source.save_tokenizer(tmp_path / "merged")
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["tokenizer.json"]
    assert source.settings["torch_dtype"] == "float32"
