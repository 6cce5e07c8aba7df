"""Advice: other meshes, remat policies and batches, and the nearest that fits where a run does not.

What is tried is compiled, so the lists are short; what a batch must shrink to is first reckoned
from what the compiler said, then compiled to be sure.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from rslora_jax.paths import AdapterError
from rslora_jax.plan.layout import TENSOR, Layout
from rslora_jax.plan.report import Plan
from rslora_jax.plan.training import Run
from rslora_jax.tables import Table

__all__ = ["Advice", "Planner", "advise", "alternatives", "meshes", "nearest_fit", "ranking"]

Planner: TypeAlias = Callable[[str, Run], Plan]
"""``planner(what, run)`` compiles a run; `what` is said in the meantime."""

_Changes: TypeAlias = Iterator[tuple[str, Run]]

GIB = 2**30


class Advice(NamedTuple):
    """A run that was tried.

    Attributes:
      change: how it differs from what was asked.
      run: the run.
      plan: what the compiler said; None where it refused.
      refusal: what it said then.
    """

    change: str
    run: Run
    plan: Plan | None
    refusal: str = ""

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for it."""
        return self.plan is not None and self.plan.fits

    @property
    def seconds(self) -> float:
        """Roofline seconds for one sequence; infinite where there are none."""
        found = self.plan and self.plan.step_seconds
        return found / self.run.batch if found else float("inf")


def advise(run: Run, planner: Planner, most: int = 6) -> tuple[Advice, ...]:
    """Tries a run and its neighbours, and if none fits looks for the nearest that does.

    Args:
      run: what was asked for.
      planner: compiles a run.
      most: how many runs are compiled at most, and once more as many to find one that fits.

    Returns:
      What was tried, the best first: those that fit, by their roofline time for a sequence.

    Example:
      >>> from rslora_jax.plan.models import find_model
      >>> def planner(what, run):
      ...     seconds = {"compute": 3.0 if run.layout.remat == "full" else 2.0}
      ...     return Plan("LoRA", "v5e:2x2", 1, run.mesh, True, 8, 16, {}, seconds=seconds)
      >>> tried = advise(Run(find_model("smollm2-360m"), {"fsdp": 4}, 8, 2048), planner)
      >>> [one.change for one in tried]
      ['remat dots', 'remat none', 'as asked']
    """
    tried = [_tried(change, other, planner) for change, other in alternatives(run)[:most]]
    if not any(one.fits for one in tried):
        asked = tried[0].plan
        tried += _until_fit(run, asked, tried, planner, most) if asked is not None else []
    return tuple(sorted(tried, key=_rank))


def nearest_fit(run: Run, plan: Plan, planner: Planner, most: int = 6) -> Advice | None:
    """The smallest change of remat policy, mesh, batch or sequence that makes a run fit.

    Args:
      run: a run that does not fit.
      plan: what the compiler said of it.
      planner: compiles a run.
      most: how many runs are compiled at most.

    Returns:
      The first that fits; None if none of those tried does.

    Example:
      >>> from rslora_jax.plan.models import find_model
      >>> def planner(what, run):
      ...     fits = run.batch <= 16
      ...     return Plan("LoRA", "v5e:2x2", 1, run.mesh, fits, run.batch, 16, {})
      >>> run = Run(find_model("smollm2-360m"), {"fsdp": 4}, 32, 2048)
      >>> nearest_fit(run, planner("as asked", run), planner).change
      'batch 16'
    """
    tried = _until_fit(run, plan, [Advice("as asked", run, plan)], planner, most)
    return tried[-1] if tried and tried[-1].fits else None


def alternatives(run: Run, others: int = 3) -> list[tuple[str, Run]]:
    """The run itself, the nearest other meshes, and the other remat policies."""
    found = [("as asked", run)]
    for mesh in meshes(run)[:others]:
        found.extend(_changed(f"mesh {written(mesh)}", run, mesh=mesh))
    for remat in ("full", "dots", "none"):
        if remat != run.layout.remat:
            found.append((f"remat {remat}", _with_layout(run, remat=remat)))
    return found


