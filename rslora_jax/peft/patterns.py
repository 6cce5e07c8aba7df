"""Patterns: the regular expressions of an ``adapter_config.json``, matched as PEFT matches them.

A folder comes from elsewhere, and Python's `re` backtracks: a few characters can make it run
for hours. Patterns whose cost cannot be bounded are refused before they are used.
"""

import functools
import math
import re
from collections.abc import Iterable

from rslora_jax.paths import AdapterError

__all__ = ["check_pattern", "covers", "ends_with", "is_saved", "matches"]

LONGEST = 2_000
# Unbounded repeats in sequence; choices (optional parts, groups of alternatives) beside 0, 1, ...
# of them: n repeats share 160 characters in (160 over n) ways, a choice doubles them, to 2^25.
WILD, CHOICES = 4, (16, 16, 11, 5, 1)
REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def matches(key: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` matches a module name.

    The rule is that of `peft.utils.get_pattern_key` (PEFT 0.21.2): a regular expression that
    must match the end of the name, from one of its dots on.

    Example:
      >>> matches("q_proj", "layers.0.q_proj"), matches("proj", "layers.0.q_proj")
      (True, False)
    """
    return _compiled(rf"(.*\.)?({key})$").match(name) is not None


def covers(targets: "str | Iterable[str]", name: str) -> bool:
    r"""Whether ``target_modules`` or ``exclude_modules`` names a module.

    The rule is that of `check_target_module_exists` (PEFT 0.21.2): a string is a regular
    expression for the whole name, a list holds names or their dotted endings.

    Example:
      >>> covers(["q_proj"], "layers.0.q_proj"), covers(r".*\.0\..*", "layers.0.q_proj")
      (True, True)
    """
    if isinstance(targets, str):
        return _compiled(targets).fullmatch(name) is not None
    return any(ends_with(name, target) for target in targets)


def is_saved(modules_to_save: Iterable[str], name: str) -> bool:
    """Whether a module, or one around it, is among ``modules_to_save`` (PEFT 0.21.2)."""
    return any(_compiled(rf"(^|.*\.){m}($|\..*)").match(name) for m in modules_to_save)


def ends_with(name: str, ending: str) -> bool:
    """Whether `name` is `ending` or ends with it after a dot."""
    return name == ending or name.endswith("." + ending)


def check_pattern(pattern: str, where: str, around: int = 0) -> None:
    """Refuses what is no regular expression, or could take for ever to match.

    Args:
      pattern: the regular expression.
      where: what it was read as, for the message.
      around: how many unbounded repeats are put around it when it is matched.

    Raises:
      AdapterError: if it does not compile, or repeats what can itself repeat, such as
        ``(a+)+``, or has more than 4 unbounded repeats in a row, or 16 choices (fewer beside
        repeats).

    Example:
      >>> check_pattern("(a+)+b", "target_modules")
      Traceback (most recent call last):
      ...
      rslora_jax.paths.AdapterError: target_modules is the regular expression '(a+)+b', which ...
    """
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"{where} must be a regular expression, found {pattern[:200]!r}: {error}. Correct it."
        ) from error
    wild, choices = _cost(pattern) if len(pattern) <= LONGEST else (math.inf, 0)
    if wild + around > WILD or choices > CHOICES[int(wild + around)]:
        raise AdapterError(
            f"{where} is the regular expression {pattern[:200]!r}, which could take for ever to "
            f"match: at most {WILD - around} unbounded repeats, {CHOICES[0]} choices (fewer beside "
            f"repeats), {LONGEST:,} characters, and no repeat of a repeat or of alternatives. "
            "Write module names instead."
        )


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _cost(pattern: str) -> tuple[float, float]:
    """(unbounded repeats in sequence, choices), an upper bound read off the characters."""
    # Wild so far, wild of the best branch, choices; and where the group begins.
    stack: list[list[float]] = [[0, 0, 0]]
    starts: list[int] = []
    last, place = (0.0, 0.0), 0
    while place < len(pattern):
        char = pattern[place]
        length = 1
        if char == "\\":
            last, length = (0.0, 0.0), 2
        elif char == "[":
            last, length = (0.0, 0.0), _class_length(pattern, place)
        elif char == "(":
            stack.append([0, 0, 0])
            length = _opening_length(pattern, place)
            starts.append(place + length)
        elif char == "|":
            stack[-1] = [0, max(stack[-1][:2]), stack[-1][2] + 1]
        elif char == ")" and len(stack) > 1:
            wild, best, choices = stack.pop()
            if _is_told_apart(pattern[starts.pop() : place]):
                choices = 0
            last = (max(wild, best), min(choices, 1) if not max(wild, best) else choices)
            _add(stack[-1], last)
        elif char in "*+?{":
            length, added = _repeat(pattern, place, last)
            _add(stack[-1], added)
            last = added
        else:
            last = (0.0, 0.0)
        place += length
    wild, best, choices = stack[0]
    return max(wild, best), choices


def _is_told_apart(group: str) -> bool:
    """Whether a group is plain words whose first letters differ: at most one can match."""
    firsts = [word[:1] for word in group.split("|")]
    return re.fullmatch(r"[\w|-]*", group) is not None and len(set(firsts)) == len(firsts)


def _add(level: list[float], cost: tuple[float, float]) -> None:
    level[0] += cost[0]
    level[2] += cost[1]


def _repeat(pattern: str, place: int, last: tuple[float, float]) -> tuple[int, tuple[float, float]]:
    found = REPEAT.match(pattern, place)
    length = len(found.group()) if found else 1
    if pattern[place] == "{" and not found:
        return 1, (0.0, 0.0)
    lazy = pattern[place + length : place + length + 1] in ("?", "+")
    most = _most(pattern[place], found)
    if most > 1 and any(last):
        return length + lazy, (math.inf, 0.0)
    exact = found is not None and found.group(2) is None
    return length + lazy, (0.0, float(most == 1)) if most <= 1 or exact else (1.0, 0.0)


def _most(char: str, found: "re.Match[str] | None") -> float:
    if found is None:
        return 1.0 if char == "?" else math.inf
    least, most = found.groups()
    # A bound has at most four digits here: Python's own limit is above it.
    return float(least if most is None else most or "inf") if (least or most) else math.inf


def _class_length(pattern: str, place: int) -> int:
    end = place + 1 + (pattern[place + 1 : place + 2] == "^")
    end += pattern[end : end + 1] == "]"
    while end < len(pattern) and pattern[end] != "]":
        end += 2 if pattern[end] == "\\" else 1
    return end - place + 1


def _opening_length(pattern: str, place: int) -> int:
    found = re.compile(r"\((?:\?(?:P?<\w+>|P=\w+|[aiLmsux-]+:?|<?[=!]|[:>]))?").match(
        pattern, place
    )
    return len(found.group()) if found else 1
