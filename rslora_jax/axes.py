"""Axes: one letter for each axis of a weight, and what follows from the letters.

``b`` is stacked (layers, experts), ``i`` is summed over by the product (input), ``o``
survives it (output). A Dense kernel is ``io``, an attention output projection
``[heads, head_dim, model]`` is ``iio``, a stack of layers ``bio``.

The factor `a` owns the b and i axes, `b` the b and o axes, both in the weight's order:
``a: [b.., i.., r]`` and ``b: [b.., r, o..]``.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec

__all__ = [
    "RANK",
    "delta_subscripts",
    "factor_dims",
    "factor_shapes",
    "factor_specs",
    "fan_in",
    "fan_out",
]

RANK = -1
"""Stands for the rank axis where weight axes are counted 0, 1, ..."""


def factor_dims(axes: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The weight axis behind every axis of `a` and of `b`.

    Example:
      >>> factor_dims("bioo")
      ((0, 1, -1), (0, -1, 2, 3))
    """
    b, i, o = (tuple(k for k, letter in enumerate(axes) if letter == role) for role in "bio")
    return (*b, *i, RANK), (*b, RANK, *o)


def factor_shapes(
    axes: str, shape: Sequence[int], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `a` and `b` for a weight of `shape`.

    Example:
      >>> factor_shapes("bioo", (12, 64, 4, 16), rank=8)
      ((12, 64, 8), (12, 8, 4, 16))
    """
    a, b = factor_dims(axes)
    size = {RANK: rank, **dict(enumerate(shape))}
    return tuple(size[d] for d in a), tuple(size[d] for d in b)


def factor_specs(
    axes: str, spec: Sequence[Any], rank: Any = None
) -> tuple[PartitionSpec, PartitionSpec]:
    """The PartitionSpecs of `a` and `b`: each axis has the entry of the weight's axis.

    Args:
      axes: one letter for each axis of the weight.
      spec: one entry for each axis of the weight: a mesh axis, a tuple of them, or None.
      rank: the entry of the rank axis.

    Example:
      >>> factor_specs("bio", ("stage", "fsdp", "tensor"))
      (P('stage', 'fsdp', None), P('stage', None, 'tensor'))
    """
    a, b = factor_dims(axes)
    entry = {RANK: rank, **dict(enumerate(spec))}
    return PartitionSpec(*(entry[d] for d in a)), PartitionSpec(*(entry[d] for d in b))


def delta_subscripts(axes: str) -> str:
    """The einsum of `a` and `b` that gives the weight's shape.

    Example:
      >>> delta_subscripts("bio")
      'abz,azc->abc'
    """
    letters = {RANK: "z", **{k: chr(ord("a") + k) for k in range(len(axes))}}
    a, b = factor_dims(axes)
    out = "".join(letters[k] for k in range(len(axes)))
    return f"{''.join(letters[d] for d in a)},{''.join(letters[d] for d in b)}->{out}"


def fan_in(axes: str, shape: Sequence[int]) -> int:
    """How many inputs one output sums over: the product of the i axes."""
    return _size(axes, shape, "i")


def fan_out(axes: str, shape: Sequence[int]) -> int:
    """How many outputs one input reaches: the product of the o axes."""
    return _size(axes, shape, "o")


def _size(axes: str, shape: Sequence[int], role: str) -> int:
    return math.prod(n for letter, n in zip(axes, shape, strict=True) if letter == role)
