"""What the user asks for: the scale in closed form, and a config that survives JSON."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rl

FULL = rl.LoraConfig(
    rank=8,
    alpha=32.0,
    targets=("q/kernel", "v/kernel"),
    exclude=r".*/layer_0/.*",
    rules=(
        rl.Rule(r"z/.*", rank=64),
        rl.Rule(r"a/.*", alpha=1.5),
        rl.Rule(r".*", rank=2, alpha=3.0),
    ),
    scaling="lora",
    init="normal",
    dtype=jnp.bfloat16,
    unsupported="merge",
)


@pytest.mark.parametrize("rank", [1, 2, 3, 16, 100, 4096])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 16.0, 1e-6])
def test_the_rslora_scale_is_alpha_over_the_root_of_the_rank(alpha, rank):
    assert rl.scale(alpha, rank) == pytest.approx(alpha * rank**-0.5, rel=1e-15)
    assert rl.scale(alpha, rank, "rslora") == rl.scale(alpha, rank)


@pytest.mark.parametrize("rank", [1, 2, 3, 16, 100, 4096])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 16.0, 1e-6])
def test_the_lora_scale_is_alpha_over_the_rank(alpha, rank):
    assert rl.scale(alpha, rank, "lora") == pytest.approx(alpha / rank, rel=1e-15)


def test_scales_of_perfect_squares_are_exact():
    assert [rl.scale(12.0, r) for r in (1, 4, 9, 16, 36, 144)] == [12.0, 6.0, 4.0, 3.0, 2.0, 1.0]


def test_both_scalings_agree_at_rank_one():
    assert rl.scale(7.0, 1) == rl.scale(7.0, 1, "lora") == 7.0


def test_quadrupling_the_rank_halves_the_scale():
    assert rl.scale(5.0, 4 * 24) == pytest.approx(rl.scale(5.0, 24) / 2, rel=1e-15)


@pytest.mark.parametrize("scaling", ["rslora", "lora"])
def test_the_scale_of_a_config_is_that_of_its_fields(scaling):
    config = rl.LoraConfig(rank=10, alpha=3.0, scaling=scaling)
    assert config.scale == rl.scale(3.0, 10, scaling)


def test_the_defaults_are_rslora_on_all_linear_weights():
    config = rl.LoraConfig(rank=4)
    assert (config.targets, config.scaling, config.alpha) == ("all-linear", "rslora", 16.0)
    assert (config.exclude, config.rules, config.dtype) == ((), (), None)
    assert (config.init, config.unsupported) == ("kaiming", "error")


def test_a_config_survives_json_with_every_field_set():
    written = json.dumps(FULL.to_dict())
    assert rl.LoraConfig.from_dict(json.loads(written)) == FULL


def test_a_default_config_survives_json():
    config = rl.LoraConfig(rank=4)
    assert rl.LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_rules_keep_their_order_even_when_keys_are_sorted():
    written = json.dumps(FULL.to_dict(), sort_keys=True)
    rules = rl.LoraConfig.from_dict(json.loads(written)).rules
    assert [rule.pattern for rule in rules] == ["z/.*", "a/.*", ".*"]
    assert rules == FULL.rules


def test_a_written_config_names_every_field():
    names = [field.name for field in dataclasses.fields(rl.LoraConfig)]
    assert list(FULL.to_dict()) == names
    assert FULL.to_dict()["rules"][1] == {"pattern": "a/.*", "rank": None, "alpha": 1.5}


def test_a_short_dict_gets_the_defaults():
    assert rl.LoraConfig.from_dict({"rank": 4}) == rl.LoraConfig(rank=4)


def test_numpy_numbers_can_be_written_as_json():
    config = rl.LoraConfig(
        rank=np.int64(8), alpha=np.float32(2.0), rules=(rl.Rule(".*", np.int32(3)),)
    )
    read = rl.LoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (read.rank, read.alpha, read.rules[0].rank) == (8, 2.0, 3)


def test_a_list_and_a_tuple_of_suffixes_make_equal_configs():
    listed = rl.LoraConfig(rank=4, targets=["q", "v"], exclude=["head"], rules=[rl.Rule(".*", 2)])
    tupled = rl.LoraConfig(rank=4, targets=("q", "v"), exclude=("head",), rules=(rl.Rule(".*", 2),))
    assert listed == tupled
    assert hash(listed) == hash(tupled)


def test_a_dtype_is_kept_by_its_name():
    spellings = ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"))
    assert {rl.LoraConfig(rank=4, dtype=dtype).dtype for dtype in spellings} == {"bfloat16"}


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError, match="rank"):
        rl.LoraConfig(rank=4).rank = 8


def test_an_integer_alpha_is_a_number():
    assert math.isclose(rl.LoraConfig(rank=4, alpha=6).scale, 3.0)


def test_a_rule_may_set_one_number_or_both():
    assert rl.Rule(".*", rank=4).alpha is None
    assert rl.Rule(".*", alpha=4.0).rank is None
    assert rl.Rule(".*", 4, 8.0) == rl.Rule(pattern=".*", rank=4, alpha=8.0)
