"""Files: what is written appears whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` that becomes `path` only if the block succeeds.

    Args:
      path: the file to write; its folder must exist.

    Yields:
      The temporary path, with the same ending.

    Raises:
      OSError: if the file cannot be written; `path` is then as it was before.

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
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
