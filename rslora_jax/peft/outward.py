"""Outward: factors and sites of this library as a PEFT adapter."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rslora_jax.factors import factors_of
from rslora_jax.paths import AdapterError
from rslora_jax.peft.arrange import factors_out
from rslora_jax.peft.keeping import Saved, Tokens, kept, rows_of, tensors_of_leaves
from rslora_jax.peft.modules import PARAMETERS, Module, PeftAdapter
from rslora_jax.peft.names import LLAMA
from rslora_jax.peft.patterns import ends_with, matches
from rslora_jax.peft.placing import Placed, place, places_of, refuse_tied
from rslora_jax.peft.rules import Name, find, module_of
from rslora_jax.peft.settings import Settings
from rslora_jax.sites import Site
from rslora_jax.targets import scaling_of

__all__ = ["FORMS", "to_adapter"]

FORMS = ("native", "portable")


def to_adapter(  # noqa: PLR0913
    lora: Mapping[str, Any],
    sites: Sequence[Site],
    names: Sequence[Name] = LLAMA,
    form: str = "native",
    *,
    base_model: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    saved: Saved | None = None,
    tokens: Tokens | None = None,
    fan_in_fan_out: bool | None = None,
    dtype: Any = None,
) -> PeftAdapter:
    """Makes the PEFT adapter that computes the same: the pure half of `save`, which see.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> from rslora_jax.peft.names import names
      >>> site = rl.Site("w", "io", (2, 3), "float32", rank=4, alpha=2.0, scale=1.0)
      >>> lora = {"w": {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 3))}}
      >>> adapter = to_adapter(lora, [site], names([("w", "lin.weight")]))
      >>> adapter.settings.use_rslora, adapter.modules[0].name, adapter.modules[0].b.shape
      (True, 'lin', (3, 4))
    """
    if form not in FORMS:
        raise AdapterError(f"form must be one of {FORMS}, found {form!r}.")
    if not sites or not lora:
        raise AdapterError("An adapter was to be written, found no factors. Pass lora and sites.")
    rules = tuple(names)
    placed, modules = _modules(lora, sites, rules)
    if form == "portable":
        most = max(module.rank for module in modules)
        modules = [_folded(module, most, dtype) for module in modules]
    modules = [_cast(module, dtype) for module in modules]
    settings = _settings(modules, form, sites)
    if fan_in_fan_out is None:
        fan_in_fan_out = any(p.layout.kind == "linear" and p.layout.stored == "io" for p in placed)
    full, where = tensors_of_leaves(saved or {}, rules, sites, dtype)
    rows = rows_of(tokens or {}, rules, sites, dtype)
    places_of([*placed, *(one for one in where if one.path not in {p.path for p in placed})])
    settings = dataclasses.replace(
        settings,
        **_targets(modules, sites, rules),
        **kept(full, modules),
        trainable_token_indices={name: at for name, (at, _) in rows.items()} or None,
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=base_model,
        task_type=task_type,
    )
    _check_scales(settings, modules)
    return PeftAdapter(settings, tuple(modules), full, rows)


def _modules(
    lora: Mapping[str, Any], sites: Sequence[Site], rules: tuple[Name, ...]
) -> tuple[list[Placed], list[Module]]:
    factors = factors_of(lora, sites)
    placed, modules = [], []
    for site in sites:
        one = place(rules, site.path, jax.ShapeDtypeStruct(site.shape, np.float32), site)
        refuse_tied(one, None)
        placed.append(one)
        # One site's factors at a time leave the devices.
        a, b = (_finite(site.path, name, factors[site.path][name]) for name in "ab")
        modules += [_module(one, site, (a, b), at) for at in one.names()]
    places_of(placed)
    return placed, _with_depths(modules)


def _module(
    placed: Placed, site: Site, factors: tuple[np.ndarray, np.ndarray], at: tuple[int, ...]
) -> Module:
    assert site.rank is not None and site.alpha is not None and site.scale is not None
    name, parameter = module_of(placed.names()[at])
    if parameter == "bias" or not name:
        raise AdapterError(
            f"{site.path!r} is named {placed.names()[at]!r}, which is no weight of a module. An "
            "adapted weight is named 'module.weight', or 'module.parameter'."
        )
    a, b = factors_out(placed.layout, *factors, at)
    kind = placed.layout.kind
    return Module(name, kind, a, b, site.rank, site.alpha, site.scale, parameter=parameter)


def _finite(path: str, name: str, factor: Any) -> np.ndarray:
    array = np.asarray(jax.device_get(factor))
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise AdapterError(
            f"{path + '/' + name!r} holds {bad} values that are NaN or infinite, of {array.size}. "
            "The training diverged: write an earlier checkpoint."
        )
    return array


def _with_depths(modules: Sequence[Module]) -> list[Module]:
    """Several parameters of one module nest: the first that it registers lies deepest."""
    owners: dict[str, list[str]] = {}
    for module in modules:
        owners.setdefault(module.name, []).append(module.parameter)
    for parameters in owners.values():
        if set(parameters) <= set(PARAMETERS):
            parameters.sort(key=PARAMETERS.index)
    depths = {
        (owner, parameter): len(parameters) - 1 - k
        for owner, parameters in owners.items()
        for k, parameter in enumerate(parameters)
    }
    return [module._replace(depth=depths[module.name, module.parameter]) for module in modules]


def _folded(module: Module, rank: int, dtype: Any) -> Module:
    """The module at the largest rank and scale 1: its own scale is in B."""
    pad, stacked = rank - module.rank, module.kind == "expert"
    a, b = module.a, module.b
    wide = np.float64 if b.dtype == np.float64 else np.float32
    if module.scale != 1:
        with np.errstate(over="ignore"):  # `_cast` finds it
            b = (b.astype(wide) * wide(module.scale)).astype(dtype or b.dtype)
    a = np.pad(a, [(0, pad if k == stacked else 0) for k in range(a.ndim)])
    b = np.pad(b, [(0, pad if k == 1 + stacked else 0) for k in range(b.ndim)])
    return module._replace(a=a, b=b, rank=rank, alpha=rank, scale=1.0)


def _cast(module: Module, dtype: Any) -> Module:
    with np.errstate(over="ignore"):  # it is an error below
        a, b = (array.astype(dtype or array.dtype) for array in (module.a, module.b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise AdapterError(
            f"{module.name!r} overflows in {b.dtype.name}. Write it with dtype='float32' or "
            "'bfloat16'."
        )
    return module._replace(a=a, b=b)


def _settings(modules: Sequence[Module], form: str, sites: Sequence[Site]) -> Settings:
    if form == "portable":
        rank = modules[0].rank
        return Settings(rank, rank, use_rslora=False)
    rank = Counter(module.rank for module in modules).most_common(1)[0][0]
    alpha = Counter(_number(module.alpha) for module in modules).most_common(1)[0][0]
    ranks = {_pattern(m, modules): m.rank for m in modules if m.rank != rank}
    alphas = {_pattern(m, modules): _number(m.alpha) for m in modules if m.alpha != alpha}
    use_rslora = scaling_of(sites) == "rslora"
    return Settings(
        rank, alpha, use_rslora, dict(sorted(ranks.items())), dict(sorted(alphas.items()))
    )


def _number(alpha: float) -> int | float:
    """An int where it is one: older readers take no float."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _full_name(module: Module) -> str:
    return f"{module.name}.{module.parameter}" if module.parameter else module.name


