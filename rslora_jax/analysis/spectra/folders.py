"""Folders: the weights of two safetensors folders, paired by name and read one at a time.

Nothing is unpickled: a folder that holds only ``.bin`` or ``.pt`` files is refused.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rslora_jax.analysis.spectra.pairs import Pair
from rslora_jax.analysis.spectra.spectrum import Spectra, pair_spectrum
from rslora_jax.extras import extra
from rslora_jax.paths import AdapterError

__all__ = ["Folder", "compare_folders", "open_folder", "paired_matrices"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FLOATS = ("BF16", "F16", "F32", "F64")
SMALLEST_SIDE = 8  # below it a three-axis tensor is a convolution, not a stack of matrices


class Tensor(NamedTuple):
    """Where a tensor lies and what it is, without its numbers."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Folder(NamedTuple):
    """A safetensors folder: its tensors by name."""

    path: Path
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """The numbers of one tensor; nothing else of its file is read."""
        with _opened(self.tensors[name].file) as file:
            return file.get_tensor(name)


def compare_folders(
    base: str | Path,
    tuned: str | Path,
    k: int = 64,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    iterations: int = 2,
) -> Spectra:
    """The spectra of what fine-tuning added, from two safetensors folders.

    Args:
      base: the folder of the model before, with ``model.safetensors``, or its shards and
        ``model.safetensors.index.json``.
      tuned: the folder of the model after.
      k: how many singular values of each matrix.
      progress: called as ``progress(done, total, name)`` before each matrix, and with
        ``done == total`` at the end.
      iterations: of the power method; see `delta_svd`.

    Returns:
      `Spectra` of every floating matrix; a tensor [n, rows, columns] is a stack of n. Never
      more than one matrix of each model is in memory.

    Raises:
      AdapterError: if a folder holds no safetensors or a broken file, or if the folders do
        not match, with names and both shapes.

    Example:
      >>> import tempfile, numpy as np
      >>> from safetensors.numpy import save_file
      >>> with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
      ...     save_file({"w": np.zeros((4, 4), "f4")}, one + "/model.safetensors")
      ...     save_file({"w": np.diag([3.0, 1, 0, 0]).astype("f4")}, two + "/model.safetensors")
      ...     compare_folders(one, two, k=2).energy(ranks=[1]).column("energy")[0].__round__(3)
      0.9
    """
    before, after = open_folder(base), open_folder(tuned)
    _check_match(before, after)
    names = [name for name, tensor in before.tensors.items() if _axes(tensor)]
    if not names:
        raise AdapterError(
            f"{before.path} holds {len(before.tensors)} tensors, none of them a floating matrix. "
            "Pass the folder of a model's weights."
        )
    found = []
    for done, pair in enumerate(paired_matrices(before, after, names)):
        if progress is not None:
            progress(done, len(names), pair.path)
        found.append(pair_spectrum(pair, k, iterations=iterations))
    if progress is not None:
        progress(len(names), len(names), "")
    return Spectra(found)


def paired_matrices(before: Folder, after: Folder, names: list[str]) -> Iterator[Pair]:
    """Reads the named matrices, one pair at a time."""
    for name in names:
        yield Pair(name, _axes(before.tensors[name]), before.read(name), after.read(name))


def open_folder(path: str | Path) -> Folder:
    """Reads the headers of a folder's safetensors files.

    Args:
      path: the folder.

    Returns:
      `Folder(path, tensors)`, sorted by name.

    Raises:
      AdapterError: if there is no such folder, no safetensors in it, a shard that its index
        names is missing, or a file is broken.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"A folder with {SINGLE} was asked for, found no folder {folder}.")
    tensors = {name: t for file in _files(folder) for name, t in _header(file).items()}
    return Folder(folder, dict(sorted(tensors.items())))


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    others = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in others if name.endswith(PICKLES)]
    why = (
        f"only {pickles[:4]}, which are pickles: they can run code when opened, and are not read. "
        "Save the model as safetensors"
        if pickles
        else f"{others[:6] or 'nothing'}. Pass the folder of a model"
    )
    raise AdapterError(f"{folder} needs {SINGLE} or {INDEX}, found {why}.")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{index} must be JSON with a 'weight_map' from tensor to file, found {error!r}. "
            "Download it again."
        ) from error
    for name in names:
        # An index comes with a download: it must not lead out of its folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
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


def _axes(tensor: Tensor) -> str:
    """Roles for the spectrum alone, which is the same for a matrix and its transpose."""
    if tensor.dtype not in FLOATS or 0 in tensor.shape:
        return ""
    stacked = len(tensor.shape) == 3 and min(tensor.shape[1:]) >= SMALLEST_SIDE
    return "io" if len(tensor.shape) == 2 else "bio" if stacked else ""


def _check_match(before: Folder, after: Folder) -> None:
    one, two = before.tensors, after.tensors
    faults = [f"{name!r} is only in {before.path}" for name in one if name not in two]
    faults += [f"{name!r} is only in {after.path}" for name in two if name not in one]
    faults += [
        f"{name!r} has shape {t.shape} in {before.path} and {two[name].shape} in {after.path}"
        for name, t in one.items()
        if name in two and t.shape != two[name].shape
    ]
    if faults:
        more = f"; and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise AdapterError(
            f"The folders must hold the same tensors; {len(faults)} differ: "
            f"{'; '.join(faults[:6])}{more}. Pass a model and its own fine-tune."
        )
