"""Truncation: the loss of the base plus the best rank-r part of what fine-tuning added."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rslora_jax.analysis.spectra.pairs import Pair, pairs
from rslora_jax.analysis.spectra.randomized import DeltaSvd, delta_svd
from rslora_jax.axes import delta_subscripts, factor_shapes
from rslora_jax.factors import LoraParams, factors_of
from rslora_jax.formats import formed
from rslora_jax.norms import factored_svd
from rslora_jax.paths import AdapterError, flatten, unflatten
from rslora_jax.sites import Site

__all__ = ["Change", "Losses", "changes", "check_batches", "truncated_losses"]


class Change(NamedTuple):
    """What fine-tuning added to one weight: its axes, shape and leading singular triplets.

    `complete` says that they are all there are: the others are zero, not unknown.
    """

    path: str
    axes: str
    shape: tuple[int, ...]
    svd: DeltaSvd
    complete: bool


class Losses(NamedTuple):
    """Mean losses over the batches.

    Attributes:
      base: of the base alone.
      tuned: of the whole fine-tune.
      ranks: the ranks that were tried.
      truncated: the loss at each of them [ranks].
    """

    base: float
    tuned: float
    ranks: tuple[int, ...]
    truncated: tuple[float, ...]


def changes(base: Any, tuned: Any, sites: Sequence[Site] | None, k: int) -> tuple[Change, ...]:
    """The first k singular triplets of every weight's change.

    Args:
      base: the tree before fine-tuning.
      tuned: the tree after, or a `LoraParams` (with `sites`), whose change is exact.
      sites: the roles of the axes; see `delta_spectrum`.
      k: how many triplets.

    Raises:
      AdapterError: if they do not match, or a weight is not finite.
    """
    found = _adapter_changes(tuned, sites) if isinstance(tuned, LoraParams) else None
    if found is None:
        found = tuple(_searched(pair, k) for pair in pairs(base, tuned, sites))
    for change in found:
        if not bool(jnp.isfinite(change.svd.total).all()):
            raise AdapterError(
                f"{change.path!r}: the change is not finite. Look for NaN or infinity in the "
                "weights before and after."
            )
    return found


def truncated_losses(
    loss_fn: Callable[[Any, Any], Any],
    base: Any,
    tuned: Any,
    found: Sequence[Change],
    batches: Sequence[Any],
    ranks: Sequence[int],
) -> Losses:
    """Evaluates base + (rank-r part of the change) for every rank, in one compilation.

    The rank is data: it masks singular values. Leaves without a spectrum keep the base's
    values, as they would under an adapter. Each evaluation forms the changed weights.

    Args:
      loss_fn: ``loss_fn(tree, batch) -> scalar`` of a plain parameter tree.
      base: the tree before fine-tuning.
      tuned: the tree after, or a `LoraParams`.
      found: from `changes`.
      batches: batches of equal shapes; the loss is their mean.
      ranks: the ranks to try.

    Returns:
      `Losses`; a loss that is not finite is kept as it is.

    Raises:
      AdapterError: if the batches differ in shape, or the loss is not a scalar.
    """
    check_batches(loss_fn, base, batches)
    svds = [change.svd for change in found]

    @jax.jit
    def evaluate(tree: Any, svds: list[DeltaSvd], rank: Any, batch: Any) -> Any:
        return loss_fn(_plus(tree, found, svds, rank), batch)

    def mean(tree: Any, rank: int) -> float:
        values = [evaluate(tree, svds, np.int32(rank), batch) for batch in batches]
        return float(np.mean([np.asarray(value, np.float64) for value in values]))

    whole = max(change.svd.s.shape[-1] for change in found)
    full = mean(base, whole) if isinstance(tuned, LoraParams) else mean(tuned, 0)
    cut = tuple(mean(base, rank) for rank in ranks)
    return Losses(mean(base, 0), full, tuple(ranks), cut)


def check_batches(loss_fn: Callable[[Any, Any], Any], base: Any, batches: Sequence[Any]) -> None:
    """Refuses no batches, batches of differing shapes, and a loss that is no scalar.

    Raises:
      AdapterError: with the number of the batch and both shapes.
    """
    if not len(batches):
        raise AdapterError("A loss was asked for without batches. Pass a list of them.")
    first, *rest = (
        [(jnp.shape(x), jnp.result_type(x).name) for x in jax.tree.leaves(b)] for b in batches
    )
    for number, shapes in enumerate(rest, 1):
        if shapes != first:
            raise AdapterError(
                f"Batches must have equal shapes and dtypes: batch 0 holds {first}, batch {number} "
                f"{shapes}. Pad the last one, or leave it out."
            )
    loss = jax.eval_shape(loss_fn, base, batches[0])
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape != ():
        raise AdapterError(
            f"loss_fn(tree, batch) must give one number, found {loss}. Take the mean over the "
            "batch, and drop auxiliary outputs."
        )


def _plus(tree: Any, found: Sequence[Change], svds: Sequence[DeltaSvd], rank: Any) -> Any:
    flat = flatten(tree)
    leaves = dict(zip(flat.paths, flat.leaves, strict=True))
    for change, svd in zip(found, svds, strict=True):
        weight = jnp.asarray(formed(leaves[change.path]))
        part = _part(change, svd, rank)
        leaves[change.path] = (weight.astype(part.dtype) + part).astype(weight.dtype)
    return unflatten(flat, leaves.values())


def _part(change: Change, svd: DeltaSvd, rank: Any) -> jax.Array:
    """The first `rank` terms of u s v^T in the weight's shape."""
    k = svd.s.shape[-1]
    kept = jnp.where(jnp.arange(k) < rank, svd.s, 0)
    shapes = factor_shapes(change.axes, change.shape, k)
    a = (svd.u * kept[..., None, :]).reshape(shapes[0])
    b = svd.vt.reshape(shapes[1])
    return jnp.einsum(delta_subscripts(change.axes), a, b, precision=lax.Precision.HIGHEST)


def _searched(pair: Pair, k: int) -> Change:
    svd = delta_svd(pair.base, pair.tuned, pair.axes, k, oversample=16, iterations=4)
    return Change(pair.path, pair.axes, jnp.shape(pair.base), svd, k >= min(pair.matrix))


def _adapter_changes(params: LoraParams, sites: Sequence[Site] | None) -> tuple[Change, ...]:
    factors = factors_of(params.lora, sites or ())
    if not factors or sites is None:
        raise AdapterError(
            "A LoraParams needs its factors and sites=... from the same `adapt`, which hold the "
            f"scale; found {len(factors)} adapters and {len(sites or ())} sites."
        )
    return tuple(_exact(site, factors[site.path]) for site in sites)


def _exact(site: Site, factors: Any) -> Change:
    u, s, vt = jax.jit(partial(factored_svd, site))(dict(factors))
    total = jnp.sqrt((s * s).sum(-1))
    return Change(site.path, site.axes, site.shape, DeltaSvd(u, s, vt, total, total * 0), True)
