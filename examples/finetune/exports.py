"""Exports: what a run leaves behind for other programs."""

from pathlib import Path
from typing import Any

import jax

import rslora_jax as rl
from finetune.processes import whole
from finetune.settings import Settings
from hosts import say

FORMS = {
    "native": ("adapter", "PEFT adapter with its ranks, alphas and scaling: train on"),
    "portable": ("adapter-portable", "PEFT adapter of one rank, scales folded in: serve anywhere"),
}
MERGED = ("merged", "Hugging Face model with the adapters merged in")


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
