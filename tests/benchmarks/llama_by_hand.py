"""The Llama of `examples/llama.py` again, with LoRA written into its dense layers by hand.

Its parameters are those of `rl.LoraParams`: the base in the collection "params", the factors,
named alike, in "lora".
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from attention import View
from llama import Llama
from placing import place, row_parallel
from rope import rotate


class Dense(nn.Module):
    """A matrix with LoRA: the frozen kernel, and beside it ``{"a", "b"}`` in "lora"."""

    features: int
    scale: float
    dtype: Any
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        factors = self.get_variable("lora", "kernel")
        a, b = (factors[name].astype(self.dtype) for name in "ab")
        product = self.dot_general(x, kernel.astype(self.dtype), (((2,), (0,)), ((), ())))
        return product + (self.scale * (x @ a)) @ b


class HandAttention(nn.Module):
    """`attention.Attention` without a cache and without biases."""

    config: Any
    dtype: Any
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array, view: View) -> jax.Array:
        c = self.config

        def project(name: str, heads: int) -> jax.Array:
            dense = Dense(heads * c.head_dim, self.scale, self.dtype, name=name)
            return dense(x).reshape(*x.shape[:-1], heads, c.head_dim)

        q = rotate(project("q_proj", c.heads), view.angles)
        k = rotate(project("k_proj", c.kv_heads), view.angles)
        v = project("v_proj", c.kv_heads)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=view.mask, is_causal=True)
        dense = Dense(c.d_model, self.scale, self.dtype, row_parallel, name="o_proj")
        return dense(mixed.reshape(*x.shape[:-1], c.heads * c.head_dim))


class HandMlp(nn.Module):
    """`llama.Mlp` without biases."""

    config: Any
    dtype: Any
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = Dense(c.d_ff, self.scale, self.dtype, name="gate_proj")(x)
        up = Dense(c.d_ff, self.scale, self.dtype, name="up_proj")(x)
        down = Dense(c.d_model, self.scale, self.dtype, row_parallel, name="down_proj")
        return down(nn.silu(gate) * up)


class HandLayer(nn.Module):
    """`llama.Layer`."""

    config: Any
    dtype: Any
    activations: Any
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array, view: View, past: Any = None) -> tuple[jax.Array, Any]:
        c, dtype = self.config, self.dtype
        seen = nn.RMSNorm(c.norm_eps, dtype, name="input_layernorm")(x)
        x = x + HandAttention(c, dtype, self.scale, name="self_attn")(seen, view)
        seen = nn.RMSNorm(c.norm_eps, dtype, name="post_attention_layernorm")(x)
        return place(x + HandMlp(c, dtype, self.scale, name="mlp")(seen), self.activations), None


class HandLlama(Llama):
    """`llama.Llama`, not rematerialized, with LoRA of one scale in every layer."""

    scale: float = 1.0

    def _stack(self) -> nn.Module:
        stack = nn.scan(
            HandLayer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=self.config.layers,
        )
        return stack(self.config, self.dtype, self.activations, self.scale)
