"""Placing: every parameter of a tree with the Hugging Face tensors that hold it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError, flatten, nearest
from rslora_jax.peft.arrange import indices
from rslora_jax.peft.layout import Layout, layout_of
from rslora_jax.peft.rules import Name, fill, find
from rslora_jax.sites import Site

__all__ = ["Placed", "Where", "base_of", "place", "place_all", "places_of", "refuse_tied"]


class Placed(NamedTuple):
    """One parameter, its layout, and the name of its tensors.

    Attributes:
      path: its path.
      dtype: its dtype, by name.
      layout: how it is arranged.
      tensor: the tensors' name; ``{0}`` stands for the index along its first stacked axis.
      site: the site that gave its axes, if any.
    """

    path: str
    dtype: str
    layout: Layout
    tensor: str
    site: Site | None = None

    def names(self) -> dict[tuple[int, ...], str]:
        """The tensors' names by index of the stacked axes."""
        return {at: fill(self.tensor, at) for at in indices(self.layout)}


class Where(NamedTuple):
    """The parameter that a tensor is a part of, and which part."""

    placed: Placed
    at: tuple[int, ...]


def base_of(params: Any) -> Any:
    """The base of a `LoraParams`, or the tree itself."""
    return params.base if isinstance(params, LoraParams) else params


def place(rules: Sequence[Name], path: str, leaf: Any, site: Site | None = None) -> Placed:
    """Places one parameter.

    Args:
      rules: the mapping of names.
      path: the parameter's path.
      leaf: the parameter, or its `jax.ShapeDtypeStruct`.
      site: gives its axes.

    Raises:
      AdapterError: if no rule matches the path, or the rule does not fit the parameter.

    Example:
      >>> from rslora_jax.peft.names import LLAMA
      >>> place(LLAMA, "layers/mlp/up_proj/kernel", np.ones((2, 4, 6))).names()[(1,)]
      'model.layers.1.mlp.up_proj.weight'
    """
    found = find(rules, path)
    if found is None:
        raise AdapterError(
            f"No name matches the path {path!r}. The nearest of the {len(rules)} rules are "
            f"{nearest(path, [rule.path for rule in rules])}. Add one: "
            "names=peft.names([(regex, tensor), *LLAMA]), or --names FILE.json of a command."
        )
    layout = layout_of(path, found, tuple(leaf.shape), site)
    return Placed(path, np.dtype(leaf.dtype).name, layout, found.tensor, site)


def place_all(
    rules: Sequence[Name], params: Any, sites: Sequence[Site] | None
) -> dict[str, Placed]:
    """Places every parameter of a tree that a rule matches, in the tree's order.

    Args:
      rules: the mapping of names.
      params: the base, or a `LoraParams`; arrays or `jax.ShapeDtypeStruct`s.
      sites: give the axes of weights; those of the rules serve elsewhere.

    Raises:
      AdapterError: if a rule does not fit its parameter.
    """
    known = {site.path: site for site in sites or ()}
    spare = {left.path: _certain(left.site) for left in getattr(sites, "left", ())}
    flat = flatten(base_of(params))
    placed = {}
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        found = find(rules, path) if hasattr(leaf, "shape") else None
        if found is not None:
            site = known.get(path) or (None if found.name.axes else spare.get(path))
            placed[path] = place(rules, path, leaf, site)
    return placed


def _certain(site: Site | None) -> Site | None:
    """A site whose axes were seen in a use; those of a norm are a guess."""
    seen = site is not None and any(use.kind in ("product", "lookup") for use in site.uses)
    return site if seen else None


def places_of(placed: Iterable[Placed]) -> dict[str, Where]:
    """Where each tensor is, by its name.

    Raises:
      AdapterError: if two parameters are given one name.
    """
    found: dict[str, Where] = {}
    for one in placed:
        for at, name in one.names().items():
            if name in found:
                raise AdapterError(
                    f"{found[name].placed.path!r} and {one.path!r} are both named {name!r}. Each "
                    "parameter needs its own name: correct the rules."
                )
            found[name] = Where(one, at)
    return found


def refuse_tied(placed: Placed, tensors: Mapping[str, Any] | None) -> None:
    """Refuses factors of an embedding that is the output head too.

    PEFT adapts the lookup alone, this library every use of the weight: the same factors would
    compute two functions.

    Args:
      placed: the adapted parameter.
      tensors: every tensor of the base, if known: without a site they tell of a head.

    Raises:
      AdapterError: if the weight is also the head, or seems to be.
    """
    if placed.layout.kind != "embedding":
        return
    site = placed.site
    uses = site.uses if site is not None else ()
    named = placed.tensor.endswith("embed_tokens.weight")
    if any(use.kind == "product" for use in uses) or (site is not None and site.head):
        why = "its rows are looked up, and it is used in a product too (a tied head)"
        remedy = "Leave it out, or give the model a head of its own"
    elif named and not uses and tensors is not None and "lm_head.weight" not in tensors:
        why = "there is no lm_head, so it may be the head too"
        remedy = "Pass sites=rl.find_sites(...), which show how it is used"
    else:
        return
    raise AdapterError(
        f"{placed.path!r} is an embedding, and {why}. PEFT adapts the lookup alone, this library "
        f"both, so the same factors would compute two functions. {remedy}."
    )
