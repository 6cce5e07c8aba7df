"""Adapters on disk: the factors and all that says what they are; never the base."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rslora_jax.checkpoint.fingerprint import Fingerprint, fingerprint
from rslora_jax.checkpoint.fit import (
    base_misfits,
    check_finite,
    factors_in,
    like_misfits,
    listed,
    refusal,
    site_misfits,
)
from rslora_jax.checkpoint.plain import check_extra, checksum
from rslora_jax.checkpoint.processes import same, together
from rslora_jax.checkpoint.records import Record
from rslora_jax.checkpoint.storage import check_target, read_arrays, read_record, struct_of, write
from rslora_jax.config import LoraConfig
from rslora_jax.factors import LoraParams, factors_of
from rslora_jax.paths import AdapterError, flatten, insert, unflatten
from rslora_jax.sites import Site, Sites

__all__ = ["Restored", "arrays_of", "restore", "save"]

PyTree = Any


class Restored(NamedTuple):
    """What `restore` read.

    Attributes:
      params: a `LoraParams` with the base of `like`, or the lora tree alone.
      sites: what was adapted, for `attach`, `merge` and the rest; the `sites` of the call, where
        it had any.
      config: what had been asked for.
      step: the training step.
      extra: the user's JSON values.
      left_out: with ``strict=False``, a sentence for each site that was not loaded and for each
        leaf of the base that differs; else empty.
    """

    params: Any
    sites: Sites
    config: LoraConfig
    step: int
    extra: dict[str, Any]
    left_out: tuple[str, ...] = ()

    @property
    def lora(self) -> dict[str, Any]:
        """The lora tree alone."""
        return self.params.lora if isinstance(self.params, LoraParams) else self.params


def save(  # noqa: PLR0913
    path: str | os.PathLike[str],
    params_or_lora: LoraParams | Mapping[str, Any],
    sites: Sequence[Site],
    config: LoraConfig,
    *,
    step: int = 0,
    extra: Mapping[str, Any] | None = None,
    base: Fingerprint | PyTree | None = None,
    overwrite: bool = False,
) -> None:
    """Saves adapters, and a record of what they are, to a folder that appears whole.

    The record holds the config, the resolved sites, the fingerprints of the factors and of
    the base, and the library's version. The base itself is not saved. Of several processes all
    take part, and see one folder.

    Args:
      path: the folder to make, and what is missing around it.
      params_or_lora: a `LoraParams`, whose base is fingerprinted, or the lora tree alone.
      sites: the sites of the factors.
      config: what `adapt` was given.
      step: the training step.
      extra: JSON values to keep: dict, list, str, int, float, bool and None.
      base: the `fingerprint` of the base, where it is known already (a base does not change in
        training), or a base tree to take it of.
      overwrite: True replaces what is at `path`, once the new checkpoint is complete.

    Raises:
      AdapterError: if `path` exists, a factor is missing, misshapen, abstract or not finite,
        a scale is not that of the config, or `extra` is not JSON. Nothing is written then.
      OSError: if the disk is full or cannot be written; what was at `path` is unchanged.

    Example:
      >>> import tempfile, jax.numpy as jnp, rslora_jax as rl
      >>> site = Site("w", "io", (2, 3), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 3))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/adapter", lora, [site], rl.LoraConfig(1, 2.0), step=7)
      ...     restored = restore(f"{folder}/adapter")
      >>> restored.step, restored.lora["w"]["b"].tolist()
      (7, [[1.0, 1.0, 1.0]])
    """
    with together():
        check_target(Path(path), overwrite)
    extra = {} if extra is None else extra
    check_extra(extra)
    arrays = arrays_of(params_or_lora, sites)
    known = _base_of(params_or_lora, base)
    record = Record(
        config, Sites(tuple(sites), (), _total(sites)), fingerprint(arrays), known, step, extra
    )
    Record.from_dict(record.to_dict())  # what could not be read again is not written
    same(checksum(record.to_dict()), "adapters")
    write(Path(path), arrays, record, overwrite)


def restore(
    path: str | os.PathLike[str],
    like: LoraParams | Mapping[str, Any] | None = None,
    *,
    sites: Sequence[Site] | None = None,
    base: Fingerprint | PyTree | None = None,
    strict: bool = True,
) -> Restored:
    """Restores adapters, bit by bit as they were saved, and checks that they fit.

    Args:
      path: a folder that `save` made.
      like: a `LoraParams` or lora tree of arrays or `jax.ShapeDtypeStruct`s: the factors come
        back with its structure and shardings, each device reading its own shards, and they
        must have its shapes and dtypes. A base of arrays must be the one that the adapters were
        trained on; of an abstract base only shapes and dtypes are compared. Without `like`:
        a lora tree on the default device.
      sites: the sites that the caller has; they must have the paths, shapes, axes, ranks and
        scales of those saved.
      base: the `fingerprint` of the caller's base, where it is known already, or a base tree
        to take it of.
      strict: False loads what fits, and names the rest in `Restored.left_out`. Without `sites`
        the result holds what was loaded and nothing else; with them, factors that the
        checkpoint lacks keep the value of `like`. Another base is then no error.

    Returns:
      `Restored(params, sites, config, step, extra, left_out)`.

    Raises:
      AdapterError: if the checkpoint is missing, incomplete, damaged or of something else;
        if it does not fit, with the paths and both values; if nothing of it fits.

    Example:
      >>> import tempfile, jax.numpy as jnp, rslora_jax as rl
      >>> site = Site("w", "io", (2, 3), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 3))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/adapter", lora, [site], rl.LoraConfig(1, 2.0))
      ...     restore(f"{folder}/adapter", {"w": {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 3))}})
      Traceback (most recent call last):
      rslora_jax.paths.AdapterError: ...'w': rank 1 in the checkpoint, 4 in what was given...
    """
    with together():
        record = read_record(path)
    given = None if like is None else factors_in(_lora_of(like))
    misfits = [] if sites is None else site_misfits(record, sites)
    if given is not None:
        known = {misfit.path for misfit in misfits}
        misfits += [misfit for misfit in like_misfits(record, given) if misfit.path not in known]
    misfits += base_misfits(record, _base_of(like, base) if record.base is not None else None)
    if misfits and strict:
        raise AdapterError(refusal(path, misfits))
    bad = {misfit.path for misfit in misfits}
    kept = [site for site in record.sites if site.path not in bad]
    if not kept:
        raise AdapterError(
            f"Nothing of {path} fits: {listed([misfit.text for misfit in misfits])}."
        )
    loaded = _load(Path(os.path.abspath(path)), record, kept, given or {})
    described = kept if sites is None or like is None else sites
    total = _total(record.sites if sites is None else sites)
    return Restored(
        _fill(like, loaded, {site.path for site in kept} if misfits and sites is None else None),
        Sites(tuple(described), getattr(sites, "left", ()), total),
        record.config,
        record.step,
        dict(record.extra),
        tuple(misfit.text for misfit in misfits),
    )


def arrays_of(params_or_lora: Any, sites: Sequence[Site]) -> dict[str, Any]:
    """The factors of all sites by path, refused where they cannot be saved."""
    lora = _lora_of(params_or_lora)
    factors = factors_of(lora, sites)
    if not factors:
        raise AdapterError("Adapters were to be saved, found none. Pass params that `adapt` gave.")
    arrays = {f"{path}/{name}": pair[name] for path, pair in factors.items() for name in "ab"}
    for path, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            raise AdapterError(
                f"Arrays were to be saved, found a {type(array).__name__} at {path!r}. Pass "
                "concrete factors."
            )
    check_finite(arrays, "saved", "Save an earlier step: these adapters are lost.")
    return dict(sorted(arrays.items()))


def _lora_of(tree: Any) -> Any:
    lora = tree.lora if isinstance(tree, LoraParams) else tree
    if not isinstance(lora, Mapping):
        raise AdapterError(
            f"Adapters are a LoraParams or its lora tree, found {type(tree).__name__}. Pass the "
            "params that `adapt` returned."
        )
    return lora


def _base_of(tree: Any, base: Any) -> Fingerprint | None:
    if base is None:
        return fingerprint(tree.base) if isinstance(tree, LoraParams) else None
    return base if isinstance(base, Fingerprint) else fingerprint(base)


def _total(sites: Sequence[Site]) -> int:
    return getattr(sites, "total", 0)


def _load(
    path: Path, record: Record, sites: Sequence[Site], given: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The factors of these sites, where `given` has them, checked against the record."""
    wanted = {f"{site.path}/{name}" for site in sites for name in "ab"}
    saved = Fingerprint(tuple(leaf for leaf in record.lora.leaves if leaf.path in wanted))
    with together():
        structs = {leaf.path: struct_of(leaf, given.get(leaf.path)) for leaf in saved.leaves}
        arrays = read_arrays(path, structs)
    differences = saved.differences(fingerprint(arrays), ("record", "arrays"))
    if differences:
        raise AdapterError(
            f"{path} is damaged: its arrays are not those that were saved ({listed(differences)}). "
            "Restore another checkpoint."
        )
    check_finite(arrays, "restored", "Restore another checkpoint.")
    return arrays


def _fill(like: Any, loaded: Mapping[str, jax.Array], only: set[str] | None) -> Any:
    """The tree of `like` with what was loaded; with `only`, nothing of other sites."""
    if like is None:
        tree: dict[str, Any] = {}
        for path, array in loaded.items():
            insert(tree, path, array)
        return tree
    flat = flatten(_lora_of(like))
    filled = {path: loaded.get(path, leaf) for path, leaf in zip(*flat[:2], strict=True)}
    lora = unflatten(flat, filled.values())
    if only is not None:
        lora = {}
        for path, array in filled.items():
            if path.rpartition("/")[0] in only:
                insert(lora, path, array)
    return like._replace(lora=lora) if isinstance(like, LoraParams) else lora
