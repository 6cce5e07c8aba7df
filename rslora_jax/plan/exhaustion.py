"""Exhaustion: how much memory the compiler says a program needs, when it has not enough."""

import re
from typing import NamedTuple

__all__ = ["Exhausted", "exhausted"]

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)i?B?"
WORDINGS = (
    # libtpu 0.0.52 (error E1000); its "HLO temporaries" hold arguments and outputs too.
    rf"\({SIZE}\) exceeds available HBM \({SIZE}\)",
    # libtpu before 2026: "Ran out of memory in memory space hbm."
    rf"Used {SIZE} of {SIZE} hbm",
)


class Exhausted(NamedTuple):
    """Bytes of HBM that a program needs on one device, and that there are."""

    need: int
    have: int


def exhausted(text: str) -> Exhausted | None:
    """Reads the compiler's error.

    Args:
      text: the message.

    Returns:
      What is needed and what there is, in bytes; None if the message is of another error, such
      as too much scratch memory of one kernel.

    Example:
      >>> exhausted("RESOURCE_EXHAUSTED: ... (148.5G) exceeds available HBM (95.75G).").need
      159450660864
      >>> exhausted("RESOURCE_EXHAUSTED: ... Used 32.42M of 16.00M vmem.")
    """
    found = (re.search(wording, text) for wording in WORDINGS)
    matched = next((match for match in found if match), None)
    if matched is None:
        return None
    need, need_unit, have, have_unit = matched.groups()
    return Exhausted(_bytes(need, need_unit), _bytes(have, have_unit))


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])
