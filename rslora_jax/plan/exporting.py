"""Exporting: a step over abstract arguments as bytes that another process can compile."""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from rslora_jax.extras import extra
from rslora_jax.paths import AdapterError
from rslora_jax.plan.inputs import Input

__all__ = ["INSTALL", "Program", "export"]

INSTALL = "rslora_jax[tpu-plan]"
"""What pip is to install for the planner."""

LOCATION = re.compile(r' loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\([^()]*\))*\))*\)')


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


def _bare(text: str) -> str:
    """StableHLO without its locations: they hold line numbers of the program and its callers."""
    lines = (line for line in text.splitlines() if not line.startswith("#loc"))
    return LOCATION.sub("", "\n".join(lines))


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
