"""Step: one update of the adapters, from one batch or from several micro batches of it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import rslora_jax as rl

RECORDED = 128  # steps of gradient norms that travel in the optimizer's state


class Told(NamedTuple):
    """What a step says of itself, scalars.

    Attributes:
      loss: mean over the answer tokens of the whole batch, in nats.
      grad_norm: of all factors together, before clipping.
      tokens: how many tokens were read, padding aside.
      answers: how many of them were answers, which the loss is about.
      finite: whether all numbers were; if not, nothing was changed.
    """

    loss: jax.Array
    grad_norm: jax.Array
    tokens: jax.Array
    answers: jax.Array
    finite: jax.Array


def schedule_of(learning_rate: float, warmup: float, steps: int) -> optax.Schedule:
    """A linear rise over a fraction of the steps, then a cosine that ends at zero.

    The first step moves already: a rate of zero would waste it.
    """
    rising = min(round(warmup * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(
        learning_rate / max(rising, 1), learning_rate, rising, steps
    )


def optimizer_of(settings: Any, steps: int, sites: rl.Sites) -> optax.GradientTransformation:
    """AdamW on the adapters, clipped, with LoRA+'s ratio, its norms recorded.

    Args:
      settings: learning_rate, warmup, weight_decay, lora_plus_ratio and clip.
      steps: of the whole run.
      sites: what is adapted.
    """
    schedule = schedule_of(settings.learning_rate, settings.warmup, steps)
    adamw = functools.partial(optax.adamw, weight_decay=settings.weight_decay)
    tx: optax.GradientTransformation = adamw(schedule)
    if settings.lora_plus_ratio != 1.0:
        tx = rl.optim.lora_plus(schedule, settings.lora_plus_ratio, adamw)
    if settings.clip > 0:
        tx = optax.chain(optax.clip_by_global_norm(settings.clip), tx)
    # Around the clipping: a gradient that explodes is to be seen as it came.
    return rl.optim.freeze_base(rl.optim.record_norms(tx, sites, RECORDED))


def step_of(
    apply: Callable[..., Any], tx: optax.GradientTransformation, places: Any = None
) -> Callable[..., tuple[Any, Any, Told]]:
    """The compiled training step, ``step(base, lora, opt_state, batch)``.

    The base is an argument that is neither changed nor differentiated; `lora` and `opt_state`
    are used up. A step whose numbers are not all finite changes nothing.

    Args:
      apply: the adapted function, with the method ``"scores"``.
      tx: the optimizer of the adapters.
      places: shardings of ``(lora, opt_state, told)`` for the results; None lets XLA choose.

    Returns:
      A function to ``(lora, opt_state, Told)``.
    """

    def step(base: Any, lora: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Told]:
        loss, grads = mean_and_grads(apply, rl.LoraParams(base, lora), batch)
        updates, new_state = tx.update(grads, opt_state, lora)
        new = optax.apply_updates(lora, updates)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(new))
        kept = functools.partial(jnp.where, finite)
        counts = (jnp.sum(marks > 0) for marks in (batch.segments, batch.weights))
        told = Told(loss, norm, *counts, finite)
        return jax.tree.map(kept, new, lora), jax.tree.map(kept, new_state, opt_state), told

    return jax.jit(step, donate_argnums=(1, 2), out_shardings=places)


def mean_and_grads(
    apply: Callable[..., Any], params: rl.LoraParams, batch: Any
) -> tuple[jax.Array, Any]:
    """The mean loss over all answer tokens of a batch, and its gradient in the adapters.

    Micro batches ([A, B, T] tokens) are walked one after the other. Each token weighs the same,
    in whichever of them it is, so that they equal one large batch.
    """
    total = jnp.maximum(batch.weights.sum(), 1.0)

    def share(params: rl.LoraParams, micro: Any) -> jax.Array:
        return jnp.sum(micro.weights * scores_of(apply, params, micro).losses) / total

    part = rl.value_and_grad(share)
    if batch.tokens.ndim == 2:
        return part(params, batch)

    def add(sums: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, part(params, micro)), None

    nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params.lora)
    return jax.lax.scan(add, nothing, batch)[0]


def scores_of(apply: Callable[..., Any], params: rl.LoraParams, batch: Any) -> Any:
    """Losses and hits at the answers of one micro batch."""
    return apply(
        params,
        batch.tokens,
        batch.labels,
        batch.positions,
        segments=batch.segments,
        offsets=batch.offsets,
        method="scores",
    )