def _pattern(module: Module, modules: Sequence[Module]) -> str:
    """A pattern that matches one module alone, so that the order of patterns has no meaning."""
    escaped = re.escape(_full_name(module))
    hits = sum(matches(escaped, _full_name(other)) for other in modules)
    return escaped if hits == 1 else "^" + escaped


def _check_scales(settings: Settings, modules: Sequence[Module]) -> None:
    for module in modules:
        name = _full_name(module)
        found = (settings.rank_alpha(name)[0], settings.scale(name))
        if found[0] != module.rank or not math.isclose(found[1], module.scale, rel_tol=1e-6):
            raise AdapterError(
                f"{name!r} has rank {module.rank} and scale {module.scale:g}, and PEFT would read "
                f"rank {found[0]} and scale {found[1]:g}. Write form='portable', which needs no "
                "patterns."
            )


def _targets(
    modules: Sequence[Module], sites: Sequence[Site], rules: tuple[Name, ...]
) -> dict[str, Any]:
    whole = [module.name for module in modules if not module.parameter]
    parameters = tuple(_full_name(module) for module in modules if module.parameter)
    return {
        "target_modules": _shortened(whole, sites, rules),
        "target_parameters": parameters or None,
    }


def _shortened(
    whole: Sequence[str], sites: Sequence[Site], rules: tuple[Name, ...]
) -> tuple[str, ...]:
    """Last parts of names where nothing else of the base ends so; whole names where it may."""
    if not getattr(sites, "total", 0):
        return tuple(whole)
    others: set[str] = set()
    for left in getattr(sites, "left", ()):
        found = find(rules, left.path)
        # What has no name could have any.
        others.add(module_of(found.tensor)[0] if found is not None else "*")
    if "*" in others:
        return tuple(whole)
    return tuple(
        dict.fromkeys(
            name if any(ends_with(other, _last(name)) for other in others) else _last(name)
            for name in whole
        )
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]
