"""Formats: how a weight becomes integers and scales, and how these become the weight again.

The number formats are qwix's; it is imported where a weight is quantized or formed.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.extras import extra
from rslora_jax.meshes import along, automatic
from rslora_jax.paths import AdapterError
from rslora_jax.quantized import Quantized, is_quantized

__all__ = ["FORMATS", "Labelled", "block_of", "decode", "encode", "formed"]

FORMATS: Mapping[str, int] = {"int8": 8, "int4": 4, "nf4": 4}
"""The bits of a weight's entry, scales apart."""


class Labelled(NamedTuple):
    """An array with one label for each axis, as `meshes.along` reads it."""

    array: Any
    labels: Sequence[int]


def encode(
    weight: Any, format: str, channels: Sequence[int], blocks: Mapping[int, int]
) -> Quantized:
    """A weight as the nearest integers, or the nearest levels of NF4, times scales.

    Args:
      weight: floating point.
      format: one of `FORMATS`. NF4's 16 levels are the quantiles of a normal distribution
        (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
      channels: the axes of which every entry has a scale of its own.
      blocks: axis -> how many of its neighbours share a scale.

    Returns:
      The weight, quantized, with scales in float32 (float64 for a float64 weight).
    """
    wide = jnp.asarray(weight, jnp.promote_types(jnp.float32, weight.dtype))
    array = _qwix().quantize(
        wide,
        format if format == "nf4" else jnp.dtype(format),
        channelwise_axes=tuple(channels),
        tiled_axes=dict(blocks),
    )
    return Quantized(array.qvalue, array.scale, format, jnp.dtype(weight.dtype).name)


def decode(weight: Quantized) -> jax.Array:
    """The numbers that a quantized weight stands for, in the weight's dtype.

    On a mesh they lie as the integers do.

    Raises:
      AdapterError: if qwix is not installed, or the format is unknown.
    """
    axes = range(weight.ndim)
    place = along(axes, (Labelled(weight.values, axes),))
    if place is None:
        return _decode(weight)
    return automatic(_decode, weight, out=place)


def formed(leaf: Any) -> Any:
    """A leaf of a base as an array: a quantized weight formed, anything else as it is."""
    return decode(leaf) if is_quantized(leaf) else leaf


def _decode(weight: Quantized) -> jax.Array:
    values, scales = weight.values, weight.scales
    pairs = list(zip(values.shape, scales.shape, strict=True))
    split = [(n,) if m in (1, n) else (m, n // m) for n, m in pairs]
    spread = [(m,) if m in (1, n) else (m, 1) for n, m in pairs]
    levels = _levels(weight, scales.dtype).reshape(_joined(split))
    whole = (levels * scales.reshape(_joined(spread))).reshape(values.shape)
    return whole.astype(weight.dtype)


def _joined(parts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(n for part in parts for n in part)


def _levels(weight: Quantized, dtype: Any) -> jax.Array:
    """The integers as the numbers that they name, before scaling."""
    if weight.format not in FORMATS:
        raise AdapterError(
            f"A quantized weight has a format of {sorted(FORMATS)}, found {weight.format!r}."
        )
    if weight.format != "nf4":
        return weight.values.astype(dtype)
    table = jnp.asarray(_table(), dtype)
    return table.at[weight.values.astype(jnp.int32)].get(mode="promise_in_bounds")


@functools.cache
def _table() -> np.ndarray:
    """NF4's levels, read from qwix: [16]."""
    qwix = _qwix()
    with jax.ensure_compile_time_eval():
        every = jnp.arange(2 ** FORMATS["nf4"]).astype(jnp.uint4)
        array = qwix.QArray(every, jnp.ones(1), None, "nf4")
        return np.asarray(qwix.dequantize(array))


def _qwix() -> Any:
    return extra("qwix", "rslora_jax[quantize]", "A quantized weight")


def block_of(size: int, most: int) -> int:
    """The largest number of neighbours, at most `most`, that an axis can be cut into evenly.

    Example:
      >>> block_of(576, 64), block_of(100, 64), block_of(7, 64)
      (64, 50, 7)
    """
    return max(n for n in range(1, min(size, most) + 1) if math.gcd(n, size) == n)
