"""Rotary positions (RoPE, arXiv:2104.09864), with Llama 3.1's scaling."""

import math

import jax
import jax.numpy as jnp

from llama_config import LlamaConfig


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
    """Turn each pair (x[i], x[i + head_dim/2]) by its angle.

    Hugging Face's convention: the two members of a pair lie half a head apart, not side by side.

    Args:
      x: [B, T, heads, head_dim].
      angles: [T, head_dim / 2] or [B, T, head_dim / 2], radians.

    Returns:
      [B, T, heads, head_dim] in the dtype of `x`, computed in float32.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)
