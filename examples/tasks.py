"""A Llama and text to train it on: parameters that are made or loaded where they lie on a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import texts
from llama import Llama, LlamaConfig

TINY = LlamaConfig(256, d_model=64, d_ff=128, layers=2, heads=4, kv_heads=2, head_dim=16)
ROWS = P(("data", "fsdp"))  # how a batch, and what is computed of it, lies on the mesh


class Task(NamedTuple):
    """What to train on.

    Attributes:
      model: the Llama.
      variables: its parameters, abstract.
      make: makes the parameters where these NamedShardings say.
      table: windows of text, int32 [N, length + 1].
    """

    model: Llama
    variables: Any
    make: Callable[[Any], Any]
    table: np.ndarray


def tiny(example: jax.ShapeDtypeStruct, seed: int, **options: Any) -> Task:
    """A random Llama that reads bytes.

    Args:
      example: a batch of tokens, [B, T].
      seed: of its parameters.
      **options: of `Llama`: dtype, remat.
    """
    model = Llama(TINY, activations=ROWS, **options)
    init = functools.partial(model.init, jax.random.key(seed))

    def make(places: Any) -> Any:
        return jax.jit(
            lambda: init(jnp.zeros(example.shape, example.dtype)), out_shardings=places
        )()

    table = texts.windows(texts.as_bytes(texts.reference()), example.shape[1])
    return Task(model, jax.eval_shape(init, example), make, table)


def smollm2(example: jax.ShapeDtypeStruct, **options: Any) -> Task:
    """SmolLM2-135M-Instruct; see `tiny` for the arguments.

    Raises:
      ValueError: if its package is not installed, or damaged.
    """
    import smollm  # noqa: PLC0415  (its reader is needed for this model only)

    try:
        sizes, variables, tokenizer = smollm.load()
    except smollm.ModelError as error:
        raise ValueError(str(error)) from error
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    table = texts.windows(tokenizer.encode(texts.reference()).ids, example.shape[1])
    model = Llama(sizes, activations=ROWS, **options)
    return Task(model, structs, functools.partial(place, variables), table)


def place(tree: Any, places: Any) -> Any:
    """Arrays of the host as global ones: each device gets its shard, and no device all of it."""

    def put(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, places)
