"""Storage: one Orbax folder of flat arrays and a JSON record, written whole and read warily.

The arrays are one flat dict from paths to arrays: Orbax joins the keys of nested dicts with
dots, so that ``{"a.b": {"c": x}}`` and ``{"a": {"b.c": y}}`` would overwrite one another.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.checkpoint.fingerprint import Leaf
from rslora_jax.checkpoint.processes import everyone, exchange, is_first, storable, together
from rslora_jax.checkpoint.records import Record
from rslora_jax.files import whole_folder
from rslora_jax.paths import AdapterError

__all__ = [
    "ARRAYS",
    "RECORD",
    "check_target",
    "line",
    "load",
    "os_error",
    "read_arrays",
    "read_record",
    "struct_of",
    "write",
]

ARRAYS, RECORD = "lora", "record"
UNFINISHED = ".orbax-checkpoint-tmp"


def check_target(path: Path, overwrite: bool) -> None:
    """Refuses a target that is there already, before any work is done."""
    asked = f"Adapters were to be saved to {path}"
    # A missing folder is no reason to lose what was trained.
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{asked}, which is a file. Choose another path.")
    if os.path.lexists(path) and not overwrite:
        raise AdapterError(
            f"{asked}, which exists. Choose another path, or pass overwrite=True to replace it "
            "once the new checkpoint is complete."
        )


def write(path: Path, arrays: Mapping[str, Any], record: Record, overwrite: bool) -> None:
    """Writes arrays and record to a folder that appears whole; all processes take part.

    Args:
      path: the folder to be.
      arrays: by path; sharded arrays are written by the processes that hold the shards.
      record: what travels with them.
      overwrite: True replaces a folder that is there, when the new one is complete.

    Raises:
      OSError: if it cannot be written; what was at `path` is still there then.
    """
    target = Path(os.path.realpath(path))
    staging = target.with_name(f".{target.name}-{exchange(secrets.token_hex(4))[0]}")
    try:
        with together():
            _save(staging, storable(arrays), record.to_dict())
        with together():
            if is_first():
                _put(staging, target, overwrite)
    except AdapterError:
        raise
    except Exception as error:  # Orbax and TensorStore raise all kinds for a full disk
        said = f"{path} could not be saved; what was there before is unchanged. {line(error)}"
        raise os_error(said, error) from error
    finally:
        if is_first():
            for left in (staging, staging.with_name(staging.name + UNFINISHED)):
                _clear(left)


def read_record(path: str | os.PathLike[str]) -> Record:
    """Reads what travels with the adapters, without their arrays.

    Args:
      path: a folder that `save` wrote.

    Returns:
      The `Record`: config, sites, fingerprints, step, extra and the library's version.

    Raises:
      AdapterError: if there is no complete and undamaged checkpoint of adapters.
    """
    folder = Path(os.path.abspath(path))
    _check_folder(folder)
    try:
        text = (folder / RECORD / "metadata").read_bytes().decode()
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"The record of {folder} cannot be read: {error}. Check the permissions, or restore "
            "another checkpoint."
        ) from error
    try:
        return Record.from_json(text)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from error


def read_arrays(path: Path, structs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays straight to their shards.

    Args:
      path: the folder.
      structs: what to read: shape, dtype, and the sharding, or None for the default device.

    Returns:
      The arrays, by path.

    Raises:
      AdapterError: if one cannot be read or is not as asked.
    """
    if not structs:
        return {}
    try:
        # From NumPy: on the default device, and free to be moved to another one by a jit.
        found = {name: jnp.asarray(array) for name, array in load(path / ARRAYS, structs).items()}
    except Exception as error:  # damaged files make Orbax and TensorStore raise all kinds
        raise AdapterError(
            f"The arrays of {path} cannot be read: {line(error)} The checkpoint is incomplete or "
            "damaged: restore another one."
        ) from error
    wrong = [
        p for p, s in structs.items() if (found[p].shape, found[p].dtype) != (s.shape, s.dtype)
    ]
    if wrong:
        raise AdapterError(
            f"{path} was to hold {structs[wrong[0]].shape} of {structs[wrong[0]].dtype} at "
            f"{wrong[0]!r}, found {found[wrong[0]].shape} of {found[wrong[0]].dtype}. It is "
            "damaged: restore another checkpoint."
        )
    return found


