"""One training step of the fine-tune: what it changes, and on how many devices."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from finetune.step import optimizer_of, schedule_of, step_of
from llama import SPECS, Llama, LlamaConfig

SIZES = LlamaConfig(64, d_model=16, d_ff=32, layers=2, heads=4, kv_heads=2, head_dim=4)
KEY, CONFIG = jax.random.key(0), rl.LoraConfig(rank=4, alpha=8.0)


class Batch(NamedTuple):
    tokens: jax.Array
    segments: jax.Array
    offsets: jax.Array
    positions: jax.Array
    labels: jax.Array
    weights: jax.Array


@dataclasses.dataclass
class Choices:
    learning_rate: float = 1e-2
    warmup: float = 0.0
    weight_decay: float = 0.0
    lora_plus_ratio: float = 1.0
    clip: float = 1.0


def batch_of(rows: int, seed: int = 0) -> Batch:
    """Random rows of 12 tokens, of which an unequal number are answers."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 64, (rows, 12), dtype=np.int32)
    ones, places = np.ones_like(tokens), np.tile(np.arange(12, dtype=np.int32), (rows, 1))
    weights = (places[:, :-1] >= draw.integers(3, 10, (rows, 1))).astype(np.float32)
    return Batch(tokens, ones, places, places[:, :-1], tokens[:, 1:], weights)


@pytest.fixture(scope="module")
def made():
    """A tiny Llama with adapters whose b is not zero, so that every factor has a gradient."""
    model = Llama(SIZES, logits_bytes=4 * 64 * 16)
    base = model.init(KEY, jnp.zeros((1, 12), jnp.int32))
    params, apply, sites = rl.adapt(
        model.apply, base, jnp.zeros((8, 12), jnp.int32), config=CONFIG, key=KEY
    )
    lora = jax.tree.map(lambda leaf: leaf + 0.02, params.lora)
    return rl.LoraParams(base, lora), apply, sites


def run(made, batch, choices=None, steps=1, edit=lambda params: params):
    params, apply, sites = made
    tx = optimizer_of(choices or Choices(), 10, sites)
    step = step_of(apply, tx)
    params = edit(params)
    lora = jax.tree.map(jnp.copy, params.lora)
    state = tx.init(lora)
    for _ in range(steps):
        lora, state, told = step(params.base, lora, state, batch)
    return lora, state, told


def assert_close(left, right, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), left, right)


def test_micro_batches_equal_one_large_batch(made):
    whole = batch_of(8)
    micro = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), whole)
    choices = Choices(clip=0.1)
    large, small = run(made, whole, choices), run(made, micro, choices)
    assert_close(large[2], small[2])
    assert_close(large[0], small[0])
    assert large[2].tokens == 8 * 12
    assert large[2].answers == whole.weights.sum()


def test_rows_without_answers_change_nothing(made):
    batch = batch_of(4)
    empty = batch._replace(weights=np.zeros_like(batch.weights))
    joined = Batch(*(np.concatenate(pair) for pair in zip(batch, empty, strict=True)))
    assert_close(run(made, batch)[0], run(made, joined)[0])


def test_a_step_that_is_not_finite_is_not_applied(made):
    def spoil(params):
        scale = params.base["params"]["norm"]["scale"]
        inner = {**params.base["params"], "norm": {"scale": scale * np.nan}}
        return params._replace(base={"params": inner})

    lora, state, told = run(made, batch_of(2), edit=spoil)
    assert not told.finite
    jax.tree.map(np.testing.assert_array_equal, lora, made[0].lora)
    assert len(rl.optim.recorded(state).steps) == 0


def test_gradients_are_recorded_as_they_came_and_clipped_for_the_update(made):
    batch = batch_of(4)
    _, state, told = run(made, batch, Choices(clip=1e-3))
    records = rl.optim.recorded(state)
    squares = sum((norms[0][..., :2] ** 2).sum() for norms in records.norms.values())
    assert told.grad_norm > 1e-2
    np.testing.assert_allclose(np.sqrt(squares), told.grad_norm, rtol=1e-4)


def test_lora_plus_moves_b_faster_than_a(made):
    before = made[0].lora
    after, state, _ = run(made, batch_of(4), Choices(lora_plus_ratio=16.0, clip=0.0))
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), after, before)
    pair = moved["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert pair["b"] == pytest.approx(16 * pair["a"], rel=1e-3)
    assert rl.optim.recorded(state).steps.tolist() == [0]


def test_the_rate_rises_from_the_first_step_and_falls_to_zero():
    rate = schedule_of(1.0, 0.2, 10)
    assert [float(rate(step)) for step in (0, 1, 2, 10)] == pytest.approx([0.5, 0.75, 1.0, 0.0])
    assert float(schedule_of(1.0, 0.0, 5)(0)) == 1.0
    assert float(schedule_of(1.0, 1.0, 1)(0)) == 1.0


def test_eight_devices_take_the_step_of_one(made):
    params, _, sites = made
    one = run(made, batch_of(8), steps=2)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows = P(("data", "fsdp"))
    with jax.set_mesh(mesh):
        model = Llama(SIZES, remat="dots", activations=rows, logits_bytes=4 * 64 * 16)
        apply = rl.attach(model.apply, sites)
        placed = rl.sharding.shard(params, mesh, sites, SPECS)
        batch = jax.device_put(batch_of(8), NamedSharding(mesh, rows))
        many = run((placed, apply, sites), batch, steps=2)
    assert_close(one[2], many[2], 1e-5)
    assert_close(one[0], many[0], 1e-5)
