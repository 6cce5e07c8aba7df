"""Check that this environment is the stack it claims to be: check_versions.py PYTHON JAX."""

import platform
import sys
from importlib.metadata import version

from packaging.specifiers import SpecifierSet


def main(python: str, jax: str) -> None:
    """Compare the running Python with `python` and the installed JAX with the specifier `jax`."""
    found = {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "chex")}
    print("Python", platform.python_version(), *(f"{name} {v}" for name, v in found.items()))
    if platform.python_version() != python:
        sys.exit(f"the README's python3 is Python {platform.python_version()}, not {python}")
    if found["jax"] not in SpecifierSet(jax):
        sys.exit(f"pip chose jax {found['jax']}; this stack is jax{jax}")


if __name__ == "__main__":
    main(*sys.argv[1:])
