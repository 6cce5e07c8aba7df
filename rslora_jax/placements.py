"""Placements: the weight moves between devices and stays held.

A sharding constraint, a reshard or a gather over a mesh axis is applied to the base as the
program wrote it, and to the factors that own the axes. A factor is never asked to be cut where
the program cuts the weight: how factors lie is a policy of their own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rslora_jax.axes import RANK
from rslora_jax.deferred import typed
from rslora_jax.factors import Factor
from rslora_jax.flow import find_varying
from rslora_jax.meshes import along, entries
from rslora_jax.tracing import Cut, Held, Unsupported, Walk, bind

__all__ = ["PLACEMENTS", "cut_by_index", "enter", "shard_maps"]


def _constraint(walk: Walk, eqn: Any, held: Held) -> Held:
    """On Auto axes: where the weight is gathered, so are the factors."""
    sharding = eqn.params["sharding"]
    base = bind(eqn, [held.base])[0]
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit in sharding.mesh.axis_types:
        return replace(held, base=base)  # Explicit axes: it asserts where the weight lies
    spec = dict(enumerate(sharding.spec))

    def act(factor: Factor) -> Factor:
        free = [n == RANK or spec.get(n) is not None for n in factor.labels]
        wish = PartitionSpec(*(PartitionSpec.UNCONSTRAINED if f else None for f in free))
        place = NamedSharding(sharding.mesh, wish)
        return Factor(lax.with_sharding_constraint(factor.array, place), factor.labels)

    return replace(held, base=base, factors=tuple(map(act, held.factors)))


def _device_put(walk: Walk, eqn: Any, *operands: Any) -> list[Any]:
    """From the host's memory, say; the factors are where they are used."""
    bases = bind(eqn, [x.base if isinstance(x, Held) else x for x in operands])
    pairs = zip(operands, bases, strict=True)
    return [replace(x, base=base) if isinstance(x, Held) else base for x, base in pairs]


def _reshard(walk: Walk, eqn: Any, held: Held) -> Held:
    """On Explicit axes: each axis of a factor moves as the weight's own axis moves."""
    base, axes = bind(eqn, [held.base])[0], range(held.base.ndim)
    mesh = eqn.params["dst_sharding"].mesh
    before, after = (entries(typed(array), axes) for array in (held.base, base))
    moved = {n for n in axes if before.get(n) != after.get(n)}

    def act(factor: Factor) -> Factor:
        own = entries(factor.array, factor.labels)
        wish = {n: after.get(n, ()) if n in moved else own.get(n, ()) for n in factor.labels}
        place = NamedSharding(mesh, _spec(factor.labels, wish, _explicit(mesh)))
        if place == jax.typeof(factor.array).sharding:
            return factor
        params = {**eqn.params, "dst_sharding": place}
        return Factor(eqn.primitive.bind(factor.array, **params), factor.labels)

    return replace(held, base=base, factors=tuple(map(act, held.factors)))


def _explicit(mesh: Any) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit}


def _spec(
    labels: Sequence[int], wish: Mapping[int, Iterable[str]], names: set[str]
) -> PartitionSpec:
    """The mesh axes wished for, of those in `names`, none twice; the rank comes last."""
    left, spec = set(names), {}
    for label in sorted(labels, key=lambda n: n == RANK):
        spec[label] = tuple(name for name in wish[label] if name in left)
        left -= {*spec[label]}
    return PartitionSpec(*(spec[label] or None for label in labels))


def enter(eqn: Any, held: Held, spec: PartitionSpec) -> Held:
    """A weight on its way into a shard_map: which mesh axes cut it, and which factors.

    JAX wants operands on Explicit axes to lie as the specs say: each factor takes its own
    axes' part of the weight's.
    """
    cut = {n: (e,) if isinstance(e, str) else tuple(e) for n, e in enumerate(spec) if e}
    cuts = tuple(
        Cut(name, held.view[n], frozenset(k for k, f in enumerate(held.factors) if n in f.labels))
        for n, names in cut.items()
        for name in names
    )
    manual, everywhere = eqn.params["newly_manual_axes"], range(held.base.ndim)
    base = along(everywhere, (Factor(typed(held.base), tuple(everywhere)),))

    def act(factor: Factor) -> Factor:
        if base is None:
            return factor
        own = entries(factor.array, factor.labels)
        rest = {n: [name for name in names if name not in manual] for n, names in own.items()}
        wish = {n: (*cut.get(n, ()), *rest.get(n, ())) for n in factor.labels}
        place = NamedSharding(base.mesh, _spec(factor.labels, wish, _explicit(base.mesh)))
        return Factor(jax.sharding.reshard(factor.array, place), factor.labels)

    factors = tuple(map(act, held.factors))
    return replace(held, factors=factors, cuts=(*held.cuts, *cuts))


