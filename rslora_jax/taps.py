"""Taps: what an adapter's product sees, handed out as gradients of zeros.

A tap is an array of zeros that travels with a site's factors and changes no value. At each
product of the site it stands in a function with a derivative rule of its own, whose
"gradient" for the tap is a row of sums: of powers of the adapter's input and output in the
forward pass, and of their gradients in the backward pass. So one `value_and_grad` over
factors and taps measures activations through scan, remat, branches, shard_map and jit; sums
over several uses of a weight, over layers of a loop and over shards add up by themselves.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from rslora_jax.axes import RANK
from rslora_jax.factors import TAPS, Factor, contract
from rslora_jax.norms import module_shape
from rslora_jax.paths import insert
from rslora_jax.sites import Site

__all__ = ["SUMS", "Ragged", "tap", "untap", "watch_input", "watch_output"]

SUMS = (
    *("inputs", "input_2"),
    *("input_grads", "input_grad_1", "input_grad_2", "input_grad_4"),
    *("outputs", "output_1", "output_2", "output_4", "base_2", "cross"),
    *("output_grads", "output_grad_1", "output_grad_2", "output_grad_4"),
)
"""What the entries of a tap's gradient are: counts of entries, and sums over them of their
absolute value to the power in the name; `cross` is output times base output."""

OTHER = RANK - 1
"""Stands for a second rank axis, where a product has two."""

Labels: TypeAlias = tuple[int, ...]


class Ragged(NamedTuple):
    """Which entry along a ragged axis belongs to which module.

    Attributes:
      label: the label of the ragged axis.
      member: 1.0 where an entry belongs to a module, else 0.0: [modules, entries].
    """

    label: int
    member: jax.Array


class _Spec(NamedTuple):
    """What is static about a watch: the labels of the watched array and of its taps."""

    labels: Labels
    stacked: Labels
    sketched: Labels = ()
    ragged: int | None = None


def tap(lora: Mapping[str, Any], sites: Sequence[Site], sketch: int = 0) -> dict[str, Any]:
    """The adapter tree with taps of zeros beside the factors of every site.

    Args:
      lora: the nested dict of a `LoraParams`.
      sites: the sites that it was made for.
      sketch: how many random directions measure the second moment of the inputs; 0 for none.

    Returns:
      A nested dict with ``{"a", "b", "sums": [b.., len(SUMS)]}`` at each path, and with a
      sketch also ``"sketch": [b.., i.., n]`` (the second moment times n directions) and
      ``"gram": [b.., n * n]`` (the directions times that).
    """
    tree: dict[str, Any] = {}
    for site in sites:
        factors, stack = _at(lora, site.path), module_shape(site)
        shapes = {"sums": (*stack, len(SUMS))}
        if sketch:
            shapes["sketch"] = (*factors["a"].shape[:-1], sketch)
            shapes["gram"] = (*stack, sketch * sketch)
        dtype = jnp.promote_types(jnp.float32, factors["a"].dtype)
        taps = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
        insert(tree, site.path, {**factors, **taps})
    return tree


def untap(lora: Mapping[str, Any], sites: Sequence[Site]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes a tree like that of `tap` apart: the factors' part, and ``{path: taps}``."""
    tree: dict[str, Any] = {}
    taps: dict[str, Any] = {}
    for site in sites:
        found = dict(_at(lora, site.path))
        taps[site.path] = {name: found.pop(name) for name in TAPS if name in found}
        insert(tree, site.path, found)
    return tree, taps


def watch_input(x: Factor, taps: Sequence[Factor], ragged: Ragged | None = None) -> Factor:
    """The same activation, seen by the taps on its way into the adapter."""
    if not taps:
        return x
    sums, *sketch = taps if ragged is None else taps[:1]
    if sketch:  # not where the weight is transposed: its inputs are the other axis there
        shared = {n for n in x.labels if any(n in t.labels for t in taps)}
        sketch = sketch if {*sketch[0].labels} - {RANK} == shared else []
    own = sketch[0].labels if sketch else ()
    spec = _Spec(x.labels, sums.labels[:-1], own, ragged.label if ragged else None)
    zeros = [_like(t.array, x.array) for t in (sums, *sketch)]
    return Factor(_input(spec, x.array, _member(ragged), *zeros), x.labels)


def watch_output(product: Factor, base: jax.Array, taps: Any, ragged: Any = None) -> jax.Array:
    """The same adapter output, seen by the taps beside the base output of its shape."""
    if not taps:
        return product.array
    sums, beside = taps[0], jax.lax.stop_gradient(base)
    spec = _Spec(product.labels, sums.labels[:-1], (), ragged.label if ragged else None)
    zeros = _like(sums.array, product.array)
    return _output(spec, product.array, beside, _member(ragged), zeros)


def _member(ragged: Ragged | None) -> jax.Array:
    return jnp.zeros(()) if ragged is None else jax.lax.stop_gradient(ragged.member)


