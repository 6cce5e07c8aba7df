"""Fingerprints: the same for equal bits wherever they are, another one for any other bit."""

import itertools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rslora_jax.checkpoint import Fingerprint, fingerprint
from rslora_jax.checkpoint.content import _hash, content, place
from rslora_jax.paths import AdapterError

NARROW = (
    "bool int2 uint4 int4 int8 uint8 int16 uint32 float8_e4m3fn float8_e5m2 "
    "float4_e2m1fn float16 bfloat16 float32 complex64"
).split()
WIDE = "int64 uint64 float64 complex128".split()


def words(array):
    return content(array).tolist()


def hashed(tree):
    return [leaf.content for leaf in fingerprint(tree).leaves]


def test_the_contents_are_those_of_every_other_version_and_machine():
    pinned = {
        "float32": (jnp.arange(6.0).reshape(2, 3), "8e0374d4dbfe4b68"),
        "bfloat16": (jnp.arange(6.0, dtype=jnp.bfloat16).reshape(2, 3), "9c00af6cc9350588"),
        "int8": (jnp.arange(6, dtype=jnp.int8).reshape(2, 3), "908bdd00855aafbb"),
        "bool": (jnp.arange(6).reshape(2, 3).astype(bool), "f22e911cd6087ad1"),
        "float64": (np.arange(6.0).reshape(2, 3) + 1 / 3, "6f1b115b4610c664"),
        "key": (jax.random.key(0), "ed0ca6a516336f6f"),
        "number": (1.5, "74e26e5f1984f98c"),
        "text": ("x", "4755bd1b01771ffa"),
    }
    for name, (array, wanted) in pinned.items():
        assert (name, hashed({"x": array})) == (name, [wanted])


def test_the_digest_of_a_tree_is_pinned_too():
    digest = fingerprint({"b": np.int32([1, 2]), "a": np.float32(3)}).digest
    assert digest == "45757bfe07ed3c2487fe34026d4817e91ee55263a6c0277e77ec36f5ee64151e"


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_it_is_the_sum_of_mixed_bits_and_places(shape):
    """Parity with Python's integers, one element after the other."""
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def mix(word, first, second):
        word = (word ^ word >> 16) * first % 2**32
        word = (word ^ word >> 15) * second % 2**32
        return word ^ word >> 15

    def where(index, stream):
        word = 0x9E3779B9 * (stream + 1)
        for axis, k in enumerate(index):
            salt = 0x85EBCA6B * (axis + 1) + 0x9E3779B9 * stream
            word += mix((k + salt) % 2**32, 0x7FEB352D, 0x846CA68B)
        return word % 2**32

    sums = [0, 0]
    for index in np.ndindex(shape):
        bits = int(array[index].view(np.uint32))
        sums[0] += mix((bits + where(index, 0)) % 2**32, 0x21F0AAAD, 0x735A2D97)
        sums[1] += mix(bits ^ where(index, 1), 0x7FEB352D, 0x846CA68B)
    assert words(array) == [total % 2**32 for total in sums]


def test_every_bit_of_every_element_counts():
    array = np.random.default_rng(0).integers(0, 2**32, (4, 5), np.uint32)
    flips = [array]
    for place_, bit in itertools.product(range(20), range(32)):
        flipped = array.copy()
        flipped.flat[place_] ^= np.uint32(1 << bit)
        flips.append(flipped)
    found = np.asarray(jax.vmap(_hash)(jnp.asarray(np.stack(flips))))
    assert all(len({*lane}) == len(flips) for lane in found.T.tolist())


def test_a_swap_of_any_two_elements_is_seen():
    array = np.arange(24, dtype=np.uint32).reshape(4, 6)
    swaps = [array]
    for left, right in itertools.combinations(range(24), 2):
        swapped = array.copy()
        swapped.flat[left], swapped.flat[right] = array.flat[right], array.flat[left]
        swaps.append(swapped)
    found = np.asarray(jax.vmap(_hash)(jnp.asarray(np.stack(swaps))))
    assert all(len({*lane}) == len(swaps) for lane in found.T.tolist())


