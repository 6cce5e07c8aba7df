"""What adapters add to the communication of a training step, by sharding policy.

The scanned Llama of `examples/llama.py` on eight devices, once frozen (the loss, and gradients of
one number for each layer, so that the whole backward pass runs and no weight has a gradient) and
once with adapters on every linear weight, under each policy for the factors:

    PYTHONPATH=. python tests/benchmarks/collectives.py [--compiler tpu] [--mesh fsdp=4,tensor=2]

Collectives are read off the compiled programs, those in loops as often as they run, per device.
The TPU compiler needs no TPU (`rslora_jax.plan`); it compiles in bfloat16, the CPU's in float32,
to which it would turn the collectives anyway.

Every array that is sent is told by its number of elements: of all sizes of the model, batch and
mesh, 7 divides the rank alone and 13 the length alone. What a policy adds is the arrays that it
sends more often than the frozen step; the arithmetic below the totals is all of them.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import rslora_jax as rl
from rslora_jax import sharding
from rslora_jax.paths import flatten
from rslora_jax.plan.collectives import Collective, collectives, table
from rslora_jax.sites import Sites
from rslora_jax.tables import Table

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from llama import SPECS, Llama, LlamaConfig

FROZEN = "frozen base"
RANK, LENGTH = 7, 13
"""The primes that divide the rank alone, and the length alone."""
POLICIES: dict[str, Any] = {
    "inherit": "inherit",
    "without fsdp": sharding.Policy(without=("fsdp",)),
    "replicated": "replicated",
    "rank over fsdp": sharding.Policy(without=("fsdp",), rank="fsdp"),
}
MESHES = (
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 8, "tensor": 1},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
)
TOPOLOGY = "v5e:2x4"
SMALL = LlamaConfig(2560, 1024, 2816, 6, 16, 8, 96)
LLAMA_8B = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, a batch and a mesh with axes `fsdp` and `tensor`."""

    mesh: Mapping[str, int]
    rank: int = 224
    batch: int = 32
    length: int = 104
    dtype: str = "float32"
    remat: bool = True
    model: LlamaConfig = SMALL

    @property
    def batch_axes(self) -> tuple[str, ...]:
        return tuple(name for name in ("data", "fsdp") if name in self.mesh)

    @property
    def tokens(self) -> int:
        """The tokens of one device."""
        spread = math.prod(self.mesh[name] for name in self.batch_axes)
        return self.batch * self.length // spread

    def check(self) -> None:
        """Refuses sizes by which the arrays could not be told."""
        c = self.model
        sizes = (c.vocab_size, c.d_model, c.d_ff, c.layers, c.heads, c.kv_heads, c.head_dim)
        others = (*sizes, self.batch, *self.mesh.values())
        apart = self.rank % RANK == 0 and self.length % LENGTH == 0
        if not apart or any(size % RANK == 0 or size % LENGTH == 0 for size in others):
            raise ValueError(f"{RANK} must divide the rank, {LENGTH} the length, none {others}.")


class Way(NamedTuple):
    """A step to compile: the function and its abstract arguments, with their shardings."""

    step: Callable[..., Any]
    args: tuple[Any, ...]


def ways(setting: Setting, mesh: Mesh | AbstractMesh, policies: Iterable[str]) -> dict[str, Way]:
    """The frozen step and the adapted one under each policy."""
    model, base, tokens = _model(setting, mesh)
    params, apply, sites = _adapted(setting, mesh, model, base, tokens)
    found = {}
    for name in policies:
        places = sharding.shardings(mesh, params, sites, SPECS, POLICIES[name])
        args = jax.tree.map(_struct, params, places)
        found[FROZEN] = Way(functools.partial(frozen_step, model), (args.base, tokens))
        step = functools.partial(adapted_step, apply, jax.tree.map(lambda p: p.spec, places.lora))
        found[name] = Way(step, (args, tokens))
    return found


def frozen_step(model: Llama, base: Any, tokens: Any) -> Any:
    """The loss, and its gradient with respect to one number for each layer."""

    def nudged(nudge: Any) -> Any:
        layers = base["params"]["layers"]
        norms = layers["input_layernorm"]["scale"]
        scaled = {"scale": norms * (1 + nudge[:, None]).astype(norms.dtype)}
        tree = {**base["params"], "layers": {**layers, "input_layernorm": scaled}}
        return _loss(model.apply, {"params": tree}, tokens)

    return jax.value_and_grad(nudged)(jnp.zeros(model.config.layers))


def adapted_step(apply: Callable[..., Any], specs: Any, params: Any, tokens: Any) -> Any:
    """The loss and the gradients of the factors, which lie as the factors do."""
    loss, grads = rl.value_and_grad(functools.partial(_loss, apply))(params, tokens)
    return loss, jax.lax.with_sharding_constraint(grads, specs)