def struct_of(leaf: Leaf, given: Any) -> jax.ShapeDtypeStruct:
    """What to read for a leaf of the record: onto the shards of `given`, if it has any."""
    dtype = jnp.dtype(leaf.dtype)
    if dtype.itemsize > 4 and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise AdapterError(
            f"{leaf.path!r} was saved as {leaf.dtype}, which JAX would cut to "
            f"{jax.dtypes.canonicalize_dtype(dtype)}. Set jax_enable_x64 to restore it."
        )
    # An array that no one has placed stays free to follow the others to their devices.
    free = isinstance(given, jax.Array) and not given.committed
    sharding = None if free else getattr(given, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _put(staging: Path, target: Path, overwrite: bool) -> None:
    with whole_folder(target, overwrite=overwrite) as folder:
        for child in sorted(staging.iterdir()):
            child.rename(folder / child.name)
    staging.rmdir()


def _save(path: Path, arrays: dict[str, Any], record: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp  # noqa: PLC0415  (0.9 s to import)

    items = ocp.args.Composite(
        **{ARRAYS: ocp.args.PyTreeSave(arrays), RECORD: ocp.args.JsonSave(record)}
    )
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(), multiprocessing_options=everyone()
    ) as checkpointer:
        checkpointer.save(path, args=items)


def load(folder: Path, structs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Reads the arrays of one item: JAX arrays where there is a sharding, else NumPy arrays."""
    import orbax.checkpoint as ocp  # noqa: PLC0415  (0.9 s to import)

    def how(struct: jax.ShapeDtypeStruct) -> Any:
        if struct.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(
            dtype=struct.dtype, sharding=struct.sharding, global_shape=struct.shape
        )

    wanted = dict(structs)
    # Not through a Checkpointer: it waits for the other processes, one of which may have failed.
    handler: Any = ocp.PyTreeCheckpointHandler()
    try:
        found = handler.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=jax.tree.map(how, wanted), partial_restore=True
            ),
        )
    finally:
        handler.close()
    return {name: found[name] for name in structs}


def _clear(folder: Path) -> None:
    # After one of Orbax's writers has failed the others go on for a moment, and make folders.
    for _ in range(20):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _check_folder(folder: Path) -> None:
    asked = f"Adapters were to be restored from {folder}"
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        raise AdapterError(f"{asked}, which does not exist. {_beside(folder)}") from None
    except NotADirectoryError:
        raise AdapterError(f"{asked}, which is a file. Name the folder that `save` made.") from None
    except OSError as error:
        raise AdapterError(f"{asked}, which cannot be read: {error}.") from error
    if UNFINISHED in folder.name:
        raise AdapterError(f"{asked}, a save that was cut short. Restore another checkpoint.")
    if "adapter_config.json" in names:
        raise AdapterError(f"{asked}, a Hugging Face PEFT folder: `rl.peft.load` reads it.")
    missing = sorted({ARRAYS, RECORD} - set(names))
    if len(missing) == 2:
        inside = [name for name in names if (folder / name / RECORD).is_dir()]
        hint = f"Did you mean {folder / inside[-1]}?" if inside else f"It holds {names[:6]}."
        raise AdapterError(f"{asked}, which is no checkpoint of adapters. {hint}")
    if missing:
        raise AdapterError(
            f"{asked}, which lacks {missing[0]!r}: it is incomplete. Restore another checkpoint."
        )


def _beside(folder: Path) -> str:
    try:
        names = os.listdir(folder.parent)
    except OSError:
        return f"Nor can {folder.parent} be read."
    kept = sorted(name for name in names if folder.name in name)
    return f"Beside it there are {kept[:4]}." if kept else "Check the path."


def line(error: BaseException) -> str:
    """What an error of Orbax or TensorStore says, on one line and not too long."""
    text = f"{type(error).__name__}: {error}".split("[tensorstore_spec")[0]
    text = " ".join(text.split())
    # What was tried stands at the start, what failed at the end.
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def os_error(said: str, error: Exception) -> OSError:
    """An OSError that says this, with the number of the one that was caught, if it has any."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else found and int(found[1])
    return OSError(number, said) if number else OSError(said)
