"""Patterns: ordered `(regex, value)` pairs on paths, of which the first match wins."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from rslora_jax.paths import AdapterError, nearest

__all__ = ["Pairs", "are_pairs", "check_pairs", "first_match"]

Pairs: TypeAlias = Sequence[tuple[str, Any]]


def are_pairs(value: Any) -> bool:
    """Whether a value is a list of pairs that each start with a pattern."""
    if type(value) not in (list, tuple) or not value:
        return False
    return all(type(pair) in (list, tuple) and _is_pair(pair) for pair in value)


def first_match(pairs: Pairs, path: str, default: Any = None) -> Any:
    """The value of the first pair whose pattern matches the whole path.

    Example:
      >>> first_match([(".*/q", 1), (".*", 2)], "layers/k")
      2
    """
    return next((value for regex, value in pairs if re.fullmatch(regex, path)), default)


def check_pairs(pairs: Pairs, paths: Iterable[str] | None, what: str) -> None:
    """Refuses what is no regex and, where all paths are known, what matches none of them.

    Args:
      pairs: the pairs.
      paths: every path that could be meant, or None where only some are known.
      what: what the pairs are, for the message.

    Raises:
      AdapterError: with the pattern and the nearest paths.
    """
    for regex, _ in pairs:
        _check_regex(regex, what)
    known = None if paths is None else list(paths)
    for regex, _ in pairs if known is not None else ():
        if not any(re.fullmatch(regex, path) for path in known or ()):
            raise AdapterError(
                f"The {what} for {regex!r} matches nothing; the pattern is a regex that must "
                f"match a whole path. The nearest are {nearest(regex, known or ())}. Correct it "
                "or leave it out."
            )


def _is_pair(pair: Sequence[Any]) -> bool:
    return len(pair) == 2 and isinstance(pair[0], str)


def _check_regex(regex: str, what: str) -> None:
    try:
        re.compile(regex)
    except re.error as error:
        raise AdapterError(
            f"The {what} has the pattern {regex!r}, which is no regular expression: {error}."
        ) from error
