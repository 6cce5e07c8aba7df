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

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from attention import Attention, Cache, View, extend, view_cached, view_rows
from head import Head, Scores, float32_logits, score
from llama_config import LlamaConfig, RopeScaling
from placing import SPECS, look_up, pick, place, row_parallel
from rope import rope_frequencies, rotate

__all__ = [
    "REMAT",
    "SPECS",
    "Cache",
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "Scores",
    "rope_frequencies",
    "rotate",
]

REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass computes again: all of a layer, or all but its products of weights."""


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
    """One pre-norm layer, shaped for `nn.scan`: [B, T, d] -> [B, T, d] and what to cache."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32
    activations: P | None = None

    @nn.compact
    def __call__(self, x: jax.Array, view: View, past: Any = None) -> tuple[jax.Array, Any]:
        c, dtype = self.config, self.dtype
        seen = nn.RMSNorm(c.norm_eps, dtype, name="input_layernorm")(x)
        mixed, fresh = Attention(c, dtype, name="self_attn")(seen, view, past)
        x = x + mixed
        seen = nn.RMSNorm(c.norm_eps, dtype, name="post_attention_layernorm")(x)
        return place(x + Mlp(c, dtype, name="mlp")(seen), self.activations), fresh


class Llama(nn.Module):
    """A Llama language model: tokens [B, T] -> logits [B, T, vocab].

    Attributes:
      config: sizes of the checkpoint.
      dtype: dtype of the activations; parameters keep theirs.
      remat: what to compute again in the backward pass instead of storing it: False or "none",
        nothing; True or "full", each layer; "dots", what lies between a layer's products.
      activations: how [B, T, d] lies between layers, for the mesh of `jax.set_mesh`. Explicit
        axes need no such word: there the tokens say it.
      logits_bytes: how many bytes of float32 logits `scores` holds at once on each device.
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32
    remat: bool | str = False
    activations: P | None = None
    logits_bytes: int = 64 * 2**20

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype)
        self.layers = self._stack()
        self.norm = nn.RMSNorm(c.norm_eps, self.dtype)
        if not c.tied:
            self.lm_head = Head(c.d_model, c.vocab_size)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: ArrayLike | None = None,
        segments: ArrayLike | None = None,
        offsets: ArrayLike | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Compute logits, everywhere or at `positions` only.

        A row padded on the right needs no mask: causal attention never looks at the padding.

        Args:
          tokens: integers [B, T].
          positions: integers [B, P]; where to read the head. At a vocabulary of 49152 the
            logits outweigh all other activations, so ask only for those that you use.
          segments: integers [B, T]: a token sees only tokens of its own segment, for rows that
            hold several texts. All tokens of a segment lie side by side.
          offsets: integers [B, T], each token's position in its text; by default its place in
            the row, without padding on the left if there is a cache.
          cache: what earlier calls returned, or an empty one. Its `starts` tell where rows that
            are padded on the left begin; what is computed of padding is noise.

        Returns:
          Logits [B, T, vocab], or [B, P, vocab] with `positions`, in `dtype`; with a cache,
          the logits in float32, so that the likeliest token is that of `scores`, and the cache
          with these tokens in it.
        """
        x, cache = self._run(tokens, segments, offsets, cache)
        if positions is not None:
            x = pick(x, jnp.asarray(positions))
        x = self.norm(x)
        return x @ self._head() if cache is None else (float32_logits(x, self._head()), cache)

    def scores(
        self,
        tokens: jax.Array,
        labels: ArrayLike,
        positions: ArrayLike,
        *,
        segments: ArrayLike | None = None,
        offsets: ArrayLike | None = None,
    ) -> Scores:
        """Score labels at `positions`, both integers [B, P]; see `__call__` for the rest.

        No more than `logits_bytes` of logits exist at a time: see `head.score`.
        """
        x, _ = self._run(tokens, segments, offsets, None)
        x = self.norm(pick(x, jnp.asarray(positions)))
        return score(x, self._head(), labels, self.logits_bytes)

    def _run(self, tokens: jax.Array, segments: Any, offsets: Any, cache: Cache | None) -> Any:
        """The output of the last layer, and the cache with these tokens in it."""
        segments, offsets = (x if x is None else jnp.asarray(x) for x in (segments, offsets))
        if cache is not None and segments is not None:
            raise ValueError("segments and cache exclude each other: cached rows are one text each")
        if cache is None:
            view = view_rows(self.config, tokens.shape[1], segments, offsets)
        else:
            view = view_cached(self.config, tokens.shape[1], cache, offsets)
        x = look_up(self.embed_tokens.embedding.astype(self.dtype), tokens)
        past = None if cache is None else (cache.keys, cache.values)
        x, fresh = self.layers(place(x, self.activations), view, past)
        return x, None if cache is None else extend(cache, *fresh)

    def _head(self) -> jax.Array:
        """The head as a matrix [d, vocab], in `dtype`."""
        matrix = self.embed_tokens.embedding.T if self.config.tied else self.lm_head.kernel
        return matrix.astype(self.dtype)

    def _stack(self) -> nn.Module:
        stack = nn.scan(
            _remat(self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=self.config.layers,
        )
        return stack(self.config, self.dtype, self.activations)


def _remat(policy: bool | str) -> Any:
    name = {False: "none", True: "full"}.get(policy, policy)
    if name == "none":
        return Layer
    if name not in REMAT:
        raise ValueError(f"remat={policy!r} is not known: use True, False, none, full or dots")
    return nn.remat(Layer, prevent_cse=False, policy=REMAT[name])
