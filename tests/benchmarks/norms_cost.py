"""What measuring costs: a training step as it is, with recorded norms, and a full report.

A small transformer (that of `step_cost.py`) is trained with Adam, once plainly, once with
`rl.optim.record_norms` around Adam, and beside them stands one `gradient_report`:

    PYTHONPATH=. python tests/benchmarks/norms_cost.py [--loop scanned] [--rank 16]

FLOPs and temporary bytes are XLA's own of the compiled programs, times are medians over
rounds of the ratio within a round. Every step is given its state back, as in training.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

import rslora_jax as rl
from rslora_jax.analysis.gradients import gradient_report
from rslora_jax.tables import Table
from tests.benchmarks.step_cost import (
    ALPHA,
    LOOPS,
    Size,
    compiled_cost,
    cross_entropy,
    forward,
    interleaved,
    model,
    plain,
)

PLAIN = "training step"


def programs(size: Size, loop: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each way as a function to compile, and its arguments."""
    base, x, labels = model(size, loop, concrete=True)
    config = rl.LoraConfig(rank=size.rank, alpha=ALPHA)

    def original(base: Any, x: Any) -> Any:
        return forward(size, loop, plain, base, None, x)

    params, apply, sites = rl.adapt(original, base, x, config=config, key=jax.random.key(1))
    adam = optax.adam(1e-3)

    def loss_fn(params: rl.LoraParams, x: Any, labels: Any) -> Any:
        return cross_entropy(apply(params, x), labels)

    def step(tx: optax.GradientTransformation) -> Callable[..., Any]:
        def function(params: rl.LoraParams, state: Any, x: Any, labels: Any) -> Any:
            loss, grads = rl.value_and_grad(loss_fn)(params, x, labels)
            updates, state = tx.update(grads, state, params.lora)
            return rl.optim.apply_updates(params, updates).lora, state, loss

        return function

    def report(params: rl.LoraParams, state: Any, x: Any, labels: Any) -> Any:
        return gradient_report(loss_fn, params, sites, x, labels, tx=adam, state=state)

    recorded = rl.optim.record_norms(adam, sites)
    plain_args = (params, adam.init(params.lora), x, labels)
    return {
        PLAIN: (step(adam), plain_args),
        "with record_norms": (step(recorded), (params, recorded.init(params.lora), x, labels)),
        "gradient_report": (report, plain_args),
    }


def measure(size: Size, loop: str, rounds: int) -> Table:
    """One row for each way, with ratios to the plain step."""
    given = programs(size, loop)
    compiled = {name: jax.jit(f).lower(*args).compile() for name, (f, args) in given.items()}
    costs = {name: compiled_cost(program) for name, program in compiled.items()}
    calls = {
        name: (lambda name=name: jax.block_until_ready(compiled[name](*given[name][1])))
        for name in given
    }
    times = interleaved(calls, rounds, time.perf_counter)
    return Table.of(
        {
            "layers": loop,
            "way": name,
            "x FLOPs": costs[name]["flops"] / costs[PLAIN]["flops"],
            "x temporary bytes": costs[name]["temp_bytes"] / costs[PLAIN]["temp_bytes"],
            "ms": 1e3 * min(times[name]),
            "x time": statistics.median(
                mine / theirs for mine, theirs in zip(times[name], times[PLAIN], strict=True)
            ),
        }
        for name in given
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--loop", choices=LOOPS, default="scanned")
    parser.add_argument("--rounds", type=int, default=15)
    for field in dataclasses.fields(Size):
        default = {"layers": 4}.get(field.name, field.default)
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=default)
    options = vars(parser.parse_args())
    how = {name: options.pop(name) for name in ("loop", "rounds")}
    size = Size(**options)
    print(f"jax {jax.__version__}, {jax.default_backend()}, {size}")
    print(measure(size, **how))


if __name__ == "__main__":
    main()