@pytest.mark.parametrize("dtype", [*NARROW, *WIDE])
def test_every_dtype_has_one_and_jax_and_numpy_agree(dtype):
    with jax.enable_x64(dtype in WIDE):
        array = np.array([[0, 1, 1], [1, 0, 0]]).astype(jnp.dtype(dtype))
        found = fingerprint([jnp.asarray(array)])
    assert found.leaves[0].dtype == dtype
    assert fingerprint([array]) == found  # 64-bit types too, which are not enabled here
    assert fingerprint([array[::-1]]) != found


def test_the_low_and_the_high_bits_of_wide_numbers_count():
    one = np.float64(1)
    numbers = [one, np.nextafter(one, 2), -one, np.float64(2), np.complex128(1j), np.complex128(1)]
    assert len({tuple(hashed([number])) for number in numbers}) == len(numbers)


def test_signs_of_zeros_and_payloads_of_nans_count():
    bits = np.uint32([0, 0x80000000, 0x7FC00000, 0x7FC00001]).view(np.float32)
    assert len({tuple(words(bits[k : k + 1])) for k in range(4)}) == 4


def test_empty_arrays_keep_their_shapes_and_numbers_are_arrays_of_no_axes():
    empty = fingerprint([jnp.zeros((0, 3)), np.zeros((3, 0), np.float32)]).leaves
    assert [(leaf.shape, leaf.content) for leaf in empty] == [
        ((0, 3), "0" * 16),
        ((3, 0), "0" * 16),
    ]
    assert hashed([1.5]) == hashed([np.float64(1.5)]) and hashed([True]) == hashed([np.True_])


def test_byte_orders_and_strides_do_not_count():
    array = np.arange(12.0).reshape(3, 4)
    swapped = array.astype(array.dtype.newbyteorder())
    assert fingerprint([swapped]) == fingerprint([array]) == fingerprint([array.T.copy().T])


def test_typed_keys_count_by_their_data_and_kind():
    assert hashed([jax.random.key(0)]) != hashed([jax.random.key(1)])
    kinds = [fingerprint([jax.random.key(0, impl=name)]) for name in ("threefry2x32", "rbg")]
    assert kinds[0].leaves[0].dtype == "key<fry>" != kinds[1].leaves[0].dtype


def test_positions_beyond_two_to_the_32_are_told_apart():
    """In an array of 2^20 by 2^20 by 8, flat positions 2^32 apart (and all others drawn)."""
    rng = np.random.default_rng(0)
    rows, columns, last = (rng.integers(0, n, 20000, np.uint32) for n in (2**20, 2**20, 8))
    flat = (rows.astype(np.uint64) << 23) + (columns.astype(np.uint64) << 3) + last
    shifted = rows ^ np.uint32(2**9)  # moves the flat position by 2^32
    with np.errstate(over="ignore"):
        pairs = [
            np.stack([place([r, columns, last], lane) for lane in (0, 1)], -1)
            for r in (rows, shifted)
        ]
    assert np.unique(np.concatenate(pairs), axis=0).shape[0] == 2 * np.unique(flat).size
    assert not (pairs[0] == pairs[1]).all(-1).any()


def meshes():
    for kind in (AxisType.Auto, AxisType.Explicit):
        yield jax.make_mesh((2, 2), ("p", "q"), axis_types=(kind, kind))


ARRAY = np.random.default_rng(0).standard_normal((8, 16, 64)).astype(np.float32)
SPECS = (P(), P("p", "q"), P(None, None, ("q", "p")))


def test_every_sharding_gives_the_same_and_devices_exchange_a_word_or_two():
    wanted = words(ARRAY)
    for mesh, spec in itertools.product(meshes(), SPECS):
        array = jax.device_put(ARRAY, NamedSharding(mesh, spec))
        compiled = _hash.lower(array).compile()
        assert np.asarray(compiled(array)).tolist() == wanted
        text = compiled.as_text()
        assert re.search(r"= .*(all-|collective)", text) or spec == P()
        for shape in re.findall(r"= (.*?) (?:all-|collective-|reduce-scatter)[\w-]*\(", text):
            for dims in re.findall(r"\w\d+\[([\d,]*)\]", shape):
                # One word of a lane from each of at most four devices.
                assert np.prod([int(n) for n in dims.split(",") if n]) <= 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_no_temporary_of_the_arrays_size_is_made(dtype):
    struct = jax.ShapeDtypeStruct((512, 1024), dtype)
    assert _hash.lower(struct).compile().memory_analysis().temp_size_in_bytes < 4096


