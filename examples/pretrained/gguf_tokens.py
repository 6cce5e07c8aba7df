"""The tokenizer in a GGUF file: its special tokens and chat template, around one of two kinds."""

from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, processors

from pretrained.byte_level import byte_level
from pretrained.errors import ModelError
from pretrained.metadata import Metadata
from pretrained.sentencepiece_bpe import sentencepiece_bpe
from pretrained.special import Special

KINDS = {"gpt2": byte_level, "llama": sentencepiece_bpe}
DEFAULTS = {"llama": {"bos": 1, "eos": 2}}  # llama.cpp's, where a file is silent


def read_tokenizer(metadata: Metadata) -> Tokenizer:
    """Build the tokenizer.

    Raises:
      ModelError: it is of a kind that is not known here, or begins texts with a token it lacks.
    """
    tokenizer = KINDS[metadata.expect("tokenizer.ggml.model", tuple(KINDS))](metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = list(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
    special = _added(kinds, TokenType.UNKNOWN) + _added(kinds, TokenType.CONTROL)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(_added(kinds, TokenType.USER_DEFINED))
    bos = read_special(metadata).bos
    if bos is not None:
        if bos >= len(tokens):
            raise ModelError(
                f"tokenizer.ggml.bos_token_id is {bos}, but there are {len(tokens)} tokens: the "
                "file is damaged, or was converted badly; take another one"
            )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def read_special(metadata: Metadata) -> Special:
    """The special tokens."""
    said = [_special(metadata, name) for name in ("eos", "eot", "eom")]
    eos = tuple(dict.fromkeys(token for token in said if token is not None))
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata))
    pad = _special(metadata, "padding")
    bos = _special(metadata, "bos") if adds_bos else None
    return Special(eos, bos, (*eos, 0)[0] if pad is None else pad)


def read_words(metadata: Metadata) -> dict[str, str]:
    """Special tokens by the names that chat templates use."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {ours: _special(metadata, name) for ours, name in names.items()}
    return {name: tokens[token] for name, token in ids.items() if token is not None}


def write_tokenizer_settings(metadata: Metadata) -> dict[str, Any]:
    """The tokenizer_config.json of a tokenizer that has none."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= read_words(metadata)
    template = metadata.get("tokenizer.chat_template")
    return settings if template is None else settings | {"chat_template": template}


def _special(metadata: Metadata, name: str) -> int | None:
    default = DEFAULTS.get(metadata["tokenizer.ggml.model"], {}).get(name)
    return metadata.get(f"tokenizer.ggml.{name}_token_id", default)


def _adds_bos(metadata: Metadata) -> bool:
    """What llama.cpp does where the file is silent."""
    of_sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    return of_sentencepiece or metadata.get("tokenizer.ggml.pre") == "llama-bpe"


def _added(kinds: list[tuple[str, int]], wanted: int) -> list[AddedToken]:
    return [AddedToken(token, normalized=False) for token, kind in kinds if kind == wanted]
