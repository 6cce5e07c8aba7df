"""Exports: what a run leaves behind for other programs."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

import rslora_jax as rl
from finetune.processes import whole
from finetune.settings import ConfigError, Settings
from hosts import say

FORMS = {
    "native": ("adapter", "PEFT adapter with its ranks, alphas and scaling: train on"),
    "portable": ("adapter-portable", "PEFT adapter of one rank, scales folded in: serve anywhere"),
}
MERGED = ("merged", "Hugging Face model with the adapters merged in")


def check(settings: Settings, lora: Any, sites: rl.Sites) -> None:
    """Refuses before training what could not be exported after it.

    Args:
      settings: of the run.
      lora: its factors, abstract.
      sites: what is adapted.

    Raises:
      ConfigError: if PEFT has no way to say what is adapted, such as the embedding of a tied model.
    """
    if not settings.export:
        return
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), lora)
    try:
        rl.peft.to_adapter(zeros, sites)
    except rl.AdapterError as error:
        raise ConfigError(
            f"targets and export do not go together: {error} Or ask for no PEFT folders, by "
            "`export: []`, and for merge: true."
        ) from error


def export(
    settings: Settings, source: Any, params: rl.LoraParams, sites: rl.Sites
) -> dict[str, str]:
    """Writes the PEFT folders that are asked for, and the merged model.

    Returns:
      What was written: folder -> what it is.
    """
    written = {}
    lora = whole(params.lora)
    for form in settings.export:
        name, what = FORMS[form]
        if jax.process_index() == 0:
            rl.peft.save(
                settings.output / name,
                lora,
                sites,
                form=form,
                base_model=str(source.path),
                overwrite=True,
            )
        written[name] = what
    if settings.merge:
        merge(settings.output / MERGED[0], source, rl.LoraParams(whole(params.base), lora), sites)
        written[MERGED[0]] = MERGED[1]
    return written


def merge(folder: Path, source: Any, params: rl.LoraParams, sites: rl.Sites) -> None:
    """Writes a model folder that transformers loads, tokenizer included."""
    if jax.process_index() != 0:
        return
    say(f"merging into {folder}")
    rl.peft.merge_to_hf(folder, params, sites, config=source.settings, overwrite=True)
    source.save_tokenizer(folder)
