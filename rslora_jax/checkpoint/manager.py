"""Manager: Orbax's `CheckpointManager` with the settings of a run, and which steps it keeps."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rslora_jax.checkpoint.storage import os_error
from rslora_jax.paths import AdapterError

__all__ = ["Keep", "check_counts", "local", "manager"]


@dataclasses.dataclass
class Keep:
    """Orbax's preservation policy: the newest steps, and those with the best scores.

    Attributes:
      last: how many of the newest steps stay.
      best: how many of the best.
      sign: 1 if the least score is the best, -1 if the greatest is.
      scores: by step; a step whose score is NaN is not ranked.

    Example:
      >>> from types import SimpleNamespace as Info
      >>> keep = Keep(last=1, best=1, sign=1, scores={1: 0.5, 2: 0.25, 3: 0.75})
      >>> keep.should_preserve([Info(step=step) for step in (1, 2, 3)], context=None)
      [False, True, True]
    """

    last: int
    best: int
    sign: int
    scores: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each step; Orbax gives them in order."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        ranked = sorted(filter(self._is_scored, steps), key=lambda s: (self._score(s), -s))
        kept = {*steps[-self.last :], *ranked[: self.best]}
        return [step in kept for step in steps]

    def _score(self, step: int) -> float:
        return self.sign * self.scores.get(step, math.nan)

    def _is_scored(self, step: int) -> bool:
        return not math.isnan(self._score(step))


def manager(folder: Path, keep: Keep, every: int, asynchronous: bool, read_only: bool) -> Any:
    """Orbax's `CheckpointManager` of a folder.

    Args:
      folder: the folder of the run.
      keep: which steps stay.
      every: steps that are multiples of it are due.
      asynchronous: saves are written by a thread.
      read_only: nothing is made, cleaned up or deleted.

    Returns:
      The manager.

    Raises:
      OSError: if the folder cannot be made or read.
    """
    import orbax.checkpoint as ocp  # noqa: PLC0415  (0.9 s to import)

    policies = ocp.checkpoint_managers
    due = [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=policies.AnySavePolicy(due),
        preservation_policy=keep,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=asynchronous,
        # Else, where a folder cannot be made, Orbax's writers wait for it for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        save_root_metadata=False,
        lightweight_initialize=True,  # a damaged old step must not keep the folder from opening
    )
    try:
        return ocp.CheckpointManager(folder, options=options)
    except OSError as error:
        raise os_error(f"{folder} cannot be opened for a run: {error}", error) from error


def check_counts(**counts: Any) -> None:
    """Refuses options that are no counts, by name."""
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise AdapterError(f"{name} must be an int of at least 1, found {count!r}.")


def local(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder, which is not the address of a bucket."""
    if "://" in os.fspath(folder):
        raise AdapterError(
            f"The folder of a run is to be on a local or mounted disk, found {folder!r}. Mount "
            "the bucket (Cloud Storage FUSE), and name the mounted folder."
        )
    return Path(os.path.abspath(folder))
