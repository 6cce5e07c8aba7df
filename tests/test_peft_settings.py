"""Settings of a PEFT folder: read strictly, written for every reader, matched as PEFT matches."""

import json
import math
import re
import warnings

import pytest

import rslora_jax as rl
from rslora_jax.files import read_json
from rslora_jax.peft import Settings
from rslora_jax.peft.patterns import check_pattern, covers, is_saved, matches


def settings(**keys):
    return Settings.from_dict({"r": 4, "target_modules": ["q_proj"], **keys})


# Scales and patterns.


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scale_is_that_of_the_library_at_the_matched_rank_and_alpha(use_rslora):
    found = settings(
        use_rslora=use_rslora, lora_alpha=8.5, rank_pattern={"q_proj": 16}, alpha_pattern={"k": 3}
    )
    rule = math.sqrt if use_rslora else float
    assert found.scale("layers.0.q_proj") == 8.5 / rule(16)
    assert found.scale("layers.0.k") == 3 / rule(4)
    assert found.rank_alpha("layers.0.k_proj") == (4, 8.5)


def test_the_first_pattern_in_the_order_of_the_file_wins():
    one = {"q_proj": 8, r"layers\.1\..*q_proj": 2}
    assert settings(rank_pattern=one).rank_alpha("layers.1.self_attn.q_proj")[0] == 8
    two = dict(reversed(one.items()))
    assert settings(rank_pattern=two).rank_alpha("layers.1.self_attn.q_proj")[0] == 2


@pytest.mark.parametrize(
    ("key", "name", "expected"),
    [
        ("q_proj", "q_proj", True),
        ("q_proj", "model.q_proj", True),
        ("proj", "model.q_proj", False),
        ("self_attn", "layers.0.self_attn.q_proj", False),
        (".*self_attn.*", "layers.0.self_attn.q_proj", True),
        ("q_proj|k_proj", "a.k_proj", True),
        (r"layers\.1\.q", "model.layers.1.q", True),
        (r"layers\.1\.q", "model.layers.11.q", False),
        ("layers.1.q", "model.layers.1.q", True),
    ],
)
def test_patterns_match_the_end_of_a_name_from_a_dot_on(key, name, expected):
    assert matches(key, name) is expected
    assert bool(re.match(rf"(.*\.)?({key})$", name)) is expected


def test_lists_name_endings_and_strings_are_whole_regular_expressions():
    assert covers(["q"], "a.q") and covers(["a.q"], "a.q") and not covers(["q"], "a.xq")
    assert covers(r".*\.(q|k)", "a.k") and not covers("q", "a.q")
    assert is_saved(["head"], "model.head.dense") and not is_saved(["head"], "model.heads")


def test_overlaps_with_different_values_are_told_and_others_are_not():
    clash = settings(rank_pattern={"q_proj": 8, ".*proj": 2}, alpha_pattern={"q_proj": 1, "q.*": 1})
    found = clash.overlaps(["l.q_proj", "l.k_proj"])
    assert len(found) == 1
    assert found[0].startswith("rank_pattern matches 'l.q_proj' with {'q_proj': 8, '.*proj': 2}")


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(?:a*)*", "([a-z]+)*x", ".*.*.*.*.*x", "(.*a){12}", "a?" * 20, "(a?b)+"],
)
def test_patterns_that_could_take_for_ever_are_refused(pattern):
    with pytest.raises(rl.AdapterError, match="could take for ever to match"):
        settings(target_modules=pattern)
    with pytest.raises(rl.AdapterError, match=r"A key of rank_pattern .* could take for ever"):
        settings(rank_pattern={pattern: 2})


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
        r"^(?!.*visual).*(?:q_proj|k_proj).*$",
        r"a\(b\)[)(*+]{2}",
    ],
)
def test_patterns_that_people_use_are_taken(pattern):
    check_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<a>x)(?P<a>y)", "\\"])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(rl.AdapterError, match="must be a regular expression"):
        settings(alpha_pattern={pattern: 2})


# What other versions write.