def test_keys_may_be_sharded():
    keys = jax.random.split(jax.random.key(0), 8)
    for mesh in meshes():
        assert hashed([jax.device_put(keys, NamedSharding(mesh, P("p")))]) == hashed([keys])


def test_abstract_leaves_are_compared_by_shape_and_dtype_only():
    concrete = fingerprint({"w": jnp.ones((2, 3)), "v": jnp.ones(2)})
    struct = {"w": jax.ShapeDtypeStruct((2, 3), "float32"), "v": jax.ShapeDtypeStruct((2,), "int8")}
    abstract = fingerprint(struct)
    assert abstract.digest is None and concrete.digest is not None
    assert concrete.differences(abstract) == ["'v': dtype float32 in the first, int8 in the second"]
    assert abstract.differences(concrete) == ["'v': dtype int8 in the first, float32 in the second"]


def test_differences_name_the_path_and_both_values():
    first = fingerprint({"a": np.float32([1]), "b": np.float32([1]), "c": 1, "d": 1})
    second = fingerprint({"a": np.float32([2]), "b": np.float32([1, 1]), "d": 1, "e": 1})
    one, two = hashed([np.float32([1])])[0], hashed([np.float32([2])])[0]
    assert first.differences(second, ("saved", "given")) == [
        f"'a': content {one} in the saved, {two} in the given",
        "'b': shape (1,) in the saved, (2,) in the given",
        "'c': only in the saved, not in the given",
        "'e': only in the given, not in the saved",
    ]
    assert first.differences(first) == []


def test_it_returns_from_json():
    first = fingerprint({"b": jnp.ones(3), "a": {"k": jax.random.key(0), "s": "text"}})
    assert Fingerprint.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    abstract = fingerprint({"w": jax.ShapeDtypeStruct((2,), "float32")})
    assert Fingerprint.from_dict(abstract.to_dict()) == abstract


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(digest="0"), "was damaged"),
        (lambda d: d["leaves"][0].__setitem__(1, [4]), "was damaged"),
        (lambda d: d["leaves"].reverse(), "was damaged"),
        (lambda d: d["leaves"].append(d["leaves"][0]), "was damaged"),
        (lambda d: d["leaves"][0].pop(), r"leaf is \[path"),
        (lambda d: d["leaves"][0].__setitem__(1, [-4]), r"leaf is \[path"),
        (lambda d: d["leaves"][0].__setitem__(1, [True]), r"leaf is \[path"),
        (lambda d: d["leaves"][0].__setitem__(0, 3), r"leaf is \[path"),
        (lambda d: d["leaves"].__setitem__(0, None), r"leaf is \[path"),
        (lambda d: d.update(leaves={}), "lists its leaves"),
        (lambda d: d.pop("leaves"), "has a digest and leaves"),
    ],
)
def test_a_changed_fingerprint_is_refused(change, message):
    data = fingerprint({"a": 1, "b": 2}).to_dict()
    change(data)
    with pytest.raises(AdapterError, match=message):
        Fingerprint.from_dict(data)


def test_boxes_are_named_by_where_they_sit():
    boxed = {"w": nn.Partitioned(jnp.ones(3), ("x",))}
    assert fingerprint(boxed) == fingerprint({"w": jnp.ones(3)})


def test_functions_count_by_name_and_text_by_value():
    assert hashed({"f": jnp.sum}) == hashed({"f": jnp.sum}) != hashed({"f": jnp.mean})
    assert hashed({"t": "a"}) != hashed({"t": "b"})
    assert fingerprint({"t": None}).leaves == ()


@pytest.mark.parametrize("leaf", [object(), np.array(["a"]), np.array([object()])])
def test_other_leaves_are_refused_by_path(leaf):
    with pytest.raises(AdapterError, match="'outer/w'"):
        fingerprint({"outer": {"w": leaf}})


def test_inside_a_jit_it_is_refused():
    with pytest.raises(AdapterError, match=r"inside a jit.*'w'"):
        jax.jit(lambda x: fingerprint({"w": x}))(1.0)
