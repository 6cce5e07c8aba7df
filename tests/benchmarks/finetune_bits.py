"""Whether quantized bases learn the same facts: `elements.yaml` on float32, int8 and NF4.

Every run is the program itself with the schedule of the file, all alike but for --quant-bits. The
model then answers every prompt: those it was taught, and those in a wording that it was not. A run
that is done is not done again.

    PYTHONPATH=. python tests/benchmarks/finetune_bits.py [--bits 16 8 4] [--output FOLDER]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rslora_jax.files import whole_file
from rslora_jax.tables import Table
from tests.benchmarks.program_runs import PROGRAM, read, train

BASES = {16: "float32", 8: "int8", 4: "NF4"}
TAUGHT, UNTAUGHT = PROGRAM / "elements.jsonl", PROGRAM / "elements_test.jsonl"


def main() -> None:
    """Runs, and prints a row for each base."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--bits", type=int, nargs="+", choices=BASES, default=[*BASES])
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune_bits"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    asked = options.output / "asked.jsonl"
    prompts = [len(path.read_text().splitlines()) for path in (TAUGHT, UNTAUGHT)]
    with whole_file(asked) as temporary:
        temporary.write_text(TAUGHT.read_text() + UNTAUGHT.read_text())
    rows = []
    for bits in options.bits:
        folder = options.output / str(bits)
        train(folder, words(bits, asked, sum(prompts)))
        found = read(folder)
        right = [answer.said == answer.right for answer in found.answers]
        rows.append(
            {
                "base": BASES[bits],
                "taught": share(right[: prompts[0]], prompts[0]),
                "untaught": share(right[prompts[0] :], prompts[1]),
                "seconds": found.seconds[0],
            }
        )
        print(Table.of(rows), flush=True)


def words(bits: int, asked: Path, prompts: int) -> list[str]:
    """The command line of a run, but for its output."""
    flags = ["--quant-bits", str(bits), "--no-tensorboard", "--eval-every", "0"]
    flags += ["--eval-dataset", str(asked), "--eval-rows", str(prompts)]
    return [str(PROGRAM / "elements.yaml"), *flags, "--eval-generate", str(prompts)]


def share(right: Sequence[bool], of: int) -> float:
    """The share of the prompts that were answered exactly.

    Raises:
      ValueError: not all were answered.
    """
    if len(right) != of:
        raise ValueError(f"{len(right)} of {of} prompts were answered")
    return sum(right) / of


if __name__ == "__main__":
    main()
