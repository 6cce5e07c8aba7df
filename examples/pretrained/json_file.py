"""JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from pretrained.errors import ModelError


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ModelError: it is missing, or holds something else.
    """
    try:
        said = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file.name} is missing") from error
    except ValueError as error:
        raise ModelError(f"{file.name} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise ModelError(f"{file.name} must hold an object, found {type(said).__name__}")
    return said


def read_if_there(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file."""
    return read_json(file) if file.is_file() else {}
