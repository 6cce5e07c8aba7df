"""The memory of a step of `examples/llama.py` as it stands, beside the planner's own Llama.

    PYTHONPATH=. python tests/benchmarks/example_plan.py

Llama 3.1 8B at rank 64 on v5e:16x16, 256 x 2048 tokens on (32, 8), layers recomputed. The example
holds a head's scores of all queries at once and the logits of all positions; the planner's Llama
computes both in blocks. Two compilations, minutes on two cores; kept for the next call.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import rslora_jax as rl
from rslora_jax.plan.plan import plan

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from llama import SPECS, Llama, LlamaConfig

MESH = {"fsdp": 32, "tensor": 8}
ROWS = PartitionSpec("fsdp")
SIZES = LlamaConfig(
    vocab_size=128256,
    d_model=4096,
    d_ff=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
)


def main() -> None:
    """Prints both plans side by side."""
    jax.config.update("jax_platforms", "cpu")
    run = rl.plan.Run(rl.plan.find_model("llama-3.1-8b"), MESH, batch=256, length=2048)
    own = rl.plan.adapters(run, 64)
    wanted = (example(), (own.step, own.args, own.names, own.donate))
    plans = [
        plan(step, args, mesh_shape=MESH, name=name, names=names, donate=donate)
        for name, (step, args, names, donate) in zip(
            ("examples/llama.py", "planner's Llama"), wanted, strict=True
        )
    ]
    print(rl.plan.compare(plans))


def example() -> tuple[Any, Any, tuple[str, ...], tuple[int, ...]]:
    """The step of the example's model: the step, its arguments, their names, what it donates."""
    mesh, tx = rl.plan.abstract_mesh(MESH), optax.adam(1e-4)
    model = Llama(SIZES, dtype=jnp.bfloat16, remat=True, activations=ROWS)
    tokens = jax.ShapeDtypeStruct((256, 2048), jnp.int32, sharding=NamedSharding(mesh, ROWS))
    with jax.sharding.use_abstract_mesh(mesh):
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
        config, key = rl.LoraConfig(rank=64, alpha=16.0), jax.random.key(0)
        params, apply, sites = rl.adapt(model.apply, base, tokens, config=config, key=key)
    base, lora = rl.sharding.shard(params, mesh, sites, SPECS)
    places = rl.sharding.optimizer_shardings(tx, lora, jax.tree.map(lambda x: x.sharding, lora))
    optimizer = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(tx.init, lora),
        places,
    )

    def loss_fn(params: rl.LoraParams, tokens: jax.Array) -> jax.Array:
        logits = apply(params, tokens)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(base: Any, lora: Any, optimizer: Any, tokens: jax.Array) -> Any:
        loss, grads = rl.value_and_grad(loss_fn)(rl.LoraParams(base, lora), tokens)
        updates, optimizer = tx.update(grads, optimizer, lora)
        return optax.apply_updates(lora, updates), optimizer, loss

    return step, (base, lora, optimizer, tokens), ("base", "lora", "optimizer", "tokens"), (1, 2)


if __name__ == "__main__":
    main()
