"""GGUF files: what is read, and what is refused with a word of what was found."""

import dataclasses
import math

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import rslora_jax as rl
from llama import RopeScaling, rope_frequencies
from pretrained import ModelError, open_model
from tests.checkpoints import (
    TINY,
    gguf_tensors_of,
    variables_of,
    write_gguf,
)

KINDS = {
    "untied": {},
    "tied": {"tied": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "qkv_bias": {"qkv_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_is_read_as_it_was_written(tmp_path, kind):
    config = dataclasses.replace(TINY, **KINDS[kind])
    source = open_model(write_gguf(tmp_path / "tiny.gguf", config))
    assert (source.config, source.context) == (config, 64)
    jax.tree.map(np.testing.assert_array_equal, source.load(), variables_of(config))


def test_a_qwen2_has_biases_and_its_rows_in_order(tmp_path):
    config = dataclasses.replace(TINY, qkv_bias=True)
    tensors = gguf_tensors_of(config, permuted=False)
    path = write_gguf(tmp_path / "tiny.gguf", config, tensors, "qwen2", "qwen2")
    source = open_model(path)
    assert (source.config, source.family) == (config, "qwen2")
    jax.tree.map(np.testing.assert_array_equal, source.load(), variables_of(config))


WIDE = dataclasses.replace(TINY, d_model=64, d_ff=96, head_dim=32)
QUANTIZED = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.F16, Kind.BF16]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_numbers_of_every_format_are_those_that_gguf_reads(tmp_path, kind):
    floats = gguf_tensors_of(WIDE, permuted=False)
    packed = {
        name: (gguf.quants.quantize(np.ascontiguousarray(tensor), kind), kind)
        if tensor.ndim == 2
        else tensor
        for name, tensor in floats.items()
    }
    path = write_gguf(tmp_path / "tiny.gguf", WIDE, packed, "qwen2", "qwen2")
    loaded = open_model(path).load()["params"]
    wanted = gguf.quants.dequantize(*packed["blk.1.ffn_up.weight"])
    np.testing.assert_array_equal(loaded["layers"]["mlp"]["up_proj"]["kernel"][1], wanted.T)
    head = gguf.quants.dequantize(*packed["output.weight"])
    np.testing.assert_array_equal(loaded["lm_head"]["kernel"], head.T)


def test_the_divisors_of_llama_3_1_are_put_into_words(tmp_path):
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(TINY, rope_theta=1e8, rope_scaling=scaling)
    plain = dataclasses.replace(config, rope_scaling=None)
    values = np.asarray(rope_frequencies(plain) / rope_frequencies(config), np.float32)
    tensors = {**gguf_tensors_of(TINY), "rope_freqs.weight": values}
    source = open_model(write_gguf(tmp_path / "tiny.gguf", plain, tensors))
    assert source.config == config


def test_other_divisors_are_refused(tmp_path):
    tensors = {**gguf_tensors_of(TINY), "rope_freqs.weight": np.float32([1.5, 8.0])}
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight holds other divisors than those of"):
        open_model(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.1, 0.2, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: math.floor(share * len(data))])
    with pytest.raises(ModelError, match=r"tiny\.gguf is not a whole GGUF file"):
        open_model(path)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Nothing but a few words of text.")
    with pytest.raises(ModelError, match=r"notes\.txt is not a whole GGUF file: GGUF magic"):
        open_model(path)


def test_another_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", architecture="gptneox")
    message = r"general\.architecture is 'gptneox'; supported are llama, qwen2"
    with pytest.raises(ModelError, match=message):
        open_model(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"split.count": 3}, r"one file of 3; join them: llama-gguf-split --merge"),
        ({"llama.expert_count": 8}, r"expert_count is 8; supported is 0"),
        ({"llama.rope.dimension_count": 2}, r"rope\.dimension_count is 2; supported is 4"),
        ({"llama.rope.scaling.type": "yarn"}, r"scaling\.type is 'yarn'; supported is 'none'"),
    ],
)
def test_what_a_llama_does_not_compute_is_named(tmp_path, said, message):
    with pytest.raises(ModelError, match=message):
        open_model(write_gguf(tmp_path / "tiny.gguf", said=said))


def test_another_tokenizer_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", pre="deepseek-llm")
    message = r"pre is 'deepseek-llm'; supported are smollm, gpt-2, llama-bpe, qwen2"
    with pytest.raises(ModelError, match=message):
        open_model(path)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = gguf_tensors_of(TINY)
    del tensors["blk.1.ffn_up.weight"]
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors)
    with pytest.raises(ModelError, match=r"the tensor 'blk\.1\.ffn_up\.weight' is missing"):
        open_model(path)


def test_a_tensor_that_would_be_dropped_is_named(tmp_path):
    tensors = {**gguf_tensors_of(TINY), "blk.0.attn_q.scale": np.ones(2, np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors)
    message = r"tensors that this Llama does not have: blk\.0\.attn_q\.scale"
    with pytest.raises(ModelError, match=message):
        open_model(path)


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "ab c12<|end|>", ["ab", "Ġc", "1", "2", "<|end|>"]),
        ("gpt-2", "ab c12<|end|>", ["ab", "Ġc", "1", "2", "<|end|>"]),
        ("llama-bpe", "ab c12", ["ab", "Ġc", "1", "2"]),
        ("qwen2", "ab c12", ["ab", "Ġc", "1", "2"]),
    ],
)
def test_the_tokenizer_splits_as_its_family_does(tmp_path, pre, text, tokens):
    source = open_model(write_gguf(tmp_path / "tiny.gguf", pre=pre))
    encoded = source.tokenizer.encode(text)
    assert encoded.tokens == tokens
    assert source.tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def test_special_tokens_and_the_template_are_in_the_metadata(tmp_path):
    said = {
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}{{ eos_token }}",
    }
    source = open_model(write_gguf(tmp_path / "tiny.gguf", said=said))
    assert (source.eos, source.bos, source.pad) == ((0, 2), 3, 0)
    assert source.chat.render([], generate=False) == "c<|end|>"


@pytest.mark.parametrize(
    ("changes", "said", "family"),
    [
        ({}, {}, "llama"),
        ({"qkv_bias": True}, {}, "qwen2"),
        ({"sliding_window": 5}, {"llama.attention.sliding_window": 5}, "mistral"),
        ({"qkv_bias": True, "sliding_window": 5}, {"llama.attention.sliding_window": 5}, "qwen2"),
    ],
)
def test_a_folder_is_written_that_is_the_same_model(tmp_path, changes, said, family):
    config = dataclasses.replace(TINY, **changes)
    said |= {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.add_bos_token": True}
    said |= {"tokenizer.chat_template": "{{ bos_token }}{{ eos_token }}"}
    source = open_model(write_gguf(tmp_path / "tiny.gguf", config, said=said))
    folder = tmp_path / "folder"
    rl.peft.merge_to_hf(folder, source.load(), config=source.settings)
    source.save_tokenizer(folder)
    again = open_model(folder)
    assert (again.config, again.family, again.context) == (config, family, 64)
    assert (again.eos, again.bos, again.pad) == (source.eos, 3, 0)
    assert again.chat == source.chat
    assert again.tokenizer.encode("ab c").ids == source.tokenizer.encode("ab c").ids == [3, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, again.load(), source.load())
