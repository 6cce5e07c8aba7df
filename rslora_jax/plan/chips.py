"""Chips: what one JAX device of each TPU generation holds, computes and sends.

The published figures are those of Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"
and "TPU7x (Ironwood)" (docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x) unless a
comment names another source. They are per chip; a `Chip` has them per JAX device: a TPU7x chip
is two devices of one TensorCore each, while a v4 or v5p chip ("megacore") is one.

A page gives the bandwidth between chips as the sum of all links and both directions; here it is
the one of a link in one direction.
"""

import dataclasses

from rslora_jax.paths import AdapterError, nearest

__all__ = ["CHIPS", "Chip", "chip"]

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation, in bytes, bytes/s and operations/s.

    Attributes:
      name: the generation, as topology names spell it.
      kind: `device_kind` of its JAX devices.
      hbm: bytes of high-bandwidth memory, as published.
      hbm_available: bytes that the compiler lets a program have: libtpu 0.0.52 names them when
        a program needs more.
      hbm_bandwidth: bytes/s between the memory and the chip.
      flops: peak FLOP/s of bfloat16 products.
      int8: peak operations/s of int8 products, None where none is published.
      link_bandwidth: bytes/s of one link to a neighbour, in one direction.
      links: how many neighbours a chip has in a torus.
      dcn_bandwidth: bytes/s to other slices, None where none is published.
      pod: the chips of the largest slice.
      devices_per_chip: JAX devices a chip.
      config: the name of libtpu's chip configuration, None for its default.
    """

    name: str
    kind: str
    hbm: int
    hbm_available: int
    hbm_bandwidth: float
    flops: float
    int8: float | None
    link_bandwidth: float
    links: int
    dcn_bandwidth: float | None
    pod: int
    devices_per_chip: int = 1
    config: str | None = None

    @property
    def dimensions(self) -> int:
        """The axes of the torus: 2 or 3."""
        return self.links // 2


CHIPS = (
    Chip(
        name="v4",
        kind="TPU v4",
        hbm=32 * GIB,
        hbm_available=int(30.75 * GIB),
        hbm_bandwidth=1200e9,
        flops=275e12,
        int8=275e12,
        # Jouppi et al. 2023 (arXiv:2304.01433), table 4: six links of 50 GB/s.
        link_bandwidth=50e9,
        links=6,
        dcn_bandwidth=None,
        pod=4096,
        # By default libtpu makes two devices of a v4 chip; Cloud's v4 hosts show one.
        config="megacore",
    ),
    Chip(
        name="v5e",
        kind="TPU v5 lite",
        hbm=16 * GIB,
        hbm_available=int(15.75 * GIB),
        hbm_bandwidth=819e9,
        flops=197e12,
        int8=393e12,
        link_bandwidth=400e9 / 2 / 4,
        links=4,
        dcn_bandwidth=6.4e12 / 8 / 256,  # published per pod of 256 chips
        pod=256,
    ),
    Chip(
        name="v5p",
        kind="TPU v5",
        hbm=96 * GIB,  # the page: 96 GiB, of which it lists 95
        hbm_available=int(95.73 * GIB),
        hbm_bandwidth=2765e9,
        flops=459e12,
        # Google Cloud's announcement of v5p, 6 December 2023: 459 TFLOPS bf16, 918 TOPS int8.
        int8=918e12,
        link_bandwidth=1200e9 / 2 / 6,
        links=6,
        dcn_bandwidth=50e9 / 8,
        pod=8960,
    ),
    Chip(
        name="v6e",
        kind="TPU v6 lite",
        hbm=32 * GIB,
        hbm_available=int(31.24 * GIB),
        hbm_bandwidth=1638e9,
        flops=918e12,
        int8=1836e12,
        link_bandwidth=800e9 / 2 / 4,
        links=4,
        dcn_bandwidth=25.6e12 / 8 / 256,  # published per pod of 256 chips
        pod=256,
    ),
    Chip(
        name="tpu7x",
        kind="TPU7x",
        hbm=192 * GIB // 2,
        hbm_available=int(94.74 * GIB),
        hbm_bandwidth=7380e9 / 2,
        flops=2307e12 / 2,
        int8=None,
        # The links are the chip's; its two devices share them.
        link_bandwidth=1200e9 / 2 / 6 / 2,
        links=6,
        dcn_bandwidth=100e9 / 8 / 2,
        pod=9216,
        devices_per_chip=2,
    ),
)
"""Every generation that the planner knows, oldest first."""


def chip(name: str) -> Chip:
    """Finds a TPU generation by its name.

    Args:
      name: such as ``"v5e"``; upper and lower case are the same.

    Returns:
      The chip.

    Raises:
      AdapterError: if there is none of this name, with the ones that there are.

    Example:
      >>> chip("v5e").hbm_available / 2**30
      15.75
    """
    found = {known.name: known for known in CHIPS}
    if name.lower() not in found:
        raise AdapterError(
            f"A TPU generation {name!r} was asked for; the planner knows {', '.join(found)}. "
            f"The nearest is {nearest(name.lower(), found, 1)}."
        )
    return found[name.lower()]
