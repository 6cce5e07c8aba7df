"""Backwards: from a Hugging Face tensor to the path, where there is no tree to look in."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rslora_jax.paths import AdapterError
from rslora_jax.peft.adapter import Module
from rslora_jax.peft.layout import layout_of
from rslora_jax.peft.placing import Placed
from rslora_jax.peft.rules import INDEX, Name, fill, find

__all__ = ["Place", "read_back", "tree_of"]

Parts = dict[tuple[int, ...], Module]

GROUP = r"\(((?!\?)(?:[^()]|\(\?:[^()]*\))*)\)"
"""A capturing group without another one in it; its text is the match's group."""
TOKEN = re.compile(rf"\(\?:([\w/-]*)\)\?|{GROUP}|\\([.-])|([\w/-])")


class Place(NamedTuple):
    """Where a tensor belongs: the path, the index along its stacked axes (`at`), and the rule."""

    path: str
    at: tuple[int, ...]
    name: Name


def read_back(rules: Sequence[Name], tensor: str) -> Place | None:
    r"""The place of a tensor, by the first rule that can be read backwards and gives it.

    A rule can if its path is literal text, groups that its tensor repeats, and optional literal
    text ``(?:...)?``, which is taken to be there.

    Example:
      >>> from rslora_jax.peft.names import llama
      >>> place = read_back(llama(), "model.layers.3.mlp.up_proj.weight")
      >>> place.path, place.at
      ('params/layers/mlp/up_proj/kernel', (3,))
    """
    for rule in rules:
        place = _place(rule, tensor)
        found = find(rules, place.path) if place is not None else None
        # Reading forwards again makes sure of what reading backwards can only guess.
        if place and found and found.name == rule and fill(found.tensor, place.at) == tensor:
            return place
    return None


def tree_of(modules: Sequence[Module], rules: Sequence[Name]) -> dict[str, Placed]:
    """The parameters that an adapter tells of, without the tree, in a tree's order.

    Args:
      modules: of the adapter.
      rules: the mapping of names.

    Raises:
      AdapterError: if no rule can be read backwards from a module, or its shape not be known.
    """
    seen: dict[str, dict[tuple[int, ...], Module]] = {}
    for module in modules:
        place = read_back(rules, module.weight)
        if place is None:
            raise AdapterError(
                f"No rule can be read backwards from {module.weight!r} to a path. Pass the base "
                "tree, or names (--names FILE.json of a command) of plain text and groups."
            )
        seen.setdefault(place.path, {})[place.at] = module
    ordered = sorted(seen, key=lambda path: path.split("/"))
    return {path: _guessed(path, rules, seen[path]) for path in ordered}


def _guessed(path: str, rules: Sequence[Name], parts: Parts) -> Placed:
    found = find(rules, path)
    module = next(iter(parts.values()))
    axes = found.name.axes if found is not None else ""
    if found is None or axes.replace("b", "") not in ("io", "oi") or module.kind == "conv":
        raise AdapterError(
            f"The shape of {path!r} of axes {axes!r} cannot be read off {module.weight!r}. Pass "
            "the base tree."
        )
    stack = [1 + max(at[k] for at in parts) for k in range(found.stacked)]
    stack += list(module.a.shape[:-2])  # experts
    size = {"i": module.a.shape[-1], "o": module.b.shape[-2]}
    shape = tuple(size[axis] if axis in size else stack.pop(0) for axis in axes)
    return Placed(path, "float32", layout_of(path, found, shape), found.tensor)


def _place(rule: Name, tensor: str) -> Place | None:
    pieces = _pieces(rule.path)
    match = re.fullmatch(_pattern(rule), tensor) if pieces else None
    if pieces is None or match is None:
        return None
    groups = match.groupdict()
    path = "".join(groups.get(f"g{p}") or "" if isinstance(p, int) else p for p in pieces)
    count = len(INDEX.findall(rule.tensor))
    return Place(path, tuple(int(groups[f"i{k}"]) for k in range(count)), rule)


def _pieces(path: str) -> list[str | int] | None:
    """Literal text and numbers of groups; None where a path cannot be read backwards."""
    pieces: list[str | int] = []
    group = at = 0
    while at < len(path):
        match = TOKEN.match(path, at)
        if match is None or path[match.end() :].startswith(("?", "*", "+", "{")):
            return None
        optional, inside, escaped, plain = match.groups()
        group += inside is not None
        pieces.append(group if inside is not None else optional or escaped or plain or "")
        at = match.end()
    return pieces


def _pattern(rule: Name) -> str:
    """The pattern of a rule's tensors: group n is named ``gn``, index k is named ``ik``."""
    insides = re.findall(GROUP, rule.path)
    pattern = ""
    for piece in re.split(r"(\\\d+|\{\d+\})", rule.tensor):
        number = piece.strip("\\{}")
        if piece.startswith("{"):
            pattern += rf"(?P<i{number}>\d+)"
        elif not piece.startswith("\\"):
            pattern += re.escape(piece)
        elif f"<g{number}>" in pattern:
            pattern += f"(?P=g{number})"
        else:
            pattern += f"(?P<g{number}>{insides[int(number) - 1]})"
    return pattern
