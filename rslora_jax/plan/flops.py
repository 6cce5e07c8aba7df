"""FLOPs: what the matrix products and convolutions of a compiled program compute."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rslora_jax.plan.hlo import Computation, Instruction, Module

__all__ = ["UNCOUNTED", "flops", "uncounted"]

UNCOUNTED = frozenset({"cholesky", "triangular-solve", "fft", "ragged-dot", "scaled-dot"})
"""Operations of many FLOPs that are not counted, but named."""

FREE_CALLS = frozenset(
    {
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "GatherScatterIndicesBitpacked",
        "MoveToDevice",
        "MoveToHost",
        "Sharding",
        "SliceId",
        "TopK",
        "X64Combine",
        "X64SplitHigh",
        "X64SplitLow",
        "ZeroCrop",
        "annotate_device_placement",
    }
)
"""Custom calls that multiply nothing."""


def flops(module: Module, computation: Computation, step: Instruction) -> float:
    """Multiplications and additions of one step: two for each product that is summed.

    Counted are `dot` and `convolution`, as which a TPU also runs matrix products, in fusions
    too. Elementwise and transcendental operations are not: a step of a transformer has about a
    thousandth of its operations there.

    Args:
      module: the program.
      computation: the computation that holds the step.
      step: the step.

    Returns:
      FLOPs of one run of the step on one device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rslora_jax.plan.hlo import parse
      >>> text = jax.jit(jnp.dot).lower(jnp.ones((8, 4)), jnp.ones((4, 2))).compile().as_text()
      >>> module = parse(text)
      >>> main = module.computations[module.entry]
      >>> sum(flops(module, main, step) for step in main.instructions.values())
      128.0
    """
    if step.opcode == "dot":
        return _dot(computation, step)
    if step.opcode == "convolution":
        return _convolution(computation, step)
    if step.opcode == "custom-call":
        estimate = re.search(r'cost_estimate\\?":\{[^{}]*?flops\\?":\\?"?(\d+)', step.tail)
        return float(estimate[1]) if estimate else 0.0
    if step.opcode == "fusion":
        inside = module.computations[step.called["calls"][0]]
        return sum(flops(module, inside, each) for each in inside.instructions.values())
    return 0.0


def uncounted(module: Module, step: Instruction) -> Iterator[str]:
    """The operations of a step, in words, whose FLOPs are not known."""
    if step.opcode in UNCOUNTED:
        yield step.opcode
    elif step.opcode == "custom-call" and "cost_estimate" not in step.tail:
        target = step.attributes.get("custom_call_target", "").strip('"')
        if target not in FREE_CALLS:
            yield f"custom-call {target}"
    elif step.opcode == "fusion":
        for each in module.computations[step.called["calls"][0]].instructions.values():
            yield from uncounted(module, each)


def _dot(computation: Computation, step: Instruction) -> float:
    left = computation.operands(step)[0].shapes[0]
    summed = _numbers(step.attributes.get("lhs_contracting_dims", ""))
    return 2.0 * math.prod(step.shapes[0].dims) * math.prod(left.dims[k] for k in summed)


class _Window(NamedTuple):
    """One spatial dimension of a convolution."""

    size: int
    stride: int
    low: int
    base: int
    kernel: int


def _convolution(computation: Computation, step: Instruction) -> float:
    """Products with a place in the input: padding and the holes of a dilation cost nothing.

    A TPU spells the batch axes of a matrix product as spatial axes whose window reaches one
    place only, so that this counts them right.
    """
    left, right = (made.shapes[0].dims for made in computation.operands(step)[:2])
    lhs, rhs, out = re.split(r"_|->", step.attributes["dim_labels"])
    spatial = sorted(label for label in lhs if label.isdigit())
    windows = _windows(step.attributes.get("window", "{}"), len(spatial))
    groups = int(step.attributes.get("batch_group_count", 1))
    taps = left[lhs.index("b")] // groups * right[rhs.index("i")] * right[rhs.index("o")]
    for label, window in zip(spatial, windows, strict=True):
        taps *= _places(left[lhs.index(label)], step.shapes[0].dims[out.index(label)], window)
    return 2.0 * taps


def _windows(text: str, count: int) -> list[_Window]:
    fields = dict(part.split("=") for part in text.strip("{}").split())
    ones = "x".join(["1"] * count)
    named = [fields.get(name, ones) for name in ("size", "stride")]
    pads = fields.get("pad", "x".join(["0_0"] * count))
    dilations = [fields.get(name, ones) for name in ("lhs_dilate", "rhs_dilate")]
    if not count:
        return []
    columns = [
        [int(n.split("_")[0]) for n in text.split("x")] for text in (*named, pads, *dilations)
    ]
    return [_Window(*column) for column in zip(*columns, strict=True)]


@functools.cache
def _places(size: int, out: int, window: _Window) -> int:
    """How many pairs of an output place and a tap meet an element of the input."""
    starts = np.arange(out)[:, None] * window.stride - window.low
    at = starts + np.arange(window.size)[None, :] * window.kernel
    inside = (at >= 0) & (at <= (size - 1) * window.base) & (at % window.base == 0)
    return int(inside.sum())


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
