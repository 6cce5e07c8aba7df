"""Products: the weight is consumed, one rule per primitive.

Each gives the base product + scale * (x . first factor) . second factor. While discovering,
without factors, it reports which axes it sums over, keeps and stacks instead.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from rslora_jax.axes import RANK
from rslora_jax.deferred import Deferred, form
from rslora_jax.factors import Factor, contract, project
from rslora_jax.meshes import along
from rslora_jax.taps import Ragged, watch_input, watch_output
from rslora_jax.tracing import Held, Unsupported, Walk, beside, bind, settle

__all__ = ["PRODUCTS", "whole"]

OPTIONS = ("precision", "preferred_element_type")


def whole(held: Held) -> jax.Array:
    """base + scale * a @ b for a view of a weight, in the view's dtype.

    The sum is formed in float32 (float64 for a float64 weight) and cast once.
    """
    if not held.factors:
        return form(held.base)
    a, b, *taps = held.factors
    array = form(held.base)
    wide = jnp.promote_types(jnp.float32, array.dtype)
    keep = {n for factor in (a, b) for n in factor.labels if n != RANK}
    dot = partial(lax.dot_general, precision=lax.Precision.HIGHEST)
    first, second = (Factor(f.array.astype(wide), f.labels) for f in (a, b))
    base = Factor(array, tuple(range(array.ndim)))
    product = contract(first, second, keep=keep, dot=dot, sides=(base,))
    delta = _arrange(product, base) * held.scale
    if held.rows:  # rows that were looked up are an activation, a weight is none
        delta = watch_output(Factor(delta, base.labels), array, taps)
    return (array.astype(wide) + delta).astype(array.dtype)


def _dot_general(walk: Walk, eqn: Any, lhs: Any, rhs: Any) -> Any:
    lhs, rhs = _one_held(walk, eqn, lhs, rhs)
    left = isinstance(lhs, Held)
    held, x = (lhs, rhs) if left else (rhs, lhs)
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    mine, theirs = ((lc, lb), (rc, rb)) if left else ((rc, rb), (lc, lb))
    seen = beside(walk, x) if held.factors else x  # ahead of `base`: its gradient comes last
    base = _base(eqn, (held.base, x) if left else (x, held.base))
    if jax.typeof(base).sharding.spec.unreduced:
        raise Unsupported("its result is left unreduced over a mesh axis")
    labels = _x_labels(x.ndim, held.base.ndim, mine, theirs)
    if not held.factors:
        return _alone(walk, eqn, held, base, summed=mine[0], stacked=mine[1])
    out = _dot_labels(labels, held.base.ndim, mine, left)
    first, second = _order(held, mine[0])
    how = _How(out, tuple(mine[0]), held.scale, left, *(eqn.params[name] for name in OPTIONS))
    return _plus(base, Factor(seen, labels), (first, second), held.factors[2:], how)


class _How(NamedTuple):
    """What is static about the product with the factors."""

    out: tuple[int, ...]
    summed: tuple[int, ...]
    scale: float
    left: bool
    precision: Any
    preferred_element_type: Any


@partial(jax.jit, static_argnames="how", inline=True)
def _plus(
    base: Any, x: Factor, factors: tuple[Factor, Factor], taps: Sequence[Factor], how: _How
) -> jax.Array:
    """base + scale * (x . first) . second; inlined, so that JAX derives equal sites once."""
    dtype = x.array.dtype if jnp.issubdtype(x.array.dtype, jnp.floating) else base.dtype
    if jnp.finfo(dtype).bits < 16:  # the factors would not survive eight bits
        dtype = jnp.bfloat16
    dot = _like(how.precision, how.preferred_element_type, dtype)
    x = watch_input(x, taps, how.summed)
    beside = Factor(base, how.out)
    product = project(x, *factors, beside, scale=how.scale, left=how.left, dot=dot)
    added = _arrange(product, beside).astype(base.dtype)
    return base + watch_output(Factor(added, how.out), base, taps)


def _base(eqn: Any, operands: Sequence[Any]) -> jax.Array:
    """The product with the weight itself.

    A quantized weight is formed here, and again in the backward pass: what is kept in between
    are its integers. (Whoever keeps the product keeps an activation, as ever.)
    """
    if not any(isinstance(operand, Deferred) for operand in operands):
        return bind(eqn, operands)[0]
    return jax.checkpoint(lambda *given: bind(eqn, [form(x) for x in given])[0])(*operands)


def _alone(walk: Walk, eqn: Any, held: Held, base: Any, **roles: Any) -> Any:
    """A product without factors: reported while discovering, else complete."""
    return _report(walk, eqn, held, base, **roles) if walk.discovering else base


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
    if not walk.discovering:
        return whole(lhs), rhs
    (lc, _), (lb, _) = eqn.params["dimension_numbers"]
    _report(walk, eqn, lhs, lhs.base, summed=lc, stacked=lb, whole=True)
    return lhs.base, rhs


def _like(precision: Any, preferred: Any, dtype: Any) -> Callable[..., jax.Array]:
    """`dot_general` on operands of `dtype`, with the original's precision and accumulation."""
    options = {"precision": precision, "preferred_element_type": preferred}

    def dot(lhs: Any, rhs: Any, numbers: Any, out_sharding: Any = None) -> jax.Array:
        sides = (lhs.astype(dtype), rhs.astype(dtype))
        return lax.dot_general(*sides, numbers, **options, out_sharding=out_sharding)

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
    a, b, *_ = held.factors
    size_a, size_b = (
        math.prod(held.base.shape[k] for k in summed if k in factor.labels) for factor in (a, b)
    )
    return (a, b) if size_a >= size_b else (b, a)


