"""Taps: what an adapter's product sees, handed out as gradients of zeros.

A tap is an array of zeros that travels with a site's factors and changes no value. At each
product of the site it stands in a function with a derivative rule of its own, whose
"gradient" for the tap is a row of sums: of powers of the adapter's input and output in the
forward pass, and of their gradients in the backward pass. So one `value_and_grad` over
factors and taps measures activations through scan, remat, branches, shard_map and jit; sums
over several uses of a weight, over layers of a loop and over shards of the data add up by
themselves. Where a shard_map splits the inputs of a product, what a shard computes is a part
of each output, and the taps stay outside (`control`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from rslora_jax.factors import TAPS, Factor, contract
from rslora_jax.meshes import automatic
from rslora_jax.norms import module_shape
from rslora_jax.paths import insert
from rslora_jax.sites import Site

__all__ = [
    "POWER_STEPS",
    "SPECTRAL",
    "SUMS",
    "Ragged",
    "tap",
    "untap",
    "watch_input",
    "watch_output",
]

SUMS = (
    *("inputs", "input_2"),
    *("input_grads", "input_grad_1", "input_grad_2", "input_grad_4"),
    *("outputs", "output_1", "output_2", "output_4", "base_2", "cross"),
    *("output_grads", "output_grad_1", "output_grad_2", "output_grad_4"),
)
"""What the entries of the gradient of a tap `sums` are: counts of entries, and sums over them
of their absolute value to the power in the name; `cross` is output times base output."""

SPECTRAL = ("trace", "top")
"""What the entries of the gradient of a tap `spectral` are: of the sum over the inputs x of
x x^T, its trace and its largest eigenvalue, each summed over the uses of the weight."""

POWER_STEPS = 10
"""Power iterations from a random start that find the largest eigenvalue."""

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
    """What is static about a watch: the labels of the watched array and of its taps.

    Attributes:
      labels: of the array.
      stacked: the b axes of the site.
      summed: the axes that the product sums over, where their second moment is wanted.
      ragged: the label of a ragged axis.
    """

    labels: Labels
    stacked: Labels
    summed: Labels = ()
    ragged: int | None = None


def tap(
    lora: Mapping[str, Any], sites: Sequence[Site], *, spectral: bool = False
) -> dict[str, Any]:
    """The adapter tree with taps of zeros beside the factors of every site.

    Args:
      lora: the nested dict of a `LoraParams`.
      sites: the sites that it was made for.
      spectral: also look at the second moment of the inputs, by `POWER_STEPS` products with
        them.

    Returns:
      A nested dict with ``{"a", "b", "sums": [b.., len(SUMS)]}`` at each path, and with
      `spectral` also ``"spectral": [b.., len(SPECTRAL)]``.
    """
    tree: dict[str, Any] = {}
    lengths = {"sums": len(SUMS), **({"spectral": len(SPECTRAL)} if spectral else {})}
    for site in sites:
        factors, stack = _at(lora, site.path), module_shape(site)
        dtype = jnp.promote_types(jnp.float32, factors["a"].dtype)
        taps = {name: jnp.zeros((*stack, length), dtype) for name, length in lengths.items()}
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


def watch_input(
    x: Factor, taps: Sequence[Factor], summed: Sequence[int] = (), ragged: Ragged | None = None
) -> Factor:
    """The same activation, seen by the taps on its way into the adapter.

    Args:
      x: the activation.
      taps: the taps of the site, none to see nothing.
      summed: the labels that the product sums over; none leaves the second moment out.
      ragged: how a ragged axis is shared out among the modules.
    """
    if not taps:
        return x
    own = tuple(summed) if len(taps) > 1 else ()
    spec = _Spec(x.labels, taps[0].labels[:-1], own, ragged.label if ragged else None)
    zeros = [_like(t.array, x.array) for t in taps]
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
    more = [_spectral(spec, x, like) for like in taps[1:]]
    return x, (member, _sums(spec, taps[0], member, seen), *more)


def _input_backward(spec: _Spec, seen: Any, grad: jax.Array) -> tuple[Any, ...]:
    member, sums, *spectral = seen
    more = _sums(spec, sums, member, _moments("input_grad", grad))
    return grad, jnp.zeros_like(member), sums + more, *spectral


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
    return _spread(spec, like, Factor(values.sum(summed), tuple(kept)))


def _spread(spec: _Spec, like: jax.Array, total: Factor) -> jax.Array:
    """Values of the modules in the tap's order; a missing axis is one that modules share."""
    order = [n for n in spec.stacked if n in total.labels]
    array = jnp.transpose(total.array, [total.labels.index(n) for n in order])
    missing = [k for k, n in enumerate(spec.stacked) if n not in total.labels]
    return jnp.broadcast_to(jnp.expand_dims(array, missing), like.shape[:-1])


def _spectral(spec: _Spec, x: jax.Array, like: jax.Array) -> jax.Array:
    """Trace and largest eigenvalue of the sum of x x^T over the inputs, per module."""
    if not spec.summed or spec.ragged is not None:
        return jnp.zeros_like(like)
    wide = _wide(x).astype(like.dtype)
    trace = _per_module(spec, like, wide**2, jnp.zeros(()))
    top = Factor(automatic(partial(_top, spec), wide), _modules(spec))
    return jnp.stack([trace, _spread(spec, like, top)], -1)


def _modules(spec: _Spec) -> Labels:
    return tuple(n for n in spec.stacked if n in spec.labels)


def _top(spec: _Spec, x: jax.Array) -> jax.Array:
    """The largest eigenvalue by power iteration, one for each module."""
    seen, labels = Factor(x, spec.labels), (*_modules(spec), *spec.summed)
    dot = partial(jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST)
    inner = tuple(range(-len(spec.summed), 0))

    def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, _ = carry
        size = jnp.sqrt((v * v).sum(inner, keepdims=True))
        v = v / jnp.where(size > 0, size, 1)
        keep = {*spec.labels} - {*spec.summed}
        projected = contract(seen, Factor(v, labels), keep=keep, dot=dot)
        w = contract(seen, projected, keep={*labels}, dot=dot)
        w = jnp.transpose(w.array, [w.labels.index(n) for n in labels])
        return w, (v * w).sum(inner)

    start = _start(seen, labels, len(spec.summed))
    return jax.lax.fori_loop(0, POWER_STEPS, step, (start, start.sum(inner)))[1]


def _start(seen: Factor, labels: Labels, inputs: int) -> jax.Array:
    """A random vector for every module [b.., i..], varying over mesh axes as the inputs do."""
    rest = tuple(k for k, n in enumerate(seen.labels) if n not in labels)
    kept = [n for n in seen.labels if n in labels]
    zeros = jnp.where(False, seen.array.sum(rest), 0)
    zeros = jnp.transpose(zeros, [kept.index(n) for n in labels]).astype(seen.array.dtype)
    shape = zeros.shape[zeros.ndim - inputs :]
    flat = jax.random.normal(jax.random.key(0), (math.prod(shape),), zeros.dtype)
    return zeros + flat.reshape(shape)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _at(lora: Any, path: str) -> Any:
    for name in path.split("/"):
        lora = lora[name]
    return lora
