"""A tiny random Llama on both sides: transformers' and the example's, with the same weights."""

import functools
import tempfile
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

import rslora_jax as rl
from rslora_jax.targets import choose
from tests.hugging import llama_of
from tests.interop.make_fixtures import LLAMA, call, new

# What PEFT 0.21.2 asks of transformers 5.23.0.
QUIET = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning"
)
TOKENS = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (2, 9))

# Ranks from 1 to 64, alphas that are no whole numbers, and a rank and alpha where no rule matches.
RULES = tuple(
    rl.Rule(f".*/{name}_proj/kernel", rank, alpha)
    for name, rank, alpha in [
        ("q", 64, None),
        ("k", 1, 0.75),
        ("v", 2, None),
        ("o", 3, 1.3),
        ("gate", 16, None),
        ("up", None, 2.5),
    ]
)


def torch_llama():
    """A fresh base: the same random weights at each call."""
    return new(lambda: LlamaForCausalLM(LLAMA))


@functools.cache
def base():
    """The base as (folder, apply, params)."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-llama-"))
    torch_llama().save_pretrained(folder)
    return folder, *llama_of(folder)


@functools.cache
def adapted(scaling="rslora", rules=RULES):
    """Random adapters of every matrix of the layers: (lora, sites)."""
    _, apply, params = base()
    config = rl.LoraConfig(4, 1.7, rules=rules, scaling=scaling)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the largest rank", UserWarning)  # 64 is above 24
        sites = choose(rl.find_sites(apply, params, TOKENS), config)
    rng, lora = np.random.default_rng(1), {}
    for site in sites:
        a, b = (rng.normal(0, 0.2, s).astype(np.float32) for s in site.factor_shapes)
        rl.paths.insert(lora, site.path, {"a": jnp.asarray(a), "b": jnp.asarray(b)})
    return lora, sites


def logits_here(lora, sites):
    """The logits of TOKENS, computed by this library."""
    _, apply, params = base()
    return np.asarray(rl.attach(apply, sites)(rl.LoraParams(params, lora), TOKENS))


def logits_there(model):
    """The logits of TOKENS, computed by torch."""
    return call(model.eval(), [torch.from_numpy(TOKENS)])[0].numpy()


def read_by_peft(model, folder, **kwargs):
    """PEFT's model of a folder, after a check that PEFT took every tensor and no other."""
    model = PeftModel.from_pretrained(model, folder, **kwargs)
    wanted = load_file(Path(folder) / "adapter_model.safetensors")
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    extra = {name for name in wanted if ".base_layer." in name and name not in found}
    assert found.keys() == wanted.keys() - extra
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.detach().numpy(), wanted[name])
    return model
