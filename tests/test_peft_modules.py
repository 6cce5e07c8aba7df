"""PEFT folders in Hugging Face's space: every tensor used once, and written as PEFT writes."""

import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rslora_jax as rl
from rslora_jax.peft import Module, PeftAdapter, Settings, read, write

FIXTURES = Path(__file__).parent / "peft_fixtures"
CASES = sorted(str(f.parent.relative_to(FIXTURES)) for f in FIXTURES.glob("*/*/made.safetensors"))
PREFIX = "base_model.model."
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype("float32")


def put(path, tensors, **settings):
    """A PEFT folder, made by hand."""
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q"], **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({PREFIX + n: np.asarray(x) for n, x in tensors.items()}, path / WEIGHTS)
    return path


WEIGHTS = "adapter_model.safetensors"
Q = {"l.q.lora_A.weight": draw(2, 6), "l.q.lora_B.weight": draw(4, 2)}


# What PEFT wrote.


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_is_written_back_byte_for_byte(case, tmp_path):
    adapter = read(FIXTURES / case)
    write(tmp_path / "again", adapter)
    again, original = tmp_path / "again" / WEIGHTS, FIXTURES / case / WEIGHTS
    assert again.read_bytes() == original.read_bytes()
    assert read(tmp_path / "again").settings.to_dict() == adapter.settings.to_dict()


@pytest.mark.parametrize("case", CASES)
def test_every_number_of_a_folder_of_peft_is_in_the_adapter_once(case):
    adapter = read(FIXTURES / case)
    parts = [p for m in adapter.modules for p in (m.a, m.b, m.bias, m.magnitude)]
    parts += [*adapter.saved.values(), *(rows for _, rows in adapter.tokens.values())]
    found = np.sort(np.concatenate([np.ravel(p) for p in parts if p is not None]))
    tensors = load_file(FIXTURES / case / WEIGHTS).values()
    np.testing.assert_array_equal(found, np.sort(np.concatenate([np.ravel(t) for t in tensors])))


def test_experts_are_split_by_their_rank():
    for name in ("experts_out_in", "experts_in_out"):
        down, up = read(FIXTURES / name / "both").modules
        assert (down.parameter, down.depth, up.parameter, up.depth) == (
            "down_proj", 0, "gate_up_proj", 1,
        )  # fmt: skip
        tensors = load_file(FIXTURES / name / "both" / WEIGHTS)
        b = next(t for n, t in tensors.items() if n.endswith("base_layer.lora_B.weight"))
        count, out, rank = up.b.shape
        np.testing.assert_array_equal(up.b[1], b.reshape(out, rank, count)[:, :, 1])
        assert up.kind == "expert" and up.a.shape[:2] == (count, rank) and rank == up.rank


# What is made by hand.


def test_a_folder_holds_scales_ranks_and_alphas(tmp_path):
    other = {"l.k.lora_A.weight": draw(8, 6), "l.k.lora_B.weight": draw(4, 8)}
    folder = put(
        tmp_path / "a", Q | other, target_modules=["q", "k"], use_rslora=True, lora_alpha=3.5,
        rank_pattern={"k": 8}, alpha_pattern={"k": 32},
    )  # fmt: skip
    k, q = read(folder).modules
    assert (k.name, k.kind, k.rank, k.alpha) == ("l.k", "linear", 8, 32)
    assert k.scale == rl.scale(32, 8) and q.scale == rl.scale(3.5, 2) == 3.5 / math.sqrt(2)
    np.testing.assert_array_equal(q.a, Q["l.q.lora_A.weight"])


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_tensors_keep_their_dtype(tmp_path, dtype):
    folder = put(tmp_path / "a", {n: x.astype(dtype) for n, x in Q.items()})
    assert read(folder).modules[0].a.dtype == dtype
    write(tmp_path / "b", read(folder))
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (
        _resaved(folder / WEIGHTS, tmp_path / "c").read_bytes()
    )


def _resaved(source, target):
    save_file(load_file(source), target, metadata={"format": "pt"})
    return target


def test_views_and_slices_are_written_as_they_read(tmp_path):
    a, b = draw(6, 2).T, draw(4, 6)[:, ::3]
    adapter = PeftAdapter(
        Settings(r=2, target_modules=("q",)), (Module("l.q", "linear", a, b, 2, 8, 4.0),), {}, {}
    )
    write(tmp_path / "a", adapter)
    found = read(tmp_path / "a").modules[0]
    np.testing.assert_array_equal(found.a, a)
    np.testing.assert_array_equal(found.b, b)


