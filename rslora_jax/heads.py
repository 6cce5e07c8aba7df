"""Heads: which product reaches an output of the program, and no other product?

Read off the program by data flow, not by a parameter's name. Discovery has wrapped the
result of every product in a name that starts with `MARK`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from rslora_jax.tracing import open_jaxpr, scan_counts

__all__ = ["MARK", "find_heads"]

MARK = "rslora_jax:"
"""Prefix of the names that discovery gives to the results of products."""


def find_heads(closed: Any) -> set[str]:
    """Names of the products that an output depends on alone and that feed no other product."""
    jaxpr, _ = open_jaxpr(closed)
    fed: set[str] = set()
    outs = _flow(jaxpr, [frozenset()] * len(jaxpr.invars), fed)
    return {name for tags in outs if len(tags) == 1 for name in tags if name not in fed}


def _flow(jaxpr: Jaxpr, ins: Sequence[frozenset[str]], fed: set[str]) -> list[frozenset[str]]:
    """Which products reach each output through no other product; `fed` collects the rest."""
    env: dict[Var, frozenset[str]] = dict(zip(jaxpr.invars, ins, strict=True))

    def read(var: Any) -> frozenset[str]:
        return frozenset() if isinstance(var, Literal) else env.get(var, frozenset())

    for eqn in jaxpr.eqns:
        tags = [read(v) for v in eqn.invars]
        name = eqn.params.get("name")
        if eqn.primitive.name == "name" and str(name).startswith(MARK):
            fed |= tags[0]
            results = [frozenset({str(name)})]
        else:
            results = _flow_through(eqn, tags, fed)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _flow_through(eqn: JaxprEqn, tags: list[frozenset[str]], fed: set[str]) -> list[frozenset[str]]:
    params: Mapping[str, Any] = eqn.params
    name = eqn.primitive.name
    if name == "cond":
        outs = [_flow(open_jaxpr(b)[0], tags[1:], fed) for b in params["branches"]]
        return [frozenset().union(*column) for column in zip(*outs, strict=True)]
    if name == "while":
        skip, n = params["cond_nconsts"], params["body_nconsts"]
        body = open_jaxpr(params["body_jaxpr"])[0]
        return _fixpoint(body, tags[skip : skip + n], tags[skip + n :], [], fed)
    if name == "scan":
        n, m = scan_counts(eqn)
        body = open_jaxpr(params["jaxpr"])[0]
        return _fixpoint(body, tags[:n], tags[n : n + m], tags[n + m :], fed)
    inner = next((open_jaxpr(params[k])[0] for k in ("jaxpr", "call_jaxpr") if k in params), None)
    if inner is not None and len(inner.invars) == len(tags):
        return _flow(inner, tags, fed)
    return [frozenset().union(*tags)] * len(eqn.outvars)


def _fixpoint(
    jaxpr: Jaxpr,
    consts: list[frozenset[str]],
    carry: list[frozenset[str]],
    xs: list[frozenset[str]],
    fed: set[str],
) -> list[frozenset[str]]:
    """A loop's carry feeds itself: repeat until nothing new reaches it."""
    while True:
        outs = _flow(jaxpr, [*consts, *carry, *xs], fed)
        wider = [a | b for a, b in zip(carry, outs, strict=False)]
        if wider == carry:
            return outs
        carry = wider
