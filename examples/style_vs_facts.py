"""What does a higher rank buy? Style and facts, LoRA and rsLoRA, on a network trained here.

A tiny Llama learns facts in two registers. Then adapters of several ranks teach it to speak
in the other register (style), or a relation of 1024 random bits (facts), scaled by alpha/r or
alpha/sqrt(r), with Adam and with SGD; all runs of a lesson and an optimizer are one compilation.
Last, every entry of the same matrices is trained, and the change is cut to rank r.

The seeds are those of the adapters; the network and the order of the data are the same for all.
Each optimizer has one learning rate for all ranks, and what is found depends on it: try
`--adam 3e-3`, which closes most of the gap between LoRA and rsLoRA on facts.
"""

import sys

from session import Phases, exit_on_interrupt

if __name__ == "__main__":  # before the slow imports: Ctrl-C is one line from the start
    exit_on_interrupt("Interrupted: no file is left half-written.")

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from rich.console import Console

import rslora_jax as rl
from grids import by_rank, by_truncation
from lessons import OPTIMIZERS, Course, adapt, sweep, truncate
from panels import ASKED, draw
from panels import OPTIMIZERS as TITLES
from readings import (
    Curve,
    accuracy_sentence,
    curves,
    late_sentence,
    onset_sentence,
    truncation_sentence,
)
from registers import PLAIN, STYLED, facts_lesson, known, pretraining, style_lesson
from rslora_jax.tables import Table
from tiny import accuracy, predict, pretrain

TARGET = 0.99  # of pretraining, in both registers
NOISE = 64  # rows of the second relation in each step of pretraining


@dataclasses.dataclass(frozen=True)
class Options:
    """Style and facts, over ranks and scalings, on a tiny transformer."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Ranks of the adapters, increasing."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the adapters."""
    alpha: float = 16.0
    """Numerator of the scales alpha/r and alpha/sqrt(r)."""
    steps: int = 300
    """Steps of the facts; the style takes a third."""
    batch: int = 64
    """Facts per step; the style takes half."""
    adam: float = 1e-3
    """Learning rate of Adam, at every rank and in full tuning."""
    sgd: float = 0.03
    """Learning rate of SGD, at every rank."""
    pretraining: int = 200
    """Steps that teach the network the world."""
    world: int = 0
    """Seed of the world, of the network and of the order of the data."""
    output: Path = Path("outputs/style_vs_facts.png")
    """Where to write the figure, a .png file; every run goes into a .csv file beside it."""


class Findings(NamedTuple):
    """Everything measured.

    Attributes:
      known: accuracy of the pretrained network, plain and styled.
      runs: one row a run, as `lessons.sweep` gives them.
      truncated: by lesson, as `lessons.truncate` gives them.
    """

    known: tuple[float, float]
    runs: Table
    truncated: dict[str, Table]


def main() -> None:
    """Run with the flags of the command line."""
    options = tyro.cli(Options)
    try:
        prepare(options)
        run(options)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def prepare(options: Options) -> None:
    """Refuse now what would fail later, and make the folder of the figure.

    Raises:
      ValueError: if a number is out of range, or the figure is no .png file.
    """
    for name in ("steps", "batch", "adam", "sgd", "pretraining", "alpha"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} must be above 0, found {getattr(options, name)}")
    for name, least in (("ranks", 1), ("seeds", 0)):
        values = getattr(options, name)
        if not values or min(values) < least or list(values) != sorted(set(values)):
            raise ValueError(f"{name} must rise, from {least} or more; found {values}")
    if len(options.ranks) < 2:
        raise ValueError(f"ranks must be two or more to be compared, found {options.ranks}")
    if options.world < 0:
        raise ValueError(f"world must be 0 or more, found {options.world}")
    if options.output.suffix != ".png":
        raise ValueError(f"output must be a .png file, found {options.output}")
    options.output.parent.mkdir(parents=True, exist_ok=True)


