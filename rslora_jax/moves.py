"""Moves: the weight is rearranged and stays held, one small rule per primitive.

A transpose, slice, reshape or cast is applied to the base as the program wrote it and, axis
by axis, to the factors that own the axes. Nothing is multiplied.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax

from rslora_jax.axes import RANK
from rslora_jax.factors import Factor
from rslora_jax.meshes import along, automatic
from rslora_jax.placements import cut_by_index
from rslora_jax.tracing import Held, Unsupported, Walk, bind, settle

__all__ = ["MOVES"]

Act: TypeAlias = Callable[[Factor], Factor]


def _move(held: Held, base: Any, view: Iterable[frozenset[int]], act: Act) -> Held:
    return replace(
        held, base=base, view=tuple(view), factors=tuple(act(factor) for factor in held.factors)
    )


def _one(eqn: Any, *operands: Any) -> Any:
    """The only result of an equation's primitive."""
    return bind(eqn, operands)[0]


def _same(walk: Walk, eqn: Any, held: Held) -> Held:
    """A name or a copy: nothing happens to the numbers."""
    return replace(held, base=_one(eqn, held.base))


def _cast(walk: Walk, eqn: Any, held: Held) -> Held:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unsupported(f"cast to {jnp.dtype(eqn.params['new_dtype']).name}")
    return replace(held, base=_one(eqn, held.base))


def _each(walk: Walk, eqn: Any, held: Held) -> Held:
    """The same primitive on the base and on both factors, whatever their shapes."""
    return _move(
        held,
        _one(eqn, held.base),
        held.view,
        lambda f: Factor(_one(eqn, f.array), f.labels),
    )


def _scaled(walk: Walk, eqn: Any, left: Any, right: Any) -> Held:
    """The weight times, or divided by, one number."""
    held, number = (left, right) if isinstance(left, Held) else (right, left)
    by_weight = eqn.primitive.name == "div" and held is right
    if isinstance(number, Held) or jnp.ndim(number) or by_weight:
        raise Unsupported("the other operand is no single number")
    base = _one(eqn, *((held.base, number) if held is left else (number, held.base)))
    factor = _inverse(number) if eqn.primitive.name == "div" else number
    return replace(held, base=base, factors=_times(held.factors, factor))


def _negated(walk: Walk, eqn: Any, held: Held) -> Held:
    return replace(held, base=_one(eqn, held.base), factors=_times(held.factors, -1.0))


def _inverse(number: Any) -> Any:
    return 1 / jnp.asarray(number, jnp.promote_types(jnp.result_type(number), jnp.float32))


def _times(factors: tuple[Factor, ...], number: Any) -> tuple[Factor, ...]:
    if not factors:
        return ()
    first, *rest = factors
    number = jnp.asarray(number).astype(first.array.dtype)
    return (Factor(first.array * number, first.labels), *rest)


def _transpose(walk: Walk, eqn: Any, held: Held) -> Held:
    order = eqn.params["permutation"]
    new = {old: k for k, old in enumerate(order)}
    return _move(held, _one(eqn, held.base), (held.view[k] for k in order), partial(_relabel, new))


def _relabel(new: Mapping[int, int], factor: Factor) -> Factor:
    return Factor(factor.array, tuple(n if n == RANK else new[n] for n in factor.labels))


def _squeeze(walk: Walk, eqn: Any, held: Held) -> Held:
    kept = [k for k in range(held.base.ndim) if k not in eqn.params["dimensions"]]
    new = {old: k for k, old in enumerate(kept)}
    return _move(
        held,
        _one(eqn, held.base),
        (held.view[k] for k in kept),
        lambda f: _relabel(new, _without(f, eqn.params["dimensions"])),
    )


def _without(factor: Factor, axes: Iterable[int]) -> Factor:
    """Drops axes of size one from a factor."""
    drop = tuple(k for k, n in enumerate(factor.labels) if n in set(axes))
    labels = tuple(n for k, n in enumerate(factor.labels) if k not in drop)
    return Factor(lax.squeeze(factor.array, drop), labels)


def _broadcast(walk: Walk, eqn: Any, held: Held, *dynamic: Any) -> Held:
    """New axes belong to no factor, and neither does an axis that grows from size one."""
    if dynamic:
        raise Unsupported("broadcast to a shape that is not static")
    places, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    grown = [k for k, place in enumerate(places) if held.base.shape[k] != shape[place]]
    view = [frozenset[int]()] * len(shape)
    for k, place in enumerate(places):
        view[place] = frozenset() if k in grown else held.view[k]
    new = dict(enumerate(places))
    return _move(held, _one(eqn, held.base), view, lambda f: _relabel(new, _without(f, grown)))


