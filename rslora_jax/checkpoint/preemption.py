"""Preemption: the notice that a machine will be taken away, as a flag that the loop reads."""

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import jax

from rslora_jax.paths import AdapterError

__all__ = ["Preemption"]


class Preemption:
    """Turns SIGTERM into a flag, so that the training loop can save and end by itself.

    Where `jax.distributed` is initialized the signal is left to JAX's own preemption service:
    machines get their notices at different times, and all processes must save the same step.
    `reached` then asks the service for the step that all of them agree on. That service knows
    SIGTERM alone: other signals keep their handlers there, and Ctrl-C ends its process at once,
    without a save.

    Args:
      signals: which signals are a notice; without `jax.distributed`.

    Attributes:
      received: whether a notice came, or a step was reached at which all processes are to save.

    Raises:
      AdapterError: on entering it in another thread than the main one, or twice.

    Example:
      >>> import os, signal
      >>> with Preemption(signals=[signal.SIGUSR1]) as notice:
      ...     for step in range(1, 10):
      ...         if step == 3:
      ...             os.kill(os.getpid(), signal.SIGUSR1)
      ...         if notice.reached(step):
      ...             break  # after `runs.save(state, force=True)` and `runs.wait()`
      >>> step, notice.received
      (3, True)
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM,)) -> None:
        self.received = False
        self._signals = tuple(signals)
        self._earlier: dict[int, Any] | None = None
        self._last: tuple[int, FrameType | None] | None = None

    def reached(self, step: int) -> bool:
        """Whether to save now and end; every process is to ask at every step.

        Args:
          step: the step that was just done.

        Returns:
          `received`; with `jax.distributed`, whether this is the step at which all processes
          agreed to save after one of them got a notice.
        """
        if jax.distributed.is_initialized() and not self.received:
            self.received = _agreed(step)
        return self.received

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread():
            raise AdapterError(
                "Preemption must be entered in the main thread, found the thread "
                f"{threading.current_thread().name!r}: Python delivers signals to the main one. "
                "Enter it there, and hand `notice` to the thread that trains."
            )
        if self._earlier is not None:
            raise AdapterError("This Preemption is in use already. Make another one.")
        mine = () if jax.distributed.is_initialized() else self._signals
        self._earlier = {number: signal.signal(number, self._notice) for number in mine}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Puts the earlier handlers back, and hands them the notice that came meanwhile."""
        earlier, self._earlier = self._earlier or {}, None
        for number, handler in earlier.items():
            # None stands for a handler that was not set from Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        last, self._last = self._last, None
        handler = None if last is None else earlier.get(last[0])
        if last is not None and callable(handler):
            handler(*last)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._last = (number, frame)


def _agreed(step: int) -> bool:
    from orbax.checkpoint import utils  # noqa: PLC0415  (0.9 s to import)

    return utils.reached_preemption(step)
