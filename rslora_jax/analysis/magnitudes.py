"""Magnitudes: what one step shows of one site, per module of its stack.

Each function gives a mapping from the name of a quantity to an array [b..].
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from rslora_jax import norms
from rslora_jax.decompositions import svd
from rslora_jax.meshes import automatic
from rslora_jax.sites import Site
from rslora_jax.taps import SUMS

__all__ = [
    "Quantities",
    "activations",
    "captured",
    "change",
    "gradients",
    "update",
]

Quantities: TypeAlias = dict[str, jax.Array]


def gradients(site: Site, grads: Mapping[str, Any], eps: Any) -> Quantities:
    """Norms of the factors' gradients, and the entries that Adam or anyone would lose."""
    found: Quantities = {}
    lost = jnp.zeros(norms.module_shape(site))
    for name, matrix in zip("ab", norms.matrices(site, grads), strict=True):
        square = (matrix**2).mean((-2, -1))
        size = matrix.shape[-2] * matrix.shape[-1]
        found[f"grad_{name}"] = jnp.sqrt(square * size)
        found[f"grad_{name}_rms"] = jnp.sqrt(square)
        found[f"below_eps_{name}"] = (jnp.abs(matrix) < eps).mean((-2, -1))
        lost += (~jnp.isfinite(matrix)).sum((-2, -1))
    return {**found, "nonfinite": lost}


def activations(taps: Mapping[str, jax.Array]) -> Quantities:
    """Moments of the adapter's input and output and of the gradients into them, from taps."""
    sums = {name: taps["sums"][..., k] for k, name in enumerate(SUMS)}
    moments = {
        f"{name}_{m}": sums[f"{name}_{m}"] / sums[f"{name}s"]
        for name in ("output", "input_grad")
        for m in (1, 2, 4)
    }
    rms = {
        "output_rms": jnp.sqrt(moments["output_2"]),
        "base_rms": jnp.sqrt(sums["base_2"] / sums["outputs"]),
        "output_ratio": jnp.sqrt(sums["output_2"] / sums["base_2"]),
        "output_cosine": sums["cross"] / jnp.sqrt(sums["output_2"] * sums["base_2"]),
        "output_grad_rms": jnp.sqrt(sums["output_grad_2"] / sums["output_grads"]),
        "input_rms": jnp.sqrt(sums["input_2"] / sums["inputs"]),
        "input_grad_rms": jnp.sqrt(moments["input_grad_2"]),
    }
    return {**moments, **rms, "intrinsic_dim": _intrinsic_dim(taps["spectral"])}


def _intrinsic_dim(spectral: jax.Array) -> jax.Array:
    """r* = tr S / |S| of the inputs' second moment S; NaN where no product showed it.

    Exact up to the power iteration for one use of a weight; for several the mean of theirs,
    weighted by their largest eigenvalues.
    """
    trace, top = spectral[..., 0], spectral[..., 1]
    return trace / jnp.where(top > 0, top, jnp.nan)


def change(site: Site, factors: Any, grads: Any, weight: Any) -> Quantities:
    """The change scale * a @ b of the weight so far, and how far it follows the gradient."""
    delta = norms.delta_norm(site, factors)
    return {
        "delta": delta,
        "delta_2": norms.factored_svd(site, factors).s[..., 0],
        "delta_ratio": delta / norms.weight_norm(site, weight),
        "signal": -norms.inner(site, factors, grads)["b"],
    }


def update(site: Site, factors: Any, grads: Any, updates: Any, weight: Any) -> Quantities:
    """The optimizer's own update, and the change of the loss that it predicts."""
    sizes, before = norms.factor_norm(site, updates), norms.factor_norm(site, factors)
    found = {f"update_{name}": sizes[name] for name in "ab"}
    # At b = 0 there is nothing to compare an update with.
    some = {name: jnp.where(size, size, jnp.nan) for name, size in before.items()}
    ratios = {f"update_ratio_{name}": sizes[name] / some[name] for name in "ab"}
    moved = norms.moved_norm(site, factors, updates) / norms.weight_norm(site, weight)
    inner = norms.inner(site, grads, updates)
    return {**found, **ratios, "update_ratio": moved, "predicted_change": inner["a"] + inner["b"]}


def captured(site: Site, factors: Any, grads: Any, weight_grad: Any) -> Quantities:
    """What of G a step of `a` and `b` can follow: |G|^2 - |(I - Pa) G (I - Pb)|^2, over |G|^2."""
    a, b = norms.matrices(site, factors)
    stack = norms.module_shape(site)
    order = [k for role in "bio" for k, axis in enumerate(site.axes) if axis == role]
    grad = jnp.transpose(weight_grad.astype(a.dtype), order)
    grad = grad.reshape(*stack, a.shape[-2], b.shape[-1])
    total = (grad**2).sum((-2, -1))
    rest = automatic(lambda g, a, b: _without(_without(g, a).mT, b.mT), grad, a, b)
    return {
        "weight_grad": jnp.sqrt(total),
        "signal_share": -norms.inner(site, factors, grads)["b"] / total,
        "captured": 1 - (rest**2).sum((-2, -1)) / total,
    }


def _without(matrix: jax.Array, columns: jax.Array) -> jax.Array:
    """`matrix` without its part in the span of `columns`, which may have any rank."""
    u, s, _ = svd(columns)
    u = u * (s > 1e-6 * s[..., :1])[..., None, :]
    dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return matrix - dot(u, dot(u.mT, matrix))