def test_missing_keys_take_the_defaults_of_peft():
    found = Settings.from_dict({"r": 4})
    assert (found.lora_alpha, found.use_rslora, found.bias) == (8, False, "none")
    assert found.scale("q") == 2.0


def test_a_missing_rank_is_refused_with_the_trap():
    with pytest.raises(rl.AdapterError, match=r"r is missing.*default of 8"):
        Settings.from_dict({"lora_alpha": 8, "target_modules": ["q"]})


def test_nulls_are_the_defaults():
    keys = ("fan_in_fan_out", "use_dora", "rank_pattern", "lora_bias", "init_lora_weights", "bias")
    found = settings(**dict.fromkeys(keys))
    assert found == settings()


def test_unknown_keys_with_a_value_are_named_once_and_empty_ones_are_not():
    with pytest.warns(UserWarning, match=r"{'new_math': 3, 'other': True}.*'0.30'") as caught:
        settings(new_math=3, other=True, quiet=None, empty={}, off=False, peft_version="0.30")
    assert len(caught) == 1 and "quiet" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("velora_config", {"num_groups": 64}),
        ("eva_config", {"rho": 2.0}),
        ("loftq_config", {}),
        ("runtime_config", {"ephemeral_gpu_offload": False}),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "orthogonal"),
        ("lora_dropout", 0.1),
        ("use_qalora", False),
        ("qalora_group_size", 16),
    ],
)
def test_settings_of_training_are_silent(key, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settings(**{key: value}).r == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens is set"),
        ("arrow_config", {"top_k": 3}, "arrow_config is set"),
        ("kasa_config", {"beta": 1e-4}, "kasa_config is set"),
        ("use_bdlora", {"nblocks": 2}, "use_bdlora is set"),
        ("use_qalora", True, "use_qalora is set"),
        ("layer_replication", [[0, 2]], "layer_replication is set"),
        ("megatron_config", {"x": 1}, "megatron_config is set"),
        ("monteclora_config", {"num_samples": 8}, "monteclora_config is set"),
        ("peft_type", "IA3", "peft_type is 'IA3'"),
        ("init_lora_weights", "pissa_niter_16", "belongs to a residual base"),
        ("init_lora_weights", "olora", "belongs to a residual base"),
        ("init_lora_weights", "corda", "belongs to a residual base"),
        ("init_lora_weights", "lora_ga", "belongs to a residual base"),
        ("init_lora_weights", "loftq", "belongs to a residual base"),
    ],
)
def test_settings_that_change_the_function_are_refused_by_name(key, value, message):
    with pytest.raises(rl.AdapterError, match=message):
        settings(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 0, "r must be a whole number of at least 1"),
        ("r", 4.0, "r must be a whole number"),
        ("r", True, "r must be a whole number"),
        ("r", None, "r must be a whole number"),
        ("r", 10**400, "r must be a whole number"),
        ("lora_alpha", "8", "lora_alpha must be a finite number"),
        ("lora_alpha", 10**400, "lora_alpha must be a finite number"),
        ("lora_alpha", math.nan, "lora_alpha must be a finite number"),
        ("rank_pattern", {"q": 0}, r"rank_pattern\['q'\] must be a whole number"),
        ("rank_pattern", ["q"], "rank_pattern must map patterns to numbers"),
        ("use_rslora", 1, "use_rslora must be true or false, found '1'"),
        ("bias", "some", "bias must be one of"),
        ("bias", ["none"], "bias must be one of"),
        ("target_modules", [3], "target_modules must be a list of names"),
        ("target_modules", {"q": 1}, "target_modules must be a list of names"),
        ("target_parameters", "w", "target_parameters must be a list of names"),
        ("layers_to_transform", [-1], "layers_to_transform must be whole numbers"),
        ("trainable_token_indices", [1, 1], "trainable_token_indices names an index twice"),
        ("trainable_token_indices", {"e": [1.5]}, r"trainable_token_indices\['e'\] must be whole"),
        ("base_model_name_or_path", 3, "base_model_name_or_path must be text"),
    ],
)
def test_values_out_of_range_are_refused_with_the_value(key, value, message):
    with pytest.raises(rl.AdapterError, match=message):
        settings(**{key: value})


