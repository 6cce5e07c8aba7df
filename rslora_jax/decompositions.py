"""Decompositions: QR, SVD and eigenvalues of stacks of matrices [b.., m, n], one at a time.

On a CPU, JAX's LAPACK kernels share the work on a stack among the threads of XLA's own pool
and wait for it there. Two of them at once can hold every thread of a small machine and wait
for ever (seen with jaxlib 0.10.2 and 0.12.0.1 and two threads). A stack that is gone through
matrix by matrix never waits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["eigh", "qr", "svd"]


def qr(stack: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The reduced factors q [b.., m, k] and r [b.., k, n], with k the smaller of m and n.

    Example:
      >>> q, r = qr(jnp.ones((2, 3, 1)))
      >>> q.shape, r.shape
      ((2, 3, 1), (2, 1, 1))
    """
    return _each(lambda matrix: tuple(jnp.linalg.qr(matrix)), stack)


def svd(stack: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The reduced u [b.., m, k], s [b.., k] (falling) and vt [b.., k, n].

    Example:
      >>> float(svd(2 * jnp.eye(3))[1][0])
      2.0
    """
    return _each(lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)), stack)


def eigh(stack: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The eigenvalues [b.., n] (rising) and eigenvectors [b.., n, n] of symmetric matrices.

    Example:
      >>> eigh(jnp.diag(jnp.array([3.0, 1.0])))[0].tolist()
      [1.0, 3.0]
    """
    return _each(lambda matrix: tuple(jnp.linalg.eigh(matrix)), stack)


def _each(function: Callable[[jax.Array], Any], stack: jax.Array) -> Any:
    outer = stack.shape[:-2]
    if not outer:
        return function(stack)
    results = jax.lax.map(function, stack.reshape(-1, *stack.shape[-2:]))
    return jax.tree.map(lambda found: found.reshape(*outer, *found.shape[1:]), results)
