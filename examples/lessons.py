"""Teaching a pretrained model one lesson: adapters of every rank at once, or every weight."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rslora_jax as rl
from registers import Lesson, Prompts, shuffled
from rslora_jax.analysis.spectra.extract import extract
from rslora_jax.analysis.spectra.spectrum import spectrum
from rslora_jax.analysis.sweeps.sweep import Sweep, rank_sweep
from rslora_jax.axes import fan_in, fan_out
from rslora_jax.tables import Table
from tiny import cross_entropy, predict, tune_fully

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "sgd": optax.sgd,
}
SCALINGS = ("lora", "rslora")
LATE = 5  # the last steps are the last fifth of all


@dataclasses.dataclass(frozen=True)
class Course:
    """How a lesson is taught.

    Attributes:
      lesson: what is taught and asked.
      batches: one a step.
    """

    lesson: Lesson
    batches: Prompts

    @classmethod
    def of(cls, lesson: Lesson, steps: int, batch: int, seed: int) -> "Course":
        """Shuffles the lesson into batches."""
        return cls(lesson, shuffled(lesson.taught, steps, batch, seed))


def adapt(base: Any, rank: int, alpha: float) -> rl.Adapted:
    """Adapters on all matrices of the layers, of the largest rank of a sweep."""
    config = rl.LoraConfig(rank=rank, alpha=alpha)
    tokens = jnp.zeros((1, 4), jnp.int32)
    return rl.adapt(predict, base, tokens, config=config, key=jax.random.key(0))


def sweep(
    adapted: rl.Adapted,
    course: Course,
    optimizer: str,
    learning_rate: float,
    ranks: Sequence[int],
    seeds: Sequence[int],
) -> Table:
    """Teaches the lesson at every rank, scaling and seed, in one compilation.

    Returns:
      One row a run: lesson, optimizer, scaling, rank, seed; `accuracy` on what is asked and on
      what was `taught`; the norm of the adapters' whole gradient at the `onset` (the first step)
      and `late` (the median of the last fifth of the steps).
    """
    params, apply, sites = adapted

    def loss(params: rl.LoraParams, batch: Prompts) -> jax.Array:
        return cross_entropy(apply(params, batch.tokens), batch.answers)

    found = rank_sweep(
        loss,
        params.base,
        sites,
        course.batches,
        ranks=ranks,
        scalings=SCALINGS,
        optimizer=OPTIMIZERS[optimizer],
        learning_rates=(learning_rate,),
        seeds=seeds,
        quantities=("grad",),
        return_factors=True,
    )
    right = examine(apply, params.base, found.factors, course.lesson)
    return Table.of(
        {"lesson": course.lesson.name, "optimizer": optimizer, **row}
        for row in _rows(found, *right)
    )


def _rows(found: Sweep, asked: np.ndarray, taught: np.ndarray) -> list[dict[str, Any]]:
    grads = found.traces["grad"]
    late = np.median(grads[:, -max(1, found.steps // LATE) :], axis=1)
    return [
        {
            "scaling": run.scaling,
            "rank": run.rank,
            "seed": run.seed,
            "accuracy": asked[k],
            "taught": taught[k],
            "onset": grads[k, 0],
            "late": late[k],
        }
        for k, run in enumerate(found.runs)
    ]


def examine(
    apply: Callable[..., jax.Array], base: Any, loras: Any, lesson: Lesson
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of many adapters at once, on what is asked and on what was taught: each [runs]."""
    both = Prompts(*(np.concatenate(pair) for pair in zip(*lesson[1:], strict=True)))

    def answer(lora: Any) -> jax.Array:
        return apply(rl.LoraParams(base, lora), both.tokens).argmax(-1)

    right = np.asarray(jax.jit(jax.vmap(answer))(loras)) == both.answers
    count = len(lesson.asked.answers)
    return right[:, :count].mean(1), right[:, count:].mean(1)


def truncate(adapted: rl.Adapted, course: Course, learning_rate: float) -> Table:
    """Trains all entries of the same matrices, then keeps the best rank r of each change.

    Returns:
      One row a rank, up to full rank: lesson, rank; `accuracy` on what is asked and on what was
      `taught` with the truncated change; `energy`, the share of |change|_F^2 that is kept, a
      mean over the modules.
    """
    base = adapted.params.base
    tuned = tune_fully(base, adapted.sites, course.batches, learning_rate)
    full = max(min(fan_in(s.axes, s.shape), fan_out(s.axes, s.shape)) for s in adapted.sites)
    change = extract(base, tuned, adapted.sites, rank=full)
    apply = adapt(base, full, change.config.alpha).apply
    ranks = [2**n for n in range(full.bit_length())]
    kept = jnp.arange(full) < jnp.array(ranks)[:, None]

    def cut(keys: Any, factor: jax.Array) -> jax.Array:
        """At all ranks at once; a column of `a` that is zero silences its row of `b`."""
        every = jnp.broadcast_to(factor, (len(ranks), *factor.shape))
        if keys[-1].key == "b":
            return every
        return every * kept.reshape(len(ranks), *(1,) * (factor.ndim - 1), full)

    loras = jax.tree_util.tree_map_with_path(cut, change.params.lora)
    right = examine(apply, base, loras, course.lesson)
    energy = spectrum(change.params, change.sites).energy(ranks)
    return Table.of(
        {
            "lesson": course.lesson.name,
            "rank": rank,
            "accuracy": right[0][k],
            "taught": right[1][k],
            "energy": np.mean(energy.select(rank=rank).column("energy")),
        }
        for k, rank in enumerate(ranks)
    )
