"""Collectives: what the devices of a compiled program send to one another, and how often."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rslora_jax.paths import AdapterError
from rslora_jax.plan.chains import begins, is_chained
from rslora_jax.plan.groups import first_group
from rslora_jax.plan.hlo import Computation, Instruction, Module, parse
from rslora_jax.plan.runs import Run, runs
from rslora_jax.plan.shapes import Shape
from rslora_jax.tables import Table

__all__ = ["KINDS", "Collective", "collectives", "collectives_of", "table"]

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
    "send",
)
"""The operations that move data between devices; between slices the TPU's is a `send`."""

ONE_WAY = ("collective-permute", "collective-broadcast", "send")


class Collective(NamedTuple):
    """One collective, as one device sees one call of it.

    Attributes:
      kind: one of `KINDS`. What a TPU does as a sum whose parts stay scattered, a fusion of
        all-reduce and slice, is ``"reduce-scatter"``.
      shapes: the arrays at the side where they are whole: the results of an all-gather, the
        operands of all others.
      bytes: the size of `shapes`, without padding.
      times: calls in one run of the program; loops multiply.
      group: the devices of the first group.
      name: the instruction.
      op_name: where in the user's program it comes from.
      exact: False inside a loop whose count depends on data, which is taken as one round.
    """

    kind: str
    shapes: tuple[Shape, ...]
    bytes: int
    times: int
    group: tuple[int, ...]
    name: str
    op_name: str
    exact: bool = True

    @property
    def group_size(self) -> int:
        """How many devices take part in one group."""
        return len(self.group)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in one call, on a ring of g devices (Chan et al., 2007).

        An all-gather, a reduce-scatter and an all-to-all send (g - 1)/g of `bytes`, an
        all-reduce, which is a reduce-scatter and an all-gather, twice that, and a permutation
        or a send all of it.
        """
        if self.kind in ONE_WAY:
            return float(self.bytes)
        each = (self.group_size - 1) / self.group_size * self.bytes
        return 2 * each if self.kind == "all-reduce" else each


def collectives(text: str) -> tuple[Collective, ...]:
    '''Finds what a compiled program communicates.

    An asynchronous collective is counted once, where it starts. Of a conditional the branch
    that moves most counts. A collective within a group of one device moves nothing and is
    left out.

    Args:
      text: ``compiled.as_text()``.

    Returns:
      One record for each collective in the program, in its order.

    Raises:
      AdapterError: if the text cannot be read.

    Example:
      >>> found = collectives("""HloModule sum, num_partitions=4
      ... ENTRY %main (x: f32[8,4]) -> f32[16,4] {
      ...   %x = f32[8,4]{1,0} parameter(0)
      ...   ROOT %all = f32[16,4]{1,0} all-gather(%x), replica_groups=[2,2]<=[4], dimensions={0}
      ... }""")
      >>> [(each.kind, each.bytes, each.times, each.group) for each in found]
      [('all-gather', 256, 1, (0, 1))]
    '''
    return collectives_of(parse(text))


def collectives_of(module: Module) -> tuple[Collective, ...]:
    """`collectives` of a text that was parsed."""

    def weigh(computation: Computation, step: Instruction) -> float:
        return sum(each.wire_bytes for each in _found(module, Run(computation, 1), step))

    followed = runs(module, weigh)
    for step in followed.unfollowed:
        _refuse_hidden(module, step)
    return tuple(each for run, step in followed.steps() for each in _found(module, run, step))


def table(found: Iterable[Collective]) -> Table:
    """Collectives by kind: how many calls, how many bytes; the kinds in order of `KINDS`.

    Example:
      >>> each = Collective("all-gather", (), 800, 3, (0, 1, 2, 3), "all-gather.1", "")
      >>> print(table([each]))
      kind        calls  bytes  wire bytes
      all-gather  3      2400   1800
    """
    calls: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    wire: dict[str, float] = {}
    for each in found:
        calls[each.kind] += each.times
        moved[each.kind] += each.times * each.bytes
        wire[each.kind] = wire.get(each.kind, 0.0) + each.times * each.wire_bytes
    return Table.of(
        {
            "kind": kind,
            "calls": calls[kind],
            "bytes": moved[kind],
            "wire bytes": round(wire[kind]),
        }
        for kind in KINDS
        if kind in calls
    )


def _refuse_hidden(module: Module, step: Instruction) -> None:
    for name in (name for group in step.called.values() for name in group):
        hidden = [i for i in module.computations[name].instructions.values() if _kind(i) in KINDS]
        if hidden:
            raise AdapterError(
                f"The collective %{hidden[0].name} is run by %{step.name}, a {step.opcode!r}, "
                "and how often is not known. Report it with the versions of jax and libtpu."
            )


def _found(module: Module, run: Run, step: Instruction) -> Iterator[Collective]:
    if step.opcode == "fusion":
        inside = module.computations[step.called["calls"][0]]
        if _counts(inside):
            for each in inside.instructions.values():
                yield from _found(module, run._replace(computation=inside), each)
    elif _kind(step) in KINDS and not _to_host(step):
        made = _collective(module, run, step)
        if made.group_size > 1:
            yield made


def _kind(step: Instruction) -> str:
    return step.opcode.removesuffix("-start")


def _to_host(step: Instruction) -> bool:
    return "is_host_transfer=true" in step.tail and "megascale" not in step.tail


def _counts(inside: Computation) -> bool:
    """Whether a fusion's collectives are not those of a chain that began before."""
    steps = inside.instructions.values()
    return begins(inside) or not any(is_chained(step) for step in steps)


