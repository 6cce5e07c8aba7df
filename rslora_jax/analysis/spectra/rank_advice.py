"""Rank advice: which rank a task needs, from hints ordered by how far to trust them."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.analysis.spectra.bits import Bits, bits_rank
from rslora_jax.analysis.spectra.effective_rank import EffectiveRanks, effective_ranks
from rslora_jax.analysis.spectra.randomized import delta_svd
from rslora_jax.analysis.spectra.truncation import Change, Losses, changes, truncated_losses
from rslora_jax.axes import fan_in, fan_out
from rslora_jax.formats import formed
from rslora_jax.paths import AdapterError, flatten, unflatten
from rslora_jax.sites import Site
from rslora_jax.tables import Table

__all__ = ["Advice", "advise_rank"]

RANKS = (1, 2, 4, 8, 16, 32, 64)


class Advice(NamedTuple):
    """A recommended rank, and why.

    Attributes:
      rank: the smallest rank whose truncated change keeps the loss; None if none did.
      table: the hints, the most trustworthy first: hint, rank, trust, why.
      losses: rank, loss, and the share of the fine-tune's improvement that is kept.
    """

    rank: int | None
    table: Table
    losses: Table

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.losses}"


def advise_rank(  # noqa: PLR0913 - the public name, as the issue gives it
    loss_fn: Callable[[Any, Any], Any],
    base: Any,
    tuned: Any,
    batches: Sequence[Any],
    sites: Sequence[Site] | None = None,
    *,
    ranks: Sequence[int] = RANKS,
    tolerance: float = 0.05,
    bits: Bits | None = None,
) -> Advice:
    """Recommends a rank from the loss on the user's data; spectra are only hints.

    1. The loss of the base plus the best rank-r part of the change, for every rank in one
       compilation: the smallest rank that keeps all but `tolerance` of the improvement.
       Pass batches that the fine-tune has not seen: there a lower rank often does better.
    2. A capacity bound for tasks that store facts: see `bits_rank`.
    3. The energy of the change, and the singular values above its noise. In full
       fine-tunes they hardly tell a task that needs rank 1 from one that needs rank 32.
    4. The energy of the gradient at the base, the mean over the batches. The first gradient
       looks low-rank for any task: never choose a rank by it alone.

    Args:
      loss_fn: ``loss_fn(tree, batch) -> scalar`` of a plain parameter tree.
      base: the tree before fine-tuning.
      tuned: the tree after, or the `LoraParams` that `adapt` returned (with `sites`).
      batches: batches of equal shapes.
      sites: the weights and the roles of their axes; None takes every matrix, the last axis
        as output and the others as inputs.
      ranks: the ranks to try, rising.
      tolerance: the share of the improvement (base loss less tuned loss) that may be lost.
      bits: what the task asks to be stored, if it is known.

    Returns:
      `Advice(rank, table, losses)`. A loss that is not finite is shown, and never chosen.

    Raises:
      AdapterError: if the trees, sites or batches do not match, the ranks do not rise, the
        loss is not a scalar, or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> base, tuned = {"w": jnp.zeros((4, 4))}, {"w": jnp.diag(jnp.array([4.0, 3.0, 0, 0]))}
      >>> loss = lambda tree, x: ((x @ tree["w"] - x @ tuned["w"]) ** 2).mean()
      >>> advice = advise_rank(loss, base, tuned, [jnp.eye(4)], ranks=[1, 2, 4])
      >>> advice.rank
      2
      >>> [round(share, 2) for share in advice.losses.column("kept")]
      [0.0, 0.64, 1.0, 1.0, 1.0]
    """
    ranks = _checked(ranks, tolerance, bits)
    found = changes(base, tuned, sites, max(ranks))
    losses = truncated_losses(loss_fn, base, tuned, found, batches, ranks)
    by_loss = _loss_hint(losses, tolerance)
    rows = [by_loss, _bits_hint(bits, found), *_energy_hints(found)]
    rows.append(_gradient_hint(loss_fn, base, found, batches, max(ranks)))
    return Advice(by_loss["rank"], Table.of(rows), _loss_table(losses))


def _loss_hint(losses: Losses, tolerance: float) -> dict[str, Any]:
    gain = losses.base - losses.tuned
    bad = [
        rank
        for rank, loss in zip(losses.ranks, losses.truncated, strict=True)
        if not math.isfinite(loss)
    ]
    note = f"; the loss is not finite at rank {', '.join(map(str, bad))}" if bad else ""
    row = {"hint": "loss against truncation", "rank": None, "trust": "high"}
    if not gain > 0:
        why = f"the fine-tune does not lower this loss ({losses.base:.4g} to {losses.tuned:.4g})"
        return {**row, "why": why + note}
    limit = losses.tuned + tolerance * gain
    for rank, loss in zip(losses.ranks, losses.truncated, strict=True):
        if loss <= limit:
            why = f"loss {loss:.4g}: base {losses.base:.4g}, whole fine-tune {losses.tuned:.4g}"
            return {**row, "rank": rank, "why": why + note}
    why = f"no rank up to {losses.ranks[-1]} gets within {100 * tolerance:g} % of the improvement"
    return {**row, "why": why + note}


def _bits_hint(bits: Bits | None, found: Sequence[Change]) -> dict[str, Any]:
    row = {"hint": "bits to store", "rank": None, "trust": "medium"}
    if bits is None:
        return {**row, "why": "pass bits=Bits(...) if the task stores a known number of bits"}
    room = sum(
        math.prod(c.svd.total.shape) * (fan_in(c.axes, c.shape) + fan_out(c.axes, c.shape))
        for c in found
    )
    why = f"{bits.bits:g} bits at {bits.per_parameter:g} a parameter, {room:,} parameters a rank"
    return {**row, "rank": bits_rank(bits, room), "why": why}


def _energy_hints(found: Sequence[Change]) -> list[dict[str, Any]]:
    every = [_ranks_of(change) for change in found]
    energy, above = _median(every, "energy_90"), _median(every, "gavish_donoho")
    why = "the median over modules; hardly tells tasks apart in full fine-tunes"
    why = _least(every) + why
    return [
        {"hint": "90 % of the energy", "rank": energy, "trust": "low", "why": why},
        {"hint": "above the noise", "rank": above, "trust": "low", "why": why},
    ]


def _gradient_hint(
    loss_fn: Callable[[Any, Any], Any],
    base: Any,
    found: Sequence[Change],
    batches: Sequence[Any],
    k: int,
) -> dict[str, Any]:
    gradients = _mean_gradient(loss_fn, base, [change.path for change in found], batches)
    every = [_ranks_of(_gradient_change(c, gradients[c.path], k)) for c in found]
    why = "the first gradient looks low-rank for any task: choose no rank by it"
    row = {"hint": "90 % of the gradient", "rank": _median(every, "energy_90")}
    return {**row, "trust": "very low", "why": _least(every) + why}


def _mean_gradient(
    loss_fn: Callable[[Any, Any], Any], base: Any, paths: Sequence[str], batches: Sequence[Any]
) -> dict[str, jax.Array]:
    flat = flatten(base)
    weights = {
        path: formed(leaf)
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if path in paths
    }

    @jax.jit
    @jax.grad
    def gradient(weights: dict[str, Any], batch: Any) -> Any:
        leaves = (weights.get(p, leaf) for p, leaf in zip(flat.paths, flat.leaves, strict=True))
        return loss_fn(unflatten(flat, leaves), batch)

    total = gradient(weights, batches[0])
    for batch in batches[1:]:
        total = jax.tree.map(jnp.add, total, gradient(weights, batch))
    return total


def _gradient_change(change: Change, gradient: jax.Array, k: int) -> Change:
    svd = delta_svd(None, gradient, change.axes, k)
    return change._replace(svd=svd, complete=k >= min(_matrix(change)))


def _ranks_of(change: Change) -> EffectiveRanks:
    s, total = np.asarray(change.svd.s), np.asarray(change.svd.total)
    return effective_ranks(s, total=None if change.complete else total, shape=_matrix(change))


def _matrix(change: Change) -> tuple[int, int]:
    return fan_in(change.axes, change.shape), fan_out(change.axes, change.shape)


def _median(every: Sequence[EffectiveRanks], name: str) -> int:
    values = np.concatenate([np.ravel(getattr(ranks, name)) for ranks in every])
    return math.ceil(np.median(values))


def _least(every: Sequence[EffectiveRanks]) -> str:
    """A cut spectrum gives a lower bound."""
    return "at least; " if any(ranks.truncated for ranks in every) else ""


def _loss_table(losses: Losses) -> Table:
    gain = losses.base - losses.tuned
    tried = list(zip(losses.ranks, losses.truncated, strict=True))
    named: list[tuple[str, int | None, float]] = [("base", 0, losses.base)]
    named += [("truncated", rank, loss) for rank, loss in tried]
    named += [("whole fine-tune", None, losses.tuned)]
    kept = [(losses.base - loss) / gain if gain else None for _, _, loss in named]
    return Table.of(
        {"tree": tree, "rank": rank, "loss": loss, "kept": share}
        for (tree, rank, loss), share in zip(named, kept, strict=True)
    )


def _checked(ranks: Sequence[int], tolerance: float, bits: Bits | None) -> tuple[int, ...]:
    found = tuple(int(rank) for rank in ranks)
    if not found or found[0] < 1 or any(a >= b for a, b in itertools.pairwise(found)):
        raise AdapterError(f"ranks must rise from at least 1, found {list(ranks)}.")
    if not 0 <= tolerance < 1:
        raise AdapterError(
            f"tolerance is a share of the improvement, in [0, 1), found {tolerance!r}."
        )
    if bits is not None:
        bits_rank(bits, 1)
    return found
