"""Sites: one record for each weight, what the program does with it and which adapter it gets."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rslora_jax.axes import factor_shapes
from rslora_jax.paths import AdapterError
from rslora_jax.tables import align

__all__ = ["Left", "Site", "Sites", "Use", "describe"]


@dataclasses.dataclass(frozen=True)
class Use:
    """One place in the program that consumes a weight.

    Attributes:
      primitive: the JAX primitive, such as ``dot_general``.
      kind: ``"product"``, ``"lookup"`` (rows of an embedding), ``"output"`` (returned by
        the function), or ``"opaque"`` (anything without a low-rank form).
      where: the user's file, line and function.
      roles: one letter for each axis of the weight as the use sees it: ``i`` summed over,
        ``o`` kept, ``b`` stacked or indexed away; empty when the use is no product.
      whole: the weight is formed there as W + scale * a @ b, because the use has a
        derivative rule of its own that needs it (``custom_vjp``, ``custom_jvp``).
      reason: why the use has no low-rank form; empty when it has one.
    """

    primitive: str
    kind: str
    where: str
    roles: str = ""
    whole: bool = False
    reason: str = ""

    def __str__(self) -> str:
        return f"`{self.primitive}` at {self.where}" + (f" ({self.reason})" if self.reason else "")


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight that an adapter can serve and, after `adapt`, the adapter that it got.

    Attributes:
      path: the weight's path in the parameter tree.
      axes: one letter for each axis: ``b`` stacked, ``i`` input, ``o`` output.
      shape: the weight's shape.
      dtype: the weight's dtype, by name.
      uses: where the program consumes the weight.
      embedding: rows of the weight are looked up.
      head: the weight's product is an output of the function, through no other site.
      rank: the adapter's rank; None before `adapt`.
      alpha: the numerator of the scale; None before `adapt`.
      scale: what multiplies a @ b, from `config.scale`; None before `adapt`.
      rule: the target or rule that chose it.
      merge: uses without a low-rank form get W + scale * a @ b.
    """

    path: str
    axes: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[Use, ...] = ()
    embedding: bool = False
    head: bool = False
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    rule: str = ""
    merge: bool = False

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `a` [b.., i.., r] and `b` [b.., r, o..]."""
        if self.rank is None:
            raise AdapterError(f"{self.path!r} has no adapter yet: `adapt` gives it a rank.")
        return factor_shapes(self.axes, self.shape, self.rank)

    @property
    def parameters(self) -> int:
        """How many numbers the two factors hold."""
        return sum(math.prod(shape) for shape in self.factor_shapes)


@dataclasses.dataclass(frozen=True)
class Left:
    """A parameter without an adapter, and the reason.

    Attributes:
      path: the parameter's path.
      shape: its shape.
      reason: why it was left alone, or why it cannot be adapted.
      matrix: it has at least two axes, so that targeting it is an error.
      hidden: it may reach a matrix product through something that is no move, such as a
        normalization of the weight.
      site: the site it would be if its uses without a low-rank form were merged, else None.
    """

    path: str
    shape: tuple[int, ...]
    reason: str
    matrix: bool = False
    hidden: bool = False
    site: Site | None = None


class Sites(tuple[Site, ...]):
    """The sites, in the order of the parameter tree; `print` shows the full report.

    Attributes:
      left: every other parameter, with the reason.
      total: the number of parameters of the base.
    """

    left: tuple[Left, ...]
    total: int

    def __new__(
        cls, sites: Iterable[Site] = (), left: Iterable[Left] = (), total: int = 0
    ) -> "Sites":
        """Makes the tuple and attaches what was left alone."""
        self = super().__new__(cls, sites)
        self.left = tuple(left)
        self.total = total
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.left, self.total

    def __str__(self) -> str:
        return describe(self)


def describe(sites: Sequence[Site]) -> str:
    """The report of what is adapted, by which rule and how, and of what is not and why.

    Args:
      sites: the result of `adapt` or `find_sites`.

    Returns:
      A table as text: one line a site, the totals, and the parameters left alone.
    """
    header = ("path", "axes", "shape", "by", "rank", "alpha", "scale", "a", "b", "parameters")
    lines = align([header, *(_row(site) for site in sites)])
    notes = [f"formed whole: {s.path}: {use}" for s in sites for use in s.uses if _is_whole(s, use)]
    return "\n".join([*lines, *_totals(sites), *notes, *_leavings(sites)])


def _row(site: Site) -> tuple[str, ...]:
    shape = "x".join(map(str, site.shape))
    if site.rank is None or site.scale is None:
        marks = [name for name in ("embedding", "head") if getattr(site, name)]
        return (site.path, site.axes, shape, " ".join(marks), *[""] * 6)
    a, b = ("x".join(map(str, s)) for s in site.factor_shapes)
    numbers = (str(site.rank), f"{site.alpha:g}", f"{site.scale:.4g}")
    return (site.path, site.axes, shape, site.rule, *numbers, a, b, f"{site.parameters:,}")


def _totals(sites: Sequence[Site]) -> list[str]:
    total = getattr(sites, "total", 0)
    if not any(site.rank for site in sites):
        return [f"{len(sites)} weights can be adapted, of {total:,} parameters"]
    trains = sum(site.parameters for site in sites)
    share = f" of {total + trains:,} ({100 * trains / (total + trains):.2f} %)" if total else ""
    return [f"trainable parameters: {trains:,}{share} in {len(sites)} sites"]


def _is_whole(site: Site, use: Use) -> bool:
    return use.whole or (use.kind == "opaque" and site.merge)


def _leavings(sites: Sequence[Site]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for left in getattr(sites, "left", ()):
        reasons.setdefault(left.reason, []).append(left.path)
    return [f"left alone, {reason}: {_some(paths)}" for reason, paths in reasons.items()]


def _some(paths: list[str], most: int = 6) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more
