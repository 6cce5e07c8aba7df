"""Compiling: the TPU compiler in a process of its own, so that its abort becomes a message."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from rslora_jax.paths import AdapterError
from rslora_jax.plan import caching
from rslora_jax.plan.exhaustion import exhausted
from rslora_jax.plan.exporting import INSTALL, Program
from rslora_jax.plan.topologies import Topology, near

__all__ = ["CHILD", "Progress", "compile_program", "versions"]

CHILD = Path(__file__).with_name("child.py")
"""What runs in the other process."""

Progress = Callable[[str, float], None]
"""Is told what goes on and for how many seconds it has, twice a second."""

QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is touched: plans may compile side by side
    "TPU_SKIP_MDS_QUERY": "1",  # else it asks the cloud's metadata server what machine this is
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
}
UNWANTED = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")  # the first may hold flags of the CPU's XLA


def compile_program(
    program: Program,
    found: Topology,
    mesh: Any,
    options: Mapping[str, Any],
    time_limit: float,
    cache: Path | None,
    report: Progress | None = None,
) -> dict[str, Any]:
    """Compiles an exported program for a topology, or finds that this was done before.

    Args:
      program: the program.
      found: the topology.
      mesh: the abstract mesh of the program.
      options: options of the compiler.
      time_limit: seconds after which the compiler is ended.
      cache: the folder of earlier answers; None asks the compiler anew.
      report: is told what goes on.

    Returns:
      ``memory``, ``seconds`` and ``hlo``, or ``need`` and ``have`` where the memory does not
      suffice; and whether it was ``cached``.

    Raises:
      AdapterError: if libtpu is not installed, does not know the topology or refuses the
        program, if the compiler aborts, or if it needs longer than `time_limit`.
    """
    order = _order(program, found, mesh, options)
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    name = caching.key(program.digest, order, versions(), flags, CHILD.read_text())
    answer = caching.kept(cache, name) if cache else None
    if answer is not None:
        return {**answer, "cached": True}
    answer = _judged(_ask(program, order, found, time_limit, report), found)
    if cache:
        caching.keep(cache, name, answer)
    return {**answer, "cached": False}


def versions() -> dict[str, str]:
    """The versions of what a plan depends on.

    Raises:
      AdapterError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise AdapterError(
            "Planning for a TPU needs its compiler, libtpu (for Linux on x86-64), which is not "
            f"installed. Run `pip install '{INSTALL}'`."
        )
    return {name: _version(name) for name in ("jax", "jaxlib", "libtpu")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _order(
    program: Program, found: Topology, mesh: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "topology": found.name,
        "num_slices": found.num_slices,
        "config": found.chip.config,
        "mesh": dict(mesh.shape),
        "types": [kind.name for kind in mesh.axis_types],
        "specs": [_written(one.sharding.spec) for one in program.arrays],
        "donated": list(program.donated),
        "options": dict(options),
        "x64": bool(jax.config.read("jax_enable_x64")),
    }


def _written(spec: Any) -> list[Any]:
    return [[entry] if isinstance(entry, str) else entry and list(entry) for entry in spec]


def _ask(
    program: Program,
    order: dict[str, Any],
    found: Topology,
    time_limit: float,
    report: Progress | None,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rslora-plan-") as name:
        folder = Path(name)
        (folder / "program.bin").write_bytes(program.module)
        (folder / "order.json").write_text(json.dumps(order))
        with (folder / "errors.txt").open("wb") as errors, _started(folder, errors) as process:
            _wait(process, found, time_limit, report)
        if not (folder / "answer.json").exists():
            raise _aborted(process.returncode, (folder / "errors.txt").read_bytes(), found)
        return json.loads((folder / "answer.json").read_text())


@contextlib.contextmanager
def _started(folder: Path, errors: Any) -> Iterator[subprocess.Popen[bytes]]:
    kept = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    process = subprocess.Popen(
        # -P: the files beside the child are no modules for what it imports.
        [sys.executable, "-P", str(CHILD), str(folder)],
        env={**kept, **QUIET},
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # Reached by Ctrl-C too; the compiler's own processes are in the child's group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(
    process: subprocess.Popen[bytes], found: Topology, time_limit: float, report: Progress | None
) -> None:
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < time_limit:
        if report is not None:
            report(f"Compiling for {found.name}", elapsed)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(0.5, time_limit - elapsed))
            return
    raise AdapterError(
        f"Compiling for {found.name} was given {time_limit:g} seconds and was not done. Pass a "
        "larger time_limit, scan over the layers, or plan fewer of them."
    )


def _aborted(code: int, errors: bytes, found: Topology) -> AdapterError:
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return AdapterError(
        f"Compiling for {found.name} was asked for, but the TPU compiler {how}: "
        f"{_last_words(errors.decode(errors='replace'))} Try a smaller step, another mesh or "
        f"topology; libtpu {_version('libtpu')} is installed."
    )


def _last_words(text: str) -> str:
    """The line that says why: a fatal log line or the exception, not the stack after it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4} |\S*(Error|Exception)\b.*: ", line)]
    said = (fatal or lines or ["it said nothing"])[-1][:500]
    return said if said.endswith(".") else f"{said}."


def _judged(answer: dict[str, Any], found: Topology) -> dict[str, Any]:
    """The answer, if it is one: running out of memory is."""
    if "text" not in answer:
        return answer
    if memory := exhausted(answer["text"]):
        return {"need": memory.need, "have": memory.have}
    said = f"{answer['error']}: {answer['text'].strip()}"[:2000]
    if "opology" in said and "INVALID_ARGUMENT" in said:
        raise AdapterError(
            f"libtpu {_version('libtpu')} does not know {found.name}: {said} "
            f"The nearest known ones are {near(found.name)}."
        )
    raise AdapterError(f"The TPU compiler refused the program for {found.name}: {said}")
