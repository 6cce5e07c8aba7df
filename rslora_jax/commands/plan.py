"""Plan: the command that asks the TPU compiler whether a fine-tune fits, and what it costs."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from rslora_jax.commands.planned import change, check_target, print_plans, write_plans
from rslora_jax.paths import AdapterError
from rslora_jax.plan import advice, training
from rslora_jax.plan.advice import Advice
from rslora_jax.plan.layout import Layout
from rslora_jax.plan.models import find_model
from rslora_jax.plan.plan import plan as compile_step
from rslora_jax.plan.report import Plan
from rslora_jax.plan.topologies import check_mesh
from rslora_jax.plan.topologies import topology as find_topology
from rslora_jax.plan.training import Run, Variant
from rslora_jax.terminal import progress, show

__all__ = ["plan"]


class _Asker(NamedTuple):
    """How the compiler is asked, whatever it is asked."""

    topology: str
    num_slices: int
    time_limit: float
    cache: bool

    def __call__(self, variant: Variant, run: Run, report: Any) -> Plan:
        return compile_step(
            variant.step,
            variant.args,
            topology=self.topology,
            mesh_shape=run.mesh,
            num_slices=self.num_slices,
            **variant.told,
            time_limit=self.time_limit,
            cache=self.cache,
            report=report,
        )


def plan(  # noqa: PLR0913, PLR0917 - every flag is a choice of the run that is planned
    model: str,
    mesh: str,
    topology: str = "v5e:16x16",
    rank: tuple[int, ...] = (64,),
    batch: int = 256,
    length: int = 2048,
    frozen: bool = True,
    full: bool = False,
    remat: Literal["none", "dots", "full"] = "full",
    num_slices: int = 1,
    advise: bool = False,
    json: Path | None = None,
    time_limit: float = 1800.0,
    cache: bool = True,
) -> None:
    """Ask the TPU compiler whether a fine-tune fits on a slice, and what a step costs there.

    Compiles the real training step for the topology, with no TPU at hand, and prints, for one
    chip: the memory, whether it fits and by how much, FLOPs, the roofline, and what the chips
    send to one another; for LoRA beside the frozen base, below which no adapter can go. A
    large model takes minutes; the same plan again takes seconds.

    Args:
      model: A name such as llama-3.1-8b, llama-3.1-70b, llama-3.1-405b, llama-3.2-1b or
        smollm2-135m, or the config.json (or its folder) of a model of that family.
      mesh: The size of each mesh axis, such as fsdp=32,tensor=8. The axes are data, fsdp,
        sequence and tensor; the batch is split over the first two.
      topology: The slice, such as v5e:16x16, v5p:8x8x8, v6e:8x8 or tpu7x:2x2x2.
      rank: The ranks of the adapters to plan, one or several.
      batch: Sequences in a step, on all chips together.
      length: Tokens in a sequence.
      frozen: Plan the loss and the gradient of the activations alone too.
      full: Plan full fine-tuning with Adam too.
      remat: What a layer keeps for the backward pass: none recomputes nothing, dots keeps the
        products with weights, full keeps the layer's input.
      num_slices: How many such slices the data center network joins.
      advise: Try other meshes and remat policies at the first rank, and rank them; for what does
        not fit, look for the nearest change that does. Several more compilations.
      json: Write all figures here.
      time_limit: Seconds that one compilation may take.
      cache: Take the compiler's earlier answers for the same plan.
    """
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for TPUs here, which takes a while
    run = Run(find_model(model), _mesh(mesh), batch, length, Layout(remat))
    check_mesh(run.mesh, find_topology(topology, num_slices))
    makers = _makers(rank, frozen=frozen, full=full)
    if json is not None:
        check_target(json)  # now: the first compilation may take minutes
    ask = _Asker(topology, num_slices, time_limit, cache)
    plans = _asked(ask, run, makers)
    print_plans(run, plans)
    tried = _advised(ask, run, makers, plans) if advise else {}
    if json is not None:
        write_plans(json, run, plans, tried)


def _mesh(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if not axis or axis in found or not size.isdecimal() or int(size) < 1:
            raise AdapterError(
                f"--mesh is a size for each axis, such as fsdp=32,tensor=8, found {text!r}."
            )
        found[axis] = int(size)
    return found


_Makers = dict[str, Callable[[Run], Variant]]


def _makers(ranks: Sequence[int], *, frozen: bool, full: bool) -> _Makers:
    """What makes each variant's step, by the name that is shown while it compiles."""
    found: _Makers = {"frozen base": training.frozen} if frozen else {}
    for rank in dict.fromkeys(ranks):
        found[f"LoRA r={rank}"] = lambda run, rank=rank: training.adapters(run, rank)
    if full:
        found["full"] = training.full
    if not found:
        raise AdapterError("There is nothing to plan: name a --rank, --frozen or --full.")
    return found


def _asked(ask: _Asker, run: Run, makers: _Makers) -> list[Plan]:
    variants = [make(run) for make in makers.values()]  # what cannot be planned is refused first
    with progress("plan") as report:
        return [
            ask(variant, run, _saying(report, k, len(variants), variant.name))
            for k, variant in enumerate(variants)
        ]


def _saying(report: Any, done: int, total: int, what: str) -> Callable[[str, float], None]:
    return lambda doing, seconds: report(done, total, f"{what}: {doing}, {seconds:.0f} s")


def _advised(
    ask: _Asker, run: Run, makers: _Makers, plans: Sequence[Plan]
) -> dict[str, tuple[Advice, ...]]:
    """Ranks runs near the one asked for by the first adapter; mends what does not fit."""
    first = next((name for name in makers if name.startswith("LoRA")), next(iter(makers)))
    tried: dict[str, tuple[Advice, ...]] = {}
    for (name, make), asked in zip(makers.items(), plans, strict=True):
        # Where the frozen base does not fit no adapter does, and its mending mends both.
        if name != first and (asked.fits or make is training.frozen):
            continue
        with progress("advise") as report:
            planner = _planner(ask, make, (run, asked), report)
            if name == first:
                tried[name] = advice.advise(run, planner)
            else:
                found = advice.nearest_fit(run, asked, planner)
                tried[name] = (found,) if found else ()
        if name == first:
            note = f"The compiler was asked {len(tried[name]) - 1} times more."
            show(advice.ranking(tried[name]), f"{name}: what was tried, the best first", note)
        if not asked.fits:
            print(f"{name}: {change(next((one for one in tried[name] if one.fits), None))}\n")
    return tried


def _planner(
    ask: _Asker, make: Callable[[Run], Variant], known: tuple[Run, Plan], report: Any
) -> Callable[[str, Run], Plan]:
    turns = itertools.count(1)

    def planner(what: str, run: Run) -> Plan:
        if run == known[0]:
            return known[1]
        variant = make(run)
        told = f"{variant.name}, compilation {next(turns)}, {what}"
        return ask(variant, run, _saying(report, 0, 1, told))

    return planner
