"""Llama as one pure function over stacked weights, laid out so that a pod holds little of it.

The tree is that of `examples/llama.py`, every layer's weights stacked on axis 0, and so is the
function. What differs is how it is computed: one scan over the layers, each recomputed in the
backward pass; attention a block of queries at a time and the loss a block of positions at a
time, each block recomputed too, so that neither scores nor logits are ever whole. Nothing in
this file knows about adapters.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rslora_jax.paths import insert
from rslora_jax.plan.layout import (
    BATCH,
    PLAIN,
    SEQUENCE,
    TENSOR,
    Layout,
    by_block,
    joined,
    mesh_sizes,
    pin,
    recomputed,
)
from rslora_jax.plan.sizes import Model

__all__ = ["logits", "loss", "structs"]

Tree: TypeAlias = Mapping[str, Any]

INTO, OUT_OF = (None, TENSOR), (TENSOR, None)  # how a matrix is split while it is used


def structs(model: Model, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """The parameter tree of a model, as `jax.ShapeDtypeStruct`s.

    Example:
      >>> from rslora_jax.plan.models import find_model
      >>> structs(find_model("llama-3.2-1b"))["layers"]["mlp"]["up_proj"]["kernel"].shape
      (16, 2048, 8192)
    """
    tree: dict[str, Any] = {}
    for path, shape in _shapes(model).items():
        insert(tree, path, jax.ShapeDtypeStruct(shape, dtype))
    return tree


def logits(model: Model, base: Tree, tokens: jax.Array, layout: Layout = PLAIN) -> jax.Array:
    """The logits of every position: tokens [B, T] -> [B, T, vocab], in the layout's dtype."""
    return _hidden(model, layout, base, tokens) @ _head(model, layout, base)


def loss(
    model: Model,
    base: Tree,
    batch: tuple[jax.Array, jax.Array],
    layout: Layout = PLAIN,
    shift: jax.Array | None = None,
) -> jax.Array:
    """The mean cross-entropy of a batch.

    Args:
      model: the sizes.
      base: the weights, as `structs` shapes them.
      batch: tokens and labels, integers [B, T].
      layout: how to compute it.
      shift: added to the embedding of every token, [width]; its gradient goes through all layers.

    Returns:
      A float32 scalar, in nats.
    """
    tokens, labels = batch
    x = _hidden(model, layout, base, tokens, shift)
    x, head = pin(x, BATCH, SEQUENCE, None), pin(_head(model, layout, base), None, TENSOR)

    @jax.checkpoint
    def summed(part: jax.Array, wanted: jax.Array) -> jax.Array:
        scores = jnp.einsum("bscd,dv->bscv", part, head, preferred_element_type=jnp.float32)
        scores = pin(scores, BATCH, SEQUENCE, None, TENSOR)
        # A sum over the vocabulary, where a lookup in a split axis would gather it.
        hit = lax.broadcasted_iota(jnp.int32, scores.shape, 3) == wanted[..., None]
        return jnp.sum(jax.nn.logsumexp(scores, -1) - jnp.where(hit, scores, 0.0).sum(-1))

    sums = by_block(summed, layout, x, labels)
    return sums.sum() / labels.size


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    wide = {"q_proj": (model.width, q), "k_proj": (model.width, kv), "v_proj": (model.width, kv)}
    attention = {**wide, "o_proj": (q, model.width)}
    into = {"gate_proj": (model.width, model.ff), "up_proj": (model.width, model.ff)}
    mlp = {**into, "down_proj": (model.ff, model.width)}
    biased = {"q_proj": model.qkv_bias, "k_proj": model.qkv_bias, "v_proj": model.qkv_bias}
    biased |= {"o_proj": model.o_bias, **dict.fromkeys(mlp, model.mlp_bias)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens/embedding": (model.vocab, model.width)}
    for block, matrices in (("self_attn", attention), ("mlp", mlp)):
        for name, shape in matrices.items():
            shapes[f"layers/{block}/{name}/kernel"] = (model.layers, *shape)
            if biased[name]:
                shapes[f"layers/{block}/{name}/bias"] = (model.layers, shape[1])
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"layers/{name}/scale"] = (model.layers, model.width)
    if model.qk_norm:
        for name in ("q_norm", "k_norm"):
            shapes[f"layers/self_attn/{name}/scale"] = (model.layers, model.head_dim)
    shapes["norm/scale"] = (model.width,)
    return shapes if model.tied else {**shapes, "lm_head/kernel": (model.width, model.vocab)}


def _hidden(
    model: Model, layout: Layout, base: Tree, tokens: jax.Array, shift: jax.Array | None = None
) -> jax.Array:
    """The normalized output of the last layer, [B, T, width]."""
    x = base["embed_tokens"]["embedding"].astype(layout.dtype)[tokens]
    x = x if shift is None else x + shift.astype(x.dtype)
    angles = jnp.outer(jnp.arange(tokens.shape[1]), _frequencies(model))
    between = (SEQUENCE, TENSOR) if layout.spread else SEQUENCE

    def body(x: jax.Array, layer: Tree) -> tuple[jax.Array, None]:
        return pin(_layer(model, layout, layer, x, angles), BATCH, between, None), None

    x, _ = lax.scan(recomputed(layout.remat)(body), pin(x, BATCH, between, None), base["layers"])
    return _norm(model, base["norm"], x)


