"""Fit: what a checkpoint holds against what the caller has, in sentences by path."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.checkpoint.fingerprint import Fingerprint
from rslora_jax.checkpoint.records import Record
from rslora_jax.paths import AdapterError, flatten
from rslora_jax.sites import Site

__all__ = [
    "Misfit",
    "base_misfits",
    "check_finite",
    "factors_in",
    "like_misfits",
    "listed",
    "refusal",
    "site_misfits",
]

HERE, THERE = "the checkpoint", "what was given"


class Misfit(NamedTuple):
    """A difference: the path of the site that cannot be loaded, and the sentence.

    Attributes:
      path: the site's path; empty where the base differs, which keeps no site from loading.
      text: what differs, with both values.
    """

    path: str
    text: str


def site_misfits(record: Record, sites: Sequence[Site]) -> list[Misfit]:
    """Where the caller's sites differ: other paths, axes, shapes, ranks or scales."""
    saved, given = ({site.path: site for site in side} for side in (record.sites, sites))
    if len(given) < len(sites):
        raise AdapterError("restore needs one site for each path, found two of one path in sites.")
    alone = [_alone(path, path in saved) for path in sorted({*saved} ^ {*given})]
    both = [(path, saved[path], given[path]) for path in saved if path in given]
    texts = [(path, _site_text(left, right)) for path, left, right in both]
    return alone + [Misfit(path, f"{path!r}: {text}") for path, text in texts if text]


def like_misfits(record: Record, like: Mapping[str, Any]) -> list[Misfit]:
    """Where the caller's factors, by path, differ: missing, or of another rank, shape or dtype."""
    paths = {path.rpartition("/")[0] for path in like}
    saved = {site.path: site for site in record.sites}
    found = [_alone(path, path in saved) for path in sorted({*saved} ^ paths)]
    stored = {leaf.path: leaf for leaf in record.lora.leaves}
    for path in (path for path in saved if path in paths):
        for name in "ab":
            leaf, other = stored[f"{path}/{name}"], like.get(f"{path}/{name}")
            text = _factor_text(saved[path], name, leaf, other)
            if text:
                found.append(Misfit(path, text))
                break
    return found


def base_misfits(record: Record, base: Fingerprint | None) -> list[Misfit]:
    """Where the base differs from the one that the adapters were trained on."""
    if record.base is None or base is None:
        return []
    differences = record.base.differences(base, ("saved base", "given base"))
    return [Misfit("", f"another base: {text}") for text in differences]


def factors_in(lora: Any) -> dict[str, Any]:
    """The factors of a lora tree, by path; what `taps` put beside them is no factor."""
    flat = flatten(lora)
    pairs = zip(flat.paths, flat.leaves, strict=True)
    return {path: leaf for path, leaf in pairs if path.rpartition("/")[2] in ("a", "b")}


def check_finite(arrays: Mapping[str, Any], what: str, remedy: str) -> None:
    """Refuses arrays, by path, that hold NaN or infinity; `what` was to be done with them."""
    flags = {path: _is_finite(array) for path, array in arrays.items()}
    wrong = [path for path, flag in flags.items() if not flag]
    if wrong:
        raise AdapterError(
            f"Finite factors were to be {what}, found NaN or infinity in {listed(wrong)}. {remedy}"
        )


def refusal(path: Any, misfits: Sequence[Misfit]) -> str:
    """The message for a checkpoint that does not fit, and what to do."""
    if any(misfit.path for misfit in misfits):
        remedy = "Restore it to what it was saved from, or pass strict=False to load what fits."
    else:
        remedy = (
            "Load the base that it was trained on, or pass strict=False to use it on this one: the "
            "model then computes something else than was trained."
        )
    return f"{path} does not fit: {listed([misfit.text for misfit in misfits])}. {remedy}"


def listed(texts: Sequence[str], most: int = 6) -> str:
    """The first sentences, and how many more there are."""
    more = f"; and {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more


def _is_finite(array: Any) -> Any:
    if isinstance(array, np.ndarray):  # as it is: JAX would cut float64 to float32
        return np.isfinite(array).all()
    return _all_finite(array)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _alone(path: str, saved: bool) -> Misfit:
    there, missing = (HERE, THERE) if saved else (THERE, HERE)
    return Misfit(path, f"{path!r}: in {there}, not in {missing}")


def _site_text(saved: Site, given: Site) -> str | None:
    for name in ("axes", "shape", "rank"):
        left, right = getattr(saved, name), getattr(given, name)
        if left != right:
            return f"{name} {left} in {HERE}, {right} in {THERE}"
    if saved.scale is None or given.scale is None:
        return f"scale {saved.scale} in {HERE}, {given.scale} in {THERE}"
    if math.isclose(saved.scale, given.scale, rel_tol=1e-6):
        return None
    left, right = (f"scale {s.scale:g} (alpha {s.alpha:g})" for s in (saved, given))
    return f"{left} in {HERE}, {right} in {THERE}"


def _factor_text(site: Site, name: str, saved: Any, given: Any) -> str | None:
    path = f"{site.path}/{name}"
    if given is None:
        return f"{path!r}: in {HERE}, not in {THERE}"
    shape = tuple(given.shape)
    if shape != saved.shape:
        rank = shape[-1] if name == "a" and len(shape) == len(saved.shape) else site.rank
        if rank != site.rank and shape[:-1] == saved.shape[:-1]:
            return f"{site.path!r}: rank {site.rank} in {HERE}, {rank} in {THERE}"
        return f"{path!r}: shape {saved.shape} in {HERE}, {shape} in {THERE}"
    if str(given.dtype) != saved.dtype:
        return f"{path!r}: dtype {saved.dtype} in {HERE}, {given.dtype} in {THERE}"
    return None
