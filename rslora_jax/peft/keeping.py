"""Keeping: what a PEFT folder holds beside the factors: whole tensors and rows of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rslora_jax.paths import AdapterError
from rslora_jax.peft.modules import Module
from rslora_jax.peft.placing import Placed, Where, place
from rslora_jax.peft.replacing import fetch
from rslora_jax.peft.rules import Name, module_of
from rslora_jax.sites import Site

__all__ = ["Saved", "Tokens", "kept", "rows_of", "tensors_of_leaves"]

Saved = Mapping[str, Any]
Tokens = Mapping[str, tuple[Sequence[int], Any]]


def tensors_of_leaves(
    saved: Saved, rules: tuple[Name, ...], sites: Sequence[Site], dtype: Any
) -> tuple[dict[str, np.ndarray], list[Placed]]:
    """The saved leaves as tensors of the base, and where they stand.

    Raises:
      AdapterError: if a leaf has no name, or is not finite.
    """
    known = {site.path: site for site in sites}
    tensors: dict[str, np.ndarray] = {}
    placed = []
    for path, leaf in saved.items():
        one = place(rules, path, leaf, known.get(path))
        placed.append(one)
        for at, name in one.names().items():
            array = _finite_tensor(path, fetch(Where(one, at), leaf))
            tensors[name] = array if dtype is None else array.astype(dtype)
    return tensors, placed


def _finite_tensor(path: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise AdapterError(f"{path!r} holds NaN or infinite values. Write an earlier checkpoint.")
    return array


def rows_of(
    tokens: Tokens, rules: tuple[Name, ...], sites: Sequence[Site], dtype: Any
) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """The trained rows by the embedding's name: their indices, and [n, d].

    Raises:
      AdapterError: if a leaf is no table of embeddings, or has no such row.
    """
    known = {site.path: site for site in sites}
    found = {}
    for path, (indices, table) in tokens.items():
        one = place(rules, path, table, known.get(path))
        wanted = tuple(int(k) for k in indices)
        if one.layout.kind != "embedding" or not all(0 <= k < one.layout.shape[0] for k in wanted):
            raise AdapterError(
                f"Rows {wanted[:8]} of {path!r} were to be written; it is {one.layout.kind} of "
                f"shape {one.layout.shape}. Name rows of an embedding table."
            )
        rows = _finite_tensor(path, np.asarray(jax.device_get(table[np.asarray(wanted)])))
        name = module_of(one.names()[()])[0]
        found[name] = (wanted, rows if dtype is None else rows.astype(dtype))
    return found


def kept(full: Mapping[str, np.ndarray], modules: Sequence[Module]) -> dict[str, Any]:
    """`modules_to_save` and `bias` for the tensors that are written in full."""
    adapted = {module.name for module in modules}
    biases = {name.removesuffix(".bias") for name in full if name.endswith(".bias")}
    whole = tuple(dict.fromkeys(n.rpartition(".")[0] for n in full if not n.endswith(".bias")))
    clash = [name for name in full if name.rpartition(".")[0] in adapted.intersection(whole)]
    if clash:
        raise AdapterError(
            f"{clash[0]!r} is adapted and was to be saved in full too. Do one of them: merge the "
            "adapter, or leave the leaf out of `saved`."
        )
    # PEFT reads a module to save as a whole, so a bias alone has to come in by another door.
    alone = biases.difference(whole)
    bias = "none" if not alone else "lora_only" if alone <= adapted else "all"
    return {"bias": bias, "modules_to_save": whole or None}
