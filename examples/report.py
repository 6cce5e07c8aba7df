"""What a run shows its user: a progress bar, a table of before and after, a plot of the loss."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from facts import Fact
from rslora_jax.files import whole_file
from scores import Scores


def progress_bar() -> Progress:
    """A bar with the step, the loss and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )


def table(shown: Sequence[Fact], before: Scores, after: Scores) -> Table:
    """Before and after, side by side."""
    made = Table("", "before", "after")
    made.add_row("exact match", f"{before.exact:.0%}", f"{after.exact:.0%}")
    made.add_row("loss on the facts", f"{before.loss:.3f}", f"{after.loss:.3f}")
    made.add_row("loss on unrelated text", f"{before.unrelated:.3f}", f"{after.unrelated:.3f}")
    made.add_section()
    for fact, old, new in zip(shown, before.answers, after.answers, strict=True):
        made.add_row(f"{fact.prompt} (right:{fact.answer})", old.strip(), new.strip())
    return made


def plot(losses: list[float], path: Path) -> None:
    """Draw the loss of every step; the file appears whole or not at all."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Fifty atomic numbers, rsLoRA")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
