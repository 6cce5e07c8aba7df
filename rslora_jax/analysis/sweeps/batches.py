"""Batches: the data of a sweep, one batch a step, checked and stacked before anything compiles."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.paths import AdapterError

__all__ = ["Batches", "batches_of"]


class Batches(NamedTuple):
    """The batches of a sweep.

    Attributes:
      steps: how many steps there are.
      stacked: a pytree whose leaves have a leading [steps] axis; None if one batch is used at
        each step.
      single: that batch; None if they are stacked.
    """

    steps: int
    stacked: Any
    single: Any

    @property
    def example(self) -> Any:
        """One batch, as `jax.ShapeDtypeStruct`s."""
        if self.stacked is None:
            return jax.tree.map(lambda leaf: _struct(leaf, 0), self.single)
        return jax.tree.map(lambda leaf: _struct(leaf, 1), self.stacked)


def batches_of(batches: Any, steps: int | None = None) -> Batches:
    """Reads the `batches` of a sweep.

    Args:
      batches: a list of batches, one a step; or a list with one batch, which is used at each
        of `steps` steps; or one pytree whose leaves have a leading [steps] axis.
      steps: how many steps to take; fewer than there are batches takes the first of them,
        None takes all.

    Raises:
      AdapterError: for batches of differing structures or shapes, naming the leaf; for an
        empty list; for more `steps` than batches.

    Example:
      >>> batches_of([np.ones(3), np.ones(3)]).stacked.shape
      (2, 3)
      >>> batches_of([np.ones(3)], steps=50).single.shape
      (3,)
    """
    _check_steps(steps)
    if isinstance(batches, list):
        return _of_list(batches, steps)
    keyed = jax.tree_util.tree_leaves_with_path(batches)
    counts = {_place(keys): np.shape(leaf)[:1] for keys, leaf in keyed}
    if not counts or len(set(counts.values())) > 1 or () in counts.values():
        raise AdapterError(
            f"The leaves of stacked batches need one leading axis of steps, found {counts}. "
            "Wrap a single batch in a list, [batch], to use it at each step."
        )
    (found,) = next(iter(counts.values()))
    steps = _agreed(found, steps)
    return Batches(steps, jax.tree.map(lambda leaf: leaf[:steps], batches), None)


def _of_list(batches: list[Any], steps: int | None) -> Batches:
    if not batches:
        raise AdapterError("The list of batches is empty. Give it one batch a step.")
    if len(batches) == 1:
        return Batches(steps or 1, None, batches[0])
    for number, batch in enumerate(batches):
        _check_alike(batches[0], batch, number)
    steps = _agreed(len(batches), steps)
    return Batches(steps, jax.tree.map(lambda *leaves: _stack(leaves), *batches[:steps]), None)


def _check_steps(steps: Any) -> None:
    if steps is not None and (not isinstance(steps, int | np.integer) or steps < 1):
        raise AdapterError(f"steps must be an int of at least 1, found {steps!r}.")


def _agreed(found: int, steps: int | None) -> int:
    if not found or (steps or 0) > found:
        raise AdapterError(
            f"steps is {steps}, but there are {found} batches. Take fewer steps, or wrap a "
            "single batch in a list, [batch], to use it at each step."
        )
    return steps or found


def _check_alike(first: Any, other: Any, number: int) -> None:
    if jax.tree.structure(first) != jax.tree.structure(other):
        raise AdapterError(
            f"Batch {number} has the structure {jax.tree.structure(other)}, batch 0 has "
            f"{jax.tree.structure(first)}. All batches must be alike."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(other), strict=True)
    for (keys, leaf), twin in pairs:
        shapes = [f"{np.shape(x)} {jnp.result_type(x)}" for x in (leaf, twin)]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"The leaf {_place(keys)!r} is {shapes[0]} in batch 0 and {shapes[1]} in batch "
                f"{number}. One compilation needs one shape: pad the batches, or drop the odd one."
            )


def _place(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/") or "batch"


def _stack(leaves: Sequence[Any]) -> Any:
    """With NumPy, which compiles nothing; PRNG keys are the exception."""
    if jnp.issubdtype(jnp.result_type(leaves[0]), jax.dtypes.prng_key):
        return jnp.stack(leaves)
    return np.stack([np.asarray(leaf) for leaf in leaves])


def _struct(leaf: Any, axes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf)[axes:], jnp.result_type(leaf))
