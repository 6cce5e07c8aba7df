"""Beginning: what a run was started with, and when, which dated chat templates keep naming."""

import datetime
from pathlib import Path

import jax
import yaml

from finetune.job import EXACT
from finetune.processes import first_tells
from finetune.settings import ConfigError, Settings
from rslora_jax.files import whole_file

STARTED = "started"
"""The file that holds the time."""

SETTINGS = "settings.yaml"
"""The file that holds the settings as resolved."""

SAME = (
    *("model", "rank", "alpha", "use_rslora", "targets", "rank_pattern", "alpha_pattern"),
    *("quant_bits", "quant_format"),
)
"""Settings that make the model and its adapters, which a checkpoint fits or does not."""


def refuse_another_run(settings: Settings) -> None:
    """Says before anything is loaded that the folder holds checkpoints of another run.

    Raises:
      ConfigError: if it does.
    """
    path = settings.output / SETTINGS
    if not path.is_file() or not any((settings.output / "checkpoints").glob("*")):
        return
    found, wanted = yaml.safe_load(path.read_text()), settings.to_dict()
    until = "epochs" if settings.steps is None else "steps"
    pairs = [
        f"{name} {found.get(name)} there, {wanted.get(name)} now"
        for name in (*SAME, *EXACT, until)
        if found.get(name) != wanted.get(name)
    ]
    if pairs:
        raise ConfigError(
            f"{settings.output} holds checkpoints of another run: {', '.join(pairs)}. Use the "
            "settings of that run, or another output."
        )


def beginning(output: Path) -> datetime.datetime:
    """The time that the run in this folder keeps, or the time now; process 0 decides.

    Raises:
      ConfigError: if the file holds no time.
    """
    path = output / STARTED
    try:
        found = datetime.datetime.fromisoformat(path.read_text().strip())
    except FileNotFoundError:
        found = datetime.datetime.now()
    except ValueError as error:
        raise ConfigError(f"{path} must hold a time: {error}. Use another output.") from error
    return datetime.datetime(*first_tells(found.timetuple()[:6]))


def keep(output: Path, time: datetime.datetime) -> None:
    """Writes it down, so that the run reads the same texts on another day."""
    if jax.process_index() == 0:
        with whole_file(output / STARTED) as temporary:
            temporary.write_text(f"{time.isoformat()}\n")
