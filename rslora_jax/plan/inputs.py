"""Inputs: the arrays that go into a step, their names and how each lies on the mesh."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError
from rslora_jax.sharding.checks import Placing, check_placing

__all__ = ["Input", "inputs"]


class Input(NamedTuple):
    """One array that goes into a step.

    Attributes:
      path: where it is in the arguments: ``params/base/layers/q``.
      group: what its bytes are counted with: the argument's name, or ``base`` and ``lora``.
      array: its shape, dtype and `NamedSharding` over the abstract mesh; None for a static leaf.
      value: the leaf as it was given.
    """

    path: str
    group: str
    array: jax.ShapeDtypeStruct | None
    value: Any

    @property
    def bytes(self) -> int:
        """Bytes on one device, without the padding of a TPU's tiles."""
        if self.array is None:
            return 0
        shape = self.array.sharding.shard_shape(self.array.shape)
        return math.prod(shape) * self.array.dtype.itemsize


def inputs(
    step: Callable[..., Any],
    args: Sequence[Any],
    mesh: AbstractMesh,
    names: Sequence[str] | None = None,
    specs: Any = None,
) -> tuple[Input, ...]:
    """Lists what goes into a step, and how each array is spread over the mesh.

    Args:
      step: the step; its parameters' names are used where `names` is None.
      args: its positional arguments, of arrays, `ShapeDtypeStruct`s, numbers and static values.
      mesh: the abstract mesh.
      names: one name for each argument.
      specs: a tree of PartitionSpecs like `args` or a prefix of it, None for replicated; without
        it the spec of each leaf's `NamedSharding` counts, whatever mesh that is over.

    Returns:
      One `Input` for each leaf of `args`.

    Raises:
      AdapterError: if there are more or fewer names than arguments, `specs` does not go with
        `args`, or a spec does not go with its array or the mesh.

    Example:
      >>> mesh = AbstractMesh((2,), ("fsdp",))
      >>> w = jax.ShapeDtypeStruct((8, 4), "float32")
      >>> (found,) = inputs(lambda w: w, (w,), mesh, specs=(PartitionSpec("fsdp"),))
      >>> found.path, found.bytes
      ('w', 64)
    """
    called = _names(step, args, names)
    leaves = [
        (
            f"{name}/{jax.tree_util.keystr(keys, simple=True, separator='/')}".rstrip("/"),
            group,
            leaf,
        )
        for name, arg in zip(called, args, strict=True)
        for group, keys, leaf in _leaves(name, arg)
    ]
    given = [None] * len(leaves) if specs is None else _specs(args, specs)
    return tuple(
        Input(path, group, _array(path, leaf, spec, mesh, specs is not None), leaf)
        for (path, group, leaf), spec in zip(leaves, given, strict=True)
    )


def _names(
    step: Callable[..., Any], args: Sequence[Any], names: Sequence[str] | None
) -> tuple[str, ...]:
    if names is not None:
        if len(names) != len(args):
            raise AdapterError(
                f"The step has {len(args)} arguments, but {len(names)} names were given for them: "
                f"{', '.join(names)}. Give one name for each argument."
            )
        return tuple(names)
    try:
        bound = inspect.signature(step).bind(*args)
    except (TypeError, ValueError):
        return tuple(f"argument {n}" for n in range(len(args)))
    plain = [name for name, value in bound.arguments.items() for _ in _repeats(step, name, value)]
    return tuple(plain[: len(args)])


def _repeats(step: Callable[..., Any], name: str, value: Any) -> Sequence[Any]:
    kind = inspect.signature(step).parameters[name].kind
    return value if kind is inspect.Parameter.VAR_POSITIONAL else (value,)


def _leaves(name: str, arg: Any) -> list[tuple[str, Any, Any]]:
    found = jax.tree_util.tree_flatten_with_path(arg)[0]
    if not isinstance(arg, LoraParams):
        return [(name, keys, leaf) for keys, leaf in found]
    base = len(jax.tree.leaves(arg.base))
    return [("base" if n < base else "lora", keys, leaf) for n, (keys, leaf) in enumerate(found)]


def _specs(args: Sequence[Any], specs: Any) -> list[PartitionSpec | None]:
    try:
        return jax.tree.leaves(
            jax.tree.broadcast(tuple(specs), tuple(args), is_leaf=_is_spec), is_leaf=_is_spec
        )
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"The specs' tree does not go with the arguments' tree: {error} Give a PartitionSpec "
            "or None for each argument, or a tree of them like the argument or a prefix of it."
        ) from error


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, PartitionSpec)


def _array(
    path: str, leaf: Any, spec: PartitionSpec | None, mesh: AbstractMesh, has_specs: bool
) -> jax.ShapeDtypeStruct | None:
    if isinstance(leaf, bool | int | float | complex):
        leaf = jax.typeof(leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return None
    if not has_specs:
        sharding = getattr(leaf, "sharding", None)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else None
    named = NamedSharding(mesh, _checked(path, leaf.shape, spec or PartitionSpec(), mesh))
    weak = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named, weak_type=weak)


def _checked(
    path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: AbstractMesh
) -> PartitionSpec:
    words = tuple(f"axis {k}" for k in range(len(shape)))
    check_placing(Placing(f"The argument {path!r}", shape, spec, words), mesh)
    return spec
