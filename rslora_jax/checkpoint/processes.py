"""Processes: an error on one of several becomes an error on all, and they save one state.

A process that raises while the others wait for it leaves them waiting for good. So each says how
its part went before any goes on. With one process there is nothing to say.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rslora_jax.paths import AdapterError

__all__ = ["everyone", "exchange", "is_first", "is_local", "same", "storable", "together"]

LONGEST = 500
"""Bytes of what a process says: one shape, so that one program is compiled."""


def is_first() -> bool:
    """Whether this is the process that writes what only one may write."""
    return jax.process_index() == 0


def is_local(array: jax.Array) -> bool:
    """Whether one of several processes holds all of an array, and the others their own."""
    return jax.process_count() > 1 and array.is_fully_addressable


def storable(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays as Orbax takes them: it refuses JAX arrays that one of many processes holds."""
    local = {path for path, a in arrays.items() if isinstance(a, jax.Array) and is_local(a)}
    return {path: np.asarray(a) if path in local else a for path, a in arrays.items()}


def everyone() -> Any:
    """Orbax's barriers between named processes end after minutes, those between all never do."""
    import orbax.checkpoint as ocp  # noqa: PLC0415  (0.9 s to import)

    count = jax.process_count()
    return ocp.options.MultiprocessingOptions(
        active_processes=set(range(count)) if count > 1 else None
    )


def exchange(text: str) -> tuple[str, ...]:
    """Tells all processes a text; all of them are to call it.

    Args:
      text: is cut after `LONGEST` bytes.

    Returns:
      The text of each process, in their order.

    Example:
      >>> exchange("done")
      ('done',)
    """
    if jax.process_count() == 1:
        return (text,)
    own = np.zeros(LONGEST, np.uint8)
    said = text.encode()[:LONGEST]
    own[: len(said)] = np.frombuffer(said, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(own))
    return tuple(row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error that the block raises on one process is raised on all of them.

    Where the block itself waits for the others, as Orbax's barriers do, an error ahead of that
    is told only when their time is up.

    Raises:
      AdapterError: if another process raised one, with its number and what it said.
      OSError: if another process raised any other error.

    Example:
      >>> with together():
      ...     raise AdapterError("No such checkpoint.")
      Traceback (most recent call last):
      rslora_jax.paths.AdapterError: No such checkpoint.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    said = exchange("" if error is None else f"{_kind(error)} {type(error).__name__}: {error}")
    if error is not None:
        raise error
    for process, words in enumerate(said):
        if words:
            kind, _, text = words.partition(" ")
            raise KINDS[kind](f"Process {process} of {len(said)} failed: {text}")


def same(value: str, what: str) -> None:
    """Refuses, on all processes, a value that is not the same on all of them.

    Args:
      value: a digest, or another short text.
      what: what it stands for.

    Raises:
      AdapterError: with the numbers of the processes that differ from process 0.
    """
    said = exchange(value)
    others = [process for process, other in enumerate(said) if other != said[0]]
    if others:
        raise AdapterError(
            f"All processes were to save the same {what}, found another one than that of process "
            f"0 in process {', '.join(map(str, others[:8]))}. Keys, counts and positions must be "
            "the same on all; what is to differ goes into one list with an entry for each."
        )


KINDS = {"adapter": AdapterError, "other": OSError}


def _kind(error: Exception) -> str:
    return "adapter" if isinstance(error, AdapterError) else "other"
