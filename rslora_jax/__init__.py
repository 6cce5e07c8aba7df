"""Rank-stabilized LoRA for any Flax (or other JAX) model, without touching the model."""

from rslora_jax import algebra, analysis, checkpoint, optim, peft, plan, quantize, sharding
from rslora_jax.adapt import Adapted, adapt, attach, value_and_grad
from rslora_jax.config import LoraConfig, Rule, scale
from rslora_jax.discover import find_sites
from rslora_jax.factors import LoraParams
from rslora_jax.merge import merge, unmerge
from rslora_jax.paths import AdapterError
from rslora_jax.sites import Site, Sites, describe

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "AdapterError",
    "LoraConfig",
    "LoraParams",
    "Rule",
    "Site",
    "Sites",
    "adapt",
    "algebra",
    "analysis",
    "attach",
    "checkpoint",
    "describe",
    "find_sites",
    "merge",
    "optim",
    "peft",
    "plan",
    "quantize",
    "scale",
    "sharding",
    "unmerge",
    "value_and_grad",
]
