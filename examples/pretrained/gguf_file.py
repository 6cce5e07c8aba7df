"""GGUF files: llama.cpp's, of any number format that the package `gguf` turns into floats.

llama.cpp calls Mistral's models "llama" too. It keeps the rows of a "llama"'s q and k in another
order, and Llama 3.1's change of the rotary frequencies as a tensor of divisors.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama import LlamaConfig, RopeScaling, rope_frequencies
from pretrained.chat import Chat
from pretrained.errors import ModelError
from pretrained.gguf_tokens import (
    read_special,
    read_tokenizer,
    read_words,
    write_tokenizer_settings,
)
from pretrained.metadata import Metadata
from pretrained.pieces import Tensors, match, structs_of
from pretrained.sizes import name_family, write_settings
from pretrained.source import Source
from pretrained.special import check_vocabulary

ARCHITECTURES = ("llama", "qwen2")
BLOCKS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""Our name of a block -> llama.cpp's."""
DIVISORS = "rope_freqs.weight"


class Stored(NamedTuple):
    """A tensor in a file: read when it is wanted, so that the file need not stay mapped.

    Attributes:
      path: of the file.
      offset: of the tensor's first byte.
      dtype, dims: of what is stored there.
      kind: how that is to be understood.
      shape: of the tensor, as llama.cpp writes it.
    """

    path: Path
    offset: int
    dtype: np.dtype
    dims: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]

    @classmethod
    def of(cls, path: Path, tensor: gguf.ReaderTensor) -> "Stored":
        """Where the tensor of a reader lies."""
        data, shape = tensor.data, tuple(map(int, tensor.shape))
        return cls(path, int(tensor.data_offset), data.dtype, data.shape, tensor.tensor_type, shape)

    def floats(self) -> np.ndarray:
        """Its numbers."""
        count = math.prod(self.dims)
        held = np.fromfile(self.path, self.dtype, count, offset=self.offset)
        return gguf.quants.dequantize(held.reshape(self.dims), self.kind)


def open_gguf(path: Path, dtype: DTypeLike) -> Source:
    """Open a GGUF file; see `open_model`."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(f"{path} is not a whole GGUF file: {error}") from error
    try:
        return _open(path, reader, dtype)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _open(path: Path, reader: gguf.GGUFReader, dtype: DTypeLike) -> Source:
    metadata = Metadata(reader)
    architecture = metadata.expect("general.architecture", ARCHITECTURES)
    if (count := metadata.get("split.count", 1)) > 1:
        raise ModelError(f"one file of {count}; join them: llama-gguf-split --merge FIRST ONE.gguf")
    tensors = {tensor.name: Stored.of(path, tensor) for tensor in reader.tensors}
    config = read_sizes(metadata, tensors, architecture)
    structs = structs_of(config, dtype)
    pieces = match(structs, _tensors(tensors, config, architecture), tensor_name, DIVISORS.__eq__)
    tokenizer, special = read_tokenizer(metadata), read_special(metadata)
    check_vocabulary(tokenizer, special, config.vocab_size)
    template = metadata.get("tokenizer.chat_template")
    context = metadata[f"{architecture}.context_length"]
    settings = write_settings(config, context) | {"torch_dtype": jnp.dtype(dtype).name}
    return Source(
        path=path,
        family=name_family(config),
        config=config,
        context=context,
        tokenizer=tokenizer,
        chat=None if template is None else Chat(template, read_words(metadata)),
        **special._asdict(),
        settings=settings | {"eos_token_id": list(special.eos), "bos_token_id": special.bos},
        tokenizer_settings=write_tokenizer_settings(metadata),
        files=(),
        structs=structs,
        pieces=pieces,
    )


def read_sizes(metadata: Metadata, tensors: Mapping[str, Any], architecture: str) -> LlamaConfig:
    """The sizes in the metadata, and what the tensors themselves say: heads, biases."""

    def said(name: str, default: Any = ...) -> Any:
        name = f"{architecture}.{name}"
        return metadata[name] if default is ... else metadata.get(name, default)

    heads, d_model = said("attention.head_count"), said("embedding_length")
    head_dim = said("attention.key_length", d_model // heads)
    biased = {block for block in BLOCKS.values() if f"blk.0.{block}.bias" in tensors}
    theta = said("rope.freq_base", 10_000.0)
    _refuse_others(said, head_dim)
    if "token_embd.weight" not in tensors:
        raise ModelError("the tensor 'token_embd.weight' is missing")
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        d_model=d_model,
        d_ff=said("feed_forward_length"),
        layers=said("block_count"),
        heads=heads,
        kv_heads=said("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=theta,
        norm_eps=said("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        attention_bias="attn_output" in biased,
        mlp_bias="ffn_down" in biased,
        rope_scaling=_rope_scaling(tensors.get(DIVISORS), theta, head_dim),
        qkv_bias="attn_q" in biased and "attn_output" not in biased,
        sliding_window=said("attention.sliding_window", None) or None,
    )


def tensor_name(path: str, layer: int | None) -> str:
    """llama.cpp's name of a leaf, or of one layer of it.

    >>> tensor_name("layers/mlp/up_proj/kernel", 3)
    'blk.3.ffn_up.weight'
    """
    *_, block, kind = path.split("/")
    end = "bias" if kind == "bias" else "weight"
    return f"{'' if layer is None else f'blk.{layer}.'}{BLOCKS[block]}.{end}"


def _refuse_others(said: Any, head_dim: int) -> None:
    """Refuse what `llama.Llama` does not compute."""
    supported = {
        "expert_count": 0,
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "rope.scaling.type": "none",
        "rope.scale_linear": 1.0,
    }
    for name, value in supported.items():
        if (found := said(name, value)) != value:
            raise ModelError(f"{name} is {found!r}; supported is {value!r}")


def _rope_scaling(tensor: Any, theta: float, head_dim: int) -> RopeScaling | None:
    """The words for a tensor of divisors: the file tells the numbers, not how they were made.

    All of Llama 3.1 to 3.3 share the three constants; a tensor made with others is refused.
    """
    if tensor is None:
        return None
    found = np.asarray(tensor.floats())
    guess = RopeScaling(float(found[-1]), 1.0, 4.0, 8192)
    plain = LlamaConfig(1, 1, 1, 1, 1, 1, head_dim, rope_theta=theta)
    changed = LlamaConfig(1, 1, 1, 1, 1, 1, head_dim, rope_theta=theta, rope_scaling=guess)
    wanted = np.asarray(rope_frequencies(plain) / rope_frequencies(changed))
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-4):
        raise ModelError(
            f"{DIVISORS} holds other divisors than those of Llama 3.1 (low 1, high 4, context "
            "8192); pass the Hugging Face folder of this model"
        )
    return guess


def _tensors(tensors: Mapping[str, Any], config: LlamaConfig, architecture: str) -> Tensors:
    permuted = {"attn_q": config.heads, "attn_k": config.kv_heads}
    heads = permuted if architecture == "llama" else {}

    def read(name: str) -> np.ndarray:
        weight = tensors[name].floats()
        block = re.fullmatch(r"blk\.\d+\.(\w+)\.(?:weight|bias)", name)
        count = heads.get(block[1]) if block else None
        return weight if count is None else unpermute(weight, count)

    shapes = {name: tensor.shape[::-1] for name, tensor in tensors.items()}
    return Tensors(shapes, read)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q and k: pairs side by side -> half a head apart."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
