"""Adapters made by real PEFT compute here what they computed there.

tests/interop/make_fixtures.py made them, and says what each file holds.
"""

import numpy as np
import pytest
from safetensors.numpy import load_file

import rslora_jax as rl
from rslora_jax.axes import delta_subscripts
from rslora_jax.peft import hf_tensors, load, merge_folders
from tests.hugging import (
    CASES,
    FIXTURES,
    HELD,
    REFUSED,
    assert_close,
    family,
    loaded,
    numbered,
    resave,
    sites_of,
)
from tests.quick import compiled

# One of each way in which a tree and Hugging Face arrange a weight.
KINDS = [
    "experts_in_out/both",
    "experts_out_in/both",
    "experts_out_in/router",
    "llama/embedding_and_saved_head",
    "llama/lora",
    "zoo/conv1d",
    "zoo/conv1d_hf",
    "zoo/conv2d",
    "zoo/linear_bias",
]
# Here some layers have other ranks than the rest, or none: they are padded in a stack of layers.
PADDED = ["llama/lora_patterns", "llama/patterns", "llama/some_layers"]
# The bias of lora_B is added to the base's on reading, and PEFT's spare copy of an adapted
# embedding is not written back.
NOT_WRITTEN = {
    "llama/embedding_and_saved_head": ["base_model.model.model.embed_tokens.base_layer.weight"],
    "zoo/linear_bias": ["base_model.model.proj.lora_B.bias"],
}


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def outputs_of(apply, *args):
    outputs = compiled(apply)(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def weights_of(one):
    """Every leaf with its adapter merged, by path, in float64 and without the library's merge."""
    flat = rl.paths.flatten(one.params.base)
    weights = {p: np.float64(leaf) for p, leaf in zip(flat.paths, flat.leaves, strict=True)}
    for site in one.sites:
        factors = rl.paths.lookup(one.params.lora, site.path)
        a, b = np.float64(factors["a"]), np.float64(factors["b"])
        weights[site.path] += site.scale * np.einsum(delta_subscripts(site.axes), a, b)
    return weights


def merged_by_peft(case):
    """The whole model after PEFT merged the adapter."""
    made = load_file(FIXTURES / case / "made.safetensors")
    base = load_file(FIXTURES / case.split("/")[0] / "base" / "model.safetensors")
    merged = {name.removeprefix("merged."): tensor for name, tensor in made.items()}
    return {name: merged.get(name, tensor) for name, tensor in base.items()}


@pytest.mark.parametrize("name", ["llama", "zoo", "experts_in_out", "experts_out_in"])
def test_the_bases_of_the_samples_compute_the_same_here(name):
    made = family(name)
    for found, wanted in zip(
        outputs_of(made.apply, made.params, *made.inputs), made.outputs, strict=True
    ):
        assert_close(found, wanted)


@pytest.mark.parametrize("case", HELD)
def test_an_adapter_made_by_peft_computes_the_outputs_that_peft_recorded(case):
    made, one = family(case.split("/")[0]), loaded(case)
    found = outputs_of(rl.attach(made.apply, one.sites), one.params, *made.inputs)
    wanted = numbered(load_file(FIXTURES / case / "made.safetensors"), "out")
    for output, expected in zip(found, wanted, strict=True):
        assert_close(output, expected)
    # What is compared moved by at least a thousand times what it may be wrong by.
    pairs = zip(wanted, made.outputs, strict=True)
    assert max(np.abs(new - old).max() / np.abs(new).max() for new, old in pairs) > 1e-2


@pytest.mark.parametrize("case", KINDS)
def test_merged_weights_are_those_that_peft_merged_and_nothing_else_changes(case):
    made, one, wanted = family(case.split("/")[0]), loaded(case), merged_by_peft(case)
    found = dict(hf_tensors(one.params, one.sites, made.names))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor)


@pytest.mark.parametrize("case", [case for case in CASES if case != "zoo/conv2d_grouped"])
def test_merged_folders_hold_what_peft_merged_dora_too(case, tmp_path):
    merge_folders(FIXTURES / case.split("/")[0] / "base", FIXTURES / case, tmp_path / "out")
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), merged_by_peft(case)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor)


def test_a_grouped_convolution_which_peft_cannot_merge_is_refused_by_name(tmp_path):
    with pytest.raises(rl.AdapterError, match="split"):
        merge_folders(FIXTURES / "zoo/base", FIXTURES / "zoo/conv2d_grouped", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sum_of_base_and_factors_is_refused_by_name(case):
    made = family(case.split("/")[0])
    names = "self_attn|proj|mix|wide|point|table|split"
    with pytest.raises(rl.AdapterError, match=rf"'[\w.]*({names})[\w.]*'.*merge"):
        load(FIXTURES / case, made.params, made.names, sites=sites_of(case.split("/")[0]))


@pytest.mark.parametrize("case", [case for case in HELD if case not in PADDED])
def test_written_back_natively_the_file_holds_the_same_tensors_bit_for_bit(case, tmp_path):
    wanted = tensors_of(FIXTURES / case)
    for name in NOT_WRITTEN.get(case, ()):
        del wanted[name]
    found = tensors_of(resave(case, tmp_path / "out", "native"))
    if case == "zoo/linear_bias":
        del found["base_model.model.proj.base_layer.bias"]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize("form", ["native", "portable"])
@pytest.mark.parametrize("case", HELD)
def test_both_forms_are_read_back_as_the_same_weights(case, form, tmp_path):
    made, one = family(case.split("/")[0]), loaded(case)
    sites = sites_of(case.split("/")[0])
    again = load(resave(case, tmp_path / "out", form), made.params, made.names, sites=sites)
    found, wanted = weights_of(again), weights_of(one)
    assert found.keys() == wanted.keys()
    for path, weight in wanted.items():
        assert_close(found[path], weight, 1e-6)
