"""Hugging Face PEFT folders: adapters read, written and merged, without torch."""

from rslora_jax.peft.merging import merge_folders
from rslora_jax.peft.modules import Module, PeftAdapter, read, write
from rslora_jax.peft.settings import Settings

__all__ = ["Module", "PeftAdapter", "Settings", "merge_folders", "read", "write"]
