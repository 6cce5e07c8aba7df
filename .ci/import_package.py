"""Import every module of `rslora_jax` as a user without the extras would."""

import importlib
import pkgutil
import sys
from pathlib import Path

# Modules that only the extras bring. Rich is missing here: Flax itself depends on it.
OPTIONAL = [
    *("gguf", "tokenizers", "tyro", "matplotlib", "safetensors", "pandas"),
    *("pytest", "hypothesis", "equinox", "haiku"),
]


def main(folder: str) -> None:
    """Import the package that was installed into `folder`."""
    for name in OPTIONAL:
        sys.modules[name] = None  # an import of it raises ImportError
    package = importlib.import_module("rslora_jax")
    if not Path(str(package.__file__)).is_relative_to(folder):
        sys.exit(f"imported {package.__file__}, which is not in {folder}")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "rslora_jax.")]
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    print(f"imported rslora_jax and {len(names)} modules without the extras")


if __name__ == "__main__":
    main(*sys.argv[1:])
