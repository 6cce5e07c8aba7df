"""Adapted models on meshes of both axis types equal the same models on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rslora_jax as rl
from llama import SPECS, Llama, LlamaConfig
from rslora_jax.axes import delta_subscripts
from rslora_jax.paths import AdapterError
from rslora_jax.sharding import Policy, optimizer_shardings, shard, shardings
from tests.quick import compiled

P = PartitionSpec
BATCH = P(("data", "fsdp"))
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
MESHES = {
    "1": {"data": 1},
    "8": {"fsdp": 8},
    "4x2": {"fsdp": 4, "tensor": 2},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
POLICIES = {
    "inherited": "inherit",
    "rank_split": Policy(without=("tensor",), rank="tensor"),
    "replicated": "replicated",
}
every_kind = pytest.mark.parametrize("kind", KINDS)

TINY = LlamaConfig(
    vocab_size=32, d_model=16, d_ff=32, layers=2, heads=4, kv_heads=2, head_dim=8, tied=True
)
TX = optax.sgd(0.1, momentum=0.9)


def mesh_of(name, kind):
    sizes = MESHES[name]
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    types = (KINDS[kind],) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def on(mesh, spec):
    """A spec without the axes that the mesh does not have."""
    entries = [(e,) if isinstance(e, str) else e or () for e in spec]
    return P(*(tuple(name for name in names if name in mesh.axis_names) for names in entries))


def numbers(structs, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: np.float32(rng.normal(0, 0.3, s.shape)), structs)


def assert_close(found, expected, tolerance=1e-5):
    """Each leaf agrees to `tolerance` of its largest entry."""
    pairs = zip(*map(jax.tree.leaves, jax.device_get((found, expected))), strict=True)
    for one, other in pairs:
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def assert_placed(tree, places):
    for leaf, place in zip(*map(jax.tree.leaves, (tree, places)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


# One training step of the example's scanned Llama.


TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (8, 6), np.int32)


@functools.cache
def adapted():
    """The tiny Llama's parameters with nonzero factors everywhere, and the sites."""
    model = Llama(TINY, remat=True)
    structs = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    config = rl.LoraConfig(rank=2, alpha=3.0, targets=".*(kernel|embedding)")
    params, _, sites = rl.adapt(model.apply, structs, TOKENS, config=config, key=jax.random.key(0))
    return rl.LoraParams(*map(numbers, params, (1, 2))), sites


def rules_on(mesh):
    return [(pattern, on(mesh, spec)) for pattern, spec in SPECS]


def step_of(model):
    """One step: ``(base, (lora, opt_state), tokens) -> ((lora, opt_state), loss, grads)``."""
    apply = rl.attach(model.apply, adapted()[1])

    def loss_fn(params, tokens):
        return jnp.square(apply(params, tokens) - 1.0).mean()

    def step(base, trained, tokens):
        lora, opt_state = trained
        loss, grads = rl.value_and_grad(loss_fn)(rl.LoraParams(base, lora), tokens)
        updates, opt_state = TX.update(grads, opt_state, lora)
        return (optax.apply_updates(lora, updates), opt_state), loss, grads

    return step


@functools.cache
def single_step():
    """The step on one device, without any mesh."""
    (base, lora), _ = adapted()
    return compiled(step_of(Llama(TINY, remat=True)))(base, (lora, TX.init(lora)), TOKENS)


@pytest.mark.parametrize("name", MESHES)
@every_kind
def test_a_training_step_on_a_mesh_equals_the_step_on_one_device(name, kind):
    params, sites = adapted()
    mesh = mesh_of(name, kind)
    rules = rules_on(mesh)
    batch = on(mesh, BATCH)
    with jax.set_mesh(mesh):
        places = shardings(None, params, sites, rules)
        trained_places = (places.lora, optimizer_shardings(TX, params.lora, places.lora))
        base, lora = shard(params, mesh, sites, rules)
        trained = (lora, jax.device_put(TX.init(params.lora), trained_places[1]))
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, batch))
        # On Explicit axes the types alone must bring each gradient to where its factor lies.
        grad_places = places.lora if kind == "auto" else None
        step = jax.jit(
            step_of(Llama(TINY, remat=True, activations=batch)),
            in_shardings=(places.base, trained_places, tokens.sharding),
            out_shardings=(trained_places, None, grad_places),
            donate_argnums=1,
        )
        found = step(base, trained, tokens)
    assert_close(found, single_step())
    assert_placed(found[0], trained_places)
    assert_placed(found[2], places.lora)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trained))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))


