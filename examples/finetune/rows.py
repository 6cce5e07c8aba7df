"""Rows of a JSONL file: what the model reads, and what it should answer.

One JSON object a line, in UTF-8, in any of three forms; each line is known by its own keys, so one
file may hold several forms, and any other key is an error:

- `{"context", "target"}`, as in FinLoRA's data: one space joins them, unless there is white space;
- `{"prompt", "completion"}`: joined as they are;
- `{"messages": [{"role", "content"}, ...]}`: a chat, in which every message of the assistant is
  learned but one that opens it; the last message is an answer.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROLES = ("system", "user", "assistant")
KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"} | {
    list: "a list",
    dict: "an object",
    str: "a string",
}
LFS = b"version https://git-lfs"


class DataError(ValueError):
    """The data cannot be used; the message says where, why, and what to do."""


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


class Row(NamedTuple):
    """One example.

    Attributes:
      where: file and line, for messages.
      prompt: what the model reads; empty for a chat.
      answer: what follows it at once; empty for a chat.
      messages: the chat; empty otherwise.
    """

    where: str
    prompt: str = ""
    answer: str = ""
    messages: tuple[Message, ...] = ()


class Rows(NamedTuple):
    """What a file holds.

    Attributes:
      rows: the good lines, in their order.
      skipped: what is wrong with the others.
    """

    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()


def read_rows(path: str | Path, skip_bad: bool = False) -> Rows:
    """Read a JSONL file.

    Args:
      path: the file.
      skip_bad: whether bad lines are listed in `skipped` instead of being an error.

    Raises:
      DataError: there is no such file, a line is bad (the message names it), or no row is left.
    """
    rows, skipped = [], []
    for number, line in _lines(Path(path)):
        where = f"{path}, line {number}"
        try:
            rows.append(_row(line, where))
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
    if not rows:
        why = f"all {len(skipped)} lines are bad: {skipped[0]}" if skipped else "it is empty"
        raise DataError(f"{path} holds no row to learn from: {why}")
    return Rows(tuple(rows), tuple(skipped))


def hold_out(rows: tuple[Row, ...], fraction: float, seed: int) -> tuple[tuple[Row, ...], ...]:
    """Split rows into those to learn from and a random `fraction` of them, at least one, to ask.

    Returns:
      Both, each in the order of the file.

    Raises:
      DataError: there is only one row.
    """
    if len(rows) < 2:
        raise DataError(
            f"one row cannot be split: {rows[0].where} is all there is; name an eval_dataset"
        )
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    held = set(np.random.default_rng([seed, count]).permutation(len(rows))[:count].tolist())
    return (
        tuple(row for place, row in enumerate(rows) if place not in held),
        tuple(row for place, row in enumerate(rows) if place in held),
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, counted from 1; they end at line feeds alone."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a JSONL file in it")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith(LFS):
                    raise DataError(
                        f"{path} is only a pointer of Git LFS: run `git lfs pull` there"
                    )
                if line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except FileNotFoundError:
        raise DataError(f"{path} does not exist (looked from {Path.cwd()})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _row(line: bytes, where: str) -> Row:
    fields = _parse(line, where)
    for keys, build in FORMS.items():
        if fields.keys() == set(keys):
            return build(where, *(fields[key] for key in keys))
    known = max(FORMS, key=lambda keys: len(fields.keys() & set(keys)))
    expected = " or ".join("{" + ", ".join(keys) + "}" for keys in FORMS)
    if not fields.keys() & set(known):
        raise DataError(f"{where}: expected the keys {expected}, found {sorted(fields)}")
    lacking, extra = set(known) - fields.keys(), fields.keys() - set(known)
    faults = [f"{', '.join(sorted(lacking))} is missing"] * bool(lacking)
    faults += [f"unknown key {', '.join(sorted(extra))}"] * bool(extra)
    raise DataError(f"{where}: {' and '.join(faults)}; a line is {expected}")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
        raise DataError(f"{where}: not UTF-8 ({byte}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        text = f"{error.msg} at column {error.colno}"
        raise DataError(f"{where}: not JSON ({text}); each line is one JSON object") from None
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits, lists 1000 deep
        raise DataError(f"{where}: not a row of text: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: expected a JSON object, found {KINDS[type(fields)]}")
    return fields


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be a string, found {KINDS[type(value)]}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name} holds half of a surrogate pair, not a letter") from None
    return value


def _answer(value: Any, name: str, where: str) -> str:
    text = _text(value, name, where)
    if not text.strip():
        raise DataError(f"{where}: {name} is empty: there is nothing to learn from it")
    return text


def _finlora(where: str, context: Any, target: Any) -> Row:
    prompt, answer = _text(context, "context", where), _answer(target, "target", where)
    joined = not prompt or prompt[-1].isspace() or answer[0].isspace()
    return Row(where, prompt, answer if joined else f" {answer}")


def _completion(where: str, prompt: Any, completion: Any) -> Row:
    return Row(where, _text(prompt, "prompt", where), _answer(completion, "completion", where))


def _chat(where: str, messages: Any) -> Row:
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else KINDS[type(messages)]
        raise DataError(f"{where}: messages must be a list of messages, found {found}")
    turns = tuple(_message(turn, f"messages[{n}]", where) for n, turn in enumerate(messages))
    if turns[-1].role != "assistant":
        raise DataError(
            f"{where}: the last message must be from the assistant, whose answer is learned; "
            f"found one from the {turns[-1].role}"
        )
    if len(turns) == 1:
        raise DataError(f"{where}: the only message is from the assistant: it answers nothing")
    return Row(where, messages=turns)


def _message(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
        found = sorted(turn) if isinstance(turn, dict) else KINDS[type(turn)]
        raise DataError(f"{where}: {name} must be {{role, content}}, found {found}")
    if turn["role"] not in ROLES:
        raise DataError(
            f"{where}: {name}.role must be one of {', '.join(ROLES)}, found {turn['role']!r}"
        )
    check = _answer if turn["role"] == "assistant" else _text
    return Message(turn["role"], check(turn["content"], f"{name}.content", where))


FORMS: dict[tuple[str, ...], Callable[..., Row]] = {
    ("context", "target"): _finlora,
    ("prompt", "completion"): _completion,
    ("messages",): _chat,
}
