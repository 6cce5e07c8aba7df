"""Grouped-query attention: who sees whom, and the cache of keys and values."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from llama_config import LlamaConfig
from placing import alike, row_parallel
from rope import rope_frequencies, rotate


class Cache(NamedTuple):
    """Keys and values of the tokens so far, every layer's stacked on axis 0.

    Attributes:
      keys: [layers, B, S, kv_heads, head_dim], rotated.
      values: the same shape.
      starts: int32 [B], the first slot of each row: the slots before it are padding.
      used: int32 scalar, how many slots are filled, the same for all rows.
    """

    keys: jax.Array
    values: jax.Array
    starts: jax.Array
    used: jax.Array


class View(NamedTuple):
    """What the tokens of a batch see, the same in every layer.

    Attributes:
      angles: [T, head_dim / 2] or [B, T, head_dim / 2], see `rope.rotate`.
      mask: bool [B, 1, T, S] of the keys that each query may see; None: all those before it.
      slot: where in the cache these tokens go; None without a cache. With a cache the mask
        tells order and window too.
    """

    angles: jax.Array
    mask: jax.Array | None = None
    slot: jax.Array | None = None


def empty_cache(
    config: LlamaConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """A cache for `batch` rows of `length` tokens, prompt and answer together."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    starts = jnp.zeros(batch, jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), starts, jnp.int32(0))


def extend(cache: Cache, keys: jax.Array, values: jax.Array) -> Cache:
    """The cache with T more tokens: keys and values are [layers, B, T, kv_heads, head_dim]."""
    used = cache.used + keys.shape[2]
    return cache._replace(
        keys=_write(cache.keys, keys, cache.used, 2),
        values=_write(cache.values, values, cache.used, 2),
        used=used,
    )


def view_rows(
    config: LlamaConfig, length: int, segments: jax.Array | None, offsets: jax.Array | None
) -> View:
    """What whole rows see: each token its own segment, up to itself."""
    at = jnp.arange(length) if offsets is None else offsets
    angles = at[..., None] * rope_frequencies(config)
    if segments is None:
        return View(angles)
    return View(angles, (segments[:, :, None] == segments[:, None, :])[:, None])


def view_cached(config: LlamaConfig, length: int, cache: Cache, offsets: jax.Array | None) -> View:
    """What the next `length` tokens see: their own row of the cache, and one another."""
    at = cache.used + jnp.arange(length)
    if offsets is None:
        offsets = jnp.maximum(at - cache.starts[:, None], 0)
    slots, now = jnp.arange(cache.keys.shape[2]), at[:, None]
    seen = slots <= now
    if config.sliding_window is not None:
        seen &= slots > now - config.sliding_window
    mask = seen & (slots >= cache.starts[:, None, None])
    return View(offsets[..., None] * rope_frequencies(config), mask[:, None], cache.used)


class Attention(nn.Module):
    """Causal grouped-query self-attention: [B, T, d] -> [B, T, d], and the keys and values.

    With `past`, one layer of a cache, the new tokens also see the earlier ones, and their own
    keys and values are handed out to be cached. Without it nothing is handed out.
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, view: View, past: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config

        def project(name: str, heads: int) -> jax.Array:
            bias = c.attention_bias or c.qkv_bias
            dense = nn.Dense(heads * c.head_dim, bias, self.dtype, name=name)
            return dense(x).reshape(*x.shape[:-1], heads, c.head_dim)

        q = rotate(project("q_proj", c.heads), view.angles)
        k = rotate(project("k_proj", c.kv_heads), view.angles)
        v = project("v_proj", c.kv_heads)
        fresh = None if past is None else (k, v)
        mixed = _mix(q, k, v, view, c) if past is None else _mix_cached(q, k, v, view, past)
        mixed = mixed.reshape(*x.shape[:-1], c.heads * c.head_dim)
        dense = nn.Dense(
            c.d_model, c.attention_bias, self.dtype, dot_general=row_parallel, name="o_proj"
        )
        return dense(mixed), fresh


def _mix(q: jax.Array, k: jax.Array, v: jax.Array, view: View, c: LlamaConfig) -> jax.Array:
    window = c.sliding_window
    # A window that covers the row hides nothing: the plain path is the efficient one.
    local = None if window is None or window >= k.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, mask=view.mask, is_causal=True, local_window_size=local
    )


def _mix_cached(
    q: jax.Array, k: jax.Array, v: jax.Array, view: View, past: tuple[jax.Array, jax.Array]
) -> jax.Array:
    k, v = (
        _write(alike(new, old.astype(new.dtype)), new, view.slot, 1)
        for old, new in zip(past, (k, v), strict=True)
    )
    return jax.nn.dot_product_attention(q, k, v, mask=view.mask)


def _write(old: jax.Array, new: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    new = alike(old, new.astype(old.dtype))
    return lax.dynamic_update_slice_in_dim(old, new, slot, axis)
