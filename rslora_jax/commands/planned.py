"""Planned: what `rslora plan` prints and writes of its plans."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.files import whole_file
from rslora_jax.paths import AdapterError
from rslora_jax.plan.advice import Advice, written
from rslora_jax.plan.report import Plan, compare
from rslora_jax.plan.training import Run
from rslora_jax.tables import Table, cell
from rslora_jax.terminal import show

__all__ = ["change", "check_target", "print_plans", "write_plans"]

GIB = 2**30
ORDER = ("fits", "peak GiB", "spare GiB", "base GiB", "lora GiB", "optimizer GiB", "batch GiB")
SHARED = ("step", "topology", "mesh", "dx GiB")  # the title's, the header's, and one vector


def print_plans(run: Run, plans: Sequence[Plan]) -> None:
    """Prints plans side by side, what they come to, and their collectives by kind."""
    first = plans[0]
    slices = f"{first.num_slices} x " if first.num_slices > 1 else ""
    title = f"{run.model.name} on {slices}{first.topology} as {written(run.mesh)}, for each device"
    show(_beside(plans), title, "\n".join(map(_verdict, plans)))
    traffic = _traffic(plans)
    if traffic.rows:
        show(traffic, "Collectives of a step: how many / GB that a device sends")
    unknown = dict.fromkeys(what for one in plans for what in one.unknown)
    if unknown:
        print(f"Not counted: {'; '.join(unknown)}.\n")


def _beside(plans: Sequence[Plan]) -> Table:
    """One column for each plan, one row for each figure."""
    table = compare(plans)
    known = [name for name in ORDER if name in table.columns]
    names = known + [name for name in table.columns if name not in (*SHARED, *known)]
    rows = [(name, *_figures(name, table.column(name), plans)) for name in names]
    kept = [row for row in rows if any(value is not None for value in row[1:])]
    return Table(("", *table.column("step")), tuple(kept))


def _figures(name: str, column: Sequence[Any], plans: Sequence[Plan]) -> list[Any]:
    """A column of `compare`; seconds that nobody waited for now are marked."""
    if name != "compile s":
        return list(column)
    return [
        f"{cell(value)} (an earlier answer, kept)" if one.cached and value is not None else value
        for value, one in zip(column, plans, strict=True)
    ]


def _verdict(one: Plan) -> str:
    need, have, left = (f"{size / GIB:.2f}" for size in (one.need, one.have, abs(one.spare)))
    if one.fits:
        return f"{one.name} fits: it needs {need} of {have} GiB and leaves {left}."
    return (
        f"{one.name} does not fit: it needs {need} GiB and has {have}, which is {left} too few. "
        "--advise looks for the nearest change that fits."
    )


def _traffic(plans: Sequence[Plan]) -> Table:
    kinds = dict.fromkeys(each.kind for one in plans for each in one.collectives)
    return Table.of(
        {"kind": kind} | {one.name: _sent(one, kind) for one in plans} for kind in kinds
    )


def _sent(one: Plan, kind: str) -> str:
    found = [each for each in one.collectives if each.kind == kind]
    sent = sum(each.wire_bytes for each in found) / 1e9
    return f"{sum(each.count for each in found)} / {sent:.3g}" if found else ""


def change(found: Advice | None) -> str:
    """What `nearest_fit` found, as a sentence."""
    if found is None or found.plan is None:
        return "no change that was tried fits. Take a larger slice, or more of them."
    return f"the nearest change that fits is {found.change}: {found.plan.need / GIB:.2f} GiB."


def check_target(file: Path) -> None:
    """Makes the folder of the file to be written, or says why it cannot be.

    Raises:
      AdapterError: if it is a folder, or its own folder cannot be made or written to.
    """
    if file.is_dir():
        raise AdapterError(
            f"--json is the file to write, and {file} is a folder. Name a file in it."
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(
            f"--json is {file}, but its folder cannot be made: {error.strerror}. Name another file."
        ) from error
    if not os.access(file.parent, os.W_OK):
        raise AdapterError(f"--json is {file}, but its folder is read-only. Name another file.")


def write_plans(
    file: Path, run: Run, plans: Iterable[Plan], tried: Mapping[str, Sequence[Advice]]
) -> None:
    """Writes plans, and what was tried for each by its name, as JSON."""
    told: dict[str, Any] = {
        "model": run.model.name,
        "parameters": run.model.parameters,
        "source": run.model.source,
        "batch": run.batch,
        "length": run.length,
        "remat": run.layout.remat,
        "plans": [one.to_dict() for one in plans],
    }
    told["advice"] = {
        name: [
            {"change": one.change, "refusal": one.refusal, "plan": one.plan and one.plan.to_dict()}
            for one in found
        ]
        for name, found in tried.items()
    }
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(told, indent=2) + "\n")
    print(f"written: {file}")
