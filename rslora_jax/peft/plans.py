"""Plans: what merging does to each tensor of a base, known before anything is written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rslora_jax.folders import FLOATS, Folder
from rslora_jax.paths import AdapterError, nearest
from rslora_jax.peft.adapter import Module, PeftAdapter
from rslora_jax.peft.weights import check_fit, merge_weight

__all__ = ["Change", "apply", "is_tied", "plan"]

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclasses.dataclass
class Change:
    """What becomes of one tensor.

    Attributes:
      source: the base's tensor that it starts from; another one's where the base ties two.
      saved: what replaces it first, or None.
      rows: (indices, rows) that replace rows next, or None.
      module: the adapter summed into it, or None.
      turned: whether it is stored (in, out).
      shift: what is added to it, or None.
    """

    source: str
    saved: np.ndarray | None = None
    rows: tuple[tuple[int, ...], np.ndarray] | None = None
    module: Module | None = None
    turned: bool | None = None
    shift: np.ndarray | None = None


def plan(
    base: Folder, adapter: PeftAdapter, tied: bool, transposed: bool | None = None
) -> dict[str, Change]:
    """The change of every tensor of the merged model, checked against the base's shapes.

    Args:
      base: the opened folder.
      adapter: what is merged.
      tied: whether the base's head is its embedding.
      transposed: how square expert weights are stored; see `weights.merge_weight`.

    Returns:
      From name to `Change`, sorted. Where only one of embedding and head is changed, a tied
      head appears in it, as a tensor of its own.

    Raises:
      AdapterError: naming what the base does not have or has in another shape.
    """
    changes = {name: Change(name) for name in base.tensors}
    embedding = _embedding(base) if tied else ""
    if embedding:
        changes[HEAD] = Change(embedding)
    for name, array in adapter.saved.items():
        change = _change(changes, name, "modules_to_save or a bias")
        _check_shape(base, change.source, name, array.shape)
        change.saved = array
    for module in adapter.modules:
        _plan_module(base, changes, module, _turned(adapter, module, transposed))
    for name, rows in adapter.tokens.items():
        _plan_rows(base, _change(changes, f"{name}.weight", "rows of tokens"), name, rows)
    if embedding:
        _plan_head(changes, embedding, adapter)
    return dict(sorted(changes.items()))


def is_tied(base: Folder, config: Mapping[str, Any] | None) -> bool:
    """Whether the head is the embedding: the configuration says so, or there is no head."""
    texts = [config or {}, (config or {}).get("text_config") or {}]
    said = [t["tie_word_embeddings"] for t in texts if "tie_word_embeddings" in t]
    if said:
        return bool(said[-1]) and bool(_embedding(base))
    names = str((config or {}).get("architectures"))
    return HEAD not in base.tensors and "ForCausalLM" in names and bool(_embedding(base))


def apply(base: Folder, name: str, change: Change) -> np.ndarray:
    """One tensor of the merged model, in the base's dtype.

    Raises:
      AdapterError: if a number is not finite after the sum or the cast.
    """
    array = base.read(change.source)
    dtype = array.dtype
    with np.errstate(over="ignore"):
        array = array if change.saved is None else change.saved.astype(dtype)
        if change.rows is not None:
            array = array.copy()
            array[list(change.rows[0])] = change.rows[1].astype(dtype)
        if change.module is not None:
            array = merge_weight(array, change.module, change.turned)
        if change.shift is not None:
            wide = np.float64 if dtype == np.float64 else np.float32
            array = (array.astype(wide) + change.shift.astype(wide)).astype(dtype)
    if array.dtype.kind in "fV" and _is_changed(change) and not np.isfinite(array).all():
        raise AdapterError(f"{name!r} is not finite in {dtype} after the merge. Use a wider base.")
    return array


def _is_changed(change: Change) -> bool:
    parts = (change.saved, change.rows, change.module, change.shift)
    return any(part is not None for part in parts)


def _change(changes: dict[str, Change], name: str, what: str) -> Change:
    if name not in changes:
        raise AdapterError(
            f"The adapter has {what} for {name!r}, which the base does not hold. The nearest are "
            f"{nearest(name, changes)}. Pass the base that it was trained on."
        )
    return changes[name]


def _turned(adapter: PeftAdapter, module: Module, transposed: bool | None) -> bool | None:
    return transposed if module.parameter else adapter.settings.fan_in_fan_out


def _plan_module(
    base: Folder, changes: dict[str, Change], module: Module, turned: bool | None
) -> None:
    change = _change(changes, module.weight, "factors")
    tensor = base.tensors[change.source]
    if tensor.dtype not in FLOATS:
        raise AdapterError(
            f"{module.weight!r} is {tensor.dtype} in the base, which is quantized: no sum can be "
            f"formed. Pass a base in one of {', '.join(FLOATS)}."
        )
    if change.module is not None:
        raise AdapterError(f"Two modules of the adapter change {module.weight!r}. Merge each.")
    change.module, change.turned = module, check_fit(tensor.shape, module, turned)
    if module.bias is not None:
        bias = _change(changes, f"{module.name}.bias", "a bias of lora_B")
        _check_shape(base, bias.source, f"{module.name}.bias", module.bias.shape)
        bias.shift = module.scale * module.bias.astype(np.float64)


def _plan_rows(
    base: Folder, change: Change, name: str, rows: tuple[tuple[int, ...], np.ndarray]
) -> None:
    shape = base.tensors[change.source].shape
    if len(shape) != 2 or rows[1].shape[1] != shape[1] or max(rows[0]) >= shape[0]:
        raise AdapterError(
            f"{name!r} has rows of shape {rows[1].shape} up to index {max(rows[0])}, the base's "
            f"embedding has shape {shape}. Pass the base that it was trained on."
        )
    change.rows = rows


def _check_shape(base: Folder, source: str, name: str, found: tuple[int, ...]) -> None:
    wanted = base.tensors[source].shape
    if found != wanted:
        raise AdapterError(
            f"{name!r} has shape {found} in the adapter and {wanted} in the base. It was trained "
            "on another base, or its embedding was resized: resize the base first."
        )


def _embedding(base: Folder) -> str:
    ends = tuple(f".{name}" for name in EMBEDDINGS)
    found = [name for name in base.tensors if name.endswith(ends) or name in EMBEDDINGS]
    return found[0] if len(found) == 1 else ""


def _plan_head(changes: dict[str, Change], embedding: str, adapter: PeftAdapter) -> None:
    """PEFT adapts one of two tied modules alone, and ties their rows of tokens."""
    head, table = changes[HEAD], changes[embedding]
    own = head.module is not None or head.saved is not None
    follows = adapter.settings.ensure_weight_tying
    if follows and own:
        raise AdapterError(
            f"The adapter changes {HEAD!r}, the base ties it to {embedding!r}, and "
            "ensure_weight_tying is true: which of the two is meant is not in the folder. Merge "
            "it with PEFT."
        )
    differs = own or (not follows and (table.module is not None or table.saved is not None))
    if not differs:
        del changes[HEAD]
        return
    head.rows = head.rows or table.rows
    if table.module is not None and head.saved is None:
        head.saved = table.saved  # a copy of the base under the adapter, which both share
