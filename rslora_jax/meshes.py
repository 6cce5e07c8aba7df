"""Meshes: where results lie on a mesh of Explicit axes, where JAX asks.

There a product over a sharded axis, a lookup of sharded rows, a QR and an SVD want to be told
their output's sharding. On Auto axes and without a mesh nothing is said: XLA finds its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = ["along", "automatic", "devices_along", "entries"]


def along(labels: Sequence[int], sides: Sequence[Any]) -> NamedSharding | None:
    """The sharding of an array that lies along others, on a mesh of Explicit axes.

    Args:
      labels: what each axis of the array is.
      sides: labelled arrays (`factors.Factor`), the most important first. Each label takes
        the mesh axes of the first side that has some for it; no mesh axis serves twice.

    Returns:
      A sharding for JAX's `out_sharding`, None without Explicit axes.
    """
    mesh = next((mesh for side in sides if (mesh := _explicit_mesh(side.array))), None)
    if mesh is None:
        return None
    spec: dict[int, tuple[str, ...]] = {}
    for side in sides:
        for label, axes in entries(side.array, side.labels).items():
            used = {name for taken in spec.values() for name in taken}
            free = tuple(name for name in axes if name not in used)
            if label in labels and free:
                spec.setdefault(label, free)
    return NamedSharding(mesh, PartitionSpec(*(spec.get(label) for label in labels)))


def entries(array: Any, labels: Sequence[int]) -> Mapping[int, tuple[str, ...]]:
    """The Explicit mesh axes behind each label that has any."""
    if _explicit_mesh(array) is None:
        return {}
    spec = jax.typeof(array).sharding.spec
    found = {n: (e,) if isinstance(e, str) else e for n, e in zip(labels, spec, strict=True)}
    return {n: tuple(e) for n, e in found.items() if e}


def automatic(function: Callable[..., Any], *args: Any, out: NamedSharding | None = None) -> Any:
    """Calls `function` with XLA left to choose how what it computes is sharded.

    The inputs stay where they are on a mesh of Explicit axes. Without Explicit axes this is
    a plain call.

    Args:
      function: takes arrays and returns a tree of arrays, inside a jit.
      *args: its arguments.
      out: where the results go; thin ones go to every device, which is the default.

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
    place = NamedSharding(mesh, PartitionSpec()) if out is None else out
    wrapped = jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=place)
    return wrapped(*args)


def devices_along(mesh: Any, entry: Any) -> int:
    """How many devices lie along an entry of a PartitionSpec.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
      >>> [devices_along(mesh, entry) for entry in (None, "fsdp", ("fsdp", "tensor"))]
      [1, 4, 8]
    """
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[name] for name in names)


def _explicit_mesh(leaf: Any) -> Any:
    mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None
