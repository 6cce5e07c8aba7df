"""Checkpoints of adapters: small folders that know what they belong to."""

from rslora_jax.checkpoint.fingerprint import Fingerprint, fingerprint
from rslora_jax.checkpoint.records import Record

__all__ = ["Fingerprint", "Record", "fingerprint"]
