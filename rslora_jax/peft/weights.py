"""Weights: W + scale * B A in Hugging Face's layouts, summed in float32 and cast once."""

from collections.abc import Iterator

import numpy as np

from rslora_jax.paths import AdapterError
from rslora_jax.peft.adapter import Module

__all__ = ["check_fit", "merge_weight"]

BLOCK = 1 << 24  # numbers of a block of rows: 64 MiB in float32


def merge_weight(weight: np.ndarray, module: Module, transposed: bool | None = None) -> np.ndarray:
    """The weight with its adapter summed in, as PEFT 0.21.2 merges it.

    The formulas are those of PEFT's layers: W + s B A, and with a DoRA magnitude m (Liu et al.
    2024, arXiv 2402.09353, equation 5) m V / |V| for V = W + s B A, where |V| is a norm for each
    output: over the inputs, an embedding's vocabulary, or a convolution's inputs and window.

    Args:
      weight: in the base's layout and dtype.
      module: the adapter; its scale is used as it is.
      transposed: True where a matrix is stored (in, out), as GPT-2 and some experts do; None
        reads it off the shapes.

    Returns:
      A new array of the weight's shape and dtype.

    Raises:
      AdapterError: if the shapes do not fit, or a result is not finite.

    Example:
      >>> module = Module("q", "linear", np.ones((1, 2)), np.ones((3, 1)), 1, 2, 2.0)
      >>> merge_weight(np.zeros((3, 2), "f4"), module).tolist()
      [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    turned = check_fit(weight.shape, module, transposed)
    merged = np.empty(weight.shape, weight.dtype)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for before, after, a, b in _matrices(np.ascontiguousarray(weight), merged, module, turned):
            _merge_matrix(before, after, a, b, module)
    bad = merged.size - np.count_nonzero(np.isfinite(merged))
    if bad:
        raise AdapterError(
            f"{module.weight!r}: {bad} of {merged.size} merged values are not finite in "
            f"{merged.dtype}. Check the adapter's scale, {module.scale:g}, or use a base in "
            "bfloat16 or float32."
        )
    return merged


def check_fit(shape: tuple[int, ...], module: Module, transposed: bool | None = None) -> bool:
    """Whether the weight is stored (in, out), after a check that the adapter fits it.

    Args:
      shape: of the weight in the base.
      module: the adapter.
      transposed: what a square weight is; None where nobody knows.

    Raises:
      AdapterError: if the shapes do not fit, or fit both ways and `transposed` is None.
    """
    straight, turned = _shapes(module, len(shape))
    if module.kind == "conv" and module.b.shape[1] != module.a.shape[0]:
        raise AdapterError(
            f"{module.name!r} is a grouped convolution: A is {module.a.shape}, B, which has one "
            f"group's columns, is {module.b.shape}. Their product is no grouped convolution and "
            "cannot be merged: serve the adapter beside its base."
        )
    if shape not in (straight, turned):
        fitting = dict.fromkeys((str(straight), str(turned)))
        raise AdapterError(
            f"{module.weight!r} has shape {shape} in the base; A {module.a.shape} and "
            f"B {module.b.shape} of the adapter need {' or '.join(fitting)}. "
            "It was trained on another base: pass that one."
        )
    if straight != turned:
        return shape == turned
    if transposed is None and module.kind == "expert":
        raise AdapterError(
            f"{module.weight!r} has shape {shape}, which fits (out, in) and (in, out). Pass "
            "transposed=True if the model stores (in, out), False if (out, in)."
        )
    return bool(transposed)


def _shapes(module: Module, axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The weight's shape, stored (out, in) and stored (in, out)."""
    a, b = module.a.shape, module.b.shape
    if module.kind == "conv":
        return (b[0], *a[1:]), (b[0], *a[1:])
    if module.kind == "embedding":
        return (a[1], b[0]), (a[1], b[0])
    if module.kind == "expert":
        return (a[0], b[1], a[2]), (a[0], a[2], b[1])
    stack = (1,) * (axes - 2) if module.parameter else ()  # a stack of one expert
    straight = (*stack, b[0], a[1])
    can_turn = not module.parameter or stack
    return straight, (*stack, a[1], b[0]) if can_turn else straight


Matrices = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


def _matrices(weight: np.ndarray, merged: np.ndarray, module: Module, turned: bool) -> Matrices:
    """Views (out, in) of the weight before and after, with A and B beside them."""
    a, b = module.a, module.b
    if module.kind == "conv":
        flat = (len(weight), -1)
        yield weight.reshape(flat), merged.reshape(flat), a.reshape(len(a), -1), b.reshape(flat)
        return
    stacked = module.kind == "expert"
    before, after = (x.reshape(-1, *x.shape[-2:]) for x in (weight, merged))
    for n in range(len(before)):
        one, two = before[n], after[n]
        if turned or module.kind == "embedding":
            one, two = one.T, two.T
        yield one, two, a[n] if stacked else a, b[n] if stacked else b


def _merge_matrix(
    before: np.ndarray, after: np.ndarray, a: np.ndarray, b: np.ndarray, module: Module
) -> None:
    wide = np.float64 if before.dtype == np.float64 else np.float32
    a, b = a.astype(wide), b.astype(wide)
    sizes = None if module.magnitude is None else module.magnitude.astype(wide).reshape(-1, 1)
    rows = max(1, BLOCK // before.shape[1])
    for start in range(0, len(before), rows):
        block = slice(start, start + rows)
        total = b[block] @ a
        total *= module.scale
        total += before[block].astype(wide, copy=False)
        if sizes is not None:
            total *= sizes[block] / np.linalg.norm(total, axis=1, keepdims=True)
        after[block] = total.astype(after.dtype)