def test_the_adapter_of_a_sub_folder_is_read_and_named(tmp_path):
    put(tmp_path / "many" / "one", Q)
    put(tmp_path / "many" / "two", Q)
    assert read(tmp_path / "many" / "two").modules[0].name == "l.q"
    with pytest.raises(rl.AdapterError, match=r"found adapters in its folders \['one', 'two'\]"):
        read(tmp_path / "many")


def test_overlapping_patterns_are_told(tmp_path):
    folder = put(tmp_path / "a", Q, rank_pattern={"q": 2, "l.*": 4})
    with pytest.warns(UserWarning, match=r"rank_pattern matches 'l.q' .* PEFT sorts the patterns"):
        assert read(folder).modules[0].rank == 2


def test_without_strictness_what_is_not_covered_is_told_and_read(tmp_path):
    folder = put(tmp_path / "a", Q, target_modules=["q", "gone"])
    with pytest.warns(UserWarning, match="target_modules names 'gone', but the file has no"):
        assert len(read(folder, strict=False).modules) == 1


@pytest.mark.parametrize("targets", [r".*\.q", "all-linear", None])
def test_targets_can_be_a_regex_a_shorthand_or_nothing(tmp_path, targets):
    assert read(put(tmp_path / "a", Q, target_modules=targets)).modules[0].name == "l.q"


def test_parameters_of_unknown_order_are_asked_for(tmp_path):
    tensors = {}
    for nested, size in ((".base_layer", 5), ("", 7)):
        tensors |= {f"m{nested}.lora_A.weight": draw(6, size)}
        tensors |= {f"m{nested}.lora_B.weight": draw(4, 6)}
    folder = put(
        tmp_path / "a", tensors, target_modules=None, target_parameters=["m.late", "m.early"],
    )  # fmt: skip
    with pytest.raises(rl.AdapterError, match=r"adapters of \['late', 'early'\].*parameters="):
        read(folder)
    late, early = read(folder, parameters=("early", "late")).modules
    assert (late.parameter, late.depth, late.a.shape) == ("late", 0, (3, 2, 7))
    assert (early.parameter, early.depth, early.a.shape) == ("early", 1, (3, 2, 5))
    write(tmp_path / "b", PeftAdapter(read(folder, parameters=("early", "late")).settings,
                                      (late, early), {}, {}))  # fmt: skip
    again = load_file(tmp_path / "b" / WEIGHTS)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[PREFIX + name], tensor)


# Bad input.


