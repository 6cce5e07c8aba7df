"""Loops: how often the body of a `while` runs, read off the compiled program.

The CPU compiler writes the count beside the loop. The TPU compiler does not, so the integers
that the condition depends on are computed step by step, as the program would. A loop whose
integers depend on data has no count.
"""

import dataclasses
import operator
import re
from collections.abc import Callable

from rslora_jax.plan.hlo import Computation, Instruction, Module

__all__ = ["Scope", "enter", "trip_count"]

LIMIT = 65536
"""Loops that run longer are not followed."""

BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
SAME = frozenset(
    {"copy", "bitcast", "convert", "reshape", "broadcast", "optimization-barrier", "copy-done"}
)
KNOWN = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation as it was reached: what its parameters stand for.

    Attributes:
      computation: the computation.
      caller: the instruction that runs it, None for the program's entry.
      outer: the scope of the caller.
      state: of a loop that is being followed, its integers by their place in the tuple.
      body: of a loop, its body, which tells what stays the same in every round.
    """

    computation: Computation
    caller: Instruction | None = None
    outer: "Scope | None" = None
    state: dict[int, int | None] | None = None
    body: Computation | None = None


def enter(module: Module, scope: Scope, caller: Instruction, name: str) -> Scope:
    """The scope of the computation `name` that `caller` runs."""
    body = module.computations[name] if caller.opcode == "while" else None
    return Scope(module.computations[name], caller, scope, None, body)


def trip_count(module: Module, scope: Scope, loop: Instruction) -> int | None:
    '''How often the body of a `while` runs; None where that depends on data.

    Args:
      module: the program.
      scope: the computation that holds the loop.
      loop: the loop.

    Example:
      >>> from rslora_jax.plan.hlo import parse
      >>> text = """HloModule every_other
      ... %body (p: (s32[])) -> (s32[]) {
      ...   %p = (s32[]) parameter(0)
      ...   %i = s32[] get-tuple-element(%p), index=0
      ...   %two = s32[] constant(2)
      ...   %next = s32[] add(%i, %two)
      ...   ROOT %out = (s32[]) tuple(%next)
      ... }
      ... %test (q: (s32[])) -> pred[] {
      ...   %q = (s32[]) parameter(0)
      ...   %j = s32[] get-tuple-element(%q), index=0
      ...   %seven = s32[] constant(7)
      ...   ROOT %less = pred[] compare(%j, %seven), direction=LT
      ... }
      ... ENTRY %main () -> (s32[]) {
      ...   %zero = s32[] constant(0)
      ...   %start = (s32[]) tuple(%zero)
      ...   ROOT %loop = (s32[]) while(%start), condition=%test, body=%body
      ... }"""
      >>> module = parse(text)
      >>> main = module.computations["main"]
      >>> trip_count(module, Scope(main), main.result)
      4
    '''
    written = KNOWN.search(loop.tail)
    if written:
        return int(written[1])
    parts = (module.computations[loop.called[part][0]] for part in ("condition", "body"))
    condition, body = parts
    state: dict[int, int | None] = {}
    test, turn = (Scope(part, loop, scope, state, body) for part in (condition, body))
    for count in range(LIMIT):
        goes_on = _value(module, test, condition.result)
        if goes_on is None:
            return None
        if not goes_on:
            return count
        _advance(module, turn, state)
    return None


def _advance(module: Module, turn: Scope, state: dict[int, int | None]) -> None:
    """One round: every integer that was asked for so far, and those that these depend on."""
    following: dict[int, int | None] = {}
    while rest := state.keys() - following.keys():
        for k in rest:
            following[k] = _element(module, turn, turn.computation.result, k)
    state.update(following)


def _value(module: Module, scope: Scope, made: Instruction) -> int | None:
    """The integer that an instruction gives, None where it is no known integer."""
    if made.opcode == "constant":
        return _literal(made.inner)
    if made.opcode == "parameter":
        return _argument(module, scope, int(made.inner))
    if made.opcode == "fusion":
        inner = enter(module, scope, made, made.called["calls"][0])
        return _value(module, inner, inner.computation.result)
    operands = scope.computation.operands(made)
    if made.opcode == "get-tuple-element":
        return _element(module, scope, operands[0], int(made.attributes["index"]))
    if made.opcode in SAME:
        return _value(module, scope, operands[0])
    return _computed(module, scope, made)


def _computed(module: Module, scope: Scope, made: Instruction) -> int | None:
    act = BINARY.get(made.opcode)
    if made.opcode == "compare":
        act = COMPARE[made.attributes["direction"]]
    if act is None:
        return None
    operands = scope.computation.operands(made)
    left, right = (_value(module, scope, operand) for operand in operands)
    return None if left is None or right is None else int(act(left, right))


def _element(module: Module, scope: Scope, made: Instruction, k: int) -> int | None:
    """The integer at place `k` of the tuple that an instruction gives."""
    if made.opcode == "parameter":
        return _loop_element(module, scope, k) if scope.body else None
    if made.opcode == "fusion":
        inner = enter(module, scope, made, made.called["calls"][0])
        return _element(module, inner, inner.computation.result, k)
    operands = scope.computation.operands(made)
    if made.opcode == "tuple":
        return _value(module, scope, operands[k])
    if made.opcode == "while" and _stays(module.computations[made.called["body"][0]], k):
        return _element(module, scope, operands[0], k)
    if made.opcode in SAME:
        return _element(module, scope, operands[0], k)
    return None


def _loop_element(module: Module, scope: Scope, k: int) -> int | None:
    assert scope.outer and scope.caller and scope.body
    if scope.state is not None and k in scope.state:
        return scope.state[k]
    first = scope.outer.computation.operands(scope.caller)[0]
    if _stays(scope.body, k):
        return _element(module, scope.outer, first, k)
    if scope.state is None:
        return None  # it changes from round to round of a loop around the one that is followed
    scope.state[k] = _element(module, scope.outer, first, k)
    return scope.state[k]


def _stays(body: Computation, k: int) -> bool:
    """Whether a loop hands place `k` of its tuple on unchanged."""
    if body.result.opcode != "tuple":
        return False
    made = body.operands(body.result)[k]
    while made.opcode in {"copy", "bitcast"}:
        made = body.operands(made)[0]
    if made.opcode != "get-tuple-element" or int(made.attributes["index"]) != k:
        return False
    return body.operands(made)[0].opcode == "parameter"


def _argument(module: Module, scope: Scope, place: int) -> int | None:
    if scope.caller is None or scope.outer is None or scope.caller.opcode not in {"fusion", "call"}:
        return None
    return _value(module, scope.outer, scope.outer.computation.operands(scope.caller)[place])


def _literal(text: str) -> int | None:
    text = text.strip("{} ")
    if text in {"true", "false"}:
        return int(text == "true")
    return int(text) if re.fullmatch(r"-?\d+", text) else None
