"""A tiny Llama of 31,000 parameters: learning from nothing, and every weight of some matrices."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import rslora_jax as rl
from llama import Llama, LlamaConfig
from registers import VOCABULARY, Prompts

MODEL = Llama(
    LlamaConfig(VOCABULARY, d_model=32, d_ff=96, layers=2, heads=2, kv_heads=2, head_dim=16)
)
PEAK = 1e-2  # learning rate of pretraining


def predict(variables: Any, tokens: ArrayLike) -> jax.Array:
    """The logits of the answers: tokens [N, 4] -> [N, VOCABULARY]."""
    count, length = jnp.shape(tokens)
    last = jnp.full((count, 1), length - 1)
    return jnp.asarray(MODEL.apply(variables, tokens, positions=last))[:, 0]


def cross_entropy(logits: jax.Array, answers: ArrayLike) -> jax.Array:
    """Mean loss in nats: [N, VOCABULARY], [N] -> scalar."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()


def accuracy(logits: jax.Array, answers: ArrayLike) -> jax.Array:
    """Share of right answers, out of the whole vocabulary: [N, VOCABULARY], [N] -> scalar."""
    return (logits.argmax(-1) == answers).mean()


def pretrain(lessons: Prompts, seed: int) -> Any:
    """Trains every weight from a random start, one step for each batch of `lessons`."""
    start = jax.jit(MODEL.init)(jax.random.key(seed), lessons.tokens[0])
    schedule = optax.cosine_onecycle_schedule(len(lessons.answers), PEAK, 0.15)
    return train(optax.adamw(schedule, weight_decay=1e-2), start, lessons)


def tune_fully(base: Any, sites: Sequence[rl.Site], batches: Prompts, learning_rate: float) -> Any:
    """Trains every entry of the matrices at `sites` with Adam, and nothing else."""
    paths = {site.path for site in sites}
    frozen = jax.tree_util.tree_map_with_path(
        lambda keys, _: jax.tree_util.keystr(keys, simple=True, separator="/") not in paths, base
    )
    still = optax.masked(optax.set_to_zero(), frozen)
    return train(optax.chain(optax.adam(learning_rate), still), base, batches)


@functools.partial(jax.jit, static_argnums=0)
def train(tx: optax.GradientTransformation, variables: Any, batches: Prompts) -> Any:
    """One step for each batch, in one scan: the trained variables."""

    def loss(variables: Any, batch: Prompts) -> jax.Array:
        return cross_entropy(predict(variables, batch.tokens), batch.answers)

    def step(carry: Any, batch: Prompts) -> tuple[Any, None]:
        variables, state = carry
        updates, state = tx.update(jax.grad(loss)(variables, batch), state, variables)
        return (optax.apply_updates(variables, updates), state), None

    return jax.lax.scan(step, (variables, tx.init(variables)), batches)[0][0]
