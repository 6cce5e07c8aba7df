"""Llama in Flax Linen: one scanned stack of layers, parameters named as Hugging Face names them.

The parameter tree holds every layer's weights stacked on axis 0:

    embed_tokens/embedding              [vocab, d]
    layers/self_attn/{q,k,v,o}_proj     kernel [layers, in, out]
    layers/mlp/{gate,up,down}_proj      kernel [layers, in, out]
    layers/{input,post_attention}_layernorm, norm
    lm_head                             kernel [d, vocab], only where the head is not tied

The same model runs on one device and on meshes of Auto or Explicit axes; `SPECS` says how its
parameters lie on a mesh with axes `fsdp` and `tensor`. Nothing in this file knows about adapters.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

SPECS = (
    (r".*/(q|k|v|gate|up)_proj/kernel", P(None, "fsdp", "tensor")),
    (r".*/(o|down)_proj/kernel", P(None, "tensor", "fsdp")),
    (r".*/(q|k|v|gate|up)_proj/bias", P(None, "tensor")),
    (r"(.*/)?embed_tokens/embedding", P("tensor", None)),
    (r"(.*/)?lm_head/kernel", P(None, "tensor")),
    (r".*", P()),
)
"""How parameters lie on a mesh: (regex of the whole path, spec), the first that matches."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Long-context frequencies of Llama 3.1 and later (`"rope_type": "llama3"`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one Llama checkpoint.

    Attributes:
      vocab_size: rows of the embedding.
      d_model: width of the residual stream, `d` in the shapes of this file.
      d_ff: width of the gated MLP.
      layers: number of layers.
      heads: number of query heads.
      kv_heads: number of key and value heads; divides `heads`.
      head_dim: width of one head.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      tied: whether the output head is the embedding.
      attention_bias: whether q, k, v and o have biases.
      mlp_bias: whether gate, up and down have biases.
      rope_scaling: Llama 3.1's change of the rotary frequencies, if any.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        """Refuse head counts that grouped-query attention cannot share out."""
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}: "
                "every key head serves the same number of query heads"
            )


def rope_frequencies(config: LlamaConfig) -> jax.Array:
    """Angles per position of each rotated pair, in radians: [head_dim / 2], float32."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Turns made within the original context: few turns are slowed down, many are kept.
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn each pair (x[i], x[i + head_dim/2]) by its angle (RoPE, arXiv:2104.09864).

    Hugging Face's convention: the two members of a pair lie half a head apart, not side by side.

    Args:
      x: [B, T, heads, head_dim].
      angles: [T, head_dim / 2], radians.

    Returns:
      [B, T, heads, head_dim] in the dtype of `x`, computed in float32.
    """
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def look_up(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding, which lie on the mesh as the tokens do: [B, T] -> [B, T, d]."""
    return embedding.at[tokens].get(mode="fill", out_sharding=_as_tokens(tokens))


def row_parallel(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """A `dot_general` summed over a sharded axis: its result lies as the rest of `x` does.

    Explicit axes ask where such a sum goes: [B, T, in] and [in, out] -> [B, T, out].
    """
    return jax.lax.dot_general(x, kernel, *args, **options, out_sharding=_as_tokens(x))


def place(x: jax.Array, spec: P | None) -> jax.Array:
    """`x` where `spec` says on the current mesh, or wherever XLA likes."""
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def _as_tokens(x: jax.Array) -> NamedSharding | None:
    """Where [B, T, d] lies beside `x` of [B, T] or [B, T, ..], if the mesh has Explicit axes."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh, P(*sharding.spec[:2], None))


class Attention(nn.Module):
    """Causal grouped-query self-attention: [B, T, d] -> [B, T, d]."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        c = self.config

        def project(name: str, heads: int) -> jax.Array:
            dense = nn.Dense(heads * c.head_dim, c.attention_bias, self.dtype, name=name)
            return dense(x).reshape(*x.shape[:-1], heads, c.head_dim)

        q = rotate(project("q_proj", c.heads), angles)
        k = rotate(project("k_proj", c.kv_heads), angles)
        v = project("v_proj", c.kv_heads)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.reshape(*x.shape[:-1], c.heads * c.head_dim)
        dense = nn.Dense(
            c.d_model, c.attention_bias, self.dtype, dot_general=row_parallel, name="o_proj"
        )
        return dense(mixed)


class Mlp(nn.Module):
    """SwiGLU (arXiv:2002.05202): [B, T, d] -> [B, T, d]."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = nn.Dense(c.d_ff, c.mlp_bias, self.dtype, name="gate_proj")(x)
        up = nn.Dense(c.d_ff, c.mlp_bias, self.dtype, name="up_proj")(x)
        down = nn.Dense(
            c.d_model, c.mlp_bias, self.dtype, dot_general=row_parallel, name="down_proj"
        )
        return down(nn.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm layer, shaped for `nn.scan`: ([B, T, d], angles) -> ([B, T, d], None)."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32
    activations: P | None = None

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, None]:
        c, dtype = self.config, self.dtype
        seen = nn.RMSNorm(c.norm_eps, dtype, name="input_layernorm")(x)
        x = x + Attention(c, dtype, name="self_attn")(seen, angles)
        seen = nn.RMSNorm(c.norm_eps, dtype, name="post_attention_layernorm")(x)
        return place(x + Mlp(c, dtype, name="mlp")(seen), self.activations), None


class Llama(nn.Module):
    """A Llama language model: tokens [B, T] -> logits [B, T, vocab].

    Attributes:
      config: sizes of the checkpoint.
      dtype: dtype of the activations; parameters keep theirs.
      remat: whether to recompute each layer in the backward pass instead of storing it.
      activations: how [B, T, d] lies between layers, for the mesh of `jax.set_mesh`. Explicit
        axes need no such word: there the tokens say it.
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    activations: P | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, *, positions: ArrayLike | None = None) -> jax.Array:
        """Compute logits, everywhere or at `positions` only.

        A row padded on the right needs no mask: causal attention never looks at the padding.

        Args:
          tokens: integers [B, T].
          positions: integers [B, P]; where to read the head. At a vocabulary of 49152 the
            logits outweigh all other activations, so ask only for those that you use.

        Returns:
          Logits [B, T, vocab], or [B, P, vocab] with `positions`, in `dtype`.
        """
        c = self.config
        embed = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype, name="embed_tokens")
        angles = jnp.outer(jnp.arange(tokens.shape[1]), rope_frequencies(c))
        x = place(look_up(embed.embedding.astype(self.dtype), tokens), self.activations)
        x, _ = self._stack()(x, angles)
        if positions is not None:
            x = jnp.take_along_axis(x, jnp.asarray(positions)[..., None], axis=1)
        x = nn.RMSNorm(c.norm_eps, self.dtype, name="norm")(x)
        if c.tied:
            return embed.attend(x)
        return nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, name="lm_head")(x)

    def _stack(self) -> nn.Module:
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.config.layers,
        )
        return stack(self.config, self.dtype, self.activations, name="layers")
