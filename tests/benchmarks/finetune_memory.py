"""How much memory a fine-tune of SmolLM2 needs: its base in float32, int8 and NF4.

    PYTHONPATH=. python tests/benchmarks/finetune_memory.py [--steps 2] [--json FILE]

Each is the program itself, `python examples/finetune`, in a process of its own, on the same texts
with small batches and rematerialized layers, so that the base outweighs what is computed of it.
Peak RSS is the kernel's own account of that process (`ru_maxrss`). A line for no fine-tune at all,
which only imports what the program imports and starts JAX, tells what is there in any case.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rslora_jax.tables import Table

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIDES = {"float32": 16, "int8": 8, "NF4": 4}
NOTHING = "imports alone"
IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
import finetune.program
jax.numpy.zeros(1).block_until_ready()
"""


def command(name: str, output: Path, options: argparse.Namespace) -> list[str]:
    """The command line of a run."""
    if name == NOTHING:
        return [sys.executable, "-c", IMPORTS, str(EXAMPLES)]
    flags = {
        "model": options.model,
        "dataset": EXAMPLES / "finetune" / "elements.jsonl",
        "output": output,
        "quant-bits": SIDES[name],
        "steps": options.steps,
        "batch": options.batch,
        "length": options.length,
        "rank": options.rank,
        "remat": options.remat,
        "eval-fraction": 0.0,
        "seed": 0,
    }
    words = [str(word) for flag in flags.items() for word in (f"--{flag[0]}", flag[1])]
    return [sys.executable, str(EXAMPLES / "finetune"), *words]


def peak(words: list[str]) -> tuple[float, float]:
    """Runs a command: its peak RSS in MB, and how long it took in seconds.

    Raises:
      RuntimeError: it failed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            words, stdout=said, stderr=said, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(words)} gave {child.returncode}:\n{said.read()[-3000:]}")
    return usage.ru_maxrss * 1024 / 1e6, time.perf_counter() - start


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each base."""
    found = {}
    for name in (NOTHING, *options.sides):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = peak(command(name, Path(folder) / "run", options))
    floats = found.get("float32", (math.nan, 0.0))[0]
    return [
        {"base": name, "peak RSS MB": size, "x float32": size / floats, "seconds": seconds}
        for name, (size, seconds) in found.items()
    ]


def main() -> None:
    """Measures, prints, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="full")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args()
    rows = measure(options)
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    about = (
        f"{time.strftime('%Y-%m-%d')}, load {load}, jax {version('jax')}: {options.model}, rank "
        f"{options.rank}, {options.steps} steps of {options.batch} x {options.length} tokens, "
        f"remat {options.remat}"
    )
    print(about)
    print(Table.of(rows))
    if options.json:
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
