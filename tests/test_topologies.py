"""Topologies, chips and meshes: names read, and refused with what would do."""

import math

import pytest
from jax.sharding import AxisType

from rslora_jax.paths import AdapterError
from rslora_jax.plan.chips import CHIPS, chip
from rslora_jax.plan.topologies import KNOWN, abstract_mesh, check_mesh, topology


def test_every_known_name_is_read_and_lies_within_its_pod():
    found = [topology(name) for name in KNOWN]
    assert [each.name for each in found] == list(KNOWN)
    assert all(1 <= each.chips <= each.chip.pod for each in found)
    assert {each.chip.name for each in found} == {"v4", "v5e", "v5p", "v6e", "tpu7x"}


@pytest.mark.parametrize(
    ("name", "slices", "chips", "devices"),
    [
        ("v5e:16x16", 1, 256, 256),
        ("v5p:16x16x24", 1, 6144, 6144),
        ("v4:2x2x2", 1, 8, 8),
        ("tpu7x:2x2x2", 1, 8, 16),
        ("v5e:4x4", 2, 32, 32),
        ("tpu7x:4x4x4", 3, 192, 384),
    ],
)
def test_chips_and_devices_are_counted(name, slices, chips, devices):
    found = topology(name, slices)
    assert (found.chips, found.devices) == (chips, devices)


def test_upper_and_lower_case_are_the_same():
    assert topology("TPU7x:2x2x1") == topology("tpu7x:2x2x1")


def test_a_shape_that_is_not_listed_is_left_to_libtpu():
    assert "v5p:4x4x12" not in KNOWN
    assert topology("v5p:4x4x12").chips == 192


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-16", "'v5e-16' was asked for, but it is not written as a generation, a colon"),
        ("v5e:", "it is not written as"),
        ("v5e:4x4x4", "a v5e slice has 2 axes. The nearest known ones are 'v5e:4x4'"),
        ("v4:2x2", "a v4 slice has 3 axes. The nearest known ones are 'v4:2x2x1'"),
        ("v5e:16x32", "a v5e slice has 1 to 256 chips. The nearest known ones are 'v5e:16x16'"),
        ("v5e:0x4", "a v5e slice has 1 to 256 chips"),
        ("v9z:4x4", "knows v4, v5e, v5p, v6e, tpu7x"),
        ("h100:8", "knows v4, v5e, v5p, v6e, tpu7x"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(name, message):
    with pytest.raises(AdapterError, match=message):
        topology(name)


def test_a_refused_name_lists_all_that_are_known():
    with pytest.raises(AdapterError) as caught:
        topology("v5e:5")
    assert all(name.partition(":")[2] in str(caught.value) for name in KNOWN)


def test_no_slice_at_all_is_refused():
    with pytest.raises(AdapterError, match="0 slices of v5e:4x4 were asked for"):
        topology("v5e:4x4", 0)


@pytest.mark.parametrize(
    ("mesh", "name", "slices", "message"),
    [
        ({"fsdp": 32}, "v5e:4x4", 1, "fsdp=32 has 32 devices, but v5e:4x4 has 16"),
        ({"a": 2, "b": 4}, "tpu7x:2x2x2", 1, "8 devices, but tpu7x:2x2x2 has 16 .8 chips of 2"),
        ({"a": 16}, "v5e:4x4", 2, "has 16 devices, but 2 slices of v5e:4x4 have 32"),
        ({"a": 4, "b": 4, "c": 4}, "v5e:2x4", 8, "has no axis that 8 slices divide"),
    ],
)
def test_a_mesh_of_another_size_is_refused_with_both_numbers(mesh, name, slices, message):
    with pytest.raises(AdapterError, match=message):
        check_mesh(mesh, topology(name, slices))


def test_a_mesh_of_the_right_size_is_accepted():
    check_mesh({"data": 2, "fsdp": 8, "tensor": 2}, topology("v5e:4x4", 2))


def test_an_abstract_mesh_has_the_axes_in_order():
    mesh = abstract_mesh({"fsdp": 32, "tensor": 8}, (AxisType.Auto, AxisType.Explicit))
    assert mesh.axis_names == ("fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Explicit)


@pytest.mark.parametrize(
    ("shape", "types"), [({"a": 0}, AxisType.Auto), ({"a": 2}, (AxisType.Auto,) * 2)]
)
def test_an_impossible_abstract_mesh_is_refused(shape, types):
    with pytest.raises(AdapterError, match="Give each axis a size of 1 or more, and one type"):
        abstract_mesh(shape, types)


def test_published_figures_go_together():
    for each in CHIPS:
        assert each.hbm * 0.9 < each.hbm_available < each.hbm
        assert each.int8 is None or each.int8 >= each.flops
        # Products of 4096 x 4096 are bound by compute on every generation, streaming is not.
        assert 100 < each.flops / each.hbm_bandwidth < 1000


def test_a_tpu7x_chip_is_two_devices_that_share_its_figures():
    found = chip("tpu7x")
    per_chip = 2 * found.flops, 2 * found.hbm_bandwidth, 2 * found.hbm
    assert per_chip == (2307e12, 7380e9, 192 * 2**30)


@pytest.mark.parametrize(
    ("name", "bidirectional"),
    [("v5e", 400e9), ("v5p", 1200e9), ("v6e", 800e9), ("tpu7x", 1200e9)],
)
def test_the_links_add_up_to_the_published_bandwidth_of_a_chip(name, bidirectional):
    found = chip(name)
    total = found.link_bandwidth * found.links * 2 * found.devices_per_chip
    assert math.isclose(total, bidirectional)
