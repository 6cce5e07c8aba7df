"""Plain: JSON values that come back as they were, and text that is read strictly."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from rslora_jax.paths import AdapterError

__all__ = ["check_extra", "checksum", "parse", "short"]


def parse(text: str) -> Any:
    """Reads JSON text in which no key is twice and no number is NaN or infinite.

    Raises:
      AdapterError: if it is anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"The record is not JSON ({error}). It was cut short or damaged: restore another "
            "checkpoint."
        ) from error


def checksum(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of JSON values, in hex, whatever the order of their keys."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_extra(extra: Any) -> None:
    """Refuses what JSON would not give back as it was, with the name of its key.

    Raises:
      AdapterError: for keys that are no text, for values other than dict, list, str, int,
        finite float, bool and None, and for nesting deeper than 50.

    Example:
      >>> check_extra({"seed": 3, "losses": [0.5, 0.25]})
    """
    if not isinstance(extra, Mapping):
        raise AdapterError(f"extra must be a dict of JSON values, found {short(extra)}.")
    for key, value in extra.items():
        _check_json(key, "extra")
        _check_json(value, f"extra[{key!r}]")
        if not isinstance(key, str):
            raise AdapterError(f"The keys of extra must be text, found {key!r}.")


def _check_json(value: Any, name: str, depth: int = 0) -> None:
    kind = type(value)
    if depth > 50:
        raise AdapterError(f"{name[:60]}... is nested deeper than 50. Store something flatter.")
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise AdapterError(f"The keys of {name} must be text, found {key!r}.")
            _check_json(item, f"{name}[{key!r}]", depth + 1)
    elif kind is list:
        for k, item in enumerate(value):
            _check_json(item, f"{name}[{k}]", depth + 1)
    elif kind is float and not math.isfinite(value):
        raise AdapterError(f"{name} is {value}, which JSON cannot hold. Store it as text.")
    elif kind not in (str, int, float, bool, type(None)) or (kind is int and abs(value) >= 2**63):
        raise AdapterError(
            f"{name} is a {kind.__name__} ({short(value)}), which JSON would not give back as it "
            "is. Use dict, list, str, int, float, bool or None."
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key is there twice in {short([key for key, _ in pairs])}")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def short(value: Any) -> str:
    """The value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
