"""Factors: how `a` and `b` start, what they add to a weight, and their product with inputs.

The only maths of the two matrices. A weight is never needed here: `delta` is
scale * a @ b in the weight's shape, `project` is scale * (x @ a) @ b without forming it.
"""

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rslora_jax.axes import RANK, delta_subscripts, factor_dims, factor_shapes, fan_in
from rslora_jax.config import LoraConfig
from rslora_jax.meshes import along
from rslora_jax.paths import AdapterError, insert, lookup
from rslora_jax.sites import Site

__all__ = [
    "TAPS",
    "Factor",
    "LoraParams",
    "contract",
    "delta",
    "factors_of",
    "init",
    "init_abstract",
    "labelled",
    "project",
]

TAPS = ("sums", "spectral")
"""What `taps` may put beside the factors of a site; no adapter that is kept holds them."""

PyTree: TypeAlias = Any
Labels: TypeAlias = tuple[int, ...]


class LoraParams(NamedTuple):
    """The frozen tree and the adapter tree, side by side.

    Attributes:
      base: the caller's parameter tree, untouched.
      lora: a nested dict with ``{"a": ..., "b": ...}`` at each adapted path; ``{}`` is no
        adapter at all.
    """

    base: PyTree
    lora: dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """A factor as a product sees it: one label for each of the array's axes.

    Attributes:
      array: the factor.
      labels: what each axis of the array is: an axis of the weight, or `axes.RANK`.
    """

    array: Any
    labels: Labels = dataclasses.field(metadata={"static": True})


def init(key: jax.Array, sites: Sequence[Site], config: LoraConfig) -> dict[str, Any]:
    """Random `a` and zero `b` for every site, each jit-compiled once per shape.

    The entries of `a` have a variance that does not depend on the rank, which theorem 3.2
    of Kalajdzievski 2023 (arXiv 2312.03732) asks for. Each site folds its own path into
    `key`, so that adding a site or a rule never changes another site's factors.

    Args:
      key: a typed PRNG key.
      sites: the sites, with ranks.
      config: gives `init` and `dtype`.

    Returns:
      A nested dict with ``{"a": [b.., i.., r], "b": [b.., r, o..]}`` at each path.

    Warns:
      UserWarning: if a user's initializer has a variance that depends on the rank, under
        rsLoRA: it cancels the rank stability that the scale is there for.
    """
    if callable(config.init) and config.scaling == "rslora":
        _warn_rank_dependent(config.init, sites[0])
    return _tree(sites, lambda site: _init_site(_fold(key, site.path), site, config))


def init_abstract(sites: Sequence[Site], config: LoraConfig) -> dict[str, Any]:
    """The result of `init` as `jax.ShapeDtypeStruct`s, without any computation."""

    def struct(site: Site) -> dict[str, Any]:
        dtype = _factor_dtype(site, config)
        shapes = zip("ab", site.factor_shapes, strict=True)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes}

    return _tree(sites, struct)


