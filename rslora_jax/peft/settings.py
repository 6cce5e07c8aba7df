"""Settings: ``adapter_config.json``, read strictly and written for every reader."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rslora_jax.config import scale
from rslora_jax.files import read_json
from rslora_jax.paths import AdapterError
from rslora_jax.peft import patterns
from rslora_jax.peft.values import checked

__all__ = ["CONFIG", "Settings"]

CONFIG = "adapter_config.json"
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Settings that change the function beyond W + s B A, and what they are.
REFUSED = {
    "alora_invocation_tokens": "the adapter acts only after some tokens",
    "arrow_config": "the adapter is routed among several",
    "kasa_config": "the base is truncated and the adapter has a diagonal",
    "use_bdlora": "the factors are block-diagonal",
    "use_qalora": "the adapter reads a pooled input",
    "layer_replication": "the layers of the base are repeated",
    "megatron_config": "the base is split as Megatron splits it",
    "monteclora_config": "the adapter is sampled",
}
# Settings that say how the adapter was trained or where its base is, not what it computes.
SILENT = (
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "lora_ga_config",
    "loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "runtime_config", "velora_config",
)  # fmt: skip
NEWER = (
    "ensure_weight_tying", "exclude_modules", "lora_bias", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a PEFT LoRA folder says about its tensors; the names and defaults are PEFT's.

    Attributes:
      r: the rank where no pattern matches.
      lora_alpha: the numerator of the scale where no pattern matches.
      use_rslora: True for alpha/sqrt(r), False for alpha/r.
      rank_pattern: from regular expression to rank; the first that matches wins.
      alpha_pattern: from regular expression to alpha; the first that matches wins.
      target_modules: a regular expression for whole names, or names or their dotted endings.
      exclude_modules: what the targets leave out.
      target_parameters: names or endings of adapted parameters, such as expert stacks.
      modules_to_save: modules that are stored in full.
      trainable_token_indices: rows of the embedding, or of the modules named.
      bias: ``"none"``, ``"all"`` or ``"lora_only"``: which biases of the base are replaced.
      use_dora: True if each module has a magnitude.
      lora_bias: True if B has a bias.
      fan_in_fan_out: True if the base stores (in, out), as GPT-2 does.
      layers_to_transform: the layers that have an adapter; None means all.
      layers_pattern: the names of the list of layers.
      ensure_weight_tying: True if the head follows an adapted embedding that it is tied to.
      lora_dropout: used in training alone.
      init_lora_weights: how the factors started.
      base_model_name_or_path: the model that was adapted.
      revision: of that model.
      task_type: such as ``"CAUSAL_LM"``.

    Raises:
      AdapterError: if a value is out of range, with the value and the remedy.

    Example:
      >>> Settings(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"q": 16}).scale("layers.0.q")
      2.0
    """

    r: int
    lora_alpha: int | float = 8
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    bias: str = "none"
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field.name, getattr(self, field.name)))
        _check_residual(self.init_lora_weights)
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None):
            raise AdapterError(
                f"target_modules is the regular expression {self.target_modules!r} and "
                "layers_to_transform is set, which PEFT refuses. Put the layers into the regex."
            )

    @classmethod
    def read(cls, path: str | Path) -> "Settings":
        """Reads ``adapter_config.json`` of a folder, or the file itself.

        Raises:
          AdapterError: if it is missing, no JSON, or holds what cannot be read; see `from_dict`.
        """
        file = Path(path, CONFIG) if Path(path).is_dir() else Path(path)
        data = read_json(file)
        try:
            return cls.from_dict(data)
        except AdapterError as error:
            raise AdapterError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Settings":
        """Reads the keys of an ``adapter_config.json`` of any PEFT version.

        Args:
          data: the keys; those that an older PEFT did not write take PEFT's defaults.

        Returns:
          `Settings`.

        Raises:
          AdapterError: if `r` is missing, a value is out of range, or a setting changes the
            function in a way that this library cannot hold.

        Warns:
          UserWarning: once, naming unknown keys whose values are not empty.

        Example:
          >>> Settings.from_dict({"r": 4, "fan_in_fan_out": None, "lora_alpha": 8.5}).lora_alpha
          8.5
        """
        if not isinstance(data, Mapping):
            raise AdapterError(f"{CONFIG} must hold one JSON object, found {str(data)[:80]!r}.")
        _refuse(data)
        names = {field.name for field in dataclasses.fields(cls)}
        _warn_unknown({str(k): v for k, v in data.items() if k not in names}, data)
        nothing = dataclasses.MISSING
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        kept: dict[str, Any] = {n: v for n, v in data.items() if n in names}
        empty = {n for n, v in kept.items() if v is None and defaults[n] not in (nothing, None)}
        return cls(**{n: v for n, v in kept.items() if n not in empty})

    def to_dict(self) -> dict[str, Any]:
        """The keys to write: sorted, every value plain JSON, sets of names sorted.

        Keys that PEFT learned after 0.9 are left out where they are at their default, so that
        older readers are not told of what is not used.
        """
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found = {n: v for n, v in found.items() if n not in NEWER or v not in (None, False)}
        found |= {"peft_type": "LORA", "inference_mode": True}
        return {name: _plain(name, found[name]) for name in sorted(found)}

    def rank_alpha(self, name: str) -> tuple[int, int | float]:
        """The rank and alpha of a module: those of the first pattern that matches its name."""
        rank = next((v for k, v in self.rank_pattern.items() if patterns.matches(k, name)), self.r)
        alphas = self.alpha_pattern.items()
        return rank, next((v for k, v in alphas if patterns.matches(k, name)), self.lora_alpha)

    def scale(self, name: str) -> float:
        """The scale of a module, by `rslora_jax.scale`.

        Args:
          name: the module's name; with the parameter's name where PEFT adapts a parameter.

        Returns:
          The scale, dimensionless.

        Raises:
          AdapterError: if alpha is not above 0 there.
        """
        rank, alpha = self.rank_alpha(name)
        try:
            return scale(alpha, rank, "rslora" if self.use_rslora else "lora")
        except AdapterError as error:
            raise AdapterError(f"The scale of {name!r} cannot be computed: {error}") from error

    def unused(self, names: Iterable[str]) -> list[str]:
        """Says which patterns match no module: a slip of spelling leaves the default scale."""
        known = list(names)
        return [
            f"{kind} has {key!r}, which matches no adapted module and does nothing"
            for kind in ("rank_pattern", "alpha_pattern")
            for key in getattr(self, kind)
            if not any(patterns.matches(key, name) for name in known)
        ]

    def overlaps(self, names: Iterable[str]) -> list[str]:
        """Says where two patterns give one module two values, so that their order matters."""
        found = []
        for name in names:
            for kind in ("rank_pattern", "alpha_pattern"):
                hits = {k: v for k, v in getattr(self, kind).items() if patterns.matches(k, name)}
                if len(set(hits.values())) > 1:
                    found.append(f"{kind} matches {name!r} with {hits}; the first is used")
        return found


