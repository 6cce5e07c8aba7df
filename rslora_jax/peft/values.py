"""Values: every setting of an ``adapter_config.json``, checked for its type and range."""

import math
from collections.abc import Mapping
from typing import Any

from rslora_jax.paths import AdapterError
from rslora_jax.peft.patterns import check_pattern

__all__ = ["checked"]

BIASES = ("none", "all", "lora_only")
FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")


def checked(name: str, value: Any) -> Any:
    """The value of a setting in its own type: lists as tuples, null patterns as none.

    Raises:
      AdapterError: if it is of another type or out of range, with the name and the value.

    Example:
      >>> checked("layers_to_transform", 3)
      (3,)
    """
    if name in FLAGS:
        return _flag(name, value)
    if name in ("rank_pattern", "alpha_pattern"):
        return _pattern_values(name, value)
    if name in ("target_modules", "exclude_modules"):
        if isinstance(value, str):
            check_pattern(value, name)
            return value
        return _names(name, value)
    if name in ("target_parameters", "modules_to_save", "layers_pattern"):
        found = _names(name, [value] if name == "layers_pattern" and value else value)
        for pattern in found or () if name != "target_parameters" else ():
            check_pattern(pattern, name, around=1)
        return found
    simple = {
        "r": _rank, "lora_alpha": _number, "lora_dropout": _number, "bias": _bias,
        "trainable_token_indices": _tokens, "layers_to_transform": _layers,
    }  # fmt: skip
    return simple[name](name, value) if name in simple else _text(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise AdapterError(f"{name} must be true or false, found {str(value)[:80]!r}.")
    return value


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise AdapterError(
            f"{name} must be a whole number of at least 1, the rank of the lora_A tensors, found "
            f"{str(value)[:80]!r}."
        )
    return value


def _number(name: str, value: Any) -> int | float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < 2**63 or not math.isfinite(value):
        raise AdapterError(f"{name} must be a finite number, found {str(value)[:80]!r}.")
    return value


def _bias(name: str, value: Any) -> str:
    if value not in BIASES:
        raise AdapterError(f"{name} must be one of {BIASES}, found {str(value)[:80]!r}.")
    return value


def _text(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, str | bool):
        raise AdapterError(f"{name} must be text, found {str(value)[:80]!r}.")
    return value


def _names(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]
    is_list = isinstance(value, list | tuple | set | frozenset)
    if not is_list or not all(isinstance(x, str) and x for x in value):
        raise AdapterError(f"{name} must be a list of names, found {str(value)[:80]!r}.")
    return tuple(value)


def _pattern_values(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise AdapterError(f"{name} must map patterns to numbers, found {str(value)[:80]!r}.")
    one = _rank if name == "rank_pattern" else _number
    for key in value:
        if not isinstance(key, str):
            raise AdapterError(f"{name} must have text as keys, found {key!r}.")
        check_pattern(key, f"A key of {name}", around=1)
    return {key: one(f"{name}[{key!r}]", number) for key, number in value.items()}


def _indices(name: str, value: Any) -> tuple[int, ...]:
    is_list = isinstance(value, list | tuple)
    if not is_list or not all(type(x) is int and 0 <= x < 2**31 for x in value):
        raise AdapterError(f"{name} must be whole numbers from 0 up, found {str(value)[:80]!r}.")
    if len(set(value)) < len(value):
        raise AdapterError(f"{name} names an index twice: {str(value)[:80]}.")
    return tuple(value)


def _tokens(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _indices(f"{name}[{k!r}]", v) for k, v in value.items()}
    return None if value is None else _indices(name, value)


def _layers(name: str, value: Any) -> tuple[int, ...] | None:
    value = [value] if type(value) is int else value
    return None if value is None or value in ([], ()) else _indices(name, value)
