"""Measure: the commands that show what the scale does, in theory and on real models."""

from functools import partial
from pathlib import Path
from typing import Literal

import optax

from rslora_jax.analysis.articles.walkthrough import draw, sections
from rslora_jax.analysis.spectra.folders import compare_folders
from rslora_jax.analysis.spectra.spectrum_plot import plot_energy
from rslora_jax.analysis.sweeps import page
from rslora_jax.analysis.sweeps.advice import advice
from rslora_jax.analysis.sweeps.slopes import slopes
from rslora_jax.analysis.sweeps.studies import find_study
from rslora_jax.analysis.sweeps.sweep import Sweep, rank_sweep
from rslora_jax.analysis.sweeps.traces import ACTIVATIONS, QUANTITIES
from rslora_jax.paths import AdapterError
from rslora_jax.terminal import progress, show

__all__ = ["spectrum", "stability", "walkthrough"]


def walkthrough(output: Path = Path("outputs/walkthrough.png")) -> None:
    """Reproduce the popular simulation of style and facts, and correct it.

    Prints the published tables to the last digit, beside the numbers that say what they mean,
    then measures what the scale does to learning, and closes with a verdict on every claim.
    Draws the same as a figure: spectra, error by rank, scale by rank, captured energy.
    Everything is seeded: two runs print the same. Takes seconds; no GPU, no downloads.

    Args:
      output: The figure, a .png file. Its folder is made; an older file is replaced.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(output)
    for section in sections():
        show(section.table, section.title, section.note)
    print(f"figure: {output}")


def stability(  # noqa: PLR0913, PLR0917 - every flag is a choice of the experiment
    models: tuple[str, ...],
    /,
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64),
    scalings: tuple[Literal["lora", "rslora"], ...] = ("lora", "rslora"),
    optimizer: Literal["adam", "adamw", "sgd"] = "adam",
    learning_rates: tuple[float, ...] = (1e-3,),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 10,
    html: Path | None = None,
    csv: Path | None = None,
) -> None:
    """Measure how gradients, updates and losses depend on the rank, on real models.

    Trains adapters of every rank, scaling, seed and learning rate in one compilation, and
    fits the slope of log(quantity) against log(rank): 0 is rank-stable, below it the quantity
    collapses, above it it explodes. Beside each slope stands what the theory says.

    Args:
      models: What to train: FILE.py:FUNCTION, where FUNCTION(rank) returns (loss_fn, base,
        sites, batches) with adapters of that rank. Try examples/models.py:tiny.
      ranks: Ranks of the adapters, increasing.
      scalings: lora is alpha/r, rslora is alpha/sqrt(r).
      optimizer: The optimizer.
      learning_rates: Learning rates, each for all ranks.
      seeds: Seeds of the adapters: with one seed the slopes have no standard errors.
      steps: Steps of training, no more than the model brings batches.
      html: Write a page with figures, slopes and advice here; with several models, one each.
      csv: Write every step of every run here; with several models, one file each.
    """
    if not models:
        raise AdapterError(
            "stability needs a model: FILE.py:FUNCTION, such as examples/models.py:tiny."
        )
    if len(ranks) < 2:
        raise AdapterError(f"stability compares ranks: name two or more, found {ranks}.")
    for name in models:
        study = find_study(name)(max(ranks, default=1))
        sweep = rank_sweep(
            *study,
            steps=steps,
            ranks=ranks,
            scalings=scalings,
            optimizer=getattr(optax, optimizer),
            learning_rates=learning_rates,
            seeds=seeds,
            quantities=(*QUANTITIES, *ACTIVATIONS),
        )
        print(f"{name}: {len(sweep.runs)} runs of {sweep.steps} steps; {sweep.budget}\n")
        show(slopes(sweep), f"{name}: slopes of log(quantity) against log(rank)")
        for scaling, sentences in advice(sweep).items():
            print(f"{scaling}: {sentences}\n")
        if sweep.failures.rows:
            show(sweep.failures, "Runs with values that are not finite")
        for path, write in ((html, partial(page.write, title=name)), (csv, _write_steps)):
            if path is not None:
                written = path if len(models) == 1 else _named(path, name)
                written.parent.mkdir(parents=True, exist_ok=True)
                write(written, sweep)
                print(f"written: {written}")


def spectrum(
    base: Path,
    tuned: Path,
    /,
    k: int = 64,
    plot: Path = Path("outputs/spectrum.png"),
    csv: Path | None = None,
) -> None:
    """Read what a full fine-tune changed: its rank, matrix by matrix.

    BASE and TUNED are folders with safetensors weights of one model, before and after. The
    matrices are read one pair at a time. Energy is the share of the squared change that the
    best adapter of a rank can hold; it is a hint, and no measure of what the model can do.

    Args:
      base: The folder of the model before.
      tuned: The folder of the model after.
      k: How many singular values of each matrix.
      plot: A figure of the energy captured by rank, a .png file.
      csv: Write the effective ranks of every matrix here.
    """
    with progress("spectrum") as report:
        found = compare_folders(base, tuned, k, progress=report)
    show(found.energy(), "Energy captured by rank")
    show(found.ranks(), "Effective ranks")
    plot.parent.mkdir(parents=True, exist_ok=True)
    plot_energy(found, plot)
    print(f"figure: {plot}")
    if csv is not None:
        csv.parent.mkdir(parents=True, exist_ok=True)
        found.ranks().to_csv(csv)
        print(f"written: {csv}")


def _write_steps(path: Path, sweep: Sweep) -> None:
    sweep.table().to_csv(path)


def _named(path: Path, model: str) -> Path:
    return path.with_stem(f"{path.stem}-{model.rpartition(':')[2]}")