def _reshape(walk: Walk, eqn: Any, held: Held) -> Held:
    """Axes may merge and split as long as each group of them belongs to the same factors."""
    base = _one(eqn, held.base)
    groups = _groups(held.base.shape, base.shape)
    view = [frozenset[int]()] * base.ndim
    for old, new in groups:
        origin = frozenset().union(*(held.view[k] for k in old))
        for k in new:
            view[k] = origin
    grown = {k for k, origin in enumerate(held.view) if not origin}
    ones = ([k for k, n in enumerate(shape) if n == 1] for shape in (held.base.shape, base.shape))
    for old_one, new_one in zip(*ones, strict=False):
        view[new_one] = held.view[old_one]
    return _move(
        held, base, view, lambda f: _regroup(f, groups, held.base.shape, base.shape, grown)
    )


def _groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The finest split of a reshape into runs of axes with equal products, without ones."""
    olds = [k for k, n in enumerate(old) if n != 1]
    news = [k for k, n in enumerate(new) if n != 1]
    groups = []
    while olds:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (p := math.prod(old[k] for k in left)) != (q := math.prod(new[k] for k in right)):
            (left if p < q else right).append((olds if p < q else news).pop(0))
        groups.append((tuple(left), tuple(right)))
    return groups


def _regroup(
    factor: Factor,
    groups: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    old: Sequence[int],
    new: Sequence[int],
    grown: set[int],
) -> Factor:
    factor = _without(factor, [k for k, n in enumerate(old) if n == 1])
    owned = [(left, right) for left, right in groups if set(left) & set(factor.labels)]
    for k in (k for left, _ in owned for k in left if k not in factor.labels):
        if k not in grown:
            raise Unsupported("it merges an input axis with an output axis")
        factor = _repeat(factor, k, old[k])
    before = [k for left, _ in owned for k in left]
    after = [k for _, right in owned for k in right]
    array = jnp.transpose(factor.array, [factor.labels.index(k) for k in (*before, RANK)])
    return Factor(array.reshape(*(new[k] for k in after), array.shape[-1]), (*after, RANK))


def _repeat(factor: Factor, axis: int, size: int) -> Factor:
    """A repeated axis of the weight becomes an axis of the factor."""
    array = jnp.broadcast_to(factor.array, (size, *factor.array.shape))
    return Factor(array, (axis, *factor.labels))


def _slice(walk: Walk, eqn: Any, held: Held) -> Held:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)

    def act(factor: Factor) -> Factor:
        full = {RANK: (0, factor.array.shape[factor.labels.index(RANK)], 1)}
        full.update(enumerate(zip(start, limit, strides, strict=True)))
        bounds = zip(*(full[n] for n in factor.labels), strict=True)
        return Factor(lax.slice(factor.array, *bounds), factor.labels)

    return _move(held, _one(eqn, held.base), held.view, act)


def _dynamic_slice(walk: Walk, eqn: Any, held: Any, *starts: Any) -> Held:
    if any(isinstance(start, Held) for start in starts):
        raise Unsupported("used as an index")
    sizes = eqn.params["slice_sizes"]

    def act(factor: Factor) -> Factor:
        begin = [0 if n == RANK else starts[n] for n in factor.labels]
        begin = [jnp.asarray(s, jnp.result_type(starts[0])) for s in begin]
        size = [factor.array.shape[k] if n == RANK else sizes[n] for k, n in _places(factor)]
        return Factor(lax.dynamic_slice(factor.array, begin, size), factor.labels)

    full = held.base.shape
    moved = _move(held, _one(eqn, held.base, *starts), held.view, act)
    moved = replace(moved, rows=held.rows | _row_axes(held, sizes))
    return cut_by_index(walk, eqn, moved, [k for k, n in enumerate(sizes) if n != full[k]])


def _row_axes(held: Held, sizes: Sequence[int]) -> frozenset[int]:
    """The axes of a slice that is one row of a matrix, and not one matrix of a stack."""
    one = [k for k, n in enumerate(sizes) if n == 1 < held.base.shape[k]]
    if held.factors:
        one = [k for k in one if not all(k in factor.labels for factor in held.factors)]
    elif sum(n > 1 for n in sizes) > 1:
        one = []
    return frozenset().union(*(held.view[k] for k in one))


def _places(factor: Factor) -> Iterable[tuple[int, int]]:
    return enumerate(factor.labels)


def _split(walk: Walk, eqn: Any, held: Held) -> list[Held]:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]

    def act(factor: Factor, k: int) -> Factor:
        if axis not in factor.labels:
            return factor
        parts = lax.split(factor.array, sizes, factor.labels.index(axis))
        return Factor(parts[k], factor.labels)

    return [
        _move(held, base, held.view, partial(act, k=k))
        for k, base in enumerate(bind(eqn, [held.base]))
    ]


def _unstack(walk: Walk, eqn: Any, held: Held) -> list[Held]:
    axis = eqn.params["axis"]
    rows = _row_axes(held, [1 if k == axis else n for k, n in enumerate(held.base.shape)])
    new = {k: k - (k > axis) for k in range(held.base.ndim) if k != axis}

    def act(factor: Factor, k: int) -> Factor:
        if axis not in factor.labels:
            return _relabel(new, factor)
        at = factor.labels.index(axis)
        array = lax.index_in_dim(factor.array, k, at, keepdims=False)
        return _relabel(new, Factor(array, factor.labels[:at] + factor.labels[at + 1 :]))

    view = [held.view[k] for k in new]
    return [
        replace(_move(held, base, view, partial(act, k=k)), rows=held.rows | rows)
        for k, base in enumerate(bind(eqn, [held.base]))
    ]


def _reverse(walk: Walk, eqn: Any, held: Held) -> Held:
    def act(factor: Factor) -> Factor:
        places = [k for k, n in _places(factor) if n in eqn.params["dimensions"]]
        return Factor(lax.rev(factor.array, places), factor.labels)

    return _move(held, _one(eqn, held.base), held.view, act)


def _barrier(walk: Walk, eqn: Any, *operands: Any) -> list[Any]:
    return list(lax.optimization_barrier(operands))


def _gather(walk: Walk, eqn: Any, held: Any, indices: Any) -> Any:
    """Rows picked along one axis: an embedding lookup, or experts chosen per token."""
    if isinstance(indices, Held):
        raise Unsupported("used as an index")
    axis, places = _gathered(eqn, held.base.ndim)
    base = _one(eqn, held.base, indices)
    kept = [k for k in range(held.base.ndim) if k != axis]
    new = dict(zip(kept, eqn.params["dimension_numbers"].offset_dims, strict=True))
    view = [held.view[axis]] * base.ndim
    for old, place in new.items():
        view[place] = held.view[old]
    rows = partial(_pick, eqn=eqn, indices=indices, axis=axis, places=places, new=new)
    cuts = cut_by_index(walk, eqn, held, [axis]).cuts
    moved = replace(_move(held, base, view, rows), cuts=cuts)
    if walk.discovering:
        return _picked(walk, eqn, held, moved, axis)
    if all(axis in factor.labels for factor in held.factors):
        return moved
    return settle(walk, eqn, replace(moved, rows=held.view[axis]), kind="lookup")


def _gathered(eqn: Any, ndim: int) -> tuple[int, tuple[int, ...]]:
    """The one axis that the indices run over, and where the rows' own axes go."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    [axis] = numbers.start_index_map if len(numbers.start_index_map) == 1 else [None]
    plain = numbers.collapsed_slice_dims == (axis,) and not numbers.operand_batching_dims
    whole_rows = all(k == axis or n == eqn.invars[0].aval.shape[k] for k, n in enumerate(sizes))
    if axis is None or not plain or not whole_rows:
        raise Unsupported("a gather of anything but whole rows along one axis")
    out = len(eqn.outvars[0].aval.shape)
    return axis, tuple(k for k in range(out) if k not in numbers.offset_dims)