def test_an_alpha_of_zero_names_the_module():
    with pytest.raises(rl.AdapterError, match=r"The scale of 'a.q' cannot be computed: alpha"):
        settings(lora_alpha=0).scale("a.q")


def test_layers_with_a_regex_are_refused_as_peft_does():
    with pytest.raises(rl.AdapterError, match="layers_to_transform is set, which PEFT refuses"):
        settings(target_modules=".*q", layers_to_transform=[1])


# Writing.


def test_what_is_written_reads_back_and_is_sorted():
    made = Settings(
        r=4, lora_alpha=8.5, use_rslora=True, rank_pattern={"q": 2, "k": 8},
        target_modules=("q_proj", "k_proj"), modules_to_save=("norm", "head"),
        trainable_token_indices={"embed": (7, 3)}, layers_to_transform=(1,),
    )  # fmt: skip
    written = made.to_dict()
    assert list(written) == sorted(written) and written["peft_type"] == "LORA"
    assert written["target_modules"] == ["k_proj", "q_proj"]
    assert written["trainable_token_indices"] == {"embed": [7, 3]}
    read = Settings.from_dict(json.loads(json.dumps(written)))
    assert read.to_dict() == written and read.rank_pattern == made.rank_pattern


def test_keys_that_older_versions_do_not_know_are_left_out_unless_used():
    written = settings().to_dict()
    assert not {"lora_bias", "target_parameters", "trainable_token_indices"} & set(written)
    assert settings(lora_bias=True).to_dict()["lora_bias"] is True
    assert {"r", "lora_alpha", "target_modules", "use_rslora"} <= set(written)


# The file.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"[4]", "must hold one JSON object"),
        (b'"r"', "must hold one JSON object"),
        (b"[" * 100_000 + b"]" * 100_000, "cannot be read as JSON"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "cannot be read as JSON"),
        (b'{"r": 4, "r": 8}', "the key 'r' is there twice"),
        (b'{"r": 4, "lora_alpha": NaN}', "NaN is no JSON number"),
        (b'{"r": 4, "lora_alpha": -Infinity}', "-Infinity is no JSON number"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "cannot be read as JSON"),
        (b'{"r": 4, "lora_alpha": 1e999}', "lora_alpha must be a finite number"),
        ('{"r": 4, "bias": "é"}'.encode("latin-1"), "cannot be read as JSON"),
        ('{"r": 4}'.encode("utf-16"), "cannot be read as JSON"),
    ],
)
def test_files_that_are_no_settings_are_named(tmp_path, content, message):
    file = tmp_path / "adapter_config.json"
    file.write_bytes(content)
    with pytest.raises(rl.AdapterError, match=f"adapter_config.json.*{re.escape(message)}"):
        Settings.read(tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b'\xef\xbb\xbf{"r": 4}')
    assert Settings.read(tmp_path).r == 4
    assert read_json(tmp_path / "adapter_config.json") == {"r": 4}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(rl.AdapterError, match=r"adapter_config\.json cannot be read as JSON: "):
        Settings.read(tmp_path)


def test_alternatives_of_one_beginning_multiply_with_repeats_and_are_refused():
    with pytest.raises(rl.AdapterError, match="could take for ever to match"):
        check_pattern("(?:a|a)" * 16 + ".*.*.*.*b", "target_modules")
    check_pattern(r".*\.(q|k|v|o)_proj.*(up|down).*(a|b)\.(c|d)", "target_modules")


def test_patterns_that_match_no_module_are_told():
    found = settings(rank_pattern={"q_proj": 8}, alpha_pattern={"up_prj": 64})
    (sentence,) = found.unused(["layers.0.q_proj", "layers.0.up_proj"])
    assert (
        sentence == "alpha_pattern has 'up_prj', which matches no adapted module and does nothing"
    )


def test_an_alpha_of_null_is_refused():
    with pytest.raises(rl.AdapterError, match="lora_alpha is null"):
        settings(lora_alpha=None)
