"""A Llama and its tokenizer from a GGUF file, dequantized to float32.

The sizes are read from the file's metadata. What this reader does not know is an error, never
skipped: a tensor left over or missing, another architecture, another tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llama import LlamaConfig

# GGUF's name of a tensor of one layer -> its path under `layers` in our tree.
LAYER_TENSORS = {
    "attn_norm": ("input_layernorm", "scale"),
    "attn_q": ("self_attn", "q_proj", "kernel"),
    "attn_k": ("self_attn", "k_proj", "kernel"),
    "attn_v": ("self_attn", "v_proj", "kernel"),
    "attn_output": ("self_attn", "o_proj", "kernel"),
    "ffn_norm": ("post_attention_layernorm", "scale"),
    "ffn_gate": ("mlp", "gate_proj", "kernel"),
    "ffn_up": ("mlp", "up_proj", "kernel"),
    "ffn_down": ("mlp", "down_proj", "kernel"),
}
CONTROL_TOKEN = 3  # gguf's token type of <|im_start|> and its like


class ModelError(Exception):
    """The model's file is missing or is not what it should be; the message says what to do."""


class Pretrained(NamedTuple):
    """A checkpoint: sizes, variables (NumPy, float32, layers stacked) and tokenizer."""

    config: LlamaConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer


def read(path: Path) -> Pretrained:
    """Read a Llama and its tokenizer from a GGUF file.

    Raises:
      ModelError: the file is not a whole GGUF file, or holds another kind of model.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(f"{path} is not a whole GGUF file: {error}") from error
    try:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = read_config(reader, tied="output.weight" not in tensors)
        return Pretrained(config, {"params": read_params(tensors, config)}, read_tokenizer(reader))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def read_config(reader: gguf.GGUFReader, *, tied: bool) -> LlamaConfig:
    """Read the sizes of the model from the metadata."""
    _expect(reader, "general.architecture", "llama")
    heads = _field(reader, "llama.attention.head_count")
    d_model = _field(reader, "llama.embedding_length")
    return LlamaConfig(
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        d_model=d_model,
        d_ff=_field(reader, "llama.feed_forward_length"),
        layers=_field(reader, "llama.block_count"),
        heads=heads,
        kv_heads=_field(reader, "llama.attention.head_count_kv", heads),
        head_dim=_field(reader, "llama.attention.key_length", d_model // heads),
        rope_theta=_field(reader, "llama.rope.freq_base", 10_000.0),
        norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        tied=tied,
    )


def read_params(tensors: Mapping[str, gguf.ReaderTensor], config: LlamaConfig) -> dict[str, Any]:
    """Dequantize every tensor and arrange them as `llama.Llama` wants them.

    Args:
      tensors: by GGUF name; every one of them must be known.
      config: the sizes that say where the heads lie.

    Returns:
      Nested dict of float32 arrays; layers stacked on axis 0, kernels [.., in, out].
    """
    left = dict(tensors)
    params: dict[str, Any] = {"embed_tokens": {"embedding": _take(left, "token_embd.weight")}}
    params["norm"] = {"scale": _take(left, "output_norm.weight")}
    if not config.tied:
        params["lm_head"] = {"kernel": _take(left, "output.weight").T}
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
    for name, tree_path in LAYER_TENSORS.items():
        stacked = _stack(left, name, config.layers, heads.get(name))
        _put(params, ("layers", *tree_path), stacked)
    if left:
        raise ModelError(f"tensors that this Llama does not have: {', '.join(sorted(left)[:5])}")
    return params


def read_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Build SmolLM's tokenizer: every digit alone, then byte-level BPE with GPT-2's regex."""
    _expect(reader, "tokenizer.ggml.model", "gpt2")
    _expect(reader, "tokenizer.ggml.pre", "smollm")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, _field(reader, "tokenizer.ggml.token_type"), strict=True)
    control = [token for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer


def _field(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    if field is not None:
        return field.contents()
    if default is None:
        raise ModelError(f"the metadata lacks {name!r}")
    return default


def _expect(reader: gguf.GGUFReader, name: str, value: str) -> None:
    if (found := _field(reader, name)) != value:
        raise ModelError(f"{name} is {found!r}; only {value!r} can be read here")


def _take(tensors: dict[str, gguf.ReaderTensor], name: str) -> np.ndarray:
    if name not in tensors:
        raise ModelError(f"the tensor {name!r} is missing")
    tensor = tensors.pop(name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def _stack(
    tensors: dict[str, gguf.ReaderTensor], name: str, layers: int, heads: int | None
) -> np.ndarray:
    """One tensor of every layer: scales [layers, n], kernels [layers, in, out]."""
    taken = [_take(tensors, f"blk.{layer}.{name}.weight") for layer in range(layers)]
    if heads is not None:
        taken = [_unpermute(weight, heads) for weight in taken]
    return np.stack([np.ascontiguousarray(weight.T) for weight in taken])


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of the rows of q and k: [out, in], pairs side by side -> half apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
