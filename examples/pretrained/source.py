"""The source of a model: what is known of a checkpoint before its numbers are read."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llama import LlamaConfig
from pretrained.chat import Chat
from pretrained.loading import Prepare, load
from pretrained.pieces import Piece


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    Attributes:
      path: the folder or file.
      family: "llama", "mistral" or "qwen2".
      config: sizes and constants of the model.
      context: the most tokens that the model was made for.
      tokenizer: encodes text; encode with `add_special_tokens=False` and put `bos` in front.
      chat: the chat template, if the checkpoint has one. Some templates write `bos` themselves.
      eos: tokens that end an answer, the tokenizer's own first; empty if none is known.
      bos: what the tokenizer puts in front of a text, if it does.
      pad: a token to fill rows with.
      settings: config.json of this model, as it is loaded here.
      tokenizer_settings: tokenizer_config.json of this model.
      files: config.json and the tokenizer's files, if it is a folder.
      structs: the variables of `llama.Llama`, abstract.
      pieces: the checkpoint's tensors, and where each goes.
    """

    path: Path
    family: str
    config: LlamaConfig
    context: int
    tokenizer: Tokenizer
    chat: Chat | None
    eos: tuple[int, ...]
    bos: int | None
    pad: int
    settings: Mapping[str, Any]
    tokenizer_settings: Mapping[str, Any]
    files: tuple[Path, ...]
    structs: Any
    pieces: tuple[Piece, ...]

    def load(self, places: Any = None, prepare: Prepare | None = None) -> Any:
        """Read the numbers, one tensor after the other, straight to where they are to lie.

        Args:
          places: Shardings, in a tree like `structs`, or deeper where `prepare` makes trees.
            Everything lies on the default device otherwise.
          prepare: called as `prepare(path, array)` for every tensor of the checkpoint, such as
            `("params/layers/mlp/up_proj/kernel", [1, in, out])`; returns the arrays to keep.
            Each of a layer's keeps a first axis of 1, along which the layers are stacked.

        Returns:
          `{"params": ...}` as `llama.Llama` wants it.

        Raises:
          ModelError: a tensor cannot be read.
        """
        return load(self.structs, self.pieces, places, prepare)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer and the chat template beside weights, for transformers to read."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if file.name != "config.json":
                _write(folder / file.name, file.read_bytes())
        if not self.files:
            settings = json.dumps(self.tokenizer_settings, indent=2, ensure_ascii=False)
            _write(folder / "tokenizer_config.json", settings.encode())
            _write(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True).encode())


def _write(file: Path, content: bytes) -> None:
    """All of a file, or none of it."""
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(content)
    os.replace(part, file)
