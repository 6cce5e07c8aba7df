"""Meshes: decompositions of weights whose mesh has Explicit axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = ["automatic"]


def automatic(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function` with XLA left to choose how its products and decompositions shard.

    Under a mesh of Explicit axes a product over a sharded axis, a QR and an SVD all ask for
    an output sharding. Here they get none: the inputs stay where they are, and the results,
    which are to be thin, are on every device. Without Explicit axes it is a plain call.

    Args:
      function: takes arrays and returns a tree of arrays, inside a jit.
      *args: its arguments.

    Returns:
      What `function` returns.

    Example:
      >>> import jax.numpy as jnp
      >>> float(automatic(jnp.sum, jnp.ones(3)))
      3.0
    """
    mesh = next((mesh for leaf in jax.tree.leaves(args) if (mesh := _explicit_mesh(leaf))), None)
    if mesh is None:
        return function(*args)
    explicit = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    ]
    everywhere = NamedSharding(mesh, PartitionSpec())
    wrapped = jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=everywhere)
    return wrapped(*args)


def _explicit_mesh(leaf: Any) -> Any:
    mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None
