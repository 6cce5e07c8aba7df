"""Folders, compared: the weights of two models, paired by name and read one at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rslora_jax.analysis.spectra.pairs import Pair
from rslora_jax.analysis.spectra.spectrum import Spectra, pair_spectrum
from rslora_jax.folders import FLOATS, Folder, Tensor, open_folder
from rslora_jax.paths import AdapterError

__all__ = ["compare_folders", "paired_matrices"]

SMALLEST_SIDE = 8  # below it a three-axis tensor is a convolution, not a stack of matrices


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
