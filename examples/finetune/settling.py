"""Settling: what was asked by the device or by the epoch, in rows and steps of a very run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune.settings import ConfigError, Settings

ROWS = 4  # of a micro batch, if none are asked for


def on_mesh(settings: Settings, axes: Mapping[str, int], platform: str) -> Settings:
    """The same with batch and bfloat16 for what was asked per device or of the devices.

    Args:
      settings: as they were asked for.
      axes: the sizes of the mesh.
      platform: of its devices, as JAX calls it.

    Raises:
      ConfigError: if the batch that was asked for does not divide.
    """
    changes: dict[str, Any] = {"batch_per_device": None, "batch": _rows(settings, axes)}
    if settings.bfloat16_on is not None:
        changes |= {"bfloat16_on": None, "bfloat16": platform != "cpu"}
    return dataclasses.replace(settings, **changes)


def _rows(settings: Settings, axes: Mapping[str, int]) -> int:
    groups = axes["data"] * axes["fsdp"]
    if settings.batch_per_device is not None:
        return settings.batch_per_device * groups
    asked = ROWS if settings.batch is None else settings.batch
    whole = -(-asked // groups) * groups
    if settings.batch not in (None, whole):
        where = settings.plan or "these devices"
        raise ConfigError(
            f"batch must be a multiple of data * fsdp = {groups} on {where}, found {asked}; pass "
            f"--batch {whole}, --batch-per-device {whole // groups} or a larger --tensor"
        )
    return whole


def in_steps(settings: Settings, total: int, epoch: int) -> Settings:
    """The same with warmup, eval_every and save_every for what was asked per epoch or step.

    Args:
      settings: as they were asked for.
      total: the optimizer steps of the run.
      epoch: the optimizer steps of one epoch.
    """
    changes: dict[str, Any] = {}
    if settings.warmup_steps is not None:
        changes |= {"warmup_steps": None, "warmup": min(settings.warmup_steps / total, 1.0)}
    for often, every in (("evals_per_epoch", "eval_every"), ("saves_per_epoch", "save_every")):
        if (times := getattr(settings, often)) is not None:
            changes |= {often: None, every: max(epoch // times, 1)}
    return dataclasses.replace(settings, **changes)
