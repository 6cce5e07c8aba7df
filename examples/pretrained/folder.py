"""Hugging Face folders: config.json, safetensors, tokenizer.json and what stands beside them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from pretrained.chat import Chat
from pretrained.errors import ModelError
from pretrained.json_file import read_if_there, read_json
from pretrained.pieces import Piece, Tensors, match, structs_of
from pretrained.shards import open_shards
from pretrained.sizes import family_of, read_context, read_sizes
from pretrained.source import Source
from pretrained.special import check_vocabulary, find_special

TOKENIZER = "tokenizer.json"
KEPT = (
    "config.json",
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""The files that are copied beside merged weights."""
DTYPES = ("dtype", "torch_dtype")  # the first is how transformers 5 spells it


def open_folder(folder: Path, dtype: DTypeLike) -> Source:
    """Open a Hugging Face folder; see `open_model`."""
    try:
        return _open(folder, dtype)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def _open(folder: Path, dtype: DTypeLike) -> Source:
    settings = read_json(folder / "config.json")
    config = read_sizes(settings)
    structs = structs_of(config, dtype)
    pieces = _pieces(structs, open_shards(folder), config.tied)
    tokenizer, said = _tokenizer(folder), read_if_there(folder / "tokenizer_config.json")
    words = _words(read_if_there(folder / "special_tokens_map.json") | said)
    generation = read_if_there(folder / "generation_config.json")
    special = find_special(tokenizer, words, (generation, settings))
    check_vocabulary(tokenizer, special, config.vocab_size)
    template = _template(folder, said)
    return Source(
        path=folder,
        family=family_of(settings),
        config=config,
        context=read_context(settings),
        tokenizer=tokenizer,
        chat=None if template is None else Chat(template, words),
        **special._asdict(),
        settings=settings | {name: jnp.dtype(dtype).name for name in DTYPES if name in settings},
        tokenizer_settings=said,
        files=tuple(file for name in KEPT if (file := folder / name).is_file()),
        structs=structs,
        pieces=pieces,
    )


def _pieces(structs: Any, tensors: Tensors, tied: bool) -> tuple[Piece, ...]:
    def unused(name: str) -> bool:
        # Old checkpoints hold the frequencies; transformers too leaves the head of a tied model.
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    return match(structs, tensors, tensor_name, unused)


def tensor_name(path: str, layer: int | None) -> str:
    """Hugging Face's name of a leaf, or of one layer of it.

    >>> tensor_name("layers/mlp/up_proj/kernel", 3)
    'model.layers.3.mlp.up_proj.weight'
    """
    if layer is not None:
        path = path.replace("layers/", f"layers/{layer}/", 1)
    name = re.sub(r"/(kernel|scale|embedding)$", "/weight", path).replace("/", ".")
    return name if name.startswith("lm_head.") else f"model.{name}"


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / TOKENIZER
    if not file.is_file():
        raise ModelError(
            f"{TOKENIZER} is missing. A tokenizer of another form is converted by "
            "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises no narrower class
        raise ModelError(f"{TOKENIZER} is no tokenizer: {error}") from error


def _words(said: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their names, such as eos_token."""
    found = {name: value for name, value in said.items() if name.endswith("_token")}
    texts = {n: v.get("content") if isinstance(v, Mapping) else v for n, v in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _template(folder: Path, said: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{file.name} is no text of UTF-8: {error}") from error
    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        return {each["name"]: each["template"] for each in template}.get("default")
    return template
