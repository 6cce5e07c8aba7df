"""Windows of real text in one global order, of which each process reads only its rows.

The order depends on the seed and the step alone: not on how many processes or devices read it.
"""

import textwrap
from collections.abc import Sequence
from pydoc_data.topics import topics

import jax
import numpy as np


def reference() -> str:
    """The language reference of Python itself, which every Python brings along."""
    return "\n\n".join(textwrap.dedent(topics[name]) for name in sorted(topics))


def as_bytes(text: str) -> list[int]:
    """One token a byte, from 0 to 255."""
    return list(text.encode())


def windows(tokens: Sequence[int], length: int) -> np.ndarray:
    """Consecutive windows of `length` tokens and the one after them: int32 [N, length + 1].

    Raises:
      ValueError: if there are too few tokens for one window.
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ValueError(f"length must be below the text's {len(tokens)} tokens, found {length}")
    starts = length * np.arange(count)[:, None]
    return np.asarray(tokens, np.int32)[starts + np.arange(length + 1)]


def order(step: int, count: int, batch: int, seed: int) -> np.ndarray:
    """Which of `count` windows a step reads, [batch]: pass after pass, each in a new order."""
    places = np.arange(step * batch, (step + 1) * batch)
    first, last = places[0] // count, places[-1] // count
    passes = [_shuffled(count, seed, number) for number in range(first, last + 1)]
    return np.stack(passes)[places // count - first, places % count]


def read(table: np.ndarray, rows: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Rows of the table as one global array, of which this process reads what its devices hold.

    Args:
      table: the windows, [N, width].
      rows: which of them, in the order of the global array, [batch].
      sharding: how the global array [batch, width] lies on the devices of all processes.

    Returns:
      The global array, [batch, width].
    """
    shape, places = (len(rows), table.shape[1]), np.arange(len(rows))
    indices = sharding.addressable_devices_indices_map(shape).values()
    mine = np.unique(np.concatenate([places[index[0]] for index in indices if index]))
    return jax.make_array_from_process_local_data(sharding, table[rows[mine]], shape)


def _shuffled(count: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(count)
