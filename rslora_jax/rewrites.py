"""Rewrites: what each primitive does with a held weight, one small rule per primitive.

A *move* rearranges the weight (transpose, slice, reshape, cast): it is applied to the base
as the program wrote it and, axis by axis, to the factors that own the axes. A *product*
consumes it: base product + scale * (x . first factor) . second factor. The same rules serve
discovery: without factors a product reports which axes it sums over, keeps and stacks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from rslora_jax.axes import RANK
from rslora_jax.factors import Factor, contract, project
from rslora_jax.tracing import Held, Unsupported, Walk, settle

__all__ = ["RULES", "whole"]

View: TypeAlias = tuple[frozenset[int], ...]
Act: TypeAlias = Callable[[Factor], Factor]


def whole(held: Held) -> jax.Array:
    """base + scale * a @ b for a view of a weight, in the view's dtype.

    The sum is formed in float32 (float64 for a float64 weight) and cast once.
    """
    a, b = held.factors
    wide = jnp.promote_types(jnp.float32, held.base.dtype)
    keep = {n for factor in (a, b) for n in factor.labels if n != RANK}
    dot = partial(lax.dot_general, precision=lax.Precision.HIGHEST)
    first, second = (Factor(f.array.astype(wide), f.labels) for f in (a, b))
    product = contract(first, second, keep=keep, dot=dot)
    delta = _arrange(product, range(held.base.ndim), held.base.shape) * held.scale
    return (held.base.astype(wide) + delta).astype(held.base.dtype)


# Moves: the weight is rearranged, and stays held.


def _move(held: Held, base: Any, view: Iterable[frozenset[int]], act: Act) -> Held:
    return replace(
        held, base=base, view=tuple(view), factors=tuple(act(factor) for factor in held.factors)
    )


def _bind(eqn: Any, *operands: Any) -> Any:
    return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))


def _same(walk: Walk, eqn: Any, held: Held) -> Held:
    """A name or a copy: nothing happens to the numbers."""
    return replace(held, base=_bind(eqn, held.base))


def _cast(walk: Walk, eqn: Any, held: Held) -> Held:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unsupported(f"cast to {jnp.dtype(eqn.params['new_dtype']).name}")
    return replace(held, base=_bind(eqn, held.base))


def _each(walk: Walk, eqn: Any, held: Held) -> Held:
    """The same primitive on the base and on both factors, whatever their shapes."""
    return _move(
        held,
        _bind(eqn, held.base),
        held.view,
        lambda f: Factor(_bind(eqn, f.array), f.labels),
    )


def _scaled(walk: Walk, eqn: Any, left: Any, right: Any) -> Held:
    """The weight times, or divided by, one number."""
    held, number = (left, right) if isinstance(left, Held) else (right, left)
    by_weight = eqn.primitive.name == "div" and held is right
    if isinstance(number, Held) or jnp.ndim(number) or by_weight:
        raise Unsupported("the other operand is no single number")
    base = _bind(eqn, *((held.base, number) if held is left else (number, held.base)))
    factor = _inverse(number) if eqn.primitive.name == "div" else number
    return replace(held, base=base, factors=_times(held.factors, factor))


def _negated(walk: Walk, eqn: Any, held: Held) -> Held:
    return replace(held, base=_bind(eqn, held.base), factors=_times(held.factors, -1.0))


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
    return _move(
        held, _bind(eqn, held.base), (held.view[k] for k in order), partial(_relabel, new)
    )


def _relabel(new: Mapping[int, int], factor: Factor) -> Factor:
    return Factor(factor.array, tuple(n if n == RANK else new[n] for n in factor.labels))


def _squeeze(walk: Walk, eqn: Any, held: Held) -> Held:
    kept = [k for k in range(held.base.ndim) if k not in eqn.params["dimensions"]]
    new = {old: k for k, old in enumerate(kept)}
    return _move(
        held,
        _bind(eqn, held.base),
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
    return _move(
        held, _bind(eqn, held.base), view, lambda f: _relabel(new, _without(f, grown))
    )


def _reshape(walk: Walk, eqn: Any, held: Held) -> Held:
    """Axes may merge and split as long as each group of them belongs to the same factors."""
    base = _bind(eqn, held.base)
    groups = _groups(held.base.shape, base.shape)
    view = [frozenset[int]()] * base.ndim
    for old, new in groups:
        origin = frozenset().union(*(held.view[k] for k in old))
        for k in new:
            view[k] = origin
    return _move(
        held, base, view, lambda f: _regroup(f, groups, held.base.shape, base.shape)
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
) -> Factor:
    factor = _without(factor, [k for k, n in enumerate(old) if n == 1])
    owned = [(left, right) for left, right in groups if set(left) & set(factor.labels)]
    for left, _ in owned:
        if not set(left) <= set(factor.labels):
            raise Unsupported("it merges an input axis with an output axis")
    before = [k for left, _ in owned for k in left]
    after = [k for _, right in owned for k in right]
    array = jnp.transpose(factor.array, [factor.labels.index(k) for k in (*before, RANK)])
    return Factor(array.reshape(*(new[k] for k in after), array.shape[-1]), (*after, RANK))


def _slice(walk: Walk, eqn: Any, held: Held) -> Held:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)

    def act(factor: Factor) -> Factor:
        full = {RANK: (0, factor.array.shape[factor.labels.index(RANK)], 1)}
        full.update(enumerate(zip(start, limit, strides, strict=True)))
        bounds = zip(*(full[n] for n in factor.labels), strict=True)
        return Factor(lax.slice(factor.array, *bounds), factor.labels)

    return _move(held, _bind(eqn, held.base), held.view, act)


def _dynamic_slice(walk: Walk, eqn: Any, held: Any, *starts: Any) -> Held:
    if any(isinstance(start, Held) for start in starts):
        raise Unsupported("used as an index")
    sizes = eqn.params["slice_sizes"]

    def act(factor: Factor) -> Factor:
        begin = [0 if n == RANK else starts[n] for n in factor.labels]
        begin = [jnp.asarray(s, jnp.result_type(starts[0])) for s in begin]
        size = [factor.array.shape[k] if n == RANK else sizes[n] for k, n in _places(factor)]
        return Factor(lax.dynamic_slice(factor.array, begin, size), factor.labels)

    moved = _move(held, _bind(eqn, held.base, *starts), held.view, act)
    return replace(moved, rows=held.rows | _row_axes(held, sizes))


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
        for k, base in enumerate(_bind(eqn, held.base))
    ]


def _reverse(walk: Walk, eqn: Any, held: Held) -> Held:
    def act(factor: Factor) -> Factor:
        places = [k for k, n in _places(factor) if n in eqn.params["dimensions"]]
        return Factor(lax.rev(factor.array, places), factor.labels)

    return _move(held, _bind(eqn, held.base), held.view, act)


def _barrier(walk: Walk, eqn: Any, *operands: Any) -> list[Any]:
    return list(lax.optimization_barrier(operands))


def _constraint(walk: Walk, eqn: Any, held: Held) -> Held:
    """The factors take their own axes' part of the weight's sharding."""

    def act(factor: Factor) -> Factor:
        sharding = eqn.params.get("sharding", eqn.params.get("dst_sharding"))
        if not isinstance(sharding, NamedSharding):
            return factor
        entries = dict(enumerate(sharding.spec))
        spec = PartitionSpec(*(entries.get(n) for n in factor.labels))
        place = NamedSharding(sharding.mesh, spec)
        if eqn.primitive.name == "reshard":
            return Factor(jax.sharding.reshard(factor.array, place), factor.labels)
        return Factor(lax.with_sharding_constraint(factor.array, place), factor.labels)

    return _move(held, _bind(eqn, held.base), held.view, act)


def _gather(walk: Walk, eqn: Any, held: Any, indices: Any) -> Any:
    """Rows picked along one axis: an embedding lookup, or experts chosen per token."""
    if isinstance(indices, Held):
        raise Unsupported("used as an index")
    axis, places = _gathered(eqn, held.base.ndim)
    base = _bind(eqn, held.base, indices)
    kept = [k for k in range(held.base.ndim) if k != axis]
    new = dict(zip(kept, eqn.params["dimension_numbers"].offset_dims, strict=True))
    view = [held.view[axis]] * base.ndim
    for old, place in new.items():
        view[place] = held.view[old]
    rows = partial(_pick, eqn=eqn, indices=indices, axis=axis, places=places, new=new)
    moved = _move(held, base, view, rows)
    if held.factors:
        stacked = all(axis in factor.labels for factor in held.factors)
        return moved if stacked else settle(walk, eqn, moved, kind="lookup")
    return _picked(walk, eqn, held, moved, axis)


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
    array = lax.gather(factor.array, indices, numbers, sizes, **options)
    rest = tuple(factor.labels[k] for k in kept)
    return Factor(array, (*places, *(n if n == RANK else new[n] for n in rest)))


def _picked(walk: Walk, eqn: Any, held: Held, moved: Held, axis: int) -> Any:
    """While discovering: one axis left means rows; more may still be a stack of weights."""
    wide = [k for k, n in enumerate(held.base.shape) if k != axis and n > 1]
    moved = replace(moved, rows=held.view[axis])
    return moved if len(wide) > 1 else settle(walk, eqn, moved, kind="lookup")


# Products: the weight is consumed.


def _dot_general(walk: Walk, eqn: Any, lhs: Any, rhs: Any) -> Any:
    lhs, rhs = _one_held(walk, eqn, lhs, rhs)
    left = isinstance(lhs, Held)
    held, x = (lhs, rhs) if left else (rhs, lhs)
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    mine, theirs = ((lc, lb), (rc, rb)) if left else ((rc, rb), (lc, lb))
    base = _bind(eqn, *((held.base, x) if left else (x, held.base)))
    labels = _x_labels(x.ndim, held.base.ndim, mine, theirs)
    if not held.factors:
        return _report(walk, eqn, held, base, summed=mine[0], stacked=mine[1])
    out = _dot_labels(labels, held.base.ndim, mine, left)
    dot = _like(eqn, x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else base.dtype)
    first, second = _order(held, mine[0])
    product = project(
        Factor(x, labels), first, second, out, scale=held.scale, left=left, dot=dot
    )
    return base + _arrange(product, out, base.shape).astype(base.dtype)


def _one_held(walk: Walk, eqn: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """Of two held operands the one that holds picked rows, else the left one, is formed."""
    if isinstance(lhs, Held) and isinstance(rhs, Held):
        if rhs.rows and not lhs.rows:
            return lhs, settle(walk, eqn, rhs)
        if lhs.rows:
            return settle(walk, eqn, lhs), rhs
        return _both(walk, eqn, lhs, rhs)
    return lhs, rhs


def _both(walk: Walk, eqn: Any, lhs: Held, rhs: Held) -> tuple[Any, Any]:
    if lhs.factors:
        return whole(lhs), rhs
    (lc, _), (lb, _) = eqn.params["dimension_numbers"]
    _report(walk, eqn, lhs, lhs.base, summed=lc, stacked=lb, whole=True)
    return lhs.base, rhs


def _like(eqn: Any, dtype: Any) -> Callable[..., jax.Array]:
    """`dot_general` on operands of `dtype`, with the original's precision and accumulation."""
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}

    def dot(lhs: Any, rhs: Any, numbers: Any) -> jax.Array:
        return lax.dot_general(lhs.astype(dtype), rhs.astype(dtype), numbers, **options)

    return dot