def _collective(module: Module, run: Run, step: Instruction) -> Collective:
    kind = _kind(step)
    shapes = tuple(shape for made in run.computation.operands(step) for shape in made.shapes)
    if kind == "send":
        shapes = shapes[:-1]  # the last is the token
    if kind == "all-gather":
        started = step.opcode.endswith("-start")  # gives its operands, then its results
        shapes = step.shapes[len(shapes) : 2 * len(shapes)] if started else step.shapes
    if kind == "all-reduce" and _scatters(run.computation, step):
        kind = "reduce-scatter"
    size = sum(shape.size for shape in shapes)
    group = _group(module, step)
    origin = step.op_name or _rendezvous(step)
    return Collective(kind, shapes, size, run.times, group, step.name, origin, run.exact)


def _rendezvous(step: Instruction) -> str:
    """Of a transfer between slices, the collective that it is a part of."""
    found = re.search(r'transfer_rendezvous="([^"]*)"', step.tail)
    return found[1] if found else ""


def _scatters(inside: Computation, step: Instruction) -> bool:
    """Whether of a sum each device keeps its own part only: a fusion that slices it."""
    result = inside.result
    if result.opcode != "dynamic-slice" or step.name not in result.operands:
        return False
    (whole,), (part,) = step.shapes, result.shapes
    return math.prod(part.dims) < math.prod(whole.dims)


def _group(module: Module, step: Instruction) -> tuple[int, ...]:
    if pairs := step.attributes.get("source_target_pairs"):
        return _first_cycle(pairs)
    if step.opcode == "send":
        return (0, 1)
    text = step.attributes.get("replica_groups", "")
    order = step.attributes.get("device_ids")
    return first_group(f"{text}, device_ids={order}" if order else text, module.devices)


def _first_cycle(text: str) -> tuple[int, ...]:
    """The devices that the first pair of a permutation leads through."""
    numbers = [int(n) for n in text.replace("{", "").replace("}", "").split(",") if n.strip()]
    follows = dict(zip(numbers[::2], numbers[1::2], strict=True))
    moving = [source for source, target in follows.items() if source != target]
    members = moving[:1]
    while members and (after := follows.get(members[-1])) is not None and after not in members:
        members.append(after)
    return tuple(members)
