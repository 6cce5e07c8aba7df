"""Algebra: sums, differences, multiples, and other ranks and scalings of adapters.

Every result is an adapter again: factors, sites, and the config that gives these sites. A scale
that changes is folded into `b`, so that the function is what the operation says under
alpha/sqrt(r) and alpha/r alike. No array as large as a weight is formed.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rslora_jax.config import SCALINGS, LoraConfig, Scaling, alpha_of, scale
from rslora_jax.factors import factors_of, init
from rslora_jax.norms import factored_svd, factors_from, moved_norm
from rslora_jax.paths import AdapterError, insert, lookup
from rslora_jax.sites import Site, Sites
from rslora_jax.tables import Table
from rslora_jax.targets import config_of, scaling_of

__all__ = ["Combined", "combine", "convert", "resize", "scale_by", "subtract"]

Factors: TypeAlias = dict[str, jax.Array]
Weighted: TypeAlias = tuple[Mapping[str, Any], Sequence[Site], float]


class Combined(NamedTuple):
    """An adapter made from others.

    Attributes:
      lora: the factors, a nested dict as in `LoraParams`.
      sites: their sites; `attach(apply_fn, sites)` applies them.
      config: the config that gives these sites in `adapt`.
      errors: one row for each module whose rank was cut: ``rank``, ``norm`` = |D|_F of the exact
        result D, ``error`` = |D - scale * a @ b|_F / |D|_F. Empty where nothing was cut.
    """

    lora: dict[str, Any]
    sites: Sites
    config: LoraConfig
    errors: Table


def combine(adapters: Sequence[Weighted], *, rank: int | None = None) -> Combined:
    """The adapter whose change is the weighted sum of the changes of others.

    Factors are concatenated along the rank: exact, of rank r1 + r2 + ... at each site. With
    `rank`, each module is then cut to its best approximation (`resize`).

    Args:
      adapters: ``(lora, sites, weight)`` each; weights may be negative. An adapter without a
        site that another one has adds nothing there.
      rank: of every site of the result; None keeps the sum exact.

    Returns:
      `Combined(lora, sites, config, errors)`. Scales are those of the first adapter at each
      site, and alphas what gives them, under the first adapter's scaling: one adapter of weight
      1 comes back as it is, array for array.

    Raises:
      AdapterError: if there is none, if sites of one path differ in axes or shape, if factors
        do not fit their sites, or if a weight is not finite.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (2, 2), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
      >>> both = combine([(lora, [site], 1.0), (lora, [site], 0.5)])
      >>> both.sites[0].rank, both.sites[0].scale
      (2, 2.0)
      >>> base = {"w": jnp.zeros((2, 2))}
      >>> rl.merge(rl.LoraParams(base, both.lora), both.sites)["w"].tolist()
      [[3.0, 3.0], [3.0, 3.0]]
      >>> round(combine([(lora, [site], 1.0)] * 2, rank=1).errors.column("error")[0], 5)
      0.0
    """
    if not adapters:
        raise AdapterError("combine needs adapters, found none: pass [(lora, sites, weight), ...].")
    parts = _parts(adapters)
    scaling = scaling_of(adapters[0][1])
    made = {path: _concatenate(found, scaling) for path, found in parts.items()}
    summed = _assemble(made, [sites for _, sites, _ in adapters])
    return summed if rank is None else resize(summed.lora, summed.sites, rank)


def subtract(
    left: tuple[Mapping[str, Any], Sequence[Site]],
    right: tuple[Mapping[str, Any], Sequence[Site]],
    *,
    rank: int | None = None,
) -> Combined:
    """The adapter whose change is the left one's minus the right one's; see `combine`.

    Args:
      left: ``(lora, sites)``.
      right: ``(lora, sites)``.
      rank: of the result; None keeps the difference exact.

    Raises:
      AdapterError: as `combine`.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (2, 2), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
      >>> nothing = subtract((lora, [site]), (lora, [site]))
      >>> base = {"w": jnp.zeros((2, 2))}
      >>> rl.merge(rl.LoraParams(base, nothing.lora), nothing.sites)["w"].tolist()
      [[0.0, 0.0], [0.0, 0.0]]
    """
    return combine([(*left, 1.0), (*right, -1.0)], rank=rank)


def scale_by(lora: Mapping[str, Any], sites: Sequence[Site], factor: float) -> Combined:
    """The adapter whose change is `factor` times this one's: the factor goes into `b`.

    Args:
      lora: the factors.
      sites: their sites, which the result keeps.
      factor: any finite number; 1 gives the same arrays.

    Raises:
      AdapterError: if the factor is not finite, or the factors do not fit the sites.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (2, 2), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
      >>> scale_by(lora, [site], -0.5).lora["w"]["b"].tolist()
      [[-0.5, -0.5]]
    """
    return combine([(lora, sites, factor)])


def convert(lora: Mapping[str, Any], sites: Sequence[Site], scaling: Scaling) -> Combined:
    """The same adapter under another scaling rule: only its alphas change.

    Scale and factors stay, so the function, its gradients and further training with any
    optimizer stay too: alpha becomes scale * sqrt(r) (``"rslora"``) or scale * r (``"lora"``).

    Args:
      lora: the factors.
      sites: their sites.
      scaling: ``"rslora"`` or ``"lora"``.

    Raises:
      AdapterError: for another scaling, or if the factors do not fit the sites.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (2, 2), "float32", rank=4, alpha=2.0, scale=1.0)
      >>> lora = {"w": {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 2))}}
      >>> other = convert(lora, [site], "lora")
      >>> other.sites[0].alpha, other.sites[0].scale, other.config.scaling
      (4.0, 1.0, 'lora')
    """
    if scaling not in SCALINGS:
        raise AdapterError(f"scaling must be one of {SCALINGS}, found {scaling!r}.")
    made = {
        site.path: _fold(_with_rank(site, _rank(site), scaling), site, factors)
        for site, factors in _pairs(lora, sites)
    }
    return _assemble(made, [sites])


def resize(
    lora: Mapping[str, Any],
    sites: Sequence[Site],
    rank: int,
    *,
    key: jax.Array | None = None,
) -> Combined:
    """The adapter at another rank, with the same scales.

    Upwards the change is the same, exactly: `b` gets rows of zeros, and `a` gets new random
    columns as `adapt` would draw them, so that the new rank trains. Downwards it is the best
    approximation (Eckart and Young 1936) of each module's scale * a @ b, by `factored_svd`.

    Args:
      lora: the factors.
      sites: their sites.
      rank: of every site of the result.
      key: a typed PRNG key for new columns of `a`; None means ``jax.random.key(0)``.

    Returns:
      `Combined(lora, sites, config, errors)`. Alphas are what gives the old scale at the new
      rank. `errors` has a row for each module that was cut.

    Raises:
      AdapterError: if the rank is no int of at least 1, or the factors do not fit the sites.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (2, 2), "float32", rank=2, alpha=4.0, scale=4 / 2**0.5)
      >>> lora = {"w": {"a": jnp.diag(jnp.array([3.0, 4.0])), "b": jnp.eye(2)}}
      >>> one = resize(lora, [site], 1)
      >>> one.sites[0].alpha.__round__(4), one.errors.column("error")[0].__round__(4)
      (2.8284, 0.6)
      >>> wide = resize(lora, [site], 8)
      >>> bool(jnp.array_equal(wide.lora["w"]["a"][:, :2], lora["w"]["a"]))
      True
    """
    scaling, rows = scaling_of(sites), []
    made: dict[str, tuple[Site, Factors]] = {}
    fresh = jax.random.key(0) if key is None else key
    for site, factors in _pairs(lora, sites):
        target, found = _with_rank(site, rank, scaling), factors
        if rank < _rank(site):
            found, errors = _cut(target, site, factors)
            rows += errors
        elif rank > _rank(site):
            found = _grown(target, site, factors, fresh)
        made[site.path] = target, found
    return _assemble(made, [sites])._replace(errors=Table.of(rows))


def _parts(adapters: Sequence[Weighted]) -> dict[str, list[tuple[Site, Factors, float]]]:
    parts: dict[str, list[tuple[Site, Factors, float]]] = {}
    for entry in adapters:
        if not isinstance(entry, tuple | list) or len(entry) != 3:
            raise AdapterError(
                "combine takes (lora, sites, weight) of each adapter, found a "
                f"{type(entry).__name__} of another length."
            )
        lora, sites, weight = entry
        if not isinstance(weight, int | float | np.number) or not math.isfinite(weight):
            raise AdapterError(f"A weight of an adapter must be a finite number, found {weight!r}.")
        for site, factors in _pairs(lora, sites):
            parts.setdefault(site.path, []).append((site, factors, float(weight)))
    for path, found in parts.items():
        shapes = sorted({(site.axes, site.shape) for site, _, _ in found})
        if len(shapes) > 1:
            raise AdapterError(
                f"{path!r} has axes and shape {shapes[0]} in one adapter and {shapes[1]} in "
                "another. Combine adapters of one base model."
            )
    return parts


def _concatenate(
    found: Sequence[tuple[Site, Factors, float]], scaling: Scaling
) -> tuple[Site, Factors]:
    first = found[0][0]
    target = _with_rank(first, sum(_rank(site) for site, _, _ in found), scaling)
    folded = [_times(_fold(target, site, factors)[1], weight) for site, factors, weight in found]
    if len(folded) == 1:
        return target, folded[0]
    dtypes = [array.dtype for factors in folded for array in factors.values()]
    dtype, axis = jnp.result_type(*dtypes), {"a": -1, "b": first.axes.count("b")}
    joined = {
        name: jnp.concatenate([factors[name].astype(dtype) for factors in folded], axis[name])
        for name in "ab"
    }
    return target, joined


def _fold(target: Site, site: Site, factors: Factors) -> tuple[Site, Factors]:
    """The factors that do at the target's scale what they did at the site's."""
    assert target.scale is not None and site.scale is not None
    if math.isclose(target.scale, site.scale, rel_tol=1e-15):
        return target, factors
    return target, _times(factors, site.scale / target.scale)


def _times(factors: Factors, number: float) -> Factors:
    if number == 1:
        return factors
    b = factors["b"]
    wide = jnp.promote_types(b.dtype, jnp.float32)
    product = (b.astype(wide) * number).astype(b.dtype)
    if not isinstance(product, Tracer) and not bool(jnp.isfinite(product).all()):
        raise AdapterError(
            f"A factor b times {number:g} is not finite in {b.dtype}. Look for NaN or infinity in "
            "it, or cast the factors to float32 first."
        )
    return {**factors, "b": product}


def _cut(target: Site, site: Site, factors: Factors) -> tuple[Factors, list[dict[str, Any]]]:
    made, norms = _truncated(target, site, factors)
    total, lost = (np.asarray(norms[name]) for name in ("total", "lost"))
    rows = [
        {
            "path": site.path,
            "module": ",".join(map(str, index)),
            "rank": target.rank,
            "norm": float(total[index]),
            "error": float(lost[index] / (total[index] or 1.0)),
        }
        for index in np.ndindex(total.shape)
    ]
    return made, rows


@partial(jax.jit, static_argnums=(0, 1))
def _truncated(target: Site, site: Site, factors: Factors) -> tuple[Factors, dict[str, jax.Array]]:
    """The best factors of the target's rank; what was there and what is lost, per module."""
    svd = factored_svd(site, factors)
    exact = factors_from(target, svd)
    made = {name: exact[name].astype(factors[name].dtype) for name in "ab"}
    rounding = {name: made[name].astype(exact[name].dtype) - exact[name] for name in "ab"}
    # To first order the cast moves the adapter at right angles to what is cut off.
    squares, moved = svd.s**2, moved_norm(target, exact, rounding) ** 2
    lost = squares[..., _rank(target) :].sum(-1) + moved
    return made, {"total": jnp.sqrt(squares.sum(-1)), "lost": jnp.sqrt(lost)}


