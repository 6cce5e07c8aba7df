"""Leaves: what a training state is made of, as arrays for Orbax and notes for JSON.

Orbax stores arrays and loses what else a leaf was: a typed PRNG key, a Python int, a NumPy
scalar, a string. The note of each leaf keeps it, so that every leaf comes back with the type
that it had.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax import paths
from rslora_jax.paths import AdapterError

__all__ = ["Packed", "check_like", "decode", "encode", "pack", "targets", "unpack"]

Note = dict[str, Any]

PYTHON = {kind.__name__: kind for kind in (bool, int, float, complex, str)}


class Packed(NamedTuple):
    """A tree as Orbax and JSON hold it.

    Attributes:
      notes: one JSON mapping a leaf: its path, kind, dtype, shape, and its value if small.
      arrays: the leaves that are arrays, named by the place of their note.
    """

    notes: list[Note]
    arrays: dict[str, Any]


def pack(tree: Any, root: str = "", first: int = 0) -> Packed:
    """Splits a tree into notes and arrays.

    Args:
      tree: a pytree of JAX and NumPy arrays, typed keys, and Python or NumPy scalars.
      root: a path to put before those of the leaves.
      first: the place of the first note.

    Returns:
      The notes and arrays. NumPy arrays are copied, so that they may change afterwards.

    Raises:
      AdapterError: for a leaf of another type, with its path.

    Example:
      >>> pack({"step": 3}).notes
      [{'path': 'step', 'kind': 'int', 'value': 3}]
    """
    flat = paths.flatten(tree)
    named = [root + path for path in flat.paths]
    notes = [_note(path, leaf) for path, leaf in zip(named, flat.leaves, strict=True)]
    arrays = {
        _name(first + place): _array(leaf)
        for place, (note, leaf) in enumerate(zip(notes, flat.leaves, strict=True))
        if _is_stored(note)
    }
    return Packed(notes, arrays)


def unpack(notes: Sequence[Note], arrays: Mapping[str, Any], like: Any, first: int = 0) -> Any:
    """Puts notes and arrays together again, in the structure of `like`.

    Args:
      notes: what `pack` noted.
      arrays: the arrays as Orbax restored them, by name.
      like: a tree of the same structure; its shardings place the typed keys.
      first: the place of the first note.

    Returns:
      The tree that was packed.
    """
    leaves, treedef = jax.tree.flatten(like)
    values = [
        _value(note, arrays.get(_name(first + place)), _sharding(leaf))
        for place, (note, leaf) in enumerate(zip(notes, leaves, strict=True))
    ]
    return jax.tree.unflatten(treedef, values)


def targets(notes: Sequence[Note], leaves: Sequence[Any], first: int = 0) -> dict[str, Any]:
    """Which stored arrays to read, and where each shall lie.

    Args:
      notes: what `pack` noted.
      leaves: for each note an array or `jax.ShapeDtypeStruct` to take the sharding of.
      first: the place of the first note.

    Returns:
      For each array a `jax.ShapeDtypeStruct` with its sharding; one without a sharding is
      to be read as a NumPy array.
    """
    return {
        _name(first + place): _target(note, leaf)
        for place, (note, leaf) in enumerate(zip(notes, leaves, strict=True))
        if _is_stored(note)
    }


def check_like(notes: Sequence[Note], like: Any, root: str = "") -> None:
    """Refuses a `like` whose leaves are not those that were packed.

    Raises:
      AdapterError: with the paths that only one side has, or the path whose shape, dtype or
        type differs and both values.
    """
    flat = paths.flatten(like)
    wanted = dict(zip((root + path for path in flat.paths), flat.leaves, strict=True))
    saved = {note["path"]: note for note in notes}
    missing, extra = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    if missing or extra:
        raise AdapterError(
            f"The state to restore has leaves that `like` has not: {_few(extra)}; and `like` has "
            f"leaves that were not saved: {_few(missing)}. Make `like` with the same optimizer "
            "and sites as the run that was saved."
        )
    for path, leaf in wanted.items():
        if not _fits(saved[path], leaf):
            raise AdapterError(
                f"{path!r} was saved as {_describe(saved[path])}, and `like` has "
                f"{_describe(_note(path, leaf))}. Make `like` with the same optimizer and sites "
                "as the run that was saved."
            )


def encode(tree: Any, leaves: list[Any]) -> Any:
    """Containers and JSON values as JSON; every other leaf is appended to `leaves`.

    Args:
      tree: nested dicts, lists and tuples of None, numbers, strings, bytes and arrays; other
        pytrees are flattened, and come back in the structure of a `like`.
      leaves: where the arrays go; the JSON holds their places.

    Returns:
      The JSON value that `decode` reads.

    Example:
      >>> decode(encode({"epoch": 2, "state": (b"x", None)}, []), [])
      {'epoch': 2, 'state': (b'x', None)}
    """
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree) is bytes:
        return {"bytes": base64.b64encode(tree).decode()}
    if type(tree) is dict and all(type(key) in (str, int) for key in tree):
        return {"dict": [[key, encode(value, leaves)] for key, value in tree.items()]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [encode(value, leaves) for value in tree]}
    start = len(leaves)
    leaves.extend(jax.tree.leaves(tree))
    if leaves[start:] and leaves[start] is tree:
        return {"leaf": start}
    return {"tree": [type(tree).__name__, start, len(leaves)]}


def decode(value: Any, leaves: Sequence[Any], like: Any = None) -> Any:
    """Reads what `encode` wrote.

    Args:
      value: the JSON value.
      leaves: the arrays, in their places.
      like: a tree with the same custom pytree nodes, if there are any.

    Returns:
      The tree; dicts, lists and tuples are as they were saved, whatever `like` holds.

    Raises:
      AdapterError: if a custom pytree node has no counterpart in `like`.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "leaf":
        return leaves[content]
    if kind == "tree":
        return _rebuild(*content, leaves, like)
    if kind == "dict":
        likes = like if isinstance(like, dict) else {}
        return {key: decode(inner, leaves, likes.get(key)) for key, inner in content}
    fits = isinstance(like, list | tuple) and len(like) == len(content)
    likes = like if fits else [None] * len(content)
    items = [decode(inner, leaves, each) for inner, each in zip(content, likes, strict=True)]
    return items if kind == "list" else tuple(items)


