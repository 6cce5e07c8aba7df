"""Journal: all that is written and shown of a run while it goes on."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

import rslora_jax as rl
from finetune import evaluation
from finetune.beginning import SETTINGS
from finetune.evaluation import Evaluation
from finetune.metrics import WARNING, Metrics, column
from finetune.processes import first_says
from finetune.progress import Progress, Speed
from finetune.settings import Settings
from finetune.watch import Watch
from rslora_jax.checkpoint import RunState

SPEED = "tokens_per_second"
LOOK = 16  # steps between looks at the recorded gradients, which are read from the devices


class Clock:
    """Seconds of training: what evaluations take is left out."""

    def __init__(self) -> None:
        self._left_out = 0.0

    def __call__(self) -> float:
        """The time now."""
        return time.perf_counter() - self._left_out

    @contextlib.contextmanager
    def stopped(self) -> Any:
        """Time goes by, and the clock does not tell."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._left_out += time.perf_counter() - start


class Journal(contextlib.AbstractContextManager["Journal"]):
    """Metrics, progress, warnings and evaluations; files are written by process 0."""

    def __init__(
        self,
        settings: Settings,
        steps: int,
        schedule: optax.Schedule,
        examine: Callable[..., Evaluation | None] | None,
    ) -> None:
        """Nothing is written before `begin`.

        Args:
          settings: of the run.
          steps: in all.
          schedule: the learning rate of each step.
          examine: ``examine(step, params, stop)`` evaluates; None if nothing is held out.
        """
        self._settings, self._steps, self._schedule = settings, steps, schedule
        self._examine, self._evaluated = examine, set[int]()
        self._open, self._clock = contextlib.ExitStack(), Clock()
        self._speed = Speed(clock=self._clock)

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics of the whole run."""
        return self._metrics.rows()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Those of the whole run."""
        return evaluation.read(self._settings.output)

    @property
    def warnings(self) -> list[str]:
        """What was said of the gradients in the whole run."""
        return [row[WARNING] for row in self.rows if WARNING in row]

    @property
    def tokens_per_second(self) -> float | str:
        """The median of the whole run, without the first step of a start, which is compiled."""
        told = [speed for speed in column(self.rows, SPEED)[1] if math.isfinite(speed)]
        return statistics.median(told) if told else "not measured: there was one step"

    def begin(self, step: int) -> None:
        """Opens the files, without what was written after `step`."""
        chosen = self._settings
        if jax.process_index() == 0:
            chosen.save(chosen.output / SETTINGS)
        metrics = Metrics(chosen.output, step, tensorboard=chosen.tensorboard)
        self._metrics = self._open.enter_context(metrics)
        self._progress = self._open.enter_context(Progress(self._steps, step))
        self._watch = Watch(chosen.use_rslora, chosen.learning_rate, step)
        self._evaluated = {found.step for found in self.evaluations}

    def stepped(self, state: RunState, told: Any) -> None:
        """Writes and shows one step."""
        tokens = int(told.tokens)
        values = {
            "loss": float(told.loss),
            "grad_norm": float(told.grad_norm),
            "learning_rate": float(self._schedule(state.step - 1)),
            "tokens": tokens,
            "answer_tokens": int(told.answers),
            SPEED: self._speed.add(tokens),
        }
        self._metrics.write(state.step, values)
        self._progress.update(state.step, values)
        if state.step % LOOK == 0 or state.step == self._steps:
            for warning in self._watch.look(state.opt_state):
                self._metrics.warn(state.step, warning)
                self._progress.say(f"warning: {warning}")

    def evaluate(self, step: int, params: rl.LoraParams, stop: Callable[[], bool]) -> None:
        """Evaluates where that is due: before the first step, every so often, and at the end."""
        every = self._settings.eval_every
        due = step in (0, self._steps) or (every > 0 and step % every == 0)
        if self._examine is None or not due or first_says(step in self._evaluated):
            return
        with self._clock.stopped():
            found = self._examine(step, params, stop)
        if found is not None:
            self._evaluated.add(step)
            self._metrics.write_answers(step, found.answers)
            self._metrics.write(step, found.held.metrics())
            self._progress.say(sentence(found))


def sentence(found: Evaluation) -> str:
    """An evaluation as a line."""
    held = found.held
    return (
        f"step {found.step}: held-out loss {held.loss:.4f}, token accuracy "
        f"{held.token_accuracy:.1%}, exact match {held.exact_match:.1%} of {held.rows} rows"
    )
