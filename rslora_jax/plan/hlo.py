"""HLO: the text of a compiled program, `compiled.as_text()`, as instructions.

Read are the texts of XLA's CPU and TPU compilers. An instruction is one line::

    ROOT %dot.1 = f32[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, metadata={op_name="..."}
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from rslora_jax.paths import AdapterError
from rslora_jax.plan.shapes import Shape, read_shapes

__all__ = ["CALLS", "Computation", "Instruction", "Module", "parse"]

CALLS = (
    "calls",
    "to_apply",
    "condition",
    "body",
    "true_computation",
    "false_computation",
    "branch_computations",
    "called_computations",
)
"""The attributes that name other computations."""

HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
LINE = re.compile(r"\s+(ROOT )?%?(\S+) = ")
OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|[(\[{]|[)\]}]|,|[^"()\[\]{},]+')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name, without the percent sign.
      opcode: such as ``"dot"``.
      shapes: its results; a tuple, nested or not, as its leaves.
      operands: the names of its operands.
      inner: the text between the parentheses, for a literal or a parameter's number.
      tail: the text of its attributes.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inner: str
    tail: str

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """The attributes by name, as text."""
        pairs = (part.partition("=") for part in _split(self.tail))
        return {name.strip(): value.strip() for name, sign, value in pairs if sign}

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """The computations it names, by attribute."""
        found = {name: self.attributes[name] for name in CALLS if name in self.attributes}
        return {k: tuple(re.findall(r"[^\s%{},]+", text)) for k, text in found.items()}

    @property
    def op_name(self) -> str:
        """Where in the user's program it comes from, such as ``jit(step)/q_proj/dot_general``."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return found[1].replace("\\'", "'") if found else ""


class Computation(NamedTuple):
    """Instructions in the order in which they run, by name, and the name of the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @property
    def result(self) -> Instruction:
        """The instruction that the computation returns."""
        return self.instructions[self.root]

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The instructions that make the operands."""
        return tuple(self.instructions[name] for name in instruction.operands)


class Module(NamedTuple):
    """A program: its computations by name, the one that is called and the number of devices."""

    name: str
    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Module:
    """Reads the text of a compiled program.

    Args:
      text: ``compiled.as_text()`` of `jax.jit(f).lower(...).compile()`.

    Returns:
      The program.

    Raises:
      AdapterError: if the text is no HLO module, or a line of it cannot be read.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> text = jax.jit(jnp.dot).lower(jnp.ones((8, 4)), jnp.ones((4, 2))).compile().as_text()
      >>> module = parse(text)
      >>> str(module.computations[module.entry].result.shapes[0])
      'f32[8,2]'
    """
    lines = enumerate(text.splitlines(), 1)
    header = next((line for _, line in lines if line.strip()), "")
    if not header.startswith("HloModule "):
        raise AdapterError(
            f"The text was read as HLO, which begins with 'HloModule', found {header[:60]!r}. "
            "Pass `compiled.as_text()`."
        )
    name = header.split()[1].rstrip(",")
    found = {}
    entry = ""
    for number, line in lines:
        if line[:1] in {"%", "E"} and (opened := HEADER.fullmatch(line.rstrip())):
            found[opened[2]] = _computation(opened[2], lines, number)
            entry = opened[2] if opened[1] else entry
    if not entry:
        raise AdapterError(
            f"The HLO module {name!r} has {len(found)} computations and no ENTRY: "
            "the text is cut off. Pass the whole of `compiled.as_text()`."
        )
    counts = (re.search(rf"\b{kind}=(\d+)", header) for kind in ("num_partitions", "replica_count"))
    return Module(name, found, entry, math.prod(int(n[1]) for n in counts if n))


def _computation(name: str, lines: Iterator[tuple[int, str]], start: int) -> Computation:
    instructions: dict[str, Instruction] = {}
    root, number = "", start
    for at, line in lines:
        number = at
        if line.startswith("}"):
            break
        if not line.strip():
            continue
        started = LINE.match(line)
        if not started:
            raise AdapterError(
                f"Line {number} of the HLO, in %{name}, is no instruction: {line.strip()[:120]!r}. "
                "Report it with the versions of jax and libtpu."
            )
        whole = line
        while " constant(" in whole and whole.count("(") > whole.count(")"):
            whole += next(lines, (0, ")"))[1].strip()  # a matrix is printed on several lines
        made = _instruction(started[2], whole[started.end() :], number)
        instructions[made.name] = made
        root = made.name if started[1] else root
    return Computation(name, instructions, root or _last(instructions, name, number))


def _last(instructions: dict[str, Instruction], name: str, number: int) -> str:
    if not instructions:
        raise AdapterError(f"The computation %{name} ends empty at line {number} of the HLO.")
    return next(reversed(instructions))


def _instruction(name: str, rest: str, number: int) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    opcode = OPCODE.match(rest, end)
    if not opcode:
        raise AdapterError(
            f"Line {number} of the HLO has no operation after the shape of %{name}: "
            f"{rest[:120]!r}. Report it with the versions of jax and libtpu."
        )
    close = _closing(rest, opcode.end() - 1)
    inner = rest[opcode.end() : close - 1]
    operands = () if opcode[1] == "constant" else tuple(re.findall(r"%([^\s,()]+)", inner))
    shapes = read_shapes(rest[:end])
    return Instruction(name, opcode[1], shapes, operands, inner, rest[close:].lstrip(", "))


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.end()
    return len(text)


def _split(text: str) -> Iterator[str]:
    """The parts between the commas that no bracket or string encloses."""
    depth, parts = 0, []
    for found in PARTS.finditer(text):
        part = found[0]
        depth += (part in "([{") - (part in ")]}")
        if part == "," and not depth:
            yield "".join(parts)
            parts = []
        else:
            parts.append(part)
    yield "".join(parts)
