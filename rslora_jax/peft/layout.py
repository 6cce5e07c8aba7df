"""Layout: what a parameter's axes are in the tree, and how Hugging Face stores it."""

import math
from typing import NamedTuple

from rslora_jax.paths import AdapterError
from rslora_jax.peft.rules import Found
from rslora_jax.sites import Site

__all__ = ["Layout", "kind_of", "layout_of", "places"]


class Layout(NamedTuple):
    """How a parameter is arranged here and there.

    Attributes:
      axes: the roles of its axes: ``b``, ``i``, ``o``; no ``i`` for a vector.
      shape: its shape.
      kind: ``"linear"``, ``"embedding"``, ``"conv"``, ``"expert"``, or ``"plain"`` for what is
        no matrix (norms, biases).
      split: how many of its first b axes are separate tensors there.
      stored: ``"oi"`` if a matrix is stored (out, in) there, ``"io"`` if (in, out).
      head_dim: the width of a head whose rotary pairs are side by side here; 0 for no change.
      flat: a plain parameter is one axis there.
    """

    axes: str
    shape: tuple[int, ...]
    kind: str
    split: int = 0
    stored: str = "oi"
    head_dim: int = 0
    flat: bool = False

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the split axes."""
        return tuple(self.shape[k] for k in self._split_axes)

    @property
    def single(self) -> "Layout":
        """The layout of one part, whose split axes are gone."""
        kept = [k for k in range(len(self.axes)) if k not in self._split_axes]
        axes, shape = "".join(self.axes[k] for k in kept), tuple(self.shape[k] for k in kept)
        return self._replace(axes=axes, shape=shape, split=0)

    @property
    def _split_axes(self) -> tuple[int, ...]:
        return places(self.axes, "b")[: self.split]

    def size(self, role: str) -> int:
        """The product of the axes of one role, without the split ones."""
        single = self.single
        return math.prod(single.shape[k] for k in places(single.axes, role))


def kind_of(found: Found, site: Site | None) -> str:
    """What Hugging Face calls a parameter: a rule's word, else what the program does with it."""
    if found.name.kind:
        return found.name.kind
    uses = () if site is None else site.uses
    if site is not None and (site.embedding or any(use.kind == "lookup" for use in uses)):
        return "embedding"
    if any(use.primitive == "conv_general_dilated" for use in uses):
        return "conv"
    return "linear"


def layout_of(path: str, found: Found, shape: tuple[int, ...], site: Site | None = None) -> Layout:
    """The layout of a parameter.

    Args:
      path: its path, for errors.
      found: its rule and tensor name.
      shape: its shape.
      site: gives its axes; without it they are the rule's.

    Returns:
      The layout.

    Raises:
      AdapterError: if the name has more or fewer indices than the parameter has stacked axes,
        if the axes do not fit the shape, or if a head's width does not divide the outputs.

    Example:
      >>> from rslora_jax.peft.names import LLAMA, find
      >>> path = "layers/self_attn/o_proj/kernel"
      >>> layout_of(path, find(LLAMA, path), (2, 8, 6)).stack
      (2,)
    """
    axes = site.axes if site is not None else found.name.axes
    axes = axes or "b" * found.stacked + "o" * (len(shape) - found.stacked)
    stacked = axes.count("b")
    if len(axes) != len(shape) or found.stacked > stacked:
        raise AdapterError(
            f"{path!r} of shape {shape} and axes {axes!r} is named {found.tensor!r}, with "
            f"{found.stacked} indices for {stacked} stacked axes. Give the name one index for "
            "each, or correct Name.axes."
        )
    head_dim = found.name.head_dim if found.name.rope else 0
    flat = found.tensor.endswith(".bias") or (bool(found.name.axes) and "i" not in axes)
    kind = kind_of(found, site) if {"i", "o"} <= set(axes) else "plain"
    if stacked > found.stacked and kind in ("linear", "embedding"):
        kind = "expert" if kind == "linear" and not found.tensor.endswith(".weight") else kind
    stored = found.name.stored or ("io" if kind == "embedding" else "oi")
    layout = Layout(axes, shape, kind, found.stacked, stored, head_dim, flat)
    _check(path, found.tensor, layout)
    return layout


def places(axes: str, role: str) -> tuple[int, ...]:
    """Where a role stands among the axes.

    Example:
      >>> places("bioo", "o")
      (2, 3)
    """
    return tuple(k for k, letter in enumerate(axes) if letter == role)


def _check(path: str, tensor: str, layout: Layout) -> None:
    one = layout.single
    letters = one.axes.replace("b", "")
    if "b" in one.axes and layout.kind not in ("expert", "plain"):
        raise AdapterError(
            f"{path!r} of axes {layout.axes!r} is stacked, but its name {tensor!r} has only "
            f"{layout.split} indices. Put {{{layout.split}}} where the layer's number belongs."
        )
    if layout.kind == "conv" and "o" not in (letters.lstrip("i"), letters.rstrip("i")):
        raise AdapterError(
            f"{path!r} is a convolution of axes {layout.axes!r}; kernels [k.., in, out] and "
            "[out, in, k..] can be named. Merge it instead."
        )
    rows = math.prod(one.shape) if layout.kind == "plain" else one.size("o")
    if layout.head_dim and rows % layout.head_dim:
        raise AdapterError(
            f"{path!r} has {rows} outputs, which heads of width {layout.head_dim} do not divide. "
            "Correct Name.head_dim."
        )
