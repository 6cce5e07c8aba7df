"""How fast the fine-tune program trains SmolLM2: beside LoRA written into the Llama by hand.

The program's own step (`examples/finetune`: packed batches, losses in blocks, clipping, AdamW,
recorded norms, the check for NaN) trains adapters found by tracing, and beside it adapters that
stand in the model's code. Both start from the same factors and read the same batches, step by
step in turn, in one process:

    PYTHONPATH=. python tests/benchmarks/finetune_speed.py [--steps 10] [--json FILE]

FLOPs and temporary bytes are XLA's own of the compiled steps (the body of a scan counts once).
The ratio of the speeds is the median over the steps of the ratio within a step, once of the wall
time and once of the processor time, which other work on the machine disturbs least. A third side
asks what the program's step itself costs: LoRA by hand with nothing but clipping and AdamW.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import jax
import jax.numpy as jnp
import optax

import rslora_jax as rl
from finetune import job, program
from finetune.batches import Batch
from finetune.settings import Settings
from finetune.step import mean_and_grads, schedule_of, step_of
from hosts import mesh_of
from rslora_jax.tables import Table
from tests.benchmarks.llama_by_hand import HandLlama
from tests.benchmarks.step_cost import compiled_cost, interleaved

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OURS, HAND, BARE = "adapted", "by hand", "by hand, bare step"


class Side(NamedTuple):
    """A way to train.

    Attributes:
      step: compiled, ``step(base, lora, opt_state, batch) -> (lora, opt_state, loss)``.
      cost: what XLA says of it.
    """

    step: Callable[..., tuple[Any, Any, Any]]
    cost: dict[str, float]


def settings_of(options: argparse.Namespace) -> Settings:
    """Those of a run on the shipped definitions, long enough for all steps."""
    return Settings(
        model=options.model,
        dataset=str(EXAMPLES / "finetune" / "devil.jsonl"),
        eval_fraction=0.0,
        rank=options.rank,
        batch=options.batch,
        length=options.length,
        steps=options.steps + 1,
        learning_rate=1e-3,
    )


def by_hand(made: job.Job, settings: Settings) -> Callable[..., Any]:
    """The adapted function of the job, written by hand: it takes the same parameters."""
    llama = made.adapted.model
    scale = rl.scale(settings.alpha, settings.rank, settings.scaling)
    same = {"activations": llama.activations, "logits_bytes": llama.logits_bytes}
    hand = HandLlama(llama.config, llama.dtype, **same, scale=scale)

    def apply(params: rl.LoraParams, *args: Any, **kwargs: Any) -> Any:
        variables = {"params": params.base["params"], "lora": params.lora["params"]}
        return hand.apply(variables, *args, **kwargs)

    return apply


def bare_step(apply: Callable[..., Any], tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Gradients and updates of the factors, nothing else."""

    def step(base: Any, lora: Any, opt_state: Any, batch: Batch) -> tuple[Any, Any, Any]:
        loss, grads = mean_and_grads(apply, rl.LoraParams(base, lora), batch)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(1, 2))


def sides_of(made: job.Job, settings: Settings, batch: Batch) -> tuple[dict[str, Side], Any]:
    """Each way, compiled, and its first state ``(lora, opt_state)``."""
    hand = by_hand(made, settings)
    steps = settings.steps or 1
    tx = job.optimizer_of(settings, steps, made.adapted.sites)
    schedule = schedule_of(settings.learning_rate, settings.warmup, steps)
    bare = optax.chain(optax.clip_by_global_norm(settings.clip), optax.adamw(schedule))
    start = made.start.lora, made.start.opt_state
    plain = (made.start.lora, bare.init(made.start.lora))
    given = {
        OURS: (made.step, start),
        HAND: (step_of(hand, tx), start),
        BARE: (bare_step(hand, bare), plain),
    }
    sides, states = {}, {}
    for name, (step, state) in given.items():
        states[name] = jax.tree.map(jnp.copy, state)
        compiled = step.lower(made.base, *states[name], batch).compile()
        sides[name] = Side(compiled, compiled_cost(compiled))
    return sides, states


