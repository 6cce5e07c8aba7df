"""Models for `rslora stability examples/models.py:NAME`: tiny, llama, smollm.

Each function takes a rank and returns what a rank sweep trains: a loss, the frozen tree, the
sites of adapters of that rank, and batches.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import registers
import rslora_jax as rl
import tiny as tiny_llama
from llama import Llama, LlamaConfig

STEPS, ROWS, LENGTH = 50, 8, 32

Study = tuple[Callable[..., jax.Array], Any, rl.Sites, Any]


def tiny(rank: int) -> Study:
    """A pretrained Llama of 31,000 parameters learns new facts: seconds on a CPU."""
    base = tiny_llama.pretrain(registers.pretraining(200, 64, 0), 0)
    lesson = registers.facts_lesson(0)
    batches = registers.shuffled(lesson.taught, STEPS, 64, 0)
    apply, sites = adapt(tiny_llama.predict, base, batches.tokens[0], rank)

    def loss(params: rl.LoraParams, batch: registers.Prompts) -> jax.Array:
        return tiny_llama.cross_entropy(apply(params, batch.tokens), batch.answers)

    return loss, base, sites, batches


def llama(rank: int) -> Study:
    """A random Llama, 4 layers of width 128, on random tokens: what initialization alone shows."""
    model = Llama(LlamaConfig(512, 128, 352, layers=4, heads=4, kv_heads=2, head_dim=32))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (STEPS, ROWS, LENGTH + 1), np.int32)
    base = jax.jit(model.init)(jax.random.key(0), tokens[0, :, :-1])
    apply, sites = adapt(model.apply, base, tokens[0, :, :-1], rank)

    def loss(params: rl.LoraParams, tokens: jax.Array) -> jax.Array:
        return tiny_llama.cross_entropy(apply(params, tokens[:, :-1]), tokens[:, 1:])

    return loss, base, sites, tokens


def smollm(rank: int) -> Study:
    """SmolLM2-135M-Instruct on atomic numbers: minutes on a CPU."""
    # The others need neither tokenizers and gguf nor the weights.
    from facts import Batch, atomic_numbers, fact_batch  # noqa: PLC0415
    from smollm import load  # noqa: PLC0415

    sizes, variables, tokenizer = load()
    facts = fact_batch(tokenizer, atomic_numbers())
    rows = np.arange(STEPS * ROWS).reshape(STEPS, ROWS) % len(facts.tokens)
    apply, sites = adapt(Llama(sizes).apply, variables, facts.tokens, rank)

    def loss(params: rl.LoraParams, batch: Batch) -> jax.Array:
        logits = apply(params, batch.tokens, positions=batch.positions)
        return tiny_llama.cross_entropy(logits, batch.labels)

    return loss, jax.device_put(variables), sites, facts.rows(rows)


def adapt(apply_fn: Callable[..., Any], base: Any, tokens: Any, rank: int) -> Any:
    """The adapted function and its sites; a sweep draws the factors itself."""
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
    config, key = rl.LoraConfig(rank=rank), jax.random.key(0)
    with warnings.catch_warnings():
        # A study may ask for more rank than the narrowest matrix can use.
        warnings.filterwarnings("ignore", ".*the largest rank that a weight", UserWarning)
        _, apply, sites = rl.adapt(apply_fn, structs, tokens, config=config, key=key)
    return apply, sites
