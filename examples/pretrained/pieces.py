"""Pieces: which tensor of a checkpoint is which part of the parameter tree."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama import Llama, LlamaConfig
from pretrained.errors import ModelError


class Piece(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      tensor: its name there.
      path: its leaf, such as "params/layers/mlp/up_proj/kernel".
      layer: its index along the leaf's first axis; None if it is the whole leaf.
      read: gives its numbers, [in, out] where it is a kernel.
    """

    tensor: str
    path: str
    layer: int | None
    read: Callable[[], np.ndarray]


class Tensors(NamedTuple):
    """The tensors of a checkpoint: what they are, and how to read one by its name."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def structs_of(config: LlamaConfig, dtype: DTypeLike) -> Any:
    """The variables of a Llama, abstract, in a dtype."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _traced(config))


@functools.cache
def _traced(config: LlamaConfig) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)


def match(
    structs: Any,
    tensors: Tensors,
    name_of: Callable[[str, int | None], str],
    optional: Callable[[str], bool] = lambda name: False,
) -> tuple[Piece, ...]:
    """Find a tensor for each part of the tree, and a part for each tensor.

    Args:
      structs: the tree.
      tensors: of the checkpoint.
      name_of: from a path, without "params/", and a layer to the name of a tensor.
      optional: names of tensors that are no part of the model.

    Raises:
      ModelError: a tensor is missing, left over, or of another shape.
    """
    pieces = []
    for path, layer, shape in _parts(structs):
        name = name_of(path.removeprefix("params/"), layer)
        turned = path.endswith("/kernel")
        _check(name, tensors.shapes, shape[::-1] if turned else shape)
        pieces.append(Piece(name, path, layer, _reader(tensors, name, turned)))
    known = {piece.tensor for piece in pieces}
    left = sorted(name for name in tensors.shapes if name not in known and not optional(name))
    if left:
        raise ModelError(f"tensors that this Llama does not have: {', '.join(left[:5])}")
    return tuple(pieces)


def _parts(structs: Any) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    for keys, leaf in jax.tree.leaves_with_path(structs):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path.startswith("params/layers/"):
            yield from ((path, layer, leaf.shape[1:]) for layer in range(leaf.shape[0]))
        else:
            yield path, None, leaf.shape


def _check(name: str, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...]) -> None:
    if name not in shapes:
        raise ModelError(f"the tensor {name!r} is missing")
    if shapes[name] != wanted:
        raise ModelError(
            f"the tensor {name!r} is {list(shapes[name])}; the model's sizes ask for {list(wanted)}"
        )


def _reader(tensors: Tensors, name: str, turned: bool) -> Callable[[], np.ndarray]:
    return lambda: tensors.read(name).T if turned else tensors.read(name)
