"""Creation: factors and optimizer state that are sharded from their first byte on."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from rslora_jax.config import LoraConfig
from rslora_jax.factors import LoraParams, init, init_abstract
from rslora_jax.paths import AdapterError, flatten, lookup
from rslora_jax.sharding.checks import Placing, check_placing
from rslora_jax.sharding.placing import mesh_of
from rslora_jax.sharding.states import optimizer_shardings
from rslora_jax.sites import Site

__all__ = ["init_sharded", "initializer"]


def init_sharded(
    key: jax.Array,
    sites: Sequence[Site],
    config: LoraConfig,
    lora_shardings: Any,
    tx: optax.GradientTransformation | None = None,
) -> tuple[dict[str, Any], optax.OptState | None]:
    """Makes the factors, and the optimizer's state, where they are to lie.

    They come out of one compiled program with ``out_shardings``: each device computes its own
    part of every factor, and none ever holds a whole one that is split. The values are those
    that `adapt` makes with the same key, bit for bit, whatever the mesh. (This holds for JAX's
    default, threefry keys with ``jax_threefry_partitionable``. The values are the same for
    ``rbg`` keys, but every device draws all of their bits.)

    Args:
      key: a typed PRNG key.
      sites: the sites that `adapt` returned, say for abstract parameters.
      config: the config that `adapt` had.
      lora_shardings: ``shardings(...).lora``, or the result of `specs` under `jax.set_mesh`.
      tx: an Optax transform of the adapter tree, such as ``freeze_base(optax.adamw(1e-4))``.

    Returns:
      ``(lora, state)``: the adapter tree, and ``tx.init(lora)`` or None.

    Raises:
      AdapterError: if the shardings do not fit the sites.

    Example:
      >>> import rslora_jax as rl
      >>> site = rl.Site("w", "io", (4, 6), "float32", rank=2, alpha=1.0, scale=1.0)
      >>> mesh = jax.make_mesh((1,), ("fsdp",))
      >>> places = {"w": dict.fromkeys("ab", NamedSharding(mesh, PartitionSpec("fsdp", None)))}
      >>> config = rl.LoraConfig(rank=2)
      >>> lora, state = init_sharded(jax.random.key(0), [site], config, places, optax.adam(1.0))
      >>> lora["w"]["a"].sharding.spec, state[0].mu["w"]["a"].sharding.spec
      (P('fsdp', None), P('fsdp', None))
    """
    return initializer(sites, config, lora_shardings, tx)(_loose(key))


def initializer(
    sites: Sequence[Site],
    config: LoraConfig,
    lora_shardings: Any,
    tx: optax.GradientTransformation | None = None,
) -> Callable[..., Any]:
    """The jitted function of a key that `init_sharded` calls; lower it to see what it needs.

    Args:
      sites: as in `init_sharded`.
      config: as in `init_sharded`.
      lora_shardings: as in `init_sharded`.
      tx: as in `init_sharded`.

    Returns:
      A jitted function from a key, one that lies on no mesh, to ``(lora, state)``.
    """
    structs = init_abstract(sites, config)
    places = _fitting(sites, structs, lora_shardings)
    state_places = None if tx is None else optimizer_shardings(tx, structs, places)

    def make(key: jax.Array) -> tuple[Any, Any]:
        # Under a mesh of Explicit axes every draw would be a whole array, resharded afterwards.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            lora = init(key, sites, config)
            return lora, None if tx is None else tx.init(lora)

    return jax.jit(make, out_shardings=(places, state_places))


def _loose(key: jax.Array) -> jax.Array:
    """The key off its mesh or device: draws of a key on Explicit axes would be whole arrays."""
    data: Any = np.asarray(jax.random.key_data(key))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def _fitting(sites: Sequence[Site], structs: Any, places: Any) -> Any:
    places = places.lora if isinstance(places, LoraParams) else places
    if flatten(places).paths != flatten(structs).paths:
        unlike = sorted(set(flatten(places).paths) ^ set(flatten(structs).paths))
        raise AdapterError(
            f"The shardings do not fit the sites: {unlike[0]!r} is in one of them only. Pass the "
            "`lora` of what `shardings` made for these sites."
        )
    named = jax.tree.map(_named, places)
    for site in sites:
        pair = [lookup(named, site.path)[name] for name in "ab"]
        specs = [place.spec for place in pair]
        rows = Placing.of_factors(site.path, site.axes, site.factor_shapes, specs)
        for placing, place in zip(rows, pair, strict=True):
            check_placing(placing, place.mesh)
    return named


def _named(place: Any) -> NamedSharding:
    if isinstance(place, PartitionSpec):
        return NamedSharding(mesh_of(None), place)
    if isinstance(place, NamedSharding):
        return place
    raise AdapterError(f"Factors are placed by NamedShardings or PartitionSpecs, found {place!r}.")
