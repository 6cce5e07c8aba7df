"""Topologies: names such as ``v5e:16x16``, and the meshes that fit on them."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import AbstractMesh, AxisType

from rslora_jax.paths import AdapterError, nearest
from rslora_jax.plan.chips import CHIPS, Chip, chip

__all__ = ["KNOWN", "Topology", "abstract_mesh", "check_mesh", "near", "topology"]

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_PODS = ("8x16x16", "16x16x16")
_SHAPES = {
    "v4": (*_CUBES, *_PODS),
    "v5e": _FLAT,
    "v5p": (*_CUBES, *_PODS, "16x16x24"),
    "v6e": _FLAT,
    "tpu7x": (*_CUBES, *_PODS, "16x16x24"),
}
KNOWN = tuple(f"{known.name}:{shape}" for known in CHIPS for shape in _SHAPES[known.name])
"""Slices of Google Cloud's pages (see `chips`); all were seen to resolve with libtpu 0.0.52."""


class Topology(NamedTuple):
    """Slices of one TPU generation: what the compiler compiles for.

    Attributes:
      name: the name of one slice, as libtpu spells it.
      chip: one JAX device of it.
      shape: its chips along each axis of the torus.
      num_slices: how many such slices the data center network joins.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def chips(self) -> int:
        """The chips of all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def devices(self) -> int:
        """The JAX devices of all slices."""
        return self.chips * self.chip.devices_per_chip


def topology(name: str, num_slices: int = 1) -> Topology:
    """Reads the name of a topology; libtpu is not asked yet.

    Args:
      name: the generation, a colon, and the chips along each axis: ``"v5e:16x16"``.
      num_slices: how many slices of that shape.

    Returns:
      The topology. A shape that is not in `KNOWN` is left for libtpu to judge.

    Raises:
      AdapterError: if the name cannot be read, the generation is unknown, the shape has another
        number of axes than the generation's torus or more chips than a pod, or there is no slice.

    Example:
      >>> topology("v5e:16x16").devices, topology("tpu7x:2x2x2").devices
      (256, 16)
    """
    matched = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if matched is None:
        raise _unknown(name, "it is not written as a generation, a colon and a shape")
    generation = chip(matched[1])
    shape = tuple(int(size) for size in matched[2].split("x"))
    found = Topology(f"{generation.name}:{matched[2]}", generation, shape, num_slices)
    if len(shape) != generation.dimensions:
        raise _unknown(name, f"a {generation.name} slice has {generation.dimensions} axes")
    if not 0 < math.prod(shape) <= generation.pod:
        raise _unknown(name, f"a {generation.name} slice has 1 to {generation.pod} chips")
    if num_slices < 1:
        raise AdapterError(f"{num_slices} slices of {name} were asked for. Ask for 1 or more.")
    return found


def abstract_mesh(
    mesh_shape: Mapping[str, int], axis_types: AxisType | tuple[AxisType, ...] = AxisType.Auto
) -> AbstractMesh:
    """The mesh that the shardings of a plan's abstract arguments are written over.

    Args:
      mesh_shape: the size of each axis, in order: ``{"fsdp": 32, "tensor": 8}``.
      axis_types: the type of all axes, or of each.

    Returns:
      The mesh, which has no devices.

    Raises:
      AdapterError: if a size is below 1 or there are more or fewer types than axes.

    Example:
      >>> abstract_mesh({"fsdp": 32, "tensor": 8}).size
      256
    """
    types = axis_types if isinstance(axis_types, tuple) else (axis_types,) * len(mesh_shape)
    if len(types) != len(mesh_shape) or any(size < 1 for size in mesh_shape.values()):
        raise AdapterError(
            f"A mesh of {dict(mesh_shape)} with axis types {types} was asked for. Give each axis "
            "a size of 1 or more, and one type for all axes or one for each."
        )
    return AbstractMesh(tuple(mesh_shape.values()), tuple(mesh_shape), axis_types=types)


def check_mesh(mesh_shape: Mapping[str, int], found: Topology) -> None:
    """Refuses a mesh with another number of devices than the topology, or one no slice fits.

    Raises:
      AdapterError: with both numbers.
    """
    size = math.prod(mesh_shape.values())
    if size != found.devices:
        raise AdapterError(
            f"The mesh {_written(mesh_shape)} has {size} devices, but {_described(found)}. "
            "Change the mesh's sizes so that their product is the number of devices."
        )
    if all(axis % found.num_slices for axis in mesh_shape.values()):
        raise AdapterError(
            f"The mesh {_written(mesh_shape)} has no axis that {found.num_slices} slices divide. "
            f"Put an axis in front whose size is a multiple of {found.num_slices}."
        )


def _described(found: Topology) -> str:
    slices = f"{found.num_slices} slices of {found.name}" if found.num_slices > 1 else found.name
    each = found.chip.devices_per_chip
    chips = f" ({found.chips} chips of {each} devices)" if each > 1 else ""
    return f"{slices} {'have' if found.num_slices > 1 else 'has'} {found.devices}{chips}"


def _written(mesh_shape: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh_shape.items()) or "without axes"


def _unknown(name: str, why: str) -> AdapterError:
    lines = (f"{known.name}:{' '.join(_SHAPES[known.name])}" for known in CHIPS)
    return AdapterError(
        f"The topology {name!r} was asked for, but {why}. The nearest known ones are "
        f"{near(name.lower())}. All known ones: {', '.join(lines)}."
    )


def near(name: str) -> str:
    """The known topologies that are most like a name, of its generation if that is known."""
    generation = name.partition(":")[0]
    same = [known for known in KNOWN if known.startswith(f"{generation}:")]
    return nearest(name, same or KNOWN)
