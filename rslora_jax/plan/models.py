"""Models: Llama-family checkpoints by name, their published sizes as data."""

import re
from collections.abc import Mapping
from pathlib import Path

from rslora_jax.paths import AdapterError, nearest
from rslora_jax.plan.sizes import FAMILIES, Model, RopeScaling, read_model

__all__ = ["MODELS", "find_model"]

HERD = "arXiv:2407.21783 table 3, and the config.json of "
HUB = "the config.json of "
_NOISE = re.compile(r"\b(instruct|chat|base|hf|it|meta)\b")


def _llama3(name: str, *sizes: int, factor: float, tied: bool, source: str) -> Model:
    about = {"theta": 500_000.0, "scaling": RopeScaling(factor), "source": source}
    return Model(name, 128_256, *sizes, tied=tied, **about)


def _smollm2(name: str, *sizes: int, theta: float) -> Model:
    source = f"{HUB}HuggingFaceTB/SmolLM2-{name.rpartition('-')[2].upper()}"
    return Model(name, 49_152, *sizes, tied=True, theta=theta, source=source)


# width, ff, layers, heads, kv_heads, head_dim
MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        _llama3(
            "llama-3.1-8b",
            *(4_096, 14_336, 32, 32, 8, 128),
            factor=8.0,
            tied=False,
            source=f"{HERD}meta-llama/Llama-3.1-8B",
        ),
        _llama3(
            "llama-3.1-70b",
            *(8_192, 28_672, 80, 64, 8, 128),
            factor=8.0,
            tied=False,
            source=f"{HERD}meta-llama/Llama-3.1-70B",
        ),
        _llama3(
            "llama-3.1-405b",
            *(16_384, 53_248, 126, 128, 8, 128),
            factor=8.0,
            tied=False,
            source=f"{HERD}meta-llama/Llama-3.1-405B",
        ),
        _llama3(
            "llama-3.2-1b",
            *(2_048, 8_192, 16, 32, 8, 64),
            factor=32.0,
            tied=True,
            source=f"{HUB}meta-llama/Llama-3.2-1B",
        ),
        _llama3(
            "llama-3.2-3b",
            *(3_072, 8_192, 28, 24, 8, 128),
            factor=32.0,
            tied=True,
            source=f"{HUB}meta-llama/Llama-3.2-3B",
        ),
        _smollm2("smollm2-135m", 576, 1_536, 30, 9, 3, 64, theta=100_000.0),
        _smollm2("smollm2-360m", 960, 2_560, 32, 15, 5, 64, theta=100_000.0),
        _smollm2("smollm2-1.7b", 2_048, 8_192, 24, 32, 32, 64, theta=130_000.0),
    )
}
"""The models that have a name here."""


def find_model(name: str) -> Model:
    """The sizes of a model, by its name or from its `config.json`.

    Args:
      name: a name of `MODELS`, in the spelling of the Hugging Face Hub as well, or the path of
        a `config.json`, or of a folder that holds one.

    Returns:
      The sizes.

    Raises:
      AdapterError: for a name that is not known, with the nearest; for a file that cannot be
        read, lacks a key, or holds a model of another family.

    Example:
      >>> find_model("meta-llama/Llama-3.1-8B-Instruct").parameters
      8030261248
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file() or path.suffix == ".json":
        return read_model(path)
    known = {_key(model): model for model in MODELS}
    if _key(name) not in known:
        raise AdapterError(
            f"No model {name!r} is known, and no file or folder has that name. The nearest are "
            f"{nearest(name.lower(), MODELS)}. Name one, or the config.json of a Hugging Face "
            f"model of type {', '.join(FAMILIES)}."
        )
    return MODELS[known[_key(name)]]


def _key(name: str) -> str:
    """A name without its owner, its spelling, and what says nothing about sizes."""
    last = name.lower().rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9]", "", _NOISE.sub("", last.replace("_", "-")))


def _from_folder(folder: Path) -> Model:
    file = folder / "config.json"
    if not file.is_file():
        raise AdapterError(
            f"{folder} holds no config.json. Name a folder that does, or one of {list(MODELS)}."
        )
    return read_model(file)
