"""Control flow: loops, branches, calls and shard_map, rebuilt when a held weight enters one.

Each is rebuilt with JAX's public function around the walk of its inner program, with held
weights as operands: a scan slices base and factors alike, a shard_map gives each factor its
own axes' part of the weight's spec.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from rslora_jax.deferred import Deferred, leading, put_off, specs_of
from rslora_jax.factors import Factor
from rslora_jax.meshes import devices_along
from rslora_jax.placements import enter, shard_maps
from rslora_jax.tracing import Held, Walk, bind, evaluate, open_jaxpr, scan_counts, settle

__all__ = ["CONTROL"]


def _call(walk: Walk, eqn: JaxprEqn, needed: tuple[bool, ...], key: str) -> Callable[..., Any]:
    """The inner program as a function of the operands."""
    jaxpr, consts = open_jaxpr(eqn.params[key])
    inner = _within(walk, eqn)
    return lambda *args: evaluate(inner, jaxpr, consts, args, needed)


def _within(walk: Walk, eqn: JaxprEqn) -> Walk:
    return dataclasses.replace(walk, callers=(*walk.callers, eqn))


def _jit(walk: Walk, eqn: JaxprEqn, args: list[Any], needed: tuple[bool, ...]) -> list[Any]:
    if walk.record is not None:  # while discovering each call is looked into by itself
        return _inline(walk, eqn, args, needed)
    shardings = (eqn.params["in_shardings"], eqn.params["out_shardings"])
    memo_key = (id(eqn.params["jaxpr"]), needed, shardings, *map(id, shard_maps(walk)))
    if memo_key not in walk.memo:
        walk.memo[memo_key] = _jitted(walk, eqn, needed)
    return walk.memo[memo_key](*args)


def _jitted(walk: Walk, eqn: JaxprEqn, needed: tuple[bool, ...]) -> Callable[..., Any]:
    inner = _call(walk, eqn, needed, "jaxpr")
    ins, outs = eqn.params["in_shardings"], eqn.params["out_shardings"]

    def function(*args: Any) -> list[Any]:
        results = inner(*[_constrain(arg, s) for arg, s in zip(args, ins, strict=True)])
        return [_constrain(result, s) for result, s in zip(results, outs, strict=True)]

    function.__name__ = function.__qualname__ = eqn.params["name"]
    return jax.jit(function, inline=eqn.params["inline"])


def _constrain(value: Any, sharding: Any) -> Any:
    """Keeps a sharding that the inner jit asked for; most ask for none."""
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if isinstance(value, Held):
        return dataclasses.replace(value, base=_asked(value.base, sharding))
    return value if value is None else lax.with_sharding_constraint(value, sharding)


def _asked(base: Any, sharding: Any) -> Any:
    ask = functools.partial(lax.with_sharding_constraint, shardings=sharding)
    return put_off(base, ask, [base]) if isinstance(base, Deferred) else ask(base)


def _remat(walk: Walk, eqn: JaxprEqn, args: list[Any], needed: tuple[bool, ...]) -> list[Any]:
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(_call(walk, eqn, needed, "jaxpr"), **options)(*args)


def _inline(walk: Walk, eqn: JaxprEqn, args: list[Any], needed: tuple[bool, ...]) -> list[Any]:
    key = "call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"
    return _call(walk, eqn, needed, key)(*args)


def _custom(walk: Walk, eqn: JaxprEqn, args: list[Any], needed: tuple[bool, ...]) -> list[Any]:
    """A function with its own derivative rule keeps it, so it gets the whole weight."""
    if walk.discovering:
        results = _inline(dataclasses.replace(walk, inside=True), eqn, args, needed)
        for result in results:
            if isinstance(result, Held):
                assert walk.record is not None
                walk.record(walk, result, eqn, "opaque", (), whole=True)
        return results
    return bind(eqn, [settle(walk, eqn, arg, kind="custom") for arg in args])


def _cond(walk: Walk, eqn: JaxprEqn, args: list[Any], needed: tuple[bool, ...]) -> list[Any]:
    def branch(closed: Any) -> Callable[..., Any]:
        jaxpr, consts = open_jaxpr(closed)

        def run(*operands: Any) -> list[Any]:
            results = evaluate(_within(walk, eqn), jaxpr, consts, operands, needed)
            return [settle(walk, eqn, result, "returned by a branch") for result in results]

        return run

    index, *operands = args
    return lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *operands)


def _while(walk: Walk, eqn: JaxprEqn, args: list[Any], needed: tuple[bool, ...]) -> list[Any]:
    cond, cond_consts = open_jaxpr(eqn.params["cond_jaxpr"])
    body, body_consts = open_jaxpr(eqn.params["body_jaxpr"])
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    outer, inner, carry = args[:n], args[n : n + m], args[n + m :]
    fixed, start = _split_carry(walk, eqn, carry, body.invars[m:], body.outvars)

    def test(moving: list[Any]) -> Any:
        return evaluate(_within(walk, eqn), cond, cond_consts, [*outer, *_join(fixed, moving)])[0]

    def step(moving: list[Any]) -> list[Any]:
        operands = [*inner, *_join(fixed, moving)]
        results = evaluate(_within(walk, eqn), body, body_consts, operands)
        return [settle(walk, eqn, r, "carried") for k, r in enumerate(results) if k not in fixed]

    return _join(fixed, lax.while_loop(test, step, start))


def _scan(walk: Walk, eqn: JaxprEqn, args: list[Any], needed: tuple[bool, ...]) -> list[Any]:
    jaxpr, jaxpr_consts = open_jaxpr(eqn.params["jaxpr"])
    n, m = scan_counts(eqn)
    consts, carry, xs = args[:n], args[n : n + m], args[n + m :]
    fixed, start = _split_carry(walk, eqn, carry, jaxpr.invars[n : n + m], jaxpr.outvars[:m])
    same = {
        k: xs[jaxpr.invars.index(v) - n - m]
        for k, v in enumerate(jaxpr.outvars)
        if k >= m and needed[k] and v in jaxpr.invars[n + m :]
    }
    wanted = tuple(k < m or (needed[k] and k not in same) for k in range(len(needed)))

    def step(moving: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        layer = [_unsplit_xs(x, s) for x, s in zip(xs, slices, strict=True)]
        operands = [*consts, *_join(fixed, moving), *layer]
        results = evaluate(_within(walk, eqn), jaxpr, jaxpr_consts, operands, wanted)
        results = [settle(walk, eqn, r, "returned by the loop") for r in _drop(results, fixed)]
        return results[: len(start)], results[len(start) :]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    end, ys = lax.scan(step, start, [_split_xs(x) for x in xs], **options)
    results = [*_join(fixed, end), *ys]
    return [same.get(k, result) for k, result in enumerate(results)]


def _drop(results: list[Any], fixed: Mapping[int, Any]) -> list[Any]:
    return [r for k, r in enumerate(results) if k not in fixed]


def _split_carry(
    walk: Walk,
    eqn: JaxprEqn,
    carry: Sequence[Any],
    ins: Sequence[Any],
    outs: Sequence[Any],
) -> tuple[dict[int, Any], list[Any]]:
    """Held weights that a loop hands on untouched, by position, and the rest of the carry."""
    fixed = {
        k: value
        for k, (value, before, after) in enumerate(zip(carry, ins, outs, strict=True))
        if isinstance(value, Held) and before is after
    }
    rest = [
        settle(walk, eqn, value, "carried and changed")
        for k, value in enumerate(carry)
        if k not in fixed
    ]
    return fixed, rest


def _join(fixed: Mapping[int, Any], moving: Sequence[Any]) -> list[Any]:
    rest = iter(moving)
    return [fixed[k] if k in fixed else next(rest) for k in range(len(fixed) + len(moving))]


def _split_xs(x: Any) -> Any:
    """What `scan` slices of an operand: the base, and the factors that own the axis."""
    if not isinstance(x, Held):
        return x
    return leading(x.base), [_leading(f) if 0 in f.labels else None for f in x.factors]


def _leading(factor: Factor) -> jax.Array:
    return jnp.moveaxis(factor.array, factor.labels.index(0), 0)


def _unsplit_xs(x: Any, piece: Any) -> Any:
    if not isinstance(x, Held):
        return piece
    base, arrays = piece
    factors = tuple(
        Factor(f.array if array is None else array, _without_leading(f.labels))
        for f, array in zip(x.factors, arrays, strict=True)
    )
    return dataclasses.replace(x, base=base, factors=factors, view=x.view[1:])


def _without_leading(labels: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n - 1 if n > 0 else n for n in labels if n != 0)


def _shard_map(walk: Walk, eqn: JaxprEqn, args: list[Any], needed: tuple[bool, ...]) -> list[Any]:
    params = eqn.params
    pairs = [_enter(eqn, arg, spec) for arg, spec in zip(args, params["in_specs"], strict=True)]
    args = [arg for arg, _ in pairs]
    inner = _call(walk, eqn, needed, "jaxpr")

    def body(*operands: Any) -> list[Any]:
        return [settle(walk, eqn, r, "returned by the shard_map") for r in inner(*operands)]

    outs = zip(params["out_specs"], needed, strict=True)
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(spec for _, spec in pairs),
        out_specs=[spec if want else None for spec, want in outs],
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )(*args)


def _enter(eqn: JaxprEqn, arg: Any, spec: Any) -> tuple[Any, Any]:
    """An operand on its way into a shard_map, and its spec.

    Taps stay outside where a shard holds a part of the inputs: its outputs are partial.
    """
    if not isinstance(arg, Held):
        return arg, spec
    if len(arg.factors) > 2:
        a, _, sums, *_ = arg.factors
        parts = dict(enumerate(spec))
        split = any(parts.get(n) for n in a.labels if n not in sums.labels)
        arg = dataclasses.replace(arg, factors=arg.factors[:2]) if split else arg
    base, specs = specs_of(arg.base, spec, functools.partial(devices_along, eqn.params["mesh"]))
    arg = enter(eqn, dataclasses.replace(arg, base=base), spec)
    return arg, _spec(arg, spec, specs)


def _spec(arg: Held, spec: Any, base: Any) -> Held:
    """The specs of a held weight: each factor takes its own axes' part of the weight's."""
    entries = dict(enumerate(spec))
    factors = tuple(
        Factor(PartitionSpec(*(entries.get(n) for n in f.labels)), f.labels) for f in arg.factors
    )
    return dataclasses.replace(arg, base=base, factors=factors)


CONTROL: Mapping[str, Callable[..., list[Any]]] = {
    "jit": _jit,
    "pjit": _jit,
    "remat2": _remat,
    "checkpoint": _remat,
    "closed_call": _inline,
    "core_call": _inline,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "shard_map": _shard_map,
}