def run(options: Options) -> Findings:
    """Pretrain, teach, truncate; print the tables and the sentences, write the files.

    Raises:
      ValueError: if the network does not learn the world.
    """
    console, phase = Console(), Phases()
    with phase("pretrain"), console.status("Teaching the network the world"):
        base = pretrain(pretraining(options.pretraining, NOISE, options.world), options.world)
        found = tuple(recall(base, register, options.world) for register in (PLAIN, STYLED))
    if min(found) < TARGET:
        raise ValueError(
            f"Pretraining reached {min(found):.0%} of the facts, below {TARGET:.0%}: without a "
            f"network that knows them there is nothing to tune. Give it more than "
            f"{options.pretraining} steps of pretraining."
        )
    adapted = adapt(base, max(options.ranks), options.alpha)
    rows, cut = [], {}
    for course in courses(options):
        name = course.lesson.name
        for optimizer in OPTIMIZERS:
            with phase(f"{name} {optimizer}"), console.status(f"{name}, {TITLES[optimizer]}"):
                rows += taught(adapted, course, optimizer, options).records()
        with phase(f"{name} in full"), console.status(f"{name}, every entry"):
            cut[name] = truncate(adapted, course, options.adam)
    findings = Findings((found[0], found[1]), Table.of(rows), cut)
    with phase("files"):
        draw(findings.runs, findings.truncated, options.output)
        findings.runs.to_csv(options.output.with_suffix(".csv"))
    show(console, findings, options)
    console.print(f"figure: {options.output}\n{phase}", soft_wrap=True, highlight=False)
    return findings


def recall(base: Any, register: int, seed: int) -> float:
    """How much of the first relation the network knows in a register."""
    prompts = known(register, seed)
    return float(accuracy(jax.jit(predict)(base, prompts.tokens), prompts.answers))


def courses(options: Options) -> list[Course]:
    """Facts, and style in a third of the steps with half of the batch."""
    seed = options.world
    facts = Course.of(facts_lesson(seed), options.steps, options.batch, seed)
    few = max(1, options.steps // 3), max(1, options.batch // 2)
    return [facts, Course.of(style_lesson(seed), *few, seed)]


def taught(adapted: rl.Adapted, course: Course, optimizer: str, options: Options) -> Table:
    """Every rank, scaling and seed of one lesson with one optimizer."""
    learning_rate = getattr(options, optimizer)
    return sweep(adapted, course, optimizer, learning_rate, options.ranks, options.seeds)


def show(console: Console, findings: Findings, options: Options) -> None:
    """Prints the tables, and below them the sentences."""
    plain, styled = findings.known
    console.print(f"pretrained: {plain:.0%} of the facts plainly, {styled:.0%} in style")
    spread = f"mean ± deviation, {len(options.seeds)} seeds"
    titles = {
        "accuracy": f"Accuracy in percent; {spread}",
        "onset": f"|grad| at the first step; {spread}",
        "late": f"|grad|, median of the last fifth of the steps; {spread}",
    }
    for quantity, title in titles.items():
        console.print(by_rank(findings.runs, quantity, title), "")
    console.print(by_truncation(findings.truncated), "")
    for sentence in sentences(findings):
        console.print(f"- {sentence}", highlight=False)


def sentences(findings: Findings) -> list[str]:
    """What each curve supports, in the order of the tables."""
    pairs = [(lesson, optimizer) for lesson in ASKED for optimizer in TITLES]

    def found(lesson: str, optimizer: str, quantity: str) -> dict[str, Curve]:
        return curves(findings.runs, lesson, optimizer, quantity)

    return [
        *(accuracy_sentence(f"{ASKED[k]}, {TITLES[o]}", found(k, o, "accuracy")) for k, o in pairs),
        *(onset_sentence(f"{k}, first step", found(k, "adam", "onset")) for k in ASKED),
        *(late_sentence(f"{k}, {TITLES[o]}, last steps", found(k, o, "late")) for k, o in pairs),
        truncation_sentence(findings.truncated),
    ]


if __name__ == "__main__":
    main()
