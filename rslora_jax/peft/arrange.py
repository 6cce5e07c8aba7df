"""Arrange: the numbers of a parameter as Hugging Face arranges them, and back.

Transposes, reshapes and permutations alone: every function here is exact, and has its inverse
beside it. Arrays are NumPy's; one index of the stacked axes is handled at a time.
"""

import itertools
import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from rslora_jax.peft.layout import Layout, places

__all__ = [
    "factor_shapes",
    "factors_in",
    "factors_out",
    "indices",
    "part",
    "weight_in",
    "weight_out",
    "weight_shape",
]

Array: TypeAlias = np.ndarray
Index: TypeAlias = tuple[int, ...]


def indices(layout: Layout) -> Iterator[Index]:
    """Every index of the split axes, in order; one empty index where there are none."""
    return itertools.product(*map(range, layout.stack))


def factors_out(layout: Layout, a: Array, b: Array, index: Index = ()) -> tuple[Array, Array]:
    """One module's factors as PEFT arranges them.

    Args:
      layout: of the weight.
      a: [b.., i.., r].
      b: [b.., r, o..].
      index: of the split axes.

    Returns:
      lora_A and lora_B: (r, in) and (out, r); for experts (E, r, in) and (E, out, r); for a
      convolution (r, in, k..) and (out, r, 1..).

    Example:
      >>> layout = Layout("ioo", (6, 2, 4), "linear")
      >>> a, b = factors_out(layout, np.ones((6, 3)), np.ones((3, 2, 4)))
      >>> a.shape, b.shape
      ((3, 6), (8, 3))
    """
    one, rank = layout.single, a.shape[-1]
    stacked = one.axes.count("b")
    order = [stacked + k for k in _input_order(one)]
    a = a[index].transpose(*range(stacked), stacked + len(order), *order)
    b = b[index].reshape(-1, rank, one.size("o")).swapaxes(1, 2)
    b = _halves_apart(b, 1, layout.head_dim)
    shape_a, shape_b = factor_shapes(layout, rank)
    return a.reshape(shape_a), b.reshape(shape_b)


def factors_in(layout: Layout, a: Array, b: Array) -> tuple[Array, Array]:
    """The inverse of `factors_out`: one part's a [b.., i.., r] and b [b.., r, o..].

    Example:
      >>> layout = Layout("ioo", (6, 2, 4), "linear")
      >>> a, b = factors_in(layout, np.ones((3, 6)), np.ones((8, 3)))
      >>> a.shape, b.shape
      ((6, 3), (3, 2, 4))
    """
    one = layout.single
    experts, outputs = _sizes(one, "b"), _sizes(one, "o")
    order = _input_order(one)
    rank = a.shape[1 if layout.kind == "expert" else 0]
    a = a.reshape(*experts, rank, *(_sizes(one, "i")[k] for k in order))
    stacked = len(experts)
    back = [stacked + 1 + order.index(k) for k in range(len(order))]
    b = _side_by_side(b.reshape(-1, one.size("o"), rank), 1, layout.head_dim)
    b = b.swapaxes(1, 2).reshape(*experts, rank, *outputs)
    return a.transpose(*range(stacked), *back, stacked), b


def factor_shapes(layout: Layout, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of lora_A and lora_B of one part.

    Example:
      >>> factor_shapes(Layout("iiio", (3, 5, 4, 8), "conv"), 2)
      ((2, 4, 3, 5), (8, 2, 1, 1))
    """
    one = layout.single
    inputs, outputs = one.size("i"), one.size("o")
    if layout.kind == "conv":
        sizes = [_sizes(one, "i")[k] for k in _input_order(one)]
        return (rank, *sizes), (outputs, rank, *(1,) * (len(sizes) - 1))
    experts = (one.size("b"),) if layout.kind == "expert" else ()
    return (*experts, rank, inputs), (*experts, outputs, rank)


def weight_shape(layout: Layout) -> tuple[int, ...]:
    """The shape of one part's tensor."""
    one = layout.single
    if layout.kind == "plain":
        return (math.prod(one.shape),) if layout.flat else one.shape
    if layout.kind == "conv":
        return tuple(one.shape[k] for k in _weight_order(one))
    experts = (one.size("b"),) if layout.kind == "expert" else ()
    return (*experts, *(one.size(role) for role in layout.stored))


def weight_out(layout: Layout, leaf: Array) -> Array:
    """One part of a parameter (see `part`) as Hugging Face arranges it.

    Example:
      >>> weight_out(Layout("ioo", (6, 2, 4), "linear"), np.ones((6, 2, 4))).shape
      (8, 6)
    """
    array = leaf.transpose(_weight_order(layout.single)).reshape(weight_shape(layout))
    return _halves_apart(array, _rows(layout), layout.head_dim)


def weight_in(layout: Layout, tensor: Array) -> Array:
    """The inverse of `weight_out`.

    Example:
      >>> weight_in(Layout("ioo", (6, 2, 4), "linear"), np.ones((8, 6))).shape
      (6, 2, 4)
    """
    one = layout.single
    order = _weight_order(one)
    array = _side_by_side(tensor, _rows(layout), layout.head_dim)
    array = array.reshape([one.shape[k] for k in order])
    return array.transpose([order.index(k) for k in range(len(order))])


def part(layout: Layout, index: Index) -> tuple[int | slice, ...]:
    """What selects one part of the parameter: ``leaf[part(layout, index)]``.

    Example:
      >>> part(Layout("iob", (5, 7, 3), "linear", split=1), (2,))
      (slice(None, None, None), slice(None, None, None), 2)
    """
    chosen = dict(zip(places(layout.axes, "b"), index, strict=False))
    return tuple(chosen.get(k, slice(None)) for k in range(len(layout.axes)))


def _sizes(one: Layout, role: str) -> tuple[int, ...]:
    return tuple(one.shape[k] for k in places(one.axes, role))


def _input_order(one: Layout) -> tuple[int, ...]:
    """The input axes in the order of a tensor: a convolution's channels before its window."""
    count = one.axes.count("i")
    if one.kind == "conv" and one.axes.endswith("o"):
        return (count - 1, *range(count - 1))
    return tuple(range(count))


def _weight_order(one: Layout) -> tuple[int, ...]:
    if one.kind == "plain":
        return tuple(range(len(one.axes)))
    inputs = places(one.axes, "i")
    sides = {"i": tuple(inputs[k] for k in _input_order(one)), "o": places(one.axes, "o")}
    return (*places(one.axes, "b"), *(k for role in one.stored for k in sides[role]))


def _rows(layout: Layout) -> int:
    """The axis of the outputs in a tensor."""
    if layout.kind == "plain":
        return 0
    return layout.stored.index("o") + (layout.kind == "expert")


def _halves_apart(array: Array, axis: int, head_dim: int) -> Array:
    """Pairs (2j, 2j + 1) of each head to (j, j + head_dim / 2)."""
    return _swapped(array, axis, (-1, head_dim // 2, 2)) if head_dim else array


def _side_by_side(array: Array, axis: int, head_dim: int) -> Array:
    return _swapped(array, axis, (-1, 2, head_dim // 2)) if head_dim else array


def _swapped(array: Array, axis: int, split: tuple[int, int, int]) -> Array:
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    pairs = array.reshape(*before, *split, *after)
    return pairs.swapaxes(axis + 1, axis + 2).reshape(array.shape)
