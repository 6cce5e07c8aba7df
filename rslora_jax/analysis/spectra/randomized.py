"""Randomized SVD of what fine-tuning added to a weight, without forming the difference.

tuned - base is only ever applied to thin matrices, as tuned @ x - base @ x. What is formed
per weight: sketches [b.., inputs, k + oversample] and [b.., k + oversample, outputs] in
float32 (float64 for float64 weights). XLA may add a float32 copy of a narrower weight.
Sharded weights stay where they are: only sketches move between devices.
"""

import math
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rslora_jax.axes import delta_subscripts, fan_in, fan_out
from rslora_jax.decompositions import qr, svd
from rslora_jax.meshes import automatic
from rslora_jax.paths import AdapterError

__all__ = ["DeltaSvd", "delta_svd"]

Weights: TypeAlias = tuple[jax.Array, ...]
HIGHEST = lax.Precision.HIGHEST


class DeltaSvd(NamedTuple):
    """The first k singular triplets of tuned - base, per module.

    Attributes:
      u: left vectors [b.., inputs, k].
      s: singular values [b.., k], falling; never above the true ones but for rounding.
      vt: right vectors [b.., k, outputs].
      total: the Frobenius norm of the whole difference [b..], exact.
      residual: |D - Q Q^T D|_F / |D|_F [b..], D the difference and Q the range that was
        found (k + oversample columns): what the sketch did not see.
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array
    total: jax.Array
    residual: jax.Array


def delta_svd(
    base: Any,
    tuned: Any,
    axes: str,
    k: int,
    *,
    key: jax.Array | None = None,
    oversample: int = 8,
    iterations: int = 2,
) -> DeltaSvd:
    """The leading singular triplets of tuned - base by a randomized range finder.

    Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1: a Gaussian
    sketch, power iterations with a QR after each product, then a small exact SVD. It is
    exact to rounding if k + oversample reaches the smaller side of a module, or the
    difference has no higher rank than that. A flat spectrum is underestimated (by some
    10 % of the energy with the defaults): read `residual`, and raise `iterations`.

    `residual` is found from |D|_F^2 - |Q^T D|_F^2, which cannot resolve relative values
    below about 3e-4 in float32.

    Args:
      base: the weight before; None stands for zeros, which gives the SVD of `tuned` itself.
      tuned: the weight after, of the same shape.
      axes: one letter for each axis, ``b``, ``i`` or ``o``.
      k: how many triplets; cut to the smaller side of a module.
      key: a typed PRNG key for the sketch; None means ``jax.random.key(0)``.
      oversample: how many columns the sketch has beyond k.
      iterations: of the power method; each reads both weights twice.

    Returns:
      `DeltaSvd`.

    Raises:
      AdapterError: if k is below 1, or oversample or iterations below 0.

    Example:
      >>> import jax.numpy as jnp
      >>> found = delta_svd(jnp.eye(4), jnp.diag(jnp.array([4.0, 3.0, 1.0, 1.0])), "io", k=2)
      >>> found.s.round(4).tolist(), round(float(found.total), 4)
      ([3.0, 2.0], 3.6056)
    """
    if k < 1 or oversample < 0 or iterations < 0:
        raise AdapterError(
            "delta_svd needs k of at least 1, oversample and iterations of at least 0, found "
            f"k={k}, oversample={oversample}, iterations={iterations}."
        )
    key = jax.random.key(0) if key is None else key
    weights = tuple(jnp.asarray(x) for x in (tuned, base) if x is not None)
    most = min(fan_in(axes, weights[0].shape), fan_out(axes, weights[0].shape))
    # Cut outside the compiled part, so that small modules compile once for every k.
    found = _delta_svd(key, weights, axes, min(k + oversample, most), iterations)
    return found._replace(u=found.u[..., :k], s=found.s[..., :k], vt=found.vt[..., :k, :])


@partial(jax.jit, static_argnums=(2, 3))
def _delta_svd(
    key: jax.Array, weights: Weights, axes: str, width: int, iterations: Any
) -> DeltaSvd:
    return automatic(partial(_search, axes, width), key, weights, iterations)


def _search(axes: str, width: int, key: jax.Array, weights: Weights, iterations: Any) -> DeltaSvd:
    shape = weights[0].shape
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(*weights))
    stack = tuple(n for letter, n in zip(axes, shape, strict=True) if letter == "b")
    sketch = (*stack, width, fan_out(axes, shape))
    # Drawn flat: XLA takes ten times as long to compile the same draw in three dimensions.
    basis = jax.random.normal(key, (math.prod(sketch),), dtype).reshape(sketch)
    start = qr(_times(weights, axes, basis))[0]
    step = partial(_power_step, weights, axes)
    left = lax.fori_loop(0, iterations, lambda _, left: step(left), start)
    u, s, vt = _thin_svd(_transposed_times(weights, axes, left))
    total = _difference_norm(weights, axes, dtype)
    unseen = jnp.sqrt(jnp.maximum(total**2 - (s * s).sum(-1), 0))
    residual = jnp.where(total > 0, unseen / jnp.where(total > 0, total, 1), 0)
    return DeltaSvd(jnp.matmul(left, u, precision=HIGHEST), s, vt, total, residual)


def _power_step(weights: Weights, axes: str, left: jax.Array) -> jax.Array:
    right = qr(jnp.swapaxes(_transposed_times(weights, axes, left), -2, -1))[0]
    return qr(_times(weights, axes, jnp.swapaxes(right, -2, -1)))[0]


def _times(weights: Weights, axes: str, right: jax.Array) -> jax.Array:
    """difference @ right^T: [b.., width, outputs] -> [b.., inputs, width]."""
    shape = weights[0].shape
    stack = right.shape[:-1]
    right = right.reshape(*stack, *(n for a, n in zip(axes, shape, strict=True) if a == "o"))
    a, b, w = _letters(axes)
    parts = [
        jnp.einsum(f"{w},{b}->{a}", x.astype(right.dtype), right, precision=HIGHEST)
        for x in weights
    ]
    return _subtract(parts).reshape(*stack[:-1], fan_in(axes, shape), stack[-1])


def _transposed_times(weights: Weights, axes: str, left: jax.Array) -> jax.Array:
    """left^T @ difference: [b.., inputs, width] -> [b.., width, outputs]."""
    shape = weights[0].shape
    stack, width = left.shape[:-2], left.shape[-1]
    inputs = (n for a, n in zip(axes, shape, strict=True) if a == "i")
    left = left.reshape(*stack, *inputs, width)
    a, b, w = _letters(axes)
    parts = [
        jnp.einsum(f"{a},{w}->{b}", left, x.astype(left.dtype), precision=HIGHEST) for x in weights
    ]
    return _subtract(parts).reshape(*stack, width, fan_out(axes, shape))


def _letters(axes: str) -> tuple[str, str, str]:
    """The einsum letters of a [b.., i.., r], of b [b.., r, o..] and of the weight."""
    factors, weight = delta_subscripts(axes).split("->")
    a, b = factors.split(",")
    return a, b, weight


def _subtract(parts: list[jax.Array]) -> jax.Array:
    return parts[0] - parts[1] if len(parts) == 2 else parts[0]


def _thin_svd(wide: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The SVD of [b.., width, outputs] by a QR of its transpose and a width x width SVD."""
    q, r = qr(jnp.swapaxes(wide, -2, -1))
    u, s, vt = svd(jnp.swapaxes(r, -2, -1))
    return u, s, jnp.matmul(vt, jnp.swapaxes(q, -2, -1), precision=HIGHEST)


def _difference_norm(weights: Weights, axes: str, dtype: Any) -> jax.Array:
    change = _subtract([x.astype(dtype) for x in weights])
    summed = tuple(n for n, letter in enumerate(axes) if letter != "b")
    return jnp.sqrt((change * change).sum(summed))