@every_kind
@pytest.mark.parametrize("policy", ["inherited", "rank_split"])
def test_merged_weights_lie_where_the_base_does(kind, policy):
    params, sites = adapted()
    mesh = mesh_of("2x2x2", kind)
    with jax.set_mesh(mesh):
        placed = shard(params, mesh, sites, rules_on(mesh), POLICIES[policy])
        merged = rl.merge(placed, sites)
    assert_close(merged, rl.merge(params, sites))
    assert_placed(merged, jax.tree.map(lambda leaf: leaf.sharding, placed.base))


def test_abstract_weights_that_say_where_they_lie_are_adapted():
    mesh = mesh_of("2x2x2", "explicit")
    params, sites = adapted()
    with jax.set_mesh(mesh):
        places = shardings(None, params, sites, rules_on(mesh))
        struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        base = jax.tree.map(lambda x, s: struct(x.shape, sharding=s), params.base, places.base)
        tokens = jax.ShapeDtypeStruct((8, 6), jnp.int32, sharding=NamedSharding(mesh, BATCH))
        config = rl.LoraConfig(rank=2, alpha=3.0, targets=".*(kernel|embedding)")
        model = Llama(TINY, remat=True)
        found = rl.adapt(model.apply, base, tokens, config=config, key=jax.random.key(0))
        logits = jax.eval_shape(found.apply, found.params, tokens)
    assert [(s.path, s.axes) for s in found.sites] == [(s.path, s.axes) for s in sites]
    assert found.params.base == base
    assert logits.sharding.spec == P(("data", "fsdp"), None, "tensor")


# Single uses of a weight, with factors that lie as the weight does, or otherwise.


def x(*shape):
    return numbers(jax.ShapeDtypeStruct(shape, np.float32), 5)


def sums_over_a_sharded_axis(where):
    def apply_fn(p, x):
        numbers = (((2,), (0,)), ((), ()))
        return lax.dot_general(x, p["w"], numbers, out_sharding=where(*BATCH, None, None))

    return apply_fn, (16, 8), P("tensor", "fsdp"), (x(8, 4, 16), P(*BATCH, None, "tensor"))


def scatters_the_sum_over_another_axis(where):
    def apply_fn(p, x):
        numbers = (((2,), (0,)), ((), ()))
        return lax.dot_general(x, p["w"], numbers, out_sharding=where(*BATCH, "tensor", None))

    return apply_fn, (16, 8), P("tensor", "fsdp"), (x(8, 4, 16), P(*BATCH, None, "tensor"))


def multiplies_from_the_left_stack_by_stack(where):
    def apply_fn(p, x):
        return jnp.einsum("efd,ebd->efb", p["w"], x, out_sharding=where("tensor", None, "data"))

    return apply_fn, (4, 8, 16), P("tensor", None, "fsdp"), (x(4, 8, 16), P("tensor", "data"))


def looks_up_and_multiplies(where):
    def apply_fn(p, tokens):
        x = jnp.tanh(p["w"].at[tokens].get(out_sharding=where(*BATCH, None, None)))
        numbers = (((2,), (1,)), ((), ()))
        return lax.dot_general(x, p["w"], numbers, out_sharding=where(*BATCH, None, "tensor"))

    return apply_fn, (16, 8), P("tensor", "fsdp"), (TOKENS % 16, BATCH)


def gathers_before_the_product(where):
    def apply_fn(p, x):
        spec = P(None, "tensor")
        here = jax.sharding.reshard if where() is not None else lax.with_sharding_constraint
        return x @ here(p["w"], spec)

    return apply_fn, (16, 8), P("fsdp", "tensor"), (x(8, 16), BATCH)


def leaves_a_part_to_xla(where):
    def inner(w, x):
        return jnp.tanh(x @ (2 * w.T).T)

    def apply_fn(p, x):
        if where() is None:
            return inner(p["w"], x)
        return jax.sharding.auto_axes(inner, out_sharding=where(*BATCH, "tensor"))(p["w"], x)

    return apply_fn, (16, 8), P("fsdp", "tensor"), (x(8, 16), BATCH)


def splits_heads_in_a_scan_of_remat(where):
    def apply_fn(p, x):
        def layer(x, w):
            w = w.reshape(16, 4, 4)
            h = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, w))
            return x + jnp.einsum("bhk,dhk->bd", h, w, out_sharding=where(*BATCH, None)), None

        return lax.scan(jax.checkpoint(layer), x, p["w"])[0]

    return apply_fn, (3, 16, 16), P(None, "fsdp", "tensor"), (x(8, 16), BATCH)


