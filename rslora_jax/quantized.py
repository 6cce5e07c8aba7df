"""Quantized: one weight as small integers and the scales that turn them back into numbers.

To every reader of a parameter tree it is one leaf with the weight's own path, shape and dtype;
to JAX it is a pytree of two arrays. How numbers become integers is said in `formats`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

__all__ = ["Quantized", "is_quantized", "map_parts", "part_spec", "struct_of"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in 8 or 4 bits; `rslora_jax.quantize` makes it.

    Attributes:
      values: integers in the shape of the weight.
      scales: floating point, with as many axes as the weight: an axis has the weight's size
        (a scale each), size 1 (one scale for all), or the number of blocks that it is cut into.
      format: ``"int8"``, ``"int4"`` or ``"nf4"``.
      weight_dtype: the dtype of the weight that it stands for, such as ``"bfloat16"``.
    """

    values: Any
    scales: Any
    format: str = dataclasses.field(metadata={"static": True})
    weight_dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """The number of the weight's axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of the weight's entries."""
        return self.values.size

    @property
    def dtype(self) -> Any:
        """The weight's dtype."""
        return jnp.dtype(self.weight_dtype)

    def __jax_array__(self) -> Any:
        """Refuses to be taken for an array: the original function does not know how to form it."""
        raise TypeError(
            f"A weight of shape {self.shape} is quantized to {self.format}, and was used as an "
            "array. Call the function that rl.adapt or rl.attach returned (rl.attach(f, []) is f "
            "without adapters), or rl.quantize.dequantize the tree."
        )

    def __getitem__(self, index: tuple[int | slice, ...]) -> "Quantized":
        """A part of it, picked along axes whose entries have a scale each, or taken whole."""

        def pick(part: Any) -> Any:
            return part[tuple(0 if n == 1 and isinstance(k, int) else k for k, n in along(part))]

        def along(part: Any) -> Any:
            return zip(index, part.shape, strict=True)

        return map_parts(pick, self)

    @property
    def sharding(self) -> Any:
        """Where the integers lie, which is where the weight would."""
        return getattr(self.values, "sharding", None)


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is a quantized weight."""
    return isinstance(node, Quantized)


def map_parts(function: Callable[[Any], Any], weight: Quantized) -> Quantized:
    """The same function on the integers and on the scales."""
    return dataclasses.replace(
        weight, values=function(weight.values), scales=function(weight.scales)
    )


def struct_of(leaf: Any) -> Any:
    """What a program is traced with: the weight that a leaf stands for, abstract if quantized."""
    if not is_quantized(leaf):
        return leaf
    # On Explicit axes the sharding belongs to the type, and inside a shard_map what varies does.
    kind = jax.typeof(leaf.values)
    told = {*kind.sharding.mesh.axis_types} - {AxisType.Auto}
    return jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype,
        sharding=kind.sharding if told else None,
        manual_axis_type=kind.manual_axis_type,
    )


def part_spec(
    spec: Any, part: Any, weight: Quantized, devices: Callable[[Any], int] = lambda entry: 1
) -> PartitionSpec:
    """The spec of a part of a quantized weight: axes of which it has all entries or blocks.

    Args:
      spec: the weight's.
      part: `weight.values` or `weight.scales`.
      weight: the quantized weight.
      devices: how many devices lie along an entry of the spec; scales whose blocks they do not
        divide are whole along that axis.

    Example:
      >>> ints, scales = (jax.ShapeDtypeStruct((4, n), "int8") for n in (6, 1))
      >>> part_spec(PartitionSpec("x", "y"), scales, Quantized(ints, scales, "int8", "float32"))
      P('x', None)
    """
    entries = (*spec, *[None] * (weight.ndim - len(spec)))

    def fits(size: int, whole: int, entry: Any) -> bool:
        return size == whole or (size > 1 and size % devices(entry) == 0)

    sizes = zip(part.shape, weight.shape, entries, strict=True)
    return PartitionSpec(*(entry if fits(n, m, entry) else None for n, m, entry in sizes))
