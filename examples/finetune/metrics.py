"""Metrics: what a run measured, one JSON object a line, and its numbers for TensorBoard too.

A line is written whole or is dropped by the next start. A resumed run keeps the lines up to the
step that it resumes from, so that the files read as if it had never been interrupted.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rslora_jax.extras import extra
from rslora_jax.files import whole_file

METRICS, ANSWERS = "metrics.jsonl", "answers.jsonl"
WARNING = "warning"  # the name of sentences among the numbers
INSTALL = "rslora_jax[finetune]"
FLUSH_SECONDS = 1.0  # TensorBoard's file is also synced to the disk: not at every step


class Lines:
    """A file of JSON objects with a step each, which only grows while it is open."""

    def __init__(self, path: Path, after_step: int = 0) -> None:
        """Opens the file with the lines up to `after_step`; 0 is a run from the start: none."""
        kept = read_lines(path, after_step) if after_step else []
        with whole_file(path) as temporary:
            temporary.write_bytes(b"".join(map(_line, kept)))
        # Unbuffered: a line that a full disk refused is not written again when the file closes.
        self._file = path.open("ab", buffering=0)

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one object; it is with the operating system when this returns.

        Raises:
          OSError: if it cannot be written, as on a full disk, with the name of the file.
        """
        rest = _line(record)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def read_lines(path: Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """The whole lines of a file up to a step; of no file, none.

    The last line may be cut short where a process was killed: it is left out.
    """
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # of JSON and of UTF-8
            record = json.loads(line)
            if isinstance(record, dict) and record.get("step", math.inf) <= last_step:
                found.append(record)
    return found


class Metrics:
    """Writes `metrics.jsonl`, `answers.jsonl` and, if asked, `tensorboard/`; in process 0 alone.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Metrics(folder) as metrics:
      ...         metrics.write(1, {"loss": 2.5, "grad_norm": float("nan")})
      ...     print(Path(folder, "metrics.jsonl").read_text(), end="")
      {"step": 1, "loss": 2.5, "grad_norm": null}
    """

    def __init__(
        self,
        folder: str | Path,
        after_step: int = 0,
        *,
        tensorboard: bool = False,
        writer: bool | None = None,
    ) -> None:
        """Opens the files and drops what an earlier start wrote after `after_step`.

        Args:
          folder: where the files lie; made if it is not there.
          after_step: the step that the run resumes from; 0 starts the files anew.
          tensorboard: whether to write events too.
          writer: whether this process writes; by default process 0 does.
        """
        self.folder = Path(folder)
        self._writer = jax.process_index() == 0 if writer is None else writer
        self._events: Events | None = None
        with contextlib.ExitStack() as files:
            if self._writer:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._numbers, self._answers = (
                    files.enter_context(contextlib.closing(Lines(self.folder / name, after_step)))
                    for name in (METRICS, ANSWERS)
                )
            if self._writer and tensorboard:
                events = Events(self.folder / "tensorboard", after_step)
                self._events = files.enter_context(contextlib.closing(events))
            self._files = files.pop_all()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line, and one event a number: what is not finite is null in JSON.

        Args:
          step: the training step that was finished when this was measured.
          values: numbers by name, or arrays of one number; names may hold a slash, which groups
            them in TensorBoard.
        """
        if not self._writer:
            return
        numbers = {name: number(value) for name, value in values.items()}
        self._numbers.add({"step": int(step), **numbers})
        if self._events is not None:
            self._events.add(int(step), numbers)

    def warn(self, step: int, warning: str) -> None:
        """A sentence that is to be read with the numbers."""
        if self._writer:
            self._numbers.add({"step": int(step), WARNING: warning})

    def write_answers(self, step: int, answers: Iterable[Any]) -> None:
        """What the model wrote at a step, in one line, from named tuples of strings."""
        if self._writer:
            told = [answer._asdict() for answer in answers]
            self._answers.add({"step": int(step), "answers": told})

    def rows(self) -> list[dict[str, Any]]:
        """All numbers and warnings of the run, those of earlier starts included."""
        return read_lines(self.folder / METRICS)

    def close(self) -> None:
        """No more numbers; the files are whole."""
        self._files.close()


class Events:
    """TensorBoard events.

    Written at once: the queue of tensorboardX's SummaryWriter would wait for ever if the disk
    were full.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        """A new file in the folder, which takes back what others say of later steps."""
        writers = extra("tensorboardX.event_file_writer", INSTALL, "tensorboard: true")
        self._proto = extra("tensorboardX.proto.event_pb2", INSTALL, "tensorboard: true")
        self._flushed = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        # Two starts within a second would write the same file.
        self._file = writers.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(after_step + 1 if after_step else 0, session_log=start)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """One event with all numbers of a step."""
        values = [{"tag": tag, "simple_value": value} for tag, value in numbers.items()]
        self._write(step, summary={"value": values})

    def close(self) -> None:
        """The file is whole."""
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()


def number(value: Any) -> int | float:
    """A number, or an array of one number, as Python holds it."""
    return value if isinstance(value, int | float) else np.asarray(value).item()


def column(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps and values of one name, of the rows that have it; null becomes NaN."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [math.nan if x is None else x for _, x in found]


def finite(value: Any) -> Any:
    """A value as JSON knows it: numbers that are not finite are null, also inside."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(finite(record), allow_nan=False).encode() + b"\n"
