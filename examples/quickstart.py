"""Teach a real language model fifty facts with rank-stabilized LoRA: run this file.

SmolLM2-135M-Instruct (4-bit weights, trained here in float32) learns the atomic numbers of fifty
elements. Only adapters on the seven matrices of each of its thirty layers are trained.
"""

import sys

from session import Phases, exit_on_interrupt

if __name__ == "__main__":  # before the slow imports: Ctrl-C is one line from the start
    exit_on_interrupt("Interrupted: no file is left half-written.")

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

import rslora_jax as rl
import smollm
from facts import Batch, atomic_numbers, fact_batch, unrelated_batch
from llama import Llama
from pretrained import ModelError
from report import plot, progress_bar, table
from scores import Exam, Predict, cross_entropy, examine

TARGET = 0.95  # exact match that the run must reach
WARMUP = 0.15  # share of the steps in which the learning rate rises
TOLERANCE = 1e-4  # of merged against adapted logits, relative to the largest logit
SHOWN = slice(3, None, 10)  # the facts whose answers are printed


@dataclasses.dataclass(frozen=True)
class Options:
    """Teach SmolLM2-135M-Instruct fifty atomic numbers with rank-stabilized LoRA."""

    rank: int = 8
    """Rank of every adapter."""
    alpha: float = 16.0
    """Numerator of the scale alpha/sqrt(rank)."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam; it rises for a few steps, then falls along a cosine."""
    steps: int = 40
    """Number of training steps."""
    batch: int = 10
    """Facts per step."""
    seed: int = 0
    """Seed of the adapters and of the order of the facts."""
    output: Path = Path("outputs/quickstart.png")
    """Where to write the plot of the loss, a .png file."""


def main() -> None:
    """Run with the flags of the command line; exit code 0 only if the target is reached."""
    options = tyro.cli(Options)
    try:
        prepare(options)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    try:
        exact = run(options)
    except (OSError, ModelError) as error:
        sys.exit(str(error))
    if exact < TARGET:
        sys.exit(f"Exact match is {exact:.0%}, below the target of {TARGET:.0%}: train for longer.")


def prepare(options: Options) -> None:
    """Refuse now what would fail later, and make the folder of the plot.

    Raises:
      ValueError: if a number is out of range, or the plot is no .png file.
    """
    lora_config(options)
    for name in ("learning_rate", "steps", "batch"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} must be above 0, found {getattr(options, name)}")
    if options.output.suffix != ".png":
        raise ValueError(f"output must be a .png file, found {options.output}")
    options.output.parent.mkdir(parents=True, exist_ok=True)


def lora_config(options: Options) -> rl.LoraConfig:
    """Adapters on every linear layer, scaled by alpha/sqrt(rank)."""
    return rl.LoraConfig(rank=options.rank, alpha=options.alpha)


def run(options: Options) -> float:
    """Load, adapt, train, examine, merge and plot.

    Returns:
      Exact match after training, from 0 to 1.
    """
    console, phase = Console(), Phases()
    with phase("load"), console.status("Loading SmolLM2-135M-Instruct"):
        sizes, variables, tokenizer = smollm.load()
        model, variables = Llama(sizes), jax.device_put(variables)
        facts = fact_batch(tokenizer, atomic_numbers())
        exam = Exam(facts, facts.rows(SHOWN), unrelated_batch(tokenizer), tokenizer)
    with phase("adapt"), console.status("Finding the matrices to adapt"):
        config, key = lora_config(options), jax.random.key(options.seed)
        params, apply, sites = rl.adapt(
            model.apply, variables, facts.tokens, config=config, key=key
        )
    console.print(rl.describe(sites), soft_wrap=True, highlight=False)
    predict = jax.jit(apply)
    with phase("examine"), console.status("Asking before training"):
        before = examine(predict, params, exam)
    with phase("train"):
        params, losses = train(apply, params, facts, options)
    with phase("examine again"), console.status("Asking after training"):
        after = examine(predict, params, exam)
    console.print(table(atomic_numbers()[SHOWN], before, after))
    with phase("merge"), console.status("Merging"):
        gap = disagreement(model, rl.merge(params, sites), predict, params, facts)
    with phase("plot"):
        plot(losses, options.output)
    console.print(f"merged and adapted logits agree to {gap:.0e} of the largest logit")
    console.print(f"loss curve: {options.output}\n{phase}", soft_wrap=True)
    return after.exact


def train(
    apply: Predict, params: rl.LoraParams, facts: Batch, options: Options
) -> tuple[rl.LoraParams, list[float]]:
    """Train the adapters. The base is an argument of the step; only the adapters are donated.

    Returns:
      The trained parameters and the loss of every step. The given adapters are used up.
    """
    optimizer = optax.adam(learning_rates(options))

    def loss_fn(params: rl.LoraParams, batch: Batch) -> jax.Array:
        return cross_entropy(apply(params, batch.tokens, positions=batch.positions), batch.labels)

    @functools.partial(jax.jit, donate_argnames=("lora", "state"))
    def step(lora: Any, state: Any, base: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        loss, grads = rl.value_and_grad(loss_fn)(rl.LoraParams(base, lora), batch)
        updates, state = optimizer.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    lora, state, losses = params.lora, optimizer.init(params.lora), []
    with progress_bar() as bar:
        task = bar.add_task("training", total=options.steps, loss="")
        for rows in shuffled(len(facts.tokens), options):
            lora, state, loss = step(lora, state, params.base, facts.rows(rows))
            losses.append(float(loss))
            bar.update(task, advance=1, loss=f"loss {losses[-1]:.3f}")
    return params._replace(lora=lora), losses


def learning_rates(options: Options) -> optax.Schedule:
    """Up to the peak in the first steps, then down to nothing along a cosine."""
    return optax.cosine_onecycle_schedule(options.steps, options.learning_rate, WARMUP)


def shuffled(count: int, options: Options) -> np.ndarray:
    """Rows of every step, [steps, batch]: pass after pass over all rows, each in a new order."""
    rng = np.random.default_rng(options.seed)
    wanted = options.steps * options.batch
    passes = [rng.permutation(count) for _ in range(-(-wanted // count))]
    return np.concatenate(passes)[:wanted].reshape(options.steps, options.batch)


def disagreement(
    model: Llama, merged: Any, predict: Predict, params: rl.LoraParams, batch: Batch
) -> float:
    """Largest gap between the logits of the merged and the adapted model, over the largest logit.

    Raises:
      AssertionError: if it is above `TOLERANCE`.
    """
    adapted = predict(params, batch.tokens, positions=batch.positions)
    plain = jax.jit(model.apply)(merged, batch.tokens, positions=batch.positions)
    gap = float(jnp.max(jnp.abs(plain - adapted)) / jnp.max(jnp.abs(adapted)))
    if not gap <= TOLERANCE:
        raise AssertionError(
            f"The merged and the adapted model disagree by {gap:.1e} of the largest logit; "
            f"rounding explains at most {TOLERANCE:.0e}. The merge or the adapters are wrong."
        )
    return gap


if __name__ == "__main__":
    main()
