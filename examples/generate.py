"""Generate text with a Llama, adapted or not: batched, with a cache of keys and values.

    prompts, lengths = left_padded([[1, 2, 3], [4, 5]])
    cache = empty_cache(config, batch=2, length=prompts.shape[1] + 20)
    answers = generate(apply, params, cache, prompts, lengths, limit=20, eos=(2,))

`apply` is `Llama(config).apply`, or what `rl.adapt` and `rl.attach` make of it. It is a static
argument: the program is compiled once for each function and each set of shapes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from attention import Cache, empty_cache
from placing import beside

__all__ = ["Answers", "empty_cache", "generate", "left_padded"]


class Answers(NamedTuple):
    """What was generated.

    Attributes:
      tokens: int32 [B, limit]; behind the end of an answer stand zeros.
      lengths: int32 [B], tokens of each answer, its end-of-sequence token not counted.
    """

    tokens: jax.Array
    lengths: jax.Array

    def rows(self) -> list[list[int]]:
        """The answers as lists, without end-of-sequence tokens."""
        pairs = zip(*map(np.asarray, self), strict=True)
        return [tokens[:length].tolist() for tokens, length in pairs]


class _Recipe(NamedTuple):
    """What a compiled generation is made for; see `generate`."""

    apply: Callable[..., Any]
    limit: int
    eos: tuple[int, ...]


class _Drawing(NamedTuple):
    """How tokens are drawn; see `generate`."""

    key: jax.Array
    temperature: float
    top_p: float


class _State(NamedTuple):
    """Where generation stands.

    Attributes:
      step: tokens so far, the newest included.
      newest: [B, 1], not in the cache yet.
      done: [B], whether the answer has ended.
      answers: the tokens and lengths so far.
      cache: keys and values of all tokens before the newest.
    """

    step: jax.Array
    newest: jax.Array
    done: jax.Array
    answers: Answers
    cache: Cache


def left_padded(
    rows: Sequence[Sequence[int]], width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as a batch that ends together: tokens int32 [B, T] and lengths int32 [B].

    Args:
      rows: token ids of each prompt.
      width: T, by default the length of the longest prompt; a few widths for all batches
        spare compilations.

    Raises:
      ValueError: if a prompt is empty or longer than `width`.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    width = int(lengths.max(initial=1)) if width is None else width
    _check_lengths(lengths, width)
    tokens = np.zeros((len(rows), width), np.int32)
    for tail, row in zip(tokens, rows, strict=True):
        tail[width - len(row) :] = row
    return tokens, lengths


def generate(  # noqa: PLR0913  (the last six are options)
    apply: Callable[..., Any],
    params: Any,
    cache: Cache,
    prompts: ArrayLike,
    lengths: ArrayLike,
    *,
    limit: int,
    eos: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> Answers:
    """Continue each prompt until all have ended or `limit` tokens are made.

    Args:
      apply: ``apply(params, tokens, positions=, cache=) -> (logits, cache)``.
      params: its parameters.
      cache: an empty cache with room for the prompts and `limit` tokens.
      prompts: integers [B, T], padded on the left.
      lengths: integers [B], tokens of each prompt.
      limit: most tokens to make.
      eos: tokens that end an answer.
      temperature: 0 takes the likeliest token; above, tokens are drawn, 1 as the model says.
      top_p: draw only from the likeliest tokens that together have this probability.
      key: a typed PRNG key, needed to draw.

    Returns:
      The answers.

    Raises:
      ValueError: if an argument is out of range.
    """
    prompts, lengths = _on_host(prompts), _on_host(lengths)
    width = prompts.shape[1]
    if isinstance(lengths, np.ndarray):
        _check_lengths(lengths, width)
    _check_room(cache, width, limit)
    _check_drawing(temperature, top_p, key)
    recipe = _Recipe(apply, limit, tuple(int(token) for token in eos))
    drawing = None if key is None or temperature == 0.0 else _Drawing(key, temperature, top_p)
    return _generate(recipe, params, cache, prompts, lengths, drawing)


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    recipe: _Recipe,
    params: Any,
    cache: Cache,
    prompts: jax.Array,
    lengths: jax.Array,
    drawing: _Drawing | None,
) -> Answers:
    batch, width = prompts.shape
    cache = cache._replace(starts=width - lengths, used=jnp.int32(0))
    last = jnp.full((batch, 1), width - 1, jnp.int32)
    logits, cache = recipe.apply(params, prompts, positions=last, cache=cache)

    def record(state: _State, logits: jax.Array) -> _State:
        chosen = _choose(beside(prompts, logits[:, -1]), state.step, drawing)
        return _record(state, chosen, recipe.eos)

    def advance(state: _State) -> _State:
        logits, cache = recipe.apply(params, state.newest, cache=state.cache)
        return record(state._replace(cache=cache), logits)

    def goes_on(state: _State) -> jax.Array:
        return (state.step < recipe.limit) & ~jnp.all(state.done)

    first = record(_start(prompts, recipe.limit, cache), logits)
    return lax.while_loop(goes_on, advance, first).answers


def _start(prompts: jax.Array, limit: int, cache: Cache) -> _State:
    """Nothing generated yet. On Explicit axes all rows lie where the prompts do, and stay there."""
    batch = len(prompts)
    answers = Answers(jnp.zeros((batch, limit), jnp.int32), jnp.zeros(batch, jnp.int32))
    rows = (jnp.zeros((batch, 1), jnp.int32), jnp.zeros(batch, bool), answers)
    return _State(jnp.int32(0), *jax.tree.map(lambda x: beside(prompts, x), rows), cache)


def _record(state: _State, chosen: jax.Array, eos: tuple[int, ...]) -> _State:
    """One more token, [B], for the rows that have not ended."""
    done = state.done | jnp.isin(chosen, jnp.array(eos, jnp.int32))
    newest = jnp.where(done, 0, chosen)[:, None]
    tokens = lax.dynamic_update_slice_in_dim(state.answers.tokens, newest, state.step, axis=1)
    answers = Answers(tokens, state.answers.lengths + ~done)
    return _State(state.step + 1, newest, done, answers, state.cache)


def _choose(logits: jax.Array, step: jax.Array, drawing: _Drawing | None) -> jax.Array:
    """The next token of each row: [B, vocab] -> [B]."""
    logits = logits.astype(jnp.float32)
    if drawing is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = _likeliest(logits / drawing.temperature, drawing.top_p)
    key = jax.random.fold_in(drawing.key, step)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _likeliest(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits, -inf but for the fewest tokens that together have probability `top_p`."""
    ordered = jnp.sort(logits, descending=True)
    shares = jax.nn.softmax(ordered)
    kept = jnp.cumsum(shares, -1) - shares < top_p
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _on_host(x: ArrayLike) -> jax.Array | np.ndarray:
    """`x` itself where it lies on devices already, which may be those of other processes."""
    return x if isinstance(x, jax.Array) else np.asarray(x, np.int32)


def _check_lengths(lengths: np.ndarray, width: int) -> None:
    wrong = np.flatnonzero((lengths < 1) | (lengths > width))
    if wrong.size:
        row = wrong[0]
        raise ValueError(
            f"prompt {row} has {lengths[row]} tokens; each must have from 1 to the {width} of the "
            "batch's width"
        )


def _check_room(cache: Cache, width: int, limit: int) -> None:
    room = cache.keys.shape[2]
    if limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    if room < width + limit:
        raise ValueError(
            f"the cache has room for {room} tokens, and {width} of the prompts with limit={limit} "
            f"need {width + limit}: make it longer, or lower the limit"
        )


def _check_drawing(temperature: float, top_p: float, key: jax.Array | None) -> None:
    if not temperature >= 0.0:
        raise ValueError(f"temperature must be 0 or above, found {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, found {top_p}")
    if temperature > 0.0 and key is None:
        raise ValueError(f"temperature={temperature} draws tokens: pass key=jax.random.key(seed)")