def _layer(model: Model, layout: Layout, layer: Tree, x: jax.Array, angles: jax.Array) -> jax.Array:
    seen = pin(_norm(model, layer["input_layernorm"], x), BATCH, SEQUENCE, None)
    x = x + _attend(model, layout, layer["self_attn"], seen, angles)
    seen = pin(_norm(model, layer["post_attention_layernorm"], x), BATCH, SEQUENCE, None)
    mlp = layer["mlp"]
    gate, up = (_linear(mlp[name], seen, *INTO) for name in ("gate_proj", "up_proj"))
    hidden = pin(jax.nn.silu(gate) * up, BATCH, SEQUENCE, TENSOR)
    return x + _linear(mlp["down_proj"], hidden, *OUT_OF)


def _attend(
    model: Model, layout: Layout, layer: Tree, x: jax.Array, angles: jax.Array
) -> jax.Array:
    """Causal grouped-query self-attention, [B, T, width] -> the same."""
    q, k, v = (_heads(model, layer, name, x) for name in "qkv")
    q, k = (_rotate(_normed(model, layer, n, h), angles) for n, h in (("q_norm", q), ("k_norm", k)))
    copies = _copies(model)
    k, v = (jnp.repeat(h, copies, 2) if copies > 1 else h for h in (k, v))
    k, v = (pin(h, BATCH, None, TENSOR, None) for h in (k, v))
    q = pin(q.reshape(*q.shape[:2], k.shape[2], -1, model.head_dim), BATCH, SEQUENCE, TENSOR)
    at = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    mixed = by_block(jax.checkpoint(partial(_mix, model, k, v)), layout, q, at)
    mixed = joined(mixed).reshape(*x.shape[:2], model.heads * model.head_dim)
    return _linear(layer["o_proj"], pin(mixed, BATCH, SEQUENCE, TENSOR), *OUT_OF)


def _mix(model: Model, k: jax.Array, v: jax.Array, q: jax.Array, at: jax.Array) -> jax.Array:
    """Values mixed for a block of queries: q [B, s, c, K, G, D], at [B, s, c]."""
    scores = jnp.einsum("bsckgd,btkd->bkgsct", q, k, preferred_element_type=jnp.float32)
    away = at[0, :, :, None] - jnp.arange(k.shape[1])
    seen = (away >= 0) & (away < (model.window or k.shape[1]))
    weights = jax.nn.softmax(jnp.where(seen, scores * model.head_dim**-0.5, -jnp.inf))
    return jnp.einsum("bkgsct,btkd->bsckgd", weights.astype(v.dtype), v)


def _heads(model: Model, layer: Tree, name: str, x: jax.Array) -> jax.Array:
    return _linear(layer[f"{name}_proj"], x, *INTO).reshape(*x.shape[:2], -1, model.head_dim)


def _normed(model: Model, layer: Tree, name: str, x: jax.Array) -> jax.Array:
    return _norm(model, layer[name], x) if model.qk_norm else x


def _copies(model: Model) -> int:
    """How often a key head is repeated so that the tensor axis divides them; 1 if it cannot."""
    tensor = mesh_sizes().get(TENSOR, 1)
    spare = model.kv_heads % tensor and not model.heads % tensor
    return model.heads // model.kv_heads if spare else 1


def _linear(layer: Tree, x: jax.Array, *split: str | None) -> jax.Array:
    # Gathered over fsdp as a whole: XLA would take the product apart into one for each piece.
    y = x @ pin(layer["kernel"].astype(x.dtype), *split)
    return y + layer["bias"].astype(x.dtype) if "bias" in layer else y


def _norm(model: Model, layer: Tree, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    size = lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + model.eps)
    return (wide * size * layer["scale"].astype(jnp.float32)).astype(x.dtype)


def _frequencies(model: Model) -> jax.Array:
    """Angles per position of each rotated pair, in radians: [head_dim / 2] (arXiv:2104.09864)."""
    plain = model.theta ** -(jnp.arange(0, model.head_dim, 2, dtype=jnp.float32) / model.head_dim)
    s = model.scaling
    if s is None:
        return plain
    turns = s.original * plain / (2 * math.pi)
    kept = jnp.clip((turns - s.low) / (s.high - s.low), 0.0, 1.0)
    return plain * (kept + (1.0 - kept) / s.factor)


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns each pair (x[i], x[i + head_dim / 2]) of x [B, T, heads, head_dim]."""
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
    return turned.astype(x.dtype)


def _head(model: Model, layout: Layout, base: Tree) -> jax.Array:
    """The output head, [width, vocab]."""
    kernel = base["embed_tokens"]["embedding"].T if model.tied else base["lm_head"]["kernel"]
    return kernel.astype(layout.dtype)