def _x_labels(ndim: int, offset: int, mine: Any, theirs: Any) -> tuple[int, ...]:
    """Shared axes of the activation carry the weight's labels, its own ones come after."""
    shared = dict(zip((*theirs[0], *theirs[1]), (*mine[0], *mine[1]), strict=True))
    return tuple(shared.get(k, offset + k) for k in range(ndim))


def _dot_labels(labels: Sequence[int], ndim: int, mine: Any, left: bool) -> tuple[int, ...]:
    """The labels of a `dot_general`'s result: stacked axes, then the free ones of each side."""
    free = [k for k in range(ndim) if k not in (*mine[0], *mine[1])]
    own = [n for n in labels if n >= ndim]
    return (*mine[1], *((*free, *own) if left else (*own, *free)))


def _order(held: Held, summed: Sequence[int]) -> tuple[Factor, Factor]:
    """The factor that owns most of what is summed over meets the activation first."""
    a, b = held.factors
    size_a, size_b = (
        math.prod(held.base.shape[k] for k in summed if k in factor.labels) for factor in (a, b)
    )
    return (a, b) if size_a >= size_b else (b, a)


def _arrange(product: Factor, out: Iterable[int], shape: Sequence[int]) -> jax.Array:
    """Puts a labelled product into the order `out`; axes that it lacks are broadcast."""
    order = tuple(out)
    present = [n for n in order if n in product.labels]
    array = product.array
    if tuple(present) != product.labels:
        array = jnp.transpose(array, [product.labels.index(n) for n in present])
    if len(present) == len(order):
        return array
    places = [k for k, n in enumerate(order) if n in product.labels]
    return lax.broadcast_in_dim(array, shape, places)


