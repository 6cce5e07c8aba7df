"""Sweep: many ranks, scalings, seeds and learning rates trained at once, in one compilation."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from rslora_jax.analysis.sweeps.batches import batches_of
from rslora_jax.analysis.sweeps.budget import Budget
from rslora_jax.analysis.sweeps.engine import run_all
from rslora_jax.analysis.sweeps.runs import Run, Scaling, grid, run_data
from rslora_jax.analysis.sweeps.traces import ACTIVATIONS, QUANTITIES, check_quantities
from rslora_jax.analysis.sweeps.training import Plan
from rslora_jax.config import LoraConfig
from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError
from rslora_jax.sites import Site
from rslora_jax.tables import Table

__all__ = ["Sweep", "rank_sweep"]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a rank sweep measured.

    Attributes:
      runs: one record a run: rank, scaling, seed, learning rate.
      traces: ``{quantity: [runs, steps]}``, each measured before the step's update.
      budget: how the runs were divided and what a run needs.
      seconds: of compiling and of running, the two together being the whole sweep.
      optimizer: the name of the function that made the optimizer.
      init: how `a` started.
      factors: with ``return_factors``, the trained factors with a leading [runs] axis.
    """

    runs: tuple[Run, ...]
    traces: Mapping[str, np.ndarray]
    budget: Budget
    seconds: Mapping[str, float]
    optimizer: str
    init: str
    factors: Any = None

    @property
    def steps(self) -> int:
        """How many steps every run took."""
        return self.traces["loss"].shape[1]

    def table(self) -> Table:
        """A tidy table: one row for each step of each run."""
        return Table.of(
            {**run._asdict(), "step": step, **{n: v[k, step] for n, v in self.traces.items()}}
            for k, run in enumerate(self.runs)
            for step in range(self.steps)
        )

    def select(self, **equals: Any) -> list[int]:
        """The indices of the runs with these values, such as ``rank=8, scaling="lora"``."""
        return [
            k
            for k, run in enumerate(self.runs)
            if all(getattr(run, name) == value for name, value in equals.items())
        ]

    @property
    def failures(self) -> Table:
        """The runs with a value that is not finite: the first such step, and what it was."""
        found = []
        for k, run in enumerate(self.runs):
            # A model may show no input of an adapter at all, as embeddings do not: no failure.
            judged = {n: v[k] for n, v in self.traces.items() if n not in ACTIVATIONS}
            bad = {name: np.flatnonzero(~np.isfinite(v)) for name, v in judged.items()}
            first = {name: int(steps[0]) for name, steps in bad.items() if len(steps)}
            if first:
                name = min(first, key=lambda name: first[name])
                value = str(self.traces[name][k, first[name]])
                found += [{**run._asdict(), "step": first[name], "quantity": name, "value": value}]
        return Table((*Run._fields, "step", "quantity", "value")) if not found else Table.of(found)

    def lora(self, run: int) -> dict[str, Any]:
        """The trained factors of one run, for the `apply` and the sites of the sweep.

        They have the padded size, with zeros beyond the run's rank, and `b` carries the run's
        scale over the site's: ``apply(LoraParams(base, sweep.lora(k)), x)`` is what run k
        learned.

        Raises:
          AdapterError: if the sweep was not asked to return its factors.
        """
        if self.factors is None:
            raise AdapterError(
                "The sweep kept no factors. Call rank_sweep(..., return_factors=True)."
            )
        return jax.tree.map(lambda leaf: leaf[run], self.factors)


