"""Model: a checkpoint with adapters on it, first as shapes alone, then where it is to lie."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from finetune.settings import Settings
from llama import SPECS, Llama, LlamaConfig

ROWS = P(("data", "fsdp"))  # how a batch, and what is computed of it, lies on the mesh


class Adapted(NamedTuple):
    """A Llama with adapters, as shapes.

    Attributes:
      model: the Llama.
      params: base (quantized, if that was asked for) and factors, `jax.ShapeDtypeStruct`s.
      apply: the adapted function.
      sites: what is adapted.
      config: how.
    """

    model: Llama
    params: rl.LoraParams
    apply: Callable[..., Any]
    sites: rl.Sites
    config: rl.LoraConfig


def dtype_of(settings: Settings) -> Any:
    """Of activations and of the weights that are not quantized; factors are float32."""
    return jnp.bfloat16 if settings.bfloat16 else jnp.float32


def rows_spec(settings: Settings) -> P:
    """How a batch lies on the mesh, micro batches one after the other."""
    return P(None, *ROWS) if settings.accumulation > 1 else ROWS


def adapt(settings: Settings, sizes: LlamaConfig, structs: Any) -> Adapted:
    """Puts adapters on a model of these sizes; nothing is computed and nothing is read.

    Args:
      settings: of the run.
      sizes: of the model.
      structs: its variables, abstract.
    """
    model = Llama(
        sizes,
        dtype=dtype_of(settings),
        remat=settings.remat,
        activations=ROWS,
        logits_bytes=settings.logits_mb * 2**20,
    )
    config = settings.lora_config()
    params, apply, sites = _adapted(model, structs, config, settings)
    if settings.quant_bits < 16:
        params, apply, sites = _adapted(
            model, _quantized(structs, sites, settings), config, settings
        )
    return Adapted(model, params, apply, sites, config)


def shardings(mesh: Mesh, adapted: Adapted) -> rl.LoraParams:
    """Where base and factors lie on a mesh."""
    return rl.sharding.shardings(mesh, adapted.params, adapted.sites, SPECS)


def load(settings: Settings, source: Any, adapted: Adapted, places: Any) -> Any:
    """The base, tensor by tensor to where it is to lie, quantized on the way."""
    if settings.quant_bits == 16:
        return source.load(places)
    known = {site.path: site for site in adapted.sites}

    def prepare(path: str, array: Any) -> Any:
        site = known.get(path)
        return array if site is None else _quantized_weight(site, array, settings)

    return source.load(places, prepare)


def _adapted(model: Llama, variables: Any, config: rl.LoraConfig, settings: Settings) -> rl.Adapted:
    example = jax.ShapeDtypeStruct((settings.batch, settings.length), jnp.int32)
    key = jax.random.key(settings.seed)
    return rl.adapt(model.apply, variables, example, config=config, key=key)


def _quantized(structs: Any, sites: rl.Sites, settings: Settings) -> Any:
    return rl.quantize.quantize(structs, sites, settings.quant_bits, format=_format(settings))


def _quantized_weight(site: rl.Site, array: Any, settings: Settings) -> Any:
    bits = settings.quant_bits
    return rl.quantize.quantize_weight(site, array, bits, format=_format(settings))


def _format(settings: Settings) -> str:
    return "int8" if settings.quant_bits == 8 else settings.quant_format
