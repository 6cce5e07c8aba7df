"""Program: from a command line to a fine-tuned model, or to one line about what is wrong."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

import rslora_jax as rl
from finetune import beginning, corpus, flags, job, report
from finetune.batches import Batches
from finetune.complaints import EXPECTED, complaint
from finetune.corpus import Corpus
from finetune.dryrun import dry_run
from finetune.examination import Examination
from finetune.exports import export
from finetune.journal import Journal
from finetune.memory import give_back
from finetune.model import dtype_of
from finetune.planning import mesh_axes, plan
from finetune.settings import ConfigError, Settings
from finetune.settling import on_mesh
from finetune.training import train
from hosts import connect, leaving_nobody_waiting, mesh_of, say
from pretrained import open_model
from session import Phases

SAVED_AT_NOTICE = 128 + 15  # as shells report a SIGTERM


class Data(NamedTuple):
    """What is read before anything is loaded.

    Attributes:
      source: the model, of which only the headers were read.
      rows: to learn from and to evaluate on.
      batches: the order of the rows.
    """

    source: Any
    rows: Corpus
    batches: Batches


def meet() -> None:
    """Finds the other processes: as JAX does, or as the environment says."""
    address, count, number = (
        os.environ.get(f"JAX_{name}")
        for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    )
    connect(address, int(count or 1), int(number or 0))


def main(argv: Sequence[str], meet: Callable[[], None] = meet) -> int:
    """Runs a command line.

    Args:
      argv: its words, without the program's name.
      meet: finds the other processes.

    Returns:
      The exit code: 0 if all was done; 2 if the settings are wrong and 1 if anything else is;
      143 after a SIGTERM, at which the state was saved.
    """
    with leaving_nobody_waiting(EXPECTED):
        try:
            return run(flags.parse(argv), meet)
        except EXPECTED as error:
            print(complaint(error), file=sys.stderr, flush=True)
            code = 2 if isinstance(error, ConfigError) else 1
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            os._exit(code)  # the others may wait for this one
        return code


def run(parsed: flags.Parsed, meet: Callable[[], None]) -> int:
    """Plans, or says what would be done, or does it."""
    asked = parsed.settings
    if asked.plan is not None:
        axes = mesh_axes(asked)
        plan(settled(parsed, axes, "tpu"), axes)
        return 0
    meet()
    mesh = mesh_for(asked)
    settings = settled(parsed, mesh.shape, mesh.devices.flat[0].platform)
    phases = Phases()
    with phases("read"):
        data = read(settings)
    settings = job.per_step(settings, data.batches)
    with jax.set_mesh(mesh):
        if settings.dry_run:
            dry_run(settings, *data, mesh)
            return 0
        return fine_tune(settings, data, mesh, phases)


def mesh_for(settings: Settings) -> Mesh:
    """The mesh that was asked for.

    Raises:
      ConfigError: if its axes do not make up the devices.
    """
    try:
        return mesh_of(settings.data, settings.fsdp, settings.tensor)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def settled(parsed: flags.Parsed, axes: Mapping[str, int], platform: str) -> Settings:
    """What was asked, on a mesh; a dry run tells it."""
    settings = on_mesh(parsed.settings, axes, platform)
    if settings.dry_run:
        say(f"{flags.describe(parsed._replace(settings=settings))}\n")
    return settings


def read(settings: Settings) -> Data:
    """The headers of the model, and the data."""
    source = open_model(settings.model, dtype_of(settings))
    rows = corpus.read(settings, source)
    return Data(source, rows, corpus.batches_of(settings, rows))


def fine_tune(settings: Settings, data: Data, mesh: Mesh, phases: Phases) -> int:
    """Loads, trains, exports and reports, also of a run whose export fails."""
    beginning.refuse_another_run(settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    beginning.keep(settings.output, data.rows.now)
    say(f"loading {settings.model}, and compiling a step")
    with phases("load"):
        made = job.make(settings, data.source, data.batches, mesh)
    say(f"{rl.describe(made.adapted.sites)}\n{data.batches.stats}\n{data.rows.describe()}")
    say(f"{data.batches.steps} steps; the first one is compiled first")
    with phases("train"), open_journal(settings, data, made, mesh) as journal:
        ended = train(made, settings, journal)
    if not ended.done:
        say(f"stopped by a notice; step {ended.state.step} is saved, run it again to go on")
        return SAVED_AT_NOTICE
    files: dict[str, str] = {}
    try:
        with phases("export"):
            files |= export(
                settings,
                data.source,
                rl.LoraParams(made.base, ended.state.lora),
                made.adapted.sites,
            )
    finally:
        made = made._replace(base=None)  # its memory: drawing the report takes some
        give_back()
        facts = facts_of(data, made, journal, phases, files)
        path = report.write(settings.output, settings, facts, journal.rows, journal.evaluations)
    say(f"done in {sum(phases.seconds.values()):.0f} s: {path}")
    return 0


def open_journal(settings: Settings, data: Data, made: job.Job, mesh: Mesh) -> Journal:
    """The journal of a run, with evaluations if rows are held out."""
    examine = None
    if data.rows.held:
        examine = Examination(settings, data.source, data.rows, made.adapted, mesh)
    schedule = job.schedule(settings, data.batches)
    return Journal(settings, data.batches.steps, schedule, examine)


def facts_of(
    data: Data, made: job.Job, journal: Journal, phases: Phases, files: dict[str, str]
) -> report.Facts:
    """What the report tells beside settings and metrics."""
    stats = {name.replace("_", " "): value for name, value in data.batches.stats._asdict().items()}
    stats |= {"held-out rows": len(data.rows.held), "held-out rows cut": data.rows.cut}
    stats["bad lines left out"] = len(data.rows.skipped)
    return report.Facts(
        sites=rl.describe(made.adapted.sites),
        data=stats,
        seconds=phases.seconds,
        speed={"tokens per second": journal.tokens_per_second, "devices": jax.device_count()},
        warnings=[*data.rows.skipped[:20], *journal.warnings],
        files=files,
        ended=f"All {data.batches.steps} steps are done.",
    )