def cut_by_index(walk: Walk, eqn: Any, held: Held, axes: Iterable[int]) -> Held:
    """Inside a shard_map the part that an index picks may differ from device to device."""
    names = frozenset().union(*(_varying(walk, around, eqn) for around in shard_maps(walk)))
    picked = {*axes}
    owners = frozenset(k for k, f in enumerate(held.factors) if picked & {*f.labels})
    view = frozenset().union(*(held.view[n] for n in picked))
    return replace(held, cuts=(*held.cuts, *(Cut(name, view, owners) for name in sorted(names))))


def _varying(walk: Walk, around: Any, eqn: Any) -> frozenset[str]:
    """The mesh axes of a shard_map along which the indices of an equation may differ."""
    if id(around) not in walk.memo:
        walk.memo[id(around)] = find_varying(around)
    return walk.memo[id(around)].get(id(eqn), frozenset())


def shard_maps(walk: Walk) -> list[Any]:
    """The shard_maps around the present program, outermost first."""
    return [eqn for eqn in walk.callers if eqn.primitive.name == "shard_map"]


def _manual(walk: Walk) -> frozenset[str]:
    """The mesh axes that the shard_maps around the present program made manual."""
    return frozenset().union(*(eqn.params["newly_manual_axes"] for eqn in shard_maps(walk)))


def _all_gather(walk: Walk, eqn: Any, held: Held) -> Held:
    """The devices' blocks of a weight side by side, as in fully sharded data parallelism."""
    names = eqn.params["axis_name"]
    names = set(names) if isinstance(names, tuple) else {names}
    if eqn.params["axis_index_groups"] is not None:
        raise Unsupported("a gather within groups of devices")
    if not names <= _manual(walk):
        raise Unsupported("a gather over an axis that is bound outside of the function")
    cuts = [cut for cut in held.cuts if cut.name in names]
    rest = tuple(cut for cut in held.cuts if cut.name not in names)
    owners = frozenset[int]().union(*(cut.owners for cut in cuts))
    join = _tiled if eqn.params["tiled"] else _stacked
    origin = frozenset[int]().union(*(cut.view for cut in cuts))
    return replace(join(eqn, held, owners, origin), base=bind(eqn, [held.base])[0], cuts=rest)


def _tiled(eqn: Any, held: Held, owners: frozenset[int], origin: frozenset[int]) -> Held:
    """Blocks concatenated along an axis: whatever else differs between them would be lost."""
    axis = eqn.params["all_gather_dimension"]
    own = {k for k, factor in enumerate(held.factors) if axis in factor.labels}
    if not owners <= own:
        raise Unsupported(
            "a gather along one axis of blocks that were picked along another, with an index "
            "that may differ between the devices"
        )

    def act(k: int, factor: Factor) -> Factor:
        if k not in own:
            return factor
        place = factor.labels.index(axis)
        params = {**eqn.params, "all_gather_dimension": place}
        return Factor(eqn.primitive.bind(factor.array, **params), factor.labels)

    return replace(held, factors=tuple(act(k, f) for k, f in enumerate(held.factors)))


def _stacked(eqn: Any, held: Held, owners: frozenset[int], origin: frozenset[int]) -> Held:
    """Blocks stacked along a new axis, which belongs to the factors that the devices share out."""
    axis = eqn.params["all_gather_dimension"]

    def act(k: int, factor: Factor) -> Factor:
        labels = tuple(n + (n >= axis) for n in factor.labels)
        if k not in owners:
            return Factor(factor.array, labels)
        params = {**eqn.params, "all_gather_dimension": 0}
        return Factor(eqn.primitive.bind(factor.array, **params), (axis, *labels))

    view = (*held.view[:axis], origin, *held.view[axis:])
    return replace(held, factors=tuple(act(k, f) for k, f in enumerate(held.factors)), view=view)


PLACEMENTS: Mapping[str, Callable[..., Any]] = {
    "sharding_constraint": _constraint,
    "device_put": _device_put,
    "reshard": _reshard,
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
}
