"""Beginning: when a run was first started, which chat templates that name the day keep naming."""

import datetime
from pathlib import Path

import jax

from finetune.processes import first_tells
from finetune.settings import ConfigError
from rslora_jax.files import whole_file

STARTED = "started"
"""The file that holds the time."""


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
