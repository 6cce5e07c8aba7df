"""The tokenizer in a GGUF file: byte-level BPE, with the splittings that are known here."""

from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from pretrained.metadata import Metadata
from pretrained.special import Special

CONTROL, USER = 3, 4  # gguf's types of tokens that are found before the text is split
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


def read_tokenizer(metadata: Metadata) -> Tokenizer:
    """Build the tokenizer.

    Raises:
      ModelError: it is of a kind that is not known here.
    """
    metadata.expect("tokenizer.ggml.model", ("gpt2",))
    splitting = SPLITTINGS[metadata.expect("tokenizer.ggml.pre", tuple(SPLITTINGS))]
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    ids = {token: at for at, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=splitting.whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splitting.steps))
    if splitting.normalizer is not None:
        tokenizer.normalizer = splitting.normalizer
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens(_added(kinds, CONTROL))
    tokenizer.add_tokens(_added(kinds, USER))
    bos = read_special(metadata).bos
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def read_special(metadata: Metadata) -> Special:
    """The special tokens."""
    said = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = tuple(dict.fromkeys(token for token in said if token is not None))
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata))
    bos = metadata.get("tokenizer.ggml.bos_token_id") if adds_bos else None
    return Special(eos, bos, metadata.get("tokenizer.ggml.padding_token_id", (*eos, 0)[0]))


def read_words(metadata: Metadata) -> dict[str, str]:
    """Special tokens by the names that chat templates use."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{name}_token_id") for ours, name in names.items()}
    return {name: tokens[token] for name, token in ids.items() if token is not None}


def write_tokenizer_settings(metadata: Metadata) -> dict[str, Any]:
    """The tokenizer_config.json of a tokenizer that has none."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= read_words(metadata)
    template = metadata.get("tokenizer.chat_template")
    return settings if template is None else settings | {"chat_template": template}


def _adds_bos(metadata: Metadata) -> bool:
    """What llama.cpp does where the file is silent."""
    return metadata.get("tokenizer.ggml.pre") == "llama-bpe"


def _added(kinds: list[tuple[str, int]], wanted: int) -> list[AddedToken]:
    return [AddedToken(token, normalized=False) for token, kind in kinds if kind == wanted]
