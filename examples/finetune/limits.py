"""Limits: what types and ranges the settings may have, said in words."""

import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from finetune.yaml_file import ConfigError


class Limit(NamedTuple):
    """What a number must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _at_least(least: float) -> Limit:
    return Limit(f"at least {least}", lambda value: value >= least)


ABOVE_ZERO = Limit("above 0", lambda value: value > 0)
LIMITS: Mapping[str, Limit] = {
    **dict.fromkeys(("alpha", "alpha_pattern", "lora_plus_ratio"), ABOVE_ZERO),
    **dict.fromkeys(("epochs", "learning_rate"), ABOVE_ZERO),
    **dict.fromkeys(("rank", "rank_pattern", "steps", "accumulation"), _at_least(1)),
    **dict.fromkeys(("batch", "batch_per_device"), _at_least(1)),
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch", "save_every"), _at_least(1)),
    **dict.fromkeys(("logits_mb", "eval_rows", "keep_last"), _at_least(1)),
    **dict.fromkeys(("data", "fsdp", "tensor"), _at_least(1)),
    **dict.fromkeys(("warmup_steps", "weight_decay", "clip", "save_minutes"), _at_least(0)),
    **dict.fromkeys(("eval_every", "eval_generate"), _at_least(0)),
    "length": _at_least(2),
    "eval_fraction": Limit("from 0 to below 1", lambda value: 0 <= value < 1),
    "warmup": Limit("from 0 to 1, a share of the steps", lambda value: 0 <= value <= 1),
    "seed": Limit("from 0 to 4294967295", lambda value: 0 <= value < 2**32),
}
WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}


def check_limit(name: str, value: Any) -> None:
    """Refuses a value, or one in a mapping, that is out of the range of the field `name`.

    Raises:
      ConfigError: with the range and the value.
    """
    limit = LIMITS.get(name)
    for number in value.values() if isinstance(value, dict) else (value,):
        if limit is not None and number is not None and not limit.holds(number):
            raise ConfigError(f"must be {limit.words}, found {number}")


def typed(value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` says; whole numbers pass as numbers, lists as tuples.

    Raises:
      ConfigError: if it is of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else typed(value, args[0])
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(typed(item, args[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: typed(item, args[1]) for key, item in value.items()}
    if not _fits(value, hint):
        one_of = f"one of {', '.join(map(str, args))}" if origin is Literal else ""
        raise ConfigError(f"must be {one_of or WORDS.get(hint, hint)}, found {value!r}")
    return value if origin is Literal else hint(value)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is Path:
        return isinstance(value, str | Path)
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    args = typing.get_args(hint)
    return value in args if args else isinstance(value, hint)
