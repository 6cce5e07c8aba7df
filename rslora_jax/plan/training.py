"""Training: the steps that are planned for a model, with their arguments laid out on a mesh."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rslora_jax import sharding
from rslora_jax.adapt import adapt, value_and_grad
from rslora_jax.config import LoraConfig
from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError, flatten, nearest, unflatten
from rslora_jax.plan import llama
from rslora_jax.plan.layout import BATCH, PLAIN, SEQUENCE, TENSOR, Layout
from rslora_jax.plan.sizes import Model
from rslora_jax.plan.topologies import abstract_mesh
from rslora_jax.sharding.policies import PolicyLike

__all__ = ["AXES", "RULES", "Run", "Variant", "adapters", "frozen", "full"]

AXES = (*BATCH, SEQUENCE, TENSOR)
"""The mesh axes that a run may have."""

RULES = (
    (r".*/(q|k|v|gate|up)_proj/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r".*/(q|k|v|gate|up)_proj/bias", PartitionSpec(None, "tensor")),
    (r".*/(o|down)_proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"embed_tokens/embedding", PartitionSpec("tensor", "fsdp")),
    (r"lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (r".*", PartitionSpec()),
)
"""Where the base lies: the first pattern that matches a path gives its spec."""

ADAM = optax.adam(1e-4)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained where.

    Attributes:
      model: the sizes of the model.
      mesh: the size of each mesh axis, of `AXES`, in order.
      batch: sequences in a step, on all chips together.
      length: tokens in a sequence.
      layout: how the model is computed.
    """

    model: Model
    mesh: Mapping[str, int]
    batch: int
    length: int
    layout: Layout = PLAIN

    def __post_init__(self) -> None:
        """Refuses a mesh, a batch and a length that do not go together."""
        for name in self.mesh:
            if name not in AXES:
                raise AdapterError(
                    f"The mesh has an axis {name!r}, and a planned Llama is split over "
                    f"{', '.join(AXES)}. The nearest is {nearest(name, AXES, 1)}."
                )
        _check_divides("The batch", self.batch, self.mesh, BATCH)
        _check_divides("The length", self.length, self.mesh, (SEQUENCE,))

    def placed(self, array: Any, *entries: Any) -> Any:
        """A struct of `array` with a place on the mesh; axes that the mesh lacks are left off."""
        place = NamedSharding(abstract_mesh(self.mesh), _within(self.mesh, PartitionSpec(*entries)))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A step, and what `plan` is to be told of it.

    Attributes:
      name: what it is called in tables.
      step: the training step.
      args: its abstract arguments, each with its place.
      names: a name for each argument.
      donate: the places of the arguments that it overwrites.
      trained: the name of the argument that is trained; None if none is.
    """

    name: str
    step: Callable[..., Any]
    args: tuple[Any, ...]
    names: tuple[str, ...]
    donate: tuple[int, ...] = ()
    trained: str | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What `plan` takes by keyword: ``plan(step, args, **told, topology=..., ...)``."""
        return {name: getattr(self, name) for name in ("name", "names", "donate", "trained")}


def frozen(run: Run) -> Variant:
    """The loss and the gradient of the activations alone: what no adapter can go below.

    The gradient is that of one vector added to every embedding, so it passes through all layers.

    Example:
      >>> from rslora_jax.plan.models import find_model
      >>> frozen(Run(find_model("llama-3.2-1b"), {"fsdp": 4}, 8, 1024)).names
      ('base', 'dx', 'batch')
    """

    def step(base: Any, shift: Any, batch: Any) -> Any:
        def loss(shift: Any) -> Any:
            return llama.loss(run.model, base, batch, run.layout, shift)

        return jax.value_and_grad(loss)(shift)

    shift = run.placed(jax.ShapeDtypeStruct((run.model.width,), jnp.float32))
    return Variant("frozen base", step, (_base(run), shift, _batch(run)), ("base", "dx", "batch"))


