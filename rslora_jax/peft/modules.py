"""Modules: the tensors of a PEFT LoRA folder, module by module, as NumPy arrays.

The layout is that of PEFT 0.21.2 (`peft/utils/save_and_load.py`, `peft/tuners/lora/layer.py`):
``base_model.model.<module>.lora_A.weight`` is (r, in), ``lora_B.weight`` is (out, r).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rslora_jax.files import whole_folder
from rslora_jax.folders import FLOATS, PICKLES, Folder, open_file, write_file
from rslora_jax.paths import AdapterError
from rslora_jax.peft.adapter import Module, PeftAdapter, tensors_of
from rslora_jax.peft.settings import CONFIG, Settings
from rslora_jax.peft.tensors import assemble

__all__ = ["PARAMETERS", "WEIGHTS", "Module", "PeftAdapter", "read", "write"]

WEIGHTS = "adapter_model.safetensors"
# The order in which transformers' expert modules register their parameters; a folder does not
# say which of them an adapter belongs to, only how deep it is nested.
PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def read(
    folder: str | Path, *, strict: bool = True, parameters: Sequence[str] = PARAMETERS
) -> PeftAdapter:
    """Reads a PEFT LoRA folder.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``. Pickles are refused.
      strict: False warns, rather than refuses, where ``target_modules``,
        ``layers_to_transform`` and the tensors disagree about which modules are adapted.
      parameters: where several parameters of one module are adapted, their names in the order
        in which the module registers them.

    Returns:
      `PeftAdapter`: every tensor of the file, used once, in the file's own dtype.

    Raises:
      AdapterError: if a file is missing or broken, a setting cannot be held, or settings and
        tensors disagree, with the tensor, both values and the remedy.

    Warns:
      UserWarning: for unknown settings, and where two patterns match one module.

    Example:
      >>> import tempfile
      >>> module = Module("q", "linear", np.ones((2, 4)), np.ones((3, 2)), 2, 8, 4.0)
      >>> adapter = PeftAdapter(Settings(r=2, target_modules=("q",)), (module,), {}, {})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(folder + "/adapter", adapter)
      ...     read(folder + "/adapter").modules[0].b.shape
      (3, 2)
    """
    path = Path(folder)
    _check_files(path)
    settings = Settings.read(path / CONFIG)
    arrays = _arrays(open_file(path / WEIGHTS))
    try:
        return assemble(settings, arrays, strict, tuple(parameters))
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def write(folder: str | Path, adapter: PeftAdapter, overwrite: bool = False) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
      folder: where; it appears whole, or not at all.
      adapter: what `read` returns, or was made; it is checked as a folder is that is read.
      overwrite: True replaces a folder that is there.

    Raises:
      AdapterError: if the folder exists, or the adapter is not consistent.
      OSError: if it cannot be written, as on a full disk, with the name of the file.
    """
    arrays = tensors_of(adapter)
    order = tuple(dict.fromkeys(m.parameter for m in _deepest_first(adapter) if m.parameter))
    checked = assemble(adapter.settings, arrays, True, order or PARAMETERS)
    _check_scales(adapter, checked)
    with whole_folder(folder, overwrite) as temporary:
        text = json.dumps(adapter.settings.to_dict(), indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        write_file(temporary / WEIGHTS, arrays)


def _check_scales(adapter: PeftAdapter, checked: PeftAdapter) -> None:
    """A file holds no scale: every reader computes it from the settings."""
    scales = {module.weight: module.scale for module in checked.modules}
    for module in adapter.modules:
        if not math.isclose(module.scale, scales.get(module.weight, math.nan), rel_tol=1e-6):
            raise AdapterError(
                f"{module.weight!r} has the scale {module.scale}, but the settings give "
                f"{scales.get(module.weight)}, which every reader would use. Correct lora_alpha or "
                "alpha_pattern, or multiply B by the quotient."
            )


def _deepest_first(adapter: PeftAdapter) -> list[Module]:
    return sorted(adapter.modules, key=lambda module: -module.depth)


def _check_files(path: Path) -> None:
    if not path.is_dir():
        raise AdapterError(f"A PEFT folder was asked for, found no folder {path}.")
    names = sorted(file.name for file in path.iterdir())
    if CONFIG not in names:
        inner = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
        hint = (
            f"adapters in its folders {inner[:8]}. Pass one of them"
            if inner
            else f"{names[:6] or 'nothing'}. Pass the folder that PEFT's save_pretrained wrote"
        )
        raise AdapterError(f"{path} needs {CONFIG}, found {hint}.")
    if WEIGHTS not in names:
        pickles = [name for name in names if name.endswith(PICKLES)]
        why = (
            f"only {pickles[:4]}, a pickle, which can run code when opened and is not read. Save "
            "the adapter as safetensors"
            if pickles
            else f"{names[:6]}. Download it too"
        )
        raise AdapterError(f"{path} needs {WEIGHTS}, found {why}.")


def _arrays(folder: Folder) -> Mapping[str, np.ndarray]:
    for name, tensor in folder.tensors.items():
        if tensor.dtype not in FLOATS:
            raise AdapterError(
                f"{tensor.file}: {name!r} is {tensor.dtype}; an adapter is one of "
                f"{', '.join(FLOATS)}. Save it in one of them."
            )
    return {name: folder.read(name) for name in folder.tensors}
