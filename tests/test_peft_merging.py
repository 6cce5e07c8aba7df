"""Merging folders: what real PEFT merges, one tensor at a time, in the base's own dtype."""

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rslora_jax as rl
from rslora_jax.folders import open_folder
from rslora_jax.peft import Module, PeftAdapter, Settings, merge_folders, read
from rslora_jax.peft.shards import write_folder

FIXTURES = Path(__file__).parent / "peft_fixtures"
CASES = sorted(str(f.parent.relative_to(FIXTURES)) for f in FIXTURES.glob("*/*/made.safetensors"))
MERGED = [case for case in CASES if case != "zoo/conv2d_grouped"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype("float32")


def base_folder(path, tensors, config=None):
    path.mkdir(parents=True)
    save_file({n: np.asarray(x) for n, x in tensors.items()}, path / WEIGHTS)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def one(a, b, name="q", kind="linear", scale=2.0, parameter="", **settings):
    """An adapter of one module."""
    rank = b.shape[-1]
    targets = {"target_parameters": (f"{name}.{parameter}",)} if parameter else {}
    config = Settings(
        r=rank, lora_alpha=scale * rank, **{"target_modules": (name,), **targets, **settings}
    )
    module = Module(name, kind, a, b, rank, scale * rank, scale, parameter=parameter)
    return PeftAdapter(config, (module,), {}, {})


def merged(tmp_path, base, adapter, **options):
    """The tensors of the merged folder; a dict of tensors is put into a base first."""
    if isinstance(base, dict):
        base = base_folder(tmp_path / "base", base)
    merge_folders(base, adapter, tmp_path / "out", **options)
    folder = open_folder(tmp_path / "out")
    return {name: folder.read(name) for name in folder.tensors}


# Parity with PEFT.


@pytest.mark.parametrize("case", MERGED)
def test_the_merged_weights_are_those_of_peft(case, tmp_path):
    base = FIXTURES / case.split("/")[0] / "base"
    found = merged(tmp_path, base, FIXTURES / case, max_shard_bytes=4000)
    expected = load_file(base / WEIGHTS)
    made = load_file(FIXTURES / case / "made.safetensors")
    changed = {n.removeprefix("merged."): x for n, x in made.items() if n.startswith("merged.")}
    assert changed and set(found) == set(expected)
    for name, tensor in (expected | changed).items():
        if name in changed:
            np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(found[name], tensor)


# Closed forms.


def test_the_sum_is_formed_in_float32_and_rounded_once(tmp_path):
    weight = np.full((2, 2), 256, ml_dtypes.bfloat16)
    halves = [np.full((1, 2), 0.75, ml_dtypes.bfloat16), np.full((2, 1), 1.0, ml_dtypes.bfloat16)]
    found = merged(tmp_path, {"q.weight": weight}, one(*halves, scale=1.5))["q.weight"]
    # 256 + 1.125 rounds to 258 in bfloat16, whose step is 2 there; 1.5 * 0.75 is not exact there.
    assert found.dtype == ml_dtypes.bfloat16
    assert found.astype("float32").tolist() == [[258, 258], [258, 258]]


def test_a_float64_base_is_summed_in_float64(tmp_path):
    weight, a, b = (RNG.normal(size=shape) for shape in ((4, 3), (2, 3), (4, 2)))
    found = merged(tmp_path, {"q.weight": weight}, one(a, b))["q.weight"]
    np.testing.assert_allclose(found, weight + 2 * b @ a, rtol=1e-15)


def test_blocks_of_rows_give_the_same_sum(tmp_path, monkeypatch):
    weight, a, b = draw(10, 7), draw(2, 7), draw(10, 2)
    monkeypatch.setattr("rslora_jax.peft.weights.BLOCK", 21)
    found = merged(tmp_path, {"q.weight": weight}, one(a, b))["q.weight"]
    np.testing.assert_allclose(found, weight + 2 * b @ a, atol=1e-6)


def test_a_square_matrix_is_turned_by_fan_in_fan_out_alone(tmp_path):
    weight, a, b = draw(4, 4), draw(2, 4), draw(4, 2)
    base = base_folder(tmp_path / "base", {"q.weight": weight})
    for turned in (False, True):
        adapter = one(a, b, fan_in_fan_out=turned)
        found = merged(tmp_path, base, adapter, overwrite=True)["q.weight"]
        delta = 2 * b @ a
        np.testing.assert_allclose(found, weight + (delta.T if turned else delta), atol=1e-6)


def test_square_experts_are_asked_about(tmp_path):
    weight, a, b = draw(3, 4, 4), draw(3, 2, 4), draw(3, 4, 2)
    base = base_folder(tmp_path / "base", {"m.w": weight})
    adapter = one(a, b, "m", "expert", parameter="w", target_modules=None)
    with pytest.raises(rl.AdapterError, match=r"'m.w' has shape \(3, 4, 4\).*transposed=True"):
        merged(tmp_path, base, adapter)
    for turned in (False, True):
        found = merged(tmp_path, base, adapter, transposed=turned, overwrite=True)["m.w"]
        delta = 2 * b @ a
        delta = np.swapaxes(delta, 1, 2) if turned else delta
        np.testing.assert_allclose(found, weight + delta, atol=1e-6)


def test_a_stack_of_one_expert_is_read_off_the_base(tmp_path):
    weight, a, b = draw(1, 4, 3), draw(2, 3), draw(4, 2)
    adapter = one(a, b, "m", parameter="w", target_modules=None)
    found = merged(tmp_path, {"m.w": weight}, adapter)["m.w"]
    np.testing.assert_allclose(found[0], weight[0] + 2 * b @ a, atol=1e-6)


# The folder.


def test_shards_hold_no_more_than_told_and_the_index_names_them(tmp_path):
    tensors = {f"w{n}": draw(n + 1, 10) for n in range(6)}  # 40 to 240 bytes
    write_folder(tmp_path / "out", tensors.items(), {"a": 1}, max_shard_bytes=130)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    places = index["weight_map"]
    assert list(places) == sorted(tensors)
    files = [f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)]
    assert [places[f"w{n}"] for n in range(6)] == [files[0], *files]
    for file in files:
        for name, tensor in load_file(tmp_path / "out" / file).items():
            np.testing.assert_array_equal(tensor, tensors[name])
    names = [file.name for file in (tmp_path / "out").iterdir()]
    assert sorted(names) == sorted([*files, INDEX, "config.json"])


