"""Shapes: the arrays of a compiled program, and the bytes that they take.

On a TPU a layout such as ``{1,0:T(8,128)(2,1)S(1)}`` adds the tiles that the array is padded to
and the memory that holds it: S(1) is the on-chip VMEM, no S is HBM.
"""

import functools
import math
import re
from typing import NamedTuple

from rslora_jax.paths import AdapterError

__all__ = ["Shape", "read_shapes"]

NARROW = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
SHAPE = re.compile(r"\b([a-z]\w*)\[([^\[\]]*)\](?:\{([^{}]*)\})?")


class Shape(NamedTuple):
    """One array: its dtype as HLO spells it, its dimensions and how it lies in memory.

    Attributes:
      dtype: such as ``"bf16"``.
      dims: the dimensions.
      order: the axes from the fastest-varying on, empty where the text names none.
      tiles: the tiles that the last axes are padded to.
      space: the number of the memory that holds it; 0 is the main memory (HBM).

    Example:
      >>> (shape,) = read_shapes("bf16[16,255,64]{2,1,0:T(8,128)(2,1)S(1)}")
      >>> shape.size, shape.allocated, shape.space
      (522240, 1048576, 1)
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Bytes of the elements."""
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)

    @property
    def allocated(self) -> int:
        """Bytes with what the first tile pads."""
        order = self.order or tuple(reversed(range(len(self.dims))))
        physical = [self.dims[k] for k in reversed(order)]
        for tile in self.tiles[:1]:
            shared = min(len(tile), len(physical))
            for back in range(1, shared + 1):
                physical[-back] = -(-physical[-back] // tile[-back]) * tile[-back]
        return -(-math.prod(physical) * _bits(self.dtype) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def read_shapes(text: str) -> tuple[Shape, ...]:
    """Reads every array of a shape; a tuple, nested or not, gives its leaves.

    Example:
      >>> [shape.size for shape in read_shapes("(f32[8,4]{1,0}, (pred[], s4[3]))")]
      [128, 1, 2]
    """
    return tuple(_shape(*found.groups()) for found in SHAPE.finditer(text))


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    order, _, rest = (layout or "").partition(":")
    spaces = re.search(r"S\((\d+)\)", rest)
    tiles = re.match(r"T((?:\([^()]*\))+)", rest)
    return Shape(
        dtype,
        tuple(int(n.lstrip("<=")) for n in dims.split(",") if n),
        tuple(int(n) for n in order.split(",") if n),
        tuple(_tile(text) for text in re.findall(r"\(([^()]*)\)", tiles[1] if tiles else "")),
        int(spaces[1]) if spaces else 0,
    )


def _tile(text: str) -> tuple[int, ...]:
    return tuple(int(n) if n.isdigit() else 1 for n in text.split(","))


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in NARROW:
        return NARROW[dtype]
    found = re.match(r"(?:bf|f|s|u)(\d+)", dtype)
    if not found:
        raise AdapterError(
            f"The HLO has an array of dtype {dtype!r}, whose size is not known. "
            "Report it with the versions of jax and libtpu."
        )
    return int(found[1])
