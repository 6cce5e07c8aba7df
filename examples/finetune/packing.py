"""Which rows share a step: planned from their lengths alone, before anything is computed.

A plan is a list of groups, one a step; a group is a list of bins, one for each row of the step's
arrays; a bin is the rows, by number, that lie in it one after the other. Every row of the data is
in one bin of an epoch. The plan depends on the seed and the epoch, not on how many processes or
devices read it, so a position in the data is one integer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

OPEN = 64  # bins that may still receive rows: more would fill them better, and take longer
WIDTHS = 4  # widths of arrays without packing, each of which is compiled
MULTIPLE = 8  # what widths are multiples of
NARROWEST = 16

Bin = tuple[int, ...]


class Group(NamedTuple):
    """The rows of one step.

    Attributes:
      bins: which rows lie in each row of the arrays; an empty bin is padding.
      width: tokens in each row of the arrays.
    """

    bins: tuple[Bin, ...]
    width: int


def plan(sizes: Sequence[int], group: int, width: int | None, seed: int, epoch: int) -> list[Group]:
    """Plan an epoch.

    Args:
      sizes: how many tokens the model reads of each row.
      group: bins in a step.
      width: tokens in a bin, to pack rows into; None to give each row a bin of its own, among
        rows of about its length.
      seed: of the whole run.
      epoch: its number.

    Returns:
      One group a step, each row in one of them.
    """
    random = np.random.default_rng([seed, epoch])
    rows = random.permutation(len(sizes)).tolist()
    if width is not None:
        groups = _groups({width: first_fit(sizes, rows, width)}, group)
    else:
        groups = _groups(_buckets(sizes, rows), group)
    return [groups[place] for place in random.permutation(len(groups))]


def first_fit(sizes: Sequence[int], rows: Sequence[int], width: int) -> list[Bin]:
    """Put each row into the first bin that has room for it: of the last `OPEN` bins."""
    bins: list[list[int]] = []
    room = np.zeros(0, np.int64)
    for row in rows:
        place = int((room >= sizes[row]).argmax()) if room.size else 0
        if not room.size or room[place] < sizes[row]:
            bins.append([])
            room = np.append(room, width)[-OPEN:]
            place = len(room) - 1
        bins[len(bins) - len(room) + place].append(row)
        room[place] -= sizes[row]
    return [tuple(each) for each in bins]


def rounded(size: int, multiple: int = MULTIPLE) -> int:
    """The next multiple: arrays of few shapes are compiled few times."""
    return multiple * math.ceil(size / multiple)


def widths(longest: int) -> list[int]:
    """Widths of bins for one row each: the longest row and halves of it, rising."""
    halves = {rounded(max(math.ceil(longest / 2**n), NARROWEST)) for n in range(WIDTHS)}
    return sorted(halves)


def _buckets(sizes: Sequence[int], rows: Sequence[int]) -> dict[int, list[Bin]]:
    """Each row alone in a bin of the narrowest width that holds it."""
    buckets: dict[int, list[Bin]] = {width: [] for width in widths(max(sizes))}
    for row in rows:
        buckets[min(width for width in buckets if width >= sizes[row])].append((row,))
    return buckets


def _groups(buckets: dict[int, list[Bin]], group: int) -> list[Group]:
    """Full groups of each width; what is left goes to the next wider, at last with empty bins."""
    groups: list[Group] = []
    left: list[Bin] = []
    for width, added in sorted(buckets.items()):
        bins = [*left, *added]
        full = len(bins) - len(bins) % group
        groups += [Group(tuple(bins[n : n + group]), width) for n in range(0, full, group)]
        left = bins[full:]
    if left:
        groups.append(Group(tuple(left) + ((),) * (group - len(left)), max(buckets)))
    return groups
