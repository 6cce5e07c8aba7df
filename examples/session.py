"""What a long-running script owes its user: a clean Ctrl-C, and where the time went.

Only the standard library, so that a script can import it before everything that is slow.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

INTERRUPTED = 128 + signal.SIGINT  # 130, as shells report it


def exit_on_interrupt(message: str) -> None:
    """From now on Ctrl-C unwinds the stack, prints `message` alone and exits with code 130."""

    def unwind(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the unwinding
        atexit.register(leave)
        raise SystemExit(INTERRUPTED)

    def leave() -> None:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        # JAX may still be computing in threads that do not survive the interpreter's own exit.
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, unwind)


class Phases:
    """The wall time of each named phase of a run, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start

    def __str__(self) -> str:
        """One line: every phase and the total."""
        parts = [f"{name} {seconds:.1f}" for name, seconds in self.seconds.items()]
        return f"seconds: {', '.join(parts)}; total {sum(self.seconds.values()):.1f}"
