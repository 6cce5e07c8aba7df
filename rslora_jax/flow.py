"""Flow: what reaches what in a program, read off its data flow and not off names.

`find_heads` looks for the products that reach an output and no other product;
`find_hidden` for weights that reach a product through something that is no move;
`find_varying` for indices that differ from device to device.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from rslora_jax.tracing import open_jaxpr, scan_counts

__all__ = ["MARK", "find_heads", "find_hidden", "find_reaching", "find_varying"]

MARK = "rslora_jax:"
"""Prefix of the names that discovery gives to the results of products."""

INPUT = "rslora_jax input"
"""The tag of everything that depends on the function's arguments."""

Tags: TypeAlias = frozenset[str]
Visit: TypeAlias = Callable[[JaxprEqn, Sequence[Tags]], Tags | None]


def find_heads(closed: Any) -> set[str]:
    """Names of the products of one weight that give an output alone and feed no other product.

    Args:
      closed: a program in which the result of every product carries a name that is `MARK`,
        a number, a colon and the weight's path.
    """
    jaxpr, _ = open_jaxpr(closed)
    fed: set[str] = set()

    def visit(eqn: JaxprEqn, tags: Sequence[Tags]) -> Tags | None:
        name = str(eqn.params.get("name"))
        if eqn.primitive.name != "name" or not name.startswith(MARK):
            return None
        fed.update(tags[0])
        return frozenset({name})

    outs = _spread(jaxpr, [frozenset()] * len(jaxpr.invars), visit)
    alone = [tags for tags in outs if len({name.split(":", 2)[2] for name in tags}) == 1]
    return {name for tags in alone for name in tags if name not in fed}


def find_hidden(jaxpr: Jaxpr, paths: Sequence[str]) -> dict[str, JaxprEqn]:
    """Weights from which alone one operand of a product with an activation is computed.

    Args:
      jaxpr: the program as the user wrote it.
      paths: the paths of its first inputs, the parameters; the other inputs are arguments.

    Returns:
      The product that each such weight reaches, whatever lies between.
    """
    found: dict[str, JaxprEqn] = {}

    def visit(eqn: JaxprEqn, tags: Sequence[Tags]) -> Tags | None:
        if _sums(eqn) and any(INPUT in side for side in tags):
            found.update((path, eqn) for side in tags if INPUT not in side for path in side)
        return None

    rest = len(jaxpr.invars) - len(paths)
    _spread(jaxpr, [*(frozenset({path}) for path in paths), *[frozenset({INPUT})] * rest], visit)
    return found


def find_reaching(jaxpr: Jaxpr, paths: Sequence[str]) -> Tags:
    """The parameters, `paths` being those of the first inputs, that any output depends on."""
    rest = len(jaxpr.invars) - len(paths)
    tags = [*(frozenset({path}) for path in paths), *[frozenset[str]()] * rest]
    return _union(_spread(jaxpr, tags, lambda eqn, ins: None))


def find_varying(eqn: JaxprEqn) -> dict[int, Tags]:
    """The mesh axes along which the indices of a shard_map's slices and gathers may differ.

    Args:
      eqn: the shard_map.

    Returns:
      Names of mesh axes, by the id of each `dynamic_slice` and `gather` in its program.
    """
    found: dict[int, Tags] = {}

    def visit(eqn: JaxprEqn, tags: Sequence[Tags]) -> Tags | None:
        name = eqn.primitive.name
        if name == "axis_index":
            return frozenset(_names(eqn.params["axis_name"]))
        if name in ("dynamic_slice", "gather"):
            found[id(eqn)] = found.get(id(eqn), frozenset()) | _union(tags[1:])
        if name in ("cond", "while"):  # which branch, and how many rounds, may differ as well
            _through(eqn, tags, visit)
            return _union(tags)
        return None

    specs = eqn.params["in_specs"]
    ins = [frozenset(name for entry in spec for name in _names(entry)) for spec in specs]
    _spread(open_jaxpr(eqn.params["jaxpr"])[0], ins, visit)
    return found


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec, or of a collective."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _sums(eqn: JaxprEqn) -> bool:
    """Whether an equation is a product that sums over an axis."""
    if eqn.primitive.name == "dot_general":
        return bool(eqn.params["dimension_numbers"][0][0])
    return eqn.primitive.name in ("ragged_dot_general", "conv_general_dilated")


def _spread(jaxpr: Jaxpr, ins: Sequence[Tags], visit: Visit) -> list[Tags]:
    """The tags of a program's outputs: `visit` gives those of an equation, or None for all."""
    env: dict[Var, Tags] = dict(zip(jaxpr.invars, ins, strict=True))

    def read(var: Any) -> Tags:
        return frozenset() if isinstance(var, Literal) else env.get(var, frozenset())

    for eqn in jaxpr.eqns:
        tags = [read(v) for v in eqn.invars]
        visited = visit(eqn, tags)
        if visited is not None:
            results = [visited] * len(eqn.outvars)
        else:
            results = _through(eqn, tags, visit)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _through(eqn: JaxprEqn, tags: Sequence[Tags], visit: Visit) -> list[Tags]:
    params: Mapping[str, Any] = eqn.params
    name = eqn.primitive.name
    if name == "cond":
        outs = [_spread(open_jaxpr(b)[0], tags[1:], visit) for b in params["branches"]]
        return [_union(column) for column in zip(*outs, strict=True)]
    if name == "while":
        skip, n = params["cond_nconsts"], params["body_nconsts"]
        body = open_jaxpr(params["body_jaxpr"])[0]
        return _loop(body, tags[skip : skip + n], tags[skip + n :], [], visit)
    if name == "scan":
        n, m = scan_counts(eqn)
        body = open_jaxpr(params["jaxpr"])[0]
        return _loop(body, tags[:n], tags[n : n + m], tags[n + m :], visit)
    inner = next((open_jaxpr(params[k])[0] for k in ("jaxpr", "call_jaxpr") if k in params), None)
    if inner is not None and len(inner.invars) == len(tags):
        return _spread(inner, tags, visit)
    return [_union(tags)] * len(eqn.outvars)


def _loop(
    jaxpr: Jaxpr, consts: Sequence[Tags], carry: Sequence[Tags], xs: Sequence[Tags], visit: Visit
) -> list[Tags]:
    """A loop's carry feeds itself: repeat until nothing new reaches it."""
    while True:
        outs = _spread(jaxpr, [*consts, *carry, *xs], visit)
        wider = [_union(pair) for pair in zip(carry, outs, strict=False)]
        if wider == list(carry):
            return outs
        carry = wider


def _union(tags: Iterable[Tags]) -> Tags:
    return frozenset().union(*tags)