def factors_of(lora: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Reads the factors of every site, by path, and refuses what does not fit.

    Args:
      lora: the nested dict of a `LoraParams`.
      sites: the sites that it was made for.

    Returns:
      ``{path: {"a": ..., "b": ...}}``; empty when `lora` is empty.

    Raises:
      AdapterError: for unknown, missing or wrongly shaped factors, with their paths.
    """
    if not lora:
        return {}
    found = {site.path: lookup(lora, site.path) for site in sites}
    for site in sites:
        _check_site(site, found[site.path])
    _check_unknown(lora, sites)
    return found


def delta(site: Site, factors: Mapping[str, Any]) -> jax.Array:
    """scale * a @ b in the shape of the weight, in float32 (float64 for a float64 weight).

    Args:
      site: gives axes, rank and scale.
      factors: ``{"a": [b.., i.., r], "b": [b.., r, o..]}``.

    Returns:
      An array of ``site.shape``.
    """
    dtype = jnp.promote_types(jnp.float32, site.dtype)
    a, b = (jnp.asarray(factors[name]).astype(dtype) for name in "ab")
    place = along(range(len(site.axes)), labelled(site, {"a": a, "b": b}))
    how = {"precision": lax.Precision.HIGHEST, "out_sharding": place}
    return jnp.einsum(delta_subscripts(site.axes), a, b, **how) * jnp.asarray(site.scale, dtype)


def project(
    x: Factor,
    first: Factor,
    second: Factor,
    base: Factor,
    *,
    scale: float,
    left: bool,
    dot: Callable[..., jax.Array],
) -> Factor:
    """scale * (x . first) . second: two thin products in place of one with the weight.

    Args:
      x: the activation; axes that a product sums over carry the weight's labels.
      first: the factor that meets `x`.
      second: the factor that follows.
      base: the product with the weight, whose labels must survive. On a mesh the result
        lies as it does, and the rank-r activation as `x` does.
      scale: the site's scale, applied to the rank-r side.
      left: the weight stood on the left of the original product.
      dot: ``dot(lhs, rhs, dimension_numbers, out_sharding=...)``, with the original's
        precision and accumulation type.

    Returns:
      The product with its labels, in whatever order the products left them.
    """
    keep, out = {*base.labels, *second.labels}, {*base.labels}
    sides = (first, x) if left else (x, first)
    thin = contract(*sides, keep=keep, dot=dot, sides=(x, base, first))
    thin = Factor(_times(thin.array, scale), thin.labels)
    return contract(*((second, thin) if left else (thin, second)), keep=out, dot=dot, sides=(base,))


def contract(
    lhs: Factor,
    rhs: Factor,
    *,
    keep: set[int],
    dot: Callable[..., jax.Array],
    sides: Sequence[Factor] = (),
) -> Factor:
    """One `dot_general` over labelled axes: shared labels are summed unless in `keep`.

    On a mesh of Explicit axes the result lies along `sides`, the most important first.
    """
    lhs, rhs = _sum_lonely(lhs, rhs, keep), _sum_lonely(rhs, lhs, keep)
    shared = [n for n in lhs.labels if n in rhs.labels]
    batch = tuple(n for n in shared if n in keep)
    summed = tuple(n for n in shared if n not in keep)
    numbers = tuple(
        (tuple(map(lhs.labels.index, ns)), tuple(map(rhs.labels.index, ns)))
        for ns in (summed, batch)
    )
    free = [n for side in (lhs, rhs) for n in side.labels if n not in shared]
    labels = (*batch, *free)
    place = along(labels, sides)
    return Factor(dot(lhs.array, rhs.array, numbers, out_sharding=place), labels)


def _times(array: jax.Array, scale: float) -> jax.Array:
    wide = jnp.promote_types(array.dtype, jnp.float32)  # a scale rounded to bfloat16 is off
    return (array.astype(wide) * scale).astype(array.dtype)


def _sum_lonely(side: Factor, other: Factor, keep: set[int]) -> Factor:
    lonely = [k for k, n in enumerate(side.labels) if n not in keep and n not in other.labels]
    if not lonely:
        return side
    labels = tuple(n for k, n in enumerate(side.labels) if k not in lonely)
    return Factor(side.array.sum(tuple(lonely)), labels)


def _tree(sites: Sequence[Site], make: Callable[[Site], dict[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for site in sites:
        insert(tree, site.path, make(site))
    return tree


def _factor_dtype(site: Site, config: LoraConfig) -> Any:
    wide = jnp.promote_types(jnp.float32, site.dtype)
    return jnp.dtype(wide if config.dtype is None else config.dtype)


def _fold(key: jax.Array, path: str) -> jax.Array:
    digest = hashlib.sha256(path.encode()).digest()
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(word, "little"))
    return key


def _init_site(key: jax.Array, site: Site, config: LoraConfig) -> dict[str, Any]:
    a_shape, b_shape = site.factor_shapes
    dtype = _factor_dtype(site, config)
    bound = 1 / math.sqrt(fan_in(site.axes, site.shape))
    a = _draw(key, config.init, a_shape, dtype, bound)
    if a.shape != a_shape or a.dtype != dtype:
        raise AdapterError(
            f"LoraConfig.init was asked for {a_shape} of {dtype} at {site.path!r} and gave "
            f"{a.shape} of {a.dtype}. Return exactly the shape and dtype that are passed in."
        )
    return {"a": a, "b": jnp.zeros(b_shape, dtype)}


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw(key: jax.Array, init: Any, shape: tuple[int, ...], dtype: Any, bound: float) -> jax.Array:
    if not isinstance(init, str):
        return init(key, shape, dtype)
    if init == "normal":
        return bound * jax.random.normal(key, shape, dtype)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _warn_rank_dependent(init: Callable[..., Any], site: Site) -> None:
    shape = [
        1 if role == "b" else min(n, 256) for role, n in zip(site.axes, site.shape, strict=True)
    ]
    shapes = (factor_shapes(site.axes, shape, rank)[0] for rank in (16, 1024))
    with jax.ensure_compile_time_eval():  # also inside a jit
        key = jax.random.key(0)
        low, high = (float(jnp.var(init(key, shape, jnp.float32))) for shape in shapes)
    if low != high and not 0.5 * high < low < 2 * high:
        warnings.warn(
            f"LoraConfig.init draws entries of variance {low:.3g} at rank 16 and {high:.3g} at "
            "rank 1024. alpha/sqrt(r) is rank-stable only if the variance does not depend on "
            "the rank (arXiv 2312.03732, theorem 3.2): use 'kaiming', 'normal', or an "
            "initializer scaled by the fan-in alone.",
            stacklevel=4,
        )


def _check_site(site: Site, found: Any) -> None:
    if not isinstance(found, Mapping) or not _are_factors(set(found)):
        there = sorted(found) if isinstance(found, Mapping) else "nothing"
        raise AdapterError(
            f"The site {site.path!r} needs the factors ['a', 'b'], found {there}. Pass the lora "
            "tree that `adapt` returned for these sites, or {} for no adapter at all."
        )
    for name, shape in zip("ab", site.factor_shapes, strict=True):
        got = jnp.shape(found[name])
        if not _is_floating(found[name]):
            raise AdapterError(
                f"Factor {site.path + '/' + name!r} must be floating point, found "
                f"{jnp.result_type(found[name])}."
            )
        if got != shape:
            raise AdapterError(
                f"Factor {site.path + '/' + name!r} must have shape {shape} (rank {site.rank}, "
                f"axes {site.axes!r}), found {got}. Use the sites that these factors were made for."
            )


def _are_factors(names: set[str]) -> bool:
    return {"a", "b"} <= names <= {"a", "b", *TAPS}


def _is_floating(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _check_unknown(lora: Mapping[str, Any], sites: Sequence[Site]) -> None:
    known = {f"{site.path}/{name}" for site in sites for name in ("a", "b", *TAPS)}
    keyed = jax.tree_util.tree_flatten_with_path(lora)[0]
    paths = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in keyed]
    unknown = sorted(set(paths) - known)
    if unknown:
        raise AdapterError(
            f"The lora tree holds factors that no site knows: {unknown[:4]}. The sites are "
            f"{[site.path for site in sites][:8]}. Remove them, or use the sites they belong to."
        )


def labelled(site: Site, factors: Mapping[str, Any]) -> tuple[Factor, ...]:
    """The factors of a site and its taps, if any, labelled by the weight's axes."""
    a, b = factor_dims(site.axes)
    stacked = (*(k for k, role in enumerate(site.axes) if role == "b"), RANK)
    labels = {"a": a, "b": b, **dict.fromkeys(TAPS, stacked)}
    return tuple(Factor(factors[name], labels[name]) for name in labels if name in factors)
