"""Plan: one step, compiled ahead of time for one topology, and what the compiler said of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import AxisType

from rslora_jax.paths import AdapterError
from rslora_jax.plan import caching
from rslora_jax.plan.collectives import Collective, collectives_of
from rslora_jax.plan.compiling import Progress, compile_program, versions
from rslora_jax.plan.counting import count_of
from rslora_jax.plan.exporting import export
from rslora_jax.plan.hlo import parse
from rslora_jax.plan.inputs import Input, inputs
from rslora_jax.plan.report import Plan, Traffic
from rslora_jax.plan.roofline import roofline
from rslora_jax.plan.topologies import Topology, abstract_mesh, check_mesh, topology

__all__ = ["plan"]


def plan(  # noqa: PLR0913  # one name for each thing that a plan depends on
    step: Callable[..., Any],
    args: Sequence[Any],
    *,
    topology: str = "v5e:16x16",
    mesh_shape: Mapping[str, int],
    num_slices: int = 1,
    name: str = "step",
    names: Sequence[str] | None = None,
    trained: str | None = None,
    specs: Any = None,
    donate: int | Sequence[int] | None = None,
    axis_types: AxisType | tuple[AxisType, ...] = AxisType.Auto,
    compiler_options: Mapping[str, Any] | None = None,
    time_limit: float = 1800.0,
    cache: bool | str | Path = True,
    report: Progress | None = None,
) -> Plan:
    """Compiles a step for a topology with the real TPU compiler, without a TPU.

    The step is traced and exported here; a process of its own loads libtpu and compiles. (JAX
    itself loads an installed libtpu with the first operation of any process, and says so on the
    standard error; ``JAX_PLATFORMS=cpu`` prevents that.)

    Args:
      step: any function of arrays, or a jitted one. Constraints on shardings inside it may be
        bare PartitionSpecs.
      args: its positional arguments, abstract ones (`jax.ShapeDtypeStruct`) as a rule. The spec of
        a leaf's `NamedSharding` says how it is spread over the mesh, whatever mesh that is over
        (`abstract_mesh` makes one); a leaf without is on every device.
      topology: the generation and the chips along each axis of the torus.
      mesh_shape: the size of each mesh axis, in order; the product is the number of devices. If
        there are several slices, the first axis that they divide goes across them.
      num_slices: how many slices the data center network joins.
      name: what the plan is called in tables.
      names: a name for each argument; by default the step's own. `LoraParams` are always listed
        as ``base`` and ``lora``.
      trained: the name of what gradients are taken of; by default ``lora`` if there is one.
      specs: a tree of PartitionSpecs (None: replicated) like `args` or a prefix of it; replaces
        the leaves' shardings.
      donate: the places of the arguments whose memory the step may overwrite; by default what a
        jitted step donates itself.
      axis_types: of all mesh axes, or of each.
      compiler_options: options of XLA for the compilation.
      time_limit: seconds after which the compiler is ended.
      cache: True keeps the compiler's answers in the user's cache folder, a path keeps them there,
        False asks anew.
      report: called as ``report(what, seconds)`` twice a second while the compiler runs.

    Returns:
      The plan. A step that does not fit is a plan with ``fits=False``.

    Raises:
      AdapterError: if the topology is unknown, the mesh has another number of devices, a spec
        does not go with its array, libtpu is not installed, or the compiler refuses, aborts or
        needs too long. What the step itself raises while it is traced is passed on.

    Example:
      >>> def step(w, x):
      ...     return x @ w
      >>> plan(step, (), topology="v5e:4x4", mesh_shape={"data": 8})
      Traceback (most recent call last):
      ...
      rslora_jax.paths.AdapterError: The mesh data=8 has 8 devices, but v5e:4x4 has 16. ...
    """
    where = _where(topology, num_slices, mesh_shape)
    mesh = abstract_mesh(mesh_shape, axis_types)
    known = versions()
    start = time.monotonic()
    found = inputs(step, args, mesh, names, specs)
    sums = _sums(found)
    gradients = _gradients(sums, trained)
    program = export(step, args, found, mesh, donate)
    trace_seconds = time.monotonic() - start
    folder = caching.folder(cache)
    answer = compile_program(
        program, where, mesh, compiler_options or {}, time_limit, folder, report
    )
    return Plan(
        name=name,
        topology=where.name,
        num_slices=num_slices,
        mesh=dict(mesh_shape),
        arguments=sums,
        gradients=gradients,
        trace_seconds=trace_seconds,
        versions=known,
        **_answered(answer, where),
    )


def _where(name: str, num_slices: int, mesh_shape: Mapping[str, int]) -> Topology:
    found = topology(name, num_slices)
    check_mesh(mesh_shape, found)
    return found


def _sums(found: Sequence[Input]) -> dict[str, int]:
    groups = dict.fromkeys((one.group for one in found), 0)
    for one in found:
        groups[one.group] += one.bytes
    return groups


def _gradients(sums: Mapping[str, int], trained: str | None) -> int | None:
    if trained is None:
        return sums.get("lora")
    if trained not in sums:
        raise AdapterError(
            f"The gradients of {trained!r} were asked for, but the arguments are "
            f"{', '.join(sums)}. Name one of them."
        )
    return sums[trained]


def _answered(answer: Mapping[str, Any], where: Topology) -> dict[str, Any]:
    if "memory" not in answer:
        short = {"need": answer["need"], "have": answer["have"]}
        return {"fits": False, "cached": answer["cached"], **short}
    return {
        "fits": True,
        "need": _need(answer["memory"]),
        "have": where.chip.hbm_available,
        "memory": answer["memory"],
        "compile_seconds": answer["seconds"],
        "cached": answer["cached"],
        "hlo": answer["hlo"],
        **(_counted(answer["hlo"], where) if answer["hlo"] else {"unknown": (answer["unread"],)}),
    }


def _need(memory: Mapping[str, int]) -> int:
    # What the compiler calls a program's peak also counts memory that is on the chip; this sum
    # was seen to be what it asks for where a program does not fit.
    parts = sum(memory[name] for name in ("arguments", "outputs", "temporaries", "code"))
    return parts - memory["aliased"]


def _counted(text: str, where: Topology) -> dict[str, Any]:
    # Whether it fits is known already; what cannot be counted must not hide that.
    try:
        module = parse(text)
        count, found = count_of(module), collectives_of(module)
        bounds = roofline(count, found, where.chip)
    except AdapterError as error:
        return {"unknown": (str(error),)}
    except (LookupError, ValueError, TypeError) as error:  # another libtpu may print other text
        said = f"{type(error).__name__}: {error}"
        return {"unknown": (f"the text of the compiled program is not as expected ({said})",)}
    return {
        "flops": count.flops,
        "hbm_bytes": count.hbm_bytes,
        "unknown": bounds.unknown,
        "seconds": {name: seconds for name, seconds in bounds.parts.items() if seconds},
        "collectives": _by_kind(found),
    }


def _by_kind(found: Sequence[Collective]) -> tuple[Traffic, ...]:
    kinds = dict.fromkeys(each.kind for each in found)
    return tuple(_sum(kind, [each for each in found if each.kind == kind]) for kind in kinds)


def _sum(kind: str, found: Sequence[Collective]) -> Traffic:
    return Traffic(
        kind=kind,
        count=sum(each.times for each in found),
        bytes=sum(each.times * each.bytes for each in found),
        wire_bytes=sum(each.times * each.wire_bytes for each in found),
    )
