"""Errors: what quantization changes, in each weight and in what the model says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rslora_jax.adapt import attach
from rslora_jax.factors import LoraParams
from rslora_jax.formats import decode
from rslora_jax.paths import AdapterError, flatten, unflatten
from rslora_jax.quantized import Quantized, is_quantized
from rslora_jax.tables import Table

__all__ = ["error_table"]


def error_table(
    apply_fn: Callable[..., Any], params: Any, quantized: Any, *args: Any, **kwargs: Any
) -> Table:
    """How far each quantized weight is from the float one, and the outputs with it.

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``, the model's own function.
      params: the float tree.
      quantized: the same tree, quantized.
      *args: arguments of one call.
      **kwargs: keyword arguments of it.

    Returns:
      One row for each quantized weight, and one for all together (path ``"all"``): `format`,
      `bytes` with scales, `shrunk` (bytes over those of the float weight), `weight_error` (norm
      of the difference over the norm of the weight), `largest` (largest difference over the
      largest entry), `output_error` (norm of the change of the float outputs, if this weight
      alone is quantized, over their norm).

    Raises:
      AdapterError: if the trees do not fit, nothing is quantized, or the function has no
        floating-point output.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> params, x = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8)}, jnp.ones((1, 8))
      >>> model = lambda p, x: x @ p["w"]
      >>> small = rl.quantize.quantize(params, rl.find_sites(model, params, x))
      >>> [row["path"] for row in error_table(model, params, small, x).records()]
      ['w', 'all']
    """
    flat, other = flatten(params), flatten(quantized)
    if flat.paths != other.paths or not any(map(is_quantized, other.leaves)):
        raise AdapterError(
            "error_table compares a float tree with the same tree, quantized: found "
            f"{len(flat.paths)} and {len(other.paths)} parameters, of which "
            f"{sum(map(is_quantized, other.leaves))} quantized. Pass what `quantize` returned."
        )
    run = jax.jit(attach(lambda tree: _outputs(apply_fn(tree, *args, **kwargs)), []))
    right = run(LoraParams(params, {}))
    rows = []
    for k, (path, weight, small) in enumerate(
        zip(flat.paths, flat.leaves, other.leaves, strict=True)
    ):
        if is_quantized(small):
            wide = decode(small)  # one program serves all rows: only the numbers differ
            leaves = [*flat.leaves[:k], wide, *flat.leaves[k + 1 :]]
            found = run(LoraParams(unflatten(flat, leaves), {}))
            row = _row(path, weight, small, wide)
            rows.append({**row, "output_error": _distance(found, right)})
    found = run(LoraParams(quantized, {}))
    return Table.of([*rows, {**_total(rows), "output_error": _distance(found, right)}])


def _row(path: str, weight: Any, small: Quantized, found: jax.Array) -> dict[str, Any]:
    wide = jnp.asarray(weight, jnp.float32)
    gap = found.astype(jnp.float32) - wide
    bits = jnp.iinfo(small.values.dtype).bits
    held = small.size * bits // 8 + small.scales.size * small.scales.dtype.itemsize
    return {
        "path": path,
        "format": small.format,
        "bytes": held,
        "shrunk": held / (small.size * small.dtype.itemsize),
        "weight_error": float(jnp.linalg.norm(gap) / jnp.linalg.norm(wide)),
        "largest": float(jnp.abs(gap).max() / jnp.abs(wide).max()),
    }


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    held = sum(row["bytes"] for row in rows)
    return {
        "path": "all",
        "format": ", ".join(sorted({row["format"] for row in rows})),
        "bytes": held,
        "shrunk": held / sum(row["bytes"] / row["shrunk"] for row in rows),
        "weight_error": max(row["weight_error"] for row in rows),
        "largest": max(row["largest"] for row in rows),
    }


def _outputs(tree: Any) -> list[jax.Array]:
    found = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    if not found:
        raise AdapterError("error_table needs a function with a floating-point output, found none.")
    return [jnp.asarray(x, jnp.float32) for x in found]


def _distance(found: list[jax.Array], right: list[jax.Array]) -> float:
    gaps = sum(jnp.sum((a - b) ** 2) for a, b in zip(found, right, strict=True))
    return float(jnp.sqrt(gaps / sum(jnp.sum(b**2) for b in right)))
