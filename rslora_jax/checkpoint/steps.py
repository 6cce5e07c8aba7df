"""Steps: one complete state of a training run, as the items of an Orbax folder.

The folder is a checkpoint of adapters, as `adapters.save` writes it, and holds two items more:
the arrays of the rest (``state``) and the notes of all its leaves (``run``).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rslora_jax.checkpoint import leaves
from rslora_jax.checkpoint.adapters import restore
from rslora_jax.checkpoint.containers import decode, encode
from rslora_jax.checkpoint.fingerprint import Fingerprint, fingerprint
from rslora_jax.checkpoint.fit import listed
from rslora_jax.checkpoint.plain import checksum
from rslora_jax.checkpoint.processes import same, storable, together
from rslora_jax.checkpoint.records import Record
from rslora_jax.checkpoint.storage import ARRAYS, RECORD, line, load, read_record
from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError, Flat, flatten, unflatten

__all__ = ["RunState", "check_state", "items_of", "read_step", "score"]

PyTree = Any

STATE, RUN = "state", "run"


class RunState(NamedTuple):
    """All that a training run needs to go on.

    Attributes:
      lora: the adapter tree, ``params.lora``; the base is never saved.
      opt_state: the optimizer's state.
      step: how many steps were done; an int or a scalar array.
      key: the typed PRNG key of the next step.
      data: where the run is in its data, and anything else that is to be exact after a resume,
        such as the losses so far: nested dicts, lists and tuples of arrays, numbers, text, bytes
        (the state of a data iterator) and None. Sizes may change from step to step.
    """

    lora: PyTree
    opt_state: PyTree
    step: Any
    key: Any
    data: PyTree = None


def check_state(state: Any, what: str) -> None:
    """Refuses what is no `RunState` of an adapter tree; `what` names the argument."""
    if not isinstance(state, RunState):
        raise AdapterError(f"{what} must be a RunState, found {type(state).__name__}.")
    if isinstance(state.lora, LoraParams):
        raise AdapterError(
            f"{what}.lora must be the adapter tree, found the LoraParams with the base. Pass "
            "params.lora: the base does not change, and is not saved."
        )


def items_of(
    state: RunState, factors: Mapping[str, Any], record: Record, metrics: Mapping[str, float]
) -> Any:
    """What Orbax is to write: the factors and their record, the other arrays, the notes.

    Args:
      state: the state.
      factors: its factors, by path.
      record: what travels with them.
      metrics: numbers to keep with the step.

    Returns:
      An `orbax.checkpoint.args.Composite`.
    """
    import orbax.checkpoint as ocp  # noqa: PLC0415  (0.9 s to import)

    flat, found = _rest(state), list[Any]()
    data = encode(state.data, found)
    names = [*flat.paths, *(f"data/{place}" for place in range(len(found)))]
    notes, arrays = leaves.pack(names, [*flat.leaves, *found])
    content = _content(arrays, notes).to_dict()
    run = {"notes": notes, "data": data, "metrics": dict(metrics), "arrays": content}
    alike = {name: part for name, part in run.items() if name != "metrics"}  # a time may differ
    same(checksum({**alike, "record": record.to_dict()}), "state")
    items = {
        ARRAYS: ocp.args.PyTreeSave(storable(factors)),
        RECORD: ocp.args.JsonSave(record.to_dict()),
        RUN: ocp.args.JsonSave({**run, "checksum": checksum(run)}),
    }
    if arrays:  # Orbax writes no empty items
        items[STATE] = ocp.args.PyTreeSave(arrays)
    return ocp.args.Composite(**items)


def read_step(folder: Path, record: Record, like: RunState) -> RunState:
    """Reads a step, and checks all of it.

    Args:
      folder: the folder of the step.
      record: what the caller has: config, sites and base.
      like: gives the structure and the shardings.

    Returns:
      The state that was saved.

    Raises:
      AdapterError: if it is damaged or does not fit.
    """
    check_state(like, "like")
    restored = restore(folder, like.lora, sites=record.sites, base=record.base)
    with together():
        _check_config(read_record(folder), record)
        run, flat = _notes(folder), _rest(like)
    count = sum(not note["path"].startswith("data/") for note in run["notes"])
    leaves.check_like(run["notes"][:count], flat.paths, flat.leaves)
    guides = [*flat.leaves, *_guides(like.data, len(run["notes"]) - count)]
    values = leaves.unpack(run["notes"], _arrays(folder, run, guides), guides)
    data = decode(run["data"], values[count:], like.data)
    return RunState(restored.params, data=data, **unflatten(flat, values[:count]))


def score(folder: Path, metric: str) -> float:
    """A number that was kept with a step; NaN if there is none, or it cannot be read."""
    try:
        return _notes(folder)["metrics"].get(metric, math.nan)
    except AdapterError:  # damaged: it is kept as long as it is new, not for its score
        return math.nan


def _rest(state: RunState) -> Flat:
    return flatten({name: getattr(state, name) for name in ("opt_state", "step", "key")})


def _guides(data: PyTree, count: int) -> list[Any]:
    """Where the arrays of `data` shall lie, if there are as many as were saved."""
    found: list[Any] = []
    encode(data, found)
    return found if len(found) == count else [None] * count


def _notes(folder: Path) -> dict[str, Any]:
    try:
        run = json.loads((folder / RUN / "metadata").read_bytes())
        kept = {name: run[name] for name in ("notes", "data", "metrics", "arrays")}
        intact = run["checksum"] == checksum(kept)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise AdapterError(f"its notes ({RUN!r}) cannot be read: {line(error)}.") from error
    if not intact:
        raise AdapterError(f"its notes ({RUN!r}) are damaged: their checksum does not fit.")
    return kept


def _arrays(folder: Path, run: Mapping[str, Any], guides: list[Any]) -> dict[str, Any]:
    """The arrays of the item ``state``, checked against the fingerprint in the notes."""
    with together():
        structs = leaves.targets(run["notes"], guides)
        try:
            arrays = load(folder / STATE, structs) if structs else {}
        except Exception as error:  # damaged files make Orbax and TensorStore raise all kinds
            said = f"it is damaged: its arrays cannot be read: {line(error)}"
            raise AdapterError(said) from error
    saved = Fingerprint.from_dict(run["arrays"])
    differences = saved.differences(_content(arrays, run["notes"]), ("notes", "arrays"))
    if differences:
        raise AdapterError(f"it is damaged: {listed(differences)}.")
    return arrays


def _content(arrays: Mapping[str, Any], notes: Sequence[Mapping[str, Any]]) -> Fingerprint:
    """The contents of the arrays by path; those of NumPy are in their notes."""
    named = {name: notes[int(name)] for name in arrays}
    hashed = [name for name, note in named.items() if "sha256" not in note]
    return fingerprint({named[name]["path"]: arrays[name] for name in hashed})


def _check_config(saved: Record, given: Record) -> None:
    left, right = saved.config.to_dict(), given.config.to_dict()
    different = [
        f"{name} {left[name]!r} in the checkpoint, {right[name]!r} in what was given"
        for name in left
        if left[name] != right.get(name)
    ]
    if different:
        raise AdapterError(
            f"it was saved with another config: {listed(different)}. Use the config of the run."
        )
