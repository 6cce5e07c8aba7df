"""Fingerprints: what a tree holds, in a few bytes a leaf, without moving the leaves.

`content` says how arrays are hashed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer

from rslora_jax.checkpoint.content import LONGEST, content
from rslora_jax.paths import AdapterError, flatten
from rslora_jax.quantized import is_quantized

__all__ = ["Fingerprint", "Leaf", "fingerprint"]

PyTree: TypeAlias = Any

PAIR = ("first", "second")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a tree.

    Attributes:
      path: its path.
      shape: its shape.
      dtype: its dtype by name, ``key<...>`` for typed PRNG keys, the type for other objects.
      content: 16 hex digits (for an array); None for an abstract leaf.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    content: str | None


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The leaves of a tree, by path, and one hash of them all.

    Attributes:
      leaves: sorted by path.
    """

    leaves: tuple[Leaf, ...]

    @property
    def digest(self) -> str | None:
        """The SHA-256 of all leaves, in hex; None where a content is not known."""
        if any(leaf.content is None for leaf in self.leaves):
            return None
        return hashlib.sha256(json.dumps(_rows(self)).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as plain JSON values."""
        return {"digest": self.digest, "leaves": _rows(self)}

    @classmethod
    def from_dict(cls, data: Any) -> "Fingerprint":
        """Reads what `to_dict` wrote.

        Raises:
          AdapterError: if it is no fingerprint, or its digest is not that of its leaves.

        Example:
          >>> first = fingerprint({"w": np.zeros((2, 3))})
          >>> Fingerprint.from_dict(first.to_dict()) == first
          True
        """
        if not isinstance(data, Mapping) or set(data) != {"digest", "leaves"}:
            raise AdapterError(f"A fingerprint has a digest and leaves, found {_short(data)}.")
        if not isinstance(data["leaves"], list):
            raise AdapterError(f"A fingerprint lists its leaves, found {_short(data['leaves'])}.")
        read = cls(tuple(_leaf(row) for row in data["leaves"]))
        paths = [leaf.path for leaf in read.leaves]
        if paths != sorted(set(paths)) or read.digest != data["digest"]:
            raise AdapterError(
                f"A fingerprint's digest is that of its leaves, found {data['digest']!r} where "
                f"the leaves give {read.digest!r}. It was damaged: compute it again."
            )
        return read

    def differences(self, other: "Fingerprint", names: Sequence[str] = PAIR) -> list[str]:
        """What differs, a sentence for each path; contents only where both are known.

        Args:
          other: the fingerprint to compare with.
          names: what to call this one and the other one.

        Returns:
          Sentences with the path and both values, by path; empty if nothing differs.

        Example:
          >>> fingerprint({"w": 1.0}).differences(fingerprint({"w": np.zeros(3)}))
          ["'w': shape () in the first, (3,) in the second"]
        """
        ours, theirs = ({leaf.path: leaf for leaf in side.leaves} for side in (self, other))
        pairs = ((path, ours.get(path), theirs.get(path)) for path in sorted({*ours, *theirs}))
        return [said for path, *pair in pairs if (said := _difference(path, pair, names))]


def fingerprint(tree: PyTree) -> Fingerprint:
    """The shapes, dtypes and contents of a tree.

    Two trees have equal fingerprints if their leaves have equal paths, shapes, dtypes and
    bits: the signs of zeros and the payloads of NaNs count. The device, the sharding, the
    mesh, and whether an array is JAX's or NumPy's do not. Nothing is gathered and no copy of
    an array is made; one program is compiled for each shape, dtype and sharding.

    Args:
      tree: any pytree of arrays, numbers and typed PRNG keys; a quantized weight counts as its
        integers, its scales and its format. Of `jax.ShapeDtypeStruct`s only
        shape and dtype are noted; text counts by value, a function or class by its name.

    Returns:
      A `Fingerprint`.

    Raises:
      AdapterError: for a leaf without a fingerprint, with its path, and inside a jit.

    Example:
      >>> fingerprint({"w": jax.numpy.arange(6.0).reshape(2, 3)}).leaves[0].content
      '8e0374d4dbfe4b68'
    """
    flat = flatten(jax.tree.map(_opened, tree, is_leaf=is_quantized))
    found = [_begin(path, leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)]
    leaves = [dataclasses.replace(leaf, content=finish()) for leaf, finish in found]
    return Fingerprint(tuple(sorted(leaves, key=lambda leaf: leaf.path)))


def _opened(leaf: Any) -> Any:
    """A quantized weight as what it is made of: its numbers depend on all of it."""
    return vars(leaf) if is_quantized(leaf) else leaf


def _begin(path: str, leaf: Any) -> tuple[Leaf, Callable[[], str | None]]:
    """The leaf without its content, whose computation has begun, and what waits for it."""
    if isinstance(leaf, Tracer):
        raise AdapterError(
            f"A fingerprint was asked for inside a jit or another transform, found a tracer at "
            f"{path!r}. Take it outside, of arrays."
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Leaf(path, tuple(leaf.shape), str(leaf.dtype), None), lambda: None
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        name = hashlib.sha256(_text(path, leaf).encode()).hexdigest()[:16]
        return Leaf(path, (), type(leaf).__name__, None), lambda: name
    array = leaf if isinstance(leaf, jax.Array) else _native(path, leaf)
    note = Leaf(path, tuple(array.shape), str(array.dtype), None)
    if max((1, *note.shape)) > LONGEST:
        raise AdapterError(f"{path!r} has shape {note.shape}: an axis may have 2^32 elements.")
    words = content(array)
    return note, lambda: "".join(f"{word:08x}" for word in np.asarray(words).tolist())


def _text(path: str, leaf: Any) -> str:
    if isinstance(leaf, str | bytes):
        return repr(leaf)
    name = getattr(leaf, "__qualname__", getattr(leaf, "__name__", None))
    if callable(leaf) and isinstance(name, str):
        return name
    raise AdapterError(
        f"A fingerprint takes arrays, numbers, PRNG keys, text and functions, found "
        f"{_short(leaf)} at {path!r}. Leave it out of the tree."
    )


def _native(path: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype == object or array.dtype.names or array.dtype.kind not in "biufcV":
        raise AdapterError(f"{path!r} is an array of {array.dtype}, which has no fingerprint.")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _rows(found: Fingerprint) -> list[list[Any]]:
    return [[leaf.path, list(leaf.shape), leaf.dtype, leaf.content] for leaf in found.leaves]


def _leaf(row: Any) -> Leaf:
    try:
        path, shape, dtype, words = row
        texts = (path, dtype) if words is None else (path, dtype, words)
        if all(isinstance(text, str) for text in texts) and _is_shape(shape):
            return Leaf(path, tuple(shape), dtype, words)
    except (TypeError, ValueError):
        pass
    raise AdapterError(
        f"A fingerprint's leaf is [path, shape, dtype, content], found {_short(row)}."
    )


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)


def _difference(path: str, pair: Sequence[Leaf | None], names: Sequence[str]) -> str | None:
    left, right = pair
    if left is None or right is None:
        there, missing = names if right is None else (names[1], names[0])
        return f"{path!r}: only in the {there}, not in the {missing}"
    for field in ("shape", "dtype", "content"):
        ours, theirs = getattr(left, field), getattr(right, field)
        if ours != theirs and None not in (ours, theirs):
            return f"{path!r}: {field} {ours} in the {names[0]}, {theirs} in the {names[1]}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
