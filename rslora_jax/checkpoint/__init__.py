"""Checkpoints of adapters: small folders that know what they belong to."""

from rslora_jax.checkpoint.adapters import Restored, restore, save
from rslora_jax.checkpoint.fingerprint import Fingerprint, fingerprint
from rslora_jax.checkpoint.records import Record
from rslora_jax.checkpoint.storage import read_record

__all__ = ["Fingerprint", "Record", "Restored", "fingerprint", "read_record", "restore", "save"]
