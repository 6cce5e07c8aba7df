"""Settings of a fine-tune: one typed, checked dataclass, whatever file or flags it came from."""

import dataclasses
import functools
import os
import re
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

import rslora_jax as rl
from finetune.limits import check_limit, typed
from finetune.modules import (
    LINEAR,
    MODULES,
    Module,
    first,
    in_order,
    patterned,
    strangers,
    targeted,
)
from finetune.yaml_file import ConfigError

__all__ = ["INSTEAD", "ConfigError", "Settings", "hints"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fine-tune a Llama-family model with rank-stabilized LoRA."""

    model: str = ""
    """A Hugging Face folder, a .gguf file, or smollm2. Relative paths: see dataset."""
    dataset: str = ""
    """JSONL to train on. A path is looked for here first, then beside the YAML file."""
    eval_dataset: str | None = None
    """JSONL to evaluate on."""
    eval_fraction: float = 0.05
    """The share of dataset that is held out for evaluation, if there is no eval_dataset."""
    output: Path = Path("outputs/finetune")
    """Folder of the run; from a file, by default outputs/ and the file's or run's name."""

    rank: int = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """Numerator of the scale."""
    use_rslora: bool = True
    """Scale by alpha/sqrt(rank); otherwise by alpha/rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which weights get adapters: all-linear, or names such as q_proj v_proj."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Other ranks for some weights, by name or regex as in PEFT."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Other alphas for some weights, by name or regex as in PEFT."""
    quant_bits: Literal[16, 8, 4] = 16
    """Bits of the adapted weights in memory: 16 leaves them as they are, 8 is int8."""
    quant_format: Literal["nf4", "int4"] = "nf4"
    """What 4 bits mean."""
    lora_plus_ratio: float = 1.0
    """Learning rate of b over that of a (LoRA+)."""

    epochs: float = 1.0
    """How often the data is seen."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch: int | None = None
    """Rows, or packed rows, of a micro batch on all devices; by default 4, rounded up to them."""
    batch_per_device: int | None = None
    """The rows of each of data * fsdp groups of devices, instead of batch."""
    accumulation: int = 1
    """Micro batches of an optimizer step."""
    learning_rate: float = 1e-3
    """Its highest value: it rises, then falls to zero as a cosine."""
    warmup: float = 0.03
    """The share of the steps in which it rises."""
    warmup_steps: int | None = None
    """The steps in which it rises, instead of warmup."""
    weight_decay: float = 0.0
    """AdamW's, on the adapters."""
    clip: float = 1.0
    """The largest norm of a gradient; 0 does not clip."""
    length: int = 512
    """Tokens of a row; of a longer one the beginning of the prompt is cut."""
    packing: bool = True
    """Put several short rows into one, each blind to the others."""
    bfloat16: bool = False
    """Activations and unquantized weights in bfloat16 instead of float32."""
    bfloat16_on: Literal["accelerators"] | None = None
    """bfloat16 unless the devices are CPUs, instead of bfloat16."""
    remat: Literal["none", "full", "dots"] = "none"
    """What to compute again in the backward pass: nothing, layers, or all but their products."""
    logits_mb: int = 64
    """The most MiB of logits at one time."""
    seed: int = 0
    """Of the adapters, the order of the data and what is held out."""

    eval_every: int = 0
    """Steps between evaluations; 0 evaluates before the first step and at the end."""
    evals_per_epoch: int | None = None
    """Evaluations in an epoch, instead of eval_every."""
    eval_rows: int = 200
    """The most held-out rows to evaluate on."""
    eval_generate: int = 8
    """Rows to generate answers for."""
    save_every: int = 100
    """Steps between checkpoints."""
    saves_per_epoch: int | None = None
    """Checkpoints in an epoch, instead of save_every."""
    save_minutes: float = 10.0
    """The longest time between checkpoints; 0 counts steps only."""
    keep_last: int = 2
    """How many checkpoints stay."""
    skip_bad: bool = False
    """Leave out lines of the data that cannot be read, and count them."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    export: tuple[Literal["native", "portable"], ...] = ("native", "portable")
    """PEFT folders to write at the end."""
    merge: bool = False
    """Write a whole model with the adapters merged in at the end."""
    data: int = 1
    """Devices along the axis over which only the batch is split."""
    fsdp: int | None = None
    """Devices over which batch and weights are split; by default all that are left."""
    tensor: int = 1
    """Devices over which each matrix product is split."""
    plan: str | None = None
    """Plan for a TPU slice such as v5e:16x16 and stop."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        """Brings every value to its type and refuses what is out of range, all at once."""
        problems: list[str] = []
        for name in hints():
            try:
                object.__setattr__(self, name, _checked(name, getattr(self, name)))
            except ConfigError as error:
                problems += [f"{name} {problem}." for problem in error.problems]
        for name, other in INSTEAD.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, other, getattr(Settings, other))
        for name in () if problems else ("rank_pattern", "alpha_pattern"):
            words = strangers(getattr(self, name), self.adapted).values()
            problems += [f"{name} {problem}." for problem in words]
        if problems:
            raise ConfigError(*problems)

    @property
    def scaling(self) -> Literal["rslora", "lora"]:
        """The rule of the scale, as `rl.LoraConfig` calls it."""
        return "rslora" if self.use_rslora else "lora"

    @property
    def adapted(self) -> tuple[Module, ...]:
        """The weights that get adapters."""
        if isinstance(self.targets, str):
            return LINEAR
        return tuple(module for module in MODULES if module.suffix in self.targets)

    def lora_config(self) -> rl.LoraConfig:
        """The adapters, with a rule for each weight that a pattern changes."""
        return rl.LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            rules=tuple(rule for module in self.adapted for rule in self._rules(module)),
            scaling=self.scaling,
        )

    def _rules(self, module: Module) -> tuple[rl.Rule, ...]:
        rank, alpha = first(self.rank_pattern, module), first(self.alpha_pattern, module)
        if rank is None and alpha is None:
            return ()
        return (rl.Rule(f"(.*/)?{re.escape(module.path)}", rank, alpha),)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, without those that another one replaces."""
        unused = {other for name, other in INSTEAD.items() if getattr(self, name) is not None}
        return {name: _plain(getattr(self, name)) for name in hints() if name not in unused}

    def save(self, path: str | Path) -> None:
        """Write them as YAML that reads back to the same; the file appears whole or not at all.

        Raises:
          OSError: if it cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
        try:
            text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
            temporary.write_text("# Resolved settings of the run.\n" + text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


INSTEAD = {
    "steps": "epochs",
    "eval_dataset": "eval_fraction",
    "batch_per_device": "batch",
    "warmup_steps": "warmup",
    "bfloat16_on": "bfloat16",
    "evals_per_epoch": "eval_every",
    "saves_per_epoch": "save_every",
}
"""Fields that, if they are set, take the place of another one."""


@functools.cache
def hints() -> dict[str, Any]:
    """The type of every field."""
    return typing.get_type_hints(Settings)


def _checked(name: str, value: Any) -> Any:
    if name == "targets":
        return _targets(value)
    value = typed(value, hints()[name])
    check_limit(name, value)
    for pattern in value if isinstance(value, dict) else ():
        patterned(pattern)  # refuses what names nothing
    return value


def _targets(value: Any) -> Any:
    if value == "all-linear" or value in (("all-linear",), ["all-linear"]):
        return "all-linear"
    entries = (value,) if isinstance(value, str) else tuple(value)
    found = [module for entry in entries for module in targeted(entry)]
    if not found:
        raise ConfigError("must name a weight, found an empty list. Or write all-linear")
    return in_order(found)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