def adapters(
    run: Run, rank: int, alpha: float = 16.0, policy: PolicyLike = sharding.DEFAULT
) -> Variant:
    """A step of Adam on rank-stabilized adapters of all linear layers, float32 on bfloat16.

    Args:
      run: what is trained where.
      rank: the rank of every adapter.
      alpha: the numerator of the scale; it changes no cost.
      policy: how the factors lie, see `sharding.specs`.

    Returns:
      ``step(base, lora, optimizer, batch) -> (lora, optimizer, loss)``.

    Raises:
      AdapterError: for a rank that is none, or that the mesh does not divide.

    Example:
      >>> from rslora_jax.plan.models import find_model
      >>> made = adapters(Run(find_model("llama-3.2-1b"), {"fsdp": 4}, 8, 1024), rank=16)
      >>> made.args[1]["layers"]["mlp"]["up_proj"]["kernel"]["a"].sharding.shard_shape(
      ...     (16, 2048, 16)
      ... )
      (16, 512, 16)
    """
    base, batch = _base(run), _batch(run)

    def loss(base: Any, batch: Any) -> Any:
        return llama.loss(run.model, base, batch, run.layout)

    with jax.sharding.use_abstract_mesh(abstract_mesh(run.mesh)):
        config = LoraConfig(rank=rank, alpha=alpha)
        params, apply, sites = adapt(loss, base, batch, config=config, key=jax.random.key(0))

    def step(base: Any, lora: Any, optimizer: Any, batch: Any) -> Any:
        value, grads = value_and_grad(apply)(LoraParams(base, lora), batch)
        return (*_updated(lora, optimizer, grads), value)

    specs = sharding.specs(base, sites, policy, mesh=abstract_mesh(run.mesh))
    lora = jax.tree.map(lambda array, spec: run.placed(array, *spec), params.lora, specs)
    args = (base, lora, _optimizer(run, lora), batch)
    names = ("base", "lora", "optimizer", "batch")
    return Variant(f"LoRA r={rank}", step, args, names, (1, 2), "lora")


def full(run: Run) -> Variant:
    """A step of Adam on every weight, held in float32 and cast to bfloat16 where it is used.

    Example:
      >>> from rslora_jax.plan.models import find_model
      >>> full(Run(find_model("llama-3.2-1b"), {"fsdp": 4}, 8, 1024)).trained
      'base'
    """

    def step(base: Any, optimizer: Any, batch: Any) -> Any:
        def loss(base: Any) -> Any:
            return llama.loss(run.model, base, batch, run.layout)

        value, grads = jax.value_and_grad(loss)(base)
        return (*_updated(base, optimizer, grads), value)

    base = _base(run, jnp.float32)
    args = (base, _optimizer(run, base), _batch(run))
    return Variant("full", step, args, ("base", "optimizer", "batch"), (0, 1), "base")


def _base(run: Run, dtype: Any = jnp.bfloat16) -> Any:
    structs = llama.structs(run.model, dtype)
    flat = flatten(structs)
    specs = sharding.base_specs(RULES, structs)
    leaves = zip(flat.paths, flat.leaves, strict=True)
    return unflatten(flat, [run.placed(leaf, *specs[path]) for path, leaf in leaves])


def _batch(run: Run) -> tuple[Any, Any]:
    """Tokens and labels, [batch, length]."""
    tokens = jax.ShapeDtypeStruct((run.batch, run.length), jnp.int32)
    return (run.placed(tokens, BATCH, SEQUENCE),) * 2


def _optimizer(run: Run, trained: Any) -> Any:
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)
    found = sharding.optimizer_shardings(ADAM, trained, places)
    state = jax.eval_shape(ADAM.init, trained)
    return jax.tree.map(lambda leaf, place: run.placed(leaf, *place.spec), state, found)


def _updated(trained: Any, optimizer: Any, grads: Any) -> tuple[Any, Any]:
    updates, optimizer = ADAM.update(grads, optimizer, trained)
    return optax.apply_updates(trained, updates), optimizer


def _within(mesh: Mapping[str, int], spec: PartitionSpec) -> PartitionSpec:
    named = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return PartitionSpec(*(tuple(n for n in names if n in mesh) or None for names in named))


def _check_divides(what: str, size: int, mesh: Mapping[str, int], axes: tuple[str, ...]) -> None:
    if size < 1:
        raise AdapterError(f"{what} of a step is {size}. Use at least 1.")
    used = {name: mesh[name] for name in axes if name in mesh}
    parts = math.prod(used.values())
    if size % parts:
        written = ",".join(f"{name}={length}" for name, length in used.items())
        raise AdapterError(
            f"{what} is {size}, which the mesh axes {written} do not divide into {parts} parts. "
            f"Use a multiple of {parts}, or another mesh."
        )
