"""Exporting: a merged tree as a Hugging Face model folder, tensor by tensor."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.factors import LoraParams, factors_of
from rslora_jax.files import read_json
from rslora_jax.formats import formed
from rslora_jax.merge import merge
from rslora_jax.paths import AdapterError, flatten, insert, lookup
from rslora_jax.peft.arrange import part, weight_out
from rslora_jax.peft.names import LLAMA
from rslora_jax.peft.placing import Placed, base_of, place, place_all, places_of
from rslora_jax.peft.rules import Name
from rslora_jax.peft.shards import SHARD, write_folder
from rslora_jax.sites import Site

__all__ = ["hf_tensors", "merge_to_hf"]

Factors = Mapping[str, Mapping[str, Any]]


def hf_tensors(
    params: Any, sites: Sequence[Site] = (), names: Sequence[Name] = LLAMA
) -> Iterator[tuple[str, np.ndarray]]:
    """The merged weights as Hugging Face tensors, one at a time.

    Each tensor is W + scale * a @ b, summed in float32 and cast once; one layer of one leaf is
    in memory, and no more of a sharded leaf than that layer leaves the devices.

    Args:
      params: a `LoraParams`, or a tree that is merged already.
      sites: of the factors.
      names: the mapping between paths and names.

    Yields:
      ``(name, array)`` in the tree's order, in the base's dtypes.

    Raises:
      AdapterError: before the first tensor, if a leaf has no name or two have one; later, if a
        merged weight is not finite.

    Example:
      >>> from rslora_jax.peft.names import names
      >>> rules = names([("w", "lin.weight", "io")])
      >>> [(name, array)] = hf_tensors({"w": jnp.zeros((2, 3))}, (), rules)
      >>> name, array.shape
      ('lin.weight', (3, 2))
    """
    rules = tuple(names)
    base = base_of(params)
    factors = _factors(params, sites)
    flat = flatten(base)
    placed = _all_placed(rules, base, sites)
    known = {site.path: site for site in sites}
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        _check_leaf(known.get(path), path, leaf)
    return _tensors(dict(zip(flat.paths, flat.leaves, strict=True)), placed, known, factors)


def merge_to_hf(  # noqa: PLR0913
    out: str | os.PathLike[str],
    params: Any,
    sites: Sequence[Site] = (),
    names: Sequence[Name] = LLAMA,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    max_shard_bytes: int = SHARD,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Writes merged weights as a folder that transformers loads.

    Tensor by tensor: the peak of memory is near one shard.

    Args:
      out: the folder to write; it appears whole, or not at all.
      params: a `LoraParams`, or a tree that is merged already.
      sites: of the factors.
      names: the mapping between paths and names; every leaf of the base needs one.
      config: the model's configuration: a dict, a ``config.json``, or a model folder whose
        ``config.json`` it is.
      max_shard_bytes: of one safetensors file.
      overwrite: True replaces a folder that is there.
      progress: called as ``progress(done, total, name)`` before each tensor, and with
        ``done == total`` at the end.

    Raises:
      AdapterError: if the folder exists, a leaf has no name, a merged weight is not finite, or
        ``tie_word_embeddings`` of the configuration and the tree's head disagree.

    Example:
      >>> import tempfile
      >>> from rslora_jax.peft.names import names
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rules = names([("w", "lin.weight", "io")])
      ...     merge_to_hf(folder + "/merged", {"w": jnp.zeros((2, 3))}, (), rules)
      ...     sorted(file.name for file in Path(folder, "merged").iterdir())
      ['model.safetensors']
    """
    settings = _config(config)
    tensors = hf_tensors(params, sites, names)
    placed = _all_placed(tuple(names), base_of(params), sites)
    named = [name for one in placed.values() for name in one.names().values()]
    _check_tied(settings, named)
    counted = _counted(tensors, len(named), progress)
    write_folder(Path(out), counted, settings, max_shard_bytes, overwrite)


