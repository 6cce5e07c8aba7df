"""Discover: how does the program use each weight?

The same walk as the transform's, with the factors absent: each rule then reports what it
does with the weight's axes. The traced walk also shows which product is the output head.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rslora_jax.factors import LoraParams
from rslora_jax.flow import MARK, find_heads, find_hidden, find_reaching
from rslora_jax.paths import AdapterError
from rslora_jax.program import Program, all_consts, capture_example, is_array
from rslora_jax.quantized import struct_of
from rslora_jax.rewrites import new_walk
from rslora_jax.sites import Left, Site, Sites, Use
from rslora_jax.tracing import Held, Walk, evaluate, settle, where

__all__ = ["find_sites", "sites_of"]


def find_sites(apply_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Every weight of a model that a low-rank adapter can serve, with how it is used.

    Args:
      apply_fn: a pure function ``apply_fn(params, *args, **kwargs)``.
      params: its parameter pytree: arrays or `jax.ShapeDtypeStruct`s.
      *args: example arguments, concrete or abstract.
      **kwargs: example keyword arguments.

    Returns:
      The sites, without ranks; `.left` holds all other parameters with the reason.

    Raises:
      AdapterError: if no parameter is used at all (captured by a closure?), or if tracing
        fails because of how the function treats its arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((4, 8)), "v": jnp.ones((8, 2)), "scale": jnp.ones(8)}
      >>> model = lambda p, x: jnp.tanh(x @ p["w"] * p["scale"]) @ p["v"]
      >>> [(site.path, site.axes, site.head) for site in find_sites(model, params, jnp.ones(4))]
      [('v', 'io', True), ('w', 'io', False)]
    """
    program = capture_example(apply_fn, params, args, kwargs)
    return sites_of(program, inner=isinstance(params, LoraParams))


def sites_of(program: Program, *, inner: bool = False) -> Sites:
    """The sites of a traced program.

    Args:
      program: the traced apply function.
      inner: the parameters are a `LoraParams`: its factors are not adapted again.
    """
    _refuse_unused(program)
    recorder = _Recorder(program)
    heads = find_heads(_probed(program, recorder))
    hidden = find_hidden(program.jaxpr, [program.base.paths[k] for k in program.weights])
    sites, left = [], []
    for path, leaf in zip(program.base.paths, program.base.leaves, strict=True):
        is_factor = inner and path.startswith("lora/")
        reports = [report for report in recorder.reports if report.path == path]
        entry = _judge(path, leaf, reports, heads, is_factor=is_factor)
        direct = is_factor or any(report.use.kind == "product" for report in reports)
        if isinstance(entry, Left) and path in hidden and len(entry.shape) > 1 and not direct:
            entry = dataclasses.replace(entry, matrix=True, hidden=True)
        (sites if isinstance(entry, Site) else left).append(entry)
    total = sum(leaf.size for leaf in program.base.leaves if is_array(leaf))
    return Sites(sites, left, total)


@dataclasses.dataclass(frozen=True)
class _Report:
    """One use, with the view of the weight that it saw."""

    path: str
    use: Use
    view: tuple[frozenset[int], ...]
    name: str


class _Recorder:
    """Collects reports; the same use seen again (a body traced twice) counts once."""

    def __init__(self, program: Program) -> None:
        leaves = zip(program.base.paths, program.base.leaves, strict=True)
        self.ndims = {path: leaf.ndim for path, leaf in leaves if is_array(leaf)}
        self.seen: dict[Any, _Report] = {}

    @property
    def reports(self) -> Iterable[_Report]:
        return self.seen.values()

    def __call__(
        self,
        walk: Walk,
        held: Held,
        eqn: Any,
        kind: str,
        roles: Sequence[str],
        *,
        whole: bool = False,
        reason: str = "",
    ) -> str:
        key = (held.path, id(eqn), tuple(map(id, walk.callers)), held.view, kind)
        if key not in self.seen:
            primitive = "output" if eqn is None else eqn.primitive.name
            place = "the function's output" if eqn is None else where(walk, eqn)
            letters = _letters(held, kind, roles, self.ndims[held.path])
            use = Use(primitive, kind, place, letters, whole or walk.inside, reason)
            self.seen[key] = _Report(
                held.path, use, held.view, f"{MARK}{len(self.seen)}:{held.path}"
            )
        return self.seen[key].name


def _letters(held: Held, kind: str, roles: Sequence[str], ndim: int) -> str:
    """One letter for each axis of the weight: summed over wins, then kept, then stacked."""
    if kind == "lookup":
        return "".join("i" if k in held.rows else "o" for k in range(ndim))
    if kind != "product":
        return ""
    seen = [{r for r, v in zip(roles, held.view, strict=True) if k in v} for k in range(ndim)]
    return "".join("i" if "i" in s else "o" if "o" in s else "b" for s in seen)


