"""Training: the loop from the newest checkpoint to the last step, or to a reason to stop."""

import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

import rslora_jax as rl
from finetune.failures import keep_failed
from finetune.job import Job
from finetune.processes import first_says
from finetune.settings import ConfigError, Settings
from hosts import say
from rslora_jax.checkpoint import Preemption, Runs, RunState

# The step at hand is finished and saved first. Among several processes that holds for SIGTERM
# alone, which JAX hands on to all of them: Ctrl-C ends the process that it reaches, at once.
NOTICES = (signal.SIGTERM, signal.SIGINT)


class Listener(Protocol):
    """Who is told of the run."""

    def begin(self, step: int) -> None:
        """The run starts, or goes on, after this step."""

    def stepped(self, state: RunState, told: Any) -> None:
        """A step was done."""

    def evaluate(self, step: int, params: rl.LoraParams, stop: Callable[[], bool]) -> None:
        """Evaluate, if it is due here and not done yet; leave it half done if `stop` says so."""


class Ended(NamedTuple):
    """How a run ended: at its last step, or at a notice before it."""

    state: RunState
    done: bool


def train(job: Job, settings: Settings, listener: Listener) -> Ended:
    """Trains up to the last step, or to the step at which a notice came.

    Raises:
      BadStepError: at a step that is not finite; the state before it is saved.
      ConfigError: if the folder holds checkpoints of another run.
      OSError: if a checkpoint cannot be written; those before it are complete.
    """
    with Preemption(NOTICES) as notice, open_runs(job, settings) as runs:
        state = resume(runs, job.start)
        listener.begin(state.step)
        state = _loop(job, listener, runs, notice, Timer(settings.save_minutes), state)
        runs.save(state, force=True)
    return Ended(state, state.step >= job.batches.steps)


def open_runs(job: Job, settings: Settings) -> Runs:
    """The checkpoints of this run; every process opens them."""
    return Runs(
        settings.output / "checkpoints",
        job.adapted.sites,
        job.adapted.config,
        base=job.base,
        keep_last=settings.keep_last,
        save_every=settings.save_every,
    )


def resume(runs: Runs, start: RunState) -> RunState:
    """The newest complete step, straight to the shards of `start`, or `start` itself.

    Raises:
      ConfigError: if it is of another run.
    """
    if runs.latest() is None:
        return start
    state = runs.restore(start)
    found, wanted = (one.data["run"] for one in (state, start))
    if found != wanted:
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        pairs = ", ".join(
            f"{name} {found.get(name)} there, {wanted[name]} now" for name in differing
        )
        raise ConfigError(
            f"{runs.folder} holds checkpoints of another run: {pairs}. Use the settings of that "
            "run, or another output."
        )
    say(f"going on from step {state.step}")
    return state


class Timer:
    """Says when a number of minutes is over, to all processes alike."""

    def __init__(self, minutes: float) -> None:
        """Starts; 0 minutes are never over."""
        self._seconds = minutes * 60 or float("inf")
        self._last = time.monotonic()

    def restart(self) -> None:
        """From now on."""
        self._last = time.monotonic()

    def over(self) -> bool:
        """Whether the time has passed."""
        return first_says(time.monotonic() - self._last >= self._seconds)


def _loop(
    job: Job, listener: Listener, runs: Runs, notice: Preemption, timer: Timer, state: RunState
) -> RunState:
    rows = job.batches.iterator(state.data["position"], job.rows)
    while True:
        params = rl.LoraParams(job.base, state.lora)
        listener.evaluate(state.step, params, lambda: notice.received)
        if state.step >= job.batches.steps or notice.received:
            return state
        state, told = _advance(job, runs, state, next(rows), rows)
        listener.stepped(state, told)
        if runs.save(state, {"loss": told.loss}, force=timer.over()):
            timer.restart()
        notice.reached(state.step)


def _advance(job: Job, runs: Runs, state: RunState, batch: Any, rows: Any) -> tuple[RunState, Any]:
    """One step on; the state that is given is used up.

    Raises:
      BadStepError: if it was not finite, after the state before it was saved.
    """
    placed = job.place(batch)
    lora, opt_state, told = job.step(job.base, state.lora, state.opt_state, placed)
    state, told = state._replace(lora=lora, opt_state=opt_state), jax.device_get(told)
    if not told.finite:
        runs.save(state, force=True)
        raise keep_failed(runs.folder.parent, state.step + 1, batch, told, runs.latest())
    data = {**state.data, "position": rows.get_state()}
    return state._replace(step=state.step + 1, data=data), told
