"""Shards: a Hugging Face model folder, written tensor by tensor."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rslora_jax.files import whole_folder
from rslora_jax.folders import INDEX, SINGLE, write_file
from rslora_jax.paths import AdapterError

__all__ = ["SHARD", "write_folder"]

SHARD = 5_000_000_000


def write_folder(
    out: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD,
    overwrite: bool = False,
    copied: Sequence[Path] = (),
) -> None:
    """Writes a folder that transformers loads; no more than one shard is in memory.

    Args:
      out: the folder; it appears whole, or not at all.
      tensors: (name, array) one after the other, in the order of the shards.
      config: what ``config.json`` is to hold; None writes none.
      max_shard_bytes: the most that a file holds; a tensor that is larger has its own file.
      overwrite: True replaces a folder that is there.
      copied: files to put beside the tensors.

    Raises:
      AdapterError: if the folder exists, a name comes twice, or there are no tensors.
      OSError: if a file cannot be written, as on a full disk, with its name.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     pair = [("a", np.zeros(4, "f4")), ("b", np.zeros(4, "f4"))]
      ...     write_folder(folder + "/model", pair, max_shard_bytes=16)
      ...     print(*sorted(file.name for file in Path(folder, "model").iterdir()), sep="; ")
      model-00001-of-00002.safetensors; model-00002-of-00002.safetensors; model.safetensors.index.json
    """  # noqa: E501
    if isinstance(max_shard_bytes, bool) or max_shard_bytes < 1:
        raise AdapterError(f"max_shard_bytes must be at least 1, found {max_shard_bytes!r}.")
    with whole_folder(out, overwrite) as temporary:
        places, size = _write_shards(temporary, tensors, max_shard_bytes)
        _name_shards(temporary, places, size)
        for file in copied:
            shutil.copyfile(file, temporary / file.name)
        if config is not None:
            _write_json(temporary / "config.json", config)


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], limit: int
) -> tuple[dict[str, int], int]:
    """Which shard each tensor is in, and the bytes of all."""
    places: dict[str, int] = {}
    held: dict[str, np.ndarray] = {}
    number, size, total = 1, 0, 0
    for name, array in tensors:
        if name in places:
            raise AdapterError(f"Two tensors are named {name!r}. Give each its own name.")
        if held and size + array.nbytes > limit:
            write_file(_shard(folder, number), held)
            held, number, size = {}, number + 1, 0
        # safetensors writes the buffer as it lies, so a transposed view must be laid out first.
        held[name] = np.asarray(array, order="C")
        places[name] = number
        size, total = size + array.nbytes, total + array.nbytes
        del array  # or it would outlive its shard
    if not places:
        raise AdapterError("There are no tensors to write. Pass at least one.")
    write_file(_shard(folder, number), held)
    return places, total


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _name_shards(folder: Path, places: Mapping[str, int], size: int) -> None:
    """Names carry the number of shards, which is known at the end alone."""
    count = max(places.values())
    names = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    if count == 1:
        names = {1: SINGLE}
    for number, name in names.items():
        _shard(folder, number).rename(folder / name)
    if count > 1:
        where = {name: names[number] for name, number in sorted(places.items())}
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
