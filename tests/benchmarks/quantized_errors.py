"""How far the quantized weights of SmolLM2 are from the float ones, and the logits with them.

    PYTHONPATH=. python tests/benchmarks/quantized_errors.py

A row for each adapted weight, quantized alone, and one for all together (`error_table`).
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import rslora_jax as rl
from rslora_jax.tables import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from llama import Llama
from pretrained import open_model

TEXT = "The atomic number of tungsten is 74, and that of niobium is 41."
FORMATS = {"int8": 8, "nf4": 4, "int4": 4}


def main() -> None:
    """Prints the table."""
    source = open_model("smollm2")
    model, base = Llama(source.config), source.load()
    tokens = jnp.asarray([source.tokenizer.encode(TEXT).ids])
    config, key = rl.LoraConfig(rank=8), jax.random.key(0)
    sites = rl.adapt(model.apply, base, tokens, config=config, key=key).sites
    rows = []
    for name, bits in FORMATS.items():
        small = rl.quantize.quantize(base, sites, bits=bits, format=name if bits == 4 else None)
        rows += rl.quantize.error_table(model.apply, base, small, tokens).records()
    print(f"{tokens.size} tokens\n{Table.of(rows)}")


if __name__ == "__main__":
    main()
