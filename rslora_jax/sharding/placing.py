"""Placing: NamedShardings for a whole `LoraParams`, and arrays put where they say."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rslora_jax.factors import LoraParams, factors_of
from rslora_jax.meshes import devices_along
from rslora_jax.paths import AdapterError, flatten, unflatten
from rslora_jax.quantized import is_quantized, map_parts, part_spec
from rslora_jax.sharding.checks import Placing, check_placing
from rslora_jax.sharding.policies import DEFAULT, PolicyLike
from rslora_jax.sharding.sources import AxisRules, Source, base_specs
from rslora_jax.sharding.specs import specs
from rslora_jax.sites import Site

__all__ = ["mesh_of", "shard", "shardings"]


def shardings(
    mesh: Mesh | AbstractMesh | None,
    params: LoraParams,
    sites: Sequence[Site],
    source: Source = None,
    policy: PolicyLike = DEFAULT,
    *,
    rules: AxisRules | None = None,
) -> LoraParams:
    """The NamedShardings of the base and of the factors, in the structure of `params`.

    They serve as ``in_shardings`` and ``out_shardings`` of `jax.jit`, for `jax.device_put` and
    for Orbax, on meshes of Auto and of Explicit axes.

    Args:
      mesh: a Mesh, an AbstractMesh, or None for that of `jax.set_mesh`.
      params: base and factors, concrete or abstract.
      sites: the sites that `adapt` returned.
      source: where the base's specs come from, see `base_specs`; None reads ``params.base``.
      policy: what the factors take over from the weights, see `specs`.
      rules: logical axis rules, for sources with logical names.

    Returns:
      ``LoraParams(base, lora)`` of NamedShardings. A weight that lies in another memory than
      its device's default, such as ``pinned_host``, keeps it.

    Raises:
      AdapterError: as in `base_specs` and `specs`, where names and sizes of `mesh` do not fit a
        weight or a factor, and without a source if the base says nothing.

    Example:
      >>> import rslora_jax as rl
      >>> from jax.sharding import PartitionSpec
      >>> base = {"w": jax.ShapeDtypeStruct((4, 8), "float32")}
      >>> x, config = jax.ShapeDtypeStruct((1, 4), "float32"), rl.LoraConfig(rank=2, targets="w")
      >>> key = jax.random.key(0)
      >>> params, _, sites = rl.adapt(lambda p, x: x @ p["w"], base, x, config=config, key=key)
      >>> mesh = AbstractMesh((2, 2), ("fsdp", "tensor"))
      >>> found = shardings(mesh, params, sites, {"w": PartitionSpec("fsdp", "tensor")})
      >>> found.lora["w"]["a"].spec, found.lora["w"]["b"].spec
      (P('fsdp', None), P(None, 'tensor'))
    """
    mesh, params = mesh_of(mesh), _params(params)
    factors_of(params.lora, sites)
    base = _base(mesh, params.base, params.base if source is None else source, rules)
    if source is None:
        _check_told(mesh, params.base, base)
        source = params.base
    if not params.lora:
        return LoraParams(base, {})
    lora = specs(source, sites, policy, mesh=mesh, rules=rules)
    return LoraParams(base, jax.tree.map(lambda spec: NamedSharding(mesh, spec), lora))


def shard(
    params: LoraParams,
    mesh: Mesh | AbstractMesh | None,
    sites: Sequence[Site],
    source: Source = None,
    policy: PolicyLike = DEFAULT,
    *,
    rules: AxisRules | None = None,
) -> LoraParams:
    """Puts base and factors where `shardings` says.

    Nothing is donated: `params` stays usable, also after the result was donated to a step. Only
    what lies there already is handed on, not copied; donating that donates it in `params` too.
    Structs get the sharding attached, and nothing is computed.

    Args:
      params: base and factors, concrete or abstract.
      mesh: a Mesh (an AbstractMesh for structs), or None for that of `jax.set_mesh`.
      sites: the sites that `adapt` returned.
      source: where the base's specs come from, see `base_specs`; None reads ``params.base``,
        so that a base that is sharded already stays where it is.
      policy: what the factors take over from the weights, see `specs`.
      rules: logical axis rules, for sources with logical names.

    Returns:
      `LoraParams` with the same values.

    Raises:
      AdapterError: as in `shardings`.

    Example:
      >>> import rslora_jax as rl
      >>> from jax.sharding import PartitionSpec
      >>> site = rl.Site("w", "io", (4, 8), "float32", rank=2, alpha=1.0, scale=1.0)
      >>> def struct(*shape):
      ...     return jax.ShapeDtypeStruct(shape, "float32")
      >>> params = LoraParams({"w": struct(4, 8)}, {"w": {"a": struct(4, 2), "b": struct(2, 8)}})
      >>> mesh = AbstractMesh((2,), ("fsdp",))
      >>> shard(params, mesh, [site], [("w", PartitionSpec("fsdp"))]).lora["w"]["a"].sharding.spec
      P('fsdp', None)
    """
    places = shardings(mesh, params, sites, source, policy, rules=rules)
    return jax.tree.map(_put, params, places)


def mesh_of(mesh: Any) -> Mesh | AbstractMesh:
    """The mesh that was given, or else that of `jax.set_mesh`.

    Raises:
      AdapterError: if there is none, or it is no mesh.
    """
    found = jax.sharding.get_mesh() if mesh is None else mesh
    if not isinstance(found, Mesh | AbstractMesh):
        raise AdapterError(
            f"A mesh is a jax.sharding.Mesh or AbstractMesh, found {type(found).__name__}. Make "
            'one with jax.make_mesh((4, 2), ("fsdp", "tensor")).'
        )
    if mesh is None and found.empty:
        raise AdapterError(
            "There is no mesh: none was given, and none is set. Pass one, or call this within "
            "`with jax.set_mesh(mesh)`."
        )
    return found


def _base(mesh: Mesh | AbstractMesh, base: Any, source: Source, rules: Any) -> Any:
    flat = flatten(base)
    found = base_specs(source, base, rules=rules)
    places = []
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if path not in found:
            raise AdapterError(
                f"No pattern gives the base weight {path!r} a spec. Add a pair for it, such as "
                '(".*", PartitionSpec()) at the end of the list.'
            )
        places.append(_place_of(path, leaf, found[path], mesh))
    return unflatten(flat, places)


def _place_of(path: str, leaf: Any, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Any:
    """Where a leaf lies; of a quantized weight, where its integers and its scales do."""
    check_placing(Placing.of_weight(path, getattr(leaf, "shape", ()), spec), mesh)
    along = partial(devices_along, mesh)

    def place(part: Any) -> NamedSharding:
        own = part_spec(spec, part, leaf, along) if is_quantized(leaf) else spec
        return NamedSharding(mesh, own, memory_kind=_memory_kind(part))

    return map_parts(place, leaf) if is_quantized(leaf) else place(leaf)


def _check_told(mesh: Mesh | AbstractMesh, base: Any, places: Any) -> None:
    """A base that says nothing must not be taken for one that is whole on every device."""
    own = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(base))
    told = any(isinstance(sharding, NamedSharding) for sharding in own)
    if mesh.size > 1 and not told and not any(any(p.spec) for p in jax.tree.leaves(places)):
        raise AdapterError(
            "The base's shardings were to be read off the base, and no weight of it is on a mesh "
            "or names an axis. Pass a source, such as [(pattern, PartitionSpec), ...]; "
            '[(".*", PartitionSpec())] puts all of it on every device.'
        )


def _memory_kind(leaf: Any) -> str | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding.memory_kind if isinstance(sharding, NamedSharding) else None


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(sharding=sharding)
    return jax.device_put(leaf.copy() if _would_share(leaf, sharding) else leaf, sharding)


def _would_share(leaf: Any, sharding: NamedSharding) -> bool:
    """Whether JAX would use the leaf's own buffer as the copy on its device.

    Donating the copies would then delete `leaf`; ``device_put(..., may_alias=False)`` does not
    prevent it in JAX 0.10 and 0.12.
    """
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) > 1:
        return False
    there = leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return sharding.is_fully_replicated and not there


def _params(params: Any) -> LoraParams:
    if not isinstance(params, LoraParams):
        raise AdapterError(
            f"Shardings are made for the LoraParams that `adapt` returned, found "
            f"{type(params).__name__}."
        )
    return params