def _ragged_dot(walk: Walk, eqn: Any, x: Any, held: Any, sizes: Any) -> Any:
    """Tokens sorted by expert times a stack of experts."""
    if isinstance(x, Held) or isinstance(sizes, Held):
        raise Unsupported("it is the ragged operand")
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((xc, wc), (xb, _)), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    if xb or not groups or numbers.lhs_ragged_dimensions[0] in xc:
        raise Unsupported("only the form of `jax.lax.ragged_dot` is supported")
    base = _bind(eqn, x, held.base, sizes)
    if not held.factors:
        return _report(walk, eqn, held, base, summed=wc, stacked=groups)
    first, second = _order(held, wc)
    dot = partial(_ragged_like, eqn, sizes, x.dtype, tuple(groups))
    xs = _x_labels(x.ndim, held.base.ndim, (wc, ()), (xc, ()))
    out = _dot_labels(xs, held.base.ndim, ((*wc, *groups), ()), left=False)
    ragged = held.base.ndim + numbers.lhs_ragged_dimensions[0]
    thin = dot(Factor(x, xs), first, ragged)
    wide = jnp.promote_types(thin.array.dtype, jnp.float32)
    thin = Factor((thin.array.astype(wide) * held.scale).astype(x.dtype), thin.labels)
    return base + _arrange(dot(thin, second, ragged), out, base.shape).astype(base.dtype)


