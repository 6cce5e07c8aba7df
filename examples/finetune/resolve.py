"""Resolving: from the keys of a file, in any spelling, to values of our fields."""

import difflib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from finetune import keys, modules
from finetune.limits import check_limit
from finetune.settings import INSTEAD, Settings, hints
from finetune.translations import TRANSLATIONS, Not
from finetune.yaml_file import ConfigError, Value, read


class Resolved(NamedTuple):
    """What a file says.

    Attributes:
      values: of our fields, those alone that it sets.
      places: where each of them was set.
    """

    values: dict[str, Any]
    places: dict[str, Value]


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every key that can be read."""
    return (*hints(), *keys.FIELDS, *TRANSLATIONS, *keys.INERT_KEYS)


def resolve(entries: Mapping[str, Value]) -> Resolved:
    """The fields that the keys of a file set.

    Raises:
      ConfigError: with every key that is unknown, unsupported, wrong or contradicts another.
    """
    found, denied, problems = Resolved({}, {}), [], []
    for name, value in entries.items():
        try:
            for field, setting in _meaning(name, value).items():
                if isinstance(setting, Not):
                    denied.append((field, setting.value, value))
                else:
                    _set(found, field, setting, value)
        except ConfigError as error:
            problems += error.problems
    problems += _denials(found, denied) + _rivals(found) + _strangers(found)
    if problems:
        raise ConfigError(*problems)
    _plain_lora(found, entries)
    return found


def _meaning(name: str, value: Value) -> dict[str, Any]:
    if name not in known_keys():
        raise value.error(f"is not known. {_nearest(name)}")
    if value.is_null:
        return {}
    if name in TRANSLATIONS:
        return TRANSLATIONS[name](value)
    if name in keys.INERT_KEYS:
        _check_inert(name, value)
        return {}
    field = keys.FIELDS.get(name, name)
    return {field: _read_field(field, value)}


def _nearest(name: str) -> str:
    known = {key.lower(): key for key in reversed(known_keys())}  # of two alike, ours
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known)
    return f"The nearest are {', '.join(known[key] for key in near)}" if near else "Leave it out"


def _check_inert(name: str, value: Value) -> None:
    inert = keys.INERT_KEYS[name]
    accepted = inert.accepted.split()
    if accepted == ["*"] or not value.node.value:
        return
    if not value.is_text or not any(_same(value.text, other) for other in accepted):
        only = f", only {', '.join(accepted)}" if accepted else ""
        raise ConfigError(
            f"{value.where}: {name}: {value} is not supported{only}: {inert.why}. "
            f"{'Change it or leave it out' if accepted else 'Leave it out'}."
        )


def _same(text: str, other: str) -> bool:
    try:
        return float(text) == float(other)
    except ValueError:
        return text.lower() == other


def _read_field(field: str, value: Value) -> Any:
    if field == "targets":
        return _read_targets(value)
    if field in ("rank_pattern", "alpha_pattern"):
        return {key: _read_pattern(field, key, v) for key, v in value.entries().items()}
    setting = read(value, hints()[field])
    _at(value, check_limit, field, setting)
    return setting


def _read_targets(value: Value) -> Any:
    if value.is_text and read(value, str) == "all-linear":
        return "all-linear"
    if value.is_text:
        return modules.in_order(_at(value, modules.targeted_by_string, value.text))
    items = [(item, read(item, str)) for item in value.items()]
    if [text for _, text in items] == ["all-linear"]:
        return "all-linear"
    found = [module for item, text in items for module in _at(item, modules.targeted, text)]
    if not found:
        raise value.error("names nothing. Name modules such as q_proj, or all-linear")
    return modules.in_order(found)


def _read_pattern(field: str, pattern: str, value: Value) -> Any:
    _at(value, modules.patterned, pattern)
    number = read(value, hints()[field].__args__[1])
    _at(value, check_limit, field, number)
    return number


def _at(value: Value, check: Any, *args: Any) -> Any:
    """`check(*args)`, with the place of `value` before what it finds wrong."""
    try:
        return check(*args)
    except ConfigError as error:
        raise value.error(str(error)) from None


def _set(found: Resolved, field: str, setting: Any, value: Value) -> None:
    if field in found.values and found.values[field] != setting:
        first = found.places[field]
        raise value.error(
            f"sets {field} to {_shown(setting)}, but {first.key} on line {first.line} sets it to "
            f"{_shown(found.values[field])}. Keep one of them"
        )
    found.values.setdefault(field, setting)
    found.places.setdefault(field, value)


def _shown(setting: Any) -> str:
    return ", ".join(setting) if isinstance(setting, tuple) else str(setting)


def _denials(found: Resolved, denied: list[tuple[str, Any, Value]]) -> list[str]:
    """Problems of keys that say what a field is not, where it is just that."""
    problems = []
    for field, setting, value in denied:
        if found.values.get(field, getattr(Settings, field)) == setting:
            place = found.places.get(field)
            by = f"{place.key} on line {place.line} says so" if place else "no key says otherwise"
            problems += value.error(
                f"is false, but {field} is {setting}: {by}. Set {field}"
            ).problems
    return problems


def _rivals(found: Resolved) -> list[str]:
    """Problems of fields of which one takes the other's place."""
    return [
        found.places[name]
        .error(
            f"takes the place of {found.places[other].key} on line {found.places[other].line}. "
            "Keep one of them"
        )
        .problems[0]
        for name, other in INSTEAD.items()
        if name in found.values and found.values.get(other)
    ]


def _strangers(found: Resolved) -> list[str]:
    """Problems of patterns that match none of the targets that the file names."""
    targets = found.values.get("targets", "all-linear")
    wanted = [m for m in modules.MODULES if m.suffix in targets]
    adapted = modules.LINEAR if targets == "all-linear" else wanted
    return [
        problem
        for name in ("rank_pattern", "alpha_pattern")
        for pattern, words in modules.strangers(found.values.get(name, ()), adapted).items()
        for problem in found.places[name].entries()[pattern].error(words).problems
    ]


def _plain_lora(found: Resolved, entries: Mapping[str, Value]) -> None:
    """Where another tool's rank or alpha stands without rsLoRA, alpha/r is meant, as there."""
    theirs = [v for name, v in entries.items() if name in keys.LORA and not v.is_null]
    if theirs and "use_rslora" not in found.values:
        found.values["use_rslora"] = False
        found.places["use_rslora"] = theirs[0]