def _loss(apply: Callable[..., Any], params: Any, tokens: Any) -> Any:
    logits = apply(params, tokens).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.roll(tokens, -1, 1)[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def _model(setting: Setting, mesh: Mesh | AbstractMesh) -> tuple[Llama, Any, Any]:
    spread = PartitionSpec(setting.batch_axes, None, None)
    model = Llama(setting.model, jnp.dtype(setting.dtype), setting.remat, spread)
    where = NamedSharding(mesh, PartitionSpec(setting.batch_axes))
    shape = (setting.batch, setting.length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
    base = jax.eval_shape(Llama(setting.model).init, jax.random.key(0), tokens)
    base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, setting.dtype), base)
    return model, base, tokens


def _adapted(
    setting: Setting, mesh: Mesh | AbstractMesh, model: Llama, base: Any, tokens: Any
) -> Any:
    config = rl.LoraConfig(rank=setting.rank, alpha=16.0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return rl.adapt(model.apply, base, tokens, config=config, key=jax.random.key(1))


def _struct(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


# Compiling.


def by_cpu(setting: Setting, policies: Iterable[str] = POLICIES) -> dict[str, str]:
    """The programs of XLA's CPU compiler, by way."""
    types = (AxisType.Auto,) * len(setting.mesh)
    mesh = jax.make_mesh(tuple(setting.mesh.values()), tuple(setting.mesh), axis_types=types)
    with jax.set_mesh(mesh):
        return {
            name: jax.jit(way.step).lower(*way.args).compile().as_text()
            for name, way in ways(setting, mesh, policies).items()
        }


def by_tpu(setting: Setting, policies: Iterable[str] = POLICIES) -> dict[str, str]:
    """The programs of the TPU compiler."""
    from rslora_jax.plan.plan import plan
    from rslora_jax.plan.topologies import abstract_mesh

    mesh = abstract_mesh(setting.mesh)
    return {
        name: plan(way.step, way.args, topology=TOPOLOGY, mesh_shape=setting.mesh).hlo
        for name, way in ways(setting, mesh, policies).items()
    }


# What is sent.


class Sent(NamedTuple):
    """An array that a collective moves, on one device."""

    kind: str
    along: str
    dtype: str
    elements: int

    @property
    def itemsize(self) -> int:
        return {"bf16": 2, "pred": 1}.get(self.dtype, 4)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * self.itemsize

    @property
    def of_rank(self) -> bool:
        """Whether the rank is among its sizes."""
        return self.elements % RANK == 0

    @property
    def of_tokens(self) -> bool:
        """Whether the tokens are among its sizes."""
        return self.elements % LENGTH == 0


def sent(found: Iterable[Collective], mesh: Mapping[str, int]) -> Counter[Sent]:
    """Every array that is moved, and how often."""
    axes = _groups(mesh)
    counted: Counter[Sent] = Counter()
    for each in found:
        for shape in each.shapes:
            along = axes.get(each.group, f"{each.group_size} devices")
            elements = math.prod(shape.dims)
            counted[Sent(each.kind, along, shape.dtype, elements)] += each.times
    return counted


def added(ours: Counter[Sent], frozen: Counter[Sent]) -> dict[Sent, int]:
    """What is moved more often, or (negative) less often, than in the frozen step."""
    counts = {key: ours[key] - frozen[key] for key in (*ours, *frozen)}
    return {key: count for key, count in counts.items() if count}


def _groups(mesh: Mapping[str, int]) -> dict[tuple[int, ...], str]:
    """The first group along each choice of mesh axes."""
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    found = {}
    for count in range(1, len(mesh) + 1):
        for chosen in itertools.combinations(mesh, count):
            taken = tuple(slice(None) if name in chosen else 0 for name in mesh)
            names = [name for name in chosen if mesh[name] > 1]
            found.setdefault(tuple(ids[taken].ravel().tolist()), "+".join(names))
    return found


# What it is.


class Known(NamedTuple):
    """Names by the number of elements, whole or as a shard, of one layer and of all."""

    weights: dict[int, str]
    factors: dict[int, str]


def known(setting: Setting) -> Known:
    """The weights and the factors of the model."""
    setting.check()
    mesh = _abstract(setting.mesh)
    model, base, tokens = _model(setting, mesh)
    sites: Sites = _adapted(setting, mesh, model, base, tokens).sites
    found = Known({}, {})
    for path, leaf in zip(flatten(base).paths, flatten(base).leaves, strict=True):
        if path.endswith(("kernel", "embedding")):
            _shards(setting, found.weights, leaf.shape, _short(path))
    for site in sites:
        for letter, shape in zip("ab", site.factor_shapes, strict=True):
            _shards(setting, found.factors, shape, f"{letter} of {_short(site.path)}")
    return found


def _abstract(mesh: Mapping[str, int]) -> AbstractMesh:
    types = (AxisType.Auto,) * len(mesh)
    return AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=types)


def _short(path: str) -> str:
    return path.removesuffix("/kernel").split("/")[-1].removesuffix("_proj")


def _shards(setting: Setting, into: dict[int, str], shape: Sequence[int], name: str) -> None:
    sizes = setting.mesh.values()
    for dims in (shape, shape[1:] if len(shape) > 2 else shape):
        for count in range(len(sizes) + 1):
            for chosen in itertools.combinations(sizes, count):
                key = math.prod(dims) // math.prod(chosen)
                names = [*into.get(key, "").split(", "), name]
                into[key] = ", ".join(dict.fromkeys(filter(None, names)))


def explain(more: Mapping[Sent, int], things: Known) -> Table:
    """Each array that a policy adds, what it is, and its bytes: count x elements x itemsize."""
    return Table.of(
        {
            "kind": key.kind,
            "along": key.along,
            "what": what(key, things),
            "count": count,
            "elements": key.elements,
            "dtype": key.dtype,
            "bytes": count * key.size,
        }
        for key, count in sorted(more.items(), key=lambda item: (item[1] < 0, item[0]))
    )


def what(key: Sent, things: Known) -> str:
    """What an array is, by its number of elements."""
    if key.of_tokens:
        return "tokens x rank" if key.of_rank else "tokens"
    named = things.factors if key.of_rank else things.weights
    return named.get(key.elements, "other")


def on_weights(more: Mapping[Sent, int], things: Known) -> list[Sent]:
    """The arrays of a base weight's size that are moved more often than in the frozen step."""
    return [
        key
        for key, count in more.items()
        if count > 0 and key.elements in things.weights and not key.of_tokens
    ]


def unexplained(more: Mapping[Sent, int], things: Known) -> list[Sent]:
    """What is moved more often and is no factor and no activation of the rank."""
    return [
        key
        for key, count in more.items()
        if count > 0 and not (key.of_rank and what(key, things) != "other")
    ]


# The report.


def totals(programs: Mapping[str, str]) -> Table:
    """Collectives by way and kind."""
    rows = []
    for name, text in programs.items():
        rows += [{"factors": name, **record} for record in table(collectives(text)).records()]
    return Table.of(rows)


def memory(mesh: Mapping[str, int], config: LlamaConfig, rank: int) -> Table:
    """Bytes of one device for float32 factors, their gradients and Adam's two moments."""
    setting = Setting(mesh, rank, batch=256, length=2048, model=config)
    abstract = _abstract(mesh)
    model, base, tokens = _model(setting, abstract)
    params, _, sites = _adapted(setting, abstract, model, base, tokens)
    rows = []
    for name, policy in POLICIES.items():
        places = sharding.shardings(abstract, params, sites, SPECS, policy)
        shards = jax.tree.map(lambda s, p: math.prod(p.shard_shape(s.shape)), params, places).lora
        elements = sum(jax.tree.leaves(shards))
        rows.append({"factors": name, "MiB": elements * 4 / 2**20, "x 4": elements * 16 / 2**20})
    return Table.of(rows)


def report(setting: Setting, programs: Mapping[str, str]) -> None:
    """Prints the totals and, for each policy, what it adds."""
    print(totals(programs), end="\n\n")
    things = known(setting)
    counted = {name: sent(collectives(text), setting.mesh) for name, text in programs.items()}
    frozen = counted.pop(FROZEN)
    for name, ours in counted.items():
        more = added(ours, frozen)
        bytes_more = sum(count * key.size for key, count in more.items())
        print(f"{name}: {bytes_more:+,} bytes")
        print(explain(more, things))
        print(f"added on arrays of a base weight's size: {on_weights(more, things) or 'nothing'}")
        rest = unexplained(more, things)
        print(f"neither factors nor activations of the rank: {rest or 'nothing'}", end="\n\n")


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--compiler", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--mesh", action="append", help="such as fsdp=4,tensor=2")
    parser.add_argument("--policy", action="append", choices=POLICIES)
    parser.add_argument("--rank", type=int, default=Setting.rank)
    parser.add_argument("--no-remat", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # where libtpu is installed, JAX looks for a TPU
    jax.config.update("jax_num_cpu_devices", 8)
    meshes = [_mesh(text) for text in options.mesh or ()] or MESHES
    programs = by_cpu if options.compiler == "cpu" else by_tpu
    for mesh in meshes:
        dtype = "float32" if options.compiler == "cpu" else "bfloat16"
        setting = Setting(mesh, options.rank, dtype=dtype, remat=not options.no_remat)
        print(f"jax {jax.__version__}, {options.compiler}, {setting}", end="\n\n")
        report(setting, programs(setting, options.policy or POLICIES))
    print("Llama 3.1 8B, rank 64, fsdp 32 x tensor 8, per device: float32 factors;")
    print("with their gradients and Adam's moments (x 4)")
    print(memory({"fsdp": 32, "tensor": 8}, LLAMA_8B, 64))


def _mesh(text: str) -> dict[str, int]:
    return {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}


if __name__ == "__main__":
    main()
