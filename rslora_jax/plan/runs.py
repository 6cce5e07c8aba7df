"""Runs: how often each computation of a program runs in one call of it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from rslora_jax.plan.hlo import Computation, Instruction, Module
from rslora_jax.plan.loops import Scope, enter, trip_count

__all__ = ["Run", "Runs", "runs"]

INLINE = frozenset(
    {
        "fusion",  # one step, whatever is inside
        "reduce",
        "reduce-window",
        "scatter",
        "select-and-scatter",
        "sort",
        "map",
        "all-reduce",
        "all-reduce-start",
        "reduce-scatter",
        "custom-call",
        "async-update",  # its start was followed
        "async-done",
    }
)
"""What calls a computation for each element or hides it: one step of its own."""

Weigh = Callable[[Computation, Instruction], float]


class Run(NamedTuple):
    """A computation and how often it runs.

    Attributes:
      computation: the computation.
      times: its runs in one call of the program.
      exact: False inside a loop whose count depends on data, which is taken as one round.
    """

    computation: Computation
    times: int
    exact: bool = True


class Runs(NamedTuple):
    """What runs how often.

    Attributes:
      runs: the computations whose instructions are steps of the program; a computation that is
        called from two places is here twice.
      unfollowed: instructions that call computations in a way that is not known, which are
        left out.
    """

    runs: tuple[Run, ...]
    unfollowed: tuple[Instruction, ...]

    def steps(self) -> Iterator[tuple[Run, Instruction]]:
        """Every step, with the run of its computation."""
        for run in self.runs:
            for step in run.computation.instructions.values():
                yield run, step


def runs(module: Module, weigh: Weigh) -> Runs:
    """Finds how often each computation runs: nested loops multiply.

    Args:
      module: the program.
      weigh: the weight of a step; of a conditional the heaviest branch runs.

    Returns:
      The runs, and what could not be followed.

    Example:
      >>> import jax
      >>> from rslora_jax.plan.hlo import parse
      >>> f = lambda x: jax.lax.fori_loop(0, 7, lambda i, x: x * 2 + i, x)
      >>> module = parse(jax.jit(f).lower(1.0).compile().as_text())
      >>> max(run.times for run in runs(module, lambda computation, step: 1.0).runs)
      8
    """
    unfollowed: dict[str, Instruction] = {}
    entry = Run(module.computations[module.entry], 1)
    found = _follow(module, Scope(entry.computation), entry, weigh, unfollowed)
    return Runs(tuple(found), tuple(unfollowed.values()))


def _follow(
    module: Module, scope: Scope, here: Run, weigh: Weigh, unfollowed: dict[str, Instruction]
) -> list[Run]:
    found = [here]

    def run(step: Instruction, name: str, rounds: int | None = 1) -> list[Run]:
        inner = enter(module, scope, step, name)
        times = here.times * (1 if rounds is None else rounds)
        there = Run(inner.computation, times, here.exact and rounds is not None)
        return _follow(module, inner, there, weigh, unfollowed)

    for step in scope.computation.instructions.values():
        names = step.called if "=%" in step.tail or "={%" in step.tail else {}
        every = [name for group in names.values() for name in group]
        if step.opcode == "while":
            rounds = trip_count(module, scope, step)
            found += run(step, names["body"][0], rounds)
            found += run(step, names["condition"][0], rounds and rounds + 1)
        elif step.opcode == "conditional":
            branches = [run(step, name) for name in every]
            found += max(branches, key=lambda branch: _weight(branch, weigh))
        elif step.opcode in {"call", "async-start"}:
            found += [each for name in every for each in run(step, name)]
        elif every and step.opcode not in INLINE:
            unfollowed[step.name] = step
    return found


def _weight(branch: list[Run], weigh: Weigh) -> float:
    return sum(
        run.times * weigh(run.computation, step)
        for run in branch
        for step in run.computation.instructions.values()
    )