def convolves(where):
    def apply_fn(p, x):
        names = ("NHWC", "HWIO", "NHWC")
        out = where(*BATCH, None, None, "tensor")
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=names, out_sharding=out
        )

    return apply_fn, (3, 3, 4, 8), P(None, None, None, "tensor"), (x(8, 4, 4, 4), BATCH)


def gathers_blocks_in_a_shard_map(where):
    def body(w, x):
        def layer(x, w):
            return jnp.tanh(x @ lax.all_gather(w, ("data", "fsdp"), axis=0, tiled=True)), None

        return lax.scan(jax.checkpoint(layer), x, w)[0]

    def apply_fn(p, x):
        specs = (P(None, ("data", "fsdp")), BATCH)
        return jax.shard_map(body, in_specs=specs, out_specs=BATCH)(p["w"], x)

    return apply_fn, (3, 16, 16), P(None, ("data", "fsdp")), (x(8, 16), BATCH)


def gathers_output_blocks_unchecked(where):
    def body(w, x):
        return x @ lax.all_gather(w.T, "fsdp", axis=0, tiled=True).T

    def apply_fn(p, x):
        specs = (P(None, "fsdp"), BATCH)
        return jax.shard_map(body, in_specs=specs, out_specs=BATCH, check_vma=False)(p["w"], x)

    return apply_fn, (16, 8), P(None, "fsdp"), (x(8, 16), BATCH)


def stacks_blocks_in_a_shard_map(where):
    def body(w, x):
        blocks = jnp.moveaxis(lax.all_gather(w, "fsdp"), 0, 1)
        return lax.psum(x @ blocks.reshape(w.shape[0], -1), "tensor")

    def apply_fn(p, x):
        specs = (P("tensor", "fsdp"), P(*BATCH, "tensor"))
        return jax.shard_map(body, in_specs=specs, out_specs=BATCH)(p["w"], x)

    return apply_fn, (16, 8), P("tensor", "fsdp"), (x(8, 16), P(*BATCH, "tensor"))


def stacks_one_expert_of_each_device_unchecked(where):
    def body(w, x):
        return jnp.einsum("bd,edf->bef", x, lax.all_gather(w[0], "fsdp"))

    def apply_fn(p, x):
        options = {"in_specs": (P("fsdp"), BATCH), "out_specs": BATCH, "check_vma": False}
        return jax.shard_map(body, **options)(p["w"], x)

    return apply_fn, (2, 16, 8), P("fsdp", None, None), (x(8, 16), BATCH)


def gathers_what_each_device_picked(where):
    def body(w, x):
        mine = lax.dynamic_slice_in_dim(w, 8 * lax.axis_index("fsdp"), 8)
        return x @ lax.all_gather(mine, "fsdp", tiled=True)

    def apply_fn(p, x):
        specs = (P(None, "tensor"), BATCH)
        return jax.shard_map(body, in_specs=specs, out_specs=P(*BATCH, "tensor"))(p["w"], x)

    return apply_fn, (16, 8), P(None, "tensor"), (x(8, 16), BATCH)


USES = [
    (sums_over_a_sharded_axis, "inherited"),
    (sums_over_a_sharded_axis, "rank_split"),
    (sums_over_a_sharded_axis, "replicated"),
    (scatters_the_sum_over_another_axis, "inherited"),
    (multiplies_from_the_left_stack_by_stack, "inherited"),
    (looks_up_and_multiplies, "inherited"),
    (looks_up_and_multiplies, "rank_split"),
    (gathers_before_the_product, "inherited"),
    (gathers_before_the_product, "rank_split"),
    (leaves_a_part_to_xla, "inherited"),
    (splits_heads_in_a_scan_of_remat, "inherited"),
    (convolves, "rank_split"),
    (gathers_blocks_in_a_shard_map, "inherited"),
    (gathers_blocks_in_a_shard_map, "replicated"),
    (gathers_output_blocks_unchecked, "inherited"),
    (stacks_blocks_in_a_shard_map, "rank_split"),
    (stacks_one_expert_of_each_device_unchecked, "inherited"),
    (gathers_what_each_device_picked, "inherited"),
]


def differentiated(function, lora, x):
    def loss(lora, x):
        y = function(lora, x)
        return jnp.sum(jnp.tanh(y)), y

    places = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
    (_, y), grads = jax.value_and_grad(loss, places, has_aux=True)(lora, x)
    return y, grads


