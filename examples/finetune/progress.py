"""Progress: a bar on a terminal, and a plain line now and then anywhere else."""

import datetime
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich import progress
from rich.console import Console

from finetune.metrics import number

SHOWN = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad norm {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
}
"""Which of the metrics are shown, and how."""
WINDOW = 600.0  # seconds of the past that the time left is guessed from


class Progress:
    """Shows how far a run is; in process 0 alone.

    Example:
      >>> with Progress(200, console=Console(width=80, force_terminal=False)) as shown:
      ...     shown.update(1, {"loss": 2.5, "grad_norm": 0.25})
      step 1/200  loss 2.5000  grad norm 0.25
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        seconds: float = 15.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Shows nothing yet.

        Args:
          total: steps in all, those of earlier starts included.
          start: the step that this start goes on from.
          seconds: between two lines where there is no terminal.
          console: where to show it; standard output by default.
          clock: the seconds now.
        """
        self._console = Console() if console is None else console
        self._quiet = jax.process_index() != 0
        self._bar = _bar(self._console) if self._console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task("step", total=total, completed=start, text="")
        self._lines = _Lines(total, seconds, clock)

    def __enter__(self) -> "Progress":
        if self._bar is not None and not self._quiet:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """A step is done; some of its metrics are shown beside it."""
        if self._quiet:
            return
        text = _text(values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif line := self._lines.update(step, text):
            self.say(line)

    def say(self, text: object) -> None:
        """Prints lines, above the bar if there is one."""
        if not self._quiet:
            self._console.print(str(text), markup=False, highlight=False, soft_wrap=True)


class Speed:
    """Tokens per second over the latest steps; the first step, which compiles, starts the clock.

    Example:
      >>> times = iter((100.0, 102.0, 104.0))
      >>> speed = Speed(clock=lambda: next(times))
      >>> [speed.add(500) for _ in range(3)]
      [nan, 250.0, 250.0]
    """

    def __init__(self, steps: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        """Averages over this many steps."""
        self._marks: deque[tuple[float, int]] = deque(maxlen=steps + 1)
        self._tokens, self._clock = 0, clock

    def add(self, tokens: int) -> float:
        """A step with so many tokens is done: the rate, NaN at the first."""
        self._tokens += tokens
        self._marks.append((self._clock(), self._tokens))
        (since, before), (now, after) = self._marks[0], self._marks[-1]
        return (after - before) / (now - since) if now > since else math.nan


class _Lines:
    """Which steps are worth a line, and that line."""

    def __init__(self, total: int, seconds: float, clock: Callable[[], float]) -> None:
        self._total, self._seconds, self._clock = total, seconds, clock
        self._first: tuple[float, int] | None = None
        self._last = -math.inf

    def update(self, step: int, text: str) -> str:
        """A line for the first step, for the last, and for one every so many seconds."""
        now = self._clock()
        self._first = self._first or (now, step)
        if step < self._total and now - self._last < self._seconds:
            return ""
        self._last = now
        return "  ".join(filter(None, (f"step {step}/{self._total}", text, self._left(now, step))))

    def _left(self, now: float, step: int) -> str:
        """The time left, as far as the steps of this start tell; after the first, nothing."""
        since, first = self._first or (now, step)
        if step in (first, self._total):
            return ""
        seconds = (now - since) / (step - first) * (self._total - step)
        return f"{datetime.timedelta(seconds=round(seconds))} left"


def _bar(console: Console) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}", markup=False),
        progress.TimeRemainingColumn(),
        console=console,
        speed_estimate_period=WINDOW,
    )


def _text(values: Mapping[str, Any]) -> str:
    """The shown ones of some metrics, where they are finite or the loss."""
    found = {name: number(values[name]) for name in SHOWN if name in values}
    worth = (name for name, x in found.items() if math.isfinite(x) or name == "loss")
    return "  ".join(SHOWN[name].format(found[name]) for name in worth)
