"""What a quantized base saves, and what it changes: the bytes of a compiled step, and errors.

    PYTHONPATH=. python tests/benchmarks/quantized_bytes.py

A scanned bfloat16 Llama of `examples/llama.py` with adapters on all linear weights; the same step
on each base. The bytes are those that XLA assigns to the arguments and temporaries of the compiled
step (`memory_analysis`); the weights of the model are random. A minute on two cores.
"""

import argparse
import dataclasses
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import rslora_jax as rl
from rslora_jax.tables import Table

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from llama import Llama, LlamaConfig

SIZES = LlamaConfig(
    vocab_size=4096, d_model=512, d_ff=1408, layers=8, heads=8, kv_heads=4, head_dim=64, tied=True
)
BATCH, LENGTH, RANK = 4, 128, 16
FORMATS = {"bfloat16": None, "int8": 8, "nf4": 4, "int4": 4}
TX = optax.adam(1e-3)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=SIZES.layers)
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="full")
    options = parser.parse_args()
    remat = {"none": False, "full": True}.get(options.remat, options.remat)
    model = Llama(dataclasses.replace(SIZES, layers=options.layers), jnp.bfloat16, remat)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, SIZES.vocab_size)
    base = random_base(model, tokens)
    config, key = rl.LoraConfig(rank=RANK), jax.random.key(0)
    sites = rl.adapt(model.apply, abstract(base), tokens, config=config, key=key).sites
    print(f"jax {jax.__version__}, {jax.default_backend()}, Python {platform.python_version()}")
    print(f"{SIZES}, layers {options.layers}, remat {options.remat}, {BATCH} x {LENGTH} tokens\n")
    print(bytes_table(model, base, sites, tokens), "\n")
    print(errors(model, base, sites, tokens[:1, :32]))


def random_base(model: Llama, tokens: jax.Array) -> Any:
    """The model's parameters as it draws them, in bfloat16."""

    def make(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(key, tokens))

    return jax.jit(make)(jax.random.key(0))


def abstract(tree: Any) -> Any:
    """The shapes and dtypes of a tree."""
    return jax.eval_shape(lambda: tree)


def quantized(base: Any, sites: Any, format: str) -> Any:
    """The base in one of `FORMATS`."""
    bits = FORMATS[format]
    return base if bits is None else rl.quantize.quantize(base, sites, bits, format=format)


def bytes_table(model: Llama, base: Any, sites: Any, tokens: jax.Array) -> Table:
    """One row a format: bytes in millions, and their ratio to those of bfloat16.

    `weights` are the quantized ones with their scales, `base` all that is frozen.
    """
    base, rows = abstract(base), []
    for format in FORMATS:
        analysis, others = compiled(model, quantized(base, sites, format), tokens)
        found = analysis.argument_size_in_bytes - others
        rows.append({"base": format, "bytes": found, "temporaries": analysis.temp_size_in_bytes})
    first = rows[0]["bytes"]
    weights = sum(size(leaf) for leaf in adapted_leaves(base, sites))
    return Table.of(
        {
            "base": row["base"],
            "weights_mb": (row["bytes"] - first + weights) / 1e6,
            "x_weights": (row["bytes"] - first + weights) / weights,
            "base_mb": row["bytes"] / 1e6,
            "x_base": row["bytes"] / first,
            "temporaries_mb": row["temporaries"] / 1e6,
        }
        for row in rows
    )


def adapted_leaves(base: Any, sites: Any) -> list[Any]:
    """The weights of the sites."""
    flat = rl.paths.flatten(base)
    paths = {site.path for site in sites}
    return [leaf for path, leaf in zip(flat.paths, flat.leaves, strict=True) if path in paths]


def size(leaf: Any) -> int:
    """Bytes of an array."""
    return leaf.size * leaf.dtype.itemsize


def compiled(model: Llama, base: Any, tokens: jax.Array) -> tuple[Any, int]:
    """XLA's account of a training step, and the bytes of its arguments beside the base."""
    config = rl.LoraConfig(rank=RANK)
    params, apply, _ = rl.adapt(model.apply, base, tokens, config=config, key=jax.random.key(0))

    def loss_fn(params: rl.LoraParams, tokens: jax.Array) -> jax.Array:
        logits = apply(params, tokens)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(base: Any, lora: Any, state: Any, tokens: jax.Array) -> Any:
        loss, grads = rl.value_and_grad(loss_fn)(rl.LoraParams(base, lora), tokens)
        updates, state = TX.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    others = (params.lora, jax.eval_shape(TX.init, params.lora), abstract(tokens))
    program = jax.jit(step, donate_argnums=(1, 2)).lower(base, *others).compile()
    return program.memory_analysis(), sum(size(leaf) for leaf in jax.tree.leaves(others))


def errors(model: Llama, base: Any, sites: Any, tokens: jax.Array) -> Table:
    """`error_table` of every format."""
    tables = [
        rl.quantize.error_table(model.apply, base, quantized(base, sites, format), tokens)
        for format in FORMATS
        if FORMATS[format]
    ]
    return Table.of(row for table in tables for row in table.records())


if __name__ == "__main__":
    main()
