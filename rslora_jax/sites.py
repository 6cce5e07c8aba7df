"""Sites: one record for each weight, what the program does with it and which adapter it gets.

`choose` turns the weights that were found and the user's config into the sites that are
adapted, and refuses every request that would silently do nothing.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rslora_jax.axes import factor_shapes, fan_in, fan_out
from rslora_jax.config import LoraConfig, Rule, scale
from rslora_jax.paths import AdapterError, nearest

__all__ = ["Left", "Site", "Sites", "Use", "choose", "describe"]


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
      matrix: it is a matrix: the program uses it as one, or does not use it at all, so that
        targeting it is an error.
      site: the site it would be if its uses without a low-rank form were merged, else None.
    """

    path: str
    shape: tuple[int, ...]
    reason: str
    matrix: bool = False
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


def choose(found: Sites, config: LoraConfig) -> Sites:
    """Applies targets, exclude and rules to the weights that `find_sites` found.

    Args:
      found: the result of `find_sites`.
      config: what the user asked for.

    Returns:
      The sites to adapt, with rank, alpha and scale; everything else is in `.left`.

    Raises:
      AdapterError: if an entry of targets, exclude or rules matches nothing, if a target
        cannot be adapted, or if nothing is left to adapt.
    """
    targeted = _target(found, config)
    excluded = _exclude(found, config)
    kept = {path: rule for path, rule in targeted.items() if path not in excluded}
    sites = tuple(_resolve(_site(found, path, config), rule, config) for path, rule in kept.items())
    _check_rules(sites, config.rules)
    if not sites:
        raise AdapterError(_nothing(found, config, excluded))
    _warn_wide(sites)
    return Sites(sites, _left(found, sites, excluded), found.total)


def describe(sites: Sequence[Site]) -> str:
    """The report of what is adapted, by which rule and how, and of what is not and why.

    Args:
      sites: the result of `adapt` or `find_sites`.

    Returns:
      A table as text: one line a site, the totals, and the parameters left alone.
    """
    header = ("path", "axes", "shape", "by", "rank", "alpha", "scale", "a", "b", "parameters")
    rows = [header, *(_row(site) for site in sites)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
    ]
    notes = [f"formed whole: {s.path}: {use}" for s in sites for use in s.uses if _is_whole(s, use)]
    return "\n".join(line.rstrip() for line in [*lines, *_totals(sites), *notes, *_leavings(sites)])


def _target(found: Sites, config: LoraConfig) -> dict[str, str]:
    if config.targets == "all-linear":
        return {path: "all-linear" for path in _all_linear(found)}
    paths = [site.path for site in found] + [left.path for left in found.left]
    chosen: dict[str, str] = {}
    for entry, matches in _entries(config.targets):
        matched = [path for path in paths if matches(path)]
        if not matched:
            raise AdapterError(_no_match("target", entry, config.targets, paths))
        usable = [path for path in matched if _is_matrix(found, path)]
        if config.unsupported == "merge":
            usable = usable or [path for path in matched if _can_merge(found, path)]
        if not usable:
            raise AdapterError(_no_matrix(found, entry, matched))
        chosen.update({path: entry for path in usable if path not in chosen})
    return {path: chosen[path] for path in paths if path in chosen}


def _all_linear(found: Sites) -> list[str]:
    plain = [site.path for site in found if not (site.embedding or site.head)]
    blocked = [left.site for left in found.left if left.site is not None]
    return plain + [
        site.path
        for site in blocked
        if not (site.embedding or site.head) and any(use.kind == "product" for use in site.uses)
    ]


def _exclude(found: Sites, config: LoraConfig) -> set[str]:
    paths = [site.path for site in found] + [left.path for left in found.left]
    excluded: set[str] = set()
    for entry, matches in _entries(config.exclude):
        matched = [path for path in paths if matches(path)]
        if not matched:
            raise AdapterError(_no_match("exclude", entry, config.exclude, paths))
        excluded.update(matched)
    return excluded


def _entries(patterns: str | tuple[str, ...]) -> list[tuple[str, Callable[[str], bool]]]:
    if isinstance(patterns, str):
        return [(patterns, lambda path: re.fullmatch(patterns, path) is not None)]
    return [(suffix, _is_suffix(suffix)) for suffix in patterns]


def _is_suffix(suffix: str) -> Callable[[str], bool]:
    return lambda path: path == suffix or path.endswith("/" + suffix)


