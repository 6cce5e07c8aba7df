"""Checkpoints of adapters and of training runs: folders that know what they belong to."""

from rslora_jax.checkpoint.adapters import Restored, restore, save
from rslora_jax.checkpoint.fingerprint import Fingerprint, fingerprint
from rslora_jax.checkpoint.preemption import Preemption
from rslora_jax.checkpoint.records import Record
from rslora_jax.checkpoint.runs import Runs, RunState
from rslora_jax.checkpoint.storage import read_record

__all__ = [
    "Fingerprint",
    "Preemption",
    "Record",
    "Restored",
    "RunState",
    "Runs",
    "fingerprint",
    "read_record",
    "restore",
    "save",
]
