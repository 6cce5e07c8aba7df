"""SentencePiece tokenizers in GGUF files, beside the algorithm itself, written out here."""

import dataclasses
import itertools
import random

import jax
import numpy as np
import pytest

import rslora_jax as rl
from pretrained import ModelError, open_model
from tests.checkpoints import TINY, write_gguf

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
SPECIAL = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
# "ab" is a better pair than "bc", and "bc" than "▁a"; "abc" and "▁▁▁" have two pairs of parts each.
WORDS = ["ab", "bc", "▁a", "abc", "▁▁", "▁▁▁", "ca", "éa", "▁b", "aa", "aaa", "▁ab"]
SIGNS = [*"▁abcé"]
PIECES = [
    *SPECIAL,
    *BYTES,
    *((word, -float(at), NORMAL) for at, word in enumerate([*WORDS, *SIGNS])),
    ("<|sep|>", 0.0, USER),
]
CONFIG = dataclasses.replace(TINY, vocab_size=len(PIECES))


def opened(tmp_path, pieces=None, **said):
    said = {f"tokenizer.ggml.{name}": value for name, value in said.items()}
    path = tmp_path / "tiny.gguf"
    return open_model(write_gguf(path, CONFIG, said=said, pieces=pieces or PIECES))


def merged(text):
    """The pieces of a text: the best neighbours first, of equal ones the leftmost."""
    scores = {token: score for token, score, kind in PIECES if kind == NORMAL}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = enumerate(a + b for a, b in itertools.pairwise(parts))
        ranked = [(scores[union], -at) for at, union in unions if union in scores]
        if not ranked:
            break
        at = -max(ranked)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = [
        [part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()] for part in parts
    ]
    return [token for tokens in spelled for token in tokens]


def test_pieces_merge_by_their_scores(tmp_path):
    tokenizer = opened(tmp_path).tokenizer
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("abc é€\n", k=draw.randint(1, 30)))
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert encoded.tokens == merged(text), text
        assert tokenizer.decode(encoded.ids) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("abc", ["<s>", "▁", "abc"]),
        ("a</s>b", ["<s>", "▁a", "</s>", "▁b"]),
        ("a<|sep|>b", ["<s>", "▁a", "<|sep|>", "▁b"]),
        ("日", ["<s>", "▁", "<0xE6>", "<0x97>", "<0xA5>"]),
    ],
)
def test_special_tokens_stand_in_the_text(tmp_path, text, tokens):
    source = opened(tmp_path)
    assert source.tokenizer.encode(text).tokens == tokens
    assert (source.bos, source.eos) == (1, (2,))


def test_the_file_may_ask_for_no_space_in_front_and_no_bos(tmp_path):
    tokenizer = opened(tmp_path, add_space_prefix=False, add_bos_token=False).tokenizer
    encoded = tokenizer.encode("ab b")
    assert encoded.tokens == ["ab", "▁b"]
    assert tokenizer.decode(encoded.ids) == "ab b"


def test_without_tokens_of_bytes_it_is_refused(tmp_path):
    pieces = [piece for piece in PIECES if piece[0] not in ("<0x0A>", "<0xFF>")]
    with pytest.raises(
        ModelError, match=r"lacks 2 of the 256 tokens of bytes, the first is <0x0A>"
    ):
        opened(tmp_path, pieces)


def test_scores_that_rank_nothing_are_refused(tmp_path):
    pieces = [(token, -1000.0, kind) for token, _, kind in PIECES]
    with pytest.raises(ModelError, match=r"scores are -1000, which does not say what merges first"):
        opened(tmp_path, pieces)


def test_a_first_token_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=rf"bos_token_id is 999, but there are {len(PIECES)}"):
        opened(tmp_path, bos_token_id=999)


def test_a_file_that_names_no_special_tokens_has_those_of_llama(tmp_path):
    said = {"bos_token_id": 260, "eos_token_id": 261, "padding_token_id": 0}
    for wanted, source in [
        ((1, (2,), 2), opened(tmp_path)),
        ((260, (261,), 0), opened(tmp_path, **said)),
    ]:
        assert (source.bos, source.eos, source.pad) == wanted


def test_another_model_of_tokenizers_is_refused(tmp_path):
    message = r"tokenizer\.ggml\.model is 'bert'; supported are gpt2, llama"
    with pytest.raises(ModelError, match=message):
        opened(tmp_path, model="bert")


def test_a_folder_is_written_with_the_same_tokenizer(tmp_path):
    source, folder = opened(tmp_path), tmp_path / "folder"
    rl.peft.merge_to_hf(folder, source.load(), config=source.settings)
    source.save_tokenizer(folder)
    again = open_model(folder)
    assert (again.eos, again.bos, again.pad) == (source.eos, source.bos, source.pad)
    text = "abc  é€</s> ab"
    assert again.tokenizer.encode(text).ids == source.tokenizer.encode(text).ids
    jax.tree.map(np.testing.assert_array_equal, again.load(), source.load())
