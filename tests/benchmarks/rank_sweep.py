"""What a rank sweep costs: one compilation for all runs, beside the loops one would write.

A tiny transformer is trained for every rank, scaling and seed by Adam, and each step records
the same quantities, in three ways:

    PYTHONPATH=. python tests/benchmarks/rank_sweep.py [--rounds N] [--json FILE]

* sweep: `rank_sweep`, one compilation;
* careful loop: one compilation a rank, with the scale and the seed's draw as arguments, and a
  scan over the steps; the model is adapted without drawing, and `a` cut from the widest one;
* naive loop: `adapt` and a compilation for each run. This takes long: "naive loop, sampled"
  trains one run a rank, leaves out the compilation of the draws, and multiplies by six.

Times include adapting, drawing and compiling; the sweep goes first, so that it alone pays for
what JAX compiles once for all. Processor time is of all threads together. The careful loop's
losses equal the sweep's; the naive loop's draws of `a` are not cut from one another, so that
its losses only resemble them.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import rslora_jax as rl
from rslora_jax.analysis.sweeps.sweep import rank_sweep
from rslora_jax.analysis.sweeps.traces import QUANTITIES, Moment, observe
from rslora_jax.analysis.sweeps.training import with_scale
from rslora_jax.tables import Table
from tests.benchmarks.step_cost import Size, cross_entropy, forward, model, plain

RANKS = (1, 2, 4, 8, 12, 16, 24, 32)
SCALINGS = ("lora", "rslora")
SEEDS = (0, 1, 2)
STEPS = 50
RATE = 1e-3
SIZE = Size(layers=2, width=64, heads=4, head_dim=16, hidden=128, classes=32, batch=8, length=8)
SAMPLED = "naive loop, sampled"
Losses = dict[tuple[int, str, int], np.ndarray]


def original(base: Any, x: Any) -> Any:
    """The model without adapters."""
    return forward(SIZE, "unrolled", plain, base, None, x)


def adapted(base: Any, x: Any, rank: int, scaling: str = "rslora", seed: int = 0) -> rl.Adapted:
    """The model with adapters."""
    config = rl.LoraConfig(rank=rank, scaling=scaling)
    return rl.adapt(original, base, x, config=config, key=jax.random.key(seed))


def loss_of(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of a batch of inputs and labels."""
    return lambda params, batch: cross_entropy(apply(params, batch[0]), batch[1])


def sweep(base: Any, batches: Any, quantities: tuple[str, ...]) -> Losses:
    """One compilation."""
    _, apply, sites = adapted(base, batches[0][0], max(RANKS))
    options = {"ranks": RANKS, "scalings": SCALINGS, "seeds": SEEDS, "learning_rates": (RATE,)}
    found = rank_sweep(loss_of(apply), base, sites, batches, quantities=quantities, **options)
    print("  ", found.budget, {k: round(v, 1) for k, v in found.seconds.items()})
    return {(r.rank, r.scaling, r.seed): found.traces["loss"][k] for k, r in enumerate(found.runs)}


def training(
    loss: Callable[..., Any], sites: Any, rank: int, quantities: tuple[str, ...]
) -> Callable[..., Any]:
    """A function of base, factors, batches and scale (over the sites') that trains one run."""
    tx = optax.adam(RATE)

    def train(base: Any, lora: Any, batches: Any, ratio: Any) -> Any:
        ratios = np.ones(len(sites), np.float32) * ratio

        def scaled_loss(lora: Any, batch: Any) -> Any:
            return loss(rl.LoraParams(base, with_scale(sites, lora, ratios)), batch)

        def step(carry: Any, batch: Any) -> Any:
            lora, state = carry
            value, grads = jax.value_and_grad(scaled_loss)(lora, batch)
            updates, state = tx.update(grads, state, lora)
            scaled = with_scale(sites, lora, ratios)
            moment = Moment(sites, value, lora, scaled, grads, updates, {}, rank)
            return (optax.apply_updates(lora, updates), state), observe(moment, quantities)

        return jax.lax.scan(step, (lora, tx.init(lora)), batches)[1]

    return train


def careful(base: Any, batches: Any, quantities: tuple[str, ...]) -> Losses:
    """One compilation a rank."""
    x = batches[0][0]
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base)
    widest = {seed: adapted(base, x, max(RANKS), seed=seed).params.lora for seed in SEEDS}
    losses = {}
    for rank in RANKS:
        _, apply, sites = adapted(abstract, x, rank)
        train = jax.jit(training(loss_of(apply), sites, rank, quantities))
        for seed in SEEDS:
            lora = jax.tree.map(np.asarray, widest[seed])
            lora = jax.tree_util.tree_map_with_path(lambda k, v, n=rank: cut(k, v, n), lora)
            for scaling in SCALINGS:
                ratio = np.float32(rl.scale(16.0, rank, scaling) / rl.scale(16.0, rank))
                losses[rank, scaling, seed] = np.asarray(train(base, lora, batches, ratio)["loss"])
    return losses


