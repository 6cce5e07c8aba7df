"""Plans for large Llamas on large slices: what fits, what it costs, how long the compiler takes.

    python tests/benchmarks/big_plans.py                      # all of them: hours on two cores
    python tests/benchmarks/big_plans.py 8b --only "LoRA r=64"
    python tests/benchmarks/big_plans.py --trace              # trace and export alone: seconds

Each plan is one compilation in a process of its own. One that does not fit is an answer; one that
takes longer than the time limit is told and left. Answers are kept, so that a second call goes on
where the first was ended.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rslora_jax.paths import AdapterError
from rslora_jax.plan import training
from rslora_jax.plan.advice import nearest_fit
from rslora_jax.plan.exporting import export
from rslora_jax.plan.inputs import inputs
from rslora_jax.plan.models import find_model
from rslora_jax.plan.plan import plan
from rslora_jax.plan.report import Plan
from rslora_jax.plan.topologies import abstract_mesh
from rslora_jax.sharding import Policy

GIB = 2**30

VARIANTS: Mapping[str, Callable[[training.Run], training.Variant]] = {
    "frozen base": training.frozen,
    "LoRA r=16": lambda run: training.adapters(run, 16),
    "LoRA r=64": lambda run: training.adapters(run, 64),
    "LoRA r=256": lambda run: training.adapters(run, 256),
    "LoRA r=64, fsdp left off": lambda run: training.adapters(
        run, 64, policy=Policy(without=("fsdp",))
    ),
    "full": training.full,
}


@dataclasses.dataclass(frozen=True)
class Big:
    """A model on a slice, and the variants that are planned for it.

    `training.Run` has the rest: a mesh, a batch and a length.
    """

    model: str
    topology: str
    mesh: Mapping[str, int]
    batch: int
    length: int
    variants: Sequence[str] = ("frozen base", "LoRA r=64")

    @property
    def run(self) -> training.Run:
        """What is trained where."""
        return training.Run(find_model(self.model), self.mesh, self.batch, self.length)


BIG = {
    "8b": Big("llama-3.1-8b", "v5e:16x16", {"fsdp": 32, "tensor": 8}, 256, 2048, tuple(VARIANTS)),
    "70b": Big("llama-3.1-70b", "v5p:4x4x8", {"fsdp": 16, "tensor": 8}, 128, 4096),
    "405b": Big("llama-3.1-405b", "v5p:8x8x8", {"fsdp": 64, "tensor": 8}, 512, 4096),
    "405b-4096": Big("llama-3.1-405b", "v5p:16x16x16", {"fsdp": 512, "tensor": 8}, 2048, 4096),
    "405b-6144": Big(
        "llama-3.1-405b", "v5p:16x16x24", {"data": 3, "fsdp": 256, "tensor": 8}, 1536, 4096
    ),
    "405b-v5e": Big("llama-3.1-405b", "v5e:16x16", {"fsdp": 32, "tensor": 8}, 256, 4096),
}


def traced(big: Big, variant: training.Variant) -> str:
    """How long tracing and exporting take, and how large the program is."""
    mesh = abstract_mesh(big.mesh)
    start = time.monotonic()
    found = inputs(variant.step, variant.args, mesh, variant.names)
    program = export(variant.step, variant.args, found, mesh, variant.donate)
    held = sum(one.bytes for one in found) / GIB
    seconds = time.monotonic() - start
    return f"traced in {seconds:.1f} s, {len(program.module):,} bytes, arguments {held:.3f} GiB"


def planned(
    big: Big, run: training.Run, variant: training.Variant, options: argparse.Namespace
) -> Plan:
    """The compiler's answer."""
    return plan(
        variant.step,
        variant.args,
        topology=big.topology,
        mesh_shape=run.mesh,
        **variant.told,
        time_limit=options.time_limit,
        cache=options.cache,
    )


def mended(big: Big, wanted: str, short: Plan, options: argparse.Namespace) -> str:
    """The nearest change that makes a plan fit."""

    def planner(what: str, run: training.Run) -> Plan:
        found = planned(big, run, VARIANTS[wanted](run), options)
        print(f"    {what}: {told(found)}", flush=True)
        return found

    found = nearest_fit(big.run, short, planner, most=4)
    return f"the nearest change that fits is {found.change}" if found else "no change tried fits"


def told(one: Plan) -> str:
    """A plan in a few lines."""
    need, have = one.need / GIB, one.have / GIB
    if not one.fits:
        return f"does not fit: needs {need:.2f} of {have:.2f} GiB"
    held, temporaries = (one.memory[name] / GIB for name in ("arguments", "temporaries"))
    parts = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in one.seconds.items())
    sent = ", ".join(
        f"{each.kind} {each.count} of {each.wire_bytes / 1e9:.2f} GB" for each in one.collectives
    )
    assert one.flops is not None and one.hbm_bytes is not None
    return "\n    ".join(
        (
            f"fits: {need:.2f} of {have:.2f} GiB (arguments {held:.2f}, temporaries "
            f"{temporaries:.2f}); compiled in {one.compile_seconds:.0f} s"
            + (", then" if one.cached else ""),
            f"{one.flops / 1e12:.1f} TFLOP, {one.hbm_bytes / 1e9:.0f} GB of HBM; ms: {parts}",
            f"sent: {sent}",
        )
    )


def main() -> None:
    """Makes the plans that are asked for, one after another, and prints each as it comes."""
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("names", nargs="*", default=list(BIG), help=f"of {', '.join(BIG)}")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="variants")
    parser.add_argument("--trace", action="store_true", help="trace and export alone")
    parser.add_argument("--time-limit", type=float, default=1800.0, help="seconds for each")
    parser.add_argument("--no-cache", dest="cache", action="store_false", help="compile anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plans there")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {os.cpu_count()} cores", flush=True)
    kept: list[dict[str, Any]] = []
    for name in options.names:
        big = BIG[name]
        mesh = " ".join(f"{axis}={size}" for axis, size in big.mesh.items())
        print(f"{big.model} on {big.topology}, {mesh}, {big.batch} x {big.length} tokens")
        for wanted in options.only or big.variants:
            variant = VARIANTS[wanted](big.run)
            try:
                answer = (
                    traced(big, variant)
                    if options.trace
                    else planned(big, big.run, variant, options)
                )
            except AdapterError as error:
                answer = str(error)
            if isinstance(answer, Plan):
                kept.append({"model": big.model, **answer.to_dict()})
            print(f"  {wanted}: {told(answer) if isinstance(answer, Plan) else answer}", flush=True)
            if isinstance(answer, Plan) and not answer.fits:
                print(f"    {mended(big, wanted, answer, options)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
