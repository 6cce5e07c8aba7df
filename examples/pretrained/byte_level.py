"""Byte-level BPE: the tokenizers of GPT-2, Llama 3, Qwen2 and SmolLM, from a GGUF file."""

from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pretrained.metadata import Metadata

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Splitting(NamedTuple):
    """How a text is split before the merges.

    Attributes:
      steps: what is cut, one after the other; bytes are spelled as letters by the last.
      normalizer: applied first, if any.
      whole: whether a word that is a token is never merged from smaller ones.
    """

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    normalizer: normalizers.Normalizer | None = None
    whole: bool = False


def _by(digits: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    """The expression of Llama 3 and of Qwen2, which differ in how many digits stay together."""
    regex = Regex("|".join((CONTRACTIONS, WORDS, digits, SIGNS)))
    split = pre_tokenizers.Split(regex, "isolated")
    return split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITTINGS = {
    "smollm": Splitting((pre_tokenizers.Digits(individual_digits=True), GPT2)),
    "gpt-2": Splitting((GPT2,)),
    "llama-bpe": Splitting(_by(r"\p{N}{1,3}"), whole=True),
    "qwen2": Splitting(_by(r"\p{N}"), normalizers.NFC()),
}


def byte_level(metadata: Metadata) -> Tokenizer:
    """Build the tokenizer, without special tokens.

    Raises:
      ModelError: its way of splitting is not known here.
    """
    splitting = SPLITTINGS[metadata.expect("tokenizer.ggml.pre", tuple(SPLITTINGS))]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    ids = {token: at for at, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=splitting.whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splitting.steps))
    if splitting.normalizer is not None:
        tokenizer.normalizer = splitting.normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
