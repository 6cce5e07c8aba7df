"""Loading: one tensor after the other from the host into the buffers of the devices.

A leaf of all layers is made of zeros where it is to lie; each layer is then written into it in
place. So the host holds about one tensor at a time, and a device never more than its share.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from pretrained.errors import ModelError
from pretrained.pieces import Piece

Prepare: TypeAlias = Callable[[str, np.ndarray], Any]
BLOCK = 128  # columns


class Slot(NamedTuple):
    """A leaf to be filled: its path, what it is, and the tree of Shardings, or the one, it gets."""

    path: str
    struct: jax.ShapeDtypeStruct
    place: Any


def load(structs: Any, pieces: Iterable[Piece], places: Any, prepare: Prepare | None) -> Any:
    """Fill a tree; see `Source.load`."""
    flat, tree = jax.tree.flatten_with_path(structs)
    spread = [None] * len(flat) if places is None else tree.flatten_up_to(places)
    of_path: dict[str, list[Piece]] = {}
    for piece in pieces:
        of_path.setdefault(piece.path, []).append(piece)
    leaves = []
    for (keys, struct), place in zip(flat, spread, strict=True):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        leaves.append(_fill(Slot(path, struct, place), of_path[path], prepare))
    return tree.unflatten(leaves)


def _fill(slot: Slot, pieces: Sequence[Piece], prepare: Prepare | None) -> Any:
    """One leaf: the only tensor that it is, or its layers one by one."""
    leaf = None
    for piece in pieces:
        leaf = jax.block_until_ready(_grown(leaf, slot, piece, prepare))
    return leaf


def _grown(leaf: Any, slot: Slot, piece: Piece, prepare: Prepare | None) -> Any:
    """The leaf with one more of its layers; nothing of the host's outlives the call."""
    parts, tree = jax.tree.flatten(_prepared(slot, piece, prepare))
    shardings = _shardings(slot.place, tree, parts)
    if piece.layer is None:
        return tree.unflatten(map(_put, parts, shardings))
    if leaf is None:
        leaf = tree.unflatten(map(functools.partial(_empty, slot), parts, shardings))
    grown = [
        _writer(sharding)(stack, _put(part, _of_layer(sharding)), piece.layer)
        for stack, part, sharding in zip(jax.tree.leaves(leaf), parts, shardings, strict=True)
    ]
    return tree.unflatten(grown)


def _prepared(slot: Slot, piece: Piece, prepare: Prepare | None) -> Any:
    array = _contiguous(piece.read(), slot.struct.dtype)
    array = array if piece.layer is None else array[None]
    return array if prepare is None else prepare(slot.path, array)


def _contiguous(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The numbers row after row, in a dtype.

    A transposed view is copied by blocks of columns, which stay in the cache: twice as fast.
    """
    if array.flags.c_contiguous:
        return array.astype(dtype, copy=False)
    copy = np.empty(array.shape, dtype)
    for at in range(0, array.shape[-1], BLOCK):
        copy[..., at : at + BLOCK] = array[..., at : at + BLOCK]
    return copy


def _shardings(place: Any, tree: Any, parts: Sequence[Any]) -> list[Sharding | None]:
    """One Sharding a part: the leaf's, as far as it fits, or those of a tree like the parts'."""
    if place is None or isinstance(place, Sharding):
        return [place if len(parts) == 1 else _fitting(place, part.shape) for part in parts]
    return tree.flatten_up_to(place)


def _fitting(sharding: Sharding | None, shape: tuple[int, ...]) -> Sharding | None:
    """A Sharding without the axes that do not divide the shape: a scale's axis of 1 stays whole."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    sizes = sharding.mesh.shape

    def pieces(names: Any) -> int:
        return math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names))

    spec = [
        names if names is None or size % pieces(names) == 0 else None
        for names, size in zip(sharding.spec, shape, strict=False)
    ]
    return NamedSharding(sharding.mesh, P(*spec))


def _of_layer(sharding: Sharding | None) -> Sharding | None:
    """Where one layer lies: as in the stack, but for the first axis, which is 1 there."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, P(None, *sharding.spec[1:]))


def _put(part: Any, sharding: Sharding | None) -> jax.Array:
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(part, sharding)
    host = np.asarray(part)  # of which this process sends its devices' shards
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _empty(slot: Slot, part: Any, sharding: Sharding | None) -> jax.Array:
    if part.shape[:1] != (1,):
        raise ModelError(
            f"prepare({slot.path!r}, ...) gave an array of {list(part.shape)}; "
            "its first axis must be 1, the one layer that was given"
        )
    shape = (slot.struct.shape[0], *part.shape[1:])
    return _maker(shape, jnp.dtype(part.dtype), sharding)()


@functools.cache
def _writer(sharding: Sharding | None) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    def write(stack: jax.Array, layer: jax.Array, at: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, layer, at, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> Callable[[], Any]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
