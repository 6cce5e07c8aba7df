"""Complaints: what went wrong, as a message for the person who can mend it."""

import errno

import jax

import rslora_jax as rl
from finetune.failures import BadStepError
from finetune.rows import DataError
from finetune.settings import ConfigError
from pretrained import ModelError

EXPECTED = (
    *(ConfigError, DataError, ModelError, rl.AdapterError, BadStepError, OSError),
    jax.errors.JaxRuntimeError,
)
"""What a user's settings, files and machine can cause; anything else is a bug, and a traceback."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def complaint(error: BaseException) -> str:
    """The message of an expected error.

    Raises:
      BaseException: the error itself, if it is none that a user can mend.
    """
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, jax.errors.JaxRuntimeError):
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise error
        first = str(error).splitlines()[0]
        return (
            f"The device's memory is too small: {first}. Try a smaller batch with more "
            "accumulation, remat: full, or quant_bits: 8. --dry-run tells what a run needs."
        )
    return str(error)


def _of_system(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    said = f"{where}{error.strerror or error}"
    if error.errno in FULL:
        return f"{said}. Make room and run it again: it goes on from the newest checkpoint."
    return said
