"""Damaged PEFT folders: an error of the library or the adapter, and nothing else."""

import random
import warnings
from pathlib import Path

import numpy as np
import pytest

import rslora_jax as rl
from rslora_jax.peft import read

FIXTURE = Path(__file__).parent / "peft_fixtures" / "llama" / "patterns"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROUNDS = 600


def cut(data, draw):
    """A truncation, or bytes that are lost in the middle."""
    start = draw.randrange(len(data))
    end = draw.choice([len(data), min(len(data), start + draw.randint(1, 64))])
    return data[:start] + data[end:]


def flip(data, draw):
    """One to eight bits flipped, half of them in the first kilobytes, where the header is."""
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        place = draw.randrange(min(len(data), draw.choice([4000, len(data)])))
        damaged[place] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def shapes(adapter):
    return {(m.name, m.kind, m.a.shape, m.b.shape) for m in adapter.modules}


def finite(adapter):
    return all(np.isfinite(m.a).all() and np.isfinite(m.b).all() for m in adapter.modules)


def outcome(folder):
    """The adapter, or the library's error. A setting that was renamed is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            return read(folder)
        except rl.AdapterError as error:
            return error


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_damaged_file_is_refused_or_reads_with_its_names_and_shapes(tmp_path, name, damage):
    original = {file: (FIXTURE / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    for file, data in original.items():
        (tmp_path / file).write_bytes(data)
    expected, refused = shapes(read(FIXTURE)), 0
    draw = random.Random(f"{name}{damage.__name__}")
    for _ in range(ROUNDS):
        (tmp_path / name).write_bytes(damage(original[name], draw))
        found = outcome(tmp_path)
        refused += isinstance(found, rl.AdapterError)
        if not isinstance(found, rl.AdapterError):
            assert shapes(found) == expected and finite(found)
    assert refused > ROUNDS // 4  # the damage does damage
