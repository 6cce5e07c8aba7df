"""Job: base, adapters, optimizer and data of a run, made where they are to lie."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from finetune import exports, model
from finetune.batches import Batch, Batches, local_rows, place
from finetune.memory import give_back
from finetune.settings import Settings
from finetune.settling import in_steps
from finetune.step import Told, optimizer_of, schedule_of, step_of
from rslora_jax.checkpoint import RunState

# Settings that change what a run computes. What sites and base say is checked by `Runs`.
EXACT = (
    *("learning_rate", "warmup", "weight_decay", "clip", "lora_plus_ratio"),
    *("batch", "accumulation", "length", "packing", "bfloat16", "seed"),
)


class Job(NamedTuple):
    """All that the loop needs, made and placed.

    Attributes:
      base: the frozen parameters.
      start: the state before the first step; ``start.data["run"]`` says which run it is.
      adapted: the model, abstract.
      step: ``step(base, lora, opt_state, batch) -> (lora, opt_state, Told)``.
      batches: the order of the data.
      rows: which rows of a batch this process reads.
      place: a batch of the host as arrays of all devices.
    """

    base: Any
    start: RunState
    adapted: model.Adapted
    step: Callable[..., Any]
    batches: Batches
    rows: list[int]
    place: Callable[[Batch], Batch]


def per_step(settings: Settings, batches: Batches) -> Settings:
    """Settings with warmup, evaluations and checkpoints counted in steps."""
    epoch = dataclasses.replace(batches, epochs=1.0, steps=None)
    return in_steps(settings, batches.steps, epoch.steps)


def schedule(settings: Settings, batches: Batches) -> optax.Schedule:
    """The learning rate of each step."""
    return schedule_of(settings.learning_rate, settings.warmup, batches.steps)


def make(settings: Settings, source: Any, batches: Batches, mesh: Mesh) -> Job:
    """Adapts, loads and places; under the mesh of `jax.set_mesh`."""
    adapted = model.adapt(settings, source.config, source.structs)
    exports.check(settings, adapted.params.lora, adapted.sites)
    places = model.shardings(mesh, adapted)
    tx = optimizer_of(settings, batches.steps, adapted.sites)
    key = jax.random.key(settings.seed)
    lora, opt_state = rl.sharding.init_sharded(key, adapted.sites, adapted.config, places.lora, tx)
    start = RunState(
        lora, opt_state, 0, key, {"run": identity(settings, batches), "position": None}
    )
    rows = NamedSharding(mesh, model.rows_spec(settings))
    shape = (*[settings.accumulation] * (settings.accumulation > 1), settings.batch, 1)
    made = Job(
        base=_abstract(adapted.params.base, places.base),
        start=start,
        adapted=adapted,
        step=step_of(adapted.apply, tx, _stay(start, mesh)),
        batches=batches,
        rows=local_rows(rows, shape),
        place=functools.partial(place, sharding=rows, rows=settings.batch),
    )
    _compile(made)
    base = model.load(settings, source, adapted, places.base)
    give_back()
    return made._replace(base=base)


def identity(settings: Settings, batches: Batches) -> dict[str, Any]:
    """What must be the same for a run to go on where another one ended."""
    exact = {name: getattr(settings, name) for name in EXACT}
    return {**exact, "steps": batches.steps, "order of the data": batches.fingerprint()}


def _abstract(structs: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), structs, places
    )


def _compile(made: Job) -> None:
    """Compiles the first step before the base is there: both take much memory.

    JAX keeps what it compiled, and the first call finds it.
    """
    batch = made.place(made.batches.read(0, made.rows))
    made.step.lower(made.base, made.start.lora, made.start.opt_state, batch).compile()
    give_back()


def _stay(start: RunState, mesh: Mesh) -> tuple[Any, Any, Told]:
    """Results of a step lie where its arguments did; what it tells, everywhere."""
    stay = jax.tree.map(lambda leaf: leaf.sharding, (start.lora, start.opt_state))
    everywhere = NamedSharding(mesh, P())
    return (*stay, Told(*[everywhere] * len(Told._fields)))
