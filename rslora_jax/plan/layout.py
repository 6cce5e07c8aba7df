"""Layout: how activations lie on the mesh, and which of them exist at one time."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

__all__ = [
    "BATCH",
    "PLAIN",
    "SEQUENCE",
    "TENSOR",
    "Layout",
    "Remat",
    "by_block",
    "joined",
    "mesh_sizes",
    "pin",
    "recomputed",
]

Remat: TypeAlias = Literal["none", "dots", "full"]

BATCH = ("data", "fsdp")
"""The mesh axes that split the batch."""
SEQUENCE, TENSOR = "sequence", "tensor"
"""The mesh axes that split the positions, and the heads, the MLP and the vocabulary."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the function is computed; it changes no value beyond rounding.

    Attributes:
      remat: what a layer keeps for the backward pass: ``"none"`` recomputes nothing,
        ``"dots"`` keeps the products of weights, ``"full"`` keeps only the layer's input.
      spread: between layers the positions are split over the tensor axis too (arXiv:2205.05198).
      block: most positions of one chip in a block of queries or of the loss.
      dtype: of the activations; weights are cast to it where they are used.
    """

    remat: Remat = "full"
    spread: bool = True
    block: int = 512
    dtype: Any = jnp.bfloat16


PLAIN = Layout()
"""What `plan` takes if nothing else is asked for."""


def recomputed(remat: Remat) -> Callable[[Any], Any]:
    """Wraps a scan's body, so that it keeps for the backward pass what `remat` says."""
    policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    if remat not in policies:
        return lambda body: body
    # A scan keeps the backward pass from sharing work with the forward pass by itself.
    return partial(jax.checkpoint, prevent_cse=False, policy=policies[remat])


def by_block(function: Callable[..., jax.Array], layout: Layout, *arrays: jax.Array) -> jax.Array:
    """Maps over blocks of the positions of [B, T, ...] arrays, each seen as [B, s, c, ...].

    The s parts of the sequence axis stay where they are: a block has c positions of each.

    Example:
      >>> by_block(lambda x: x.sum(2), Layout(block=4), jnp.ones((2, 12))).shape
      (3, 2, 1)
    """
    batch, length = arrays[0].shape[:2]
    parts = mesh_sizes().get(SEQUENCE, 1)
    most = min(layout.block, length // parts)
    size = next(n for n in range(most, 0, -1) if length // parts % n == 0)
    split = [a.reshape(batch, parts, -1, size, *a.shape[2:]) for a in arrays]
    return lax.map(lambda xs: function(*xs), tuple(jnp.moveaxis(a, 2, 0) for a in split))


def joined(blocks: jax.Array) -> jax.Array:
    """What `by_block` split, again as [B, T, ...].

    Example:
      >>> joined(by_block(lambda x: x + 1, Layout(block=4), jnp.zeros((2, 12)))).shape
      (2, 12)
    """
    whole = jnp.moveaxis(blocks, 0, 2)
    return whole.reshape(whole.shape[0], -1, *whole.shape[4:])


def mesh_sizes() -> dict[str, int]:
    """The axes of the mesh that is being traced for; empty where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def pin(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Lays `x` out on the mesh at hand; axes that it lacks or that do not divide are left off.

    Example:
      >>> pin(jnp.ones(4), TENSOR).tolist()  # there is no mesh
      [1.0, 1.0, 1.0, 1.0]
    """
    sizes = mesh_sizes()
    if not sizes:
        return x
    entries = []
    for length, names in zip(x.shape, axes, strict=False):
        kept = tuple(n for n in ((names,) if isinstance(names, str) else names or ()) if n in sizes)
        divides = length % math.prod(sizes[n] for n in kept) == 0
        entries.append(kept if divides and kept else None)
    return lax.with_sharding_constraint(x, PartitionSpec(*entries))
