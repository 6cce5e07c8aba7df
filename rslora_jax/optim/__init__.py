"""Optim: Optax transforms and masks that train the adapters and leave the base alone."""

from rslora_jax.optim.freezing import (
    apply_updates,
    freeze_base,
    labels,
    lora_plus,
    trainable_mask,
)
from rslora_jax.optim.records import Records, record_norms, recorded

__all__ = [
    "Records",
    "apply_updates",
    "freeze_base",
    "labels",
    "lora_plus",
    "record_norms",
    "recorded",
    "trainable_mask",
]
