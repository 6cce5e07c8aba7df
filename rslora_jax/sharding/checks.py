"""Checks: what a PartitionSpec, an array and a mesh must agree on, told by site and axis."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from rslora_jax.axes import RANK, factor_dims
from rslora_jax.paths import AdapterError, nearest
from rslora_jax.sharding.policies import entry_names

__all__ = ["Placing", "check_length", "check_names", "check_placing"]


class Placing(NamedTuple):
    """An array that is to be sharded, with words for its axes.

    Attributes:
      name: what it is, such as ``Factor 'layers/q/a'``.
      shape: its shape.
      spec: its PartitionSpec.
      words: a description of each axis.
      hint: what else can help where a mesh axis does not exist.
    """

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    words: tuple[str, ...]
    hint: str = ""

    @classmethod
    def of_weight(cls, path: str, shape: Sequence[int], spec: PartitionSpec) -> "Placing":
        """A weight of the base."""
        words = tuple(f"axis {k}" for k in range(len(shape)))
        hint = ', or pass rules=[("embed", "fsdp"), ...] if it is a logical one'
        return cls(f"The base weight {path!r}", tuple(shape), spec, words, hint)

    @classmethod
    def of_factors(
        cls,
        path: str,
        axes: str,
        shapes: Sequence[Sequence[int]],
        specs: Sequence[PartitionSpec],
    ) -> tuple["Placing", ...]:
        """Both factors of a site."""
        rows = zip("ab", factor_dims(axes), shapes, specs, strict=True)
        return tuple(
            cls(f"Factor {path + '/' + name!r}", tuple(shape), spec, _words(axes, dims))
            for name, dims, shape, spec in rows
        )


def check_placing(placing: Placing, mesh: Any = None) -> None:
    """Refuses a spec that JAX could not carry out.

    Args:
      placing: the array and its spec.
      mesh: a Mesh or AbstractMesh; without one, names and sizes are not looked at.

    Raises:
      AdapterError: for a spec with more entries than the array has axes, a mesh axis that is
        used twice or does not exist, and a size that the mesh axes do not divide.
    """
    check_length(placing)
    _check_twice(placing)
    if mesh is not None:
        for names in map(entry_names, placing.spec):
            asked = f"{placing.name} has the spec {placing.spec}"
            check_names(names, mesh, asked, placing.hint)
        _check_sizes(placing, mesh.shape)


def check_length(placing: Placing) -> None:
    """Refuses a spec with more entries than the array has axes."""
    if len(placing.spec) > len(placing.shape):
        raise AdapterError(
            f"{placing.name} has the spec {placing.spec} with {len(placing.spec)} entries, but "
            f"its shape {placing.shape} has {len(placing.shape)} axes. Give one entry an axis."
        )


def check_names(names: Sequence[str], mesh: Any, asked: str, hint: str = "") -> None:
    """Refuses names that are no axes of the mesh.

    Args:
      names: the names.
      mesh: a Mesh or AbstractMesh.
      asked: who named them, for the message.
      hint: what else can help, for the message.

    Raises:
      AdapterError: with the mesh's axes, the nearest first.
    """
    for name in names:
        if name not in mesh.shape:
            raise AdapterError(
                f"{asked}, but the mesh has no axis {name!r}. Its axes are {dict(mesh.shape)}; "
                f"the nearest to {name!r} is {nearest(name, mesh.shape, 1)}. Correct the name"
                f"{hint}."
            )


def _check_twice(placing: Placing) -> None:
    uses: dict[str, list[int]] = {}
    for k, entry in enumerate(placing.spec):
        for name in entry_names(entry):
            uses.setdefault(name, []).append(k)
    for name, places in uses.items():
        if len(places) > 1:
            axes = " and ".join(placing.words[k] for k in places)
            raise AdapterError(
                f"{placing.name} has the spec {placing.spec}, which uses the mesh axis {name!r} "
                f"for {axes}. A mesh axis can split one axis of an array: name it once; factors "
                f"leave it off with Policy(without=({name!r},), ...)."
            )


def _check_sizes(placing: Placing, sizes: Mapping[str, int]) -> None:
    for k, entry in enumerate(placing.spec):
        parts = 1
        for name in entry_names(entry):
            parts *= sizes[name]
        if placing.shape[k] % parts:
            used = {name: sizes[name] for name in entry_names(entry)}
            raise AdapterError(
                f"{placing.name} has shape {placing.shape} and the spec {placing.spec}: its "
                f"{placing.words[k]} has size {placing.shape[k]}, which the mesh axes {used} do "
                f"not divide into {parts} equal parts. Use a mesh or a rank whose sizes divide, "
                f"or leave the axis off."
            )


def _words(axes: str, dims: Sequence[int]) -> tuple[str, ...]:
    return tuple(
        f"axis {k} (the rank)" if d == RANK else f"axis {k} ({axes[d]!r}, axis {d} of the weight)"
        for k, d in enumerate(dims)
    )