def _ragged_dot(walk: Walk, eqn: Any, x: Any, held: Any, sizes: Any) -> Any:
    """Tokens sorted by expert times a stack of experts."""
    if isinstance(x, Held) or isinstance(sizes, Held):
        raise Unsupported("it is the ragged operand")
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((xc, wc), (xb, _)), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    if xb or not groups or numbers.lhs_ragged_dimensions[0] in xc:
        raise Unsupported("only the form of `jax.lax.ragged_dot` is supported")
    base = _base(eqn, [x, held.base, sizes])
    if not held.factors:
        _refuse_grown(held)
        return _alone(walk, eqn, held, base, summed=wc, stacked=groups)
    first, second = _order(held, wc)
    dot = partial(_ragged_like, eqn, sizes, x.dtype, tuple(groups))
    xs = _x_labels(x.ndim, held.base.ndim, (wc, ()), (xc, ()))
    out = _dot_labels(xs, held.base.ndim, ((*wc, *groups), ()), left=False)
    ragged = held.base.ndim + numbers.lhs_ragged_dimensions[0]
    taps, members = held.factors[2:], Ragged(ragged, _members(sizes, x.shape[xs.index(ragged)]))
    thin = dot(watch_input(Factor(x, xs), taps, ragged=members), first, ragged)
    wide = jnp.promote_types(thin.array.dtype, jnp.float32)
    thin = Factor((thin.array.astype(wide) * held.scale).astype(x.dtype), thin.labels)
    added = _arrange(dot(thin, second, ragged), Factor(base, out)).astype(base.dtype)
    return base + watch_output(Factor(added, out), base, taps, members)


def _members(sizes: jax.Array, entries: int) -> jax.Array:
    """Which of the sorted entries each group holds, as ones and zeros: [groups, entries]."""
    ends = jnp.cumsum(sizes)[:, None]
    places = jnp.arange(entries)
    return ((ends - sizes[:, None] <= places) & (places < ends)).astype(jnp.float32)


def _ragged_like(
    eqn: Any,
    sizes: Any,
    dtype: Any,
    groups: tuple[int, ...],
    x: Factor,
    factor: Factor,
    ragged: int,
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
    base = _base(eqn, [x, held.base])
    if not held.factors:
        _refuse_grown(held)
        return _alone(walk, eqn, held, base, summed=tuple(summed), stacked=())
    first, second = _order(held, summed)
    if set(first.labels) != {*summed, RANK} or set(second.labels) != {out_axis, RANK}:
        raise Unsupported("its input and output axes are mixed by another use")
    taps = held.factors[2:]
    x = watch_input(Factor(x, (*range(held.base.ndim, held.base.ndim + x.ndim),)), taps).array
    kernel = _ordered(_relabel_rank(first, out_axis), range(held.base.ndim))
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    options = {name: params[name] for name in names}
    preferred = params["preferred_element_type"]
    # The channel axis of `thin` holds the rank: contract it with the second factor.
    channel, axes = spec.out_spec[1], range(base.ndim)
    labels = tuple(RANK if k == channel else held.base.ndim + k for k in axes)
    beside = Factor(base, tuple(out_axis if n == RANK else n for n in labels))
    thin = lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        dimension_numbers=spec,
        preferred_element_type=preferred,
        out_sharding=along(labels, (beside, first)),
        **options,
    )
    wide = jnp.promote_types(thin.dtype, jnp.float32)
    scaled = Factor((thin.astype(wide) * held.scale).astype(thin.dtype), labels)
    dot = _like(params["precision"], preferred, x.dtype)
    product = contract(scaled, second, keep={*beside.labels}, dot=dot, sides=(beside,))
    added = _arrange(product, beside).astype(base.dtype)
    return base + watch_output(Factor(added, beside.labels), base, taps)


def _refuse_grown(held: Held) -> None:
    if any(n > 1 and not axes for n, axes in zip(held.base.shape, held.view, strict=True)):
        raise Unsupported("an axis of the weight was broadcast before")


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


def _arrange(product: Factor, base: Factor) -> jax.Array:
    """Puts a labelled product into the order of `base`; axes that it lacks are broadcast."""
    array = _ordered(product, base.labels)
    if array.ndim == len(base.labels):
        return array
    places = [k for k, n in enumerate(base.labels) if n in product.labels]
    place = along(base.labels, (base,))
    return lax.broadcast_in_dim(array, base.array.shape, places, out_sharding=place)


def _ordered(product: Factor, order: Iterable[int]) -> jax.Array:
    present = [n for n in order if n in product.labels]
    if tuple(present) == product.labels:
        return product.array
    return jnp.transpose(product.array, [product.labels.index(n) for n in present])


PRODUCTS: Mapping[str, Callable[..., Any]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
}
