"""Names of a Llama's weights: as PEFT and Axolotl write them, and as paths of its parameters.

There `model.layers.3.self_attn.q_proj` is one module of many; here all layers lie in one array,
`layers/self_attn/q_proj/kernel`, so what is said of one layer alone cannot be done.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from finetune.yaml_file import ConfigError

MOST_LAYERS = 128  # layers that a pattern is tried on; Llama 3.1 405B has 126


class Module(NamedTuple):
    """One weight of the model, of all layers together.

    Attributes:
      dotted: its name in Hugging Face's models; `{}` stands for the layer's number.
      path: its path in the parameters of `examples/llama.py`.
    """

    dotted: str
    path: str

    @property
    def suffix(self) -> str:
        """The end of the path, which tells it from all others."""
        return "/".join(self.path.split("/")[-2:])

    @property
    def names(self) -> list[str]:
        """Its name in every layer."""
        if "{}" not in self.dotted:
            return [self.dotted]
        return [self.dotted.format(layer) for layer in range(MOST_LAYERS)]


LINEAR = tuple(
    Module(f"model.layers.{{}}.{block}.{name}", f"layers/{block}/{name}/kernel")
    for block, names in (
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
    )
    for name in names
)
"""What `all-linear` means: every matrix but the embedding and the output head."""

MODULES = (
    *LINEAR,
    Module("model.embed_tokens", "embed_tokens/embedding"),
    Module("lm_head", "lm_head/kernel"),
)


def targeted(entry: str) -> tuple[Module, ...]:
    """The modules that one entry of a list of targets names: an ending of name or path.

    Raises:
      ConfigError: if there are none, or it names some layers only.
    """
    return _find(
        entry,
        lambda name: name == entry or name.endswith("." + entry),
        lambda path: path == entry or path.endswith("/" + entry),
    )


def targeted_by_string(text: str) -> tuple[Module, ...]:
    """The modules that a lone string of targets names: one entry, or a regex of whole names.

    Raises:
      ConfigError: if there are none, it names some layers only, or it is no regex.
    """
    if re.fullmatch(r"[\w./]*", text):
        return targeted(text)
    whole = _compile(text, text)
    return _find(text, whole, whole)


def patterned(pattern: str) -> tuple[Module, ...]:
    """The modules that a key of `rank_pattern` or `alpha_pattern` means.

    PEFT's rule: a regex that matches the end of the name, from one of its dots on.

    Raises:
      ConfigError: if there are none, it matches some layers only, or it is no regex.
    """
    return _find(
        pattern,
        _compile(rf"(?:.*\.)?(?:{pattern})", pattern),
        _compile(rf"(?:.*/)?(?:{pattern})", pattern),
    )


def first(patterns: Mapping[str, Any], module: Module) -> Any:
    """The value of the first pattern that matches a module; None if none does."""
    return next((v for key, v in patterns.items() if module in patterned(key)), None)


def strangers(patterns: Iterable[str], adapted: Sequence[Module]) -> dict[str, str]:
    """The patterns that change nothing that is adapted, each with what is wrong, in words."""
    names = ", ".join(module.suffix for module in adapted)
    return {
        pattern: f"{pattern!r} matches none of the targets {names}"
        for pattern in patterns
        if not set(patterned(pattern)) & set(adapted)
    }


def in_order(modules: Sequence[Module]) -> tuple[str, ...]:
    """Each module's suffix once, in the model's order: one spelling for one choice."""
    return tuple(module.suffix for module in MODULES if module in modules)


def _compile(regex: str, shown: str) -> Callable[[str], bool]:
    try:
        compiled = re.compile(regex)
    except re.error as error:
        raise ConfigError(f"{shown!r} is not a regular expression: {error}") from error
    return lambda name: compiled.fullmatch(name) is not None


def _find(
    entry: str, by_name: Callable[[str], bool], by_path: Callable[[str], bool]
) -> tuple[Module, ...]:
    found = []
    for module in MODULES:
        layers = [by_name(name) for name in module.names]
        if by_path(module.path) or all(layers):
            found.append(module)
        elif any(layers):
            raise ConfigError(
                f"{entry!r} names some layers of {module.suffix!r} only, but all layers lie in "
                "one array here and share a rank. Leave the layer's number out"
            )
    if not found:
        known = [module.suffix.split("/")[0] for module in MODULES]
        near = difflib.get_close_matches(entry, known, cutoff=0.5) or known
        raise ConfigError(
            f"{entry!r} names no weight of the model. The nearest are {', '.join(near)}"
        )
    return tuple(found)