def _refuse(data: Mapping[str, Any]) -> None:
    kind = data.get("peft_type")
    if kind not in (None, "LORA"):
        raise AdapterError(f"peft_type is {str(kind)[:80]!r}; only 'LORA' adapters can be read.")
    for name, meaning in REFUSED.items():
        if data.get(name) not in (None, False) and data[name] != {} and data[name] != []:
            raise AdapterError(
                f"{name} is set to {str(data[name])[:80]!r}: {meaning}, which this library cannot "
                "hold. Merge the adapter with PEFT, or train one without it."
            )
    if "r" not in data:
        raise AdapterError(
            "r is missing. PEFT would take its default of 8 whatever the tensors hold, and so a "
            "wrong scale. Write the rank of the lora_A tensors as 'r'."
        )
    if data.get("lora_alpha", 8) is None:
        raise AdapterError("lora_alpha is null, so there is no scale. Write its number.")


def _check_residual(init: Any) -> None:
    if isinstance(init, str) and init.startswith(RESIDUAL):
        raise AdapterError(
            f"init_lora_weights is {init[:40]!r}: such an adapter belongs to a residual base that "
            "is not in the folder, so that on the original base it computes something else. Save "
            "it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "which makes it a plain adapter."
        )


def _warn_unknown(extras: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    known = {*SILENT, *REFUSED}
    unknown = {n: v for n, v in extras.items() if n not in known and not _is_nothing(v)}
    if unknown:
        version = data.get("peft_version")
        warnings.warn(
            f"{CONFIG} has keys that this library does not know and that could change what the "
            f"adapter computes: {str(dict(sorted(unknown.items())))[:400]} (peft_version "
            f"{version!r}). They are not used.",
            stacklevel=5,
        )


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain("", value[key]) for key in sorted(value)}
    if isinstance(value, tuple):
        return sorted(value) if name.endswith(("_modules", "_to_save")) else list(value)
    return value