def merged(w, factors, site, where):
    delta = jnp.einsum(delta_subscripts(site.axes), factors["a"], factors["b"], out_sharding=where)
    return w + site.scale * delta


@pytest.mark.parametrize(("use", "policy"), USES, ids=[f"{f.__name__}-{p}" for f, p in USES])
@every_kind
def test_a_weight_on_a_mesh_equals_the_merged_weight_there(use, policy, kind):
    mesh = mesh_of("2x2x2", kind)
    explicit = kind == "explicit"
    apply_fn, shape, spec, (x, x_spec) = use(lambda *entries: P(*entries) if explicit else None)
    with jax.set_mesh(mesh):
        base = {"w": jax.device_put(numbers(jax.ShapeDtypeStruct(shape, "f4"), 3), spec)}
        x = jax.device_put(x, x_spec)
        config = rl.LoraConfig(rank=2, alpha=3.0, targets="w")
        params, apply, sites = rl.adapt(apply_fn, base, x, config=config, key=jax.random.key(0))
        lora = numbers(params.lora, 4)
        base, lora = shard(rl.LoraParams(base, lora), mesh, sites, None, POLICIES[policy])
        [site] = sites

        def adapted_fn(lora, x):
            return apply(rl.LoraParams(base, lora), x)

        def merged_fn(lora, x):
            if not explicit:
                w = merged(base["w"], lora["w"], site, None)
                return apply_fn({"w": lax.with_sharding_constraint(w, spec)}, x)
            everywhere = NamedSharding(mesh, P())
            whole = {n: jax.sharding.reshard(f, everywhere) for n, f in lora["w"].items()}
            return apply_fn({"w": merged(base["w"], whole, site, spec)}, x)

        functions = (adapted_fn, merged_fn)
        found, expected = jax.jit(lambda *at: [differentiated(f, *at) for f in functions])(lora, x)
    assert_close(found, expected)
    if explicit:
        assert found[0].sharding == expected[0].sharding
        grads = found[1][0] if isinstance(found[1], tuple) else found[1]
        assert_placed(grads, jax.tree.map(lambda leaf: leaf.sharding, lora))


# Gathers that have no low-rank form are told, and never dropped.


def adapt_in_a_shard_map(body):
    mesh = mesh_of("2x2x2", "auto")
    options = {"mesh": mesh, "in_specs": (P("fsdp"), P()), "out_specs": P(None, "fsdp")}

    def apply_fn(p, x):
        return jax.shard_map(body, **options)(p["w"], x)

    base = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    config = rl.LoraConfig(rank=2, targets="w")
    return rl.adapt(apply_fn, base, x, config=config, key=jax.random.key(0))


def test_a_gather_within_groups_of_devices_is_refused_with_its_place():
    def body(w, x):
        groups = [[0], [1]]
        return x[:, :8] @ lax.all_gather(w, "fsdp", tiled=True, axis_index_groups=groups)

    with pytest.raises(AdapterError, match=r"`all_gather` at .*test_meshes.py.* within groups"):
        adapt_in_a_shard_map(body)


def columns_from(start):
    def body(w, x):
        part = lax.dynamic_slice_in_dim(w, start(x), 4, axis=1)
        return x @ lax.all_gather(part, "fsdp", tiled=True)

    return body


def test_rows_gathered_of_columns_that_each_device_picked_for_itself_are_refused():
    with pytest.raises(AdapterError, match="with an index that may differ between the devices"):
        adapt_in_a_shard_map(columns_from(lambda x: 4 * lax.axis_index("fsdp")))


def test_rows_gathered_of_columns_that_all_devices_picked_alike_are_adapted():
    [site] = adapt_in_a_shard_map(columns_from(lambda x: x[0, 0].astype(int))).sites
    assert site.axes == "io"


def test_a_product_left_unreduced_is_refused_with_its_place():
    mesh = mesh_of("2x2x2", "explicit")

    def apply_fn(p, x):
        numbers, partial = (((1,), (0,)), ((), ())), P("data", None, unreduced={"tensor"})
        y = lax.dot_general(x, p["w"], numbers, out_sharding=NamedSharding(mesh, partial))
        return jax.sharding.reshard(y, NamedSharding(mesh, P("data", None)))

    def struct(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    base, x = {"w": struct((16, 8), "tensor", None)}, struct((8, 16), "data", "tensor")
    config = rl.LoraConfig(rank=2, targets="w")
    with pytest.raises(AdapterError, match="left unreduced over a mesh axis"):
        rl.adapt(apply_fn, base, x, config=config, key=jax.random.key(0))
