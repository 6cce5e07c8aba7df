"""Caching: answers of the compiler on the disk, so that a second identical plan is instant.

JAX's own compilation cache does not serve: it writes the executable, and a process without a TPU
cannot read it back ("PjRtCompiler must be constructed with a Client", jax 0.10.2 and 0.12.0).
"""

import gzip
import hashlib
import json
import os
import secrets
import zlib
from pathlib import Path
from typing import Any

from rslora_jax.files import whole_file

__all__ = ["folder", "keep", "kept", "key"]

FORMAT = 1


def folder(cache: bool | str | os.PathLike[str]) -> Path | None:
    """The folder of the answers.

    Args:
      cache: a path; True for ``$XDG_CACHE_HOME/rslora_jax/plans``, or that in ``~/.cache``; False
        for none.

    Example:
      >>> folder("plans").name, folder(False)
      ('plans', None)
    """
    if cache is True:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(home).expanduser() / "rslora_jax" / "plans"
    return None if cache is False else Path(cache)


def key(*parts: Any) -> str:
    """Names an answer by everything that it depends on.

    Example:
      >>> key("program", {"jax": "0.10.2"}) == key("program", {"jax": "0.12.0"})
      False
    """
    text = json.dumps([FORMAT, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def keep(where: Path, name: str, answer: dict[str, Any]) -> None:
    """Writes an answer; where that cannot be done, the plan is simply made again next time."""
    data = gzip.compress(json.dumps({"key": name, "answer": answer}).encode(), compresslevel=3)
    try:
        where.mkdir(parents=True, exist_ok=True)
        # Two plans at once may write the same answer, each from a thread of one process.
        own = where / f"{name}-{secrets.token_hex(4)}.gz"
        with whole_file(own) as temporary:
            temporary.write_bytes(data)
        os.replace(own, _file(where, name))
    except OSError:
        return


def kept(where: Path, name: str) -> dict[str, Any] | None:
    """Reads an answer; None if there is none or it is damaged."""
    try:
        found = json.loads(gzip.decompress(_file(where, name).read_bytes()))
        return found["answer"] if found["key"] == name else None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error):
        return None


def _file(where: Path, name: str) -> Path:
    return where / f"{name}.json.gz"
