"""Dry run: what a run would do and need, without reading a weight or training a step."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import rslora_jax as rl
from finetune.batches import Batches
from finetune.corpus import Corpus
from finetune.exports import check
from finetune.planning import Shape, trace
from finetune.settings import Settings
from hosts import say

MIB = 2**20


def dry_run(settings: Settings, source: Any, rows: Corpus, batches: Batches, mesh: Mesh) -> None:
    """Prints sites, parameter counts, memory and steps."""
    traced = trace(settings, Shape(settings.model, source.config, source.structs), mesh)
    base, lora, state, _ = traced.args
    check(settings, lora, traced.adapted.sites)
    compiled = traced.step.lower(*traced.args).compile()
    say(f"{rl.describe(traced.adapted.sites)}\n")
    parts = {"base": base, "adapters": lora, "optimizer": state}
    say(memory({name: size_of(tree) for name, tree in parts.items()}, working(compiled), mesh))
    say(f"\n{work(settings, rows, batches)}")


def memory(sizes: dict[str, int], temporaries: int | None, mesh: Mesh) -> str:
    """A line for each part of the memory of a device."""
    told = dict(sizes)
    if temporaries is not None:
        told["activations and gradients"] = temporaries
    told["together"] = sum(told.values())
    width = max(map(len, told))
    lines = (f"  {name:{width}}  {size / MIB:10,.1f} MiB" for name, size in told.items())
    each = f"each of {mesh.size} devices" if mesh.size > 1 else "the device"
    return "\n".join((f"memory of {each}, as compiled for {jax.default_backend()}:", *lines))


def work(settings: Settings, rows: Corpus, batches: Batches) -> str:
    """How much there is to learn, in how many steps."""
    tokens = settings.batch * settings.accumulation * settings.length
    return (
        f"data: {batches.stats}\n{rows.describe()}\n{batches.steps:,} steps of at most "
        f"{tokens:,} tokens; nothing was trained"
    )


def working(compiled: Any) -> int | None:
    """Bytes of what a step makes and drops again, if XLA tells."""
    found = compiled.memory_analysis()
    return None if found is None else int(found.temp_size_in_bytes)


def size_of(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _bytes(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    dtype = jnp.dtype(leaf.dtype)
    bits = 4 if dtype.name in ("int4", "uint4") else 8 * dtype.itemsize
    return math.prod(shape) * bits // 8
