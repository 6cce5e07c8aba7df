"""Shards: the tensors of a folder's safetensors files, read one at a time; no pickle is opened."""

from pathlib import Path
from typing import Any

import safetensors

from pretrained.errors import ModelError
from pretrained.json_file import read_json
from pretrained.pieces import Tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


def open_shards(folder: Path) -> Tensors:
    """Read the headers of a folder's safetensors files.

    Raises:
      ModelError: a file is missing or broken, or a tensor is twice there or is no float.
    """
    held: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _files(folder):
        opened = _open(file)
        for name in opened.keys():
            if name in held:
                raise ModelError(f"the tensor {name!r} is in two files, one of them {file.name}")
            view = opened.get_slice(name)
            if view.get_dtype() not in FLOATS:
                kinds = ", ".join(FLOATS)
                raise ModelError(f"{name!r} is {view.get_dtype()}; supported are {kinds}")
            held[name], shapes[name] = opened, tuple(view.get_shape())
    return Tensors(shapes, lambda name: held[name].get_tensor(name))


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ModelError(_nothing(folder))
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{INDEX} has no 'weight_map' from tensors to files")
    names = sorted(set(places.values()))
    for name in names:
        # An index comes with a download: it must not lead out of its folder.
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{INDEX} names {name!r}, which is not in the folder: download it too")
    return [folder / name for name in names]


def _nothing(folder: Path) -> str:
    pickles = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")]
    why = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
    return f"neither {SINGLE} nor {INDEX} is in the folder{why}: save the model as safetensors"


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise ModelError(
            f"{file.name} ({size:,} bytes) is no whole safetensors file: {error}. Download it again"
        ) from error
