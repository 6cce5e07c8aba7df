"""Merge: folds adapters into the weights, and takes them out again."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rslora_jax.factors import LoraParams, delta, factors_of
from rslora_jax.formats import formed
from rslora_jax.paths import AdapterError, flatten, unflatten
from rslora_jax.sites import Site

__all__ = ["merge", "unmerge"]


def merge(params: LoraParams, sites: Sequence[Site]) -> Any:
    """The base with W + scale * a @ b at every site: a plain tree for the original model.

    The sum is formed in float32 (float64 for a float64 weight) and cast once. Quantized weights
    come out in the dtype that they had.

    Args:
      params: base and factors.
      sites: the sites that `adapt` returned.

    Returns:
      A tree of the base's structure, container types and dtypes. `unmerge` is the inverse.

    Raises:
      AdapterError: if a merged weight is not finite, or the factors do not fit the sites.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (2, 2), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
      >>> merge(rl.LoraParams({"w": jnp.zeros((2, 2))}, lora), [site])["w"].tolist()
      [[2.0, 2.0], [2.0, 2.0]]
    """
    if not isinstance(params, LoraParams):
        raise AdapterError(
            f"merge takes the LoraParams that `adapt` returned, found {type(params).__name__}."
        )
    return _add(params.base, params.lora, sites, 1.0)


def unmerge(merged: Any, lora: Mapping[str, Any], sites: Sequence[Site]) -> LoraParams:
    """Takes the factors out of merged weights again, exact to rounding.

    Args:
      merged: the result of `merge`.
      lora: the factors that were merged.
      sites: their sites.

    Returns:
      `LoraParams(base, lora)`.

    Raises:
      AdapterError: for weights below float32, whose low bits the merge has rounded away
        (in bfloat16 about 10 % of the weights would not come back): keep the base instead.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (2, 2), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
      >>> unmerge({"w": jnp.full((2, 2), 3.0)}, lora, [site]).base["w"].tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    flat = dict(zip(*flatten(merged)[:2], strict=True))
    for site in sites:
        dtype = getattr(flat.get(site.path), "dtype", None)
        if dtype is not None and jnp.promote_types(dtype, jnp.float32) != dtype:
            raise AdapterError(
                f"{site.path!r} is {dtype}: the merge rounded its sum, and subtracting does not "
                "bring the base back. Keep the base tree beside the merged one instead."
            )
    return LoraParams(_add(merged, lora, sites, -1.0), dict(lora))


def _add(base: Any, lora: Mapping[str, Any], sites: Sequence[Site], sign: float) -> Any:
    flat = flatten(base)
    factors = factors_of(lora, sites)
    leaves = dict(zip(flat.paths, flat.leaves, strict=True))
    for site in sites if factors else ():
        weight = leaves.get(site.path)
        if getattr(weight, "shape", None) != site.shape:
            raise AdapterError(
                f"The site {site.path!r} needs a base weight of shape {site.shape}, found "
                f"{'none' if weight is None else weight.shape}. "
                "Pass the parameters that were adapted."
            )
        change = delta(site, factors[site.path])
        leaves[site.path] = _finite(site, _sum(formed(weight), change, sign))
    return unflatten(flat, (formed(leaves[path]) for path in flat.paths))


def _sum(weight: Any, change: jax.Array, sign: float) -> jax.Array:
    return (jnp.asarray(weight).astype(change.dtype) + sign * change).astype(
        jnp.asarray(weight).dtype
    )


def _finite(site: Site, merged: jax.Array) -> jax.Array:
    known = not isinstance(merged, Tracer)
    if known and not bool(jnp.isfinite(merged).all()):
        count = int((~jnp.isfinite(merged)).sum())
        raise AdapterError(
            f"Merging {site.path!r} gives {count} of {merged.size} values that are not finite in "
            f"{merged.dtype}. Look for NaN or infinity in its base and factors; an overflow "
            "needs a wider dtype for the base."
        )
    return merged