class Trainer:
    """Trains one side, a batch a call; keeps its losses."""

    def __init__(self, side: Side, base: Any, state: Any, batches: Sequence[Batch]) -> None:
        """Starts at the first batch."""
        self._side, self._base, self._state = side, base, state
        self._batches = iter(batches)
        self.losses: list[float] = []
        self.processor: list[float] = []

    def __call__(self) -> None:
        """One step."""
        start = time.process_time()
        *state, told = self._side.step(self._base, *self._state, next(self._batches))
        self._state = jax.block_until_ready(state)
        self.processor.append(time.process_time() - start)
        self.losses.append(float(getattr(told, "loss", told)))


def measure(settings: Settings) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """One row for each way, ratios to LoRA by hand; and the losses of each."""
    data = program.read(settings)
    mesh = mesh_of(1, None, 1, settings.batch)
    with jax.set_mesh(mesh):
        made = job.make(settings, data.source, data.batches, mesh)
        batches = [made.place(made.batches.read(n, made.rows)) for n in range(made.batches.steps)]
        sides, states = sides_of(made, settings, batches[0])
        trainers = {n: Trainer(sides[n], made.base, states[n], batches) for n in sides}
        times = interleaved(trainers, len(batches) - 1, time.perf_counter)
    processor = {name: trainer.processor[1:] for name, trainer in trainers.items()}
    tokens = [int((batch.segments > 0).sum()) for batch in batches[1:]]
    rows = [
        {
            "way": name,
            **speed_of(name, HAND, times, processor, tokens),
            **cost_of(side, sides[HAND]),
        }
        for name, side in sides.items()
    ]
    return rows, {name: trainer.losses for name, trainer in trainers.items()}


def speed_of(
    name: str,
    other: str,
    times: dict[str, list[float]],
    processor: dict[str, list[float]],
    tokens: Sequence[int],
) -> dict[str, Any]:
    """Speed of a side, and how many times that of the other one it is."""
    return {
        "tokens/s": sum(tokens) / sum(times[name]),
        "ms a step": 1e3 * statistics.median(times[name]),
        "x speed": spread(times[other], times[name]),
        "processor ms": 1e3 * statistics.median(processor[name]),
        "x processor": spread(processor[other], processor[name]),
    }


def cost_of(side: Side, hand: Side) -> dict[str, Any]:
    """What XLA says of a side, and how many times that of the one by hand it is."""
    return {
        "GFLOP": side.cost["flops"] / 1e9,
        "x FLOPs": side.cost["flops"] / hand.cost["flops"],
        "temp MB": side.cost["temp_bytes"] / 1e6,
        "x temp": side.cost["temp_bytes"] / hand.cost["temp_bytes"],
    }


def spread(theirs: Sequence[float], mine: Sequence[float]) -> str:
    """The median of the ratios, and their quartiles."""
    ratios = [other / own for other, own in zip(theirs, mine, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def about(settings: Settings) -> str:
    """Versions, machine and sizes, in one line."""
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores, load {load}, "
        f"Python {platform.python_version()}, jax {jax.__version__}: {settings.model}, "
        f"rank {settings.rank}, batches of {settings.batch} x {settings.length} tokens, "
        f"{settings.steps} steps of which the first is not timed"
    )


def furthest(losses: dict[str, list[float]], other: str) -> float:
    """The largest relative difference between the losses of a side and ours."""
    pairs = zip(losses[OURS], losses[other], strict=True)
    return max(abs(mine - theirs) / theirs for mine, theirs in pairs)


def parser_of(doc: str) -> argparse.ArgumentParser:
    """What can be changed."""
    parser = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of every side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser


def main() -> None:
    """Measures, prints, and writes JSON if asked."""
    options = parser_of(str(__doc__)).parse_args()
    settings = settings_of(options)
    rows, losses = measure(settings)
    print(about(settings))
    print(Table.of(rows))
    print("x: ratio to LoRA by hand, more is faster; median (quartiles) over the steps.")
    for name in (HAND, BARE):
        print(f"losses of {name!r} differ by {furthest(losses, name):.1e} of their size at most")
    print("losses:", *(f"{loss:.4f}" for loss in losses[OURS]))
    if options.json:
        told = {"about": about(settings), "rows": rows, "losses": losses}
        options.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
