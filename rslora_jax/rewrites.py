"""Rewrites: the table of what each primitive does with a held weight, read two ways.

With factors the rules rewrite the program; without factors they discover how it uses a
weight. One table for both, since two would drift apart.
"""

from collections.abc import Callable

from rslora_jax.control import CONTROL
from rslora_jax.moves import MOVES
from rslora_jax.placements import PLACEMENTS
from rslora_jax.products import PRODUCTS, whole
from rslora_jax.tracing import Walk

__all__ = ["new_walk"]


def new_walk(record: Callable[..., str] | None = None) -> Walk:
    """A walk with every rule; `record` hears of each use while discovering."""
    return Walk({**MOVES, **PLACEMENTS, **PRODUCTS}, CONTROL, whole, record)
