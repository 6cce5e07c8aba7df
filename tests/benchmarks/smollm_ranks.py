"""Gradient norms of a real language model over ranks: the figure that rsLoRA is known for.

SmolLM2-135M-Instruct learns facts for a few steps of Adam with adapters on all its 210
matrices, at every rank and with both scalings. Ranks up to 64 are padded to 64 and those above to
the largest: two compilations, and less than half of the work that one would take.
Figure 3 of Kalajdzievski 2023 (arXiv 2312.03732) has the average norm of the parameters'
gradients for Llama 2 7B: it falls with the rank under alpha/r, and is the same for every rank at
the onset under alpha/sqrt(r).

    python tests/benchmarks/smollm_ranks.py [--ranks 4 8 ... 512] [--steps 5] [--csv FILE]
"""

import argparse
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import jax
import numpy as np
import optax

import rslora_jax as rl
import smollm
from facts import Batch, atomic_numbers, fact_batch
from llama import Llama
from rslora_jax.analysis.laws.theory import theory
from rslora_jax.analysis.sweeps.sweep import Sweep, rank_sweep
from rslora_jax.norms import module_count
from rslora_jax.tables import Table, align
from scores import cross_entropy

SCALINGS = {"lora": "alpha/r", "rslora": "alpha/sqrt(r)"}
SMALL = 64  # ranks up to here are padded to the largest of them, ranks above to theirs
QUANTITIES = {
    "grad": "|grad|: mean over the matrices of the norms of the gradients of A and of B",
    "grad_b": "|grad B|: the same, of the gradient of B alone",
    "signal": "-<grad, update>: by how much Adam's own first update should lower the loss",
    "loss": "loss of each step's facts, in nats per token",
}


def main() -> None:
    """Measures and prints."""
    options = parse()
    started = time.perf_counter(), time.process_time()
    sweeps, modules = measure(options)
    wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    seen = Table.of(row for sweep in sweeps for row in sweep.table().records())
    print(f"jax {jax.__version__}, python {platform.python_version()}, ", end="")
    print(f"{jax.default_backend()}, {os.cpu_count()} cores")
    print(f"SmolLM2-135M-Instruct, {modules} matrices: {options.steps} steps of ", end="")
    print(f"{options.batch} facts, Adam at {options.learning_rate:g}, alpha 16")
    for name, title in QUANTITIES.items():
        print("", title, *align(table(seen, name)), sep="\n")
    print("\nMeasured before the step's update. Slope: of log against log(rank), ", end="")
    print("with its standard error over the ranks. Theory: of the first two updates.")
    for sweep in sweeps:
        print(sweep.budget, *(f"{name} {s:.0f} s" for name, s in sweep.seconds.items()), sep=", ")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{wall:.0f} s, {processor:.0f} s of processor, {peak:.1f} GiB")
    if options.csv:
        seen.to_csv(options.csv)


def parse() -> Any:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    ranks = [4, 8, 16, 32, 64, 128, 256, 512]
    parser.add_argument("--ranks", type=int, nargs="+", default=ranks)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="facts per step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every step there")
    return parser.parse_args()


def measure(options: Any) -> tuple[list[Sweep], int]:
    """Trains all ranks and both scalings on the same batches; also how many matrices there are."""
    sizes, variables, tokenizer = smollm.load()
    model, variables = Llama(sizes), jax.device_put(variables)
    facts = fact_batch(tokenizer, atomic_numbers())
    rows = np.arange(options.steps * options.batch).reshape(options.steps, -1) % len(facts.tokens)
    sweeps, modules = [], 0
    for ranks in buckets(options.ranks):
        apply, sites = adapt(model, variables, facts.tokens, max(ranks))
        modules = module_count(sites)

        def loss(params: rl.LoraParams, batch: Batch, apply: Any = apply) -> jax.Array:
            logits = apply(params, batch.tokens, positions=batch.positions)
            return cross_entropy(logits, batch.labels)

        found = rank_sweep(
            loss,
            variables,
            sites,
            facts.rows(rows),
            ranks=ranks,
            optimizer=optax.adam,
            learning_rates=(options.learning_rate,),
            quantities=("grad_a", "grad_b", "predicted_change"),
        )
        sweeps.append(found)
    return sweeps, modules


def buckets(ranks: Sequence[int]) -> list[list[int]]:
    """The ranks that are padded alike."""
    parts = [r for r in ranks if r <= SMALL], [r for r in ranks if r > SMALL]
    return [part for part in parts if part]


def adapt(model: Llama, variables: Any, tokens: Any, rank: int) -> tuple[Any, rl.Sites]:
    """The adapted function and its sites; the sweep draws the factors."""
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    config, key = rl.LoraConfig(rank=rank), jax.random.key(0)
    with warnings.catch_warnings():
        # k and v are 576 x 192: ranks above 192 are allowed there, and more than they can use.
        warnings.filterwarnings("ignore", ".*the largest rank that a weight", UserWarning)
        _, apply, sites = rl.adapt(model.apply, structs, tokens, config=config, key=key)
    return apply, sites


def table(seen: Table, name: str) -> list[list[str]]:
    """A row for each rank, a column for each step and scaling; the slopes and the law below."""
    last = max(seen.column("step"))
    steps = (0,) if name == "signal" else (0, last)
    columns = [(scaling, step) for step in steps for scaling in SCALINGS]
    ranks = sorted(set(seen.column("rank")))
    values = np.array([[value(seen, rank, name, *column) for column in columns] for rank in ranks])
    rows = [
        ["rank", *(f"{SCALINGS[scaling]}, step {step + 1}" for scaling, step in columns)],
        *([str(rank), *map("{:.3g}".format, row)] for rank, row in zip(ranks, values, strict=True)),
    ]
    if name == "loss":
        return rows  # no power of the rank
    laws = ["theory", *(str(theory(s, "adam")[name]) for s, _ in columns)]
    return [*rows, ["slope", *(slope(ranks, column) for column in values.T)], laws]


def value(seen: Table, rank: int, name: str, scaling: str, step: int) -> float:
    """One number of one run."""
    (row,) = seen.select(rank=rank, scaling=scaling, step=step).records()
    read = {"grad": (row["grad_a"] + row["grad_b"]) / 2, "signal": -row["predicted_change"]}
    return {**row, **read}[name]


def slope(ranks: Sequence[int], values: np.ndarray) -> str:
    """The slope in log-log axes, and its standard error."""
    if len(ranks) < 3:
        return f"{np.polyfit(np.log(ranks), np.log(values), 1)[0]:+.2f}"
    fitted, covariance = np.polyfit(np.log(ranks), np.log(values), 1, cov=True)
    return f"{fitted[0]:+.2f} ±{covariance[0, 0] ** 0.5:.2f}"


if __name__ == "__main__":
    main()
