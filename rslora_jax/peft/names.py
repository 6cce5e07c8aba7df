"""Names: the mapping between paths and Hugging Face tensors, as data.

A mapping is a tuple of rules, of which the first that matches a path wins. It has a JSON form,
so that it can be kept in a file.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from rslora_jax.paths import AdapterError
from rslora_jax.peft.rules import Name, find

__all__ = ["LLAMA", "Name", "Names", "find", "from_list", "llama", "names", "to_list"]

Names: TypeAlias = tuple[Name, ...]


def names(pairs: Iterable[Name | Sequence[str]]) -> Names:
    r"""A mapping from pairs of a regular expression and a tensor name.

    Args:
      pairs: ``(path, tensor)``, ``(path, tensor, axes)`` or a `Name` each; the first that
        matches a path wins.

    Returns:
      The rules, to be passed as ``names=``.

    Raises:
      AdapterError: if a rule is malformed.

    Example:
      >>> mine = names([(r"h/(\d+)/(q|k|v)/w", r"model.layers.\1.attn.\2.weight")])
      >>> find(mine, "h/3/q/w").tensor
      'model.layers.3.attn.q.weight'
    """
    rules = tuple(pair if isinstance(pair, Name) else _name(pair) for pair in pairs)
    if not rules:
        raise AdapterError("A mapping of names was asked for, found no rules: give at least one.")
    return rules


def to_list(rules: Iterable[Name]) -> list[dict[str, Any]]:
    """The rules as plain JSON values, without the fields left at their defaults.

    Example:
      >>> to_list([Name("w", "lin.weight", axes="io")])
      [{'path': 'w', 'tensor': 'lin.weight', 'axes': 'io'}]
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Name)}
    return [
        {key: value for key, value in dataclasses.asdict(rule).items() if value != defaults[key]}
        for rule in rules
    ]


def from_list(data: Any) -> Names:
    """Reads what `to_list` wrote.

    Raises:
      AdapterError: if `data` is no list of mappings, or a key is unknown or missing.

    Example:
      >>> from_list([{"path": "w", "tensor": "lin.weight"}])[0].tensor
      'lin.weight'
    """
    if not isinstance(data, list) or not all(isinstance(entry, Mapping) for entry in data):
        raise AdapterError(f"Names are read from a list of mappings, found {data!r:.80}.")
    known = {field.name for field in dataclasses.fields(Name)}
    for entry in data:
        if not {"path", "tensor"} <= set(entry) <= known:
            raise AdapterError(
                f"A name has the keys 'path' and 'tensor', and may have {sorted(known)}; found "
                f"{sorted(map(str, entry))}."
            )
    return names(Name(**entry) for entry in data)


def llama(*, interleaved: int = 0) -> Names:
    """The names of Llama-family trees: Llama, Mistral, SmolLM, Qwen2.

    Paths are those of ``examples/llama.py``, with or without a leading ``params/``: scanned
    layers ``layers/self_attn/q_proj/kernel`` [layers, in, out], or single ones ``layers_0/...``
    or ``layers/0/...``; `embed_tokens`, the norms, biases and `lm_head`.

    Args:
      interleaved: the width of a head, if the model keeps rotary pairs side by side.

    Returns:
      The rules.

    Example:
      >>> find(llama(), "layers_0/mlp/up_proj/kernel").tensor
      'model.layers.0.mlp.up_proj.weight'
    """
    rope: dict[str, Any] = {"rope": "interleaved", "head_dim": interleaved} if interleaved else {}
    root = "(?:params/)?"
    return (
        *_layers(root + "layers/", "model.layers.{0}.", "b", (1, 2), rope),
        *_layers(root + r"layers[_/](\d+)/", r"model.layers.\1.", "", (2, 3), rope),
        Name(root + "embed_tokens/embedding", "model.embed_tokens.weight", "io", "embedding"),
        Name(root + "norm/scale", "model.norm.weight"),
        Name(root + "lm_head/kernel", "lm_head.weight", "io"),
        Name(root + "lm_head/bias", "lm_head.bias", "o"),
    )


def _layers(
    path: str, tensor: str, stack: str, group: tuple[int, int], rope: Mapping[str, Any]
) -> Iterable[Name]:
    block, part = (rf"\{k}" for k in group)
    matrices = (("(self_attn)/([qk]_proj)", rope), ("(self_attn)/([vo]_proj)", {}))
    for pattern, turned in (*matrices, ("(mlp)/((?:gate|up|down)_proj)", {})):
        whole = f"{tensor}{block}.{part}"
        yield Name(f"{path}{pattern}/kernel", f"{whole}.weight", stack + "io", **turned)
        yield Name(f"{path}{pattern}/bias", f"{whole}.bias", stack + "o", **turned)
    yield Name(f"{path}((?:input|post_attention)_layernorm)/scale", f"{tensor}{block}.weight")


def _name(pair: Sequence[str]) -> Name:
    if isinstance(pair, str) or not 2 <= len(pair) <= 3:
        raise AdapterError(
            f"A name is (path, tensor), (path, tensor, axes) or a Name, found {pair!r}."
        )
    path, tensor, *axes = pair
    return Name(path, tensor, axes[0] if axes else "")


LLAMA: Names = llama()
"""Ready-made: Llama-family trees as in ``examples/llama.py``."""
