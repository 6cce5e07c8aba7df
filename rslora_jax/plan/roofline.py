"""Roofline: the least time that a chip needs for what a program computes, moves and sends.

Each of the chip's resources is taken to be busy all the time, and all of them at once
(Williams et al. 2009, doi:10.1145/1498765.1498785): no step can be faster, and real ones are
slower.
"""

from collections.abc import Iterable
from typing import NamedTuple

from rslora_jax.plan.chips import Chip
from rslora_jax.plan.collectives import Collective
from rslora_jax.plan.counting import Count

__all__ = ["Roofline", "roofline"]


class Roofline(NamedTuple):
    """Seconds that each resource of one device is busy in one run.

    Attributes:
      compute: its matrix units, at their bfloat16 peak.
      memory: the traffic with its main memory.
      ici: the links to the other devices of the slice.
      dcn: the network between slices; None where its bandwidth is not published.
      unknown: what the seconds leave out, in words.
    """

    compute: float
    memory: float
    ici: float
    dcn: float | None
    unknown: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by resource."""
        return {name: getattr(self, name) or 0.0 for name in ("compute", "memory", "ici", "dcn")}

    @property
    def seconds(self) -> float:
        """The least time of one run: that of the busiest resource."""
        return max(self.parts.values())

    @property
    def bound(self) -> str:
        """The busiest resource: ``compute``, ``memory``, ``ici`` or ``dcn``."""
        return max(self.parts, key=lambda name: self.parts[name])


def roofline(count: Count, collectives: Iterable[Collective], chip: Chip) -> Roofline:
    """The least time for one run of a program.

    A collective is taken to run on a ring along one axis of the torus, in both directions:
    over two links, over one for two devices and for a permutation. An all-to-all of g devices
    keeps a link busy g/4 times as long, since its messages cross g/4 links each on average
    ("How to Scale Your Model", Austin et al. 2025, chapter 3). Collectives that run beside
    each other on different axes can be faster than this.

    Args:
      count: what `counting.count` found.
      collectives: what `collectives.collectives` found.
      chip: the chip, of `chips.chip`.

    Returns:
      The seconds of each resource; `Roofline.seconds` and `Roofline.bound` name the most busy.

    Example:
      >>> from rslora_jax.plan.chips import chip
      >>> found = roofline(Count(flops=197e12, hbm_bytes=819e9 / 2), [], chip("v5e"))
      >>> found.seconds, found.bound, found.memory
      (1.0, 'compute', 0.5)
    """
    found = list(collectives)
    across = [each for each in found if each.kind == "send"]
    unknown = list(count.unknown)
    if not all(each.exact for each in found):
        unknown.append("collectives in a loop whose count depends on data, taken as one round")
    dcn = 0.0
    if across and chip.dcn_bandwidth is None:
        dcn = None
        unknown.append(f"seconds between slices: no bandwidth is published for {chip.name}")
    elif across and chip.dcn_bandwidth:
        dcn = sum(each.times * each.wire_bytes for each in across) / chip.dcn_bandwidth
    return Roofline(
        compute=count.flops / chip.flops,
        memory=count.hbm_bytes / chip.hbm_bandwidth,
        ici=sum(_seconds(each, chip) for each in found if each.kind != "send"),
        dcn=dcn,
        unknown=tuple(dict.fromkeys(unknown)),
    )


def _seconds(each: Collective, chip: Chip) -> float:
    one_way = each.kind in {"collective-permute", "collective-broadcast"} or each.group_size == 2
    hops = max(1.0, each.group_size / 4) if "all-to-all" in each.kind else 1.0
    links = 1 if one_way else 2
    return each.times * each.wire_bytes * hops / (links * chip.link_bandwidth)
