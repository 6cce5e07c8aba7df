"""Runs: the checkpoints of one training run, each of which continues it bit by bit."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rslora_jax.checkpoint.adapters import arrays_of
from rslora_jax.checkpoint.fingerprint import Fingerprint, fingerprint
from rslora_jax.checkpoint.manager import Keep, check_counts, local, manager
from rslora_jax.checkpoint.processes import exchange, together
from rslora_jax.checkpoint.records import Record
from rslora_jax.checkpoint.steps import RunState, check_state, items_of, read_step, score
from rslora_jax.checkpoint.storage import line, os_error
from rslora_jax.config import LoraConfig
from rslora_jax.paths import AdapterError
from rslora_jax.sites import Site, Sites

__all__ = ["RunState", "Runs"]

PyTree = Any


class Runs:
    """The checkpoints of a run in one folder, through Orbax's `CheckpointManager`.

    Saves are asynchronous: `save` copies the state to the host and returns, so that the next
    training step may donate the buffers; a thread writes. A step appears in the folder whole or
    not at all, and an older one is deleted only after a newer one is complete. One job at a time
    may write to a folder.

    Of a job of several processes each one opens the folder, saves, restores and discards at the
    same steps: each writes and reads the shards that it holds, and the state must otherwise be the
    same on all.

    Args:
      folder: the folder of the run, made if it is not there; on a local or mounted disk that all
        processes see.
      sites: the sites that `adapt` returned.
      config: the config that `adapt` was given.
      base: the base tree, or its `fingerprint` where it is known already.
      keep_last: how many of the newest steps to keep.
      keep_best: how many of the best steps to keep as well; None keeps no step for its metric.
      best_metric: which of the metrics ranks the steps.
      best_mode: ``"min"`` if less of it is better, ``"max"`` if more is.
      save_every: `save` writes steps that are multiples of it, and leaves out the others.
      asynchronous: False makes `save` wait until the step is complete.
      read_only: True for another process that watches a run: it never cleans up and never saves.

    Raises:
      AdapterError: for arguments out of range.
      OSError: if the folder cannot be made or read.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, optax, rslora_jax as rl
      >>> site = Site("w", "io", (2, 3), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = {"w": {"a": jnp.ones((2, 1)), "b": jnp.zeros((1, 3))}}
      >>> start = RunState(lora, optax.adam(1e-3).init(lora), 0, jax.random.key(0), {"epoch": 0})
      >>> folder = tempfile.TemporaryDirectory()
      >>> config, base = rl.LoraConfig(1, 2.0), {"w": jnp.ones((2, 3))}
      >>> with Runs(folder.name, [site], config, base=base) as runs:
      ...     state = runs.restore(start) if runs.steps() else start
      ...     saved = runs.save(state._replace(step=1), {"loss": 0.5})
      ...     saved, runs.steps(), runs.restore(start).step
      (True, (1,), 1)
      >>> folder.cleanup()
    """

    def __init__(  # noqa: PLR0913  (the public options of a run)
        self,
        folder: str | os.PathLike[str],
        sites: Sequence[Site],
        config: LoraConfig,
        *,
        base: Fingerprint | PyTree,
        keep_last: int = 3,
        keep_best: int | None = None,
        best_metric: str = "loss",
        best_mode: Literal["min", "max"] = "min",
        save_every: int = 1,
        asynchronous: bool = True,
        read_only: bool = False,
    ) -> None:
        """Opens the folder, and removes what a killed run left half-written."""
        check_counts(keep_last=keep_last, keep_best=keep_best or 1, save_every=save_every)
        if best_mode not in ("min", "max"):
            raise AdapterError(f"best_mode must be 'min' or 'max', found {best_mode!r}.")
        known = base if isinstance(base, Fingerprint) else fingerprint(base)
        described = Sites(tuple(sites), (), getattr(sites, "total", 0))
        self.folder = local(folder)
        self._record = Record(config, described, Fingerprint(()), known)
        self._metric = best_metric if keep_best else None
        self._keep = Keep(keep_last, keep_best or 0, -1 if best_mode == "max" else 1, {})
        self._writes = not read_only
        self._manager = manager(self.folder, self._keep, save_every, asynchronous, read_only)
        self._head: int | None = None
        if keep_best:
            scores = {step: score(self.path(step), best_metric) for step in self.steps()}
            self._keep.scores.update(scores)

    def save(
        self, state: RunState, metrics: Mapping[str, Any] | None = None, *, force: bool = False
    ) -> bool:
        """Saves a step, if it is one to be saved.

        Args:
          state: what the run needs to go on.
          metrics: numbers to keep with the step, such as ``{"loss": loss}``; of several
            processes those of the first are kept.
          force: True saves a step that is no multiple of `save_every`, such as the last one.

        Returns:
          Whether a save began; False also for the step that was saved or restored last.

        Raises:
          AdapterError: if the folder holds this step or later ones that this run did not save
            or restore, a factor is not finite, or the state holds what cannot be saved.
          OSError: if this save, or the asynchronous one before it, could not be written; the
            steps before are complete, and the failed one may be saved again.
        """
        check_state(state, "state")
        if not self._manager.is_saving_in_progress():
            self.wait()
        step = int(state.step)
        if not self._is_due(step, force):
            return False
        kept = {name: float(value) for name, value in (metrics or {}).items()}
        self._check_metric(kept)
        factors = arrays_of(state.lora, self._record.sites)
        record = dataclasses.replace(self._record, lora=fingerprint(factors), step=step)
        Record.from_dict(record.to_dict())  # what could not be read again is not written
        items = items_of(state, factors, record, kept)
        self._keep.scores[step] = kept.get(self._metric or "", math.nan)
        self._head = step
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # Orbax and TensorStore raise all kinds for a full disk
            raise self._failure(error) from error
        return True

    def restore(self, like: RunState, step: int | None = None) -> RunState:
        """Restores a step, each array straight to its shards, and checks all of it.

        Args:
          like: a state of the same sites and optimizer, of arrays or `jax.ShapeDtypeStruct`s:
            gives the structure and the shardings, which may be of another mesh or device
            count. `data` comes back as it was saved.
          step: which step; None is the newest complete one. Where the newest is damaged that
            is an error, and ``runs.steps()[-2]`` is the one before it.

        Returns:
          The state, bit by bit and type by type as it was saved. An array for which `like` names
          no device stays free to follow the others.

        Raises:
          AdapterError: if there is no such step, it is damaged, or it does not fit the sites,
            the config, the base or `like`, with the paths and both values.
        """
        steps = self.steps()
        with together():
            wanted = self._chosen(step, steps)
        wanted = int(exchange(str(wanted))[0])  # a shared disk may show others an older listing
        try:
            state = read_step(self.path(wanted), self._record, like)
        except AdapterError as error:
            others = [other for other in steps if other != wanted]
            hint = f"Other complete steps: {others}; take one with step=." if others else ""
            said = f"Step {wanted} of {self.folder} cannot be restored: {error} {hint}"
            raise AdapterError(said.strip()) from error
        self._head = wanted
        return state

    def steps(self) -> tuple[int, ...]:
        """The complete steps, in order; waits for a save in progress."""
        self.wait()
        self._manager.reload()
        return tuple(sorted(self._manager.all_steps()))

    def latest(self) -> int | None:
        """The newest complete step, or None; waits for a save in progress.

        All processes are to call it: a shared disk may show them different listings, of which
        that of process 0 counts.
        """
        found = exchange(str(max(self.steps(), default="")))[0]
        return int(found) if found else None

    def path(self, step: int) -> Path:
        """The folder of a step, which `rslora_jax.checkpoint.restore` reads as adapters."""
        return self.folder / str(step)

    def discard(self, *, after: int) -> None:
        """Deletes all steps after one, so that a run that went back to it can save again.

        Args:
          after: the newest step that is to stay.
        """
        self._check_writable()
        for step in self.steps():
            if step > after:
                self._manager.delete(step)

    def wait(self) -> None:
        """Waits until the save in progress is complete.

        Raises:
          OSError: if it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever the writing thread raised
            raise self._failure(error) from error

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads."""
        try:
            self.wait()
        except OSError:
            with contextlib.suppress(Exception):  # Orbax tells of the same failure once more
                self._manager.close()
            raise
        self._manager.close()

    def __enter__(self) -> "Runs":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _is_due(self, step: int, force: bool) -> bool:
        self._check_writable()
        if step == self._head:
            return False
        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            raise AdapterError(
                f"Step {step} was to be saved, but {self.folder} holds steps up to {newest}, which "
                f"this run did not come from. Restore step {newest} first, save to another "
                f"folder, or delete the later steps with discard(after={step - 1})."
            )
        return force or self._manager.should_save(step)

    def _check_writable(self) -> None:
        if not self._writes:
            raise AdapterError(f"{self.folder} was opened with read_only=True: nothing is changed.")

    def _check_metric(self, metrics: Mapping[str, float]) -> None:
        if metrics and self._metric and self._metric not in metrics:
            raise AdapterError(
                f"keep_best ranks the steps by {self._metric!r}, and the metrics have "
                f"{sorted(metrics)}. Pass it too, or set best_metric."
            )

    def _chosen(self, step: int | None, steps: Sequence[int]) -> int:
        if not steps:
            raise AdapterError(
                f"{self.folder} holds no complete step to restore. Start the run anew, or name "
                "the folder that it was saved to."
            )
        if step is not None and step not in steps:
            raise AdapterError(f"{self.folder} holds no step {step}; it holds {list(steps)}.")
        return steps[-1] if step is None else step

    def _failure(self, error: Exception) -> OSError:
        failed = self._head
        try:
            self._manager.reload()
        except OSError:  # the folder may be gone; the failure itself is to be told
            pass
        self._head = self._manager.latest_step()
        return os_error(
            f"Step {failed} could not be saved to {self.folder}; complete steps: "
            f"{sorted(self._manager.all_steps())}. {line(error)}",
            error,
        )
