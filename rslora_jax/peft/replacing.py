"""Replacing: leaves of the base that an adapter's file holds in full, in part, or moves."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.formats import formed
from rslora_jax.paths import AdapterError, flatten, nearest, unflatten
from rslora_jax.peft.arrange import part, weight_in, weight_out, weight_shape
from rslora_jax.peft.modules import PeftAdapter
from rslora_jax.peft.placing import Where

__all__ = ["fetch", "replaced_base"]

Tensors = Mapping[str, Where]
Updates = dict[str, dict[tuple[int, ...], np.ndarray]]


def replaced_base(
    base: Any, adapter: PeftAdapter, tensors: Tensors
) -> tuple[Any, tuple[str, ...], dict[str, tuple[int, ...]]]:
    """The base with what the file holds of it, in the base's dtypes.

    Saved modules and biases replace, ``lora_bias`` is added as bias + scale * b, rows of tokens
    replace rows. The copy of an adapted embedding that PEFT saves beside its factors is only
    compared.

    Args:
      base: the tree, or None to leave all this out.
      adapter: the file.
      tensors: where each tensor of the base is.

    Returns:
      The new tree, the paths that changed, and the indices of rows by path.

    Raises:
      AdapterError: if a name is not in the base, a shape differs, a copy differs from the base,
        or only a part of a leaf is replaced and the base has no numbers.
    """
    if base is None:
        return None, (), {}
    flat = flatten(base)
    leaves = dict(zip(flat.paths, flat.leaves, strict=True))
    updates: Updates = {}
    adapted = {module.weight for module in adapter.modules}
    for name, array in adapter.saved.items():
        where = _where(tensors, name)
        _check_shape(name, where, array.shape)
        if name in adapted and _has_numbers(leaves[where.placed.path]):
            _check_copy(name, where, array, leaves)
        else:
            updates.setdefault(where.placed.path, {})[where.at] = array
    _add_biases(adapter, tensors, leaves, updates)
    tokens = _set_rows(adapter, tensors, leaves, updates)
    for path, arrays in updates.items():
        leaves[path] = _updated(leaves[path], arrays, tensors, path)
    changed = tuple(path for path in flat.paths if path in updates)
    return unflatten(flat, (leaves[path] for path in flat.paths)), changed, tokens


def fetch(where: Where, leaf: Any) -> np.ndarray:
    """One tensor of a leaf, on the host, as Hugging Face arranges it."""
    layout = where.placed.layout
    return weight_out(layout, np.asarray(jax.device_get(formed(leaf[part(layout, where.at)]))))


def _where(tensors: Tensors, name: str) -> Where:
    if name not in tensors:
        raise AdapterError(
            f"The adapter holds {name!r}, which no parameter of the base is named. The nearest "
            f"names are {nearest(name, tensors)}. Pass the base that was adapted, or names= that "
            "fit its paths."
        )
    return tensors[name]


def _check_shape(name: str, where: Where, shape: tuple[int, ...]) -> None:
    wanted = weight_shape(where.placed.layout)
    if shape != wanted:
        raise AdapterError(
            f"The adapter holds {name!r} of shape {shape}; {where.placed.path!r} of shape "
            f"{where.placed.layout.shape} takes {wanted}. Pass the base that was adapted (was its "
            "vocabulary changed?)."
        )


def _check_copy(name: str, where: Where, copy: np.ndarray, leaves: Mapping[str, Any]) -> None:
    found = fetch(where, leaves[where.placed.path])
    # Either side can be the other, rounded to a narrower dtype.
    if np.array_equal(copy.astype(found.dtype), found):
        return
    if np.array_equal(found.astype(copy.dtype), copy):
        return
    apart = np.abs(copy.astype(np.float64) - found.astype(np.float64)).max()
    raise AdapterError(
        f"The adapter holds a copy of its base's {name!r}, which differs from "
        f"{where.placed.path!r} by up to {apart:.3g}: it was trained on another base. Pass that "
        "base, or put the copy into this one if the rest is the same."
    )


def _add_biases(
    adapter: PeftAdapter, tensors: Tensors, leaves: Mapping[str, Any], updates: Updates
) -> None:
    for module in adapter.modules:
        if module.bias is None:
            continue
        name = f"{module.name}.bias"
        where = _where(tensors, name)
        _check_shape(name, where, module.bias.shape)
        old = _current(where, leaves, updates)
        new = old.astype(np.float32) + np.float32(module.scale) * module.bias.astype(np.float32)
        updates.setdefault(where.placed.path, {})[where.at] = new


def _set_rows(
    adapter: PeftAdapter, tensors: Tensors, leaves: Mapping[str, Any], updates: Updates
) -> dict[str, tuple[int, ...]]:
    tokens = {}
    for name, (indices, rows) in adapter.tokens.items():
        where = _where(tensors, f"{name}.weight")
        table = np.array(_current(where, leaves, updates))
        if rows.shape[1:] != table.shape[1:] or not all(0 <= k < len(table) for k in indices):
            raise AdapterError(
                f"The adapter holds rows {indices[:8]} of {name!r}, of shape {rows.shape}; "
                f"{where.placed.path!r} is a table of {table.shape}. Pass the base that was "
                "adapted."
            )
        table[list(indices)] = rows.astype(table.dtype)
        updates.setdefault(where.placed.path, {})[where.at] = table
        tokens[where.placed.path] = tuple(indices)
    return tokens


def _current(where: Where, leaves: Mapping[str, Any], updates: Updates) -> np.ndarray:
    """A tensor as it is so far."""
    path = where.placed.path
    if where.at in updates.get(path, {}):
        return updates[path][where.at]
    if not _has_numbers(leaves[path]):
        raise AdapterError(
            f"The adapter changes a part of {path!r}, which is a shape without numbers. Pass the "
            "base with its arrays."
        )
    return fetch(where, leaves[path])


def _updated(
    leaf: Any, arrays: Mapping[tuple[int, ...], np.ndarray], tensors: Tensors, path: str
) -> Any:
    layout = next(w.placed.layout for w in tensors.values() if w.placed.path == path)
    if not _has_numbers(leaf):
        count = int(np.prod(layout.stack, initial=1))
        if len(arrays) < count:
            raise AdapterError(
                f"The adapter replaces {len(arrays)} of the {count} layers of {path!r}, which is a "
                "shape without numbers. Pass the base with its arrays."
            )
        leaf = jnp.zeros(leaf.shape, leaf.dtype)
    leaf = formed(leaf)
    new = np.array(leaf) if isinstance(leaf, np.ndarray) else leaf
    for at, array in arrays.items():
        value = weight_in(layout, array).astype(leaf.dtype)
        if isinstance(new, np.ndarray):
            new[part(layout, at)] = value
        else:
            new = new.at[part(layout, at)].set(value)
    return new


def _has_numbers(leaf: Any) -> bool:
    return not isinstance(leaf, jax.ShapeDtypeStruct)
