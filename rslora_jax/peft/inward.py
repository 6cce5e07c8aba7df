"""Inward: a PEFT adapter as factors, sites and a base of this library."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rslora_jax.config import LoraConfig
from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError, flatten, insert, nearest
from rslora_jax.peft.arrange import factor_shapes, factors_in
from rslora_jax.peft.backwards import tree_of
from rslora_jax.peft.coverage import check_coverage
from rslora_jax.peft.modules import Module, PeftAdapter
from rslora_jax.peft.names import LLAMA
from rslora_jax.peft.placing import Placed, Where, base_of, place_all, places_of, refuse_tied
from rslora_jax.peft.replacing import replaced_base
from rslora_jax.peft.rules import Name
from rslora_jax.peft.settings import Settings
from rslora_jax.sites import Left, Site, Sites
from rslora_jax.targets import config_of

__all__ = ["Loaded", "from_adapter"]

Parts = dict[tuple[int, ...], Module]


class Loaded(NamedTuple):
    """A PEFT adapter on a base.

    Attributes:
      params: base and factors; the base is None if none was given.
      sites: what is adapted, with ranks and scales, in the tree's order.
      config: `adapt(..., config=config)` gives these sites.
      replaced: paths of the base that hold numbers of the file: saved modules, biases, rows of
        tokens. Every other leaf is the one that was given.
      tokens: of the replaced rows, the indices by the embedding's path.
      adapter: the file, as it was read.
    """

    params: LoraParams
    sites: Sites
    config: LoraConfig
    replaced: tuple[str, ...]
    tokens: dict[str, tuple[int, ...]]
    adapter: PeftAdapter


def from_adapter(
    adapter: PeftAdapter,
    params: Any,
    names: Sequence[Name] = LLAMA,
    sites: Sequence[Site] | None = None,
    *,
    dtype: Any = None,
) -> Loaded:
    """Puts an adapter that was read onto a tree: the pure half of `load`, which see.

    Example:
      >>> from rslora_jax.peft.names import names
      >>> module = Module("lin", "linear", np.ones((1, 2)), np.ones((3, 1)), 1, 2.0, 2.0)
      >>> adapter = PeftAdapter(Settings(1, 2.0), (module,), {}, {})
      >>> rules = names([("w", "lin.weight", "io")])
      >>> loaded = from_adapter(adapter, {"w": np.zeros((2, 3))}, rules)
      >>> loaded.params.lora["w"]["b"].shape, loaded.sites[0].scale
      ((1, 3), 2.0)
    """
    _refuse_dora(adapter.modules)
    rules = tuple(names)
    if params is None:
        tree = tree_of(adapter.modules, rules)
    else:
        tree = place_all(rules, params, sites)
    tensors = places_of(tree.values())
    parts = _parts(adapter.modules, tensors)
    _check_absent(adapter.settings, tree, parts)
    lora: dict[str, Any] = {}
    made = []
    for path in [path for path in tree if path in parts]:
        refuse_tied(tree[path], None if params is None else tensors)
        site, factors = _adapter(tree[path], parts[path], dtype)
        made.append(_agreed(site, sites))
        insert(lora, path, factors)
    _check_served(sites, parts)
    if params is None:
        _refuse_held(adapter)
    base, replaced, tokens = replaced_base(base_of(params), adapter, tensors)
    found = _sites(made, params, sites)
    return Loaded(LoraParams(base, lora), found, config_of(found), replaced, tokens, adapter)


def _refuse_held(adapter: PeftAdapter) -> None:
    biases = [f"{module.name}.lora_B.bias" for module in adapter.modules if module.bias is not None]
    held = [*adapter.saved, *adapter.tokens, *biases]
    if held:
        raise AdapterError(
            f"The adapter also holds {held[0]!r} and {len(held) - 1} more tensors that change the "
            "base itself, and no base was given to take them. Pass the base tree, or merge the "
            "folder: peft.merge_folders, `rslora merge`."
        )


def _refuse_dora(modules: Sequence[Module]) -> None:
    dora = [module.name for module in modules if module.magnitude is not None]
    if dora:
        raise AdapterError(
            f"{dora[0]!r} and {len(dora) - 1} more modules have DoRA magnitudes, which are no "
            "W + scale * a @ b. Merge the adapter instead: peft.merge_folders, or `rslora merge`."
        )


def _parts(modules: Sequence[Module], tensors: Mapping[str, Where]) -> dict[str, Parts]:
    parts: dict[str, Parts] = {}
    for module in modules:
        where = tensors.get(module.weight)
        if where is None:
            raise AdapterError(
                f"The adapter has factors for {module.weight!r}, which no parameter of the base is "
                f"named. The nearest names are {nearest(module.weight, tensors)}. Pass the base "
                "that was adapted, or names= that fit its paths."
            )
        parts.setdefault(where.placed.path, {})[where.at] = module
    return parts


def _check_absent(
    settings: Settings, tree: Mapping[str, Placed], parts: Mapping[str, Parts]
) -> None:
    """Every module that the settings name has factors, and every layer of a stack."""
    told = settings.target_modules not in (None, "all-linear")
    for path, placed in tree.items():
        if placed.layout.kind in ("plain", "expert") or not (path in parts or told):
            continue
        absent = {at: name for at, name in placed.names().items() if at not in parts.get(path, {})}
        for name in absent.values():
            module = name.removesuffix(".weight")
            if not _is_left_out(settings, module):
                raise AdapterError(
                    f"The adapter has no factors for {module!r} ({path!r}), which its settings do "
                    "not leave out. The file is not whole, or is of another base."
                )


def _is_left_out(settings: Settings, module: str) -> bool:
    sentences = check_coverage(settings, [(module, "")], (), ())
    return any(sentence.startswith(repr(module)) for sentence in sentences)


def _adapter(placed: Placed, parts: Parts, dtype: Any) -> tuple[Site, dict[str, Any]]:
    """The site of a weight, and the factors of all its modules stacked."""
    widest = max(parts.values(), key=lambda module: module.rank)
    layout = placed.layout
    plain = Site(placed.path, layout.axes, layout.shape, placed.dtype, rule="peft")
    site = placed.site or dataclasses.replace(plain, embedding=layout.kind == "embedding")
    old = (site.rank, site.scale)
    site = dataclasses.replace(site, rank=widest.rank, alpha=widest.alpha, scale=widest.scale)
    if old[0] is not None:
        _check_agrees(placed, old, site)
    kind = dtype or _common([array for m in parts.values() for array in (m.a, m.b)])
    a, b = (np.zeros(shape, kind) for shape in site.factor_shapes)
    for at, module in parts.items():
        _check_shapes(placed, module)
        one = factors_in(layout, *_padded(module, site))
        a[at], b[at] = (array.astype(kind) for array in one)
    return site, {"a": jnp.asarray(a), "b": jnp.asarray(b)}


def _padded(module: Module, site: Site) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the site's rank and scale that compute the same."""
    assert site.rank is not None and site.scale is not None
    a, b = module.a, module.b
    if module.scale != site.scale:
        b = b.astype(_wide(b)) * (module.scale / site.scale)
    stacked = module.kind == "expert"
    pad = site.rank - module.rank
    ends_a, ends_b = (
        [(0, pad if k == axis + stacked else 0) for k in range(a.ndim)] for axis in (0, 1)
    )
    return np.pad(a, ends_a), np.pad(b, ends_b)


