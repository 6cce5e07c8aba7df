"""A Llama and text to train it on: parameters that are made or loaded where they lie on a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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

    source = smollm.open_source()
    table = texts.windows(source.tokenizer.encode(texts.reference()).ids, example.shape[1])
    model = Llama(source.config, activations=ROWS, **options)
    return Task(model, source.structs, source.load, table)
