"""Contents: the bits of an array in two words, computed where its shards are.

Every element's bits are mixed with the element's place in the whole array, and the mixed words
are added modulo 2^32. Addition commutes, so no sharding, device count or order of summation
changes the result, and each device sends two words. It guards against accidents, not against an
adversary.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rslora_jax.meshes import automatic

__all__ = ["LONGEST", "content", "mix", "place"]

Word: TypeAlias = Any

ROUNDS = ((0x21F0AAAD, 0x735A2D97), (0x7FEB352D, 0x846CA68B))
"""Odd multipliers of the two lanes' mixing, found by searching for the least bias between input
and output bits (C. Wellons, "Prospecting for Hash Functions", 2018, and its later results)."""
GOLDEN, STRIDE = 0x9E3779B9, 0x85EBCA6B
LONGEST = 2**32
"""The longest axis whose positions are told apart."""


def content(array: jax.Array | np.ndarray) -> jax.Array:
    """The two words [2] of an array's bits, which the device goes on computing.

    The array is read once, no temporary of its size is written and nothing is gathered.

    Args:
      array: of any numeric dtype, or typed PRNG keys, sharded in any way; NumPy's may be
        wider than JAX has enabled.

    Returns:
      uint32 words [2], the same on all devices.

    Example:
      >>> content(np.float32([0.0, 1.0])).tolist() == content(np.float32([1.0, 0.0])).tolist()
      False
    """
    if isinstance(array, jax.Array):
        return _hash(array)
    # Waiting keeps NumPy's leaves from being on the device all at once.
    return _hash_parts(_halves(array)).block_until_ready()


def _halves(array: np.ndarray) -> tuple[Any, ...]:
    """The array as JAX takes it even without 64-bit types: wide elements in 32-bit parts."""
    if array.dtype.kind not in "biufc" or array.dtype.itemsize < 8:
        return (array,)
    count = array.dtype.itemsize // 4
    words = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    words = words.reshape(*array.shape, count)
    return tuple(words[..., k] for k in range(count))


@jax.jit
def _hash(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return automatic(lambda x: _lanes(_parts(x)), array)


@jax.jit
def _hash_parts(parts: tuple[jax.Array, ...]) -> jax.Array:
    return _lanes([word for part in parts for word in _parts(part)])


def _parts(array: jax.Array) -> list[jax.Array]:
    """The bits of every element, as one or more arrays of 32-bit words."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return [*_parts(lax.real(array)), *_parts(lax.imag(array))]
    if array.dtype == jnp.bool_:
        return [array.astype(jnp.uint32)]
    bits = jax.dtypes.itemsize_bits(array.dtype)
    unsigned = jnp.dtype(f"uint{min(bits, 32)}")
    words = lax.bitcast_convert_type(array, unsigned)
    if bits <= 32:
        return [words.astype(jnp.uint32)]
    return [words[..., k] for k in range(bits // 32)]


def _lanes(parts: Sequence[jax.Array]) -> jax.Array:
    """The two sums [2] of mixed words, in one pass over the parts."""
    total = jnp.zeros(2, jnp.uint32)
    for k, part in enumerate(parts):
        grid = [
            lax.broadcasted_iota(jnp.uint32, _along(axis, part.shape), axis)
            for axis in range(part.ndim)
        ]
        first = mix(part + place(grid, 2 * k), *ROUNDS[0])
        second = mix(part ^ place(grid, 2 * k + 1), *ROUNDS[1])
        total = total + _sums(first, second)
    return total


def _sums(first: jax.Array, second: jax.Array) -> jax.Array:
    # One reduction of both: XLA then reads the array once and writes no temporary.
    zero = np.uint32(0)
    axes = tuple(range(first.ndim))
    sums = lax.reduce((first, second), (zero, zero), _add, axes)
    return jnp.stack(sums)


def _add(left: tuple[Word, Word], right: tuple[Word, Word]) -> tuple[Word, Word]:
    return left[0] + right[0], left[1] + right[1]


def _along(axis: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n if k == axis else 1 for k, n in enumerate(shape))


def place(indices: Sequence[Word], stream: int) -> Word:
    """One word for each position: axis by axis, so that no flat index can overflow."""
    word = np.uint32(GOLDEN * (stream + 1) % LONGEST)
    for axis, index in enumerate(indices):
        salt = np.uint32((STRIDE * (axis + 1) + GOLDEN * stream) % LONGEST)
        word = word + mix(index + salt, *ROUNDS[1])
    return word


def mix(word: Word, first: int, second: int) -> Word:
    """A bijection of 32-bit words in which each input bit moves about half the output bits."""
    word = (word ^ (word >> 16)) * np.uint32(first)
    word = (word ^ (word >> 15)) * np.uint32(second)
    return word ^ (word >> 15)
