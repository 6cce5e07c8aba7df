"""Studies: a model and its data, named on the command line as ``FILE.py:FUNCTION``."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError, nearest
from rslora_jax.sites import Site

__all__ = ["Study", "find_study"]


class Study(NamedTuple):
    """What a rank sweep trains: the first four arguments of `rank_sweep`.

    Attributes:
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      base: the frozen tree.
      sites: the sites, adapted at the rank that was asked for.
      batches: a list of batches, or a pytree with a leading [steps] axis.
    """

    loss_fn: Callable[[LoraParams, Any], Any]
    base: Any
    sites: Sequence[Site]
    batches: Any


def find_study(name: str) -> Callable[[int], Study]:
    """The function behind ``FILE.py:FUNCTION``, which makes a `Study` for a rank.

    The file is run, as `python FILE.py` would, with its folder on the import path.

    Args:
      name: a path to a Python file, a colon, and the name of a function
        ``function(rank: int) -> (loss_fn, base, sites, batches)``.

    Raises:
      AdapterError: if there is no such file or function, with those that there are.

    Example:
      >>> find_study("missing.py:tiny")
      Traceback (most recent call last):
      ...
      rslora_jax.paths.AdapterError: There is no file 'missing.py'. Name a Python file and ...
    """
    file, _, function = name.rpartition(":") if ":" in name else (name, "", "")
    path = Path(file)
    if not path.is_file():
        raise AdapterError(
            f"There is no file {file!r}. Name a Python file and a function in it, such as "
            "examples/models.py:tiny."
        )
    module = _imported(path)
    known = {
        each: found
        for each, found in vars(module).items()
        if inspect.isfunction(found) and found.__module__ == module.__name__ and each[0] != "_"
    }
    if function not in known:
        raise AdapterError(
            f"{file} has no function {function!r}. The nearest are {nearest(function, known)}: "
            f"ask for {file}:FUNCTION."
        )
    return lambda rank: _checked(name, known[function](rank))


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise AdapterError(f"{path} is no Python file. Name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise AdapterError(f"{path} cannot be imported: {error}.") from error
    return module


def _checked(name: str, made: Any) -> Study:
    if not isinstance(made, tuple) or len(made) != len(Study._fields):
        raise AdapterError(
            f"{name} must return (loss_fn, base, sites, batches), found {type(made).__name__}"
            f"{f' of {len(made)}' if isinstance(made, tuple) else ''}."
        )
    return Study(*made)
