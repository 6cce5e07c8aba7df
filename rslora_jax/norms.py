"""Norms: magnitudes of factors, of their gradients, and of the change scale * a @ b.

Everything is per module: a site with b axes is a stack of modules, and each result has the
shape [b..]. No array as large as the weight is ever formed. Sums are in float32 (float64
for float64 factors).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rslora_jax.decompositions import qr, svd
from rslora_jax.meshes import automatic
from rslora_jax.sites import Site

__all__ = [
    "Svd",
    "delta_norm",
    "factor_norm",
    "factored_svd",
    "factors_from",
    "inner",
    "matrices",
    "module_count",
    "module_shape",
    "moved_norm",
    "weight_norm",
]

Factors = Mapping[str, Any]
HIGHEST = lax.Precision.HIGHEST


class Svd(NamedTuple):
    """The singular value decomposition u @ diag(s) @ vt of scale * a @ b, per module.

    Attributes:
      u: left vectors [b.., inputs, k], k the least of inputs, outputs and rank.
      s: singular values [b.., k], falling.
      vt: right vectors [b.., k, outputs].
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array


def module_shape(site: Site) -> tuple[int, ...]:
    """The sizes of a site's b axes: one module for each index.

    Example:
      >>> import rslora_jax as rl
      >>> module_shape(rl.Site("layers/q", "bio", (12, 64, 48), "float32"))
      (12,)
    """
    return tuple(n for axis, n in zip(site.axes, site.shape, strict=True) if axis == "b")


def module_count(sites: Sequence[Site]) -> int:
    """How many modules (single matrices) the sites hold together."""
    return sum(math.prod(module_shape(site)) for site in sites)


def matrices(site: Site, factors: Factors) -> tuple[jax.Array, jax.Array]:
    """The factors as matrices a [b.., inputs, r] and b [b.., r, outputs], at least float32."""
    stack = module_shape(site)
    a, b = (jnp.asarray(factors[name]) for name in "ab")
    wide = jnp.promote_types(jnp.float32, jnp.promote_types(a.dtype, b.dtype))
    a = a.reshape(*stack, -1, a.shape[-1])
    return a.astype(wide), b.reshape(*stack, a.shape[-1], -1).astype(wide)


def factor_norm(site: Site, factors: Factors) -> dict[str, jax.Array]:
    """The Frobenius norms of `a` and `b` (or of their gradients): ``{"a": [b..], "b": [b..]}``.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (4, 9), "float32", rank=1, alpha=1.0, scale=1.0)
      >>> norms = factor_norm(site, {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 9))})
      >>> float(norms["a"]), float(norms["b"])
      (2.0, 3.0)
    """
    return {name: jnp.sqrt(value) for name, value in inner(site, factors, factors).items()}


def inner(site: Site, left: Factors, right: Factors) -> dict[str, jax.Array]:
    """The inner products of two pairs of factors: ``{"a": [b..], "b": [b..]}``.

    With a gradient on one side it gives first-order changes: <b, grad b> = <a, grad a> is
    the inner product of scale * a @ b with the gradient of the whole weight.
    """
    pairs = zip(matrices(site, left), matrices(site, right), strict=True)
    return {name: (x * y).sum((-2, -1)) for name, (x, y) in zip("ab", pairs, strict=True)}


def delta_norm(site: Site, factors: Factors) -> jax.Array:
    """The Frobenius norm of scale * a @ b per module [b..], from two r x r Gram matrices.

    |a b|_F^2 = sum((a^T a) o (b b^T)), o the entrywise product: O((inputs + outputs) r^2).

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (4, 9), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> float(delta_norm(site, {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 9))}))
      12.0
    """
    return _scale(site) * automatic(_product_norm, *matrices(site, factors))


