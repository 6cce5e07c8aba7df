"""Loading a pretrained model: where it lies, what is kept of it, and how little the host holds."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from llama import SPECS
from pretrained import ModelError, open_model
from rslora_jax.sharding import shardings
from tests.checkpoints import TINY, variables_of, write_folder

WIDE = dataclasses.replace(TINY, vocab_size=12, layers=8, d_model=64, d_ff=1024, head_dim=32)
SIZES = {
    "vocab_size": 12,
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "intermediate_size": 1024,
    "head_dim": 32,
}
KERNEL = "params/layers/mlp/up_proj/kernel"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(write_folder(tmp_path_factory.mktemp("wide"), WIDE, **SIZES))


def placed(structs, axis_type):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
    return shardings(mesh, rl.LoraParams(structs, {}), (), SPECS).base


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_every_leaf_is_loaded_to_where_it_is_to_lie(source, axis_type):
    places = placed(source.structs, axis_type)
    loaded = source.load(places)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == places
    jax.tree.map(np.testing.assert_array_equal, loaded, variables_of(WIDE))


def test_layers_that_lie_on_different_devices_are_loaded_too(source):
    mesh = jax.make_mesh((8,), ("stage",), axis_types=(AxisType.Auto,))

    def place(struct):
        return NamedSharding(mesh, P("stage") if struct.shape[0] == WIDE.layers else P())

    loaded = source.load(jax.tree.map(place, source.structs))
    kernel = loaded["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 64, 1024)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables_of(WIDE))


def halved(path, array):
    """Two arrays for a kernel of the layers: integers, and a scale for each output."""
    if "/layers/" not in path or not path.endswith("kernel"):
        return array
    scales = np.abs(array).max(axis=1, keepdims=True) / 127
    return {"values": np.rint(array / scales).astype(np.int8), "scales": scales}


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto, AxisType.Explicit])
def test_what_prepare_makes_of_a_tensor_is_stacked_and_sharded_part_by_part(source, axis_type):
    places = None if axis_type is None else placed(source.structs, axis_type)
    found = source.load(places, halved)["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    wanted = halved(KERNEL, variables_of(WIDE)["params"]["layers"]["mlp"]["up_proj"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    if axis_type is not None:
        assert found["values"].sharding.spec == P(None, "fsdp", "tensor")
        assert found["scales"].sharding.spec == P(None, None, "tensor")


def test_prepare_is_given_one_tensor_at_a_time(source):
    seen = []
    source.load(None, lambda path, array: (seen.append((path, array.shape)), array)[1])
    assert len(seen) == len(source.pieces) == 8 * 9 + 3
    assert seen.count((KERNEL, (1, 64, 1024))) == 8
    assert ("params/embed_tokens/embedding", (12, 64)) in seen


def test_a_prepare_that_drops_the_axis_of_the_layers_is_refused(source):
    with pytest.raises(ModelError, match=r"its first axis must be 1, the one layer"):
        source.load(None, lambda path, array: array[0] if "/layers/" in path else array)


def test_the_host_holds_about_one_tensor_at_a_time(source):
    source.load()  # traced and compiled before the count
    tracemalloc.start()
    loaded = source.load()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    largest = 64 * 1024 * 4
    assert total > 24 * largest
    assert peak < 4 * largest  # as stored, as asked for, and one that JAX has not let go of yet
