"""Sources: an adapter in a folder, whether this library or PEFT wrote it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rslora_jax import checkpoint, peft
from rslora_jax.checkpoint import Fingerprint, fingerprint
from rslora_jax.config import LoraConfig
from rslora_jax.files import read_json
from rslora_jax.folders import INDEX, SINGLE, open_folder
from rslora_jax.paths import AdapterError, insert
from rslora_jax.peft.adapter import Module, PeftAdapter
from rslora_jax.peft.arrange import part, weight_in
from rslora_jax.peft.names import from_list
from rslora_jax.peft.placing import Placed, place
from rslora_jax.peft.rules import find
from rslora_jax.sites import Site, Sites
from rslora_jax.targets import config_of

__all__ = ["Source", "check_base", "names_of", "open_source", "write_source"]

SETTINGS = "adapter_config.json"
TOLD = "peft"  # where an Orbax folder keeps what a PEFT folder says beside


class Source(NamedTuple):
    """An adapter that was read from a folder.

    Attributes:
      kind: ``"orbax"`` or ``"peft"``.
      lora: the factors.
      sites: their sites.
      config: the config that gives the sites.
      step: the training step, 0 where it is not known.
      base: the fingerprint of the base, where it is known.
      extra: the user's JSON values.
      told: what a PEFT folder says beside: ``base_model`` and ``task_type``.
      held: names of what it holds beside factors, which only a model can take.
    """

    kind: str
    lora: Mapping[str, Any]
    sites: Sites
    config: LoraConfig
    step: int = 0
    base: Fingerprint | None = None
    extra: Mapping[str, Any] = {}
    told: Mapping[str, Any] = {}
    held: tuple[str, ...] = ()


def open_source(folder: Path, names: Sequence[peft.Name] | None) -> Source:
    """Reads an Orbax folder (of `checkpoint.save`, or a run: its newest step) or a PEFT folder.

    Args:
      folder: the folder.
      names: the mapping of a PEFT folder's names to paths; None keeps its own names, each module
        a site of axes ``oi`` (``boi`` for experts).

    Raises:
      AdapterError: if it is neither, or cannot be read.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no folder"
        raise AdapterError(f"A folder with an adapter was asked for, found {found} {folder}.")
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        raise AdapterError(f"{folder} is the folder of a model, where an adapter was asked for.")
    if (folder / SETTINGS).exists() or _is_peft(folder):
        return _from_peft(folder, names)
    newest = _newest(folder)
    record, restored = checkpoint.read_record(newest), checkpoint.restore(newest)
    told = restored.extra.get(TOLD)
    return Source(
        "orbax",
        restored.lora,
        restored.sites,
        restored.config,
        restored.step,
        record.base,
        restored.extra,
        told if isinstance(told, Mapping) else {},
    )


def write_source(
    folder: Path,
    source: Source,
    to: str,
    names: Sequence[peft.Name],
    *,
    overwrite: bool,
) -> None:
    """Writes an adapter as ``"orbax"``, ``"peft"`` or ``"peft-portable"``."""
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    if to == "orbax":
        checkpoint.save(
            folder,
            source.lora,
            source.sites,
            source.config,
            step=source.step,
            extra={**source.extra, TOLD: dict(source.told)} if source.told else source.extra,
            base=source.base,
            overwrite=overwrite,
        )
        return
    form = "portable" if to == "peft-portable" else "native"
    told = {name: source.told[name] for name in ("base_model", "task_type") if name in source.told}
    peft.save(folder, source.lora, source.sites, names, form, overwrite=overwrite, **told)


def names_of(text: str) -> Sequence[peft.Name]:
    """The mapping that a command line names: ``llama``, or a JSON file of rules.

    Raises:
      AdapterError: if it is neither.
    """
    if text == "llama":
        return peft.LLAMA
    if not Path(text).is_file():
        raise AdapterError(
            f"--names is llama or a JSON file with a list of "
            f'{{"path": REGEX, "tensor": NAME, "axes": ROLES}}, found {text!r}, which is no file.'
        )
    return from_list(read_json(text))


