"""Folders: the tensors of a safetensors folder by name, read one at a time.

Nothing is unpickled: a folder that holds only ``.bin`` or ``.pt`` files is refused.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rslora_jax.extras import extra
from rslora_jax.files import read_json
from rslora_jax.paths import AdapterError

__all__ = [
    "FLOATS",
    "INDEX",
    "PICKLES",
    "SINGLE",
    "Folder",
    "Tensor",
    "open_file",
    "open_folder",
    "write_file",
]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FLOATS = ("BF16", "F16", "F32", "F64")


class Tensor(NamedTuple):
    """Where a tensor lies and what it is, without its numbers."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Folder(NamedTuple):
    """Safetensors files of one folder: their tensors by name."""

    path: Path
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """The numbers of one tensor; nothing else of its file is read."""
        safetensors = extra("safetensors", "rslora_jax[cli]", "Reading a model folder")
        tensor = self.tensors[name]
        with _opened(tensor.file) as file:
            try:
                return file.get_tensor(name)
            except (safetensors.SafetensorError, TypeError, AttributeError, KeyError) as error:
                raise AdapterError(
                    f"{name!r} of {tensor.file} is {tensor.dtype} {list(tensor.shape)}, which "
                    f"NumPy cannot hold ({error}). Save it in one of {', '.join(FLOATS)}."
                ) from error


def open_folder(path: str | Path) -> Folder:
    """Reads the headers of a model folder's safetensors files.

    Args:
      path: the folder, with ``model.safetensors``, or its shards and
        ``model.safetensors.index.json``.

    Returns:
      `Folder(path, tensors)`, sorted by name.

    Raises:
      AdapterError: if there is no such folder, no safetensors in it, a shard that its index
        names is missing, a tensor is in two shards or in none, or a file is broken.

    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file({"w": np.zeros((4, 2), "f4")}, folder + "/model.safetensors")
      ...     open_folder(folder).tensors["w"].shape
      (4, 2)
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"A folder with {SINGLE} was asked for, found no folder {folder}.")
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _sharded(folder / INDEX)
    raise _nothing(folder)


def open_file(path: str | Path) -> Folder:
    """Reads the header of one safetensors file.

    Args:
      path: the file.

    Returns:
      `Folder(path, tensors)` of its folder, with this file's tensors alone, sorted by name.

    Raises:
      AdapterError: if it is no whole safetensors file.

    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file({"w": np.zeros(2, "f4")}, folder + "/adapter_model.safetensors")
      ...     open_file(folder + "/adapter_model.safetensors").read("w")
      array([0., 0.], dtype=float32)
    """
    file = Path(path)
    return Folder(file.parent, dict(sorted(_header(file).items())))


def write_file(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file, which other programs read as one of PyTorch's.

    Args:
      path: the file.
      tensors: by name, each contiguous.

    Raises:
      OSError: if the file cannot be written, as on a full disk, with its name.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_file(folder + "/model.safetensors", {"w": np.zeros((4, 2), "f4")})
      ...     open_folder(folder).tensors["w"].dtype
      'F32'
    """
    numpy, safetensors = (
        extra(name, "rslora_jax[cli]", "Writing safetensors")
        for name in ("safetensors.numpy", "safetensors")
    )
    try:
        numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        # Rust tells of the system's errors in words alone.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def _sharded(index: Path) -> Folder:
    places = _places(index)
    tensors: dict[str, Tensor] = {}
    for file in _shards(index, places):
        for name, tensor in _header(file).items():
            if name in tensors:
                twice = f"{tensors[name].file.name} and {file.name}"
                raise AdapterError(f"{index.parent} holds {name!r} twice, in {twice}.")
            tensors[name] = tensor
    lost = sorted(set(places) - set(tensors))
    if lost:
        raise AdapterError(
            f"{index} lists {len(lost)} tensors that are in no shard: {lost[:4]}. "
            "Download the folder again."
        )
    return Folder(index.parent, dict(sorted(tensors.items())))


def _nothing(folder: Path) -> AdapterError:
    others = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in others if name.endswith(PICKLES)]
    why = (
        f"only {pickles[:4]}, which are pickles: they can run code when opened, and are not read. "
        "Save the model as safetensors"
        if pickles
        else f"{others[:6] or 'nothing'}. Pass the folder of a model"
    )
    return AdapterError(f"{folder} needs {SINGLE} or {INDEX}, found {why}.")


def _places(index: Path) -> dict[str, str]:
    try:
        return {str(n): str(file) for n, file in read_json(index)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{index} must be JSON with a 'weight_map' from tensor to file, found {error!r}. "
            "Download it again."
        ) from error


def _shards(index: Path, places: dict[str, str]) -> list[Path]:
    names = sorted(set(places.values()))
    for name in names:
        # An index comes with a download: it must not lead out of its folder.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise AdapterError(f"{index} names {name!r}, which is no safetensors file beside it.")
        if not (index.parent / name).is_file():
            raise AdapterError(f"{index} names {name!r}, which is missing. Download it too.")
    return [index.parent / name for name in names]


def _header(file: Path) -> dict[str, Tensor]:
    with _opened(file) as opened:
        views = {name: opened.get_slice(name) for name in opened.keys()}
        return {n: Tensor(file, tuple(v.get_shape()), v.get_dtype()) for n, v in views.items()}


def _opened(file: Path) -> Any:
    safetensors = extra("safetensors", "rslora_jax[cli]", "Reading a model folder")
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise AdapterError(
            f"{file} ({size:,} bytes) is no whole safetensors file: {error}. Download it again."
        ) from error
