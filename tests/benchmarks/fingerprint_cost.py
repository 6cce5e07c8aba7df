"""What a fingerprint costs: gigabytes a second, beside a plain sum and beside SHA-256.

    PYTHONPATH=. python tests/benchmarks/fingerprint_cost.py [--megabytes 256] [--rounds 5]

Every row reads the same weights, a stack of square matrices: `sum` is `jnp.sum` of them, a plain
read; `fingerprint` is the whole call, as `save` makes it; `sha256` hashes the bytes on the host,
after a copy from the device.
Times are medians over rounds in which all take turns. Each device hashes its own shards, so the
seconds for 8 billion bfloat16 weights are those of one device and fall with their number.
"""

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.checkpoint import fingerprint
from rslora_jax.checkpoint.content import _hash
from rslora_jax.tables import Table

SIDE = 1024
WEIGHTS = 8e9 * 2
"""Bytes of 8 billion weights in bfloat16: 16 GB."""


def sha256(array: jax.Array) -> str:
    """The host's way."""
    return hashlib.sha256(np.asarray(array).view(np.uint8)).hexdigest()


def seconds(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each way, all in turn in every round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        jax.block_until_ready(way())
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}


def measure(dtype: str, megabytes: int, rounds: int) -> list[tuple[Any, ...]]:
    """The rows of one dtype."""
    layers = max(1, megabytes * 10**6 // (SIDE * SIDE * jnp.dtype(dtype).itemsize))
    array = jax.random.normal(jax.random.key(0), (layers, SIDE, SIDE), dtype)
    ways = {
        "sum": partial(jnp.sum, array),
        "fingerprint": partial(fingerprint, {"w": array}),
        "sha256": partial(sha256, array),
    }
    spent = seconds(ways, rounds)
    scratch = _hash.lower(array).compile().memory_analysis().temp_size_in_bytes
    rate = {name: array.nbytes / 1e9 / time_ for name, time_ in spent.items()}
    return [
        (
            dtype,
            name,
            round(rate[name], 2),
            round(rate["sum"] / rate[name], 2),
            scratch if name == "fingerprint" else None,
            round(WEIGHTS / 1e9 / rate[name], 1),
        )
        for name in ways
    ]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = [
        row
        for dtype in ("bfloat16", "float32")
        for row in measure(dtype, options.megabytes, options.rounds)
    ]
    columns = ("dtype", "way", "GB/s", "times the sum", "scratch bytes", "s for 16 GB")
    device = jax.devices()[0]
    print(f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}")
    print(Table(columns, rows))


if __name__ == "__main__":
    main()