def _pick(
    factor: Factor,
    *,
    eqn: Any,
    indices: Any,
    axis: int,
    places: tuple[int, ...],
    new: Mapping[int, int],
) -> Factor:
    if axis not in factor.labels:
        return _relabel(new, factor)
    at = factor.labels.index(axis)
    kept = [k for k in range(factor.array.ndim) if k != at]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(len(places), len(places) + len(kept))),
        collapsed_slice_dims=(at,),
        start_index_map=(at,),
    )
    sizes = [1 if k == at else n for k, n in enumerate(factor.array.shape)]
    names = ("unique_indices", "indices_are_sorted", "mode", "fill_value")
    options = {name: eqn.params[name] for name in names}
    rest = [factor.labels[k] for k in kept]
    labels = (*places, *(n if n == RANK else new[n] for n in rest))
    gather = partial(lax.gather, dimension_numbers=numbers, slice_sizes=sizes, **options)
    place = along(labels, _beside(factor, indices, places, new, axis))
    return Factor(automatic(gather, factor.array, indices, out=place), labels)


def _beside(
    factor: Factor, indices: Any, places: tuple[int, ...], new: Mapping[int, int], axis: int
) -> tuple[Factor, Factor]:
    """The indices and a factor under the labels that the picked rows have."""
    nowhere = -2
    renamed = (nowhere if n == axis else n if n == RANK else new[n] for n in factor.labels)
    return Factor(indices, (*places, nowhere)), Factor(factor.array, tuple(renamed))


def _picked(walk: Walk, eqn: Any, held: Held, moved: Held, axis: int) -> Any:
    """While discovering: one axis left means rows; more may still be a stack of weights."""
    wide = [k for k, n in enumerate(held.base.shape) if k != axis and n > 1]
    moved = replace(moved, rows=held.view[axis])
    return moved if len(wide) > 1 else settle(walk, eqn, moved, kind="lookup")


MOVES: Mapping[str, Callable[..., Any]] = {
    "name": _same,
    "copy": _same,
    "copy_p": _same,
    "convert_element_type": _cast,
    "stop_gradient": _each,
    "pvary": _each,
    "pcast": _each,
    "mul": _scaled,
    "div": _scaled,
    "neg": _negated,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
    "rev": _reverse,
    "optimization_barrier": _barrier,
    "gather": _gather,
}
