"""Pairs: each weight matrix before and after fine-tuning, with the roles of its axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rslora_jax.axes import fan_in, fan_out
from rslora_jax.factors import LoraParams
from rslora_jax.formats import formed
from rslora_jax.paths import AdapterError, flatten, nearest
from rslora_jax.sites import Site

__all__ = ["Pair", "pairs", "unpaired"]


class Pair(NamedTuple):
    """One weight before and after fine-tuning: a stack of matrices [inputs, outputs].

    Attributes:
      path: the weight's path.
      axes: one letter for each axis: ``b`` stacked, ``i`` input, ``o`` output.
      base: the weight before.
      tuned: the weight after, of the same shape.
    """

    path: str
    axes: str
    base: Any
    tuned: Any

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the b axes: one module for each index."""
        shape = jnp.shape(self.base)
        return tuple(n for axis, n in zip(self.axes, shape, strict=True) if axis == "b")

    @property
    def matrix(self) -> tuple[int, int]:
        """(inputs, outputs) of one module."""
        shape = jnp.shape(self.base)
        return fan_in(self.axes, shape), fan_out(self.axes, shape)


def pairs(base: Any, tuned: Any, sites: Sequence[Site] | None = None) -> tuple[Pair, ...]:
    """Pairs the matrices of two parameter trees of the same paths and shapes.

    Args:
      base: the tree before fine-tuning.
      tuned: the tree after.
      sites: give the roles of the axes (from `find_sites` or `adapt`), and choose the
        weights. None takes every floating leaf of two axes, as [inputs, outputs]; a tree with
        more axes anywhere (stacked layers, experts, attention heads) needs sites.

    Returns:
      The pairs, in the order of the sites, or of the tree.

    Raises:
      AdapterError: if the trees do not match, with the paths and both shapes; if a site
        does not fit them; if they hold no matrix, or a leaf of three or more axes and no
        sites are given.

    Example:
      >>> import jax.numpy as jnp
      >>> base, tuned = (
      ...     {"w": jnp.ones((4, 8)), "bias": jnp.ones(8)},
      ...     {"w": jnp.zeros((4, 8)), "bias": jnp.ones(8)},
      ... )
      >>> [(pair.path, pair.axes, pair.matrix) for pair in pairs(base, tuned)]
      [('w', 'io', (4, 8))]
    """
    before, after = _leaves(base, "base"), _leaves(tuned, "tuned")
    _check_match(before, after)
    roles = _axes_of(before) if sites is None else {s.path: _checked(s, before) for s in sites}
    if not roles:
        raise AdapterError(
            f"No matrix to compare: {'sites is empty' if sites is not None else 'the trees'} "
            f"hold{'s' if sites is not None else ''} no floating leaf of two or more axes "
            f"({len(before)} leaves: {_some(sorted(before))})."
        )
    return tuple(Pair(path, axes, before[path], after[path]) for path, axes in roles.items())


def unpaired(base: Any, tuned: Any, found: Sequence[Pair]) -> dict[str, float]:
    """How far every other leaf moved: ``{path: Frobenius norm of the change}``, movers only."""
    before, after = _leaves(base, "base"), _leaves(tuned, "tuned")
    rest = set(before) - {pair.path for pair in found}
    moved = {path: float(_distance(before[path], after[path])) for path in before if path in rest}
    return {path: distance for path, distance in moved.items() if distance != 0}


@jax.jit
def _distance(x: Any, y: Any) -> jax.Array:
    wide = jnp.promote_types(jnp.float32, jnp.result_type(x))
    return jnp.sqrt(((jnp.asarray(y).astype(wide) - jnp.asarray(x).astype(wide)) ** 2).sum())


def _leaves(tree: Any, name: str) -> dict[str, Any]:
    if isinstance(tree, LoraParams):
        raise AdapterError(
            f"{name} must be a plain parameter tree, found a LoraParams. Pass its base, "
            "merge(params, sites) for the adapted weights, or use `spectrum` for its factors."
        )
    flat = flatten(tree)
    return {path: formed(leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)}


def _check_match(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    faults = [f"{path!r} is only in base" for path in before if path not in after]
    faults += [f"{path!r} is only in tuned" for path in after if path not in before]
    for path in set(before) & set(after):
        shapes = jnp.shape(before[path]), jnp.shape(after[path])
        if shapes[0] != shapes[1]:
            faults.append(f"{path!r} has shape {shapes[0]} in base and {shapes[1]} in tuned")
    if faults:
        raise AdapterError(
            f"base and tuned must hold the same paths and shapes; {len(faults)} differ: "
            f"{_some(sorted(faults), '; ')}. Pass the two trees of one model."
        )


def _axes_of(leaves: Mapping[str, Any]) -> dict[str, str]:
    matrices = {
        path: jnp.shape(leaf)
        for path, leaf in leaves.items()
        if jnp.ndim(leaf) >= 2 and math.prod(jnp.shape(leaf)) and _is_floating(leaf)
    }
    for path, shape in matrices.items():
        if len(shape) > 2:
            raise AdapterError(
                f"{path!r} has shape {shape}: which of its axes are stacked, inputs or outputs "
                "cannot be read off it, and beside stacked layers even biases look like "
                "matrices. Pass sites=rl.find_sites(apply_fn, params, *args)."
            )
    return dict.fromkeys(matrices, "io")


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _checked(site: Site, leaves: Mapping[str, Any]) -> str:
    if site.path not in leaves:
        raise AdapterError(
            f"The site {site.path!r} is not in the trees. The nearest paths are "
            f"{nearest(site.path, leaves)}. Pass the sites of this model."
        )
    found = jnp.shape(leaves[site.path])
    if found != site.shape:
        raise AdapterError(
            f"The site {site.path!r} has shape {site.shape}, but the trees hold {found} there. "
            "Pass the sites of this model."
        )
    return site.axes


def _some(names: Sequence[str], gap: str = ", ", most: int = 6) -> str:
    more = f"{gap}and {len(names) - most} more" if len(names) > most else ""
    return gap.join(names[:most]) + more
