"""Runs: the grid of a sweep, and what tells its runs apart, as numbers a compiled step can read."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from rslora_jax.config import scale
from rslora_jax.paths import AdapterError, nearest
from rslora_jax.sites import Site

__all__ = ["INITS", "Run", "RunData", "Scaling", "grid", "run_data"]

Scaling: TypeAlias = str | tuple[str, Callable[[float, int], float]]

SCALINGS = ("lora", "rslora")
INITS: dict[str, Callable[[int], float]] = {
    "kaiming": lambda rank: 1.0,
    "normal": lambda rank: 1.0,
    "fan_out": lambda rank: 1 / math.sqrt(rank),
    "gaussian": lambda rank: 1 / rank,
}
"""How `a` starts: what its draw is multiplied by, at a rank."""


class Run(NamedTuple):
    """One training run of a sweep.

    Attributes:
      rank: its rank r.
      scaling: the name of its scaling.
      seed: of the draw of `a`: the key is ``jax.random.key(seed)``.
      learning_rate: what its optimizer was made with.
    """

    rank: int
    scaling: str
    seed: int
    learning_rate: float


class RunData(NamedTuple):
    """Runs as arrays with a leading [runs] axis, or one run of them.

    Attributes:
      rank: int32.
      draw: int32, the place of the run's seed among the seeds.
      learning_rate: float32 (float64 where JAX has it enabled), as are the next two.
      start: what the draw of `a` is multiplied by.
      ratio: [.., sites], the run's scale over the scale that `apply` uses.
    """

    rank: Any
    draw: Any
    learning_rate: Any
    start: Any
    ratio: Any


def grid(
    ranks: Sequence[int],
    scalings: Sequence[Scaling],
    seeds: Sequence[int],
    learning_rates: Sequence[float],
) -> tuple[Run, ...]:
    """Every combination, the rank outermost.

    Raises:
      AdapterError: if an argument is empty, repeats itself or is out of range, or if the ranks
        do not increase.

    Example:
      >>> [run.scaling for run in grid((4,), ("lora", "rslora"), (0,), (0.1,))]
      ['lora', 'rslora']
    """
    given = {"ranks": ranks, "scalings": scalings, "seeds": seeds, "learning_rates": learning_rates}
    for name, values in given.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise AdapterError(f"{name} must be a tuple or list, found {values!r}. Write (x,).")
    _check_ranks(ranks)
    names = [_name(scaling) for scaling in scalings]
    _check_distinct(names, "scalings")
    _check_numbers(seeds, "seeds", lambda seed: int(seed) == seed and 0 <= seed < 2**32)
    _check_numbers(learning_rates, "learning_rates", lambda rate: 0 <= rate < math.inf)
    every = itertools.product(map(int, ranks), names, map(int, seeds), map(float, learning_rates))
    return tuple(itertools.starmap(Run, every))


def run_data(
    runs: Sequence[Run],
    sites: Sequence[Site],
    scalings: Sequence[Scaling],
    alpha: float | None,
    init: str,
) -> RunData:
    """What the compiled sweep reads of its runs.

    Args:
      runs: the runs.
      sites: sites with ranks; those are the padded sizes.
      scalings: names that `config.scale` knows, or ``(name, function(alpha, rank))``.
      alpha: the numerator of every scale; None keeps each site's own.
      init: one of `INITS`.

    Raises:
      AdapterError: for empty sites, ranks above the padded size, an unknown init, an alpha
        that is not above 0, or a scaling that is unknown or gives no finite number above 0.
    """
    _check_sites(runs, sites)
    if alpha is not None and not 0 < alpha < math.inf:
        raise AdapterError(
            f"alpha must be a finite number above 0, found {alpha!r}. Leave it out to keep the "
            "alpha of each site."
        )
    if init not in INITS:
        raise AdapterError(f"init must be one of {tuple(INITS)}, found {init!r}.")
    rules = {_name(scaling): scaling for scaling in scalings}
    alphas = [s.alpha if alpha is None else alpha for s in sites]
    ratio = [
        [
            _gamma(rules[r.scaling], own, r.rank) / (s.scale or 1)
            for s, own in zip(sites, alphas, strict=True)
        ]
        for r in runs
    ]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    real = jnp.result_type(float)
    return RunData(
        np.array([run.rank for run in runs], np.int32),
        np.array([seeds.index(run.seed) for run in runs], np.int32),
        np.array([run.learning_rate for run in runs], real),
        np.array([INITS[init](run.rank) for run in runs], real),
        np.array(ratio, real),
    )


def _gamma(scaling: Scaling, alpha: Any, rank: int) -> float:
    if isinstance(scaling, str):
        return scale(alpha, rank, scaling)
    name, function = scaling
    gamma = float(function(alpha, rank))
    if not 0 < gamma < math.inf:
        raise AdapterError(
            f"The scaling {name!r} gave {gamma!r} for alpha {alpha} and rank {rank}. "
            "Return a finite number above 0."
        )
    return gamma


def _name(scaling: Any) -> str:
    if isinstance(scaling, str):
        if scaling in SCALINGS:
            return scaling
    elif isinstance(scaling, tuple) and len(scaling) == 2:
        name, function = scaling
        if isinstance(name, str) and name not in SCALINGS and callable(function):
            return name
    raise AdapterError(
        f"A scaling must be one of {SCALINGS} or a pair (name, function(alpha, rank) -> scale) "
        f"with a name of its own, found {scaling!r}. The nearest are "
        f"{nearest(str(scaling), SCALINGS)}."
    )


def _check_ranks(ranks: Sequence[Any]) -> None:
    whole = all(isinstance(r, int | np.integer) and not isinstance(r, bool) for r in ranks)
    if not len(ranks) or not whole or ranks[0] < 1 or list(ranks) != sorted(set(ranks)):
        raise AdapterError(
            f"ranks must be increasing ints of at least 1, found {tuple(ranks)!r}. "
            "Sort them and leave out repetitions."
        )


def _check_distinct(values: Sequence[Any], name: str) -> None:
    if not len(values) or len(set(values)) < len(values):
        raise AdapterError(f"{name} must hold distinct values, found {tuple(values)!r}.")


def _check_numbers(values: Sequence[Any], name: str, fits: Callable[[Any], bool]) -> None:
    _check_distinct(values, name)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise AdapterError(f"{name} must hold numbers, found {value!r}.")
        if not fits(value):
            raise AdapterError(f"{name} holds {value!r}, which is out of range.")


def _check_sites(runs: Sequence[Run], sites: Sequence[Site]) -> None:
    if not sites or any(site.rank is None for site in sites):
        raise AdapterError(
            f"A rank sweep needs the sites that `adapt` returned, found "
            f"{'none' if not sites else 'sites without a rank'}."
        )
    largest = max(run.rank for run in runs)
    small = next((site for site in sites if site.rank is None or site.rank < largest), None)
    if small is not None:
        raise AdapterError(
            f"The ranks reach {largest}, above the padded size {small.rank} of the site "
            f"{small.path!r}. Adapt with LoraConfig(rank={largest}), or leave out higher ranks."
        )