def cut(keys: Any, factor: np.ndarray, rank: int) -> np.ndarray:
    """The first columns of `a`, the first rows of `b`."""
    return factor[..., :rank] if keys[-1].key == "a" else factor[:rank]


def naive(base: Any, batches: Any, quantities: tuple[str, ...], runs: Any = None) -> Losses:
    """A compilation for each run, with the draw of `a` that `adapt` gives at its own rank."""
    losses = {}
    for rank, scaling, seed in runs or itertools.product(RANKS, SCALINGS, SEEDS):
        params, apply, sites = adapted(base, batches[0][0], rank, scaling, seed)
        train = jax.jit(training(loss_of(apply), sites, rank, quantities))
        found = train(base, params.lora, batches, np.float32(1))
        losses[rank, scaling, seed] = np.asarray(found["loss"])
    return losses


def sampled(base: Any, batches: Any, quantities: tuple[str, ...]) -> Losses:
    """The naive loop's first run of each rank."""
    return naive(base, batches, quantities, [(rank, SCALINGS[0], SEEDS[0]) for rank in RANKS])


WAYS = {"sweep": sweep, "careful loop": careful, "naive loop": naive, SAMPLED: sampled}


@contextlib.contextmanager
def counting() -> Iterator[list[float]]:
    """Collects the seconds of every XLA compilation inside."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure(name: str, base: Any, batches: Any, quantities: Any) -> tuple[dict[str, Any], Losses]:
    """One way's times and losses; a sample's are scaled up, with its draws compiled before."""
    if name == SAMPLED:
        for rank in RANKS:
            adapted(base, batches[0][0], rank)
    start = time.perf_counter(), time.process_time()
    with counting() as compilations:
        losses = WAYS[name](base, batches, quantities)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    found = {"wall_s": wall, "cpu_s": cpu, "compilations": len(compilations)}
    times = len(RANKS) * len(SCALINGS) * len(SEEDS) / len(losses)
    scaled = {key: value * times for key, value in found.items()}
    return {"way": name, **scaled, "compiling_s": sum(compilations) * times}, losses


def data() -> tuple[Any, Any]:
    """The base, and a batch of inputs and labels for every step."""
    base, _, _ = model(SIZE, "unrolled", concrete=True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, SIZE.batch, SIZE.length, SIZE.width)).astype(np.float32)
    labels = rng.integers(0, SIZE.classes, x.shape[:3]).astype(np.int32)
    return jax.tree.map(np.asarray, base), (x, labels)


def summary(rows: list[dict[str, Any]]) -> Table:
    """One line a way: medians over the rounds, and their ratios to the sweep's."""
    found = []
    for name in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == name]
        middle = {k: statistics.median(row[k] for row in mine) for k in mine[0] if k != "way"}
        first = found[0] if found else middle
        ratios = {f"x_{k}": middle[k] / first[k] for k in ("wall_s", "cpu_s")}
        found.append({"way": name, **middle, **ratios})
    return Table.of(found)


def difference(losses: Losses, others: Losses) -> float:
    """The largest relative difference of two ways' losses, over all runs and steps."""
    return max(float(np.abs(losses[k] / others[k] - 1).max()) for k in others)


def main() -> None:
    """Measures, prints the table, and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--rounds", type=int, default=1, help="how often; medians are printed")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS][:3])
    parser.add_argument("--quantities", nargs="+", default=[*QUANTITIES], metavar="NAME")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}, JAX {jax.__version__}; {SIZE}")
    print(f"ranks {RANKS} x {SCALINGS} x seeds {SEEDS}, {STEPS} steps of Adam at {RATE}")
    base, batches = data()
    rows, losses = [], {}
    for _ in range(options.rounds):
        for name in options.ways:
            row, losses[name] = measure(name, base, batches, tuple(options.quantities))
            rows.append(row)
            load = os.getloadavg()[0]
            print(f"  {name}: {row['wall_s']:.1f} s, {row['cpu_s']:.1f} s CPU, load {load:.1f}")
    print(summary(rows))
    for name in options.ways[1:]:
        gap = difference(losses[options.ways[0]], losses[name])
        print(f"losses of {options.ways[0]} and {name} differ by at most {gap:.1e} (relative)")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