def _probed(program: Program, recorder: _Recorder) -> Any:
    """The program traced again with every matrix held without factors."""
    walk = new_walk(recorder)

    def run(weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        probes = [
            _probe(program.base.paths[k], weight)
            for k, weight in zip(program.weights, weights, strict=True)
        ]
        results = evaluate(walk, program.jaxpr, program.consts, [*probes, *inputs])
        return [settle(walk, None, result, kind="output") for result in results]

    weights = [struct_of(program.base.leaves[k]) for k in program.weights]
    return jax.make_jaxpr(run)(weights, program.inputs)


def _probe(path: str, weight: Any) -> Any:
    if _not_a_matrix(weight):
        return weight
    view = tuple(frozenset({k}) for k in range(weight.ndim))
    return Held(weight, (), path, view)


def _not_a_matrix(leaf: Any) -> str:
    if not is_array(leaf):
        return "not an array"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{leaf.dtype}, not floating point"
    return "" if leaf.ndim >= 2 else ("a vector" if leaf.ndim else "a scalar")


def _judge(
    path: str, leaf: Any, reports: Sequence[_Report], heads: set[str], *, is_factor: bool
) -> Site | Left:
    shape = tuple(getattr(leaf, "shape", ()))
    alone = "a factor of the inner adapter" if is_factor else _not_a_matrix(leaf)
    if alone:
        return Left(path, shape, alone)
    uses = tuple(report.use for report in reports)
    if not uses:
        return Left(path, shape, "never used by the traced program", matrix=True)
    axes = _axes(reports)
    site = Site(
        path,
        axes or _plain_axes(leaf.ndim),
        shape,
        jax.dtypes.canonicalize_dtype(leaf.dtype).name,
        uses,
        embedding=any(use.kind == "lookup" for use in uses),
        head=_is_head(reports, heads),
    )
    blocked = _blocked(reports, axes)
    if not blocked:
        return site
    hidden = not axes and any(_hides(report) for report in reports)
    return Left(path, shape, blocked, matrix=True, hidden=hidden, site=site)


def _is_head(reports: Sequence[_Report], heads: set[str]) -> bool:
    """Every product of the weight is an output's; a stack whose last layer is one is none."""
    products = [report.name in heads for report in reports if report.use.kind == "product"]
    return bool(products) and all(products)


def _hides(report: _Report) -> bool:
    """Whether a use may hide a product: anything but a bias, a norm's scale or a table."""
    real = [origin for origin in report.view if origin]
    if report.use.kind != "opaque" or report.use.whole or len(real) < 2:
        return False
    broadcast = len(real) < len(report.view)
    return not (
        report.use.primitive in ("add", "sub") or (report.use.primitive == "mul" and broadcast)
    )


def _axes(reports: Sequence[_Report]) -> str:
    """The letters of the first use that every other use can live with; lookups first."""
    candidates = [r.use.roles for r in reports if r.use.kind == "lookup"]
    candidates += [r.use.roles for r in reports if r.use.kind == "product"]
    matrices = [letters for letters in candidates if {"i", "o"} <= set(letters)]
    agreed = [c for c in matrices if not any(_disagrees(c, report) for report in reports)]
    return (agreed or matrices or [""])[0]


def _disagrees(axes: str, report: _Report) -> bool:
    """Whether a use needs axes together that `axes` gives to different factors."""
    use = report.use
    if use.kind == "opaque" or use.whole:
        return False
    if use.primitive in ("conv_general_dilated", "ragged_dot_general"):
        return axes not in (use.roles, use.roles.translate(str.maketrans("io", "oi")))
    return any(len({axes[k] for k in origin}) > 1 for origin in report.view)


def _plain_axes(ndim: int) -> str:
    """The axes of a weight whose use does not tell them: the last is the output."""
    return "i" * (ndim - 1) + "o"


def _blocked(reports: Sequence[_Report], axes: str) -> str:
    """Why a weight cannot be adapted; empty if it can."""
    opaque = [r.use for r in reports if r.use.kind == "opaque" and not r.use.whole]
    products = [r.use for r in reports if r.use.kind in ("product", "lookup")]
    if opaque:
        also = " besides its matrix product" if products else ", not by a matrix product"
        return f"used by {opaque[0]}{also}"
    if not axes:
        return f"{reports[0].use}: no axis is summed over while another is kept"
    clash = [r.use for r in reports if _disagrees(axes, r)]
    return f"{clash[0]}: it joins axes that another use keeps apart" if clash else ""


def _refuse_unused(program: Program) -> None:
    paths = [program.base.paths[k] for k in program.weights]
    if not find_reaching(program.jaxpr, paths):
        held = [c for c in all_consts(program) if getattr(c, "ndim", 0) >= 2]
        hint = (
            f"It closes over {len(held)} arrays, such as one of shape {held[0].shape}: are the "
            "parameters captured by a closure instead of passed? "
            if held
            else ""
        )
        raise AdapterError(
            f"The apply function never uses any of its {len(paths)} parameters. {hint}"
            "Write it as a function of the parameters: apply_fn(params, *args)."
        )