def _tensors(
    leaves: Mapping[str, Any],
    placed: Mapping[str, Placed],
    known: Mapping[str, Site],
    factors: Factors,
) -> Iterator[tuple[str, np.ndarray]]:
    for path, one in placed.items():
        for at, name in one.names().items():
            piece = formed(leaves[path][part(one.layout, at)])
            if path in factors:
                piece = _merged(known[path], one, at, piece, factors[path])
            yield name, np.ascontiguousarray(weight_out(one.layout, np.asarray(piece)))


def _merged(
    site: Site, placed: Placed, at: tuple[int, ...], piece: Any, factors: Mapping[str, Any]
) -> Any:
    """One layer of a weight with its own factors merged: a stack is never merged whole."""
    single = placed.layout.single
    values = vars(site) | {"axes": single.axes, "shape": single.shape, "uses": ()}
    layer = Site(**values)
    # The factors' b axes come first, in the weight's order, so that the split ones lead.
    lora = insert({}, site.path, {name: jnp.asarray(factors[name])[at] for name in "ab"})
    merged = merge(LoraParams(insert({}, site.path, jnp.asarray(piece)), lora), [layer])
    return jax.device_get(lookup(merged, site.path))


def _factors(params: Any, sites: Sequence[Site]) -> Factors:
    if not isinstance(params, LoraParams):
        if any(site.rank is not None for site in sites):
            raise AdapterError(
                "Sites with ranks were given with a plain tree, which has no factors. Pass the "
                "LoraParams, or sites=() for a tree that is merged already."
            )
        return {}
    return factors_of(params.lora, sites if params.lora else ())


def _all_placed(rules: tuple[Name, ...], base: Any, sites: Sequence[Site]) -> dict[str, Placed]:
    placed = place_all(rules, base, sites)
    flat = flatten(base)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if path not in placed:
            if not hasattr(leaf, "shape"):
                raise AdapterError(f"{path!r} is {type(leaf).__name__}, not an array.")
            place(rules, path, leaf)  # says what is missing
    places_of(placed.values())
    return placed


def _check_leaf(site: Site | None, path: str, leaf: Any) -> None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise AdapterError(f"{path!r} is a shape without numbers. Pass the arrays of the base.")
    if site is not None and tuple(leaf.shape) != site.shape:
        raise AdapterError(
            f"The site {path!r} needs a base weight of shape {site.shape}, found {leaf.shape}. "
            "Pass the parameters that were adapted."
        )


def _config(config: Any) -> dict[str, Any] | None:
    if config is None or isinstance(config, Mapping):
        return None if config is None else dict(config)
    path = Path(config)
    found = read_json(path / "config.json" if path.is_dir() else path)
    if not isinstance(found, dict):
        raise AdapterError(f"{path} must hold a JSON object, found {type(found).__name__}.")
    return found


def _check_tied(settings: Mapping[str, Any] | None, names: Sequence[str]) -> None:
    if settings is None or "tie_word_embeddings" not in settings:
        return
    tied, headed = bool(settings["tie_word_embeddings"]), "lm_head.weight" in names
    if tied and headed:
        raise AdapterError(
            "The configuration says tie_word_embeddings: true, and the tree has a head of its own, "
            "'lm_head.weight', which transformers would not use. Set it to false."
        )
    if not tied and not headed and "model.embed_tokens.weight" in names:
        raise AdapterError(
            "The configuration says tie_word_embeddings: false, and the tree has no "
            "'lm_head.weight', which transformers would draw at random. Set it to true."
        )


def _counted(
    tensors: Iterator[tuple[str, np.ndarray]],
    total: int,
    progress: Callable[[int, int, str], None] | None,
) -> Iterator[tuple[str, np.ndarray]]:
    for done, (name, array) in enumerate(tensors):
        if progress is not None:
            progress(done, total, name)
        yield name, array
    if progress is not None:
        progress(total, total, "")