@partial(jax.jit, static_argnums=(0, 1))
def _grown(target: Site, site: Site, factors: Factors, key: jax.Array) -> Factors:
    old, new = _rank(site), _rank(target)
    config = LoraConfig(rank=new, dtype=factors["a"].dtype)
    drawn = lookup(init(key, [target], config), site.path)["a"].at[..., :old].set(0)
    return {
        # A sum, not a concatenation: the new columns follow the sharding of the old ones.
        "a": _padded(factors["a"], -1, new - old) + drawn,
        "b": _padded(factors["b"], site.axes.count("b"), new - old),
    }


def _padded(array: jax.Array, axis: int, more: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, more)
    return jnp.pad(array, widths)


def _pairs(lora: Mapping[str, Any], sites: Sequence[Site]) -> list[tuple[Site, Factors]]:
    found = factors_of(lora, sites)
    if not found:
        raise AdapterError(
            f"The lora tree is empty, and there are {len(sites)} sites. Pass the factors that "
            "belong to these sites."
        )
    pairs = [(site, found[site.path]) for site in sites]
    return [(site, {name: jnp.asarray(factors[name]) for name in "ab"}) for site, factors in pairs]


def _with_rank(site: Site, rank: int, scaling: Scaling) -> Site:
    """The site at another rank or scaling, with the same scale."""
    assert site.scale is not None
    if rank == site.rank and site.alpha is not None:
        if math.isclose(scale(site.alpha, rank, scaling), site.scale, rel_tol=1e-15):
            return site
    alpha = alpha_of(site.scale, rank, scaling)
    return dataclasses.replace(site, rank=rank, alpha=alpha, scale=scale(alpha, rank, scaling))


def _rank(site: Site) -> int:
    assert site.rank is not None  # `factors_of` has seen to it
    return site.rank


def _assemble(
    made: Mapping[str, tuple[Site, Factors]], given: Sequence[Sequence[Site]]
) -> Combined:
    """An adapter in the order of the sites of the first adapter, then of what others add."""
    order = list(dict.fromkeys(site.path for sites in given for site in sites))
    lora: dict[str, Any] = {}
    for path in order:
        insert(lora, path, made[path][1])
    known = next((sites for sites in given if isinstance(sites, Sites)), Sites())
    left = tuple(left for left in known.left if left.path not in made)
    sites = Sites((made[path][0] for path in order), left, known.total)
    return Combined(lora, sites, config_of(sites), Table.of([]))
