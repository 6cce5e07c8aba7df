"""Processes of `examples/pod_finetune.py`, forked from one that has made the imports.

The imports take seconds, and no thread has started and no JAX backend exists before the fork.
Commands come on stdin, one JSON list a line; every answer is one line on stdout.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # or NumPy starts threads, which a fork would lose

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401  (before the fork)
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hosts
import pod_finetune
import rslora_jax as rl
import tasks
from rslora_jax.checkpoint import Runs, RunState, fingerprint, restore, save
from rslora_jax.checkpoint.processes import exchange, together

SITES = (
    rl.Site("q", "bio", (2, 8, 16), "float32", rank=4, alpha=8.0, scale=4.0),
    rl.Site("up", "io", (8, 8), "float32", rank=4, alpha=8.0, scale=4.0),
)
CONFIG = rl.LoraConfig(rank=4, alpha=8.0)
# All matrices of one shape: fewer programs to compile.
SQUARE = dataclasses.replace(tasks.TINY, d_ff=64, kv_heads=4)


def fine_tune(*flags):
    sys.argv, tasks.TINY = ["pod_finetune.py", *flags], SQUARE
    pod_finetune.main()


def agree(_, folder, *meeting):
    """Saves and restores factors that no process holds whole; errors of one are errors of all."""
    options = tyro.cli(pod_finetune.Options, args=meeting)
    hosts.connect(options.coordinator, options.processes, options.process_id)
    print("mesh", flush=True)
    first, folder = jax.process_index() == 0, Path(folder)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params = tree(mesh)
    assert not params.lora["q"]["a"].is_fully_addressable
    said = exchange(f"process {jax.process_index()}")
    assert said == ("process 0", "process 1")

    save(folder / "adapter", params, SITES, CONFIG, step=1)
    save(folder / "adapter", params, SITES, CONFIG, step=2, overwrite=True)
    back = restore(folder / "adapter", params)
    assert back.step == 2 and fingerprint(back.params) == fingerprint(params)
    assert back.lora["q"]["a"].sharding == params.lora["q"]["a"].sharding

    runs(folder, mesh, params)
    report = [
        refusal(lambda: save(folder / "adapter", params, SITES, CONFIG)),
        refusal(lambda: save(folder / "other", params, SITES, CONFIG, extra={"mine": first})),
        refusal(lambda: failing_alone(first)),
        refusal(lambda: restore(folder / "adapter" if first else folder / "missing", params)),
        refusal(lambda: damaged(folder / "adapter", params, first)),
    ]
    assert not (folder / "other").exists()
    (folder / f"report{jax.process_index()}").write_text(json.dumps(report))
    names = {path.name for path in folder.iterdir()}
    assert not [name for name in names if name.startswith(".")], names


def tree(mesh):
    """A base and factors whose shards lie on both processes, the same for any process count."""
    rng = np.random.default_rng(0)

    def on(shape, *spec):
        whole = rng.normal(size=shape).astype(np.float32)
        place = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(shape, place, lambda index: whole[index])

    base = {"q": on((2, 8, 16), None, "fsdp", "tensor"), "up": on((8, 8), "fsdp", "tensor")}
    q = {"a": on((2, 8, 4), None, "fsdp"), "b": on((2, 4, 16), None, None, "tensor")}
    up = {"a": on((8, 4), "fsdp"), "b": on((4, 8), None, "tensor")}
    return rl.LoraParams(base, {"q": q, "up": up})


def runs(folder, mesh, params):
    """A run whose state holds arrays of all kinds: global, replicated, and each process's own."""
    everywhere = NamedSharding(mesh, P())
    opt_state = jax.jit(optax.adam(1e-3).init)(params.lora)
    key = jax.jit(lambda: jax.random.key(7), out_shardings=everywhere)()
    data = {"order": np.arange(5), "own": jnp.arange(3), "key": jax.random.key(1)}
    state = RunState(params.lora, opt_state, 1, key, data)
    with Runs(folder / "run", SITES, CONFIG, base=params.base, keep_last=2) as opened:
        for step in (1, 2, 3):
            assert opened.save(state._replace(step=step), {"seconds": time.monotonic()})
        assert opened.steps() == (2, 3)
        opened.discard(after=2)
        assert opened.steps() == (2,)
        back = opened.restore(state)
        assert back.step == 2 and back.key.sharding.is_equivalent_to(everywhere, 0)
        assert fingerprint(back) == fingerprint(state._replace(step=2))
        mine = data | {"own": jnp.arange(3) + jax.process_index()}
        said = refusal(lambda: opened.save(state._replace(step=3, data=mine)))
        assert "same state" in said and "in process 1" in said, said
        assert opened.steps() == (2,)
    with Runs(folder / "run", SITES, CONFIG, base=params.base, read_only=True) as watched:
        assert watched.restore(state).step == 2


def failing_alone(first):
    with together():
        if not first:
            raise PermissionError("the disk of this one is read-only")


def damaged(folder, params, first):
    """A restore of which one process cannot read its shards."""
    with contextlib.ExitStack() as stack:
        if not first:
            broken = mock.Mock(side_effect=ValueError("a damaged chunk"))
            stack.enter_context(mock.patch("rslora_jax.checkpoint.storage.load", broken))
        restore(folder, params)


def refusal(function):
    try:
        function()
    except (rl.AdapterError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def serve():
    """Forks a child for each start; returns its command in the child, None at the end."""
    print("ready", len(os.listdir("/proc/self/task")) if os.path.isdir("/proc") else 1, flush=True)
    children = set()
    try:
        for line in iter(sys.stdin.readline, ""):
            what, *rest = json.loads(line)
            if what == "wait":
                code = wait(*rest)
                children -= {rest[0]} if code is not None else set()
                print("exit", code, flush=True)
                continue
            pid = os.fork()
            if pid == 0:
                children.clear()
                return what, rest
            children.add(pid)
            print("pid", pid, flush=True)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return None


def wait(pid, seconds):
    """The exit code of a child, None if it is still running after so long."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.02)


def main():
    command = serve()
    if command is None:
        return
    task, (output, devices, cache, *flags) = command
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    {"fine_tune": fine_tune, "agree": agree}[task](*flags)


if __name__ == "__main__":
    try:
        main()
    except AssertionError:  # the other processes must not wait at the exit of this one
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
