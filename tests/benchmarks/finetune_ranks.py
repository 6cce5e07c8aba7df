"""Facts and a style at three ranks and both scalings: the program in examples/finetune at work.

Every run is the program itself, one after the other, with each learning rate. A run that is done
is not done again, and one that was cut off goes on from its checkpoint.

    PYTHONPATH=. python tests/benchmarks/finetune_ranks.py [--ranks 4 32 128]
        [--learning-rates 5e-4 2e-3] [--output FOLDER] [--only-read]
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rslora_jax.files import whole_file
from rslora_jax.tables import align
from tests.benchmarks.program_runs import PROGRAM, Result, done, read, train

SCALINGS = {"rslora": "alpha/sqrt(r)", "lora": "alpha/r"}
TASKS = {
    "elements": "--steps 32 --batch 4 --length 64 --eval-rows 50",
    "devil": "--steps 10 --batch 3 --length 96 --eval-rows 40",
}
ALIKE = "--eval-every 0 --keep-last 1 --no-tensorboard --export"
SAME = 0.02  # nats: nearer losses than these are called the same


class Run(NamedTuple):
    """One run of the program."""

    task: str
    learning_rate: float
    rank: int
    scaling: str

    def folder(self, output: Path) -> Path:
        """Where it lies."""
        return output / f"{self.learning_rate:g}" / f"{self.task}-{self.rank}-{self.scaling}"

    def words(self, answers: int) -> list[str]:
        """Its command line, but for the output."""
        words = [str(PROGRAM / f"{self.task}.yaml"), *TASKS[self.task].split()]
        words += ["--rank", str(self.rank), "--learning-rate", str(self.learning_rate)]
        words += ["--use-rslora" if self.scaling == "rslora" else "--no-use-rslora"]
        return [*words, "--eval-generate", str(answers), *ALIKE.split()]


Results = dict[Run, Result]


def main() -> None:
    """Runs, reads and tells."""
    options = parse()
    found: Results = {}
    for run in runs_of(options):
        folder = run.folder(options.output)
        if not options.only_read:
            train(folder, run.words(options.answers))
        if done(folder):
            found[run] = read(folder)
            print(f"{run}: {found[run]}", flush=True)
            save(options.output / "results.json", found)
    for task in options.tasks:
        print("", f"{task}: {TASKS[task]}", "", *align(table(found, task)), sep="\n")
    for rate in options.learning_rates:
        print("", f"learning rate {rate:g}:", *conclusions(found, rate), sep="\n")


def parse() -> Any:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 32, 128])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-4, 2e-3])
    parser.add_argument("--answers", type=int, default=0, help="rows to generate answers for")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune_ranks"))
    parser.add_argument("--only-read", action="store_true", help="tell of the runs that are done")
    return parser.parse_args()


def runs_of(options: Any) -> Iterator[Run]:
    """All runs, those first that are compared with one another."""
    for task in options.tasks:
        for rate in options.learning_rates:
            for rank in options.ranks:
                for scaling in SCALINGS:
                    yield Run(task, rate, rank, scaling)


def save(path: Path, found: Results) -> None:
    """Writes everything as JSON."""
    rows = [run._asdict() | result._asdict() for run, result in found.items()]
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"cores": os.cpu_count(), "runs": rows}, indent=1))


def table(found: Results, task: str) -> list[list[str]]:
    """A row for each learning rate, rank and scaling."""
    rows = [["learning rate", "rank", "scale", "held-out loss: before", "after", "tokens right"]]
    rows[0] += ["rows right", "loss of the last step", "processor"]
    for run, result in sorted(found.items()):
        if run.task == task:
            rows.append([f"{run.learning_rate:g}", str(run.rank), SCALINGS[run.scaling]])
            rows[-1] += cells(result)
    return rows


def cells(result: Result) -> Iterator[str]:
    """The numbers of one run as text."""
    yield from (f"{result.before:.3f}", f"{result.after:.3f}")
    yield from (f"{result.accuracy:.1%}", f"{result.exact:.1%}", f"{result.last:.3f}")
    yield f"{result.seconds[1]:.0f} s"


def conclusions(found: Results, rate: float) -> Iterator[str]:
    """Three lines, whatever the numbers say: on rank under each scaling, and on the scalings."""
    here = {
        (run.task, run.rank, run.scaling): at
        for run, at in found.items()
        if run.learning_rate == rate
    }
    if not here:
        return
    ranks = [rank for _, rank, _ in here]
    low, high = min(ranks), max(ranks)
    for scaling, rule in SCALINGS.items():
        pairs = {task: ((task, low, scaling), (task, high, scaling)) for task in TASKS}
        yield f"{rule}, from rank {low} to rank {high}: {changes(here, pairs)}"
    pairs = {task: ((task, high, "lora"), (task, high, "rslora")) for task in TASKS}
    yield f"rank {high}, from alpha/r to alpha/sqrt(r): {changes(here, pairs)}"


def changes(found: Mapping[Any, Result], pairs: Mapping[str, Sequence[Any]]) -> str:
    """How the held-out numbers differ between two runs, for each task that has both."""
    both = {task: pair for task, pair in pairs.items() if {*pair} <= {*found}}
    told = (f"{task} {change(*(found[run] for run in pair))}" for task, pair in both.items())
    return "; ".join(told) + "."


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
