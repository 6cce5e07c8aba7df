"""Merging: model folders of safetensors, written shard by shard."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rslora_jax.extras import extra
from rslora_jax.files import whole_folder
from rslora_jax.folders import INDEX, SINGLE
from rslora_jax.paths import AdapterError

__all__ = ["write_folder"]


def write_folder(
    out: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes tensors as a folder that transformers loads; one shard is in memory.

    Args:
      out: the folder; it appears whole, or not at all.
      tensors: names and arrays, in the order in which they are written.
      config: becomes ``config.json``.
      max_shard_bytes: of one safetensors file, unless one tensor alone is larger.
      overwrite: True replaces a folder that is there.

    Raises:
      AdapterError: if the folder exists, there are no tensors, or two have one name.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_folder(folder + "/out", [("w", np.zeros(2)), ("v", np.ones(3))], None, 20)
      ...     sorted(file.name for file in Path(folder, "out").iterdir())[:2]
      ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    with whole_folder(out, overwrite) as folder:
        places, total = _write_shards(folder, tensors, max_shard_bytes)
        _name_shards(folder, places, total)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], most: int
) -> tuple[list[list[str]], int]:
    """The names in each shard, and the bytes of all."""
    shard: dict[str, np.ndarray] = {}
    places: list[list[str]] = []
    seen: set[str] = set()
    size = total = 0
    for name, array in tensors:
        if name in seen:
            raise AdapterError(f"Two tensors are named {name!r}. Give each parameter its own name.")
        if shard and size + array.nbytes > most:
            _write_shard(folder, shard, places)
            shard, size = {}, 0
        seen.add(name)
        shard[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    if not shard:
        raise AdapterError("A model folder was to be written, found no tensors.")
    _write_shard(folder, shard, places)
    return places, total


def _write_shard(folder: Path, shard: Mapping[str, np.ndarray], places: list[list[str]]) -> None:
    save_file = extra("safetensors.numpy", "rslora_jax[peft]", "Writing a model folder").save_file
    save_file(dict(shard), folder / f"{len(places)}.safetensors", metadata={"format": "pt"})
    places.append(list(shard))


def _name_shards(folder: Path, places: list[list[str]], total: int) -> None:
    """The names that transformers looks for: they tell how many shards there are."""
    if len(places) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE)
        return
    files = [f"model-{n + 1:05d}-of-{len(places):05d}.safetensors" for n in range(len(places))]
    for n, file in enumerate(files):
        (folder / f"{n}.safetensors").rename(folder / file)
    weight_map = {name: file for file, names in zip(files, places, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
