"""Values of a YAML or JSON file, each with the line on which it stands.

A scalar stays text until a field says of what type it is to be, so YAML 1.1 has no say in it:
`1e-4` is a number, `no` is a word where a word is asked for, and `010` is not 8.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml

TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
TAG = "tag:yaml.org,2002:"


class ConfigError(ValueError):
    """What is wrong with the settings: every problem that was found, one a line."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of a file.

    Attributes:
      node: the parsed YAML.
      file: the file, as the user named it.
      key: what stands before it, such as `lora_r` or `datasets[0].path`.
      line: the line of that key, or of the value within a list; the first is 1.
    """

    node: yaml.Node
    file: str
    key: str
    line: int

    @property
    def where(self) -> str:
        """The place, as editors and terminals know to follow it."""
        return f"{self.file}:{self.line}"

    @property
    def is_null(self) -> bool:
        """Whether there is nothing after the key: as if the key were not there."""
        return self.node.tag == TAG + "null"

    @property
    def is_text(self) -> bool:
        """Whether it is one scalar: not a list, not a mapping."""
        return isinstance(self.node, yaml.ScalarNode)

    @property
    def text(self) -> str:
        """The characters of a scalar, without quotes."""
        if not self.is_text:
            raise self.wrong("must be a single value")
        return self.node.value

    def __str__(self) -> str:
        """The value in a few words, for messages."""
        if isinstance(self.node, yaml.SequenceNode):
            return f"a list of {len(self.node.value)}"
        if isinstance(self.node, yaml.MappingNode):
            return "a mapping"
        shown = self.node.value if len(self.node.value) <= 60 else self.node.value[:57] + "..."
        return "nothing" if self.is_null else repr(shown) if self.node.style else shown

    def error(self, words: str) -> ConfigError:
        """A problem of this key: `words` after its place and name."""
        return ConfigError(f"{self.where}: {self.key} {words}.")

    def wrong(self, wanted: str) -> ConfigError:
        """A problem of this value: what is wanted, and what was found instead."""
        return self.error(f"{wanted}, found {self}")

    def items(self) -> list["Value"]:
        """The values of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong("must be a list")
        nodes = enumerate(self.node.value)
        return [Value(node, self.file, f"{self.key}[{n}]", _line(node)) for n, node in nodes]

    def entries(self) -> dict[str, "Value"]:
        """The values of a mapping by their keys.

        Raises:
          ConfigError: if it is none, or a key stands in it twice.
        """
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong("must be a mapping of keys to values")
        found: dict[str, Value] = {}
        for name, node in self.node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{self.file}:{_line(name)}: a key must be a word")
            key = f"{self.key}.{name.value}" if self.key else name.value
            entry = Value(node, self.file, key, _line(name))
            if name.value in found:
                raise entry.error(f"stands on line {found[name.value].line} already. Keep one")
            found[name.value] = entry
        return found


def load(path: str | Path) -> Value:
    """Parse a file; nothing in it is ever executed.

    Raises:
      ConfigError: if it cannot be read, is not YAML, or asks for objects by tags.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix == ".json":  # JSON may be indented by tabs, YAML may not
            text = text.replace("\t", " ")
        node = yaml.compose(text, yaml.SafeLoader)
        _check_tags(node, str(path), set())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Name a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text. Name a YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_mark(error)}: is not YAML: {_problem(error)}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply.") from error
    if node is None:
        raise ConfigError(f"{path}: is empty. It needs at least model and dataset.")
    return Value(node, str(path), "", _line(node))


def read(value: Value, hint: Any) -> Any:
    """`value` as the type `hint`: a scalar, Literal, union, tuple of any length or dict.

    Raises:
      ConfigError: if it is of another type, with its line.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _read_any(value, [arg for arg in args if arg is not type(None)])
    if origin is Literal:
        return _read_choice(value, args)
    if origin is tuple:
        return tuple(read(item, args[0]) for item in ([value] if value.is_text else value.items()))
    if origin is dict:
        return {key: read(entry, args[1]) for key, entry in value.entries().items()}
    return SCALARS[hint](value)


def _read_any(value: Value, hints: list[Any]) -> Any:
    for hint in hints[:-1]:
        try:
            return read(value, hint)
        except ConfigError:
            continue
    return read(value, hints[-1])


def _read_choice(value: Value, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value.is_text and value.text == str(choice):
            return choice
    raise value.wrong(f"must be one of {', '.join(map(str, choices))}")


def _read_text(value: Value) -> str:
    if not value.is_text or value.node.tag != TAG + "str" or not value.text:
        hint = " (in quotes, if that is meant)" if value.is_text and value.text else ""
        raise value.wrong(f"must be text{hint}")
    return value.text


def _read_whole(value: Value) -> int:
    if not value.is_text or not WHOLE.fullmatch(value.text):
        raise value.wrong("must be a whole number")
    return int(value.text)


def _read_number(value: Value) -> float:
    try:
        number = float(value.text) if value.is_text else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise value.wrong("must be a number")
    return number


def _read_flag(value: Value) -> bool:
    word = value.text.lower() if value.is_text else ""
    if word not in TRUE + FALSE:
        raise value.wrong("must be true or false")
    return word in TRUE


SCALARS: dict[Any, Callable[[Value], Any]] = {
    str: _read_text,
    Path: lambda value: Path(_read_text(value)),
    int: _read_whole,
    float: _read_number,
    bool: _read_flag,
}


def _check_tags(node: yaml.Node | None, file: str, seen: set[int]) -> None:
    if node is None or id(node) in seen:  # an alias may lead back to where it stands
        return
    seen.add(id(node))
    if not node.tag.startswith(TAG) or node.tag.startswith(TAG + "python"):
        raise ConfigError(f"{file}:{_line(node)}: the tag {node.tag!r} is not read. Leave it out.")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_tags(item, file, seen)
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for part in pair:
                _check_tags(part, file, seen)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _mark(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}"


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]
