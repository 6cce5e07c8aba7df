"""The tokenizer in a GGUF file: its special tokens and chat template, around one of two kinds."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from pretrained.byte_level import byte_level
from pretrained.metadata import Metadata
from pretrained.sentencepiece_bpe import sentencepiece_bpe
from pretrained.special import Special

UNKNOWN, CONTROL, USER = 2, 3, 4  # gguf's types of tokens that are found before a text is split
KINDS = {"gpt2": byte_level, "llama": sentencepiece_bpe}


def read_tokenizer(metadata: Metadata) -> Tokenizer:
    """Build the tokenizer.

    Raises:
      ModelError: it is of a kind that is not known here.
    """
    tokenizer = KINDS[metadata.expect("tokenizer.ggml.model", tuple(KINDS))](metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = list(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens(_added(kinds, UNKNOWN) + _added(kinds, CONTROL))
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
    of_sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    return of_sentencepiece or metadata.get("tokenizer.ggml.pre") == "llama-bpe"


def _added(kinds: list[tuple[str, int]], wanted: int) -> list[AddedToken]:
    return [AddedToken(token, normalized=False) for token, kind in kinds if kind == wanted]
