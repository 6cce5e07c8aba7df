"""Tiny pretrained Llamas on disk, written without torch: Hugging Face folders and GGUF files."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import rslora_jax as rl
from llama import LlamaConfig
from pretrained.pieces import structs_of

TINY = LlamaConfig(
    vocab_size=11,
    d_model=8,
    d_ff=10,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    rope_theta=500.0,
    norm_eps=0.25,
    tied=False,
)
SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 0.25,
    "rope_theta": 500.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
"""TINY, as Hugging Face says it."""
VOCABULARY = ["<|end|>", *"abcĠ", "ab", "Ġc", "1", "2", "d", "e"]
MERGES = ["a b", "Ġ c"]


def variables_of(config):
    """Random variables, NumPy, as `Source.load` should give them back."""
    structs = structs_of(config, jnp.float32)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), structs)


def tensors_of(config, dtype=np.float32):
    """The same variables under Hugging Face's names: another code's, not the reader's."""
    named = rl.peft.hf_tensors(variables_of(config))
    return {name: tensor.astype(dtype) for name, tensor in named}


def write_folder(folder, config=TINY, tensors=None, **settings):
    """A Hugging Face folder; `settings` change its config.json, `...` takes an entry away."""
    folder.mkdir(exist_ok=True)
    said = {k: v for k, v in {**SETTINGS, **settings}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(said))
    save_file(tensors_of(config) if tensors is None else tensors, folder / "model.safetensors")
    tokenizer_of().save(str(folder / "tokenizer.json"))
    return folder


def tokenizer_of(vocabulary=VOCABULARY):
    merges = [tuple(pair.split(" ")) for pair in MERGES]
    made = Tokenizer(models.BPE({word: at for at, word in enumerate(vocabulary)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(vocabulary[0], normalized=False)])
    return made


GGUF_NAMES = {
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


def gguf_tensors_of(config, permuted=True):
    """The same variables under GGUF's names; a "llama"'s rows of q and k are interleaved."""
    params = variables_of(config)["params"]
    tensors = {
        "token_embd.weight": params["embed_tokens"]["embedding"],
        "output_norm.weight": params["norm"]["scale"],
    }
    if not config.tied:
        tensors["output.weight"] = params["lm_head"]["kernel"].T
    for name, (*blocks, kind) in GGUF_NAMES.items():
        leaves = params["layers"]
        for block in blocks:
            leaves = leaves[block]
        for leaf, end in [(kind, "weight"), ("bias", "bias")]:
            for layer, value in enumerate(leaves.get(leaf, ())):
                tensor = value.T
                if permuted and name in ("attn_q", "attn_k"):
                    tensor = interleaved(tensor, config.head_dim)
                tensors[f"blk.{layer}.{name}.{end}"] = tensor
    return tensors


def interleaved(rows, head_dim):
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path,
    config=TINY,
    tensors=None,
    architecture="llama",
    pre="smollm",
    said=None,
    pieces=None,
):
    """A GGUF file; `tensors` may be pairs of bytes and a number format.

    `pieces` make a SentencePiece tokenizer: its tokens, each with score and type. The file does
    not say which of them are special.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_block_count(config.layers)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if pieces is None:
        add_byte_level(writer, pre)
    else:
        add_sentencepiece(writer, pieces)
    for name, value in (said or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        add.get(type(value), writer.add_uint32)(name, value)
    for name, tensor in (gguf_tensors_of(config) if tensors is None else tensors).items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_level(writer, pre):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] + [1] * (len(VOCABULARY) - 1))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)


def add_sentencepiece(writer, pieces):
    tokens, scores, kinds = zip(*pieces, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