def moved_norm(site: Site, factors: Factors, updates: Factors) -> jax.Array:
    """How far an update of the factors moves scale * a @ b: a Frobenius norm per module [b..].

    (a + u) (b + v) - a b = u b + (a + u) v, again a product, of rank 2 r: no difference of
    two large changes is taken.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (4, 9), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> factors = {"a": jnp.ones((4, 1)), "b": jnp.zeros((1, 9))}
      >>> float(moved_norm(site, factors, {"a": jnp.zeros((4, 1)), "b": jnp.ones((1, 9))}))
      12.0
    """
    (a, b), (u, v) = matrices(site, factors), matrices(site, updates)
    wide, tall = jnp.concatenate([u, a + u], -1), jnp.concatenate([b, v], -2)
    return _scale(site) * automatic(_product_norm, wide, tall)


def _product_norm(a: jax.Array, b: jax.Array) -> jax.Array:
    gram_a = jnp.einsum("...ir,...is->...rs", a, a, precision=HIGHEST)
    gram_b = jnp.einsum("...ro,...so->...rs", b, b, precision=HIGHEST)
    # Rounding can leave a tiny negative sum where a @ b vanishes.
    return jnp.sqrt(jnp.maximum((gram_a * gram_b).sum((-2, -1)), 0))


def factored_svd(site: Site, factors: Factors) -> Svd:
    """The singular value decomposition of scale * a @ b by two QRs and one small SVD.

    a = Qa Ra and b^T = Qb Rb, so that scale * a @ b = Qa (scale Ra Rb^T) Qb^T: exact, in
    O((inputs + outputs) r^2).

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (4, 9), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> svd = factored_svd(site, {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 9))})
      >>> [round(s, 3) for s in svd.s.tolist()]
      [12.0]
    """
    return Svd(*automatic(partial(_thin_svd, _scale(site)), *matrices(site, factors)))


def _thin_svd(scale: float, a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
    qa, ra = qr(a)
    qb, rb = qr(jnp.swapaxes(b, -2, -1))
    core = jnp.einsum("...ir,...jr->...ij", ra, rb, precision=HIGHEST) * scale
    u, s, vt = svd(core)
    left = jnp.matmul(qa, u, precision=HIGHEST)
    return left, s, jnp.matmul(vt, jnp.swapaxes(qb, -2, -1), precision=HIGHEST)


def factors_from(site: Site, svd: Svd) -> dict[str, jax.Array]:
    """The factors whose scale * a @ b is the first `site.rank` triplets of `svd`.

    a = u sqrt(s / scale) and b = sqrt(s / scale) v^T share it evenly. By the theorem of Eckart
    and Young (1936) no other factors of this rank come nearer to what was decomposed.

    Args:
      site: gives shape, rank and scale.
      svd: triplets u, s, vt; where there are fewer than the rank the rest is zero.

    Returns:
      ``{"a": [b.., i.., r], "b": [b.., r, o..]}`` in the dtype of `svd`.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (4, 9), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> svd = factored_svd(site, {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 9))})
      >>> factors = factors_from(site, svd)
      >>> (factors["a"] @ factors["b"])[0, 0].round(3).item()
      1.0
    """
    assert site.rank is not None
    k = min(site.rank, svd.s.shape[-1])
    root = jnp.sqrt(svd.s[..., :k] / _scale(site))
    a = svd.u[..., :k] * root[..., None, :]
    b = root[..., :, None] * svd.vt[..., :k, :]
    rest = site.rank - k
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, rest)])
    b = jnp.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, rest), (0, 0)])
    shapes = site.factor_shapes
    return {"a": a.reshape(shapes[0]), "b": b.reshape(shapes[1])}


def weight_norm(site: Site, weight: Any) -> jax.Array:
    """The Frobenius norm of the base weight per module: [b..]."""
    array = jnp.asarray(weight)
    array = array.astype(jnp.promote_types(jnp.float32, array.dtype))
    summed = tuple(k for k, axis in enumerate(site.axes) if axis != "b")
    return jnp.sqrt((array * array).sum(summed))


def _scale(site: Site) -> float:
    assert site.scale is not None
    return site.scale