def meshes(run: Run) -> list[dict[str, int]]:
    """Other splits of the same devices into fsdp and tensor, the nearest first.

    Only what the batch and the heads divide into is listed. Copies of the weights along a data
    axis cost memory and no split of them does, so its devices are split too; others stay.

    Example:
      >>> from rslora_jax.plan.models import find_model
      >>> run = Run(find_model("llama-3.1-8b"), {"fsdp": 32, "tensor": 8}, 256, 2048)
      >>> meshes(run)[:2]
      [{'fsdp': 64, 'tensor': 4}, {'fsdp': 16, 'tensor': 16}]
    """
    now = run.mesh.get(TENSOR, 1)
    devices = _least_batch(run) * now
    sizes = [2**k for k in range(devices.bit_length()) if devices % 2**k == 0]
    sizes.sort(key=lambda size: abs(size.bit_length() - now.bit_length()))
    kept = {axis: size for axis, size in run.mesh.items() if axis != "data" or size == 1}
    found = [_split(kept, devices // size, size) for size in sizes]
    asked = _split(run.mesh, run.mesh.get("fsdp", 1), now)
    return [mesh for mesh in found if mesh != asked and _goes(run, mesh)]


def ranking(tried: Sequence[Advice]) -> Table:
    """What was tried as a table, in the order given."""
    return Table.of(_row(one) for one in tried)


def written(mesh: Mapping[str, int]) -> str:
    """A mesh as the command line takes it.

    Example:
      >>> written({"fsdp": 32, "tensor": 8})
      'fsdp=32,tensor=8'
    """
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def _until_fit(
    run: Run, plan: Plan, known: Sequence[Advice], planner: Planner, most: int
) -> list[Advice]:
    """Tries changes, the least first, until one fits."""
    tried, note = list[Advice](), ""
    for stage in (_remats, _meshes, _batches, _lengths):
        for change, smaller in stage(run, plan):
            if smaller in [one.run for one in known]:
                continue
            tried.append(_tried(change + note, smaller, planner))
            if tried[-1].fits or len(tried) == most:
                return tried
        if stage is _remats and run.layout.remat != "full":  # the others change that run further
            run, note = _with_layout(run, remat="full"), ", remat full"
            plan = next((one.plan for one in (*known, *tried) if one.run == run), None) or plan
    return tried


def _remats(run: Run, plan: Plan) -> _Changes:
    for remat in ("dots", "full"):  # each keeps less than the one before
        if run.layout.remat not in (remat, "full"):
            yield f"remat {remat}", _with_layout(run, remat=remat)


def _meshes(run: Run, plan: Plan) -> _Changes:
    for mesh in meshes(run)[:2]:
        yield from _changed(f"mesh {written(mesh)}", run, mesh=mesh)


def _batches(run: Run, plan: Plan) -> _Changes:
    """The largest batch that can suffice by what the compiler said, then halves of it."""
    fixed, least = sum(plan.arguments.values()), _least_batch(run)
    most = (plan.have - fixed) * run.batch // max(1, plan.need - fixed)
    parts = max(1, min(most, run.batch - 1) // least)
    while parts and parts * least < run.batch:
        yield from _changed(f"batch {parts * least}", run, batch=parts * least)
        parts //= 2


def _lengths(run: Run, plan: Plan) -> _Changes:
    batch = _least_batch(run)
    for length in (run.length // 2, run.length // 4):
        yield from _changed(f"batch {batch}, length {length}", run, batch=batch, length=length)


def _changed(change: str, run: Run, **changes: object) -> list[tuple[str, Run]]:
    """A run with changes; nothing where its mesh does not divide them."""
    try:
        return [(change, dataclasses.replace(run, **changes))]  # pyright: ignore[reportArgumentType]
    except AdapterError:
        return []


def _split(mesh: Mapping[str, int], fsdp: int, tensor: int) -> dict[str, int]:
    """A mesh with other sizes; a tensor axis of one device is written only if it was."""
    tensors = {TENSOR: tensor} if tensor > 1 or TENSOR in mesh else {}
    first = {} if "fsdp" in mesh else {"fsdp": fsdp}  # the neighbours are along the last axes
    return {**first, **mesh, "fsdp": fsdp, **tensors}


def _least_batch(run: Run) -> int:
    return run.mesh.get("data", 1) * run.mesh.get("fsdp", 1)


def _goes(run: Run, mesh: Mapping[str, int]) -> bool:
    return run.model.heads % mesh.get(TENSOR, 1) == 0 and run.batch % mesh["fsdp"] == 0


def _with_layout(run: Run, **changes: object) -> Run:
    layout: Layout = dataclasses.replace(run.layout, **changes)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(run, layout=layout)


def _tried(change: str, run: Run, planner: Planner) -> Advice:
    try:
        return Advice(change, run, planner(change, run))
    except AdapterError as error:  # one that cannot be compiled must not cost the others
        return Advice(change, run, None, str(error))


def _rank(one: Advice) -> tuple[bool, bool, float, float]:
    need = float(one.plan.need) if one.plan else float("inf")
    return not one.fits, one.plan is None, one.seconds, need


def _row(one: Advice) -> dict[str, object]:
    if one.plan is None:
        return {"change": one.change, "fits": f"refused: {one.refusal}"}
    return {
        "change": one.change,
        "fits": "yes" if one.plan.fits else "no",
        "peak GiB": one.plan.need / GIB,
        "spare GiB": one.plan.spare / GIB,
        "step ms": one.plan.step_seconds and 1e3 * one.plan.step_seconds,
        "bound": one.plan.bound,
        "ms a sequence": 1e3 * one.seconds if one.plan.step_seconds else None,
    }
