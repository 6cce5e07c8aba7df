"""Merging: a Hugging Face model folder and a PEFT folder become one model folder."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rslora_jax.files import read_json
from rslora_jax.folders import Folder, open_folder
from rslora_jax.paths import AdapterError
from rslora_jax.peft.adapter import PeftAdapter
from rslora_jax.peft.modules import read
from rslora_jax.peft.plans import HEAD, Change, apply, is_tied, plan
from rslora_jax.peft.shards import SHARD, write_folder

__all__ = ["SHARD", "merge_folders", "write_folder"]

Progress = Callable[[int, int, str], None]
# What a model folder holds beside its tensors and is read as text or data, never as a pickle.
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


def merge_folders(
    base: str | os.PathLike[str],
    adapter: PeftAdapter | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD,
    progress: Progress | None = None,
    transposed: bool | None = None,
) -> None:
    """Writes W + scale * B A of every adapted weight as a folder that transformers loads.

    Each sum is formed in float32 and cast once to the base's dtype. Tensors are read and written
    one by one: the peak of memory is near one shard.

    Args:
      base: the folder of the model that was adapted.
      adapter: what `read` returns, or a PEFT folder.
      out: the folder to write; it appears whole, or not at all.
      overwrite: True replaces a folder that is there.
      max_shard_bytes: of one safetensors file.
      progress: called as ``progress(done, total, name)`` before each tensor, and with
        ``done == total`` at the end.
      transposed: True if square expert weights are stored (in, out), False if (out, in). Other
        shapes say it themselves.

    Raises:
      AdapterError: if a folder cannot be read, the adapter does not fit the base, `out` exists
        or is one of the two, or a merged value is not finite.

    Warns:
      UserWarning: if the base ties its head to its embedding and the adapter changes one of them
        alone: the merged model then has a head of its own, and says so in ``config.json``.

    Example:
      >>> import tempfile
      >>> from safetensors.numpy import load_file, save_file
      >>> from rslora_jax.peft import Module, PeftAdapter, Settings
      >>> module = Module("q", "linear", np.ones((1, 2)), np.ones((2, 1)), 1, 3, 3.0)
      >>> adapter = PeftAdapter(
      ...     Settings(r=1, lora_alpha=3, target_modules=("q",)), (module,), {}, {}
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     base = Path(folder, "base")
      ...     base.mkdir()
      ...     save_file({"q.weight": np.eye(2, dtype="f4")}, base / "model.safetensors")
      ...     merge_folders(base, adapter, folder + "/merged")
      ...     load_file(folder + "/merged/model.safetensors")["q.weight"].tolist()
      [[4.0, 3.0], [3.0, 4.0]]
    """
    source = open_folder(Path(base))
    _check_out(Path(out), Path(base), adapter)
    found = adapter if isinstance(adapter, PeftAdapter) else read(Path(adapter))
    config = _config(Path(base))
    changes = plan(source, found, is_tied(source, config), transposed)
    config = _untied(config, source, changes)
    tensors = _tensors(source, changes, progress)
    write_folder(Path(out), tensors, config, max_shard_bytes, overwrite, _copied(Path(base)))


def _tensors(
    base: Folder, changes: Mapping[str, Change], progress: Progress | None
) -> Iterator[tuple[str, np.ndarray]]:
    for done, (name, change) in enumerate(changes.items()):
        if progress is not None:
            progress(done, len(changes), name)
        yield name, apply(base, name, change)
    if progress is not None:
        progress(len(changes), len(changes), "")


def _check_out(out: Path, base: Path, adapter: Any) -> None:
    sources = [base] if isinstance(adapter, PeftAdapter) else [base, Path(adapter)]
    for path in sources:
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out))
        if inside:
            raise AdapterError(
                f"{out} is, or holds, {path}, which is read and would be replaced. Write to "
                "another folder."
            )


def _config(base: Path) -> dict[str, Any] | None:
    file = base / "config.json"
    if not file.is_file():
        return None
    found = read_json(file)
    if not isinstance(found, dict):
        raise AdapterError(f"{file} must hold a JSON object, found {type(found).__name__}.")
    return found


def _copied(base: Path) -> list[Path]:
    """Settings, tokenizers and licences; the tensors are written anew, and pickles never."""
    skipped = ("adapter_config.json", "config.json")
    return [
        file
        for file in sorted(base.iterdir())
        if file.is_file()
        and (file.suffix in COPIED or file.name.startswith(("LICENSE", "NOTICE")))
        and file.name not in skipped
        and not file.name.endswith(".index.json")
    ]


def _untied(
    config: dict[str, Any] | None, base: Folder, changes: Mapping[str, Change]
) -> dict[str, Any] | None:
    if HEAD not in changes or changes[HEAD].source == HEAD or config is None:
        return config
    warnings.warn(
        f"The head of {base.path} is tied to {changes[HEAD].source!r}, and the adapter changes one "
        f"of the two alone. The merged model has its own {HEAD!r}, and tie_word_embeddings is "
        "false in its config.json.",
        stacklevel=3,
    )
    text = config.get("text_config")
    inner = {"text_config": {**text, "tie_word_embeddings": False}} if text else {}
    return {**config, **inner, "tie_word_embeddings": False}