def _wide(array: np.ndarray) -> Any:
    return array.dtype if array.dtype == np.float64 else np.float32


def _common(arrays: Sequence[np.ndarray]) -> Any:
    found = arrays[0].dtype
    for array in arrays[1:]:
        found = jnp.promote_types(found, array.dtype)
    return found


def _check_shapes(placed: Placed, module: Module) -> None:
    layout = placed.layout
    wanted = factor_shapes(layout, module.rank)
    found = (module.a.shape, module.b.shape)
    if found != wanted or module.kind != layout.kind:
        raise AdapterError(
            f"{module.weight!r} is {module.kind} with factors of shapes {found[0]} and {found[1]}; "
            f"{placed.path!r} of shape {layout.shape} and axes {layout.axes!r} is {layout.kind}, "
            f"and takes {wanted[0]} and {wanted[1]}. Pass the base that was adapted, or correct "
            "the name's axes. A grouped convolution can be neither held nor merged: use PEFT."
        )


def _check_agrees(placed: Placed, old: tuple[Any, Any], site: Site) -> None:
    assert site.scale is not None
    if old[0] != site.rank or not math.isclose(old[1], site.scale, rel_tol=1e-6):
        raise AdapterError(
            f"{placed.path!r} has rank {old[0]} and scale {old[1]:g} in the sites, {site.rank} and "
            f"{site.scale:g} in the adapter. Pass sites without ranks (rl.find_sites), "
            "or the adapter that was made for these."
        )


def _agreed(site: Site, sites: Sequence[Site] | None) -> Site:
    if sites is not None and site.path not in {one.path for one in sites}:
        raise AdapterError(
            f"The adapter has factors for {site.path!r}, which is not among the {len(sites)} sites "
            f"given. The nearest are {nearest(site.path, [one.path for one in sites])}. Pass all "
            "that rl.find_sites finds, or none."
        )
    return site


def _check_served(sites: Sequence[Site] | None, parts: Mapping[str, Parts]) -> None:
    bare = [s.path for s in sites or () if s.rank is not None and s.path not in parts]
    if bare:
        raise AdapterError(
            f"The sites give {bare[0]!r} and {len(bare) - 1} more a rank, but the adapter has no "
            "factors for them. Pass sites without ranks (rl.find_sites), or another adapter."
        )


def _sites(made: Sequence[Site], params: Any, sites: Sequence[Site] | None) -> Sites:
    if params is None:
        return Sites(made)
    flat = flatten(base_of(params))
    known = {site.path: site for site in sites or ()}
    reasons = {left.path: left for left in getattr(sites, "left", ())}
    adapted = {site.path for site in made}
    left = []
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if path not in adapted:
            shape = tuple(getattr(leaf, "shape", ()))
            other = Left(path, shape, "not in the adapter", len(shape) > 1, site=known.get(path))
            left.append(reasons.get(path, other))
    total = sum(getattr(leaf, "size", 0) for leaf in flat.leaves)
    return Sites(made, left, total)
