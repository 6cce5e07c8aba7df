"""Sizes: what a Llama-family decoder is made of, and reading it from a config.json."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rslora_jax.files import read_json
from rslora_jax.paths import AdapterError

__all__ = ["FAMILIES", "Model", "RopeScaling", "read_model"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The `model_type`s whose layers are those of `plan.llama`."""

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Long-context frequencies of Llama 3.1 and later (`"rope_type": "llama3"`)."""

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes and constants of a Llama-family decoder.

    Attributes:
      name: what it is called.
      vocab: rows of the embedding.
      width: width of the residual stream.
      ff: width of the gated MLP.
      layers: number of layers.
      heads: number of query heads.
      kv_heads: number of key and value heads; divides `heads`.
      head_dim: width of one head.
      tied: whether the output head is the embedding.
      theta: base of the rotary frequencies.
      eps: epsilon of every RMSNorm.
      scaling: Llama 3.1's change of the rotary frequencies, if any.
      qkv_bias: whether q, k and v have biases.
      o_bias: whether o has one.
      mlp_bias: whether gate, up and down have biases.
      qk_norm: whether q and k are normalized head by head.
      window: how many positions a query sees, itself included; None is all before it.
      source: where the sizes are published.
    """

    name: str
    vocab: int
    width: int
    ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    theta: float = 10_000.0
    eps: float = 1e-5
    scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    source: str = ""

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint holds; a tied head is counted once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = self.width * (2 * q + 2 * kv + 3 * self.ff)
        biases = self.qkv_bias * (q + 2 * kv) + self.o_bias * self.width
        biases += self.mlp_bias * (2 * self.ff + self.width)
        norms = 2 * self.width + self.qk_norm * 2 * self.head_dim
        ends = self.vocab * self.width * (1 if self.tied else 2) + self.width
        return self.layers * (matrices + biases + norms) + ends


def read_model(file: Path) -> Model:
    """Reads the `config.json` of a Hugging Face model of one of the `FAMILIES`.

    Raises:
      AdapterError: if it cannot be read, lacks a key, or holds a model of another family.
    """
    config = read_json(file)
    if not isinstance(config, Mapping):
        raise AdapterError(f"{file} must hold a JSON object, found {type(config).__name__}.")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise AdapterError(
            f"{file} has model_type {family!r}, and the planner knows {list(FAMILIES)}. For "
            "another model call `rslora_jax.plan.plan` with your own training step."
        )
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise AdapterError(f"{file} lacks {missing}, found {sorted(config)}. Download it again.")
    _check_plain(file, config)
    return Model(source=str(file), name=_name(file, config), **_sizes(file, config))


def _name(file: Path, config: Mapping[str, Any]) -> str:
    told = config.get("_name_or_path")
    return told if isinstance(told, str) and told else file.absolute().parent.name


def _sizes(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    def size(key: str, default: int | None = None) -> int:
        found = config.get(key)
        return _whole(file, key, default if found is None else found)

    width, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise AdapterError(
            f"{file}: num_attention_heads must be a multiple of num_key_value_heads, found "
            f"{heads} and {kv_heads}."
        )
    shape = {"vocab": size("vocab_size"), "width": width, "ff": size("intermediate_size")}
    shape |= {"layers": size("num_hidden_layers"), "heads": heads, "kv_heads": kv_heads}
    return shape | {"head_dim": size("head_dim", width // heads)} | _constants(file, config)


def _constants(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    qwen2, bias = config["model_type"] == "qwen2", bool(config.get("attention_bias", False))
    rope = {**_object(file, "rope_scaling", config), **_object(file, "rope_parameters", config)}
    theta = {"rope_theta": config.get("rope_theta") or rope.get("rope_theta")}
    windowed = config.get("use_sliding_window", config["model_type"] == "mistral")
    return {
        "tied": bool(config.get("tie_word_embeddings", False)),
        "theta": _number(file, "rope_theta", theta, 10_000.0),
        "eps": _number(file, "rms_norm_eps", config, 1e-6),
        "scaling": _scaling(file, rope),
        "qkv_bias": qwen2 or bias,
        "o_bias": bias and not qwen2,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "qk_norm": config["model_type"] == "qwen3",
        "window": _window(file, config) if windowed else None,
    }


def _window(file: Path, config: Mapping[str, Any]) -> int | None:
    found = config.get("sliding_window")
    return None if found is None else _whole(file, "sliding_window", found)


def _scaling(file: Path, rope: Mapping[str, Any]) -> RopeScaling | None:
    # Other kinds change the angles too, and no shape and no cost: they are planned without.
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    original = rope.get("original_max_position_embeddings")
    return RopeScaling(
        _number(file, "factor", rope, 8.0),
        _number(file, "low_freq_factor", rope, 1.0),
        _number(file, "high_freq_factor", rope, 4.0),
        _whole(file, "original_max_position_embeddings", 8192 if original is None else original),
    )


def _check_plain(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses layers that differ from one another, which one scan cannot hold."""
    told = config.get("layer_types") or []
    if not isinstance(told, list) or not all(isinstance(kind, str) for kind in told):
        raise AdapterError(f"{file}: layer_types must be a list of names, found {told!r}.")
    kinds = set(told)
    if len(kinds) > 1:
        raise AdapterError(
            f"{file} mixes layers of the kinds {sorted(kinds)}, and the planner's layers are all "
            "alike. Call `rslora_jax.plan.plan` with your own training step."
        )


def _object(file: Path, key: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise AdapterError(f"{file}: {key} must be an object, found {found!r}.")
    return found or {}


def _number(file: Path, key: str, config: Mapping[str, Any], default: float) -> float:
    """A number above 0; null is as good as none, as in Hugging Face's own reader."""
    found = config.get(key)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or found <= 0:
        raise AdapterError(f"{file}: {key} must be a number above 0, found {found!r}.")
    return float(found)


def _whole(file: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{file}: {key} must be an integer of at least 1, found {value!r}.")
    return value
