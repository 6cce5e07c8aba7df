"""What several processes share: a meeting place, one voice, one file of losses.

Nothing here minds if there is only one.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from rslora_jax.files import whole_file


def connect(coordinator: str | None, processes: int, process_id: int) -> None:
    """Meet the other processes, if there are any.

    Args:
      coordinator: HOST:PORT of process 0; None lets JAX find the others, as it does on TPU pods.
      processes: how many meet there.
      process_id: which of them this one is.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator is not None:
        if process_id == 0:
            print(f"waiting for {processes} processes at {coordinator}", flush=True)
        jax.distributed.initialize(
            coordinator, processes, process_id, cluster_detection_method="deactivate"
        )
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise  # found a cluster, but not all about it


@contextlib.contextmanager
def leaving_nobody_waiting(
    expected: tuple[type[Exception], ...] = (OSError, ValueError),
) -> Iterator[None]:
    """An error ends this process at once: the others, which may wait for it, are then told.

    Args:
      expected: errors that are told as a line; others are bugs, and told with their traceback.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        lost = "Another process was lost, it seems. Start all of them again to go on."
        print(f"process {jax.process_index()}: {lost}\n{error}", file=sys.stderr, flush=True)
        os._exit(1)
    except Exception as error:
        said = str(error) if isinstance(error, expected) else traceback.format_exc()
        print(f"process {jax.process_index()}: {said}", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            os._exit(1)
        sys.exit(1)


def say(text: object) -> None:
    """Print it once, whatever the number of processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def mesh_of(data: int, fsdp: int | None, tensor: int, batch: int | None = None) -> Mesh:
    """All devices of all processes, on Auto axes of these sizes; fsdp None is all that are left.

    Raises:
      ValueError: if the axes do not make up the devices, or the batch, if given, does not divide.
    """
    count = jax.device_count()
    fsdp = fsdp or max(count // (data * tensor), 1)
    sizes = (data, fsdp, tensor)
    if np.prod(sizes) != count:
        raise ValueError(
            f"data * fsdp * tensor must be the {count} devices that there are, found "
            f"{' * '.join(map(str, sizes))}"
        )
    if batch is not None and batch % (data * fsdp):
        raise ValueError(f"batch must be a multiple of data * fsdp = {data * fsdp}, found {batch}")
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


class Losses:
    """The loss of every step, as lines of JSON that process 0 writes."""

    def __init__(self, path: Path, after: int) -> None:
        """Opens the file, without the steps that a killed run did after its last checkpoint."""
        self._file = None
        if jax.process_index() == 0:
            kept = [line for line in read_lines(path) if line["step"] <= after]
            with whole_file(path) as temporary:
                temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
            self._file = path.open("a")

    def __enter__(self) -> "Losses":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, step: int, loss: float) -> None:
        """One step."""
        say(f"step {step}  loss {loss:.4f}")
        if self._file is not None:
            print(json.dumps({"step": step, "loss": loss}), file=self._file, flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: the last one may be cut short where a process was killed."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
