"""Weights: those of the sites in 8 or 4 bits, everything else as it is."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rslora_jax.formats import FORMATS, block_of, encode, formed
from rslora_jax.paths import AdapterError, flatten, nearest, unflatten
from rslora_jax.quantized import Quantized, is_quantized
from rslora_jax.sites import Site

__all__ = ["dequantize", "quantize", "quantize_weight"]

BLOCK = 64
SMALLEST = 8

Format = Literal["int8", "int4", "nf4"]


def quantize(
    params: Any,
    sites: Sequence[Site],
    bits: int | None = None,
    *,
    format: Format | None = None,
    block: int = BLOCK,
) -> Any:
    """Quantizes the weights of the sites; everything else stays as it is.

    `adapt`, `attach`, `merge`, `sharding`, `checkpoint` and `peft` take the result as they take
    the float tree: a quantized weight has the same path, shape, dtype and site. It is formed
    again where the program multiplies it, one layer of a scan at a time and once more in the
    backward pass; gradients reach the factors and the inputs alone.

    Args:
      params: the parameter tree, concrete or abstract (then the result is abstract).
      sites: which weights, as `find_sites` or `adapt` gives them: those to be adapted (QLoRA,
        Dettmers et al. 2023, arXiv 2305.14314), or any others.
      bits: 8: int8 with a scale for each output channel, 1.0 byte a weight. 4: blocks along the
        inputs share a scale, 0.5 bytes + 4/block.
      format: of 4 bits, ``"nf4"`` (the default) or ``"int4"``.
      block: how many neighbours share a scale in 4 bits; an axis that it does not divide gets
        the next smaller block that does.

    Returns:
      A tree of the same structure with `Quantized` at the sites' paths.

    Raises:
      AdapterError: if bits or format is unknown, a site names no weight of this shape, a weight
        is no floating point or holds values that are not finite, its input axis cannot be
        blocked, or qwix is not installed.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> params = {"w": jnp.eye(4, dtype="bfloat16"), "bias": jnp.zeros(4)}
      >>> model = lambda p, x: x @ p["w"] + p["bias"]
      >>> small = quantize(params, rl.find_sites(model, params, jnp.ones((1, 4), "bfloat16")))
      >>> small["w"].values.dtype.name, small["w"].scales.shape, small["bias"].dtype.name
      ('int8', (1, 4), 'float32')
    """
    flat, chosen = flatten(params), _format(bits, format, block)
    leaves = dict(zip(flat.paths, flat.leaves, strict=True))
    for site in sites:
        weight = _weight_of(site, leaves)
        leaves[site.path] = _quantize(site, weight, chosen, block)
    return unflatten(flat, (leaves[path] for path in flat.paths))


def quantize_weight(
    site: Site,
    weight: Any,
    bits: int | None = None,
    *,
    format: Format | None = None,
    block: int = BLOCK,
) -> Quantized:
    """Quantizes one weight, or a slice of it along its stacked axes.

    For weights that are read one by one: slices of a stack, each with a leading axis of 1, give
    the slices of the quantized stack.

    Args:
      site: says which axes are inputs; only its axes, path and dtype are read.
      weight: floating point, with as many axes as the site, concrete or abstract.
      bits: as in `quantize`.
      format: as in `quantize`.
      block: as in `quantize`.

    Returns:
      The quantized weight.

    Raises:
      AdapterError: as in `quantize`.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("layers/w", "bio", (12, 64, 32), "float32")
      >>> quantize_weight(site, jnp.ones((1, 64, 32)), bits=4).scales.shape
      (1, 1, 32)
    """
    return _quantize(site, weight, _format(bits, format, block), block)


def dequantize(params: Any) -> Any:
    """Forms every quantized weight of a tree, in the dtype that it had.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (4, 4), "float32")
      >>> small = {"w": quantize_weight(site, jnp.eye(4))}
      >>> float(abs(dequantize(small)["w"] - jnp.eye(4)).max()) < 0.005
      True
    """
    return jax.tree.map(formed, params, is_leaf=is_quantized)


def _quantize(site: Site, weight: Any, format: str, block: int) -> Quantized:
    _check(site, weight)
    channels, blocks = _layout(site, weight.shape, format, block)
    run = functools.partial(_encode, format=format, channels=channels, blocks=blocks)
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.eval_shape(run, weight)
    found = run(weight)
    _check_finite(site, found)
    return found


@functools.partial(jax.jit, static_argnames=("format", "channels", "blocks"))
def _encode(
    weight: jax.Array, format: str, channels: tuple[int, ...], blocks: tuple[tuple[int, int], ...]
) -> Quantized:
    return encode(weight, format, channels, dict(blocks))


def _layout(
    site: Site, shape: Sequence[int], format: str, block: int
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The axes with a scale for each entry, and the one that is cut in blocks, with their size."""
    inputs = [k for k, letter in enumerate(site.axes) if letter == "i"]
    outputs = tuple(k for k in range(len(shape)) if k not in inputs)
    if FORMATS[format] == 8:
        return outputs, ()
    *channels, last = inputs
    size = block_of(shape[last], block)
    if size < min(SMALLEST, block, shape[last]):
        raise AdapterError(
            f"{site.path!r} in {format} was to be cut into blocks of at most {block} along axis "
            f"{last} of {tuple(shape)}, and the largest that divides it is {size}. Use 8 bits, "
            f"or a block that divides {shape[last]}."
        )
    return (*outputs, *channels), ((last, size),)


def _format(bits: int | None, format: str | None, block: int) -> str:
    if not isinstance(block, int) or block < 1:
        raise AdapterError(f"A block is a whole number of neighbours from 1 on, found {block!r}.")
    chosen = {None: "int8", 8: "int8", 4: "nf4"}.get(bits) if format is None else format
    if chosen is None or bits not in (None, FORMATS.get(chosen)) or chosen not in FORMATS:
        known = ", ".join(f"{name} ({width} bits)" for name, width in FORMATS.items())
        asked = f"bits={bits!r}" + (f", format={format!r}" if format is not None else "")
        raise AdapterError(f"A base is quantized to one of {known}; found {asked}.")
    return chosen


def _weight_of(site: Site, leaves: dict[str, Any]) -> Any:
    weight = leaves.get(site.path)
    if getattr(weight, "shape", None) != site.shape:
        found = "none" if weight is None else f"shape {getattr(weight, 'shape', None)}"
        raise AdapterError(
            f"The site {site.path!r} is a weight of shape {site.shape}, found {found}. The nearest "
            f"paths are {nearest(site.path, leaves)}. Pass the parameters that the sites are of."
        )
    return weight


def _check(site: Site, weight: Any) -> None:
    if is_quantized(weight):
        raise AdapterError(
            f"{site.path!r} is quantized already, to {weight.format}. Quantize the float weights, "
            "or `dequantize` them first."
        )
    dtype = jnp.dtype(weight.dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise AdapterError(
            f"{site.path!r} is {dtype.name}; only floating point of 16 bits or more is quantized."
        )
    if len(weight.shape) != len(site.axes):
        raise AdapterError(
            f"{site.path!r} has the axes {site.axes!r}, found a weight of shape {weight.shape}."
        )


def _check_finite(site: Site, found: Quantized) -> None:
    """NaN and infinity reach their scale; integers would hide them."""
    if isinstance(found.scales, Tracer):
        return
    if not bool(jnp.isfinite(found.scales).all()):
        raise AdapterError(
            f"{site.path!r} holds values that are not finite, which integers cannot hold. Look "
            "for NaN or infinity in the checkpoint."
        )
