"""Report: what the compiler said of a step, as one carrier, as tables and as JSON."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rslora_jax.paths import AdapterError
from rslora_jax.plan.topologies import topology
from rslora_jax.tables import Table

__all__ = ["Plan", "Traffic", "compare"]

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind that a step runs.

    Attributes:
      kind: such as ``all-gather``.
      count: how often one runs in a step, those in loops at each turn.
      bytes: the arrays that they gather, sum or move, as `collectives.Collective.bytes` says.
      wire_bytes: what one device sends in all of them, on a ring.
    """

    kind: str
    count: int
    bytes: int
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs and costs on one JAX device of a topology, in bytes and seconds.

    Attributes:
      name: what the step was called.
      topology: the name of a slice, such as ``v5e:16x16``.
      num_slices: how many slices.
      mesh: the size of each mesh axis.
      fits: whether the compiler found room for it.
      need: the bytes that it needs at its peak: arguments, outputs that are not aliased,
        temporaries and code; or what the compiler says it would need.
      have: the bytes that a program may have on a device.
      arguments: bytes of the step's arguments by name, without the padding of tiles.
      gradients: bytes of the trained argument, as its gradients are large; they are part of the
        temporaries. None if nothing was said to be trained.
      memory: the compiler's bytes of ``arguments``, ``outputs``, those of the outputs that are
        ``aliased`` to arguments, ``temporaries`` and ``code``; empty if it does not fit.
      flops: floating-point operations of one device in a step, loops counted at each turn; None
        if it does not fit.
      hbm_bytes: bytes that a device reads from and writes to its memory in a step.
      unknown: what the counts leave out, in words; with any of these they are lower bounds.
      seconds: the least time of a step by what it needs: ``compute``, ``memory``, ``ici`` and
        ``dcn``; see `roofline`.
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
    unknown: tuple[str, ...] = ()
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

    def tables(self) -> dict[str, Table]:
        """What is known of one device, by title: ``memory``, ``cost`` and ``collectives``."""
        parts = {"memory": _memory(self), "cost": _cost(self), "collectives": _traffic(self)}
        return {title: Table.of(rows) for title, rows in parts.items() if rows}

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
            return cls(**{**found, "collectives": traffic, "unknown": tuple(found["unknown"])})
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
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise AdapterError(f"A plan was to be read, but it is no JSON: {error}.") from error
        return cls.from_dict(found)


def compare(plans: Iterable[Plan]) -> Table:
    """Plans side by side, one a row; sizes are those of one device.

    Args:
      plans: in the order of the rows.

    Returns:
      The table; a cell is None where a plan has no such figure.

    Example:
      >>> fits = Plan("lora", "v5e:2x2", 1, {"data": 4}, True, 2 * GIB, 15 * GIB, {"lora": GIB})
      >>> short = Plan("full", "v5e:2x2", 1, {"data": 4}, False, 20 * GIB, 15 * GIB, {})
      >>> compare([fits, short]).select(step="full").column("spare GiB")
      [-5.0]
    """
    return Table.of(_row(one) for one in plans)


def _row(one: Plan) -> dict[str, Any]:
    counted = one.flops is not None
    slices = f"{one.num_slices} x " if one.num_slices > 1 else ""
    return {
        "step": one.name,
        "topology": slices + one.topology,
        "mesh": ",".join(f"{axis}={size}" for axis, size in one.mesh.items()),
        "fits": "yes" if one.fits else "no",
        "peak GiB": one.need / GIB,
        "spare GiB": one.spare / GIB,
        **{f"{name} GiB": _in(GIB, size) for name, size in one.arguments.items()},
        "gradients GiB": _in(GIB, one.gradients),
        "temporaries GiB": _in(GIB, one.memory.get("temporaries")),
        "TFLOPs": _in(1e12, one.flops),
        "HBM GB": _in(1e9, one.hbm_bytes),
        "sent GB": sum(each.wire_bytes for each in one.collectives) / 1e9 if counted else None,
        "step ms": _in(1e-3, one.step_seconds),
        "bound": one.bound,
        "compile s": one.compile_seconds,
    }


def _memory(one: Plan) -> list[dict[str, Any]]:
    said = one.memory
    parts = {
        **{name: (size, "an argument, without padding") for name, size in one.arguments.items()},
        "all arguments": (said.get("arguments"), "as the compiler lays them out"),
        "outputs": (said.get("outputs"), "as the compiler lays them out"),
        "aliased": (said.get("aliased"), "outputs in the memory of donated arguments"),
        "gradients": (one.gradients, "of what is trained; a part of the temporaries"),
        "temporaries": (said.get("temporaries"), "activations, gradients and whatever is between"),
        "code": (said.get("code"), "the program"),
        "peak": (one.need, "arguments + outputs - aliased + temporaries + code"),
        "available": (one.have, "what a program may have on this chip"),
        "spare": (one.spare, "it fits" if one.fits else "it does not fit"),
    }
    if not one.fits:
        parts["peak"] = (one.need, "what the compiler says is needed")
    return [
        {"part": part, "GiB": _in(GIB, size), "what": what}
        for part, (size, what) in parts.items()
        if size is not None
    ]


def _cost(one: Plan) -> list[dict[str, Any]]:
    if not one.fits:
        return []
    rows = {
        "TFLOPs": (_in(1e12, one.flops), "of matrix products, on one device"),
        "HBM GB": (_in(1e9, one.hbm_bytes), "read and written by one device"),
        **{
            f"{name} ms": (seconds / 1e-3, "the step's bound" if name == one.bound else "")
            for name, seconds in one.seconds.items()
        },
        "compile s": (one.compile_seconds, "an earlier answer, kept" if one.cached else ""),
        **{f"not counted {n}": ("", what) for n, what in enumerate(one.unknown, 1)},
    }
    return [
        {"figure": figure, "value": value, "what": what}
        for figure, (value, what) in rows.items()
        if value is not None
    ]


def _traffic(one: Plan) -> list[dict[str, Any]]:
    return [
        {
            "kind": each.kind,
            "count": each.count,
            "MiB": each.bytes / 2**20,
            "sent MiB": each.wire_bytes / 2**20,
        }
        for each in one.collectives
    ]


def _in(unit: float, value: float | None) -> float | None:
    return None if value is None else value / unit
