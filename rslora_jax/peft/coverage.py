"""Coverage: which modules the settings name, against those that have tensors."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rslora_jax.paths import AdapterError
from rslora_jax.peft.patterns import covers, ends_with, is_saved
from rslora_jax.peft.settings import Settings

__all__ = ["check_coverage", "parameters_of", "token_indices"]

EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT saves them beside the adapter when they grew
# PEFT adds these to modules_to_save by itself; a model has one of them.
HEADS = ("classifier", "score", "qa_outputs")


def check_coverage(
    settings: Settings,
    adapted: Sequence[tuple[str, str]],
    full: Iterable[str],
    rows: Iterable[str],
) -> list[str]:
    """Says where settings and tensors disagree about what is adapted.

    Args:
      settings: of the folder.
      adapted: (module, parameter or "") of every pair of factors.
      full: names of the tensors that replace the base's, with ``.base_layer``.
      rows: names of the modules with replaced rows.

    Returns:
      Sentences, empty if all is in order.

    Example:
      >>> check_coverage(Settings(r=1, target_modules=("q",)), [("layers.0.q", "")], [], [])
      []
    """
    modules = [name for name, parameter in adapted if not parameter]
    found = [_uncovered(settings, name) for name in modules]
    found += _unused(settings, modules)
    found += [_unexpected(settings, name, set(modules)) for name in full]
    found += _absent(settings, list(full), list(rows))
    return [sentence for sentence in found if sentence]


def parameters_of(
    settings: Settings, module: str, depths: Sequence[int], order: Sequence[str]
) -> dict[int, str]:
    """Which parameter of a module lies at which depth; {} where the module itself is adapted.

    The first parameter that a module registers lies deepest (PEFT 0.21.2, `ParamWrapper`).

    Raises:
      AdapterError: if the depths do not fit ``target_parameters``, or the order is not known.
    """
    names = _candidates(settings, module)
    if not names and any(depths):
        raise AdapterError(
            f"{module!r} has tensors below {max(depths)} '.base_layer', which only "
            "target_parameters makes, and none is named there. Correct adapter_config.json."
        )
    if not names or (len(depths) == 1 and not depths[0] and _is_target(settings, module)):
        return {}
    if list(depths) != list(range(len(names))):
        raise AdapterError(
            f"{module!r} has factors at the depths {list(depths)}, target_parameters names "
            f"{names}: one depth for each is needed. Save the adapter again."
        )
    if len(names) > 1 and not set(names) <= set(order):
        raise AdapterError(
            f"{module!r} has adapters of {names}, and the file does not say which is which. Pass "
            f"parameters=(...), the names in the order in which the module registers them; "
            f"{tuple(order)} is known."
        )
    ordered = sorted(names, key=list(order).index) if len(names) > 1 else names
    return dict(enumerate(reversed(ordered)))


def token_indices(settings: Settings, name: str, rows: Mapping[str, Any]) -> tuple[int, ...]:
    """The rows of an embedding that are replaced, by ``trainable_token_indices``.

    Raises:
      AdapterError: if it does not name them, or not one embedding alone.
    """
    wanted = settings.trainable_token_indices
    if isinstance(wanted, Mapping):
        hits = [indices for module, indices in wanted.items() if ends_with(name, module)]
    else:
        hits = [] if wanted is None or len(rows) != 1 else [wanted]
    if len(hits) != 1:
        raise AdapterError(
            f"{name!r} has rows of tokens, and trainable_token_indices is {str(wanted)[:80]}, "
            "which does not name its rows alone. Write {module: [indices]} there."
        )
    return hits[0]


def _candidates(settings: Settings, module: str) -> list[str]:
    targets = settings.target_parameters or ()
    last = dict.fromkeys(target.rpartition(".")[2] for target in targets)
    return [p for p in last if any(ends_with(f"{module}.{p}", target) for target in targets)]


def _is_target(settings: Settings, name: str) -> bool:
    targets = settings.target_modules
    return bool(targets) and (targets == "all-linear" or covers(targets or (), name))


def _uncovered(settings: Settings, name: str) -> str:
    targets, excluded = settings.target_modules, settings.exclude_modules
    remedy = "Correct adapter_config.json, or remove the tensors."
    if excluded and covers(excluded, name):
        return f"{name!r} has tensors, but exclude_modules {excluded!r} leaves it out. {remedy}"
    if is_saved(settings.modules_to_save or (), name):
        return f"{name!r} has factors, but modules_to_save stores it in full. {remedy}"
    by_default = targets is None and not settings.target_parameters
    if not by_default and not _is_target(settings, name):
        return f"{name!r} has tensors, but target_modules {_short(targets)} has no such. {remedy}"
    if not isinstance(targets, str) and not _in_layers(settings, name):
        layers = settings.layers_to_transform
        return f"{name!r} has tensors, but layers_to_transform is {layers}. {remedy}"
    return ""


def _in_layers(settings: Settings, name: str) -> bool:
    """PEFT 0.21.2, `check_target_module_exists`: the first number in the name counts."""
    if settings.layers_to_transform is None:
        return True
    patterns = settings.layers_pattern or ()
    tries = [rf"(?:^|.*?\.){p}\.(?P<i>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<i>\d+)\."]
    found = next((m for m in (re.match(p, name) for p in tries) if m), None)
    return found is not None and int(found["i"]) in settings.layers_to_transform


def _unused(settings: Settings, modules: Sequence[str]) -> list[str]:
    if isinstance(settings.target_modules, str):
        return [] if modules else [f"target_modules {settings.target_modules!r} has no tensors."]
    used = {name[cut:] for name in modules for cut in _cuts(name)}
    return [
        f"target_modules names {target!r}, but the file has no tensors for it. Remove it there, "
        "or save the adapter again: this one is not whole."
        for target in settings.target_modules or ()
        if target not in used
    ]


def _cuts(name: str) -> list[int]:
    return [0, *(place + 1 for place, char in enumerate(name) if char == ".")]


def _unexpected(settings: Settings, name: str, modules: set[str]) -> str:
    owner, _, last = name.rpartition(".")
    plain = owner.removesuffix(".base_layer")
    if is_saved(settings.modules_to_save or (), owner):
        return ""
    if last == "bias" and settings.bias == "all":
        return ""
    nested = owner != plain and plain in modules
    if nested and (last == "weight" or (last == "bias" and settings.bias == "lora_only")):
        return ""
    if last == "weight" and owner.rpartition(".")[2] in EMBEDDINGS:
        return ""
    return (
        f"{name!r} belongs to no adapter: modules_to_save is {settings.modules_to_save}, bias is "
        f"{settings.bias!r}. Name its module in modules_to_save, or remove the tensor."
    )


def _absent(settings: Settings, full: list[str], rows: list[str]) -> list[str]:
    owners = [name.rpartition(".")[0] for name in full]
    saved = settings.modules_to_save or ()
    found = [
        f"modules_to_save names {name!r}, but the file has no tensors for it. Save it again."
        for name in saved
        if name not in HEADS and not any(is_saved([name], owner) for owner in owners)
    ]
    wanted = settings.trainable_token_indices
    named = list(wanted) if isinstance(wanted, Mapping) else []
    found += [
        f"trainable_token_indices names {name!r}, but the file has no rows for it. Save it again."
        for name in named
        if not any(ends_with(row, name) for row in rows)
    ]
    if wanted is not None and not isinstance(wanted, Mapping) and not rows:
        found.append("trainable_token_indices is set, but the file has no rows. Save it again.")
    return found


def _short(targets: Any) -> str:
    return repr(targets)[:160]
