"""Hugging Face PEFT folders: adapters read, written and merged, without torch."""

from rslora_jax.peft.exporting import hf_tensors, merge_to_hf
from rslora_jax.peft.merging import merge_folders
from rslora_jax.peft.modules import Module, PeftAdapter, read, write
from rslora_jax.peft.names import LLAMA, llama, names
from rslora_jax.peft.rules import Name
from rslora_jax.peft.settings import Settings
from rslora_jax.peft.travel import Loaded, from_adapter, load, save, to_adapter

__all__ = [
    "LLAMA",
    "Loaded",
    "Module",
    "Name",
    "PeftAdapter",
    "Settings",
    "from_adapter",
    "hf_tensors",
    "llama",
    "load",
    "merge_folders",
    "merge_to_hf",
    "names",
    "read",
    "save",
    "to_adapter",
    "write",
]
