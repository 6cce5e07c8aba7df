"""Plan: one step, compiled ahead of time for one topology, and what the compiler said of it."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import AxisType

from rslora_jax.paths import AdapterError
from rslora_jax.plan import caching
from rslora_jax.plan.compiling import Report, compile_program, versions
from rslora_jax.plan.exporting import Input, export, inputs
from rslora_jax.plan.topologies import Topology, abstract_mesh, check_mesh, topology

__all__ = ["Plan", "Traffic", "plan"]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind that a step runs.

    Attributes:
      kind: such as ``all-gather``.
      count: how often one runs in a step, those in loops at each turn.
      bytes: what one device receives in all of them.
    """

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs and costs on one JAX device of a topology, in bytes and seconds.

    Attributes:
      name: what the step was called.
      topology: the name of a slice, such as ``v5e:16x16``.
      num_slices: how many slices.
      mesh: the size of each mesh axis.
      fits: whether the compiler found room for it.
      need: the bytes that it needs: the compiler's peak, or what it missed.
      have: the bytes that a program may have on a device.
      arguments: bytes of the step's arguments by name, without the padding of tiles.
      gradients: bytes of the trained argument, as its gradients are large; they are part of the
        temporaries. None if nothing was said to be trained.
      memory: the compiler's bytes of ``arguments``, ``outputs``, those of the outputs that are
        ``aliased`` to arguments, ``temporaries``, ``code`` and the ``peak``; empty if it does
        not fit.
      flops: floating-point operations of one device in a step, loops counted at each turn; None
        if it does not fit.
      hbm_bytes: bytes that a device reads from and writes to its memory in a step.
      seconds: the least time of a step by ``compute``, ``memory`` and ``network`` alone.
      collectives: what the devices send to one another.
      compile_seconds: how long the compiler took; None if it does not fit.
      trace_seconds: how long tracing and exporting took.
      cached: whether the compiler's answer was an earlier one.
      versions: of jax, jaxlib and libtpu.
      hlo: the optimized program's text; not a part of the JSON.
    """

    name: str
    topology: str
    num_slices: int
    mesh: dict[str, int]
    fits: bool
    need: int
    have: int
    arguments: dict[str, int]
    gradients: int | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: float | None = None
    hbm_bytes: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: tuple[Traffic, ...] = ()
    compile_seconds: float | None = None
    trace_seconds: float = 0.0
    cached: bool = False
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    hlo: str = dataclasses.field(default="", repr=False, compare=False)

    @property
    def spare(self) -> int:
        """The bytes that are left on a device; negative if it does not fit."""
        return self.have - self.need

    @property
    def bound(self) -> str | None:
        """Which of the `seconds` is the longest; None if it does not fit."""
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else None

    @property
    def step_seconds(self) -> float | None:
        """The roofline: a step cannot be faster than its longest part."""
        return max(self.seconds.values()) if self.seconds else None

    @property
    def devices(self) -> int:
        """The JAX devices of the mesh."""
        return topology(self.topology, self.num_slices).devices

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the program's text."""
        found = dataclasses.asdict(self)
        del found["hlo"]
        return {**found, "collectives": [dataclasses.asdict(one) for one in self.collectives]}

    def to_json(self) -> str:
        """The plan as one JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Plan":
        """Reads what `to_dict` returned.

        Raises:
          AdapterError: if a part is missing or unknown.
        """
        try:
            traffic = tuple(Traffic(**one) for one in found["collectives"])
            return cls(**{**found, "collectives": traffic})
        except (TypeError, KeyError) as error:
            raise AdapterError(
                f"A plan was to be read, but it is not one that this version wrote: {error}. "
                "Make it again."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `to_json` returned.

        Raises:
          AdapterError: if it is no JSON, or a part is missing or unknown.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise AdapterError(f"A plan was to be read, but it is no JSON: {error}.") from error


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
    report: Report | None = None,
) -> Plan:
    """Compiles a step for a topology with the real TPU compiler, without a TPU.

    The step is traced and exported here; a process of its own loads libtpu and compiles.

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
        arguments=_sums(found),
        gradients=_gradients(_sums(found), trained),
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
    memory = {name: size for name, size in answer["memory"].items() if size is not None}
    return {
        "fits": True,
        "need": _peak(memory),
        "have": where.chip.hbm_available,
        "memory": memory,
        "compile_seconds": answer["seconds"],
        "cached": answer["cached"],
        "hlo": answer["hlo"],
    }


def _peak(memory: Mapping[str, int]) -> int:
    parts = sum(memory[name] for name in ("arguments", "outputs", "temporaries", "code"))
    return memory.get("peak") or parts - memory["aliased"]
