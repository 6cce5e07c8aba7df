"""Allocate: spreads a budget of adapter parameters over the sites, by their spectra."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rslora_jax.analysis.spectra.spectrum import Spectra, Spectrum
from rslora_jax.config import Rule
from rslora_jax.paths import AdapterError

__all__ = ["allocate_ranks", "parameters_per_rank"]


class _Step(NamedTuple):
    """One more rank at one site: what it captures per parameter, and what it costs."""

    gain: float
    path: str
    rank: int
    cost: int


def allocate_ranks(spectra: Spectra, budget: int, *, relative: bool = True) -> tuple[Rule, ...]:
    """Ranks per site under a parameter budget, as the `rules` of a `LoraConfig`.

    Every rank of every site is sorted by the energy that it captures per parameter:
    s_i^2 / |change|_F^2 over inputs + outputs, the largest first, until the budget is
    spent. A site of stacked layers has one rank for all of them, so that its energy is the
    mean over the stack and its cost the sum.

    Energy is a weak hint of what a task needs (see `advise_rank`): check the loss.

    Args:
      spectra: from `delta_spectrum` or `spectrum`; no site gets a rank above its number of
        known singular values.
      budget: how many parameters all adapters may hold together.
      relative: False sorts by s_i^2 itself, so that sites that changed more get more.

    Returns:
      One rule a site, of rank at least 1; together never above the budget. Pass them as
      ``LoraConfig(rank=1, rules=rules)``.

    Raises:
      AdapterError: if the budget does not suffice for rank 1 everywhere, with the least
        budget that does; if there are no spectra.

    Example:
      >>> import numpy as np
      >>> flat = Spectrum("q", (8, 8), np.array([1.0, 1.0, 1.0]), np.array(3**0.5))
      >>> steep = Spectrum("k", (8, 8), np.array([9.0, 0.1, 0.1]), np.array(9.0))
      >>> [(rule.pattern, rule.rank) for rule in allocate_ranks(Spectra([flat, steep]), 64)]
      [('q', 3), ('k', 1)]
    """
    ranks = {item.path: 1 for item in spectra}
    left = budget - sum(parameters_per_rank(item) for item in spectra)
    if not spectra or left < 0:
        raise AdapterError(
            f"A budget of {budget:,} parameters was asked for {len(spectra)} sites; rank 1 "
            f"everywhere takes {budget - left:,}. Raise the budget, or pass fewer spectra "
            "(and leave the others out with LoraConfig.exclude)."
        )
    full: set[str] = set()
    for step in sorted(_steps(spectra, relative), key=lambda step: -step.gain):
        if step.path in full or step.cost > left:
            full.add(step.path)  # a later rank of this site cannot come before this one
            continue
        ranks[step.path], left = step.rank, left - step.cost
    return tuple(Rule(re.escape(path), rank=rank) for path, rank in ranks.items())


def parameters_per_rank(item: Spectrum) -> int:
    """What one rank costs at a site: modules * (inputs + outputs) parameters."""
    return int(np.prod(item.total.shape, dtype=int)) * sum(item.matrix)


def _steps(spectra: Spectra, relative: bool) -> Iterator[_Step]:
    for item in spectra:
        cost = parameters_per_rank(item)
        energy = item.s.astype(np.float64) ** 2
        whole = item.total.astype(np.float64)[..., None] ** 2
        share = np.divide(energy, whole, out=np.zeros_like(energy), where=whole > 0)
        gains = (share if relative else energy).reshape(-1, energy.shape[-1]).mean(0) / sum(
            item.matrix
        )
        for rank in range(2, len(gains) + 1):
            if gains[rank - 1] > 0:
                yield _Step(float(gains[rank - 1]), item.path, rank, cost)
