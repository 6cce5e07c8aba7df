"""Facts and a style at three ranks and both scalings: the program in examples/finetune at work.

Every run is the program itself, one after the other, with one learning rate for all. A run that
is done is not done again, and one that was cut off goes on from its checkpoint.

    python tests/benchmarks/finetune_ranks.py [--ranks 4 32 128] [--output FOLDER] [--only-read]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from finetune import evaluation
from rslora_jax.files import whole_file
from rslora_jax.tables import align

PROGRAM = Path(__file__).parents[2] / "examples" / "finetune"
SCALINGS = {"rslora": "alpha/sqrt(r)", "lora": "alpha/r"}
TASKS = {
    "elements": "--steps 16 --batch 4 --length 64 --eval-rows 50",
    "devil": "--steps 10 --batch 3 --length 96 --eval-rows 40",
}
ALIKE = "--eval-every 0 --keep-last 1 --no-tensorboard --export"
SAME = 0.02  # nats: nearer losses than these are called the same


class Run(NamedTuple):
    """One run of the program."""

    task: str
    rank: int
    scaling: str

    def folder(self, output: Path) -> Path:
        """Where it lies."""
        return output / f"{self.task}-{self.rank}-{self.scaling}"


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
    answers: Sequence[Sequence[str]]


Results = dict[Run, Result]


def main() -> None:
    """Runs, reads and tells."""
    options = parse()
    runs = [
        Run(task, rank, scaling)
        for rank in options.ranks
        for task in options.tasks
        for scaling in SCALINGS
    ]
    found: Results = {}
    for run in runs:
        if not options.only_read:
            train(run, options)
        if (run.folder(options.output) / "report.md").exists():
            found[run] = read(run.folder(options.output))
            print(f"{run.task}, rank {run.rank}, {SCALINGS[run.scaling]}: {found[run]}", flush=True)
            save(options.output / "results.json", found)
    for task in options.tasks:
        print("", f"{task}: {TASKS[task]} --learning-rate {options.learning_rate:g}", sep="\n")
        print("", *align(table(found, task)), sep="\n")
    print("", *conclusions(found), sep="\n")


def parse() -> Any:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 32, 128])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--answers", type=int, default=0, help="rows to generate answers for")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune_ranks"))
    parser.add_argument("--only-read", action="store_true", help="tell of the runs that are done")
    options = parser.parse_args()
    options.output /= f"{options.learning_rate:g}"  # runs at another rate are other runs
    return options


def train(run: Run, options: Any) -> None:
    """Lets the program do one run, unless it is done."""
    folder = run.folder(options.output)
    if (folder / "report.md").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter(), processor()
    with (folder / "log.txt").open("ab") as log:
        subprocess.run(command(run, options), check=True, stdout=log, stderr=subprocess.STDOUT)
    spent = time.perf_counter() - started[0], processor() - started[1]
    (folder / "seconds.json").write_text(json.dumps(spent))


def command(run: Run, options: Any) -> list[str]:
    """The words of one run."""
    words = [sys.executable, str(PROGRAM), str(PROGRAM / f"{run.task}.yaml")]
    words += [*TASKS[run.task].split(), "--rank", str(run.rank)]
    words += ["--use-rslora" if run.scaling == "rslora" else "--no-use-rslora"]
    words += ["--learning-rate", str(options.learning_rate)]
    words += ["--eval-generate", str(options.answers), "--output", str(run.folder(options.output))]
    return [*words, *ALIKE.split()]


def processor() -> float:
    """Seconds that children that have ended spent on processors."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def read(folder: Path) -> Result:
    """What one run wrote."""
    first, *_, last = evaluation.read(folder)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    held = last.held
    return Result(
        first.held.loss,
        held.loss,
        held.token_accuracy,
        held.exact_match,
        losses[0],
        losses[-1],
        tuple(json.loads((folder / "seconds.json").read_text())),
        last.answers,
    )


def save(path: Path, found: Results) -> None:
    """Writes everything as JSON."""
    rows = [run._asdict() | result._asdict() for run, result in found.items()]
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"cores": os.cpu_count(), "runs": rows}, indent=1))


def table(found: Results, task: str) -> list[list[str]]:
    """A row for each rank and scaling."""
    rows = [["rank", "scale", "held-out loss: before", "after", "tokens right", "rows right"]]
    rows[0] += ["loss of the last step", "processor"]
    for run, result in sorted(found.items()):
        if run.task == task:
            rows.append([str(run.rank), SCALINGS[run.scaling], *cells(result)])
    return rows


def cells(result: Result) -> Iterator[str]:
    """The numbers of one run as text."""
    yield from (f"{result.before:.3f}", f"{result.after:.3f}")
    yield from (f"{result.accuracy:.1%}", f"{result.exact:.1%}", f"{result.last:.3f}")
    yield f"{result.seconds[1]:.0f} s"


def conclusions(found: Results) -> Iterator[str]:
    """Three lines, whatever the numbers say: on rank under each scaling, and on the scalings."""
    ranks = sorted({run.rank for run in found})
    low, high = ranks[0], ranks[-1]
    for scaling, rule in SCALINGS.items():
        pairs = {task: [Run(task, rank, scaling) for rank in (low, high)] for task in TASKS}
        yield f"{rule}, from rank {low} to rank {high}: {changes(found, pairs)}"
    pairs = {task: [Run(task, high, scaling) for scaling in ("lora", "rslora")] for task in TASKS}
    yield f"rank {high}, from alpha/r to alpha/sqrt(r): {changes(found, pairs)}"


def changes(found: Results, pairs: dict[str, list[Run]]) -> str:
    """How the held-out numbers differ between two runs, for each task that has both."""
    told = {
        task: [found[run] for run in pair] for task, pair in pairs.items() if {*pair} <= {*found}
    }
    return "; ".join(f"{task} {change(*pair)}" for task, pair in told.items()) + "."


def change(old: Result, new: Result) -> str:
    """In words: held-out loss and rows right of two runs."""
    apart = new.after - old.after
    word = "stays" if abs(apart) < SAME else "rises" if apart > 0 else "falls"
    said = f"loss {word}, {old.after:.3f} to {new.after:.3f}"
    if max(old.exact, new.exact) == 0:
        return said
    return f"{said}, and rows right go from {old.exact:.0%} to {new.exact:.0%}"


if __name__ == "__main__":
    main()
