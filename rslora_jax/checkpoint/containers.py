"""Containers: nested dicts, lists and tuples as JSON, with their arrays apart."""

import base64
from collections.abc import Sequence
from typing import Any

import jax

from rslora_jax.paths import AdapterError

__all__ = ["decode", "encode"]


def encode(tree: Any, leaves: list[Any]) -> Any:
    """Containers and JSON values as JSON; every other leaf is appended to `leaves`.

    Args:
      tree: nested dicts, lists and tuples of None, numbers, strings, bytes and arrays; other
        pytrees are flattened, and come back in the structure of a `like`.
      leaves: where the arrays go; the JSON holds their places.

    Returns:
      The JSON value that `decode` reads.

    Example:
      >>> decode(encode({"epoch": 2, "state": (b"x", None)}, []), [])
      {'epoch': 2, 'state': (b'x', None)}
    """
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree) is bytes:
        return {"bytes": base64.b64encode(tree).decode()}
    if type(tree) is dict and all(type(key) in (str, int) for key in tree):
        return {"dict": [[key, encode(value, leaves)] for key, value in tree.items()]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [encode(value, leaves) for value in tree]}
    start = len(leaves)
    leaves.extend(jax.tree.leaves(tree))
    if leaves[start:] and leaves[start] is tree:
        return {"leaf": start}
    return {"tree": [type(tree).__name__, start, len(leaves)]}


def decode(value: Any, leaves: Sequence[Any], like: Any = None) -> Any:
    """Reads what `encode` wrote.

    Args:
      value: the JSON value.
      leaves: the arrays, in their places.
      like: a tree with the same custom pytree nodes, if there are any.

    Returns:
      The tree; dicts, lists and tuples are as they were saved, whatever `like` holds.

    Raises:
      AdapterError: if a custom pytree node has no counterpart in `like`.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "leaf":
        return leaves[content]
    if kind == "tree":
        return _rebuild(content[0], leaves[content[1] : content[2]], like)
    if kind == "dict":
        likes = like if isinstance(like, dict) else {}
        return {key: decode(inner, leaves, likes.get(key)) for key, inner in content}
    fits = isinstance(like, list | tuple) and len(like) == len(content)
    likes = like if fits else [None] * len(content)
    items = [decode(inner, leaves, each) for inner, each in zip(content, likes, strict=True)]
    return items if kind == "list" else tuple(items)


def _rebuild(name: str, leaves: Sequence[Any], like: Any) -> Any:
    treedef = jax.tree.structure(like)
    if type(like).__name__ != name or treedef.num_leaves != len(leaves):
        raise AdapterError(
            f"`data` was saved with a {name} of {len(leaves)} leaves, and `like` has {treedef} "
            "there. Give `like.data` the same structure."
        )
    return jax.tree.unflatten(treedef, leaves)
