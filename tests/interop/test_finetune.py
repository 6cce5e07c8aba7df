"""What a fine-tune writes computes the same in PEFT and transformers, and answers the same.

Run with `python -m pytest tests/interop`, in an environment with the extra `interop`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rslora_jax as rl
from finetune import program
from generate import empty_cache, generate, left_padded
from llama import Llama
from pretrained import Source, open_model
from tests.checkpoints import tokenizer_of
from tests.interop.tiny import QUIET, read_by_peft

pytestmark = QUIET
SIZES = {
    "vocab_size": 11,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
PROMPTS = ["a", "abc", "b c", "cabde", "dd e ab"]
STEPS, LIMIT = 12, 8


class Run(NamedTuple):
    """A run of the program, and the model that it made, in JAX."""

    folder: Path
    source: Source
    apply: Any
    params: rl.LoraParams


def make_model(folder):
    """A random Llama as transformers saves it."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer_of().save(str(folder / "tokenizer.json"))


def one_device(*_):
    types = (jax.sharding.AxisType.Auto,) * 3
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh((1, 1, 1), axes, axis_types=types, devices=jax.devices()[:1])


def trained(folder, **changes):
    """Runs the program; the factors are those of its last checkpoint."""
    make_model(folder / "model")
    rows = [{"prompt": words, "completion": f"{n % 2 + 1}2d"} for n, words in enumerate(PROMPTS)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    told = {"model": str(folder / "model"), "dataset": str(folder / "rows.jsonl")}
    told |= {"output": str(folder / "run"), "steps": STEPS, "batch": 2, "length": 16}
    told |= {"learning_rate": 0.05, "eval_fraction": 0, "tensorboard": False, "merge": True}
    told |= {"rank": 4, "alpha": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 5}}
    (folder / "run.yaml").write_text(yaml.safe_dump(told | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "mesh_of", one_device)
        assert program.main([str(folder / "run.yaml")], meet=lambda: None) == 0
    source = open_model(folder / "model")
    state = rl.checkpoint.restore(folder / "run" / "checkpoints" / str(STEPS))
    model = Llama(source.config)
    params = rl.LoraParams(source.load(), state.params)
    return Run(folder / "run", source, rl.attach(model.apply, state.sites), params)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("finetune"))


def tokens_of(run):
    """The prompts, each a list of tokens."""
    return [run.source.tokenizer.encode(words).ids for words in PROMPTS]


def logits_here(run, tokens):
    return np.asarray(run.apply(run.params, tokens))


def answers_here(run):
    prompts, lengths = left_padded(tokens_of(run))
    cache = empty_cache(run.source.config, len(prompts), prompts.shape[1] + LIMIT)
    said = generate(run.apply, run.params, cache, prompts, lengths, limit=LIMIT, eos=run.source.eos)
    return said.rows()


def logits_there(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


def answers_there(model, run):
    prompts, lengths = left_padded(tokens_of(run))
    width = prompts.shape[1]
    real = np.arange(width) >= width - lengths[:, None]
    said = model.eval().generate(
        input_ids=torch.from_numpy(prompts),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        do_sample=False,
        max_new_tokens=LIMIT,
    )
    return [until_the_end(row.tolist(), run.source.eos) for row in said[:, width:]]


def until_the_end(tokens, eos):
    ends = [n for n, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0]] if ends else tokens


def assert_the_same(model, run):
    """Logits to 1e-4, and every greedy answer."""
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 20))
    wanted = logits_here(run, tokens)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(logits_there(model, tokens), wanted, rtol=0, atol=1e-4)
    assert answers_there(model, run) == answers_here(run)


def base_of(run):
    return AutoModelForCausalLM.from_pretrained(run.source.path)


@pytest.mark.parametrize("form", ["adapter", "adapter-portable"])
def test_an_exported_adapter_computes_and_answers_the_same_in_peft(run, form):
    assert_the_same(read_by_peft(base_of(run), run.folder / form), run)


def test_the_training_is_what_is_compared(run):
    untrained = run.source.load()
    start = run._replace(apply=Llama(run.source.config).apply, params=untrained)
    tokens = np.array(tokens_of(run)[-1:])
    assert np.abs(logits_here(run, tokens) - logits_here(start, tokens)).max() > 0.5
    assert answers_here(run) != answers_here(start)
    assert_the_same(base_of(run), start)


def test_the_merged_folder_is_a_whole_model_of_transformers(run):
    assert_the_same(AutoModelForCausalLM.from_pretrained(run.folder / "merged"), run)
    words = AutoTokenizer.from_pretrained(run.folder / "merged")
    assert [words.encode(text) for text in PROMPTS] == tokens_of(run)
