"""A sweep in one compilation is the separate training runs that it stands for."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rslora_jax as rl
from rslora_jax.analysis.batches import batches_of
from rslora_jax.analysis.budget import divide, peak_bytes
from rslora_jax.analysis.sweep import rank_sweep
from tests.quick import run as quick_run

RANKS = (2, 8)
SEEDS = (0, 7)
STEPS = 3
RATE = 0.02
OPTIMIZERS = {
    "sgd": optax.sgd,
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.3),
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(0.05), optax.adam(rate)),
}
TARGETS = ["in", "layers"]


def model(p, x):
    h = jnp.tanh(x @ p["in"])
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, p["layers"])
    return h @ p["out"]


def arrays(dtype="float32"):
    rng = np.random.default_rng(3)
    shapes = {"in": (9, 10), "layers": (2, 10, 10), "out": (10, 4)}
    base = {n: (rng.normal(size=s) / math.sqrt(s[-2])).astype(dtype) for n, s in shapes.items()}
    batches = (rng.normal(size=(STEPS, 5, 9)), rng.normal(size=(STEPS, 5, 4)))
    return base, tuple(array.astype(dtype) for array in batches)


@functools.cache
def adapted(rank=8, dtype="float32", seed=0, scaling="rslora"):
    """The loss, all that a sweep needs, and the factors at the start."""
    base, batches = arrays(dtype)
    config = rl.LoraConfig(rank=rank, targets=TARGETS, scaling=scaling)
    key = jax.random.key(seed)
    params, apply, sites = rl.adapt(model, base, batches[0][0], config=config, key=key)

    def loss(params, batch):
        return jnp.mean((apply(params, batch[0]) - batch[1]) ** 2)

    return loss, base, sites, batches, params.lora


def sweep_of(dtype="float32", **options):
    options = {"ranks": RANKS, "quantities": ("loss",), **options}
    loss, base, sites, batches, _ = adapted(dtype=dtype)
    return rank_sweep(loss, base, sites, options.pop("batches", batches), **options)


# Parity with runs that were never padded.


def alone(optimizer, rank, scaling):
    """A function that trains one run a seed with an `adapt` of its own, in a plain loop."""
    loss, base, _, batches, small = adapted(rank, "float64", 0, scaling)
    tx = OPTIMIZERS[optimizer](RATE)

    def step(carry, batch):
        lora, state = carry
        value, grads = rl.value_and_grad(loss)(rl.LoraParams(base, lora), batch)
        updates, state = tx.update(grads, state, lora)
        return (optax.apply_updates(lora, updates), state), value

    def train(a):
        lora = {n: {"a": a[n][..., :rank], "b": small[n]["b"]} for n in TARGETS}
        (trained, _), losses = jax.lax.scan(step, (lora, tx.init(lora)), batches)
        return losses, trained

    wholes = [adapted(8, "float64", seed)[-1] for seed in SEEDS]
    drawn = {n: np.stack([whole[n]["a"] for whole in wholes]) for n in TARGETS}
    return lambda: jax.vmap(train)(drawn)


@functools.cache
def references():
    keys = [(o, r, s) for o in OPTIMIZERS for r in RANKS for s in ("lora", "rslora")]
    trains = [alone(*key) for key in keys]
    return dict(zip(keys, quick_run(lambda: [train() for train in trains]), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_run_equals_the_run_that_was_never_padded(name):
    with jax.enable_x64(True):
        sweep = sweep_of(
            "float64",
            optimizer=OPTIMIZERS[name],
            learning_rates=(RATE,),
            seeds=SEEDS,
            return_factors=True,
        )
        _, _, sites, _, _ = adapted(dtype="float64")
        assert len(sweep.runs) == 8
        for k, run in enumerate(sweep.runs):
            every = references()[name, run.rank, run.scaling]
            losses, lora = jax.tree.map(lambda leaf: leaf[SEEDS.index(run.seed)], every)
            np.testing.assert_allclose(sweep.traces["loss"][k], losses, rtol=1e-12)
            found, gamma = sweep.lora(k), rl.scale(16.0, run.rank, run.scaling)
            for site in sites:
                a, b = found[site.path]["a"], found[site.path]["b"] * site.scale / gamma
                close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
                close(a[..., : run.rank], lora[site.path]["a"])
                close(b[..., : run.rank, :], lora[site.path]["b"])
                assert not a[..., run.rank :].any() and not b[..., run.rank :, :].any()
