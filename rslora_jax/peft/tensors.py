"""Tensors: from the names of a PEFT file to modules, every tensor used once."""

import re
import warnings
from collections.abc import Iterable, Mapping

import numpy as np

from rslora_jax.paths import AdapterError
from rslora_jax.peft.adapter import NESTED, PREFIX, TOKENS, Module, PeftAdapter
from rslora_jax.peft.coverage import check_coverage, parameters_of, token_indices
from rslora_jax.peft.settings import Settings

__all__ = ["assemble"]

LONGEST = 160  # of a name: it bounds what matching a pattern can cost
PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
    "lora_magnitude_vector", TOKENS,
)  # fmt: skip
SPLIT = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, PARTS))})")
NAME = re.compile(r"[^\s./\\\x00-\x1f]+(\.[^\s./\\\x00-\x1f]+)*")


Parts = dict[str, dict[str, np.ndarray]]


def assemble(
    settings: Settings,
    arrays: Mapping[str, np.ndarray],
    strict: bool,
    order: tuple[str, ...],
) -> PeftAdapter:
    """Sorts the tensors of a file into modules, replaced tensors and rows of tokens.

    Args:
      settings: of the same folder.
      arrays: every tensor of the file by its name there.
      strict: whether modules that settings and tensors disagree about are an error.
      order: of the parameters that a module registers.

    Returns:
      `PeftAdapter`.

    Raises:
      AdapterError: naming the tensor, what was expected, what was found and the remedy.
    """
    parts, full = _sorted_out(arrays)
    rows = {name: found.pop(TOKENS) for name, found in parts.items() if TOKENS in found}
    parts = {name: found for name, found in parts.items() if found}
    if not arrays:
        raise AdapterError("The file holds no tensors, so it is no adapter. Save it again.")
    depths = _depths(parts)
    modules = tuple(_module(n, depths, parts[n], settings, order) for n in sorted(parts))
    tokens = {name: (token_indices(settings, name, rows), rows[name]) for name in sorted(rows)}
    _check_tokens(tokens)
    saved = _saved(full)
    for warning in check_coverage(settings, [(m.name, m.parameter) for m in modules], full, rows):
        if strict:
            raise AdapterError(warning)
        warnings.warn(warning, stacklevel=3)
    names = [_pattern_name(m.name, m.parameter) for m in modules]
    if unused := settings.unused(names):
        warnings.warn(f"{'; '.join(unused[:4])}. Correct or remove it.", stacklevel=3)
    for overlap in settings.overlaps(names)[:1]:
        warnings.warn(
            f"{overlap}. PEFT sorts the patterns when it saves, so the meaning can have changed. "
            "Make the patterns exclusive.",
            stacklevel=3,
        )
    return PeftAdapter(settings, modules, saved, tokens)


def _sorted_out(arrays: Mapping[str, np.ndarray]) -> tuple[Parts, dict[str, np.ndarray]]:
    parts: Parts = {}
    full: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        _check_tensor(name, array)
        inner = name.removeprefix(PREFIX)
        match = SPLIT.fullmatch(inner)
        if match:
            parts.setdefault(match["module"], {})[match["part"]] = array
        elif ".lora_" in inner or ".token_adapter." in inner or "." not in inner:
            raise AdapterError(
                f"{name!r} is no tensor that is known: after the module's name comes one of "
                f"{', '.join(PARTS)}. Remove the adapter's own name, or merge with PEFT."
            )
        else:
            full[inner] = array
    return parts, full


def _check_tensor(name: str, array: np.ndarray) -> None:
    if not name.startswith(PREFIX):
        raise AdapterError(
            f"{name[:200]!r} does not start with {PREFIX!r}, which PEFT needs and would skip "
            "without it. Rename the tensor."
        )
    if len(name) > LONGEST + len(PREFIX) or not NAME.fullmatch(name):
        raise AdapterError(
            f"{name[:200]!r} is no tensor name: words joined by dots, without spaces or slashes, "
            f"at most {LONGEST} characters. Rename the tensor."
        )
    if array.dtype.kind not in "fV" or (array.dtype.kind == "V" and array.dtype.name != "bfloat16"):
        raise AdapterError(f"{name!r} is {array.dtype}, not floating. Save it as float32.")
    if not array.size:
        raise AdapterError(
            f"{name!r} has shape {array.shape} and holds nothing. It was sharded when it was "
            "saved: gather it first, then save again."
        )
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise AdapterError(
            f"{name!r} holds {bad} values that are NaN or infinite, of {array.size}. The training "
            "diverged, or the file is damaged: use an earlier one."
        )


