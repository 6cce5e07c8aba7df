"""Exporting: a step over abstract arguments as bytes that another process can compile."""

import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from rslora_jax.extras import extra
from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError, nearest

__all__ = ["Input", "Program", "export", "inputs"]

INSTALL = "rslora_jax[tpu-plan]"
"""What pip is to install for the planner."""


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
        size = 1
        for length in shape:
            size *= length
        return size * self.array.dtype.itemsize


class Program(NamedTuple):
    """A traced and exported step.

    Attributes:
      module: the serialized `jax.export.Exported` of the flattened step.
      digest: SHA-256 of its StableHLO without names of files and line numbers.
      arrays: what it takes, in order.
      donated: the places in `arrays` that it may overwrite.
    """

    module: bytes
    digest: str
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    donated: tuple[int, ...]


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


def export(
    step: Callable[..., Any],
    args: Sequence[Any],
    found: Sequence[Input],
    mesh: AbstractMesh,
    donate: int | Sequence[int] | None = None,
) -> Program:
    """Traces a step under an abstract mesh and lowers it for TPUs; no device is touched.

    Args:
      step: a function or a jitted one.
      args: its arguments, as `inputs` had them.
      found: what `inputs` returned.
      mesh: the abstract mesh.
      donate: the places of the arguments whose memory the step may overwrite; None for what a
        jitted step donates itself.

    Returns:
      The exported program.

    Raises:
      AdapterError: if flatbuffers is not installed or `donate` names no argument.
    """
    extra("flatbuffers", INSTALL, "Exporting a step to the TPU compiler")
    treedef = jax.tree.structure(tuple(args))
    arrays = [one.array for one in found if one.array is not None]

    def flat(*given: Any) -> list[Any]:
        values = iter(given)
        leaves = [one.value if one.array is None else next(values) for one in found]
        return jax.tree.leaves(step(*jax.tree.unflatten(treedef, leaves)))

    with jax.sharding.use_abstract_mesh(mesh):
        donated = _donated(step, args, found, donate)
        jitted = jax.jit(flat, donate_argnums=donated)
        exported = jax.export.export(jitted, platforms=["tpu"])(*arrays)
    digest = hashlib.sha256(_bare(exported.mlir_module()).encode()).hexdigest()
    return Program(bytes(exported.serialize()), digest, tuple(arrays), donated)


LOCATION = re.compile(r' loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\([^()]*\))*\))*\)')


def _bare(text: str) -> str:
    """StableHLO without its locations: they hold line numbers of the program and its callers."""
    lines = (line for line in text.splitlines() if not line.startswith("#loc"))
    return LOCATION.sub("", "\n".join(lines))


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
    if len(spec) > len(shape):
        raise AdapterError(
            f"{path} has {len(shape)} axes {list(shape)}, but its spec {spec} has {len(spec)}. "
            "Shorten the spec."
        )
    for length, entry in zip(shape, spec, strict=False):
        parts = 1
        for axis in _axes(entry):
            if axis not in mesh.shape:
                raise AdapterError(
                    f"{path} is to be sharded over {axis!r}, which the mesh {dict(mesh.shape)} "
                    f"does not have. The nearest axes are {nearest(axis, mesh.shape)}."
                )
            parts *= mesh.shape[axis]
        if length % parts:
            raise AdapterError(
                f"{path} {list(shape)} cannot be sharded as {spec}: {parts} devices do not divide "
                f"{length}. Change the mesh {dict(mesh.shape)} or the spec."
            )
    return spec


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _donated(
    step: Callable[..., Any],
    args: Sequence[Any],
    found: Sequence[Input],
    donate: int | Sequence[int] | None,
) -> tuple[int, ...]:
    if donate is None:
        flags = _own_donations(step, args, found)
    else:
        places = (donate,) if isinstance(donate, int) else tuple(donate)
        if any(not 0 <= place < len(args) for place in places):
            raise AdapterError(
                f"The arguments at {places} were to be donated, but the step has {len(args)} "
                "arguments. Count them from 0."
            )
        sizes = [len(jax.tree.leaves(arg)) for arg in args]
        flags = [n in places for n, size in enumerate(sizes) for _ in range(size)]
    kept = [flag for flag, one in zip(flags, found, strict=True) if one.array is not None]
    return tuple(n for n, flag in enumerate(kept) if flag)


def _own_donations(
    step: Callable[..., Any], args: Sequence[Any], found: Sequence[Input]
) -> list[bool]:
    # Static leaves would have to be static arguments of the jitted step: donate nothing then.
    if not hasattr(step, "trace") or any(one.array is None for one in found):
        return [False] * len(found)
    leaves = [one.array for one in found]
    abstract = jax.tree.unflatten(jax.tree.structure(tuple(args)), leaves)
    info = step.trace(*abstract).args_info  # pyright: ignore[reportFunctionMemberAccess]
    return [one.donated for one in jax.tree.leaves(info)]
