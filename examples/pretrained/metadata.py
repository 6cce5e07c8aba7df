"""Metadata: the named values of a GGUF file."""

from collections.abc import Sequence
from typing import Any

import gguf

from pretrained.errors import ModelError


class Metadata:
    """The named values of a GGUF file."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._reader = reader

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or `default` if there is none."""
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def __getitem__(self, name: str) -> Any:
        """A value.

        Raises:
          ModelError: there is none.
        """
        value = self.get(name)
        if value is None:
            raise ModelError(
                f"the metadata lacks {name!r}: convert the model again, or use its folder of "
                "Hugging Face"
            )
        return value

    def expect(self, name: str, supported: Sequence[str]) -> str:
        """A value that must be one of some.

        Raises:
          ModelError: it is another.
        """
        if (found := self[name]) not in supported:
            raise ModelError(f"{name} is {found!r}; supported are {', '.join(supported)}")
        return found