def test_one_shard_is_one_file_and_the_same_bytes_each_time(tmp_path):
    tensors = {"b": draw(3, 2).T, "a": draw(2)}
    for name in ("one", "two"):
        write_folder(tmp_path / name, tensors.items())
    assert [file.name for file in (tmp_path / "one").iterdir()] == [WEIGHTS]
    one_, two = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("one", "two"))
    assert one_ == two
    np.testing.assert_array_equal(load_file(tmp_path / "one" / WEIGHTS)["b"], tensors["b"])


def test_the_peak_of_memory_is_near_one_shard(tmp_path):
    size, count = 256, 12  # 256 KiB each, 3 MiB in all
    names = [f"l{n}.q" for n in range(count)]
    base = base_folder(tmp_path / "base", {f"{name}.weight": draw(size, size) for name in names})
    modules = tuple(
        Module(name, "linear", draw(2, size), draw(size, 2), 2, 4, 2.0) for name in names
    )
    adapter = PeftAdapter(Settings(r=2, lora_alpha=4, target_modules=("q",)), modules, {}, {})
    tensor = size * size * 4
    tracemalloc.start()
    merge_folders(base, adapter, tmp_path / "out", max_shard_bytes=2 * tensor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == count // 2
    # A shard of two tensors, the next weight, its sum and the block in float32.
    assert peak < 6.5 * tensor, peak / tensor


def test_what_stands_beside_the_weights_is_copied_but_no_pickle_and_no_adapter(tmp_path):
    base = base_folder(tmp_path / "base", {"q.weight": draw(4, 3)}, {"model_type": "x"})
    kept = ["generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "LICENSE"]
    left = ["pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors", "old.pt"]
    left += ["model.safetensors.index.json", "README.md"]
    for name in kept + left:
        (base / name).write_text("{}")
    merge_folders(base, one(draw(2, 3), draw(4, 2)), tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == sorted([*kept, "config.json", WEIGHTS])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "x"}


def test_progress_is_told_before_each_tensor_and_at_the_end(tmp_path):
    steps = []
    tensors = {"k.weight": draw(2, 2), "q.weight": draw(4, 3)}
    merged(tmp_path, tensors, one(draw(2, 3), draw(4, 2)), progress=lambda *s: steps.append(s))
    assert steps == [(0, 2, "k.weight"), (1, 2, "q.weight"), (2, 2, "")]


# Tied heads.


def tied(tmp_path, **config):
    tensors = {"model.embed_tokens.weight": draw(7, 4), "model.q.weight": draw(4, 4)}
    config = {"architectures": ["XForCausalLM"], "tie_word_embeddings": True, **config}
    return base_folder(tmp_path / "base", tensors, config), tensors["model.embed_tokens.weight"]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_an_adapted_embedding_leaves_a_tied_head_as_it_was(tmp_path):
    base, table = tied(tmp_path, text_config={"x": 1})
    a, b = draw(2, 7), draw(4, 2)
    with pytest.warns(UserWarning, match=r"tied to 'model.embed_tokens.weight'.*its own"):
        found = merged(tmp_path, base, one(a, b, "model.embed_tokens", "embedding"))
    np.testing.assert_allclose(found["model.embed_tokens.weight"], table + 2 * (b @ a).T, atol=1e-6)
    np.testing.assert_array_equal(found["lm_head.weight"], table)
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config["text_config"] == {"x": 1, "tie_word_embeddings": False}


def test_an_adapted_head_leaves_a_tied_embedding_as_it_was(tmp_path):
    base, table = tied(tmp_path)
    a, b = draw(2, 4), draw(7, 2)
    with pytest.warns(UserWarning, match="changes one of the two alone"):
        found = merged(tmp_path, base, one(a, b, "lm_head"))
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], table)
    np.testing.assert_allclose(found["lm_head.weight"], table + 2 * b @ a, atol=1e-6)