def _depths(parts: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name in parts:
        found.setdefault(name.replace(NESTED, ""), []).append(name.count(NESTED))
    return found


def _module(
    name: str,
    depths: Mapping[str, list[int]],
    parts: Mapping[str, np.ndarray],
    settings: Settings,
    order: tuple[str, ...],
) -> Module:
    plain, depth = name.replace(NESTED, ""), name.count(NESTED)
    parameter = parameters_of(settings, plain, sorted(depths[plain]), order).get(depth, "")
    kind = "embedding" if any("embedding" in part for part in parts) else "linear"
    a, b = _pair(name, kind, parts)
    bias, magnitude = parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
    rank, alpha = settings.rank_alpha(_pattern_name(plain, parameter))
    scale = settings.scale(_pattern_name(plain, parameter))
    kind = "conv" if kind == "linear" and a.ndim > 2 else kind
    if parameter and a.shape[0] != rank and a.shape[0] % rank == 0:
        kind = "expert"
    _check_ranks(name, kind, (a.shape, b.shape), rank)
    if kind == "expert":
        a, b = _stacks(a, b, rank)
    module = Module(plain, kind, a, b, rank, alpha, scale, bias, magnitude, parameter, depth)
    _check_extras(name, module, settings)
    return module


def _pattern_name(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if parameter else name


def _pair(name: str, kind: str, parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    keys = (
        ("lora_embedding_A", "lora_embedding_B")
        if kind == "embedding"
        else ("lora_A.weight", "lora_B.weight")
    )
    missing = [key for key in keys if key not in parts]
    mixed = [key for key in ("lora_A.weight", "lora_B.weight") if kind == "embedding"]
    if missing or any(key in parts for key in mixed):
        raise AdapterError(
            f"{name!r} has {sorted(parts)}; it needs both {keys[0]} and {keys[1]}, and no other "
            "pair. The file is not whole: save the adapter again."
        )
    return parts[keys[0]], parts[keys[1]]


def _check_ranks(
    name: str, kind: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], rank: int
) -> None:
    a, b = shapes
    whole = len(a) == len(b) >= 2 and (kind in ("conv",) or len(a) == 2) and set(b[2:]) <= {1}
    inner = b[1] if whole else 0
    # A grouped convolution stores one group's columns of B.
    fits = inner == a[0] or (kind == "conv" and inner and a[0] % inner == 0)
    if not whole or not fits:
        raise AdapterError(
            f"{name!r}: A has shape {a} and B {b}, which do not multiply: A is (r, in), B is "
            "(out, r). The file is damaged, or not PEFT's: save the adapter again."
        )
    if a[0] != rank and not (kind == "expert" and a[0] % rank == 0):
        raise AdapterError(
            f"{name!r}: A has shape {a}, so its rank is {a[0]}, but r and rank_pattern say "
            f"{rank}. Correct r or rank_pattern in adapter_config.json: the scale hangs on it."
        )


def _stacks(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of A are expert-major, columns of B rank-major (`ParamWrapper.get_delta_weight`)."""
    experts = a.shape[0] // rank
    return a.reshape(experts, rank, a.shape[1]), np.moveaxis(b.reshape(len(b), rank, -1), -1, 0)


def _check_extras(name: str, module: Module, settings: Settings) -> None:
    out = module.b.shape[-2] if module.kind == "expert" else module.b.shape[0]
    wide = (1, out, *[1] * (module.a.ndim - 2)) if module.kind == "conv" else (out,)
    wanted = {
        "lora_B.bias": (module.bias, settings.lora_bias and module.kind != "embedding", (out,)),
        "lora_magnitude_vector": (module.magnitude, settings.use_dora, wide),
    }
    for part, (array, expected, shape) in wanted.items():
        if (array is not None) != expected:
            flag = "lora_bias" if part == "lora_B.bias" else "use_dora"
            found = "has" if array is not None else "has no"
            raise AdapterError(
                f"{name!r} {found} {part}, but {flag} is {not (array is not None)}. Correct {flag} "
                "in adapter_config.json, or save the adapter again."
            )
        if array is not None and array.shape != shape:
            raise AdapterError(
                f"{name!r}: {part} has shape {array.shape}, its B of shape {module.b.shape} asks "
                f"for {shape}. Save the adapter again."
            )


def _check_tokens(tokens: Mapping[str, tuple[tuple[int, ...], np.ndarray]]) -> None:
    for name, (indices, rows) in tokens.items():
        if rows.ndim != 2 or len(rows) != len(indices):
            raise AdapterError(
                f"{name!r}: {TOKENS} has shape {rows.shape}, trainable_token_indices names "
                f"{len(indices)} rows. Correct the one that is wrong."
            )


def _saved(full: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, array in full.items():
        plain = name.replace(NESTED + ".", ".")
        if plain in found:
            raise AdapterError(f"{plain!r} is there twice, with and without {NESTED!r}.")
        found[plain] = array
    return dict(sorted(found.items()))
