"""Traffic: the bytes that the steps of a compiled program read from and write to main memory.

What a fusion computes on the way stays on the chip. Arrays in another memory than the main one
(S(1), the VMEM of a TPU, that the compiler places arrays in) are no traffic.
"""

import itertools
import re
from collections.abc import Callable, Iterator

from rslora_jax.plan.chains import begins, is_chained, is_link
from rslora_jax.plan.hlo import Computation, Instruction, Module
from rslora_jax.plan.shapes import Shape

__all__ = ["FREE", "traffic"]

FREE = frozenset(
    {
        "add-dependency",
        "after-all",
        "async-done",
        "async-start",  # what it runs is counted
        "async-update",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "get-tuple-element",
        "opt-barrier",
        "optimization-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
        "while",
    }
)
"""Steps that move nothing themselves."""

ALIASES = frozenset({"AllocateBuffer", "ConcatBitcast", "Sharding", "AssumeGatherIndicesInBound"})
SLICES = frozenset({"dynamic-slice", "slice", "gather"})
VIEWS = frozenset({"bitcast", "reshape", "get-tuple-element"})


def traffic(module: Module, computation: Computation, step: Instruction) -> float:
    """Bytes of one run of a step: its operands and its results, with their padding.

    A slice reads what it takes, also where a fusion does nothing else with an operand (the
    layer's weights in a scan). An update in place reads and writes what it updates.

    Args:
      module: the program.
      computation: the computation that holds the step.
      step: the step.

    Returns:
      Bytes on one device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rslora_jax.plan.hlo import parse
      >>> text = jax.jit(jnp.dot).lower(jnp.ones((8, 4)), jnp.ones((4, 2))).compile().as_text()
      >>> module = parse(text)
      >>> main = module.computations[module.entry]
      >>> sum(traffic(module, main, step) for step in main.instructions.values())
      224.0
    """
    if step.opcode in FREE or step.opcode.endswith("-done") or _aliases(step):
        return 0.0
    if step.opcode == "fusion":
        return _fusion(module, computation, step)
    operands = computation.operands(step)
    if step.opcode in PARTLY:
        return PARTLY[step.opcode](step, operands)
    if step.opcode.endswith("-start"):
        return _started(step, operands)
    return float(_size(*step.shapes) + sum(_size(*made.shapes) for made in operands))


def _size(*shapes: Shape) -> int:
    return sum(shape.allocated for shape in shapes if shape.space == 0)


def _aliases(step: Instruction) -> bool:
    target = re.search(r'custom_call_target="([^"]*)"', step.tail)
    return bool(target) and target[1] in ALIASES


def _share(whole: Instruction, part: tuple[Shape, ...]) -> int:
    """The bytes of a part of an array, which lies where the array lies."""
    return sum(shape.allocated for shape in part) if whole.shapes[0].space == 0 else 0


def _slice(step: Instruction, operands: tuple[Instruction, ...]) -> float:
    taken = step.shapes[1:2] if step.opcode == "slice-start" else step.shapes
    indices = sum(_size(*made.shapes) for made in operands[1:])
    return float(_share(operands[0], taken) + _size(*taken) + indices)


def _scatter(step: Instruction, operands: tuple[Instruction, ...]) -> float:
    """Half of what is not the indices is the arrays, half the updates to them."""
    count = len(step.shapes)
    arrays, rest = operands[:count], operands[count:]
    changed = sum(
        2 * _share(array, update.shapes) for array, update in zip(arrays, rest[1:], strict=True)
    )
    return float(changed + sum(_size(*made.shapes) for made in rest))


def _update(step: Instruction, operands: tuple[Instruction, ...]) -> float:
    return 2.0 * _share(operands[0], operands[1].shapes)


PARTLY: dict[str, Callable[[Instruction, tuple[Instruction, ...]], float]] = {
    **dict.fromkeys((*SLICES, "slice-start"), _slice),
    "dynamic-update-slice": _update,
    "scatter": _scatter,
}


def _started(step: Instruction, operands: tuple[Instruction, ...]) -> float:
    """Reads its operands; its tuple names operands, results and what keeps track of them."""
    sources = [shape for made in operands for shape in made.shapes]
    results = list(step.shapes)
    if len(results) > len(sources):
        for shape in sources:
            if shape in results:
                results.remove(shape)
    return float(_size(*sources, *results))


def _fusion(module: Module, computation: Computation, step: Instruction) -> float:
    inside = module.computations[step.called["calls"][0]]
    made = _written(module, inside, inside.result, step.shapes)
    places = {int(each.inner): each for each in inside.instructions.values() if _is_param(each)}
    read = 0
    for place, operand in enumerate(computation.operands(step)):
        if place in places and _size(*operand.shapes):
            read += min(_size(*operand.shapes), _read(module, inside, places[place]))
    return float(made + read)


def _is_param(step: Instruction) -> bool:
    return step.opcode == "parameter"


def _written(
    module: Module, inside: Computation, result: Instruction, shapes: tuple[Shape, ...]
) -> int:
    """Bytes that a fusion writes: of an update in place, the update; what it hands on, nothing."""
    if result.opcode == "tuple":
        rest = iter(shapes)
        return sum(
            _written(module, inside, part, tuple(itertools.islice(rest, len(part.shapes))))
            for part in inside.operands(result)
        )
    if is_link(result):
        # The first link lists its operand again, then what the whole chain fills.
        return _size(*shapes[1:2]) if begins(inside) and not is_chained(result) else 0
    made = result
    while made.opcode in VIEWS:
        made = inside.operands(made)[0]
    if _is_param(made):
        return 0 if result is not inside.result else _size(*shapes)
    if made.opcode == "dynamic-update-slice" and _size(*shapes):
        return sum(shape.allocated for shape in inside.operands(made)[1].shapes)
    if made.opcode == "fusion":
        nested = module.computations[made.called["calls"][0]]
        return _written(module, nested, nested.result, shapes)
    return _size(*shapes)


def _read(module: Module, inside: Computation, value: Instruction) -> int:
    """Bytes that a fusion reads of one of its parameters, or of a view of it."""
    whole = sum(shape.allocated for shape in value.shapes)
    read = 0
    for use in _uses(inside, value):
        read += _read_by(module, inside, value, use, whole)
    return min(read, whole)


def _read_by(
    module: Module, inside: Computation, value: Instruction, use: Instruction, whole: int
) -> int:
    first = use.operands[0] == value.name
    if use.opcode == "tuple" or (is_link(use) and not begins(inside)):
        return 0  # handed on
    if use.opcode in VIEWS:
        return _read(module, inside, use)
    if use.opcode in SLICES and first:
        return sum(shape.allocated for shape in use.shapes)
    if use.opcode == "dynamic-update-slice" and first:
        return 0  # what is updated is overwritten
    if use.opcode == "fusion":
        nested = module.computations[use.called["calls"][0]]
        inner = [
            each
            for each in nested.instructions.values()
            if _is_param(each) and use.operands[int(each.inner)] == value.name
        ]
        return sum(_read(module, nested, each) for each in inner)
    return whole


def _uses(inside: Computation, value: Instruction) -> Iterator[Instruction]:
    for each in inside.instructions.values():
        if value.name in each.operands:
            yield each
