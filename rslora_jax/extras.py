"""Extras: packages that only some functions need, imported where they are used."""

import importlib
from typing import Any

from rslora_jax.paths import AdapterError

__all__ = ["extra"]


def extra(module: str, install: str, purpose: str) -> Any:
    """Imports a package that the library itself does not depend on.

    Args:
      module: the module to import.
      install: what pip is to install.
      purpose: what needs the module, for the message.

    Returns:
      The module.

    Raises:
      AdapterError: if it is not installed, with the command that installs it.

    Example:
      >>> extra("json", "json", "an example").__name__
      'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise AdapterError(
            f"{purpose} needs {package}, which cannot be imported ({error}). "
            f"Run `pip install '{install}'`."
        ) from error
