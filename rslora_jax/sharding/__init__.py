"""Sharding: the factors follow the weights' shardings, and the optimizer's state the factors'."""

from rslora_jax.sharding.creation import init_sharded
from rslora_jax.sharding.placing import shard, shardings
from rslora_jax.sharding.policies import DEFAULT, Policy
from rslora_jax.sharding.sources import base_specs
from rslora_jax.sharding.specs import specs
from rslora_jax.sharding.states import optimizer_shardings

__all__ = [
    "DEFAULT",
    "Policy",
    "base_specs",
    "init_sharded",
    "optimizer_shardings",
    "shard",
    "shardings",
    "specs",
]