def rank_sweep(  # noqa: PLR0913 - every argument is a choice of the experiment
    loss_fn: Callable[[LoraParams, Any], Any],
    base: Any,
    sites: Sequence[Site],
    batches: Any,
    *,
    ranks: Sequence[int] = (4, 8, 16, 32, 64, 128, 256, 512),
    scalings: Sequence[Scaling] = ("lora", "rslora"),
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adam,
    learning_rates: Sequence[float] = (1e-3,),
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    alpha: float | None = None,
    init: str = "kaiming",
    dtype: Any = None,
    quantities: Sequence[str] = tuple(QUANTITIES),
    memory: int | None = None,
    sharding: NamedSharding | None = None,
    return_factors: bool = False,
) -> Sweep:
    """Trains adapters of every rank, scaling, seed and learning rate, in one XLA compilation.

    All runs have factors of the padded size, with zeros beyond their own rank; the scale, the
    learning rate and the seed are data. So one program, mapped over the runs and scanned over
    the steps, is each of them. Gradients of the padding are zero, hence with float32 and float64
    factors a run equals one that was never padded (with bfloat16 factors the scale of each run is
    rounded to that dtype) under every optimizer that treats entries one by one or through sums:
    SGD, Adam, AdamW, Lion, clipping. Two kinds break it: one that takes means over a factor or
    looks at its shape (Adafactor) sees the padding; and Adam with eps=0 makes 0/0 of it, which a
    clip after Adam spreads (0/0 also of the first gradient of `a`, at any rank).
    The `a` of rank r is the first r columns of that of the largest rank, so that ranks differ by
    nothing but rank.

    Args:
      loss_fn: ``loss_fn(params, batch)`` gives a scalar, through the `apply` that `adapt` gave
        together with `sites`.
      base: the frozen tree.
      sites: the sites, adapted at the largest rank: ``LoraConfig(rank=max(ranks))``. Their
        scaling and alpha do not matter to the runs, except that alpha is the default of `alpha`.
      batches: a list of batches, one a step; a list of one batch, used at each of `steps`
        steps; or a pytree whose leaves have a leading [steps] axis.
      ranks: increasing, up to the rank of the sites.
      scalings: ``"lora"``, ``"rslora"``, or ``(name, function(alpha, rank) -> scale)``.
      optimizer: makes an Optax transform from a learning rate, which is traced.
      learning_rates: what it is called with.
      seeds: of the draws of `a`, each as ``jax.random.key(seed)``.
      steps: how many steps; None means as many as there are batches.
      alpha: the numerator of the scales, above 0; None means that of each site.
      init: ``"kaiming"`` or ``"normal"`` as in `LoraConfig`; ``"fan_out"`` or ``"gaussian"`` for
        a standard normal over sqrt(r) or over r, two popular bugs.
      dtype: of the factors, as in `LoraConfig`.
      quantities: what to record at every step, of `traces.QUANTITIES`; the loss always is.
      memory: bytes that the runs on one device may use together; what does not fit goes one
        chunk after another. None means half of the device's memory; on a CPU 32 MiB, what its
        caches hold, or a single run.
      sharding: ``NamedSharding(mesh, PartitionSpec(axis))`` spreads the runs over that axis.
      return_factors: keep the trained factors, for `Sweep.lora`.

    Returns:
      The `Sweep`.

    Raises:
      AdapterError: for ranks that do not increase or exceed the padded size, a loss that is no
        scalar, empty sites, batches of differing shapes, an unknown scaling, or a memory in
        which not even one run fits.

    Warns:
      UserWarning: if a run met a value that is not finite, with the ranks and the first step.

    Example:
      >>> import rslora_jax as rl
      >>> base = {"w": np.ones((4, 8), np.float32), "head": np.ones((8, 2), np.float32)}
      >>> model = lambda p, x: (x @ p["w"]) @ p["head"]
      >>> x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
      >>> config = rl.LoraConfig(rank=4, alpha=8.0)
      >>> _, apply, sites = rl.adapt(model, base, x, config=config, key=jax.random.key(0))
      >>> loss = lambda params, x: (apply(params, x) ** 2).mean()
      >>> sweep = rank_sweep(loss, base, sites, [x], ranks=(1, 2, 4), steps=3)
      >>> sweep.traces["grad_b"].shape, len(sweep.table().rows)
      ((6, 3), 18)
    """
    if isinstance(base, LoraParams):
        raise AdapterError("base must be the frozen tree, found a LoraParams: pass params.base.")
    if not callable(optimizer):
        raise AdapterError(
            f"optimizer must make a transform from a learning rate, such as optax.adam, found "
            f"{type(optimizer).__name__}. Pass the function, and its rates as learning_rates."
        )
    runs = grid(ranks, scalings, seeds, learning_rates)
    data = run_data(runs, sites, scalings, alpha, init)
    config = LoraConfig(rank=1, init=DRAWS.get(init, init), scaling="lora", dtype=dtype)
    recorded = check_quantities(quantities)
    plan = Plan(loss_fn, tuple(sites), optimizer, config, recorded, return_factors)
    outcome = run_all(plan, base, batches_of(batches, steps), (runs, data), memory, sharding)
    name = getattr(optimizer, "__name__", type(optimizer).__name__)
    sweep = Sweep(runs, *outcome[:3], name, init, outcome.factors)
    _warn_failures(sweep)
    return sweep


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


DRAWS = {"fan_out": _normal, "gaussian": _normal}


def _warn_failures(sweep: Sweep) -> None:
    found = sweep.failures.records()
    if not found:
        return
    first = min(found, key=lambda row: row["step"])
    ranks = sorted({row["rank"] for row in found})
    warnings.warn(
        f"{len(found)} of {len(sweep.runs)} runs met a value that is not finite, at the ranks "
        f"{ranks}: first {first['quantity']} = {first['value']} at step {first['step']} of rank "
        f"{first['rank']}, {first['scaling']}, learning rate {first['learning_rate']:g}. "
        "`Sweep.failures` lists them; lower their learning rate.",
        stacklevel=3,
    )
