"""Folders written here compute the same in PEFT and transformers, and theirs compute the same here.

Run with `python -m pytest tests/interop`, in an environment with the extra `interop`.
"""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import rslora_jax as rl
from rslora_jax.peft import load, merge_folders, merge_to_hf, save
from tests.hugging import FIXTURES, HELD, assert_close, numbered, resave
from tests.interop.make_fixtures import call, families, new, randomize
from tests.interop.tiny import (
    QUIET,
    adapted,
    base,
    logits_here,
    logits_there,
    read_by_peft,
    torch_llama,
)

pytestmark = QUIET
FORMS = ["native", "portable"]
SCALINGS = ["rslora", "lora"]


def made_by_peft(folder, **changes):
    """Saves an adapter of PEFT's, with ranks 1 to 64 and patterns; returns its logits."""
    settings = {
        "r": 4,
        "lora_alpha": 1.7,
        "target_modules": "all-linear",
        "rank_pattern": {
            "q_proj": 64,
            "k_proj": 1,
            r"layers\.1\.self_attn\.v_proj": 2,
            r"layers\.[12]\..*o_proj": 33,
            "down_proj": 16,
        },
        "alpha_pattern": {"q_proj": 2.5, r"layers\.2\.mlp\.up_proj": 0.6},
    }
    config = LoraConfig(task_type="CAUSAL_LM", **{**settings, **changes})
    model = get_peft_model(torch_llama(), config)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    randomize(trained, seed=4, spread=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits_there(model)


def read_here(folder):
    loaded = load(folder, base()[2])
    return loaded, logits_here(loaded.params.lora, loaded.sites)


def facts(settings):
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    return {name: settings[name] for name in names}


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def merged_by_rule(folder, scale_of):
    """A torch model whose weights another tool merged: W + scale * B A, by that tool's rule."""
    settings = settings_of(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    model = torch_llama()
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            change = scale_of(settings, a.shape[0]) * (np.float64(b) @ np.float64(a))
            model.get_submodule(module).weight.data += torch.from_numpy(np.float32(change))
    return model


def vllm_rule(settings, _):
    """One scale for every module, whatever the patterns say."""
    root = np.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"]
    return settings["lora_alpha"] / root


def llama_cpp_rule(settings, rank):
    """Alpha over the tensor's own rank, whatever flags and patterns say."""
    return settings["lora_alpha"] / rank


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_peft_computes_the_same_logits_from_a_folder_written_here(scaling, form, tmp_path):
    lora, sites = adapted(scaling)
    save(tmp_path / "out", lora, sites, form=form)
    model = read_by_peft(torch_llama(), tmp_path / "out")
    assert_close(logits_there(model), logits_here(lora, sites))
    with model.disable_adapter():
        gap = logits_there(model) - logits_here(lora, sites)
    assert np.abs(gap).max() > 0.1 * np.abs(logits_here(lora, sites)).max()


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_one_rank_without_patterns_travels_too(scaling, rank, tmp_path):
    lora, sites = adapted(scaling, (rl.Rule(".*", rank),))
    save(tmp_path / "out", lora, sites)
    assert settings_of(tmp_path / "out")["rank_pattern"] == {}
    model = read_by_peft(torch_llama(), tmp_path / "out")
    assert_close(logits_there(model), logits_here(lora, sites))


@pytest.mark.parametrize("use_rslora", [True, False])
def test_a_folder_of_peft_computes_the_same_logits_here_and_after_every_way_back(
    use_rslora, tmp_path
):
    wanted = made_by_peft(tmp_path / "peft", use_rslora=use_rslora)
    loaded, logits = read_here(tmp_path / "peft")
    assert_close(logits, wanted)
    for form in FORMS:
        save(tmp_path / form, loaded.params.lora, loaded.sites, form=form)
        model = read_by_peft(torch_llama(), tmp_path / form)
        assert_close(logits_there(model), wanted)
        model.save_pretrained(tmp_path / f"{form} by peft", save_embedding_layers=False)
        again, logits = read_here(tmp_path / f"{form} by peft")
        assert_close(logits, wanted)
        assert [(s.rank, s.alpha) for s in again.sites] == [
            (s.rank, s.alpha) for s in read_here(tmp_path / form)[0].sites
        ]


def test_peft_writes_back_the_settings_and_tensors_that_were_written_here(tmp_path):
    lora, sites = adapted()
    save(tmp_path / "here", lora, sites, base_model="tiny-random")
    model = read_by_peft(torch_llama(), tmp_path / "here")
    model.save_pretrained(tmp_path / "there", save_embedding_layers=False)
    here, there = settings_of(tmp_path / "here"), settings_of(tmp_path / "there")
    assert facts(here) == facts(there)
    assert sorted(here["target_modules"]) == sorted(there["target_modules"])
    here, there = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("here", "there"))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        np.testing.assert_array_equal(there[name], tensor)


@pytest.mark.parametrize("rule", [vllm_rule, llama_cpp_rule])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_tools_that_ignore_patterns_or_flags_compute_the_portable_form_right(
    scaling, rule, tmp_path
):
    lora, sites = adapted(scaling)
    wanted = logits_here(lora, sites)
    for form in FORMS:
        save(tmp_path / form, lora, sites, form=form)
    assert_close(logits_there(merged_by_rule(tmp_path / "portable", rule)), wanted)
    # What the portable form is for: by the same rule the native one is another function.
    native = logits_there(merged_by_rule(tmp_path / "native", rule))
    assert np.abs(native - wanted).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 9_000])
@pytest.mark.parametrize("how", ["merge_to_hf", "merge_folders"])
def test_transformers_loads_the_merged_folder_whole_and_computes_the_same(
    how, max_shard_bytes, tmp_path
):
    (folder, _, params), (lora, sites), out = base(), adapted(), tmp_path / "out"
    if how == "merge_to_hf":
        both = rl.LoraParams(params, lora)
        merge_to_hf(out, both, sites, config=folder, max_shard_bytes=max_shard_bytes)
    else:
        save(tmp_path / "adapter", lora, sites)
        merge_folders(folder, tmp_path / "adapter", out, max_shard_bytes=max_shard_bytes)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (max_shard_bytes == 9_000)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert_close(logits_there(model), logits_here(lora, sites))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", HELD)
def test_peft_reads_every_sample_that_was_written_back(case, form, tmp_path):
    name = case.split("/")[0]
    _, make, inputs, _ = next(family for family in families() if family[0] == name)
    resave(case, tmp_path / "out", form)
    found = call(read_by_peft(new(make), tmp_path / "out").eval(), inputs)
    wanted = numbered(load_file(FIXTURES / case / "made.safetensors"), "out")
    for output, expected in zip(found, wanted, strict=True):
        assert_close(output.numpy(), expected)