def _is_matrix(found: Sites, path: str) -> bool:
    return any(site.path == path for site in found) or any(
        left.path == path and left.matrix for left in found.left
    )


def _can_merge(found: Sites, path: str) -> bool:
    return any(left.path == path and left.site is not None for left in found.left)


def _site(found: Sites, path: str, config: LoraConfig) -> Site:
    for site in found:
        if site.path == path:
            return site
    left = next(left for left in found.left if left.path == path)
    if left.site is not None and config.unsupported == "merge":
        return dataclasses.replace(left.site, merge=True)
    raise AdapterError(_blocked(left))


def _resolve(site: Site, target: str, config: LoraConfig) -> Site:
    rule = next((r for r in config.rules if re.fullmatch(r.pattern, site.path)), None)
    rank = config.rank if rule is None or rule.rank is None else rule.rank
    alpha = config.alpha if rule is None or rule.alpha is None else rule.alpha
    return dataclasses.replace(
        site,
        rank=int(rank),
        alpha=float(alpha),
        scale=scale(float(alpha), int(rank), config.scaling),
        rule=target if rule is None else rule.pattern,
    )


def _check_rules(sites: Sequence[Site], rules: Sequence[Rule]) -> None:
    paths = [site.path for site in sites]
    for rule in rules:
        if not any(re.fullmatch(rule.pattern, path) for path in paths):
            raise AdapterError(_no_match("rule", rule.pattern, rule.pattern, paths))


def _warn_wide(sites: Sequence[Site]) -> None:
    for site in sites:
        most = min(fan_in(site.axes, site.shape), fan_out(site.axes, site.shape))
        if site.rank is not None and site.rank > most:
            warnings.warn(
                f"{site.path!r}: rank {site.rank} is above {most}, the largest rank that a "
                f"weight of axes {site.axes!r} and shape {site.shape} can have.",
                stacklevel=4,
            )


def _left(found: Sites, sites: Sequence[Site], excluded: set[str]) -> list[Left]:
    adapted = {site.path for site in sites}
    unchosen = [
        Left(site.path, site.shape, _why_not(site, excluded), matrix=True, site=site)
        for site in found
        if site.path not in adapted
    ]
    return unchosen + [left for left in found.left if left.path not in adapted]


def _why_not(site: Site, excluded: set[str]) -> str:
    if site.path in excluded:
        return "excluded"
    names = [name for name in ("embedding", "head") if getattr(site, name)]
    return f"not targeted ({' and '.join(names)})" if names else "not targeted"


def _no_match(what: str, entry: str, wanted: object, paths: Sequence[str]) -> str:
    how = "as a regex for whole paths" if isinstance(wanted, str) else "as a path suffix"
    return (
        f"The {what} {entry!r} matches nothing ({how}). The nearest paths are "
        f"{nearest(entry, paths)}. Correct it or leave it out; "
        "print(rl.find_sites(...)) lists every path."
    )


def _no_matrix(found: Sites, entry: str, matched: Sequence[str]) -> str:
    left = next(left for left in found.left if left.path == matched[0])
    return (
        f"The target {entry!r} matches only parameters that no matrix product uses, such as "
        f"{left.path!r} of shape {left.shape} ({left.reason}).{_remedy(left)} The nearest weights that can be adapted are {nearest(entry, [s.path for s in found])}."
    )


def _blocked(left: Left) -> str:
    return (
        f"{left.path!r} of shape {left.shape} is targeted, but it cannot be adapted: "
        f"{left.reason}. Leave it out with LoraConfig(exclude=[{left.path!r}]).{_remedy(left)}"
    )


def _remedy(left: Left) -> str:
    if left.site is None:
        return ""
    return " Or set LoraConfig(unsupported='merge') to form W + scale * a @ b for it."


def _nothing(found: Sites, config: LoraConfig, excluded: set[str]) -> str:
    why = [f"{site.path!r}: {_why_not(site, excluded)}" for site in found]
    why += [f"{left.path!r}: {left.reason}" for left in found.left]
    return (
        f"Nothing is left to adapt with targets={config.targets!r}, exclude={config.exclude!r}. "
        f"Of {len(why)} parameters: {'; '.join(why[:8])}{'; ...' if len(why) > 8 else ''}. "
        "Name the weights that you want in LoraConfig(targets=[...])."
    )


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