def _like(zeros: jax.Array, x: jax.Array) -> jax.Array:
    """Zeros that vary over the same mesh axes as `x` inside a shard_map."""
    return zeros + jnp.where(False, jax.lax.stop_gradient(x).sum(), 0).astype(zeros.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _input(spec: _Spec, x: jax.Array, member: jax.Array, *taps: jax.Array) -> jax.Array:
    return x


def _input_forward(
    spec: _Spec, x: jax.Array, member: jax.Array, *taps: jax.Array
) -> tuple[jax.Array, Any]:
    seen = {"inputs": jnp.ones_like(x), "input_2": _wide(x) ** 2}
    sketch = _sketch(spec, x, *taps[1:]) if spec.sketched else ()
    return x, (member, _sums(spec, taps[0], member, seen), *sketch)


def _input_backward(spec: _Spec, seen: Any, grad: jax.Array) -> tuple[Any, ...]:
    member, sums, *sketch = seen
    more = _sums(spec, sums, member, _moments("input_grad", grad))
    return grad, jnp.zeros_like(member), sums + more, *sketch


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _output(
    spec: _Spec, product: jax.Array, base: jax.Array, member: jax.Array, sums: jax.Array
) -> jax.Array:
    return product


def _output_forward(
    spec: _Spec, product: jax.Array, base: jax.Array, member: jax.Array, sums: jax.Array
) -> tuple[jax.Array, Any]:
    wide, beside = _wide(product), _wide(base)
    seen = {**_moments("output", product), "base_2": beside**2, "cross": wide * beside}
    return product, (member, _sums(spec, sums, member, seen), jnp.zeros_like(base))


def _output_backward(spec: _Spec, seen: Any, grad: jax.Array) -> tuple[Any, ...]:
    member, sums, nothing = seen
    more = _sums(spec, sums, member, _moments("output_grad", grad))
    return grad, nothing, jnp.zeros_like(member), sums + more


_input.defvjp(_input_forward, _input_backward)
_output.defvjp(_output_forward, _output_backward)


def _moments(name: str, x: jax.Array) -> dict[str, jax.Array]:
    wide = jnp.abs(_wide(x))
    powers = {f"{name}_{m}": wide**m for m in (1, 2, 4)}
    return {f"{name}s": jnp.ones_like(wide), **powers}


def _sums(
    spec: _Spec, like: jax.Array, member: jax.Array, seen: Mapping[str, jax.Array]
) -> jax.Array:
    """Every array of `seen` summed per module, at its place in a row of SUMS."""
    nothing = jnp.zeros_like(like[..., 0])
    totals = {
        name: _per_module(spec, like, values.astype(like.dtype), member)
        for name, values in seen.items()
    }
    return jnp.stack([totals.get(name, nothing) for name in SUMS], -1)


def _per_module(spec: _Spec, like: jax.Array, values: jax.Array, member: jax.Array) -> jax.Array:
    """Sums over all axes but the stacked ones; modules that share `values` all get the sum."""
    if spec.ragged is not None:
        rest = tuple(k for k, n in enumerate(spec.labels) if n != spec.ragged)
        total = member.astype(values.dtype) * values.sum(rest)
        return total.sum(-1).reshape(like.shape[:-1])
    summed = tuple(k for k, n in enumerate(spec.labels) if n not in spec.stacked)
    kept = [n for n in spec.labels if n in spec.stacked]
    total = values.sum(summed)
    order = [n for n in spec.stacked if n in kept]
    total = jnp.transpose(total, [kept.index(n) for n in order])
    missing = [k for k, n in enumerate(spec.stacked) if n not in kept]
    return jnp.broadcast_to(jnp.expand_dims(total, missing), like.shape[:-1])


def _sketch(spec: _Spec, x: jax.Array, sketch: jax.Array, gram: jax.Array) -> list[jax.Array]:
    """Sums over the inputs x, per module: of x (x . probe), and of the probe times that.

    The first is a transposed product, so JAX transposes it: shardings come out right.
    """
    own = [n for n in spec.sketched if n not in spec.stacked]
    seen = Factor(_wide(x).astype(sketch.dtype), spec.labels)
    dot = partial(jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST)

    def thin(directions: jax.Array) -> jax.Array:
        factor = Factor(directions, spec.sketched)
        return contract(seen, factor, keep={RANK, *spec.labels} - {*own[:-1]}, dot=dot).array

    stack = tuple(k for k, n in enumerate(spec.sketched) if n in spec.stacked)
    probe = _probe([n for k, n in enumerate(sketch.shape) if k not in stack], sketch.dtype)
    directions = sketch + jnp.expand_dims(probe, stack)
    projected, transpose = jax.vjp(thin, directions)
    [moment] = transpose(projected)
    other = Factor(moment, tuple(OTHER if n == RANK else n for n in spec.sketched))
    keep = {RANK, OTHER, *spec.stacked}
    square = contract(Factor(directions, spec.sketched), other, keep=keep, dot=dot)
    order = [square.labels.index(n) for n in (*spec.stacked, RANK, OTHER)]
    return [moment, jnp.transpose(square.array, order).reshape(gram.shape)]


def _probe(shape: Sequence[int], dtype: Any) -> jax.Array:
    """The random directions of a sketch [i.., n]: the same in every module and every run."""
    flat = jax.random.normal(jax.random.key(0), (math.prod(shape),), dtype)  # compiles fastest
    return flat.reshape(shape)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _at(lora: Any, path: str) -> Any:
    for name in path.split("/"):
        lora = lora[name]
    return lora
