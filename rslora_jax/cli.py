"""The command `rslora`: each subcommand is one function of `COMMANDS`, its docstring the help."""

import os
import sys
from collections.abc import Sequence

from rslora_jax.commands.adapters import combine, convert, inspect, merge
from rslora_jax.commands.measure import spectrum, stability, walkthrough
from rslora_jax.commands.plan import plan
from rslora_jax.extras import extra
from rslora_jax.paths import AdapterError
from rslora_jax.terminal import INSTALL

__all__ = ["COMMANDS", "main"]

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # the last two as a shell reports the signals

DESCRIPTION = """Measure rank-stabilized LoRA, take adapters from tool to tool, plan runs on TPUs.

Start with `rslora walkthrough`: it needs no model and no data, and shows in seconds what the
scale does and what it does not. `inspect`, `convert`, `merge` and `combine` work on folders with
adapters, this library's and PEFT's. `plan` asks the TPU compiler whether a fine-tune fits, with
no TPU at hand. `rslora COMMAND --help` explains a command.

Exit codes: 0 done, 2 bad input (one line on stderr says what to do), 130 interrupted."""


# To add a command, write a function with annotated arguments in `commands` and put it here.
COMMANDS = (walkthrough, stability, spectrum, inspect, convert, merge, combine, plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments after the program's name; None means those of the process.

    Returns:
      The exit code: 0; 2 for bad input, 130 after Ctrl-C, each with one line on stderr.

    Raises:
      SystemExit: from the parser: 0 after ``--help``, 2 for a command or flag that it does
        not know, with a hint on stderr.

    Example:
      >>> main(["walkthrough", "--output", "figure.txt"])  # and says so on stderr
      2
    """
    try:
        _parse_and_run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted; no file is left half-written.", INTERRUPTED)
    except BrokenPipeError:  # the reader has left, as in `rslora walkthrough | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (AdapterError, OSError) as error:
        return _fail(" ".join(str(error).split()), BAD_INPUT)
    return 0


def _parse_and_run(argv: Sequence[str] | None) -> None:
    app = extra("tyro.extras", INSTALL, "The command rslora").SubcommandApp()
    for command in COMMANDS:
        app.command(command)
    app.cli(prog="rslora", description=DESCRIPTION, args=sys.argv[1:] if argv is None else argv)


def _fail(message: str, code: int) -> int:
    print(f"rslora: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