def _rebuild(name: str, start: int, stop: int, leaves: Sequence[Any], like: Any) -> Any:
    treedef = jax.tree.structure(like)
    if type(like).__name__ != name or treedef.num_leaves != stop - start:
        raise AdapterError(
            f"`data` was saved with a {name} of {stop - start} leaves, and `like` has "
            f"{treedef} there. Give `like.data` the same structure."
        )
    return jax.tree.unflatten(treedef, leaves[start:stop])


def _note(path: str, leaf: Any) -> Note:
    note: Note = {"path": path, "kind": type(leaf).__name__}
    if type(leaf) in PYTHON.values():
        return {**note, "value": leaf if type(leaf) is not complex else [leaf.real, leaf.imag]}
    if type(leaf) is bytes:
        return {**note, "value": base64.b64encode(leaf).decode()}
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise AdapterError(
            f"{path!r} is a {type(leaf).__name__}, which cannot be saved. A training state is "
            "made of arrays, typed PRNG keys, numbers, strings and bytes."
        )
    dtype = leaf.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in "OUSMm":
        raise AdapterError(f"{path!r} has the dtype {dtype}, which cannot be saved.")
    note |= {"kind": _kind(leaf), "dtype": str(dtype), "shape": list(leaf.shape)}
    if note["kind"] == "key" and isinstance(leaf, jax.Array):
        note["impl"] = str(jax.random.key_impl(leaf))
    if getattr(leaf, "weak_type", False):
        note["weak"] = True
    return note


def _kind(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key"
    if isinstance(leaf, np.ndarray):
        return "numpy"
    return "numpy scalar" if isinstance(leaf, np.generic) else "array"


def _is_stored(note: Note) -> bool:
    """Orbax takes no arrays without elements: their note says it all."""
    return "shape" in note and 0 not in note["shape"]


def _array(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if _kind(leaf) == "key" else leaf
    return np.array(leaf)


def _target(note: Note, leaf: Any) -> Any:
    if note["kind"] == "key":  # its data has other dimensions than the sharding of the key
        return jax.ShapeDtypeStruct((), np.uint32)
    dtype = jnp.dtype(note["dtype"])
    if note["kind"] == "array" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise AdapterError(
            f"{note['path']!r} was saved as {dtype}, which JAX would cut to "
            f"{jax.dtypes.canonicalize_dtype(dtype)}. Set jax_enable_x64 to restore it."
        )
    fits = note["kind"] == "array" and list(np.shape(leaf)) == note["shape"]
    sharding = _sharding(leaf) if fits and not _is_weak(note) else None
    return jax.ShapeDtypeStruct(tuple(note["shape"]), dtype, sharding=sharding)


def _sharding(leaf: Any) -> Any:
    """Where a leaf lies, None for one that JAX may put wherever it is needed."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _value(note: Note, array: Any, sharding: Any) -> Any:
    kind = note["kind"]
    if kind == "complex":
        return complex(*note["value"])
    if kind == "bytes":
        return base64.b64decode(note["value"])
    if kind in PYTHON:
        return PYTHON[kind](note["value"])
    if kind == "key":
        data = jnp.zeros((*note["shape"], 0), np.uint32) if array is None else jnp.asarray(array)
        return _placed(jax.random.wrap_key_data(data, impl=note["impl"]), sharding)
    if array is None:
        array = np.zeros(note["shape"], jnp.dtype(note["dtype"]))
    if kind == "array":
        return array if isinstance(array, jax.Array) else _placed(_jax(note, array), sharding)
    return np.asarray(array)[()] if kind == "numpy scalar" else np.asarray(array)


def _jax(note: Note, array: np.ndarray) -> jax.Array:
    # A Python number makes a weakly typed array.
    return jnp.asarray(array.item() if _is_weak(note) else array)


def _is_weak(note: Note) -> bool:
    return bool(note.get("weak")) and not note["shape"]


def _placed(array: jax.Array, sharding: Any) -> jax.Array:
    return array if sharding is None else jax.device_put(array, sharding)


def _fits(note: Note, leaf: Any) -> bool:
    other = _note("", leaf)
    if "shape" in note and "shape" in other:
        return (note["dtype"], note["shape"]) == (other["dtype"], other["shape"])
    numbers = [_number(each) for each in (note, other)]
    return numbers[0] == numbers[1] if all(numbers) else note["kind"] == other["kind"]


def _number(note: Note) -> str:
    """The kind of a single number: an int and an int32 scalar may stand for one another."""
    if note["kind"] in ("bool", "int", "float", "complex"):
        return note["kind"]
    if note.get("shape") != [] or note["kind"] == "key":
        return ""
    dtype = jnp.dtype(note["dtype"])
    kinds = {"bool": np.bool_, "int": np.integer, "float": np.floating, "complex": complex}
    return next((kind for kind, of in kinds.items() if jnp.issubdtype(dtype, of)), "")


def _describe(note: Note) -> str:
    if "shape" in note:
        return f"a {note['kind']} of {note['dtype']}{note['shape']}"
    return f"a Python {note['kind']}"


def _few(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(map(repr, names[:most])) or "none") + more


def _name(place: int) -> str:
    return f"{place:05d}"
