"""What the user asks for: `LoraConfig`, its `Rule`s, and the one place that computes a scale."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from rslora_jax.paths import AdapterError

__all__ = ["SCALINGS", "LoraConfig", "Rule", "Scaling", "alpha_of", "scale"]

Scaling: TypeAlias = Literal["rslora", "lora"]
Init: TypeAlias = str | Callable[..., Any]

SCALINGS: tuple[Scaling, ...] = ("rslora", "lora")
INITS = ("kaiming", "normal")
UNSUPPORTED = ("error", "merge")


def scale(alpha: float, rank: int, scaling: str = "rslora") -> float:
    """The number that multiplies a @ b: the only place where a scale is computed.

    Args:
      alpha: the numerator, positive.
      rank: the rank r, at least 1.
      scaling: ``"rslora"`` for alpha/sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732,
        theorem 3.2), ``"lora"`` for alpha/r (Hu et al. 2021).

    Returns:
      The scale, dimensionless.

    Raises:
      AdapterError: if an argument is out of range.

    Example:
      >>> scale(16.0, 64), scale(16.0, 64, "lora")
      (2.0, 0.25)
    """
    rank, alpha = _rank(rank, "rank"), _alpha(alpha, "alpha")
    _check_choice(scaling, SCALINGS, "scaling")
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


def alpha_of(scale: float, rank: int, scaling: str = "rslora") -> float:
    """The alpha at which a rank has this scale: the inverse of `scale`.

    Args:
      scale: the number that multiplies a @ b, positive.
      rank: the rank r, at least 1.
      scaling: ``"rslora"`` for scale * sqrt(r), ``"lora"`` for scale * r.

    Returns:
      The alpha whose scale is nearest: the same float64, or its neighbour where rounding
      leaves no alpha for it.

    Raises:
      AdapterError: if an argument is out of range.

    Example:
      >>> alpha_of(2.0, 64), alpha_of(0.25, 64, "lora")
      (16.0, 16.0)
    """
    wanted, unit = _alpha(scale, "scale"), _scale(1.0, rank, scaling)
    middle = wanted / unit
    near = (middle, math.nextafter(middle, 0), math.nextafter(middle, math.inf))
    return min(near, key=lambda alpha: abs(_scale(alpha, rank, scaling) - wanted))


_scale = scale  # `alpha_of` has an argument of that name


@dataclasses.dataclass(frozen=True)
class Rule:
    """Another rank or alpha for the paths that `pattern` (a regex, fullmatch) matches.

    Attributes:
      pattern: a regular expression that must match the whole path.
      rank: the rank there; None keeps the config's.
      alpha: the alpha there; None keeps the config's.

    Example:
      >>> Rule(r".*/mlp/.*", rank=128).alpha is None
      True
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        _check_regex(self.pattern, "Rule.pattern")
        if self.rank is None and self.alpha is None:
            raise AdapterError(
                f"Rule({self.pattern!r}) sets neither rank nor alpha, so it would do nothing. "
                "Give it one of them, or leave it out."
            )
        if self.rank is not None:
            object.__setattr__(self, "rank", _rank(self.rank, f"Rule({self.pattern!r}).rank"))
        if self.alpha is not None:
            object.__setattr__(self, "alpha", _alpha(self.alpha, f"Rule({self.pattern!r}).alpha"))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get an adapter, of what rank, scaled how.

    Attributes:
      rank: the rank r of every adapter that no rule changes.
      alpha: the numerator of the scale.
      targets: ``"all-linear"`` (every weight of a matrix product, but not embeddings and
        the output head), a regex that must match whole paths, or a list of path suffixes.
      exclude: what to leave out again: a regex, or a list of path suffixes.
      rules: per-path ranks and alphas; the first rule that matches wins.
      scaling: ``"rslora"`` for alpha/sqrt(r), ``"lora"`` for alpha/r.
      init: how `a` starts: ``"kaiming"`` is uniform in +-1/sqrt(fan_in), ``"normal"`` has
        standard deviation 1/sqrt(fan_in), or a function ``(key, shape, dtype) -> array``.
        `b` starts at zero.
      dtype: of the factors; None means float32 (float64 for a float64 weight).
      unsupported: what to do about a targeted weight with a use that has no low-rank form:
        ``"error"``, or ``"merge"`` to form W + scale * a @ b for those uses alone.

    Raises:
      AdapterError: if a value is out of range, with the value and the remedy.

    Example:
      >>> LoraConfig(rank=64, alpha=16.0).scale
      2.0
    """

    rank: int
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    scaling: Scaling = "rslora"
    init: Init = "kaiming"
    dtype: Any = None
    unsupported: Literal["error", "merge"] = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _rank(self.rank, "LoraConfig.rank"))
        object.__setattr__(self, "alpha", _alpha(self.alpha, "LoraConfig.alpha"))
        _check_choice(self.scaling, SCALINGS, "LoraConfig.scaling")
        _check_choice(self.unsupported, UNSUPPORTED, "LoraConfig.unsupported")
        if not callable(self.init):
            _check_choice(self.init, INITS, "LoraConfig.init")
        for name in ("targets", "exclude"):
            object.__setattr__(self, name, _patterns(getattr(self, name), f"LoraConfig.{name}"))
        object.__setattr__(self, "rules", _rules(self.rules))
        object.__setattr__(self, "dtype", _dtype(self.dtype))

    @property
    def scale(self) -> float:
        """The scale of every adapter that no rule changes."""
        return scale(self.alpha, self.rank, self.scaling)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values; `rules` stays an ordered list.

        Raises:
          AdapterError: if `init` is a function, which has no JSON form.
        """
        if callable(self.init):
            raise AdapterError(
                f"LoraConfig.init is the function {self.init!r}, which cannot be written down. "
                f"Use one of {INITS} in a config that is to be saved."
            )
        fields = dataclasses.asdict(self)
        for name in ("targets", "exclude"):
            value = fields[name]
            fields[name] = value if isinstance(value, str) else list(value)
        return {**fields, "rules": [dict(rule) for rule in fields["rules"]]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LoraConfig":
        """Reads what `to_dict` wrote.

        Raises:
          AdapterError: for unknown or missing keys, and for values out of range.

        Example:
          >>> config = LoraConfig(rank=8, rules=(Rule(".*/mlp/.*", rank=64),))
          >>> LoraConfig.from_dict(config.to_dict()) == config
          True
        """
        fields = _known(data, cls)
        rules = fields.get("rules", ())
        if not isinstance(rules, list | tuple):
            raise AdapterError(f"rules must be a list of mappings, found {rules!r}.")
        read = tuple(Rule(**_known(rule, Rule)) for rule in rules)
        return cls(**{**fields, "rules": read})


def _known(data: Mapping[str, Any], cls: type[Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise AdapterError(f"{cls.__name__} is read from a mapping, found {data!r}.")
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(data) - set(names), key=str)
    if unknown:
        raise AdapterError(f"Unknown keys {unknown} for {cls.__name__}. It knows {names}.")
    missing = [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in data]
    if missing:
        raise AdapterError(f"{cls.__name__} needs the keys {missing}, found {sorted(data)}.")
    return dict(data)


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING


def _rank(rank: Any, name: str) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
        raise AdapterError(f"{name} must be an int of at least 1, found {rank!r}.")
    return int(rank)


def _alpha(alpha: Any, name: str) -> float:
    number = isinstance(alpha, int | float | np.number) and not isinstance(alpha, bool)
    try:
        value = float(alpha) if number else math.nan
    except OverflowError:
        value = math.inf
    if not 0 < value < math.inf:
        raise AdapterError(f"{name} must be a finite number above 0, found {alpha!r}.")
    return value


def _check_choice(value: object, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise AdapterError(f"{name} must be one of {choices}, found {value!r}.")


def _check_regex(pattern: object, name: str) -> None:
    try:
        re.compile(pattern)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (re.error, TypeError) as error:
        raise AdapterError(
            f"{name} must be a regular expression, found {pattern!r}: {error}."
        ) from error


def _patterns(value: object, name: str) -> str | tuple[str, ...]:
    if isinstance(value, str):
        _check_regex(value, name)
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(s, str) and s for s in value):
        raise AdapterError(f"{name} must be a regex or a list of path suffixes, found {value!r}.")
    return tuple(value)


def _rules(rules: object) -> tuple[Rule, ...]:
    if not isinstance(rules, list | tuple) or not all(isinstance(rule, Rule) for rule in rules):
        raise AdapterError(f"LoraConfig.rules must be a tuple of Rule, found {rules!r}.")
    return tuple(rules)


def _dtype(dtype: Any) -> str | None:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise AdapterError(f"LoraConfig.dtype is not a dtype: {dtype!r}.") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise AdapterError(f"LoraConfig.dtype must be a floating dtype, found {found.name}.")
    return found.name
