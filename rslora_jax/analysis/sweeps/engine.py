"""Engine: all runs of a sweep as one compiled program, in chunks and over devices."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

from rslora_jax.analysis.sweeps.batches import Batches
from rslora_jax.analysis.sweeps.budget import Budget, divide, peak_bytes
from rslora_jax.analysis.sweeps.runs import Run, RunData
from rslora_jax.analysis.sweeps.training import Plan, draw, train
from rslora_jax.factors import LoraParams, init_abstract
from rslora_jax.paths import AdapterError
from rslora_jax.program import is_array

__all__ = ["Outcome", "run_all"]


class Outcome(NamedTuple):
    """What comes of all runs.

    Attributes:
      traces: ``{quantity: [runs, steps]}``.
      budget: how the runs were divided.
      seconds: of tracing and compiling, and of running.
      factors: the trained factors with a leading [runs] axis, or None.
    """

    traces: Mapping[str, np.ndarray]
    budget: Budget
    seconds: Mapping[str, float]
    factors: Any


class _OneRun(NamedTuple):
    """The program of a single run: ``function(*shared, *run data)``, and its results' tree."""

    function: Callable[..., Any]
    shared: list[Any]
    bytes: int
    treedef: Any


def run_all(
    plan: Plan,
    base: Any,
    batches: Batches,
    runs: tuple[Sequence[Run], RunData],
    memory: int | None,
    sharding: NamedSharding | None,
) -> Outcome:
    """Trains every run in one compilation.

    Args:
      plan: what the runs share.
      base: the frozen tree.
      batches: their data.
      runs: the runs, and as `run_data` gives them.
      memory: bytes that the runs on one device may use together, or None.
      sharding: spreads the runs over one mesh axis, or None.

    Raises:
      AdapterError: if the loss is no scalar, the sharding has no one axis, or no run fits.
    """
    _check_loss(plan, base, batches)
    shards = _shards(sharding)
    started = time.perf_counter()
    records, data = runs
    draws = draw(plan, list(dict.fromkeys(run.seed for run in records)))
    one = _trace(plan, base, draws, batches, data)
    budget = divide(len(records), one.bytes, memory, shards)
    data = jax.tree.map(partial(_padded, budget.chunk * budget.rounds * shards), data)
    program = _spread(_program(one.function, budget), sharding)
    shared = [_placed(leaf, sharding) for leaf in one.shared]
    data = data if sharding is None else jax.device_put(data, sharding)
    compiled = jax.jit(program).lower(shared, data).compile()
    compiling = time.perf_counter() - started
    results = [np.asarray(leaf)[: len(records)] for leaf in compiled(shared, data)]
    seconds = {"compiling": compiling, "running": time.perf_counter() - started - compiling}
    seen, factors = jax.tree.unflatten(one.treedef, results)
    return Outcome({name: seen[name] for name in plan.quantities}, budget, seconds, factors)


def _trace(plan: Plan, base: Any, draws: Any, batches: Batches, data: RunData) -> _OneRun:
    """Traces one run; `vmap` of this trace is all of them, so Python walks the model once."""
    leaves, treedef = jax.tree.flatten((base, draws, batches.stacked, batches.single))
    places = [k for k, leaf in enumerate(leaves) if is_array(leaf)]

    def function(shared: Sequence[Any], run: RunData) -> Any:
        filled = dict(zip(places, shared, strict=True))
        given = [filled.get(k, leaf) for k, leaf in enumerate(leaves)]
        tree, drawn, stacked, single = jax.tree.unflatten(treedef, given)
        return train(plan, tree, drawn, Batches(batches.steps, stacked, single), run)

    shared = [leaves[k] for k in places]
    run = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data)
    closed, results = jax.make_jaxpr(function, return_shape=True)(shared, run)
    return _OneRun(jaxpr_as_fun(closed), shared, peak_bytes(closed), jax.tree.structure(results))


def _program(function: Callable[..., Any], budget: Budget) -> Callable[..., Any]:
    def program(shared: Sequence[Any], data: RunData) -> Any:
        every = jax.vmap(lambda run: function(*shared, *run))
        if budget.rounds == 1:
            return every(data)
        chunks = jax.tree.map(lambda x: x.reshape(budget.rounds, -1, *x.shape[1:]), data)
        results = jax.lax.map(every, chunks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

    return program


def _padded(count: int, array: np.ndarray) -> np.ndarray:
    """Repeats the last run, so that all chunks are full."""
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])


def _placed(leaf: Any, sharding: NamedSharding | None) -> Any:
    """A copy on every device of the mesh, unless the array lives on that mesh already."""
    if sharding is None:
        return leaf
    there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == sharding.device_set
    return leaf if there else jax.device_put(leaf, NamedSharding(sharding.mesh, PartitionSpec()))


def _spread(program: Callable[..., Any], sharding: NamedSharding | None) -> Callable[..., Any]:
    """The program on every device for its own runs; other mesh axes stay as they are."""
    if sharding is None:
        return program
    return jax.shard_map(
        program,
        mesh=sharding.mesh,
        in_specs=(PartitionSpec(), sharding.spec),
        out_specs=sharding.spec,
        axis_names={*_names(sharding)},
        check_vma=False,
    )


def _names(sharding: NamedSharding) -> tuple[str, ...]:
    (entry,) = sharding.spec
    return entry if isinstance(entry, tuple) else (entry,)


def _shards(sharding: NamedSharding | None) -> int:
    """Over how many devices the runs are spread."""
    if sharding is None:
        return 1
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) != 1 or not sharding.spec[0]:
        raise AdapterError(
            f"sharding must be NamedSharding(mesh, PartitionSpec(axis)), found {sharding!r}. "
            "Name the one mesh axis that the runs are spread over."
        )
    return math.prod(sharding.mesh.shape[name] for name in _names(sharding))


def _check_loss(plan: Plan, base: Any, batches: Batches) -> None:
    params = LoraParams(base, init_abstract(plan.sites, plan.config))
    found = jax.eval_shape(plan.loss_fn, params, batches.example)
    leaves = jax.tree.leaves(found)
    scalar = len(leaves) == 1 and leaves[0].shape == ()
    if not scalar or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise AdapterError(
            f"The loss must be one real scalar, found {found}. Average it over the batch, and "
            "leave out auxiliary results."
        )
