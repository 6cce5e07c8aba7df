"""Adapter: a PEFT folder in memory, and the names of its tensors in a file."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from rslora_jax.paths import AdapterError
from rslora_jax.peft.settings import Settings

__all__ = ["NESTED", "PREFIX", "TOKENS", "Module", "PeftAdapter", "tensors_of"]

PREFIX = "base_model.model."
NESTED = ".base_layer"
TOKENS = "token_adapter.trainable_tokens_delta"


class Module(NamedTuple):
    """One adapted weight, in Hugging Face's orientation.

    Attributes:
      name: the module's name in the model, without ``.base_layer``.
      kind: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"expert"`` (a stack of E matrices).
      a: (r, in); embedding (r, vocabulary); conv (r, in, *k); expert (E, r, in).
      b: (out, r); embedding (d, r); conv (out, r / groups, 1, ...); expert (E, out, r).
      rank: r.
      alpha: the numerator of the scale.
      scale: what multiplies b @ a.
      bias: (out,), what ``lora_bias`` adds after B, or None.
      magnitude: DoRA's, in the file's shape, or None.
      parameter: the parameter that is adapted, where it is not the module's ``weight``.
      depth: how often ``.base_layer`` is in the file's name: the first parameter that a module
        registers lies deepest.
    """

    name: str
    kind: str
    a: np.ndarray
    b: np.ndarray
    rank: int
    alpha: int | float
    scale: float
    bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None
    parameter: str = ""
    depth: int = 0

    @property
    def weight(self) -> str:
        """The name of the adapted tensor in the base."""
        return f"{self.name}.{self.parameter or 'weight'}"


class PeftAdapter(NamedTuple):
    """A PEFT folder in memory.

    Attributes:
      settings: its ``adapter_config.json``.
      modules: the adapted weights, sorted by name and depth.
      saved: tensors of the base that are replaced, by their names in the base: modules to
        save, biases, copies of embeddings.
      tokens: for an embedding's name, (indices, rows [n, d]) that replace its rows.
    """

    settings: Settings
    modules: tuple[Module, ...]
    saved: dict[str, np.ndarray]
    tokens: dict[str, tuple[tuple[int, ...], np.ndarray]]


def tensors_of(adapter: PeftAdapter) -> dict[str, np.ndarray]:
    """The tensors of a file, by their names there: what `assemble` reads.

    Raises:
      AdapterError: if two modules have one name.
    """
    found: list[tuple[str, np.ndarray]] = []
    for module in adapter.modules:
        found += _named(module)
    plain = {module.name for module in adapter.modules if not module.parameter}
    for name, array in adapter.saved.items():
        owner, _, last = name.rpartition(".")
        found.append((f"{owner}{NESTED if owner in plain else ''}.{last}", array))
    found += [(f"{name}.{TOKENS}", rows) for name, (_, rows) in adapter.tokens.items()]
    twice = sorted(name for name, count in Counter(n for n, _ in found).items() if count > 1)
    if twice:
        raise AdapterError(f"Two tensors would be named {twice[:3]}. Give each module one name.")
    # safetensors writes the buffer as it lies: a transposed view would be written untransposed.
    return {PREFIX + name: np.asarray(array, order="C") for name, array in sorted(found)}


def _named(module: Module) -> list[tuple[str, np.ndarray]]:
    name, a, b = module.name + NESTED * module.depth, module.a, module.b
    if module.kind == "embedding":
        found = [("lora_embedding_A", a), ("lora_embedding_B", b)]
    elif module.kind == "expert":
        rows, columns = a.reshape(-1, a.shape[-1]), np.moveaxis(b, 0, -1)
        found = [("lora_A.weight", rows), ("lora_B.weight", columns.reshape(b.shape[1], -1))]
    else:
        found = [("lora_A.weight", a), ("lora_B.weight", b)]
    found += [("lora_B.bias", module.bias)] if module.bias is not None else []
    found += [("lora_magnitude_vector", module.magnitude)] if module.magnitude is not None else []
    return [(f"{name}.{part}", np.asarray(array)) for part, array in found]