def _ragged_like(
    eqn: Any, sizes: Any, dtype: Any, groups: tuple[int, ...], x: Factor, factor: Factor, ragged: int
) -> Factor:
    if not set(groups) <= set(factor.labels):
        raise Unsupported("the expert axis is not stacked in both factors")
    summed = [n for n in x.labels if n in factor.labels]
    places = (tuple(map(x.labels.index, summed)), tuple(map(factor.labels.index, summed)))
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(places, ((), ())),
        lhs_ragged_dimensions=[x.labels.index(ragged)],
        rhs_group_dimensions=[factor.labels.index(n) for n in groups],
    )
    names = ("precision", "preferred_element_type", "group_offset")
    array = lax.ragged_dot_general(
        x.array.astype(dtype),
        factor.array.astype(dtype),
        sizes,
        numbers,
        **{name: eqn.params[name] for name in names},
    )
    used = (*summed, *groups)
    labels = [n for side in (x, factor) for n in side.labels if n not in used]
    return Factor(array, tuple(labels))


def _conv(walk: Walk, eqn: Any, x: Any, held: Any) -> Any:
    """A convolution: a convolution down to rank r, then a product over the channels."""
    if isinstance(x, Held):
        raise Unsupported("it is the input of a convolution")
    params = eqn.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise Unsupported("a grouped convolution has no low-rank form; exclude it")
    spec = params["dimension_numbers"]
    out_axis, *summed = spec.rhs_spec
    base = _bind(eqn, x, held.base)
    if not held.factors:
        return _report(walk, eqn, held, base, summed=tuple(summed), stacked=())
    first, second = _order(held, summed)
    if set(first.labels) != {*summed, RANK} or set(second.labels) != {out_axis, RANK}:
        raise Unsupported("its input and output axes are mixed by another use")
    kernel = _arrange(_relabel_rank(first, out_axis), range(held.base.ndim), ())
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    options = {name: params[name] for name in names}
    preferred = params["preferred_element_type"]
    thin = lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        dimension_numbers=spec,
        preferred_element_type=preferred,
        **options,
    )
    # The channel axis of `thin` holds the rank: contract it with the second factor.
    channel = spec.out_spec[1]
    labels = tuple(RANK if k == channel else held.base.ndim + k for k in range(thin.ndim))
    out = tuple(out_axis if k == channel else n for k, n in enumerate(labels))
    wide = jnp.promote_types(thin.dtype, jnp.float32)
    scaled = Factor((thin.astype(wide) * held.scale).astype(thin.dtype), labels)
    product = contract(scaled, second, keep=set(out), dot=_like(eqn, x.dtype))
    return base + _arrange(product, out, base.shape).astype(base.dtype)


def _relabel_rank(factor: Factor, axis: int) -> Factor:
    return Factor(factor.array, tuple(axis if n == RANK else n for n in factor.labels))


def _report(
    walk: Walk,
    eqn: Any,
    held: Held,
    base: Any,
    *,
    summed: Sequence[int],
    stacked: Sequence[int],
    whole: bool = False,
) -> Any:
    """While discovering: which axes of the view this product sums over, stacks and keeps."""
    assert walk.record is not None
    roles = tuple(
        "i" if k in summed else "b" if k in stacked else "o" for k in range(len(held.view))
    )
    name = walk.record(walk, held, eqn, "product", roles, whole=whole)
    return checkpoint_name(base, name)


RULES: Mapping[str, Callable[..., Any]] = {
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
    "rev": _reverse,
    "optimization_barrier": _barrier,
    "sharding_constraint": _constraint,
    "reshard": _constraint,
    "gather": _gather,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
}
