"""Paths: every leaf of a parameter pytree has one name, such as ``layers/q_proj/kernel``.

Boxes that carry metadata around a single array (``nn.Partitioned``, ``nnx.Param``) are
named by where the box sits, so a kernel has the same path in Linen, NNX and plain trees.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from rslora_jax.quantized import is_quantized

__all__ = ["AdapterError", "Flat", "flatten", "insert", "lookup", "nearest", "unflatten"]

PyTree: TypeAlias = Any


class AdapterError(ValueError):
    """What was asked, what was found, what to do; the root of this library's errors."""


class Flat(NamedTuple):
    """A pytree as parallel tuples of paths and leaves, and the way back.

    A quantized weight is one leaf.
    """

    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    treedef: Any


def flatten(tree: PyTree) -> Flat:
    """Names every leaf of `tree`.

    Args:
      tree: any pytree; boxes around one array count as that array.

    Returns:
      `Flat(paths, leaves, treedef)`, in the order of `jax.tree.leaves`.

    Raises:
      AdapterError: if two leaves would get the same path.

    Example:
      >>> flatten({"dense": {"kernel": 1.0, "bias": 2.0}}).paths
      ('dense/bias', 'dense/kernel')
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: _is_box(node) or is_quantized(node)
    )
    paths = tuple(path for keys, node in nodes for path in _leaf_paths(keys, node))
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_quantized)
    _refuse_duplicates(paths)
    return Flat(paths, tuple(leaves), treedef)


def unflatten(flat: Flat, leaves: Iterable[Any]) -> PyTree:
    """Rebuilds a tree of the type that `flatten` saw, with other leaves."""
    return jax.tree.unflatten(flat.treedef, list(leaves))


def insert(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Puts `value` at `path` of a nested dict, in place, and returns the dict."""
    *parents, last = path.split("/")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    return tree


def lookup(tree: Mapping[str, Any], path: str) -> Any:
    """Reads `path` in a nested mapping; None where it does not exist."""
    node: Any = tree
    for name in path.split("/"):
        if not isinstance(node, Mapping) or name not in node:
            return None
        node = node[name]
    return node


def nearest(path: str, known: Iterable[str], count: int = 3) -> str:
    """The most similar of the `known` paths, as text for an error message."""
    ranked = sorted(known, key=lambda other: -_likeness(path, other))
    return ", ".join(repr(other) for other in ranked[:count]) or "none at all"


def _likeness(path: str, other: str) -> float:
    tails = [other] + [other.split("/", n)[-1] for n in range(1, other.count("/") + 1)]
    return max(difflib.SequenceMatcher(None, path, tail).ratio() for tail in tails)


def _is_box(node: Any) -> bool:
    return isinstance(node, AxisMetadata | nnx.Variable)


def _leaf_paths(keys: tuple[Any, ...], node: Any) -> list[str]:
    if not _is_box(node):
        return [_join(keys)]
    inner = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_quantized)[0]
    if len(inner) == 1:
        return [_join(keys)]
    return [_join((*keys, *rest)) for rest, _ in inner]


def _join(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _refuse_duplicates(paths: tuple[str, ...]) -> None:
    if len(set(paths)) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise AdapterError(
            f"The parameter tree was flattened to paths, but {twice[0]!r} names more than one "
            "leaf. Rename one of the keys (a '/' inside a key can cause this)."
        )
