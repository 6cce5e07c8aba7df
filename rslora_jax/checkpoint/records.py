"""Records: the JSON that travels with adapters, and everything that is checked about it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.numpy import dtype as as_dtype

from rslora_jax.checkpoint.fingerprint import Fingerprint
from rslora_jax.checkpoint.plain import check_extra, checksum, parse, short
from rslora_jax.config import LoraConfig, scale
from rslora_jax.paths import AdapterError
from rslora_jax.sites import Site, Sites, Use

__all__ = ["FORMAT", "Record"]

FORMAT = 1
KIND = "rslora_jax.adapters"
KEYS = "kind format library config sites total base lora step extra checksum".split()
SITE = "path axes shape dtype rank alpha scale embedding head rule merge uses".split()
USE = "primitive kind roles whole".split()
KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
}


@dataclasses.dataclass(frozen=True)
class Record:
    """What adapters are, without their arrays.

    Attributes:
      config: what was asked for.
      sites: what was adapted; of `uses` nothing that names the user's files.
      lora: the fingerprint of the factors, by path (``<site>/a``, ``<site>/b``).
      base: the fingerprint of the base that they were trained on; None if not known.
      step: the training step.
      extra: the user's JSON values.
      library: the version that wrote it; this one's unless it was read.

    Example:
      >>> import rslora_jax as rl
      >>> from rslora_jax.checkpoint import fingerprint
      >>> site = Site("w", "io", (2, 2), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = fingerprint({"w": {"a": 1.0, "b": 2.0}})
      >>> Record(rl.LoraConfig(1, 2.0), (site,), lora, step=7).to_dict()["step"]
      7
    """

    config: LoraConfig
    sites: Sequence[Site]
    lora: Fingerprint
    base: Fingerprint | None = None
    step: int = 0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    library: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values, with their checksum.

        Raises:
          AdapterError: for a config or extra values without a JSON form, and a bad step.
        """
        check_extra(self.extra)
        if type(self.step) is not int or self.step < 0:
            raise AdapterError(f"step must be an int of at least 0, found {self.step!r}.")
        fields = {
            "kind": KIND,
            "format": FORMAT,
            "library": self.library or _version(),
            "config": self.config.to_dict(),
            "sites": [_site_to_dict(site) for site in self.sites],
            "total": getattr(self.sites, "total", 0),
            "base": None if self.base is None else self.base.to_dict(),
            "lora": self.lora.to_dict(),
            "step": self.step,
            "extra": dict(self.extra),
        }
        return {**fields, "checksum": checksum(fields)}

    def to_json(self) -> str:
        """The record as JSON text; raises as `to_dict` does."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> "Record":
        """Reads what `to_dict` gave, strictly.

        Raises:
          AdapterError: for anything that is missing, unknown, out of range or inconsistent,
            and for a record that was changed after it was written.
        """
        _check_kind(data)
        _keys(data, KEYS, "The record")
        rest = {name: value for name, value in data.items() if name != "checksum"}
        if data["checksum"] != checksum(rest):
            raise AdapterError(
                "The record's checksum does not fit its content: it was changed or damaged after "
                "it was written. Restore another checkpoint."
            )
        return _read(cls, data)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Reads what `to_json` wrote; raises AdapterError as `from_dict` does, or for no JSON.

        Example:
          >>> Record.from_json("{")
          Traceback (most recent call last):
          rslora_jax.paths.AdapterError: The record is not JSON (...). It was...
        """
        return cls.from_dict(parse(text))


def _version() -> str:
    import rslora_jax  # noqa: PLC0415  (the package imports this module)

    return rslora_jax.__version__


def _site_to_dict(site: Site) -> dict[str, Any]:
    if site.rank is None or site.alpha is None or site.scale is None:
        raise AdapterError(f"The site {site.path!r} has no adapter yet: `adapt` gives it a rank.")
    fields = {name: getattr(site, name) for name in SITE}
    uses = [{name: getattr(use, name) for name in USE} for use in site.uses]
    return {**fields, "shape": list(site.shape), "uses": uses}


def _check_kind(data: Any) -> None:
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise AdapterError(f"The record of adapters has the kind {KIND!r}, found {short(data)}.")
    if data.get("format") != FORMAT:
        raise AdapterError(
            f"The record has format {data.get('format')!r}, written by rslora_jax "
            f"{data.get('library')!r}; this version reads format {FORMAT}. Install the version "
            "that wrote it, or a newer one."
        )


def _read(cls: type[Record], data: Mapping[str, Any]) -> Record:
    config = LoraConfig.from_dict(data["config"])
    total, step = (_at_least(data, name, int, 0, "The record") for name in ("total", "step"))
    rows = _typed(data, "sites", list, "The record")
    sites = Sites([_site(row, k, config) for k, row in enumerate(rows)], total=total)
    _check_paths([site.path for site in sites])
    lora = Fingerprint.from_dict(data["lora"])
    _check_factors(sites, lora)
    base = None if data["base"] is None else Fingerprint.from_dict(data["base"])
    check_extra(data["extra"])
    library = _typed(data, "library", str, "The record")
    return cls(config, sites, lora, base, step, data["extra"], library)


def _site(row: Any, index: int, config: LoraConfig) -> Site:
    name = f"Site {index} of the record"
    _keys(row, SITE, name)
    texts = {key: _typed(row, key, str, name) for key in ("path", "axes", "dtype", "rule")}
    flags = {key: _typed(row, key, bool, name) for key in ("embedding", "head", "merge")}
    shape = _typed(row, "shape", list, name)
    if len(shape) != len(texts["axes"]) or any(type(n) is not int or n < 1 for n in shape):
        raise AdapterError(f"{name} has axes {texts['axes']!r} and shape {short(shape)}.")
    if not texts["path"] or not set(texts["axes"]) <= set("bio"):
        raise AdapterError(f"{name} needs a path and axes of b, i and o, found {short(texts)}.")
    _check_dtype(texts["dtype"], name)
    rank = _at_least(row, "rank", int, 1, name)
    numbers = {key: _at_least(row, key, float, 0, name) for key in ("alpha", "scale")}
    wanted = scale(numbers["alpha"], rank, config.scaling)
    if not math.isclose(numbers["scale"], wanted, rel_tol=1e-6):
        raise AdapterError(
            f"{name} ({texts['path']!r}) has scale {numbers['scale']:g}; alpha "
            f"{numbers['alpha']:g} and rank {rank} give {wanted:g} under {config.scaling!r}."
        )
    uses = tuple(_use(use, name) for use in _typed(row, "uses", list, name))
    return Site(shape=tuple(shape), uses=uses, rank=rank, **texts, **flags, **numbers)


def _use(row: Any, name: str) -> Use:
    _keys(row, USE, f"A use in {name}")
    texts = {key: _typed(row, key, str, name) for key in ("primitive", "kind", "roles")}
    return Use(where="", whole=_typed(row, "whole", bool, name), **texts)


def _check_dtype(dtype: str, name: str) -> None:
    try:
        as_dtype(dtype)
    except TypeError as error:
        raise AdapterError(f"{name} has the unknown dtype {dtype!r}.") from error


def _check_paths(paths: Sequence[str]) -> None:
    known: set[str] = set()
    for path in sorted(paths, key=lambda path: path.count("/")):
        parts = path.split("/")
        above = {"/".join(parts[:k]) for k in range(1, len(parts) + 1)}
        if above & known:
            raise AdapterError(f"The record has {path!r} twice, or inside another site's path.")
        known.add(path)


def _check_factors(sites: Sequence[Site], lora: Fingerprint) -> None:
    shapes = [zip("ab", site.factor_shapes, strict=True) for site in sites]
    wanted = {
        f"{site.path}/{name}": shape
        for site, pair in zip(sites, shapes, strict=True)
        for name, shape in pair
    }
    found = {leaf.path: leaf.shape for leaf in lora.leaves if leaf.content is not None}
    wrong = sorted(p for p in {*wanted, *found} if wanted.get(p) != found.get(p))
    if wrong:
        raise AdapterError(
            f"The record's factors do not fit its sites: {wrong[0]!r} is to be "
            f"{wanted.get(wrong[0])}, found {found.get(wrong[0])}."
        )


def _keys(data: Any, wanted: Sequence[str], name: str) -> None:
    if not isinstance(data, dict) or set(data) != set(wanted):
        found = sorted(data) if isinstance(data, dict) else data
        raise AdapterError(f"{name} has the keys {sorted(wanted)}, found {short(found)}.")


def _typed(data: Mapping[str, Any], key: str, kind: type, name: str) -> Any:
    value = data[key]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise AdapterError(f"{name} needs {KINDS[kind]} for {key!r}, found {short(value)}.")
    return value


def _at_least(data: Mapping[str, Any], key: str, kind: type, least: int, name: str) -> Any:
    value = _typed(data, key, kind, name)
    too_low = value < least if kind is int else not least < value < math.inf
    if too_low:
        raise AdapterError(f"{name} needs {key!r} of {least} or more, found {value!r}.")
    return value
