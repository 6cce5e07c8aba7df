"""A training run that can be killed: `test_survival` drives it.

The imports take seconds, so one process makes them and then forks a child for each command. No
thread has started and no JAX backend exists before the fork; a killed child is a killed process.
"""

import functools
import json
import os
import sys
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # or NumPy starts threads, which a fork would lose

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401  (before the fork)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from rslora_jax.checkpoint import Preemption, Runs, RunState, fingerprint
from rslora_jax.paths import flatten

SAMPLES, BATCH = 56, 8
WIDTH = 16  # of everything: programs for one shape are quickly loaded


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Dense(WIDTH, use_bias=False)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        x = nn.tanh(nn.Dense(WIDTH, use_bias=False)(x))
        return nn.Dense(WIDTH, use_bias=False)(x)


def train(folder, result, total, every, linger=False):
    """Trains to step `total`, from the newest step in `folder` if there is one."""
    model, config = Model(), rl.LoraConfig(rank=WIDTH, alpha=8.0)
    rng = np.random.default_rng(1)  # no JAX programs, which each child would have to load
    x = rng.normal(size=(SAMPLES, WIDTH)).astype(np.float32)
    y = np.sin(x * x.sum(-1, keepdims=True))
    shapes = jax.eval_shape(model.init, jax.random.key(2), x)
    base = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, shapes)
    params, apply, sites = rl.adapt(
        model.apply, base, x[:BATCH], config=config, key=jax.random.key(3)
    )
    schedule = optax.cosine_decay_schedule(3e-2, total)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    data = {"epoch": 0, "index": 0, "losses": np.zeros(0, np.float32)}
    start = RunState(params.lora, tx.init(params.lora), 0, jax.random.key(4), data)

    @functools.partial(jax.jit, donate_argnames=("lora", "opt_state"))
    def step(base, lora, opt_state, key, x, y):
        def loss_fn(params):
            out = apply(params, x, train=True, rngs={"dropout": key})
            return jnp.mean((out - y) ** 2)

        loss, grads = rl.value_and_grad(loss_fn)(rl.LoraParams(base, lora))
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    with Preemption() as notice, Runs(folder, sites, config, base=base, save_every=every) as runs:
        state = start if runs.latest() is None else runs.restore(start)
        report("resumed", state.step)
        while state.step < total and not notice.received:
            rows, data = next_batch(state.data)
            key, noise = jax.random.split(state.key)
            lora, opt_state, loss = step(base, state.lora, state.opt_state, noise, x[rows], y[rows])
            data["losses"] = np.append(data["losses"], np.float32(loss))
            state = RunState(lora, opt_state, state.step + 1, key, data)
            runs.save(state, {"loss": loss})
            report("step", state.step)
        runs.save(state, force=True)
        runs.wait()
        report("saved", state.step)
    if state.step == total:
        write(result, state)
    while linger:  # a kill that comes late still finds a process
        time.sleep(1)


def next_batch(data):
    """The rows of the next batch of a shuffled pass, and the position after it."""
    order = np.random.default_rng(data["epoch"]).permutation(SAMPLES)
    index = data["index"] + BATCH
    rows = order[data["index"] : index]
    moved = {"index": index} if index < SAMPLES else {"index": 0, "epoch": data["epoch"] + 1}
    return rows, {**data, **moved}


def write(path, state):
    """Every leaf of a state, by path."""
    flat = flatten(state._replace(key=jax.random.key_data(state.key)))
    np.savez(path, **dict(zip((p.replace("/", ".") for p in flat.paths), flat.leaves, strict=True)))


def cross(folder, mode, devices, explicit):
    """Saves a state from a mesh of all devices, or restores it onto one and compares."""
    kinds = (AxisType.Explicit if explicit else AxisType.Auto,) * 2
    mesh = jax.make_mesh((devices // 2, 2), ("x", "y"), axis_types=kinds)
    site = rl.Site("w", "bio", (3, 16, 32), "float32", rank=8, alpha=8.0, scale=8.0**0.5)
    specs = {"w": {"a": P(None, "x", "y"), "b": P(None, "y", "x")}}
    rng = np.random.default_rng(0)
    host = {
        "w": {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in zip("ab", site.factor_shapes, strict=True)
        }
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    lora = jax.tree.map(jax.device_put, host, shardings)
    tx = optax.adam(1e-2)
    _, opt_state = jax.jit(tx.update)(lora, tx.init(lora))
    state = RunState(lora, opt_state, 1, jax.random.key(0), {"mask": lora["w"]["a"] > 0})
    like = jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            if isinstance(leaf, jax.Array)
            else leaf
        ),
        state,
    )
    with Runs(folder, [site], rl.LoraConfig(8, 8.0), base={"w": jnp.ones(3)}) as runs:
        if mode == "save":
            runs.save(state)
            runs.wait()
            return
        restored = runs.restore(like)
    for path, left, right in zip(
        flatten(state).paths, jax.tree.leaves(restored), jax.tree.leaves(state), strict=True
    ):
        if isinstance(right, jax.Array):
            assert left.sharding == right.sharding, (path, left.sharding, right.sharding)
            assert left.dtype == right.dtype, path
    assert fingerprint(restored) == fingerprint(state)
    jax.jit(tx.update)(restored.lora, restored.opt_state)


def report(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def serve():
    """Forks a child for each line on stdin, one after the other; returns in the child."""
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc") else 1
    report("ready", threads)
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        report("pid", pid)
        report("exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return None


def main():
    command = serve()
    if command is None:
        return
    task, devices, cache, *rest = command
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    {"train": train, "cross": cross}[task](*rest)


if __name__ == "__main__":
    main()
