r"""Fine-tune a Llama with rank-stabilized LoRA on one process, on several, or on a TPU pod.

The same file runs everywhere. On a TPU pod, and under Slurm and the like, JAX finds the other
processes by itself; on one machine they are told where to meet:

    python examples/pod_finetune.py
    python examples/pod_finetune.py --coordinator localhost:9911 --processes 2 --process-id 0 &
    python examples/pod_finetune.py --coordinator localhost:9911 --processes 2 --process-id 1
    gcloud compute tpus tpu-vm ssh POD --worker=all \
        --command="python examples/pod_finetune.py --output /mnt/shared/run"

Started again it goes on from the newest complete checkpoint, with the losses that it would have
had, on any number of processes and devices. SIGTERM, the notice that machines will be taken
away, makes all processes save the same step and exit cleanly.
"""

from session import exit_on_interrupt

if __name__ == "__main__":  # before the slow imports: Ctrl-C is one line from the start
    exit_on_interrupt("Interrupted: run it again to go on from the newest checkpoint.")

import dataclasses
import functools
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
import texts
from hosts import Losses, connect, leaving_nobody_waiting, mesh_of, say
from llama import SPECS
from rslora_jax.checkpoint import Preemption, Runs, RunState
from rslora_jax.sharding import init_sharded, shardings
from tasks import ROWS, Task, smollm2, tiny

WARMUP = 10  # steps in which the learning rate rises; then it stays, however long the run


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune a Llama on one process, on several, or on a TPU pod. Run it again to go on."""

    output: Path = Path("outputs/pod_finetune")
    """Folder of checkpoints and losses.jsonl, on a disk that all processes see."""
    model: Literal["tiny", "smollm"] = "tiny"
    """A random Llama that reads bytes, or SmolLM2-135M-Instruct."""
    data: int = 1
    """Devices along the axis over which only the batch is split."""
    fsdp: int | None = None
    """Devices over which batch and weights are split; by default all that are left."""
    tensor: int = 1
    """Devices over which each matrix product is split."""
    rank: int = 8
    """Rank of every adapter."""
    alpha: float = 16.0
    """Numerator of the scale alpha/sqrt(rank)."""
    learning_rate: float = 3e-3
    """Learning rate of Adam, after a few steps in which it rises."""
    steps: int = 100
    """Training steps in all, those of earlier starts included."""
    batch: int = 16
    """Windows of text per step, on all devices together."""
    length: int = 64
    """Tokens per window."""
    bfloat16: bool = False
    """Whether activations are bfloat16."""
    remat: bool = False
    """Whether layers are computed again in the backward pass instead of stored."""
    save_every: int = 20
    """Steps between checkpoints."""
    keep_last: int = 3
    """How many checkpoints stay."""
    seed: int = 0
    """Seed of weights, adapters and the order of the text."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where JAX cannot find the other processes by itself."""
    processes: int = 1
    """How many processes meet at the coordinator."""
    process_id: int = 0
    """Which of them this one is."""


class Trained(NamedTuple):
    """An adapted model on a mesh.

    Attributes:
      base: the frozen parameters.
      start: the state before the first step.
      sites: what is adapted.
      step: ``step(base, lora, opt_state, rows) -> (lora, opt_state, loss)``.
    """

    base: Any
    start: RunState
    sites: rl.Sites
    step: Callable[..., Any]


def main() -> None:
    """Run with the flags of the command line."""
    options = tyro.cli(Options)
    try:
        prepare(options)
    except ValueError as error:
        sys.exit(str(error))
    connect(options.coordinator, options.processes, options.process_id)
    with leaving_nobody_waiting():
        run(options)


def prepare(options: Options) -> None:
    """Refuse now what would fail later.

    Raises:
      ValueError: if a number is out of range.
    """
    lora_config(options)
    names = ("data", "tensor", "learning_rate", "steps", "batch", "length", "save_every")
    for name in (*names, "keep_last", "processes"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} must be above 0, found {getattr(options, name)}")
    if options.fsdp is not None and options.fsdp < 1:
        raise ValueError(f"fsdp must be above 0, found {options.fsdp}")
    if not 0 <= options.process_id < options.processes:
        raise ValueError(
            f"process_id must be from 0 to {options.processes - 1}, one of the {options.processes} "
            f"processes, found {options.process_id}"
        )
    if options.coordinator is None and options.processes > 1:
        raise ValueError("processes needs coordinator, such as --coordinator localhost:9911")


def lora_config(options: Options) -> rl.LoraConfig:
    """Adapters on every linear layer, scaled by alpha/sqrt(rank)."""
    return rl.LoraConfig(rank=options.rank, alpha=options.alpha)


