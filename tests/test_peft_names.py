"""Names between parameter paths and Hugging Face tensors, as data."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from llama import Llama, LlamaConfig
from rslora_jax.paths import AdapterError, flatten
from rslora_jax.peft.backwards import read_back
from rslora_jax.peft.names import LLAMA, Name, find, from_list, llama, names, to_list
from rslora_jax.peft.placing import place, place_all, places_of
from rslora_jax.peft.rules import fill, module_of

SIZES = LlamaConfig(97, 32, 48, layers=2, heads=4, kv_heads=2, head_dim=8)
LAYER = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]


def tree(**changes):
    """The shapes of the example's parameters."""
    model = Llama(dataclasses.replace(SIZES, **changes))
    return jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 3), np.int32))


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("leading", [False, True])
def test_every_parameter_of_the_example_has_the_name_that_transformers_gives_it(tied, leading):
    params = tree(tied=tied)
    placed = place_all(LLAMA, params if leading else params["params"], None)
    wanted = {f"model.layers.{k}.{name}" for k in range(2) for name in LAYER}
    wanted |= {"model.embed_tokens.weight", "model.norm.weight"}
    wanted |= set() if tied else {"lm_head.weight"}
    assert set(places_of(placed.values())) == wanted
    assert len(placed) == len(flatten(params).paths)


def test_biases_have_names_too():
    placed = place_all(LLAMA, tree(attention_bias=True, mlp_bias=True), None)
    found = places_of(placed.values())
    assert found["model.layers.1.self_attn.o_proj.bias"].placed.path.endswith("o_proj/bias")
    assert found["model.layers.1.mlp.up_proj.bias"].at == (1,)
    assert len(placed) == len(flatten(tree(attention_bias=True, mlp_bias=True)).paths)


@pytest.mark.parametrize("layer", ["layers_3", "layers/3"])
@pytest.mark.parametrize("root", ["", "params/"])
def test_layers_that_are_not_scanned_carry_their_number_in_the_path(layer, root):
    for part, tensor in [
        ("self_attn/q_proj/kernel", "self_attn.q_proj.weight"),
        ("mlp/down_proj/bias", "mlp.down_proj.bias"),
        ("input_layernorm/scale", "input_layernorm.weight"),
    ]:
        found = find(LLAMA, f"{root}{layer}/{part}")
        assert found.tensor == f"model.layers.3.{tensor}"
        assert found.stacked == 0


def test_the_first_rule_that_matches_wins():
    mine = names([("w", "one.weight"), (".", "two.weight")])
    assert find(mine, "w").tensor == "one.weight"
    assert find(mine, "v").tensor == "two.weight"
    assert find(mine, "ww") is None


def test_groups_and_indices_are_filled_in_side_by_side():
    (rule,) = names([(r"stack(\d)/w", r"h\1.{0}.x{1}.weight")])
    found = find([rule], "stack7/w")
    assert fill(found.tensor, (12, 3)) == "h7.12.x3.weight"


def test_names_survive_json():
    rules = llama(interleaved=8)
    assert from_list(json.loads(json.dumps(to_list(rules)))) == rules
    assert find(rules, "layers/self_attn/q_proj/kernel").name.head_dim == 8
    assert find(rules, "layers/self_attn/v_proj/kernel").name.rope is None


def test_a_parameter_of_a_module_is_told_from_its_weight():
    assert module_of("a.b.weight") == ("a.b", "")
    assert module_of("a.experts.down_proj") == ("a.experts", "down_proj")


def test_every_tensor_of_the_example_is_read_back_to_its_path():
    for name, where in places_of(place_all(LLAMA, tree(), None).values()).items():
        found = read_back(LLAMA, name)
        assert (found.path, found.at) == (where.placed.path, where.at)


def test_a_rule_of_another_form_is_not_read_backwards():
    assert read_back(names([("w+", "lin.weight")]), "lin.weight") is None
    assert read_back(names([("(a|b)/w", "lin.weight")]), "lin.weight") is None
    assert read_back(names([(r"h\.(\d+)-w", r"h.\1.weight")]), "h.3.weight").path == "h.3-w"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("w", "../up.weight"), "parts joined by single dots"),
        (("w", "/etc/weight"), "parts joined by single dots"),
        (("w", "a/b.weight"), "without '/'"),
        (("w", ""), "parts joined by single dots"),
        (("w(", "lin.weight"), "is no regular expression"),
        (("w", r"lin.\1.weight"), "has 0 groups"),
        (("w", "lin.{1}.weight"), r"Use \{0\} for the first stacked axis"),
        (("w", "lin.{0}.{0}.weight"), "each once"),
        (("w", "lin.weight", "xy"), "letters b, i, o"),
        ("w", r"A name is \(path, tensor\)"),
        ((1, 2), "two strings"),
    ],
)
def test_a_malformed_rule_is_refused(entry, message):
    with pytest.raises(AdapterError, match=message):
        names([entry])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "lstm"}, "Name.kind"),
        ({"stored": "ii"}, "Name.stored"),
        ({"rope": "halves"}, "Name.rope"),
        ({"rope": "interleaved"}, "even width of a head"),
        ({"rope": "interleaved", "head_dim": 7}, "even width of a head"),
    ],
)
def test_a_field_out_of_range_is_refused(fields, message):
    with pytest.raises(AdapterError, match=message):
        Name("w", "lin.weight", **fields)


@pytest.mark.parametrize("data", [{"path": "w"}, [1], [{"path": "w"}], [{"pth": 1, "tensor": ""}]])
def test_json_that_holds_no_names_is_refused(data):
    with pytest.raises(AdapterError, match=r"list of mappings|'path' and 'tensor'"):
        from_list(data)


def test_no_rules_at_all_are_refused():
    with pytest.raises(AdapterError, match="found no rules"):
        names([])


def test_a_path_without_a_name_is_refused_with_the_nearest_rules():
    with pytest.raises(AdapterError, match=r"No name matches the path 'layers/mlp/up/w'.*mlp"):
        place(LLAMA, "layers/mlp/up/w", struct(2, 4, 6))


def test_two_parameters_of_one_name_are_refused_with_both_paths():
    placed = place_all(
        names([("v|w", "lin.weight", "io")]), dict(v=struct(2, 3), w=struct(2, 3)), None
    )
    with pytest.raises(AdapterError, match=r"'v' and 'w' are both named 'lin.weight'"):
        places_of(placed.values())


@pytest.mark.parametrize(
    ("rule", "shape", "message"),
    [
        (("w", "h.lin.weight", "bio"), (2, 3, 4), r"only 0 indices. Put \{0\}"),
        (("w", "h.{0}.lin.weight", "io"), (3, 4), "1 indices for 0 stacked axes"),
        (("w", "h.{0}.{1}.lin.weight", "bio"), (2, 3, 4), "2 indices for 1 stacked axes"),
        (("w", "lin.weight", "io"), (2, 3, 4), "correct Name.axes"),
    ],
)
def test_a_name_with_too_few_or_too_many_indices_is_refused(rule, shape, message):
    with pytest.raises(AdapterError, match=message):
        place(names([rule]), "w", struct(*shape))
