"""Files: what is written appears whole or not at all, and JSON is read strictly."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from rslora_jax.paths import AdapterError

__all__ = ["read_json", "whole_file", "whole_folder"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` that becomes `path` only if the block succeeds.

    Args:
      path: the file to write; its folder must exist.

    Yields:
      The temporary path, with the same ending.

    Raises:
      OSError: if the file cannot be written, with its name; `path` is then as it was before.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     target = Path(folder, "losses.csv")
      ...     with whole_file(target) as temporary:
      ...         _ = temporary.write_text("step,loss")
      ...     [file.name for file in Path(folder).iterdir()]
      ['losses.csv']
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")
    try:
        with _named(target):
            yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that becomes `path` only if the block succeeds.

    Args:
      path: the folder to write, and what is missing around it. A symbolic link is followed.
      overwrite: True replaces a folder that is there: the old one stays until the new one is
        whole and on the disk, and comes back if the last rename fails.

    Yields:
      The temporary folder, empty.

    Raises:
      AdapterError: if `path` exists and `overwrite` is False, or if it is a file. Nothing is
        written then.
      OSError: if something cannot be written, with its name or the folder's; `path` is then as
        it was before.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with whole_folder(Path(folder, "adapter")) as temporary:
      ...         _ = (temporary / "config.json").write_text("{}")
      ...     [str(file.relative_to(folder)) for file in Path(folder).rglob("*.json")]
      ['adapter/config.json']
    """
    target = Path(os.path.realpath(path))
    _check_target(target, overwrite)
    # The process id alone would let two threads, or a killed run's remains, collide.
    temporary = target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        with _named(target):
            yield temporary
        _sync(temporary)
        _check_target(target, overwrite)
        _put(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads one JSON file of UTF-8 text, with or without a byte order mark.

    Args:
      path: the file.

    Returns:
      What it holds.

    Raises:
      AdapterError: if it cannot be read, is not JSON, names a key twice, nests too deeply, or
        holds NaN or Infinity, which JSON does not have.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Path(folder, "config.json")
      ...     _ = file.write_text('{"r": 8, "r": 16}')
      ...     read_json(file)
      Traceback (most recent call last):
      ...
      rslora_jax.paths.AdapterError: ...config.json cannot be read as JSON: the key 'r' ...
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path} cannot be read as JSON: {error}. Write or download it again."
        ) from error


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Errors of the system name a file: those of writing to an open one do not say which."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_target(target: Path, overwrite: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        return
    if not target.is_dir():
        raise AdapterError(f"{target} is a file, where a folder is to be written. Rename one.")
    if not overwrite:
        raise AdapterError(
            f"{target} exists already and is left as it is. Pass overwrite=True to replace it, "
            "or write to another folder."
        )


def _sync(folder: Path) -> None:
    # A rename can reach the disk before the data does: after a power cut the folder would
    # be there with empty files in it.
    for root, _, names in os.walk(folder):
        for name in (*names, "."):
            _sync_one(Path(root, name))


def _sync_one(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(temporary: Path, target: Path) -> None:
    old = temporary.with_name(temporary.name + ".old")
    replaced = target.exists()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        if replaced:
            os.rename(old, target)
        raise
    _sync_one(target.parent)
    shutil.rmtree(old, ignore_errors=True)
