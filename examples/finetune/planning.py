"""Planning: does this very run fit on a TPU slice? The real TPU compiler answers, without a TPU."""

import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

import rslora_jax as rl
from finetune.batches import Batch
from finetune.model import Adapted, adapt, dtype_of, rows_spec, shardings
from finetune.settings import ConfigError, Settings
from finetune.step import optimizer_of, step_of
from llama import Llama, LlamaConfig, RopeScaling
from pretrained import open_model

STEPS = 1000  # of the schedule, which changes no cost


class Shape(NamedTuple):
    """A model without its numbers: sizes, and its variables as structs."""

    name: str
    sizes: LlamaConfig
    structs: Any


class Traced(NamedTuple):
    """A training step with abstract arguments that lie on a mesh."""

    step: Any
    args: tuple[Any, ...]
    adapted: Adapted


def plan(settings: Settings, axes: dict[str, int]) -> rl.plan.Plan:
    """Compiles the run's own training step for ``settings.plan``, and prints the answer.

    Args:
      settings: of the run, `on_mesh` of these axes.
      axes: of `mesh_axes`.

    Raises:
      AdapterError: if mesh, batch and model do not go together.
    """
    shape = find_shape(settings)
    traced = trace(settings, shape, rl.plan.abstract_mesh(axes))
    found = rl.plan.plan(
        traced.step,
        traced.args,
        topology=settings.plan,
        mesh_shape=axes,
        name=f"{shape.name}, rank {settings.rank}",
        names=("base", "lora", "optimizer", "batch"),
        trained="lora",
        report=_report(),
    )
    print(written(settings, found))
    return found


def written(settings: Settings, found: rl.plan.Plan) -> str:
    """A plan as text: its tables, and whether it fits."""
    gib = 2**30
    need, have, spare = (f"{size / gib:.2f}" for size in (found.need, found.have, abs(found.spare)))
    verdict = (
        f"it fits: each device needs {need} of {have} GiB and has {spare} left"
        if found.fits
        else f"it does not fit: each device needs {need} GiB and has {have}, {spare} too few. "
        f"{_advice(settings)}"
    )
    rows = settings.batch * settings.accumulation
    mesh = ", ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    title = f"{found.name}: {rows} x {settings.length} tokens a step on {found.topology} as {mesh}"
    tables = (f"{name}, for each device\n{table}" for name, table in found.tables().items())
    return "\n\n".join((title, *tables, verdict))


def _advice(settings: Settings) -> str:
    """What takes less memory than these settings do."""
    left = {
        "remat: full": settings.remat != "full",
        "bfloat16: true": not settings.bfloat16,
        "fewer quant_bits": settings.quant_bits > 4,
    }
    ways = [way for way, is_left in left.items() if is_left]
    return f"Try {', '.join([*ways, 'a larger tensor axis'])}, or a smaller batch or length."


def find_shape(settings: Settings) -> Shape:
    """The sizes of the model, from its files, or by its name where there are none.

    Raises:
      ModelError: if it is neither there nor known.
    """
    if not Path(settings.model).expanduser().exists():
        try:
            found = rl.plan.find_model(settings.model)
        except rl.AdapterError:
            pass  # what `open_model` says is for the same mistake, and names more
        else:
            return _shape_of(found.name, sizes_of(found), settings)
    source = open_model(settings.model, dtype_of(settings))
    return Shape(settings.model, source.config, source.structs)


def sizes_of(model: rl.plan.Model) -> LlamaConfig:
    """The sizes of a known model, as `llama.Llama` takes them."""
    scaling = model.scaling and RopeScaling(
        model.scaling.factor, model.scaling.low, model.scaling.high, model.scaling.original
    )
    return LlamaConfig(
        vocab_size=model.vocab,
        d_model=model.width,
        d_ff=model.ff,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        rope_theta=model.theta,
        norm_eps=model.eps,
        tied=model.tied,
        rope_scaling=scaling,
    )


def mesh_axes(settings: Settings) -> dict[str, int]:
    """The sizes of the mesh on the slice to be planned for; fsdp None is what is left.

    Raises:
      ConfigError: if the axes do not make up the devices.
    """
    devices = rl.plan.topology(settings.plan).devices
    fsdp = settings.fsdp or max(devices // (settings.data * settings.tensor), 1)
    axes = {"data": settings.data, "fsdp": fsdp, "tensor": settings.tensor}
    if math.prod(axes.values()) != devices:
        raise ConfigError(
            f"{settings.plan} has {devices} devices, and data, fsdp and tensor make up "
            f"{' * '.join(map(str, axes.values()))}; change them, such as --tensor 8"
        )
    return axes


def trace(settings: Settings, shape: Shape, mesh: Any) -> Traced:
    """The training step over shapes, each with its place on the mesh."""
    use = jax.sharding.use_abstract_mesh if isinstance(mesh, AbstractMesh) else jax.set_mesh
    with use(mesh):
        adapted = adapt(settings, shape.sizes, shape.structs)
    places = shardings(mesh, adapted)
    base, lora = jax.tree.map(_placed, adapted.params, places)
    tx = optimizer_of(settings, STEPS, adapted.sites)
    state = jax.tree.map(
        _placed,
        jax.eval_shape(tx.init, lora),
        rl.sharding.optimizer_shardings(tx, lora, places.lora),
    )
    batch = batch_structs(settings, mesh)
    return Traced(step_of(adapted.apply, tx), (base, lora, state, batch), adapted)


def batch_structs(settings: Settings, mesh: Any) -> Batch:
    """A batch that asks for every token, the most that there can be."""
    place = NamedSharding(mesh, rows_spec(settings))
    outer = (settings.accumulation,) if settings.accumulation > 1 else ()
    shape = (*outer, settings.batch, settings.length)
    whole = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    return Batch(*[whole] * 5, weights)


def _shape_of(name: str, sizes: LlamaConfig, settings: Settings) -> Shape:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    drawn = jax.eval_shape(Llama(sizes).init, jax.random.key(0), tokens)
    dtype = dtype_of(settings)
    return Shape(name, sizes, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), drawn))


def _placed(struct: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place)


def _report() -> Any:
    """Says now and then what the compiler does; it can take minutes."""
    last = time.monotonic()

    def report(doing: str, seconds: float) -> None:
        nonlocal last
        if time.monotonic() - last > 15:
            last = time.monotonic()
            print(f"{doing}, {seconds:.0f} s", file=sys.stderr, flush=True)

    return report
