"""The roofline against times worked out by hand."""

import pytest

from rslora_jax.plan.chips import CHIPS, chip
from rslora_jax.plan.collectives import Collective
from rslora_jax.plan.counting import Count
from rslora_jax.plan.roofline import roofline

V5E = chip("v5e")
LINK = V5E.link_bandwidth


def collective(kind, size, devices, times=1, exact=True):
    return Collective(kind, (), size, times, tuple(range(devices)), "%c", "", exact)


def test_each_resource_is_busy_for_what_it_does():
    found = roofline(Count(V5E.flops, 2 * V5E.hbm_bandwidth), [], V5E)
    assert found.parts == {"compute": 1.0, "memory": 2.0, "ici": 0.0, "dcn": 0.0}
    assert (found.seconds, found.bound) == (2.0, "memory")


RINGS = {
    # kind, devices: how many times its bytes one link carries, if a ring has two links a device.
    ("all-gather", 8): 7 / 8 / 2,
    ("reduce-scatter", 8): 7 / 8 / 2,
    ("all-reduce", 8): 2 * 7 / 8 / 2,
    ("all-gather", 2): 1 / 2,  # two devices have one link between them
    ("all-to-all", 16): 15 / 16 / 2 * 16 / 4,
    ("collective-permute", 8): 1.0,
}


@pytest.mark.parametrize(("kind", "devices"), RINGS)
def test_a_collective_takes_the_time_of_its_ring(kind, devices):
    found = roofline(Count(0.0, 0.0), [collective(kind, int(LINK), devices, times=3)], V5E)
    assert found.ici == pytest.approx(3 * RINGS[kind, devices], rel=1e-12)
    assert found.bound == "ici"


def test_what_goes_between_slices_takes_the_data_center_network():
    found = roofline(Count(0.0, 0.0), [collective("send", int(V5E.dcn_bandwidth), 2)], V5E)
    assert (found.ici, found.dcn, found.bound) == (0.0, 1.0, "dcn")


def test_without_a_published_bandwidth_the_time_between_slices_is_unknown():
    unpublished = next(each for each in CHIPS if each.dcn_bandwidth is None)
    found = roofline(Count(1.0, 0.0), [collective("send", 4, 2)], unpublished)
    assert (found.dcn, found.bound) == (None, "compute")
    assert found.unknown == (
        f"seconds between slices: no bandwidth is published for {unpublished.name}",
    )


def test_what_the_counts_leave_out_is_passed_on():
    sent = [collective("all-gather", 4, 2, exact=False)]
    found = roofline(Count(1.0, 1.0, ("FLOPs of fft",)), sent, V5E)
    assert found.unknown == (
        "FLOPs of fft",
        "collectives in a loop whose count depends on data, taken as one round",
    )
