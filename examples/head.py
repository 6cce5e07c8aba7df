"""The output head: logits, and losses of which only a block's logits exist at a time."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


class Scores(NamedTuple):
    """How well a model predicts labels.

    Attributes:
      losses: cross-entropy in nats, float32 [B, P].
      hits: whether the label has the largest logit, bool [B, P].
    """

    losses: jax.Array
    hits: jax.Array


class Head(nn.Module):
    """The matrix of an untied head, `kernel` [d, vocab]."""

    d_model: int
    vocab_size: int

    def setup(self) -> None:
        shape = (self.d_model, self.vocab_size)
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)


def score(x: jax.Array, kernel: jax.Array, labels: ArrayLike, logits_bytes: int) -> Scores:
    """Score labels in blocks of positions, so that the logits are never whole.

    The backward pass computes the logits of a block again instead of storing them.

    Args:
      x: normalized outputs of the last layer, [B, P, d].
      kernel: the head, [d, vocab].
      labels: integers [B, P].
      logits_bytes: how large the float32 logits of a block may be on each device of the mesh,
        over which they are split. A block holds at least one position of every row.

    Returns:
      The scores of all positions.
    """
    labels = jnp.asarray(labels)

    def block(part: tuple[jax.Array, jax.Array]) -> Scores:
        return _score_block(part[0], kernel, part[1])

    blocks = _count_blocks(x, kernel, logits_bytes)
    if blocks == 1:
        return block((x, labels))
    scores = lax.map(jax.checkpoint(block, prevent_cse=False), _split((x, labels), blocks))
    return jax.tree.map(lambda part: _join(part)[:, : labels.shape[1]], scores)


def float32_logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Logits that keep the sums of their products: [B, P, d], [d, vocab] -> [B, P, vocab]."""
    return lax.dot_general(x, kernel, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _score_block(x: jax.Array, kernel: jax.Array, labels: jax.Array) -> Scores:
    logits = float32_logits(x, kernel)
    # A sum over the vocabulary, where a lookup in a split axis would gather it.
    chosen = lax.broadcasted_iota(labels.dtype, logits.shape, 2) == labels[..., None]
    losses = jax.nn.logsumexp(logits, -1) - jnp.sum(jnp.where(chosen, logits, 0.0), -1)
    return Scores(losses, jnp.argmax(logits, -1) == labels)


def _count_blocks(x: jax.Array, kernel: jax.Array, logits_bytes: int) -> int:
    rows, positions, _ = x.shape
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    column = 4 * rows * kernel.shape[1] / devices
    size = max(1, min(positions, int(logits_bytes // column)))
    return math.ceil(positions / size)


def _split(arrays: tuple[jax.Array, ...], blocks: int) -> tuple[jax.Array, ...]:
    """[B, P, ..] -> [blocks, B, P / blocks, ..], with zeros behind the last position."""

    def split(array: jax.Array) -> jax.Array:
        size = math.ceil(array.shape[1] / blocks)
        room = [(0, 0)] * array.ndim
        room[1] = (0, blocks * size - array.shape[1])
        parts = jnp.pad(array, room).reshape(array.shape[0], blocks, size, *array.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    return tuple(split(array) for array in arrays)


def _join(parts: jax.Array) -> jax.Array:
    return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1)
