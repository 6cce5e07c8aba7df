"""Failures: a step whose numbers are not finite, kept so that it can be looked at."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from rslora_jax.files import whole_folder
from rslora_jax.folders import write_file


class BadStepError(RuntimeError):
    """A step was not finite; it was not applied, and the message says where it is kept."""


def keep_failed(output: Path, step: int, batch: Any, told: Any, saved: int | None) -> BadStepError:
    """Writes the batch of a failed step, and what was seen, to ``failed_step_N``.

    Each process writes the rows that it read.

    Args:
      output: the folder of the run.
      step: the number of the step, from 1.
      batch: its batch, as it came from the data.
      told: the step's `Told`.
      saved: the newest complete checkpoint.

    Returns:
      The error to raise; where the batch cannot be written, as on a full disk, it says that too.
    """
    folder = output / f"failed_step_{step}"
    if jax.process_count() > 1:
        folder = folder / f"process_{jax.process_index()}"
    found = f"loss {float(told.loss)}, gradient norm {float(told.grad_norm)}"
    message = (
        f"Step {step} is not finite ({found}) and was not applied. Its batch is in {folder}; the "
        f"newest checkpoint is that of step {saved}, before it. Try a lower learning_rate, or "
        "clip, in another output."
    )
    try:
        _write(folder, batch, message)
    except OSError as error:
        message += f" That folder could not be written: {error}."
    return BadStepError(message)


def _write(folder: Path, batch: Any, message: str) -> None:
    with whole_folder(folder, overwrite=True) as temporary:
        arrays = {name: np.asarray(array) for name, array in batch._asdict().items()}
        write_file(temporary / "batch.safetensors", arrays)
        (temporary / "what.txt").write_text(message + "\n")
