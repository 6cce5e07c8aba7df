"""Sizes: from the words of a config.json to a `LlamaConfig`, or an error; nothing is passed over.

Both spellings of the rotary frequencies are read: `rope_theta` with `rope_scaling`, and the
`rope_parameters` of transformers 5.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama import LlamaConfig, RopeScaling
from pretrained.errors import ModelError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}
CONTEXTS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768}  # where config.json is silent


def family_of(said: Mapping[str, Any]) -> str:
    """The family of a config.json.

    Raises:
      ModelError: it is none that `llama.Llama` computes.
    """
    family, named = said.get("model_type"), said.get("architectures") or []
    supported = ", ".join(f"{key} ({name})" for key, name in ARCHITECTURES.items())
    if family not in ARCHITECTURES:
        raise ModelError(f"model_type is {family!r}; supported are {supported}")
    if named and ARCHITECTURES[family] not in named:
        raise ModelError(f"architectures is {named}; supported are {supported}")
    if said.get("quantization_config"):
        method = said["quantization_config"].get("quant_method")
        raise ModelError(
            f"the weights are quantized ({method!r}); pass a folder in float32, bfloat16 or "
            "float16, which can be quantized here, or a GGUF file"
        )
    return family


def read_sizes(said: Mapping[str, Any]) -> LlamaConfig:
    """The sizes of a config.json.

    Raises:
      ModelError: a size is missing, or the model computes something else than a Llama.
    """
    family = family_of(said)
    _expect(said, "hidden_act", ("silu", "swish"))
    heads, d_model = _number(said, "num_attention_heads"), _number(said, "hidden_size")
    theta, scaling = read_rope(said)
    try:
        return LlamaConfig(
            vocab_size=_number(said, "vocab_size"),
            d_model=d_model,
            d_ff=_number(said, "intermediate_size"),
            layers=_number(said, "num_hidden_layers"),
            heads=heads,
            kv_heads=said.get("num_key_value_heads") or heads,
            head_dim=said.get("head_dim") or d_model // heads,
            rope_theta=theta,
            norm_eps=said.get("rms_norm_eps", 1e-6),
            tied=said.get("tie_word_embeddings", False),
            attention_bias=family == "llama" and said.get("attention_bias", False),
            mlp_bias=family == "llama" and said.get("mlp_bias", False),
            rope_scaling=scaling,
            qkv_bias=family == "qwen2",
            sliding_window=read_window(said, family),
        )
    except ValueError as error:
        raise ModelError(str(error)) from error


def read_context(said: Mapping[str, Any]) -> int:
    """The most tokens that the model was made for."""
    return said.get("max_position_embeddings", CONTEXTS[family_of(said)])


def read_rope(said: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and how they are changed.

    Raises:
      ModelError: they are changed in another way than Llama 3.1's.
    """
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    theta = rope.get("rope_theta", said.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ModelError("the rotary frequencies differ from layer to layer, found " + str(rope))
    share = rope.get("partial_rotary_factor", said.get("partial_rotary_factor", 1.0))
    if share not in (None, 1.0):
        raise ModelError(f"partial_rotary_factor is {share}; only whole heads are rotated here")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ModelError(f"rope_type is {kind!r}; supported are 'default' and 'llama3'")
    missing = [name for name in LLAMA3.values() if name not in rope]
    if missing:
        raise ModelError(f"rope_type is 'llama3', but {', '.join(missing)} is missing")
    return float(theta), RopeScaling(**{ours: rope[theirs] for ours, theirs in LLAMA3.items()})


def read_window(said: Mapping[str, Any], family: str) -> int | None:
    """How many tokens a token sees, in all layers; None is all of them.

    Raises:
      ModelError: the layers differ.
    """
    layers = said.get("num_hidden_layers")
    if family == "llama" or (family == "qwen2" and not said.get("use_sliding_window", False)):
        return None
    window = said.get("sliding_window", 4096)
    kinds = said.get("layer_types") if family == "qwen2" else None
    if kinds is None:
        full = min(said.get("max_window_layers", 28), layers) if family == "qwen2" else 0
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len(set(kinds)) > 1:
        raise ModelError(f"layer_types is {kinds}; only layers that are all alike are supported")
    return window if kinds[0] == "sliding_attention" else None


def name_family(config: LlamaConfig) -> str:
    """The family whose config.json can say what a model computes."""
    if config.qkv_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def write_settings(config: LlamaConfig, context: int) -> dict[str, Any]:
    """The config.json of a model that has none: what `read_sizes` reads back."""
    family = name_family(config)
    settings: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": context,
        "tie_word_embeddings": config.tied,
    }
    if config.rope_scaling is not None:
        values = dataclasses.asdict(config.rope_scaling)
        scaling = {theirs: values[ours] for ours, theirs in LLAMA3.items()}
        settings["rope_scaling"] = {"rope_type": "llama3", **scaling}
    return settings | _words_of(config, family)


def _words_of(config: LlamaConfig, family: str) -> dict[str, Any]:
    """What only one family says."""
    window = config.sliding_window
    if family == "llama":
        return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    if family == "mistral":
        return {"sliding_window": window}
    if window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}


def _number(said: Mapping[str, Any], name: str) -> int:
    value = said.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a whole number above 0, found {value!r}")
    return value


def _expect(said: Mapping[str, Any], name: str, supported: tuple[str, ...]) -> None:
    if (found := said.get(name, supported[0])) not in supported:
        raise ModelError(f"{name} is {found!r}; supported is {supported[0]!r}")