def check_base(folder: Path, source: Source, names: Sequence[peft.Name]) -> None:
    """Compares the weights of a model folder with those that the adapter was trained on.

    All that have a name are compared, those of an adapter that does not know its base excepted.

    Raises:
      AdapterError: if one is another weight, with its path and both hashes.
    """
    model, known = open_folder(folder), {site.path: site for site in source.sites}
    for leaf in source.base.leaves if source.base else ():
        if leaf.content is None or (find(names, leaf.path) is None and leaf.path not in known):
            continue
        like = jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
        placed = place(tuple(names), leaf.path, like, known.get(leaf.path))
        found = fingerprint({leaf.path: _weight(placed, model)}).leaves[0]
        if found.content != leaf.content:
            raise AdapterError(
                f"The adapter was trained on another base: the weight at {leaf.path!r} "
                f"({placed.tensor}) has the content hash {found.content} in {folder}, and had "
                f"{leaf.content}. Merge it into the model that it was trained on, or, if the "
                "weights were rounded on purpose, pass --any-base."
            )


def _weight(placed: Placed, model: Any) -> np.ndarray:
    whole = np.empty(placed.layout.shape, np.dtype(placed.dtype))
    for at, name in placed.names().items():
        if name not in model.tensors:
            raise AdapterError(f"{model.path} has no tensor {name!r} for {placed.path!r}.")
        tensor = model.read(name).astype(whole.dtype)
        if tensor.size != whole[part(placed.layout, at)].size:
            raise AdapterError(
                f"{name!r} of {model.path} has shape {tensor.shape}, and {placed.path!r} "
                f"was trained at shape {placed.layout.shape}. Use the model that was adapted."
            )
        whole[part(placed.layout, at)] = weight_in(placed.layout, tensor)
    return whole


def _is_peft(folder: Path) -> bool:
    return any(folder.glob("adapter_model.*"))


def _newest(folder: Path) -> Path:
    """The newest step of a run's folder; any other folder is its own."""
    steps = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return max(steps, key=lambda path: int(path.name)) if steps else folder


def _from_peft(folder: Path, names: Sequence[peft.Name] | None) -> Source:
    adapter = peft.read(os.fspath(folder))
    settings = adapter.settings
    told = {"base_model": settings.base_model_name_or_path, "task_type": settings.task_type}
    if names is None:
        return _plain(folder, adapter)._replace(told=told)
    try:
        loaded = peft.load(folder, None, names)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from error
    return Source("peft", loaded.params.lora, loaded.sites, loaded.config, told=told)


def _plain(folder: Path, adapter: PeftAdapter) -> Source:
    for module in adapter.modules:
        if module.magnitude is not None:
            raise AdapterError(
                f"{folder}: {module.name!r} is a DoRA module, which is no W + scale * B A. Merge "
                "it with `rslora merge`."
            )
    lora: dict[str, Any] = {}
    sites = []
    for module in adapter.modules:
        path = module.weight
        sites.append(_site(path, module))
        insert(lora, path, _factors(module))
    made = Sites(sites)
    biases = [f"{m.name}.lora_B.bias" for m in adapter.modules if m.bias is not None]
    held = (*adapter.saved, *adapter.tokens, *biases)
    return Source("peft", lora, made, config_of(made), held=held)


def _site(path: str, module: Module) -> Site:
    stack = module.a.shape[0:1] if module.kind == "expert" else ()
    a, b = _factors(module).values()
    shape = (*stack, b.shape[-1], a.shape[-2])
    axes = "b" * len(stack) + "oi"
    numbers = {"rank": module.rank, "alpha": float(module.alpha), "scale": module.scale}
    return Site(path, axes, shape, "float32", embedding=module.kind == "embedding", **numbers)


def _factors(module: Module) -> dict[str, np.ndarray]:
    a, b = module.a, module.b
    if module.kind == "conv":
        a, b = a.reshape(len(a), -1), b.reshape(b.shape[:2])
    return {"a": np.swapaxes(a, -1, -2), "b": np.swapaxes(b, -1, -2)}
