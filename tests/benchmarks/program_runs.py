"""Runs of the program in examples/finetune, for the benchmarks that compare several.

A run that is done is not done again, and one that was cut off goes on from its checkpoint; what it
spent before is not counted.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from finetune import evaluation
from finetune.metrics import METRICS, read_lines
from rslora_jax.files import whole_file

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "finetune"
ASKED, SPENT = "asked.json", "seconds.json"


class Result(NamedTuple):
    """What a run found.

    Attributes:
      before, after: loss of the held-out rows, in nats per answer token.
      accuracy: share of the held-out answer tokens that were the likeliest one at the end.
      exact: share of the held-out rows of which all were.
      first, last: loss of the first and of the last step.
      seconds: by the clock, and of the processor.
      answers: the model's own, of the last evaluation.
    """

    before: float
    after: float
    accuracy: float
    exact: float
    first: float
    last: float
    seconds: tuple[float, float]
    answers: Sequence[evaluation.Answer]


def train(folder: Path, words: Iterable[str]) -> None:
    """Lets the program do one run with output in `folder`, unless it is done.

    Raises:
      ValueError: another run was begun there.
    """
    words, asked = list(words), folder / ASKED
    if asked.exists() and json.loads(asked.read_text()) != words:
        raise ValueError(f"{folder} holds the run {asked.read_text()}, not {words}: delete it")
    if done(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(words))
    command = [sys.executable, str(PROGRAM), *words, "--output", str(folder)]
    started = time.perf_counter(), _processor()
    with (folder / "log.txt").open("ab") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    spent = time.perf_counter() - started[0], _processor() - started[1]
    with whole_file(folder / SPENT) as temporary:
        temporary.write_text(json.dumps(spent))


def done(folder: Path) -> bool:
    """Whether the run there came to its end."""
    return (folder / SPENT).exists()


def read(folder: Path) -> Result:
    """What one run wrote."""
    first, *_, last = evaluation.read(folder)
    losses = [row["loss"] for row in read_lines(folder / METRICS) if "loss" in row]
    held = last.held
    return Result(
        first.held.loss,
        held.loss,
        held.token_accuracy,
        held.exact_match,
        losses[0],
        losses[-1],
        tuple(json.loads((folder / SPENT).read_text())),
        last.answers,
    )


def _processor() -> float:
    """Seconds that children that have ended spent on processors."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
