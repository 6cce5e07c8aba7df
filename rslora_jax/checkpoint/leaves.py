"""Leaves: what a training state is made of, as arrays for Orbax and notes for JSON.

Orbax stores arrays and loses what else a leaf was: a typed PRNG key, a Python int, a NumPy
scalar, a string. The note of each leaf keeps it, so that every leaf comes back with the type
that it had.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.checkpoint.processes import is_local
from rslora_jax.paths import AdapterError

__all__ = ["Packed", "check_like", "pack", "targets", "unpack"]

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


def pack(names: Sequence[str], leaves: Sequence[Any]) -> Packed:
    """Splits leaves into notes and arrays.

    Args:
      names: the path of each leaf.
      leaves: JAX and NumPy arrays, typed keys, Python and NumPy scalars, text and bytes.

    Returns:
      The notes and arrays. NumPy arrays are copied, so that they may change afterwards.

    Raises:
      AdapterError: for a leaf of another type, with its path.

    Example:
      >>> pack(["step"], [3]).notes
      [{'path': 'step', 'kind': 'int', 'value': 3}]
    """
    notes = [_note(path, leaf) for path, leaf in zip(names, leaves, strict=True)]
    places = [place for place, note in enumerate(notes) if _is_stored(note)]
    return Packed(notes, {_name(place): _array(leaves[place]) for place in places})


def targets(notes: Sequence[Note], guides: Sequence[Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Which stored arrays to read, and where each shall lie.

    Args:
      notes: what `pack` noted.
      guides: for each note an array or struct to take the sharding of, or None.

    Returns:
      By name a `jax.ShapeDtypeStruct` with its sharding; one without a sharding is to be read
      as a NumPy array.

    Raises:
      AdapterError: for a 64-bit JAX array without 64-bit types, with its path.
    """
    pairs = enumerate(zip(notes, guides, strict=True))
    return {_name(k): _target(note, guide) for k, (note, guide) in pairs if _is_stored(note)}


def unpack(notes: Sequence[Note], arrays: Mapping[str, Any], guides: Sequence[Any]) -> list[Any]:
    """Puts notes and arrays together again.

    Args:
      notes: what `pack` noted.
      arrays: what was read for the `targets`, by name.
      guides: as in `targets`.

    Returns:
      The leaves that were packed.

    Example:
      >>> packed = pack(["step", "lr"], [3, np.float32(0.5)])
      >>> unpack(packed.notes, packed.arrays, [None, None])
      [3, np.float32(0.5)]
    """
    pairs = enumerate(zip(notes, guides, strict=True))
    return [_value(note, arrays.get(_name(k)), _sharding(guide)) for k, (note, guide) in pairs]


def check_like(notes: Sequence[Note], names: Sequence[str], leaves: Sequence[Any]) -> None:
    """Refuses leaves that are not those that were packed.

    Raises:
      AdapterError: with the paths that only one side has, or the path whose shape, dtype or
        type differs and both values.
    """
    saved, wanted = {note["path"]: note for note in notes}, dict(zip(names, leaves, strict=True))
    remedy = "Make `like` with the optimizer and the sites of the run that was saved."
    if set(saved) != set(wanted):
        raise AdapterError(
            f"the saved state has leaves that `like` has not: {_few(set(saved) - set(wanted))}; "
            f"`like` has leaves that were not saved: {_few(set(wanted) - set(saved))}. {remedy}"
        )
    for path, leaf in wanted.items():
        other = _note(path, leaf)
        if not _fits(saved[path], other):
            raise AdapterError(
                f"{path!r} was saved as {_describe(saved[path])}, and `like` has "
                f"{_describe(other)}. {remedy}"
            )


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
    if isinstance(leaf, np.ndarray | np.generic):
        # Not hashed on the device: a position may have another shape at every save, and each
        # shape would be compiled.
        note["sha256"] = _digest(leaf)
    return note


def _digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


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
        array = jax.random.key_data(leaf) if _kind(leaf) == "key" else leaf
        return np.asarray(array) if is_local(array) else array  # which Orbax would refuse
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
        data = np.zeros((*note["shape"], 0), np.uint32) if array is None else array
        return _placed(partial(jax.random.wrap_key_data, impl=note["impl"]), data, sharding)
    if array is None:
        array = np.zeros(note["shape"], jnp.dtype(note["dtype"]))
    if kind == "array":
        # A Python number makes a weakly typed array.
        found = array.item() if _is_weak(note) else array
        return array if isinstance(array, jax.Array) else _placed(jnp.asarray, found, sharding)
    if _digest(array) != note["sha256"]:
        raise AdapterError(f"it is damaged: {note['path']!r} is not what was saved.")
    return np.asarray(array)[()] if kind == "numpy scalar" else np.asarray(array)


def _is_weak(note: Note) -> bool:
    return bool(note.get("weak")) and not note["shape"]


def _placed(make: Callable[[Any], jax.Array], data: Any, sharding: Any) -> jax.Array:
    if sharding is None:
        return make(jnp.asarray(data))
    if sharding.is_fully_addressable:
        return jax.device_put(make(jnp.asarray(data)), sharding)
    # Only a program that all processes run puts something on the devices of all.
    return jax.jit(make, out_shardings=sharding)(data)


def _fits(note: Note, other: Note) -> bool:
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


def _few(names: set[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(map(repr, sorted(names)[:most])) or "none") + more


def _name(place: int) -> str:
    return f"{place:05d}"