BAD = Q["l.q.lora_A.weight"].copy()
BAD[1, 2] = np.nan
K = {"l.k.lora_A.weight": draw(2, 6), "l.k.lora_B.weight": draw(4, 2)}


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({}, {}, "holds no tensors"),
        ({"l.q.lora_A.weight": draw(2, 6)}, {}, r"'l.q' has .* needs both lora_A.weight and"),
        ({"l.q.lora_B.weight": draw(4, 2)}, {}, r"'l.q' has .* needs both lora_A.weight and"),
        (Q | {"l.q.lora_embedding_A": draw(2, 9)}, {}, "'l.q' has .* no other pair"),
        (Q | {"l.q.lora_A.weight": draw(3, 6)}, {}, r"A has shape \(3, 6\) and B \(4, 2\)"),
        (Q, {"r": 8}, r"its rank is 2, but r and rank_pattern say 8"),
        (Q, {"rank_pattern": {"q": 4}}, r"its rank is 2, but r and rank_pattern say 4"),
        (Q | {"l.q.lora_A.weight": draw(2)}, {}, r"A has shape \(2,\) and B \(4, 2\)"),
        (Q | {"l.q.lora_B.weight": draw(4, 2, 3)}, {}, "which do not multiply"),
        (Q | {"l.q.lora_A.weight": BAD}, {}, "'base_model.*lora_A.weight' holds 1 values that are"),
        (Q | {"l.q.lora_A.weight": np.zeros((2, 0), "f4")}, {}, "holds nothing"),
        (Q | {"l.q.lora_A.weight": np.ones((2, 6), "i4")}, {}, "is I32; an adapter is one of"),
        (Q | K, {}, r"'l.k' has tensors, but target_modules \('q',\) has no such"),
        (Q, {"target_modules": ["q", "k"]}, "target_modules names 'k', but the file has no"),
        (Q, {"target_modules": ".*k"}, r"'l.q' has tensors, but target_modules '.\*k' has no"),
        (Q, {"exclude_modules": ["q"]}, r"exclude_modules \('q',\) leaves it out"),
        (Q, {"modules_to_save": ["l"]}, "'l.q' has factors, but modules_to_save stores it in full"),
        (Q, {"modules_to_save": ["head"]}, "modules_to_save names 'head', but the file has no"),
        (Q | {"head.weight": draw(3, 4)}, {}, "'head.weight' belongs to no adapter"),
        (Q | {"l.q.bias": draw(4)}, {"bias": "lora_only"}, "'l.q.bias' belongs to no adapter"),
        (Q, {"use_dora": True}, "'l.q' has no lora_magnitude_vector, but use_dora is True"),
        (Q | {"l.q.lora_magnitude_vector": draw(4)}, {}, "has lora_mag.*, but use_dora is False"),
        (Q | {"l.q.lora_magnitude_vector": draw(5)}, {"use_dora": True}, r"asks for \(4,\)"),
        (Q | {"l.q.lora_B.bias": draw(4)}, {}, "has lora_B.bias, but lora_bias is False"),
        (Q | {"l.q.lora_A.default.weight": draw(2, 6)}, {}, "Remove the adapter's own name"),
        (Q | {"l.q.lora_C.weight": draw(2, 6)}, {}, "is no tensor that is known"),
        (Q | {"../x.lora_A.weight": draw(2, 6)}, {}, "is no tensor name: words joined by dots"),
        (Q | {"a" * 300 + ".weight": draw(2)}, {}, "is no tensor name.*at most 160 characters"),
        (Q | {"a..b.weight": draw(2)}, {}, "is no tensor name"),
        (Q | {"e.token_adapter.trainable_tokens_delta": draw(2, 3)}, {}, "does not name its rows"),
        (Q, {"trainable_token_indices": [3]}, "trainable_token_indices is set, but the file has"),
        (
            Q | {"e.token_adapter.trainable_tokens_delta": draw(2, 3)},
            {"trainable_token_indices": {"e": [1, 2, 3]}},
            r"has shape \(2, 3\), trainable_token_indices names 3 rows",
        ),
        (
            {f"layers.2.{n[2:]}": x for n, x in Q.items()},
            {"layers_to_transform": [1]},
            r"'layers.2.q' has tensors, but layers_to_transform is \(1,\)",
        ),
        (
            {n.replace(".lora", ".base_layer.lora"): x for n, x in Q.items()},
            {},
            "which only target_parameters makes",
        ),
        (Q, {"lora_alpha": 0}, "The scale of 'l.q' cannot be computed"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(tmp_path, tensors, settings, message):
    with pytest.raises(rl.AdapterError, match=message):
        read(put(tmp_path / "bad", tensors, **settings))


def test_names_without_the_prefix_are_refused(tmp_path):
    folder = put(tmp_path / "a", Q)
    save_file(Q, folder / WEIGHTS)
    with pytest.raises(rl.AdapterError, match=r"does not start with 'base_model.model.'"):
        read(folder)


def test_pickles_and_missing_files_are_named(tmp_path):
    folder = put(tmp_path / "a", Q)
    (folder / WEIGHTS).unlink()
    with pytest.raises(rl.AdapterError, match=f"needs {WEIGHTS}, found .*adapter_config.json"):
        read(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(rl.AdapterError, match=r"'adapter_model.bin'\], a pickle.*is not read"):
        read(folder)
    with pytest.raises(rl.AdapterError, match=r"found no folder .*nowhere"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(rl.AdapterError, match=r"needs adapter_config.json, found nothing"):
        read(tmp_path / "empty")


def test_an_inconsistent_adapter_is_not_written(tmp_path):
    module = Module("l.q", "linear", draw(2, 6), draw(4, 3), 2, 8, 4.0)
    adapter = PeftAdapter(Settings(r=2, target_modules=("q",)), (module,), {}, {})
    with pytest.raises(rl.AdapterError, match="which do not multiply"):
        write(tmp_path / "a", adapter)
    other = module._replace(b=draw(4, 2), scale=2.0)
    with pytest.raises(rl.AdapterError, match=r"'l.q.weight' has the scale 2.0.* give 4.0"):
        write(tmp_path / "a", adapter._replace(modules=(other,)))
    twice = adapter._replace(modules=(module, module))
    with pytest.raises(rl.AdapterError, match=re.escape("Two tensors would be named ['l.q.lora")):
        write(tmp_path / "a", twice)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_unless_told(tmp_path):
    adapter = read(put(tmp_path / "a", Q))
    with pytest.raises(rl.AdapterError, match=r"exists already.*overwrite=True"):
        write(tmp_path / "a", adapter)
    write(tmp_path / "a", adapter, overwrite=True)
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["adapter_config.json", WEIGHTS]
