"""States: the shardings of an optimizer's state, in which moments follow their factors."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError, flatten, nearest, unflatten

__all__ = ["optimizer_shardings"]

Place: TypeAlias = NamedSharding | PartitionSpec


class Followed(NamedTuple):
    """A parameter that moments may follow.

    Attributes:
      shape: its shape.
      place: where it lies; None if that was not said.
    """

    shape: tuple[int, ...]
    place: Place | None


def optimizer_shardings(
    tx: optax.GradientTransformation, lora: Any, lora_shardings: Any
) -> optax.OptState:
    """Where the state of an optimizer lies: moments as their factors, scalars everywhere.

    A leaf of the state belongs to a factor if its path ends in the factor's, as in every tree
    that Optax maps from the parameters: through `optax.chain`, `masked`, `partition`,
    `MultiSteps`, `inject_hyperparams`, `freeze_base`, `lora_plus` and `record_norms`. It has

    - the factor's sharding, if it has its shape;
    - the sharding without one axis, if it lacks that axis (the factored moments of Adafactor,
      Shazeer and Stern 2018, arXiv 1804.04235, whose rows lack the largest axis);
    - None for axes in front of the factor's (the histories of L-BFGS).

    Everything else is on every device: counts, hyperparameters, placeholders, records, and
    what a transform keeps in a structure of its own (`optax.flatten`).

    Args:
      tx: any Optax transform.
      lora: what `tx` is initialized with: ``params.lora``, or a whole `LoraParams`; concrete or
        abstract. Nothing is computed.
      lora_shardings: ``shardings(...).lora``, or the `LoraParams` of shardings; leaves may be
        bare PartitionSpecs.

    Returns:
      A tree like ``tx.init(lora)``, of NamedShardings (of PartitionSpecs, if such were given).

    Raises:
      AdapterError: if `tx` is no transform, the shardings do not fit the factors, or the state
        holds moments of the base and only the factors' shardings were given.

    Example:
      >>> import jax.numpy as jnp
      >>> lora = {"w": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 8))}}
      >>> places = {"w": {"a": PartitionSpec("fsdp", None), "b": PartitionSpec(None, "tensor")}}
      >>> adam, _, _ = optimizer_shardings(optax.adamw(1e-3), lora, places)
      >>> adam.mu["w"]["b"], adam.count
      (P(None, 'tensor'), P())
    """
    if not hasattr(tx, "init"):
        raise AdapterError(
            f"optimizer_shardings takes an Optax transform first, found {type(tx).__name__}."
        )
    structs = jax.tree.map(_struct, lora)
    followed = _followed(structs, lora_shardings)
    state = flatten(jax.eval_shape(tx.init, structs))
    everywhere = _with_spec(next(iter(jax.tree.leaves(lora_shardings))), ())
    places = (
        _place(path, leaf.shape, followed, everywhere)
        for path, leaf in zip(state.paths, state.leaves, strict=True)
    )
    return unflatten(state, places)


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jax.numpy.shape(leaf), jax.numpy.result_type(leaf))


def _followed(lora: Any, places: Any) -> dict[str, Followed]:
    """Every parameter by path; a factor also by its path within ``params.lora``."""
    if not isinstance(lora, LoraParams):
        return _pairs(lora, places.lora if isinstance(places, LoraParams) else places)
    if isinstance(places, LoraParams):
        known = _pairs(lora.base, places.base)
    else:
        flat = flatten(lora.base)
        leaves = zip(flat.paths, flat.leaves, strict=True)
        known = {path: Followed(leaf.shape, None) for path, leaf in leaves}
    factors = _followed(lora.lora, places)
    base = {f"base/{path}": one for path, one in known.items()}
    return {**base, **{f"lora/{path}": one for path, one in factors.items()}, **factors}


def _pairs(params: Any, places: Any) -> dict[str, Followed]:
    flat, found = flatten(params), flatten(places)
    by_path = dict(zip(found.paths, found.leaves, strict=True))
    unlike = sorted(set(flat.paths) ^ set(found.paths))
    if unlike:
        raise AdapterError(
            f"The shardings do not fit the parameters: {unlike[0]!r} is in one of them only "
            f"(nearest: {nearest(unlike[0], {*flat.paths, *found.paths} - {unlike[0]})}). Pass "
            "the tree that `shardings` made for these parameters."
        )
    return {
        path: Followed(leaf.shape, by_path[path])
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    }


def _place(
    path: str, shape: tuple[int, ...], followed: Mapping[str, Followed], everywhere: Place
) -> Place:
    parts = path.split("/")
    tails = ("/".join(parts[k:]) for k in range(len(parts)))  # the longest first
    one = next((followed[tail] for tail in tails if tail in followed), None)
    if one is None or not shape:
        return everywhere
    if one.place is None:
        raise AdapterError(
            f"The optimizer's state holds {path!r}, which belongs to the base, and only the "
            "factors' shardings were given. Use rl.optim.freeze_base(tx), so that it holds "
            "nothing for the base, or pass the whole LoraParams of `shardings`."
        )
    return _with_spec(one.place, _entries(parts, shape, one))


def _entries(parts: list[str], shape: tuple[int, ...], one: Followed) -> tuple[Any, ...]:
    spec = one.place.spec if isinstance(one.place, NamedSharding) else one.place
    full = (*(spec or ()), *[None] * (len(one.shape) - len(spec or ())))
    more = len(shape) - len(one.shape)
    if more >= 0 and shape[more:] == one.shape:
        return (*[None] * more, *full)
    lacks = [k for k in range(len(full)) if shape == _without(one.shape, k)]
    choices = {_without(full, k) for k in lacks}
    if len(choices) > 1:
        choices = {_without(full, k) for k in lacks if k == _factored_axis(parts, one.shape)}
    return next(iter(choices), ())


def _factored_axis(parts: Iterable[str], shape: tuple[int, ...]) -> int | None:
    """The axis that Optax's factored moment lacks, where several have its size.

    `scale_by_factored_rms` sorts the axes by size: ``v_row`` lacks the last, ``v_col`` the
    last but one.
    """
    order = np.argsort(shape)
    axes = {"v_row": int(order[-1]), "v_col": int(order[-2])}
    return next((axis for name, axis in axes.items() if name in parts), None)


def _without(values: tuple[Any, ...], k: int) -> tuple[Any, ...]:
    return values[:k] + values[k + 1 :]


def _with_spec(place: Place, entries: tuple[Any, ...]) -> Place:
    spec = PartitionSpec(*entries)
    if isinstance(place, NamedSharding):
        return NamedSharding(place.mesh, spec, memory_kind=place.memory_kind)
    return spec
