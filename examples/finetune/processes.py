"""Processes: what several of them decide alike, and what one of them needs whole."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def first_says(value: bool) -> bool:
    """The first process's value, in all of them; they ask in the same order."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def first_tells(numbers: Sequence[int]) -> list[int]:
    """The first process's numbers, in all of them, of 32 bits each."""
    if jax.process_count() == 1:
        return list(numbers)
    return multihost_utils.broadcast_one_to_all(np.asarray(numbers, np.int32)).tolist()


def whole(tree: Any) -> Any:
    """A tree that this process can read: gathered, if other processes hold parts of it."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)
