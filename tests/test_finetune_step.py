"""One training step of the fine-tune: what it changes, and what it leaves alone."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rl
from finetune.settings import Settings
from finetune.step import optimizer_of, schedule_of, step_of
from llama import Llama, LlamaConfig

SIZES = LlamaConfig(32, d_model=8, d_ff=8, layers=2, heads=2, kv_heads=2, head_dim=4)
KEY, CONFIG = (
    jax.random.key(0),
    rl.LoraConfig(rank=4, alpha=8.0, targets=["q_proj/kernel", "down_proj/kernel"]),
)
CLIPPED = Settings(learning_rate=1e-2, warmup=0.0, clip=0.01)
FASTER_B = Settings(learning_rate=1e-2, warmup=0.0, clip=0.0, lora_plus_ratio=16.0)


class Batch(NamedTuple):
    tokens: jax.Array
    segments: jax.Array
    offsets: jax.Array
    positions: jax.Array
    labels: jax.Array
    weights: jax.Array


def rows_of(count):
    """Random rows of 12 tokens, of which an unequal number are answers."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 32, (count, 12), dtype=np.int32)
    places = np.tile(np.arange(12, dtype=np.int32), (count, 1))
    weights = (places[:, :-1] >= draw.integers(3, 10, (count, 1))).astype(np.float32)
    return Batch(tokens, np.ones_like(tokens), places, places[:, :-1], tokens[:, 1:], weights)


class Made(NamedTuple):
    params: rl.LoraParams
    apply: object
    sites: rl.Sites


@pytest.fixture(scope="module")
def made():
    """A tiny Llama with adapters whose b is not zero, so that every factor has a gradient."""
    model = Llama(SIZES, logits_bytes=4 * 32 * 32)
    tokens = jax.ShapeDtypeStruct((8, 12), jnp.int32)
    base = jax.jit(lambda: model.init(KEY, jnp.zeros((8, 12), jnp.int32)))()
    params, apply, sites = rl.adapt(model.apply, base, tokens, config=CONFIG, key=KEY)
    lora = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.02), params.lora)
    return Made(rl.LoraParams(base, lora), apply, sites)


@pytest.fixture(scope="module")
def step(made):
    """``step(batch, settings=, base=)`` from the same adapters; each kind is compiled once."""
    kinds = {}

    def run(batch, settings=CLIPPED, base=made.params.base):
        tx = optimizer_of(settings, 10, made.sites)
        kind = kinds.setdefault(id(settings), step_of(made.apply, tx))
        lora = jax.tree.map(jnp.asarray, made.params.lora)
        return kind(base, lora, tx.init(lora), batch)

    return run


def assert_close(left, right):
    compare = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4)
    jax.tree.map(compare, left, right)


def test_micro_batches_equal_one_large_batch(step):
    large = rows_of(8)
    micro = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), large)
    one, four = step(large), step(micro)
    assert_close(one[2], four[2])
    assert_close(one[0], four[0])
    assert (one[2].tokens, one[2].answers) == (8 * 12, large.weights.sum())


def test_the_loss_is_the_mean_over_answers_alone(step, made):
    batch = rows_of(8)
    logits = jax.jit(made.apply)(made.params, batch.tokens)
    shares = jax.nn.log_softmax(logits)[np.arange(8)[:, None], batch.positions, batch.labels]
    mean = -(shares * batch.weights).sum() / batch.weights.sum()
    np.testing.assert_allclose(step(batch)[2].loss, mean, rtol=1e-5)
    nothing = step(batch._replace(weights=np.zeros_like(batch.weights)))
    assert (nothing[2].loss, nothing[2].grad_norm, bool(nothing[2].finite)) == (0, 0, True)


def test_a_step_that_is_not_finite_is_not_applied(step, made):
    inner = made.params.base["params"]
    spoilt = {"params": {**inner, "norm": {"scale": inner["norm"]["scale"] * np.nan}}}
    lora, state, told = step(rows_of(8), base=spoilt)
    assert not told.finite
    jax.tree.map(np.testing.assert_array_equal, lora, made.params.lora)
    assert len(rl.optim.recorded(state).steps) == 0


def test_gradients_are_recorded_as_they_came_and_clipped_for_the_update(step):
    _, state, told = step(rows_of(8))
    records = rl.optim.recorded(state)
    squares = sum((norms[0][..., :2] ** 2).sum() for norms in records.norms.values())
    assert told.grad_norm > CLIPPED.clip
    np.testing.assert_allclose(np.sqrt(squares), told.grad_norm, rtol=1e-4)
    first = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(optax_mean(state)))
    assert first <= CLIPPED.clip * 0.1  # Adam's first mean is a tenth of the clipped gradient


def optax_mean(state):
    """The means of Adam's gradients, wherever they lie in the state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "mu"))
    return next(node.mu for node in nodes if hasattr(node, "mu"))


def test_lora_plus_moves_b_faster_than_a(step, made):
    after, state, _ = step(rows_of(8), FASTER_B)
    moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), after, made.params.lora)
    pair = moved["params"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert pair["b"] == pytest.approx(16 * pair["a"], rel=1e-3)
    assert rl.optim.recorded(state).steps.tolist() == [0]


def test_the_rate_rises_from_the_first_step_and_falls_to_zero():
    rate = schedule_of(1.0, 0.2, 10)
    assert [float(rate(step)) for step in (0, 1, 2, 10)] == pytest.approx([0.5, 0.75, 1.0, 0.0])
    assert float(schedule_of(1.0, 0.0, 5)(0)) == 1.0
    assert float(schedule_of(1.0, 1.0, 1)(0)) == 1.0
