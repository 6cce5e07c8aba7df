"""Deferred: a quantized weight on its way to the product that forms it.

What the program does to the weight before is kept as a list of steps and done where the weight
is multiplied, so that between its products, and in loops around them, only integers exist.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rslora_jax.formats import decode
from rslora_jax.quantized import Quantized, map_parts, part_spec, struct_of

__all__ = ["Deferred", "Step", "form", "leading", "put_off", "specs_of", "transposed", "typed"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Something that the program did to a weight.

    Attributes:
      before: operands that came before the weight.
      after: operands that came after it.
      function: ``function(*before, weight, *after) -> array``.
      each: it treats every entry alike, as a cast does.
    """

    before: tuple[Any, ...]
    after: tuple[Any, ...]
    function: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    each: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A quantized weight and the steps that are still to be done to it."""

    stored: Quantized
    steps: tuple[Step, ...] = ()

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """What it will be once formed."""
        return jax.eval_shape(_stepped(self.steps), struct_of(self.stored))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the formed array."""
        return tuple(self.struct.shape)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Its dtype."""
        return self.struct.dtype


def form(base: Any) -> Any:
    """The array that a base stands for: a deferred one is formed, any other is one already."""
    if isinstance(base, Deferred):
        return _stepped(base.steps)(decode(base.stored))
    return base


def typed(base: Any) -> Any:
    """What JAX knows the type of: the base itself, or a struct of a deferred one."""
    return base.struct if isinstance(base, Deferred) else base


def put_off(
    base: Deferred, function: Callable[..., Any], operands: Sequence[Any], *, each: bool = False
) -> Deferred:
    """`function` of the operands, of which `base` is one, to be done later."""
    at = next(k for k, operand in enumerate(operands) if operand is base)
    step = Step(tuple(operands[:at]), tuple(operands[at + 1 :]), function, each)
    return dataclasses.replace(base, steps=(*base.steps, step))


def transposed(base: Deferred, order: Sequence[int]) -> Deferred | None:
    """The weight with its axes in another order, as integers; None if the steps forbid it."""
    if not _alike(base):
        return None
    stored = map_parts(lambda part: jnp.transpose(part, order), base.stored)
    return dataclasses.replace(base, stored=stored)


def leading(base: Any) -> Any:
    """A base that can be cut along its first axis, as a loop does: formed only if need be."""
    if not isinstance(base, Deferred):
        return base
    cut = base.stored.scales.shape[0] == base.stored.values.shape[0]
    return base if cut and _alike(base) else form(base)


def specs_of(base: Any, spec: PartitionSpec, sizes: Callable[[Any], int]) -> tuple[Any, Any]:
    """A base that a shard_map can take apart, and its specs in the same structure.

    Args:
      base: an array or a deferred weight; the latter is formed if its blocks cannot be shared
        out among the devices.
      spec: the weight's spec.
      sizes: the number of devices behind an entry of it.
    """
    if not isinstance(base, Deferred):
        return base, spec
    parts = map_parts(lambda part: part_spec(spec, part, base.stored), base.stored)
    even = [n % sizes(e) == 0 for n, e in zip(base.stored.scales.shape, parts.scales, strict=True)]
    if base.steps or not all(even):
        return form(base), spec
    return base, dataclasses.replace(base, stored=parts)


def _alike(base: Deferred) -> bool:
    return all(step.each for step in base.steps)


def _stepped(steps: Sequence[Step]) -> Callable[[Any], Any]:
    def run(array: Any) -> Any:
        for step in steps:
            array = step.function(*step.before, array, *step.after)
        return array

    return run
