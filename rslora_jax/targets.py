"""Targets: which of the weights that were found get an adapter, and of what rank.

Every request that would silently do nothing is refused, with the nearest paths.
"""

import dataclasses
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from rslora_jax.axes import fan_in, fan_out
from rslora_jax.config import SCALINGS, LoraConfig, Rule, Scaling, scale
from rslora_jax.paths import AdapterError, nearest
from rslora_jax.sites import Left, Site, Sites

__all__ = ["choose", "config_of", "scaling_of"]


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


def config_of(sites: Sequence[Site]) -> LoraConfig:
    """The config that makes `adapt` give these sites again: the inverse of `choose`.

    Args:
      sites: sites with rank, alpha and scale.

    Returns:
      A config that targets exactly these paths, with a rule for each site whose rank or
      alpha is not the most common one. The dtype of the factors is left at its default.

    Raises:
      AdapterError: if there are no sites, a site has no rank, or no scaling gives all scales.

    Example:
      >>> site = Site("w", "io", (2, 2), "float32", rank=4, alpha=2.0, scale=1.0)
      >>> config = config_of([site])
      >>> config.rank, config.alpha, config.scaling, config.targets
      (4, 2.0, 'rslora', 'w')
    """
    if not sites:
        raise AdapterError("A config was asked for, found no sites: name at least one.")
    scaling = scaling_of(sites)
    pairs = Counter((site.rank, site.alpha) for site in sites)
    rank, alpha = pairs.most_common(1)[0][0]
    assert rank is not None and alpha is not None  # `scaling_of` has seen to it
    rules = tuple(
        Rule(re.escape(site.path), site.rank, site.alpha)
        for site in sites
        if (site.rank, site.alpha) != (rank, alpha)
    )
    targets = "|".join(re.escape(site.path) for site in sites)
    merge = "merge" if any(site.merge for site in sites) else "error"
    return LoraConfig(rank, alpha, targets, (), rules, scaling, unsupported=merge)


def scaling_of(sites: Sequence[Site]) -> Scaling:
    """The scaling rule that gives the scale of every site; ``"rslora"`` if both do (rank 1).

    Raises:
      AdapterError: if a site has no rank, alpha or scale, or neither rule gives all scales.

    Example:
      >>> scaling_of([Site("w", "io", (2, 2), "float32", rank=4, alpha=2.0, scale=0.5)])
      'lora'
    """
    wrong: dict[Scaling, Site] = {}
    for scaling in SCALINGS:
        misfits = [site for site in sites if not _is_scaled(site, scaling)]
        if not misfits:
            return scaling
        wrong[scaling] = misfits[0]
    found = "; ".join(
        f"{site.path!r} (rank {site.rank}, alpha {site.alpha:g}) has {site.scale:g}, and "
        f"{scaling!r} gives {scale(site.alpha or 1, site.rank or 1, scaling):g}"
        for scaling, site in wrong.items()
    )
    raise AdapterError(
        f"Scales must be alpha/sqrt(r) or alpha/r for all sites alike, found {found}. Use sites "
        "of one scaling: `algebra.convert` changes it."
    )


def _is_scaled(site: Site, scaling: str) -> bool:
    if site.rank is None or site.alpha is None or site.scale is None:
        raise AdapterError(f"{site.path!r} has no adapter yet: `adapt` gives it a rank.")
    return math.isclose(site.scale, scale(site.alpha, site.rank, scaling), rel_tol=1e-6)


def _target(found: Sites, config: LoraConfig) -> dict[str, str]:
    if config.targets == "all-linear":
        _warn_hidden(found, _exclude(found, config))
        return {path: "all-linear" for path in _all_linear(found)}
    paths = [site.path for site in found] + [left.path for left in found.left]
    chosen: dict[str, str] = {}
    for entry, matches in _entries(config.targets):
        matched = [path for path in paths if matches(path)]
        if not matched:
            raise AdapterError(_no_match("target", entry, config.targets, paths))
        usable = [path for path in matched if _is_matrix(found, path)]
        if not usable:
            raise AdapterError(_no_matrix(found, entry, matched))
        chosen.update({path: entry for path in usable if path not in chosen})
    return {path: chosen[path] for path in paths if path in chosen}


def _warn_hidden(found: Sites, excluded: set[str]) -> None:
    for left in found.left:
        if left.hidden and left.path not in excluded:
            warnings.warn(
                f"all-linear leaves out {left.path!r} of shape {left.shape}, which may be part of "
                f"a matrix product: {left.reason}. Name it in LoraConfig(exclude=[...]) if that is "
                f"meant.{_remedy(left)}",
                stacklevel=5,
            )


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


def _site(found: Sites, path: str, config: LoraConfig) -> Site:
    for site in found:
        if site.path == path:
            return dataclasses.replace(site, merge=config.unsupported == "merge")
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
            raise AdapterError(
                f"The rule {rule.pattern!r} matches none of the {len(paths)} adapted weights, as a "
                f"regex for whole paths. The nearest are {nearest(rule.pattern, paths)}. Correct "
                "it, leave it out, or choose the weight with targets: a rule chooses none."
            )


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
        f"The target {entry!r} matches only parameters that cannot be adapted, such as "
        f"{left.path!r} of shape {left.shape} ({left.reason}).{_remedy(left)} "
        f"The nearest weights that can be adapted are {nearest(entry, [s.path for s in found])}."
    )


def _blocked(left: Left) -> str:
    return (
        f"{left.path!r} of shape {left.shape} is targeted, but it cannot be adapted: "
        f"{left.reason}. Leave it out with LoraConfig(exclude=[{left.path!r}]).{_remedy(left)}"
    )


def _remedy(left: Left) -> str:
    if left.site is None:
        return ""
    return " Or target it with LoraConfig(unsupported='merge') to form W + scale * a @ b for it."


def _nothing(found: Sites, config: LoraConfig, excluded: set[str]) -> str:
    why = [f"{site.path!r}: {_why_not(site, excluded)}" for site in found]
    why += [f"{left.path!r}: {left.reason}" for left in found.left]
    return (
        f"Nothing is left to adapt with targets={config.targets!r}, exclude={config.exclude!r}. "
        f"Of {len(why)} parameters: {'; '.join(why[:8])}{'; ...' if len(why) > 8 else ''}. "
        "Name the weights that you want in LoraConfig(targets=[...])."
    )
