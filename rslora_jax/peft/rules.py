"""Rules: which Hugging Face tensor holds a parameter, one rule at a time.

A rule matches paths with a regular expression and gives the tensor's name. A stacked weight
(scanned layers) is many tensors there: ``{0}`` stands for the index along its first stacked
axis, ``{1}`` for the second.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rslora_jax.paths import AdapterError

__all__ = ["INDEX", "Found", "Name", "fill", "find", "module_of"]

KINDS = ("", "linear", "embedding", "conv", "expert")
INDEX = re.compile(r"\{(\d+)\}")


@dataclasses.dataclass(frozen=True)
class Name:
    r"""One rule of the mapping.

    Attributes:
      path: a regular expression that must match the parameter's whole path.
      tensor: the name of the Hugging Face tensor (the module and ``.weight`` or ``.bias``, or
        the parameter itself): ``\1`` is the first group of `path`, ``{0}`` the index along the
        first stacked axis.
      axes: the roles of the parameter's axes where no site tells them, such as ``bio``; empty
        for what is not transposed (norms, biases), whose first axes are the stacked ones.
      kind: ``"embedding"`` for a table, ``"conv"`` for a convolution, ``"expert"`` for a
        mixture's 3-D parameter; empty for what the site says, else a linear layer.
      stored: ``"io"`` where Hugging Face holds a matrix as (in, out), as GPT-2's Conv1D and
        some mixtures do; empty for PyTorch's own order.
      rope: ``"interleaved"`` if the tree keeps rotary pairs side by side in each head, where
        Hugging Face keeps them half a head apart: rows are permuted.
      head_dim: the width of a head, for `rope`.

    Raises:
      AdapterError: if a field is malformed.

    Example:
      >>> rule = Name(r"blocks/(\w+)/kernel", r"model.layers.{0}.\1.weight", axes="bio")
      >>> find([rule], "blocks/up/kernel").tensor
      'model.layers.{0}.up.weight'
    """

    path: str
    tensor: str
    axes: str = ""
    kind: str = ""
    stored: Literal["", "io", "oi"] = ""
    rope: Literal["interleaved"] | None = None
    head_dim: int = 0

    def __post_init__(self) -> None:
        groups = _groups(self)
        _check_tensor(self.tensor, self.path)
        _check_index(self)
        for number in re.findall(r"\\(\d+)", self.tensor):
            if not 1 <= int(number) <= groups:
                raise AdapterError(
                    f"The name {self.tensor!r} uses group {number}, but its path {self.path!r} "
                    f"has {groups} groups. Put brackets around the part that is meant."
                )
        _check_fields(self)


class Found(NamedTuple):
    """The rule of a path, and its tensor's name: groups are filled in, ``{0}`` is left."""

    name: Name
    tensor: str

    @property
    def stacked(self) -> int:
        """How many stacked axes the name has an index for."""
        return len(INDEX.findall(self.tensor))


def find(rules: Iterable[Name], path: str) -> Found | None:
    """The first rule that matches a path, with its groups filled in; None where none does."""
    for rule in rules:
        match = re.fullmatch(rule.path, path)
        if match is not None:
            tensor = _expand(rule.tensor, [group or "" for group in match.groups()])
            _check_tensor(tensor, path)
            return Found(rule, tensor)
    return None


def fill(tensor: str, index: Sequence[int]) -> str:
    """The name with its indices filled in.

    Example:
      >>> fill("model.layers.{0}.q_proj.weight", (3,))
      'model.layers.3.q_proj.weight'
    """
    return INDEX.sub(lambda match: str(index[int(match[1])]), tensor)


def module_of(tensor: str) -> tuple[str, str]:
    """The module of a tensor, and its parameter's name unless that is ``weight``.

    Example:
      >>> module_of("lm_head.weight"), module_of("mlp.experts.down_proj")
      (('lm_head', ''), ('mlp.experts', 'down_proj'))
    """
    module, _, parameter = tensor.rpartition(".")
    return module, "" if parameter == "weight" else parameter


def _expand(template: str, groups: Sequence[str]) -> str:
    return re.sub(r"\\(\d+)", lambda match: groups[int(match[1]) - 1], template)


def _groups(rule: Name) -> int:
    if not isinstance(rule.path, str) or not isinstance(rule.tensor, str):
        raise AdapterError(f"A name is a path and a tensor, two strings, found {rule!r}.")
    try:
        return re.compile(rule.path).groups
    except re.error as error:
        raise AdapterError(
            f"{rule.path!r} is no regular expression: {error}. Escape what is meant literally."
        ) from error


def _check_tensor(tensor: str, path: str) -> None:
    if not tensor or ".." in tensor or tensor[0] in "./" or tensor[-1] == "." or "/" in tensor:
        raise AdapterError(
            f"The path {path!r} is given the tensor name {tensor!r}: a name is parts joined by "
            "single dots, such as 'model.norm.weight', without '/'."
        )


def _check_index(rule: Name) -> None:
    found = INDEX.findall(rule.tensor)
    if sorted(found) != [str(k) for k in range(len(found))]:
        raise AdapterError(
            f"The name {rule.tensor!r} has the indices {found}. Use {{0}} for the first stacked "
            "axis, {1} for the second, each once."
        )


def _check_fields(rule: Name) -> None:
    if set(rule.axes) - set("bio"):
        raise AdapterError(f"The axes of {rule.path!r} are letters b, i, o, found {rule.axes!r}.")
    choices = {"kind": KINDS, "stored": ("", "io", "oi"), "rope": (None, "interleaved")}
    for field, allowed in choices.items():
        if getattr(rule, field) not in allowed:
            raise AdapterError(
                f"Name.{field} of {rule.path!r} must be one of {allowed}, found "
                f"{getattr(rule, field)!r}."
            )
    width = rule.head_dim
    wrong = not isinstance(width, int) or width < 0 or width % 2
    if wrong or (rule.rope is not None and width == 0):
        raise AdapterError(
            f"Name.head_dim of {rule.path!r} must be the even width of a head, for rope="
            f"{rule.rope!r}, found {width!r}."
        )