def run(options: Options) -> None:
    """Load, shard, adapt, and train from where an earlier run ended."""
    mesh = mesh_of(options.data, options.fsdp, options.tensor, options.batch)
    with jax.set_mesh(mesh):
        say(f"{jax.process_count()} process(es), {mesh.size} device(s), mesh {dict(mesh.shape)}")
        task = task_of(options)
        trained = adapt(task, mesh, options)
        train(task, trained, options)


def task_of(options: Options) -> Task:
    """The model and its text."""
    dtype = jnp.bfloat16 if options.bfloat16 else jnp.float32
    if options.model == "smollm":
        return smollm2(example(options), dtype=dtype, remat=options.remat)
    return tiny(example(options), options.seed, dtype=dtype, remat=options.remat)


def example(options: Options) -> jax.ShapeDtypeStruct:
    """A batch of tokens, abstract: what the model is traced with."""
    return jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)


def adapt(task: Task, mesh: Mesh, options: Options) -> Trained:
    """Base, adapters and optimizer state, each made where it is to lie."""
    config, key = lora_config(options), jax.random.key(options.seed)
    params, apply, sites = rl.adapt(
        task.model.apply, task.variables, example(options), config=config, key=key
    )
    places = shardings(mesh, params, sites, SPECS)
    tx = optax.adam(optax.warmup_constant_schedule(0.0, options.learning_rate, WARMUP))
    lora, opt_state = init_sharded(key, sites, config, places.lora, tx)
    order = {"seed": options.seed, "batch": options.batch, "text": zlib.crc32(task.table.tobytes())}
    start = RunState(lora, opt_state, 0, key, order)
    say(rl.describe(sites))
    return Trained(task.make(places.base), start, sites, step_of(apply, tx, start, mesh))


def step_of(
    apply: Callable[..., Any], tx: optax.GradientTransformation, start: RunState, mesh: Mesh
) -> Callable[..., Any]:
    """One training step. The base is an argument; adapters and optimizer state are donated."""

    def loss_fn(params: rl.LoraParams, rows: jax.Array) -> jax.Array:
        logits = apply(params, rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    stay = jax.tree.map(lambda leaf: leaf.sharding, (start.lora, start.opt_state))
    everywhere = NamedSharding(mesh, P())

    @functools.partial(jax.jit, donate_argnums=(1, 2), out_shardings=(*stay, everywhere))
    def step(base: Any, lora: Any, opt_state: Any, rows: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = rl.value_and_grad(loss_fn)(rl.LoraParams(base, lora), rows)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    return step


def train(task: Task, trained: Trained, options: Options) -> None:
    """Train up to `options.steps`, or to the step at which machines are taken away."""
    rows = NamedSharding(jax.sharding.get_mesh(), ROWS)
    with Preemption() as notice, open_runs(trained, options) as runs:
        state = resume(runs, trained.start)
        say(f"training from step {state.step}; the first step is compiled first")
        with Losses(options.output / "losses.jsonl", after=state.step) as log:
            while state.step < options.steps and not notice.received:
                chosen = texts.order(state.step, len(task.table), options.batch, options.seed)
                batch = texts.read(task.table, chosen, rows)
                state, loss = advance(trained, state, batch)
                log.add(state.step, float(loss))
                runs.save(state, {"loss": loss})
                notice.reached(state.step)
        runs.save(state, force=True)
    ended = "done" if state.step >= options.steps else "stopped by a notice; run it again to go on"
    say(f"step {state.step} is saved in {options.output}: {ended}")


def advance(trained: Trained, state: RunState, batch: jax.Array) -> tuple[RunState, jax.Array]:
    """One step on; the state that is given is used up."""
    lora, opt_state, loss = trained.step(trained.base, state.lora, state.opt_state, batch)
    return state._replace(lora=lora, opt_state=opt_state, step=state.step + 1), loss


def open_runs(trained: Trained, options: Options) -> Runs:
    """The checkpoints of this run; every process opens them."""
    return Runs(
        options.output,
        trained.sites,
        lora_config(options),
        base=trained.base,
        keep_last=options.keep_last,
        save_every=options.save_every,
    )


def resume(runs: Runs, start: RunState) -> RunState:
    """The newest complete step, straight to the shards of `start`, or `start` itself.

    Raises:
      ValueError: if it was trained on another order of another text.
    """
    if runs.latest() is None:
        return start
    state = runs.restore(start)
    if state.data != start.data:
        raise ValueError(
            f"{runs.folder} was trained on {state.data}, found {start.data}. Use the flags of the "
            "run, or another output."
        )
    say(f"going on from step {state.step}")
    return state


if __name__ == "__main__":
    main()
