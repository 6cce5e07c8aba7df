"""Paths: one name for each leaf, the same in Linen, NNX and plain trees."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

from rslora_jax.paths import AdapterError, flatten, insert, lookup, nearest, unflatten

Pair = collections.namedtuple("Pair", ["left", "right"])


def test_a_path_joins_keys_attributes_and_indices_with_slashes():
    tree = {"layers": [{"kernel": 1.0}, {"kernel": 2.0}], "pair": Pair(3.0, 4.0)}
    flat = flatten(tree)
    assert flat.paths == ("layers/0/kernel", "layers/1/kernel", "pair/left", "pair/right")
    assert flat.leaves == (1.0, 2.0, 3.0, 4.0)


def test_paths_follow_the_order_of_the_leaves():
    tree = {"b": {"z": 1, "a": 2}, "a": (3, [4])}
    flat = flatten(tree)
    assert list(flat.leaves) == jax.tree.leaves(tree)
    assert flat.paths == ("a/0", "a/1/0", "b/a", "b/z")


def test_a_box_around_one_array_is_named_by_its_place():
    boxed = nn.Partitioned(jnp.ones((2, 3)), names=("model", None))
    logical = nn.LogicallyPartitioned(jnp.ones(3), names=("model",))
    assert flatten({"dense": {"kernel": boxed, "bias": logical}}).paths == (
        "dense/bias",
        "dense/kernel",
    )


def test_an_nnx_state_has_the_paths_of_a_linen_tree():
    _, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    assert flatten(state).paths == flatten(variables["params"]).paths == ("bias", "kernel")


def test_an_integer_key_and_a_list_index_read_the_same():
    assert flatten({"layers": {0: 1.0}}).paths == flatten({"layers": [1.0]}).paths


@pytest.mark.parametrize(
    "tree",
    [
        {"a": 1.0, "b": [2.0, (3.0, None)]},
        freeze({"params": {"dense": {"kernel": 1.0}}}),
        Pair({"x": 1.0}, []),
        {"k": nn.Partitioned(1.0, names=("model",))},
    ],
    ids=["containers", "frozen", "namedtuple", "boxed"],
)
def test_unflatten_rebuilds_the_type_with_other_leaves(tree):
    flat = flatten(tree)
    doubled = unflatten(flat, (2 * leaf for leaf in flat.leaves))
    assert doubled == jax.tree.map(lambda x: 2 * x, tree)
    assert type(doubled) is type(tree)


def test_a_frozen_dict_has_the_paths_of_a_dict():
    tree = {"params": {"dense": {"kernel": 1.0}}}
    assert flatten(FrozenDict(tree)).paths == flatten(tree).paths == ("params/dense/kernel",)


def test_two_leaves_of_one_name_are_refused_with_the_name():
    tree = {"a": {"b": 1.0}, "a/b": 2.0}
    with pytest.raises(AdapterError, match=r"'a/b' names more than one leaf\. Rename one"):
        flatten(tree)


def test_insert_makes_the_parents_and_keeps_the_siblings():
    tree = insert({"a": {"b": 1}}, "a/c/d", 2)
    assert tree == {"a": {"b": 1, "c": {"d": 2}}}
    assert insert({}, "top", 3) == {"top": 3}


def test_lookup_reads_what_insert_wrote_and_nothing_else():
    tree = insert({}, "a/b", 1)
    assert lookup(tree, "a/b") == 1
    assert lookup(tree, "a") == {"b": 1}
    assert lookup(tree, "a/c") is None
    assert lookup(tree, "a/b/c") is None


def test_nearest_names_the_closest_tails_first():
    known = ["layers/attn/q_proj/kernel", "layers/mlp/up/kernel", "norm/scale"]
    first, *_ = nearest("q_pro/kernel", known).split(", ")
    assert first == "'layers/attn/q_proj/kernel'"


def test_nearest_names_at_most_as_many_as_asked():
    assert nearest("x", ["x", "y", "z"], count=2).count(",") == 1
    assert nearest("x", []) == "none at all"
