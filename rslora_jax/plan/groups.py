"""Groups: the devices among which one collective moves data."""

import math
import re

import numpy as np

from rslora_jax.paths import AdapterError

__all__ = ["first_group"]

IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
LISTED = re.compile(r"\{\{([\d, ]+)\}")
PLAIN = re.compile(r"\(?\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?\)?")
AXIS = re.compile(r"('[^']*'|\"[^\"]*\")(?::\((\d+)\)(\d+))?")
MESH = re.compile(r"mesh\[([^\]]*)\](?:,\s*device_ids=(\S+))?\s*\{([^{}]*)\}")


def first_group(text: str, devices: int) -> tuple[int, ...]:
    """The members of the first group; all groups of a collective are of one size.

    Args:
      text: the value of ``replica_groups``: ``{{0,1},{2,3}}``, ``[2,2]<=[4]T(0)`` (a count of
        groups and their size, cut from 0, 1, ... reshaped and transposed), or
        ``mesh['x'=2,'y'=2] {'y'}`` (along axes of a mesh).
      devices: the devices of the program, all of which ``{}`` stands for.

    Returns:
      Device numbers.

    Raises:
      AdapterError: if the text has none of these forms.

    Example:
      >>> first_group("{{0,2},{1,3}}", 4), first_group("[2,2]<=[2,2]T(1,0)", 4)
      ((0, 2), (0, 2))
      >>> first_group("mesh['x'=2,'y'=2] {'y'}", 4), first_group("{}", 2)
      ((0, 1), (0, 1))
    """
    if text in {"", "{}"}:
        return tuple(range(devices))
    if listed := LISTED.match(text):
        return _numbers(listed[1])
    if iota := IOTA.fullmatch(text):
        return tuple(_iota(*iota.groups())[0].tolist())
    if mesh := MESH.fullmatch(text):
        return _along(*mesh.groups())
    raise AdapterError(
        f"The groups of a collective, {text[:80]!r}, are spelled in none of the known ways "
        "('{{0,1}}', '[2,2]<=[4]', \"mesh['x'=2] {'x'}\"). Report it with the versions of jax "
        "and libtpu."
    )


def _along(axes: str, order: str | None, chosen: str) -> tuple[int, ...]:
    """The devices along the `chosen` axes of a mesh."""
    pairs = [axis.split("=") for axis in axes.split(",")]
    parts = {name: (first, size) for name, first, size in AXIS.findall(chosen)}
    dims, along = [], []
    for name, size in ((name.strip(), int(size)) for name, size in pairs):
        # 'x':(2)4 is the axis within x that has 2 blocks before it and 4 steps itself.
        first, own = (
            int(n or d) for n, d in zip(parts.get(name, ("", "")), (1, size), strict=True)
        )
        dims += [first, own, size // (first * own)]
        along += [False, name in parts, False]
    ids = np.arange(math.prod(dims))
    if order and (plain := PLAIN.fullmatch(order)):
        ids = _iota(plain[1], plain[2] or plain[1], plain[3])
    taken = tuple(slice(None) if chosen else 0 for chosen in along)
    return tuple(ids.reshape(dims)[taken].ravel().tolist())


def _iota(shape: str, source: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(source))).reshape(_numbers(source))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(_cut(shape, ids.size))


def _cut(shape: str, size: int) -> tuple[int, ...]:
    dims = _numbers(shape)
    return dims if math.prod(dims) == size else (-1,)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
