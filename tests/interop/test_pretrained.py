"""Pretrained models compute here what they compute in transformers, to 1e-4 of a logit.

Run with `python -m pytest tests/interop`, in an environment with the extra `interop`.
"""

import dataclasses
import io
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from safetensors.numpy import load_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import rslora_jax as rl
from llama import Llama
from pretrained import open_model
from tests.checkpoints import GGUF_NAMES, TINY, interleaved, tokenizer_of, write_gguf

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama grouped": (LlamaForCausalLM, LlamaConfig, {}),
    "llama biased": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": (LlamaForCausalLM, LlamaConfig, {"head_dim": 12}),
    "llama 3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 windowed": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 8}),
    "mistral windowed": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
}
DEVIL, DEVIL_TEST = (
    Path(__file__).parents[2] / "examples" / "finetune" / name
    for name in ("devil.jsonl", "devil_test.jsonl")
)
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 40))


def made(kind):
    """A random model of transformers', with biases and scales that are no zeros and ones."""
    cls, config, changes = KINDS[kind]
    torch.manual_seed(0)
    model = cls(config(**{**SIZES, **changes}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    tokenizer_of().save(str(folder / "tokenizer.json"))
    return folder


def logits_there(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def logits_here(source):
    return np.asarray(jax.jit(Llama(source.config).apply)(source.load(), TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_transformers(tmp_path, kind):
    model = made(kind)
    source = open_model(saved(model, tmp_path))
    wanted = logits_there(model)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(logits_here(source), wanted, rtol=0, atol=1e-4)


def test_the_spelling_of_older_transformers_means_the_same(tmp_path):
    model = made("llama 3")
    folder = saved(model, tmp_path)
    said = json.loads((folder / "config.json").read_text())
    rope = said.pop("rope_parameters")
    said |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(said))
    np.testing.assert_allclose(
        logits_here(open_model(folder)), logits_there(model), rtol=0, atol=1e-4
    )


def test_a_folder_of_shards_is_the_same_model(tmp_path):
    model = made("llama grouped")
    folder = saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    np.testing.assert_allclose(
        logits_here(open_model(folder)), logits_there(model), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_torch_reads_it(tmp_path, stored):
    folder = saved(made("llama grouped").to(stored), tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = logits_here(open_model(folder, jnp.float32))
    np.testing.assert_allclose(found, logits_there(model), rtol=0, atol=1e-4)


TEMPLATE = (
    "{%- for m in messages %}{{- bos_token + m['role'] + ':\n' + m['content'] | trim + eos_token "
    "}}{%- endfor %}{%- if add_generation_prompt %}{{- bos_token + 'assistant:\n' }}{%- endif %}"
)


def test_the_tokenizer_and_the_template_are_those_of_transformers(tmp_path):
    folder = saved(made("llama"), tmp_path)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(), bos_token="<|end|>", eos_token="e", pad_token="d"
    )
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(folder)
    source = open_model(folder)
    talk = [{"role": "user", "content": " ab c "}, {"role": "assistant", "content": "12"}]
    for generate in (False, True):
        wanted = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=generate)
        assert source.chat.render(talk, generate=generate) == wanted
    ids = source.tokenizer.encode("ab c12<|end|>", add_special_tokens=False).ids
    assert ids == theirs.encode("ab c12<|end|>", add_special_tokens=False)
    assert (source.eos[0], source.pad) == (theirs.eos_token_id, theirs.pad_token_id)


def packed(model, kind):
    """A model's tensors as GGUF has them, and the floats that they stand for."""
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(SIZES["num_hidden_layers"]):
        for theirs, (*blocks, _) in GGUF_NAMES.items():
            names[f"model.layers.{layer}.{'.'.join(blocks)}"] = f"blk.{layer}.{theirs}"
    tensors, floats = {}, {}
    for name, tensor in load_file(model).items():
        stem, end = name.rsplit(".", 1)
        heads = next((4 if "q_" in stem else 2 for s in ("q_proj", "k_proj") if s in stem), None)
        rows = tensor if heads is None else interleaved(tensor, tensor.shape[0] // heads)
        key = f"{names[stem]}.{end}"
        if rows.ndim == 1:
            tensors[key], floats[name] = rows, tensor
            continue
        data = gguf.quants.quantize(np.ascontiguousarray(rows), kind)
        tensors[key] = (data, kind)
        back = gguf.quants.dequantize(data, kind)
        if heads is not None:
            back = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        floats[name] = back
    return tensors, floats


@pytest.mark.parametrize(
    "kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.F32], ids=lambda kind: kind.name
)
def test_a_gguf_file_computes_what_its_floats_compute_in_transformers(tmp_path, kind):
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 64})).eval()
    saved(model, tmp_path)
    tensors, floats = packed(tmp_path / "model.safetensors", kind)
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in floats.items()})
    config = open_model(tmp_path).config
    source = open_model(write_gguf(tmp_path / "tiny.gguf", config, tensors))
    np.testing.assert_allclose(logits_here(source), logits_there(model), rtol=0, atol=1e-4)


def test_a_gguf_file_becomes_a_folder_that_transformers_loads(tmp_path):
    config = dataclasses.replace(TINY, qkv_bias=True)
    template = {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.bos_token_id": 0}
    source = open_model(write_gguf(tmp_path / "tiny.gguf", config, said=template))
    rl.peft.merge_to_hf(tmp_path / "folder", source.load(), config=source.settings)
    source.save_tokenizer(tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    tokens = TOKENS % TINY.vocab_size
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).logits.numpy()
    found = Llama(config).apply(source.load(), tokens)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    talk = [{"role": "user", "content": "ab c"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert source.chat.render(talk, generate=True) == text
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert source.tokenizer.encode(text, add_special_tokens=False).ids == ids


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """SentencePiece's own tokenizer, made as Llama 2's was, and the GGUF file of its pieces."""
    definitions = [json.loads(line)["completion"] for line in DEVIL.read_text().splitlines()]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(definitions),
        model_writer=model,
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(theirs.id_to_piece(n), theirs.get_score(n), kind(theirs, n)) for n in range(800)]
    config = dataclasses.replace(TINY, vocab_size=800)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return theirs, open_model(write_gguf(path, config, pieces=pieces))


def kind(theirs, token):
    if theirs.is_byte(token):
        return TokenType.BYTE
    if theirs.is_unknown(token):
        return TokenType.UNKNOWN
    return TokenType.CONTROL if theirs.is_control(token) else TokenType.NORMAL


TEXTS = [
    "A man of 1,024 words:  two spaces,   three.",
    "naïve café 日本語 🙂 \t tab\nand a new line ",
    " a space in front, and one behind ",
    "",
]


def test_pieces_of_a_gguf_file_are_those_of_sentencepiece(trained):
    theirs, source = trained
    shipped = [json.loads(line)["completion"] for line in DEVIL_TEST.read_text().splitlines()]
    for text in [*TEXTS, *shipped]:
        ids = source.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text), text
        assert source.tokenizer.decode(ids) == theirs.decode(ids) == text


def test_a_sentencepiece_tokenizer_becomes_one_that_transformers_loads(trained, tmp_path):
    _, source = trained
    rl.peft.merge_to_hf(tmp_path / "folder", source.load(), config=source.settings)
    source.save_tokenizer(tmp_path / "folder")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in [*TEXTS, "one</s>two"]:
        assert theirs.encode(text) == source.tokenizer.encode(text).ids, text
    assert theirs.encode("a")[0] == theirs.bos_token_id == source.bos
