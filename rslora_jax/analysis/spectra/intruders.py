"""Intruders: leading singular vectors of a tuned weight that the base weight did not have."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rslora_jax.analysis.spectra.pairs import Pair, pairs
from rslora_jax.factors import LoraParams
from rslora_jax.merge import merge
from rslora_jax.meshes import automatic
from rslora_jax.paths import AdapterError
from rslora_jax.sites import Site
from rslora_jax.tables import Table

__all__ = ["Intruders", "chance_cosine", "intruders"]


class Intruders(NamedTuple):
    """Which leading directions of the tuned weights are new.

    Attributes:
      table: one row a module: ``intruders`` of the ``k`` leading vectors, their ``lowest``
        and ``median`` cosine, ``epsilon`` and the ``chance`` level beside them.
      cosines: per path, the largest |cos| of each leading vector with the base's
        vectors [b.., k] (NumPy), in the order of the singular values.
    """

    table: Table
    cosines: dict[str, np.ndarray]

    def __str__(self) -> str:
        return str(self.table)


def intruders(
    base: Any,
    tuned: Any,
    k: int = 10,
    epsilon: float = 0.5,
    *,
    sites: Sequence[Site] | None = None,
) -> Intruders:
    """Counts the intruder dimensions of Shuttleworth et al. 2024 (arXiv 2410.21228).

    A leading singular vector u_j of W + dW is an intruder if max_i |cos(u_j, u_i(W))| is
    below epsilon, over every singular vector of W. The paper's weights are [outputs,
    inputs] and its vectors the left ones: directions of the outputs, as they are here.

    Read the count against chance: a random direction of d outputs has a cosine of about
    sqrt(2 ln d / d) with the nearest of d vectors (`chance_cosine`), and vectors whose
    singular values nearly coincide turn into one another under any small change.

    Args:
      base: the tree before fine-tuning.
      tuned: the tree after, or the `LoraParams` that `adapt` returned (with `sites`), which
        is merged site by site.
      k: how many leading vectors of each module.
      epsilon: the largest cosine of an intruder.
      sites: the roles of the axes; see `delta_spectrum`.

    Returns:
      `Intruders(table, cosines)`. Each module costs two full SVDs, O(inputs * outputs *
      side), one module of a stack at a time.

    Raises:
      AdapterError: if the trees or sites do not match, or k or epsilon is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> base = jnp.diag(jnp.array([5.0, 4.0, 3.0, 2.0]))
      >>> new = jnp.outer(jnp.ones(4), jnp.ones(4)) * 5  # equally far from all four
      >>> intruders({"w": base}, {"w": base + new}, k=1, epsilon=0.6).table.column("intruders")
      [1]
    """
    if k < 1 or not 0 < epsilon <= 1:
        raise AdapterError(
            f"intruders needs k of at least 1 and epsilon in (0, 1], found k={k}, "
            f"epsilon={epsilon}."
        )
    if isinstance(tuned, LoraParams):
        _check_sites(sites)
        tuned = merge(tuned._replace(base=base), sites or ())
    found = pairs(base, tuned, sites)
    cosines = {pair.path: _cosines(pair, k) for pair in found}
    rows = [row for pair in found for row in _rows(pair, cosines[pair.path], epsilon)]
    return Intruders(Table.of(rows), cosines)


def chance_cosine(size: int, count: int | None = None) -> float:
    """The cosine of a random direction with the nearest of many others, by chance alone.

    A cosine of random directions is nearly normal with variance 1 / size, and the largest
    of `count` such numbers is about sqrt(2 ln count): an estimate from above, by 10 to 20 %
    for sizes of 100 to 10,000.

    Args:
      size: the dimension d of the space.
      count: how many directions there are to be near to; None means d.

    Returns:
      sqrt(2 ln count / d), at most 1.

    Example:
      >>> round(chance_cosine(768), 3)
      0.132
    """
    return min(1.0, math.sqrt(2 * math.log(max(count or size, 2)) / size))


def _cosines(pair: Pair, k: int) -> np.ndarray:
    found = np.asarray(_nearest(pair.base, pair.tuned, pair.axes, min(k, *pair.matrix)))
    if not np.isfinite(found).all():
        raise AdapterError(
            f"{pair.path!r}: the singular vectors are not finite. Look for NaN or infinity in "
            "the weights before and after."
        )
    return found


@partial(jax.jit, static_argnums=(2, 3))
def _nearest(base: Any, tuned: Any, axes: str, k: int) -> jax.Array:
    """The largest |cos| of each of the k leading output vectors: [b.., k]."""
    return automatic(partial(_compare, axes, k), base, tuned)


def _compare(axes: str, k: int, base: Any, tuned: Any) -> jax.Array:
    stack = tuple(n for letter, n in zip(axes, base.shape, strict=True) if letter == "b")
    modules = _as_matrices(base, axes), _as_matrices(tuned, axes)
    return lax.map(partial(_compare_module, k), modules).reshape(*stack, k)


def _compare_module(k: int, module: tuple[jax.Array, jax.Array]) -> jax.Array:
    before, after = (jnp.linalg.svd(x, full_matrices=False)[2] for x in module)
    cosines = jnp.matmul(after[:k], before.T, precision=lax.Precision.HIGHEST)
    return jnp.abs(cosines).max(-1)


def _as_matrices(weight: jax.Array, axes: str) -> jax.Array:
    """The weight as a list of modules [modules, inputs, outputs], at least float32."""
    order = [n for role in "bio" for n, letter in enumerate(axes) if letter == role]
    sizes = {role: 1 for role in "bio"}
    for letter, n in zip(axes, weight.shape, strict=True):
        sizes[letter] *= n
    wide = weight.astype(jnp.promote_types(jnp.float32, weight.dtype))
    return wide.transpose(order).reshape(tuple(sizes.values()))


def _rows(pair: Pair, cosines: np.ndarray, epsilon: float) -> list[dict[str, Any]]:
    chance = chance_cosine(pair.matrix[1], min(pair.matrix))
    return [
        {
            "path": pair.path,
            "module": ",".join(map(str, index)),
            "intruders": int((cosines[index] < epsilon).sum()),
            "k": cosines.shape[-1],
            "lowest": cosines[index].min(),
            "median": np.median(cosines[index]),
            "epsilon": epsilon,
            "chance": chance,
        }
        for index in np.ndindex(cosines.shape[:-1])
    ]


def _check_sites(sites: Sequence[Site] | None) -> None:
    if sites is None:
        raise AdapterError(
            "intruders got a LoraParams without sites. Pass sites=... from the same `adapt`, "
            "which hold the scale of its factors."
        )
