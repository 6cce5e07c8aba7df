"""Fine-tune a Llama-family model from a YAML file: ``python examples/finetune CONFIG.yaml``."""

import sys
from pathlib import Path

# `python examples/finetune` puts this folder first: its modules are `finetune.step` and so on.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from session import exit_on_interrupt  # noqa: E402

if __name__ == "__main__":  # before the slow imports: Ctrl-C is one line from the start
    exit_on_interrupt(
        "Interrupted: run it again, and it goes on from its newest checkpoint if it has one."
    )
    from finetune.program import main

    sys.exit(main(sys.argv[1:]))
