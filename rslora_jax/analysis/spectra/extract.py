"""Extract: turns a full fine-tune into an adapter, the best one of its rank per module."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.analysis.spectra.effective_rank import energy_rank
from rslora_jax.analysis.spectra.pairs import Pair, pairs, unpaired
from rslora_jax.analysis.spectra.randomized import DeltaSvd, delta_svd
from rslora_jax.config import LoraConfig, Rule
from rslora_jax.factors import LoraParams
from rslora_jax.norms import Svd, factors_from, moved_norm
from rslora_jax.paths import AdapterError, insert
from rslora_jax.sites import Site, Sites
from rslora_jax.tables import Table
from rslora_jax.targets import choose

__all__ = ["Extracted", "extract"]


class Extracted(NamedTuple):
    """An adapter taken out of a full fine-tune.

    Attributes:
      params: base and factors: base + scale * a @ b approximates the tuned tree.
      sites: their sites; `merge(params, sites)` is the approximation.
      config: the config that gives these sites in `adapt`, so that training can go on.
      errors: one row a module: ``rank``, ``error`` = |tuned - base - scale * a @ b|_F over
        |tuned - base|_F with the factors as returned, so after their cast; ``energy`` =
        1 - error^2. A leaf that changed but has no adapter is a row of rank None: the
        adapter does not hold its change.
    """

    params: LoraParams
    sites: Sites
    config: LoraConfig
    errors: Table


def extract(
    base: Any,
    tuned: Any,
    sites: Sequence[Site] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    config: LoraConfig | None = None,
    max_rank: int | None = None,
) -> Extracted:
    """The adapter whose scale * a @ b is the best approximation of tuned - base.

    By the theorem of Eckart and Young (1936) that is the truncated SVD u s v^T of each
    module; a = u sqrt(s / scale) and b = sqrt(s / scale) v^T share it evenly. The SVD is
    randomized (`delta_svd`, 16 columns beyond the rank, 4 power iterations): exact to
    rounding for changes of that rank and for small modules, and elsewhere as good as
    `errors` says: the true errors of the adapter that is returned, with what the cast to
    ``config.dtype`` takes away (down to about 3e-4, what float32 resolves).

    Args:
      base: the tree before fine-tuning.
      tuned: the tree after: the same paths and shapes.
      sites: the weights and the roles of their axes, from `find_sites` or `adapt`. None
        takes every matrix, the last axis as output and the others as inputs.
      rank: of every adapter that no rule of the config changes; None takes the config's.
      energy: in place of a rank: the share of each module's |tuned - base|_F^2 that its
        adapter must hold before it is cast. Each site gets the smallest rank that does so,
        as a rule of the returned config.
      config: alpha, scaling, targets and dtype; None means the defaults.
      max_rank: with `energy`: no rank goes above it, and `errors` tells what is then lost.
        Without it, the SVD of each module is complete: O(inputs * outputs * side).

    Returns:
      `Extracted(params, sites, config, errors)`.

    Raises:
      AdapterError: if the trees, the sites or the config do not match; if not exactly one
        of rank, energy and config says how large the adapters are; if a weight is not
        finite.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> base, tuned = {"w": jnp.zeros((4, 4))}, {"w": jnp.diag(jnp.array([4.0, 3.0, 0, 0]))}
      >>> found = extract(base, tuned, rank=1)
      >>> rl.merge(found.params, found.sites)["w"].diagonal().round(3).tolist()
      [4.0, 0.0, 0.0, 0.0]
      >>> round(found.errors.column("energy")[0], 3)
      0.64
    """
    _check_size(rank, energy, config, max_rank)
    config = config or LoraConfig(rank=rank or 1)
    config = dataclasses.replace(config, rank=rank) if rank else config
    found = _sites_of(pairs(base, tuned, sites), sites)
    chosen = choose(found, config)
    ranks = {site.path: max_rank or min(_matrix(site)) if energy else site.rank for site in chosen}
    paired = pairs(base, tuned, chosen)
    svds = {p.path: _svd(p, ranks[p.path] or 1) for p in paired}
    if energy is not None:
        config = dataclasses.replace(config, rules=_rules(chosen, svds, energy))
        chosen = choose(found, config)
    lora: dict[str, Any] = {}
    for site in chosen:
        insert(lora, site.path, _cast(site, svds[site.path], config))
    rows = [row for site in chosen for row in _rows(site, svds[site.path], config)]
    missed = unpaired(base, tuned, paired)
    rows += [
        {"path": path, "norm": norm, "error": 1.0, "energy": 0.0} for path, norm in missed.items()
    ]
    return Extracted(LoraParams(base, lora), chosen, config, Table.of(rows))


def _cast(site: Site, svd: DeltaSvd, config: LoraConfig) -> dict[str, jax.Array]:
    dtype = config.dtype or jnp.promote_types(jnp.float32, site.dtype)
    return {name: x.astype(dtype) for name, x in _uncast(site, svd).items()}


def _uncast(site: Site, svd: DeltaSvd) -> dict[str, jax.Array]:
    return factors_from(site, Svd(svd.u, svd.s, svd.vt))


def _lost_by_cast(site: Site, svd: DeltaSvd, config: LoraConfig) -> np.ndarray:
    """|scale * (a @ b before the cast - a @ b after it)|_F per module [b..]."""
    before, after = _uncast(site, svd), _cast(site, svd, config)
    rounding = {name: after[name].astype(before[name].dtype) - before[name] for name in "ab"}
    return np.asarray(moved_norm(site, before, rounding))


def _svd(pair: Pair, k: int) -> DeltaSvd:
    svd = delta_svd(pair.base, pair.tuned, pair.axes, k, oversample=16, iterations=4)
    if not bool(jnp.isfinite(svd.total).all()):
        raise AdapterError(
            f"{pair.path!r}: the change is not finite. Look for NaN or infinity in the weights "
            "before and after."
        )
    return svd


def _rules(sites: Sites, svds: dict[str, DeltaSvd], energy: float) -> tuple[Rule, ...]:
    """The rank that every module of a stack needs, at least 1; each site keeps its alpha."""
    return tuple(
        Rule(re.escape(site.path), rank=_needed(svds[site.path], energy), alpha=site.alpha)
        for site in sites
    )


def _needed(svd: DeltaSvd, energy: float) -> int:
    needed = energy_rank(np.asarray(svd.s), energy, total=np.asarray(svd.total))
    return int(np.clip(np.max(needed), 1, svd.s.shape[-1]))


def _rows(site: Site, svd: DeltaSvd, config: LoraConfig) -> list[dict[str, Any]]:
    assert site.rank is not None
    kept, total = np.asarray(svd.s)[..., : site.rank], np.asarray(svd.total)
    lost = _lost_by_cast(site, svd, config)
    rows = []
    for index in np.ndindex(total.shape):
        square = total[index] ** 2 or 1.0
        cut = max(0.0, float((total[index] ** 2 - (kept[index] ** 2).sum()) / square))
        # To first order the cast moves the adapter at right angles to what was cut off.
        wrong = cut + float(lost[index] ** 2 / square)
        row = {"path": site.path, "module": ",".join(map(str, index)), "rank": site.rank}
        rows.append({**row, "norm": total[index], "error": wrong**0.5, "energy": 1 - wrong})
    return rows


def _sites_of(found: Sequence[Pair], sites: Sequence[Site] | None) -> Sites:
    if isinstance(sites, Sites):
        return sites
    if sites is not None:
        return Sites(sites)
    return Sites(
        Site(pair.path, pair.axes, jnp.shape(pair.base), jnp.result_type(pair.base).name)
        for pair in found
    )


def _matrix(site: Site) -> tuple[int, int]:
    return Pair(site.path, site.axes, jax.ShapeDtypeStruct(site.shape, "float32"), None).matrix


def _check_size(
    rank: int | None, energy: float | None, config: LoraConfig | None, max_rank: int | None
) -> None:
    sizes = (rank, energy, config)
    if (rank is not None and energy is not None) or sizes == (None, None, None):
        raise AdapterError(
            f"extract needs a rank or a share of the energy, found rank={rank}, energy={energy}, "
            f"config={config}. Give one of rank=..., energy=... (alone or with a config) or a "
            "config."
        )
    if energy is not None and not 0 < energy <= 1:
        raise AdapterError(f"energy is a share of |tuned - base|_F^2, in (0, 1], found {energy!r}.")
    if max_rank is not None and (energy is None or max_rank < 1):
        raise AdapterError(
            f"max_rank limits what energy=... asks for, and is at least 1; found max_rank="
            f"{max_rank}, energy={energy}."
        )