def test_a_head_that_is_to_follow_stays_tied(tmp_path):
    base, _ = tied(tmp_path)
    adapter = one(draw(2, 7), draw(4, 2), "model.embed_tokens", "embedding",
                  ensure_weight_tying=True)  # fmt: skip
    assert "lm_head.weight" not in merged(tmp_path, base, adapter)
    head = one(draw(2, 4), draw(7, 2), "lm_head", ensure_weight_tying=True)
    with pytest.raises(rl.AdapterError, match="ensure_weight_tying is true"):
        merged(tmp_path, base, head, overwrite=True)


def test_rows_of_tokens_are_shared_by_a_tied_head(tmp_path):
    base, table = tied(tmp_path)
    rows = draw(2, 4)
    adapter = PeftAdapter(Settings(r=2), (), {}, {"model.embed_tokens": ((5, 1), rows)})
    found = merged(tmp_path, base, adapter)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"][[5, 1]], rows)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"][[0, 6]], table[[0, 6]])
    assert "lm_head.weight" not in found and config_of(tmp_path / "out")["tie_word_embeddings"]


# Bad input.


@pytest.mark.parametrize(
    ("tensors", "adapter", "message"),
    [
        ({"model.q.weight": draw(4, 3)}, one(draw(2, 3), draw(4, 2)),
         r"'q.weight', which the base does not hold. The nearest are 'model.q.weight'"),
        ({"q.weight": draw(5, 3)}, one(draw(2, 3), draw(4, 2)),
         r"'q.weight' has shape \(5, 3\) in the base; .* need \(4, 3\) or \(3, 4\)"),
        ({"q.weight": draw(4)}, one(draw(2, 3), draw(4, 2)), r"has shape \(4,\) in the base"),
        ({"q.weight": np.ones((4, 3), "int8")}, one(draw(2, 3), draw(4, 2)), "is quantized"),
        ({"q.weight": draw(4, 3).astype("float16")},
         one(np.full((1, 3), 300, "f4"), np.full((4, 1), 300, "f4")),
         r"'q.weight': 12 of 12 merged values are not finite in float16"),
        ({"q.weight": draw(4, 3)},
         PeftAdapter(Settings(r=1), (), {"q.weight": draw(4, 4)}, {}),
         r"'q.weight' has shape \(4, 4\) in the adapter and \(4, 3\) in the base"),
        ({"q.weight": draw(4, 3)}, PeftAdapter(Settings(r=1), (), {"h.bias": draw(4)}, {}),
         "modules_to_save or a bias for 'h.bias', which the base does not hold"),
        ({"e.weight": draw(4, 3)}, PeftAdapter(Settings(r=1), (), {}, {"e": ((9,), draw(1, 3))}),
         r"rows of shape \(1, 3\) up to index 9, the base's embedding has shape \(4, 3\)"),
        ({"c.weight": draw(8, 2, 3, 3)}, one(draw(4, 4, 3, 3), draw(8, 2, 1, 1), "c", "conv"),
         "'c' is a grouped convolution"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, tensors, adapter, message
):
    with pytest.raises(rl.AdapterError, match=message):
        merged(tmp_path, tensors, adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_bias_of_b_needs_a_bias_of_the_base(tmp_path):
    adapter = one(draw(2, 3), draw(4, 2))
    module = adapter.modules[0]._replace(bias=draw(4))
    with pytest.raises(rl.AdapterError, match=r"a bias of lora_B for 'q\.bias'"):
        merged(tmp_path, {"q.weight": draw(4, 3)}, adapter._replace(modules=(module,)))


def test_the_sources_are_not_overwritten(tmp_path):
    base = base_folder(tmp_path / "base", {"q.weight": draw(4, 3)})
    for out in (base, tmp_path, base / ".." / "base"):
        with pytest.raises(rl.AdapterError, match="is read and would be replaced"):
            merge_folders(base, one(draw(2, 3), draw(4, 2)), out, overwrite=True)
    merge_folders(base, one(draw(2, 3), draw(4, 2)), tmp_path / "out")
    with pytest.raises(rl.AdapterError, match=r"out exists already"):
        merge_folders(base, one(draw(2, 3), draw(4, 2)), tmp_path / "out")


@pytest.mark.parametrize("limit", [0, -1, True])
def test_a_limit_below_one_byte_is_refused(tmp_path, limit):
    with pytest.raises(rl.AdapterError, match="max_shard_bytes must be at least 1"):
        write_folder(tmp_path / "out", [("a", draw(2))], max_shard_bytes=limit)


def test_a_name_that_comes_twice_or_no_tensor_at_all_is_refused(tmp_path):
    with pytest.raises(rl.AdapterError, match="Two tensors are named 'a'"):
        write_folder(tmp_path / "out", [("a", draw(2)), ("a", draw(2))], max_shard_bytes=8)
    with pytest.raises(rl.AdapterError, match="There are no tensors to write"):
        write_folder(tmp_path / "out", [])
    assert not list(tmp_path.iterdir())


def test_a_folder_and_what_was_read_of_it_merge_alike(tmp_path):
    base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "rslora"
    merge_folders(base, adapter, tmp_path / "one")
    merge_folders(base, read(adapter), tmp_path / "two")
    one_, two = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("one", "two"))
    assert one_ == two
