"""Programs on a quantized base compute what they compute on the floats that it stands for."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from rslora_jax.quantize import dequantize, quantize
from rslora_jax.quantized import is_quantized
from tests.constructs import CONSTRUCTS, weight
from tests.quick import compiled
from tests.test_contract import assert_close, cast, differentiated, model, nth, random_like
from tests.test_contract import two_adapters as two

# One of each way in which a rule treats the base; the rest of the table differs in the factors.
NAMES = {
    "a_fused_kernel_split_in_three": 4,
    "a_gather_of_one_expert_for_each_token": 8,
    "a_product_of_two_weights_around_an_activation": 8,
    "a_tied_embedding": 4,
    "a_weight_carried_through_a_while_loop": 8,
    "cond": 4,
    "custom_vjp_with_a_rule_of_its_own": 8,
    "layers_brought_from_another_memory_one_by_one": 8,
    "linen_conv_2d": 8,
    "linen_parameters_in_partitioned_boxes": 8,
    "linen_scan_of_remat": 8,
    "linen_scan_on_axis_1": 4,
    "nnx_nested_state": 8,
    "ragged_dot": 4,
    "shard_map_that_gathers_blocks_of_weights": 4,
    "shard_map_with_a_sharded_contraction": 4,
    "weights_constrained_to_a_sharding": 8,
}


def on(apply, base, lora, args):
    """Outputs and derivatives of an adapted function on one base."""

    def run(base, lora, args):
        return differentiated(with_base(apply, base), lora, args, reverse=True)

    return compiled(run)(base, lora, args)


def on_both(apply, small, lora, args, *, reverse=True):
    """Outputs and derivatives on a quantized base, and on the floats that it stands for."""

    def run(small, lora, args):
        return [
            differentiated(with_base(apply, base), lora, args, reverse=reverse)
            for base in (small, dequantize(small))
        ]

    return compiled(run)(small, lora, args)


def with_base(apply, base):
    return lambda lora, *args: apply(rl.LoraParams(base, lora), *args)


def quantized_leaves(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(leaf)]


@functools.cache
def small_base(name, bits):
    """The base of a construct with every site's weight quantized."""
    _, _, params, _, sites = model(name)
    return quantize(params.base, sites, bits)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_the_floats_that_the_integers_stand_for(name):
    _, args, params, apply, sites = model(name)
    small = small_base(name, NAMES[name])
    assert len(quantized_leaves(small)) == len(sites)
    found, expected = on_both(apply, small, params.lora, args, reverse=CONSTRUCTS[name].reverse)
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("name", ["a_tied_embedding", "nnx_nested_state", "linen_scan_on_axis_1"])
def test_the_sites_of_a_quantized_tree_are_those_of_the_float_tree(name):
    apply_fn, args, params, _, _ = model(name)
    small = small_base(name, NAMES[name])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small)
    expected = rl.find_sites(apply_fn, params.base, *args)
    assert rl.find_sites(apply_fn, small, *args) == expected
    assert rl.find_sites(apply_fn, abstract, *args) == expected


# What the table has not.


def stack_of(body, *, prepare=lambda w: w):
    """`tanh` of what `body` does with each of four layers, [8, 8], in a scan."""

    def apply_fn(p, x):
        layers = prepare(p["w"])
        return lax.scan(lambda h, w: (jnp.tanh(body(h, w)).astype(h.dtype), None), x, layers)[0]

    return apply_fn


def product(h, w):
    return h @ w.astype(h.dtype)


STACK = stack_of(lambda h, w: h @ w)
PREPARED = {
    "cast and transposed": stack_of(
        product, prepare=lambda w: jnp.swapaxes(checkpoint_name(-w.astype(jnp.bfloat16), "w"), 1, 2)
    ),
    "reshaped": stack_of(product, prepare=lambda w: w.reshape(2, 2, 8, 8)[:, 0]),
    "sliced in the loop": stack_of(lambda h, w: h @ w[:, :4] @ w[4:]),
    "beside itself": stack_of(lambda h, w: h @ w + jnp.einsum("bi,oi->bo", h, w)),
}


def adapted(apply_fn, base, x, bits, **options):
    """Adapts a quantized base: `(apply, small, lora, sites)`, with random factors."""
    config = rl.LoraConfig(rank=2, alpha=3.0, targets=["w"], **options)
    small = quantize(base, rl.find_sites(apply_fn, base, x), bits)
    params, apply, sites = rl.adapt(apply_fn, small, x, config=config, key=jax.random.key(0))
    assert params.base is small
    return apply, small, random_like(params.lora), sites


@pytest.mark.parametrize("how", PREPARED)
def test_a_stack_may_be_prepared_before_its_scan(how):
    x = weight(3, 8)
    apply, small, lora, _ = adapted(PREPARED[how], {"w": weight(4, 8, 8)}, x, 4)
    assert_close(*on_both(apply, small, lora, (x,)), 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_of_every_width_are_formed_in_their_own_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        base, x = cast({"w": weight(8, 6)}, dtype), weight(3, 8).astype(dtype)
        apply, small, lora, _ = adapted(lambda p, x: x @ p["w"], base, x, 8)
        found, expected = on_both(apply, small, lora, (x,))
        assert found[0].dtype == dtype
        assert_close(found, expected, {"float64": 1e-14, "bfloat16": 1e-2}[dtype])


def test_a_vmap_over_adapters_shares_one_quantized_base():
    _, args, params, apply, _ = model("linen_scan_of_remat")
    small, adapters = small_base("linen_scan_of_remat", 8), two(params.lora)

    def run(small, adapters, args):
        one = with_base(apply, small)
        alone = [one(nth(adapters, k), *args) for k in (0, 1)]
        return jax.vmap(one, (0, None))(adapters, *args), alone

    together, alone = compiled(run)(small, adapters, args)
    for k in range(2):
        assert_close(nth(together, k), alone[k], 1e-6)


def test_two_adapters_may_share_one_quantized_base_one_after_the_other():
    """The second is put on a function that merges nothing and holds the first."""
    x, base = weight(3, 8), {"w": weight(4, 8, 8), "v": weight(8, 6)}

    def apply_fn(p, x):
        return STACK(p, x) @ p["v"]

    apply, small, first, _ = adapted(apply_fn, base, x, 8)
    config = rl.LoraConfig(rank=3, alpha=1.0, targets=["v"])

    def inner(p, x):
        return apply(rl.LoraParams(p, first), x)

    params, outer, _ = rl.adapt(inner, small, x, config=config, key=jax.random.key(1))
    assert_close(*on_both(outer, small, random_like(params.lora), (x,)), 1e-6)


def test_without_adapters_the_base_is_formed_all_the_same():
    x, base = weight(3, 8), {"w": weight(4, 8, 8)}
    apply, small, _, _ = adapted(STACK, base, x, 8)
    expected = compiled(STACK)(dequantize(small), x)
    for function in (apply, rl.attach(STACK, [])):
        assert_close(compiled(function)(rl.LoraParams(small, {}), x), expected, 1e-6)


def test_weights_without_an_adapter_may_be_quantized_and_adapted_ones_left_alone():
    x, base = weight(3, 8), {"w": weight(4, 8, 8), "u": weight(8, 6), "v": weight(6, 5)}

    def apply_fn(p, x):
        return jnp.tanh(STACK(p, x) @ p["u"]) @ p["v"]

    apply, _, lora, _ = adapted(apply_fn, base, x, 8)
    others = [site for site in rl.find_sites(apply_fn, base, x) if site.path != "w"]
    small = quantize(base, others, 4)
    assert [is_quantized(small[name]) for name in "wuv"] == [False, True, True]
    assert_close(*on_both(apply, small, lora, (x,)), 1e-6)


def test_an_adapter_with_a_use_that_has_no_low_rank_form_is_merged_into_the_formed_weight():
    x, base = weight(3, 8), {"w": weight(8, 8)}
    apply, small, lora, _ = adapted(
        lambda p, x: x @ jnp.sin(p["w"]), base, x, 8, unsupported="merge"
    )
    assert_close(*on_both(apply, small, lora, (x,)), 1e-6)


@pytest.mark.parametrize(
    ("kind", "stack", "split"),
    [
        (AxisType.Auto, 1, P("fsdp", None, "tensor")),
        (AxisType.Explicit, 0, P(None, "tensor", "fsdp")),
    ],
    ids=["auto", "explicit"],
)
def test_a_sharded_quantized_base_computes_what_one_device_computes(kind, stack, split):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)

    def layer(h, w):
        told = AxisType.Explicit in jax.typeof(h).sharding.mesh.axis_types
        return jnp.matmul(h, w, **({"out_sharding": P("fsdp")} if told else {}))

    apply_fn = stack_of(layer, prepare=lambda w: jnp.moveaxis(w, stack, 0))
    base, x = {"w": jnp.moveaxis(weight(4, 16, 16), 0, stack)}, weight(4, 16)
    apply, small, lora, sites = adapted(apply_fn, base, x, 4)
    alone = on(apply, small, lora, (x,))
    params = rl.sharding.shard(rl.LoraParams(small, lora), mesh, sites, {"w": split})
    assert params.base["w"].values.sharding == NamedSharding(mesh, split)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
        found = on(apply, *params, (x,))
    assert_close(found, alone, 2e-5)


# One layer is wide at a time.


def deep(remat):
    """A stack of six layers and its abstract arguments, of which no other array has the shape."""

    def layer(h, ws):
        up, down = ws
        return h + jnp.tanh(h @ up) @ down, None

    policies = {"dots": jax.checkpoint_policies.dots_saveable, "full": None}
    step = jax.checkpoint(layer, policy=policies[remat]) if remat else layer

    def apply_fn(p, x):
        return lax.scan(step, x, (p["w"], p["v"]))[0]

    base = {
        "w": jax.ShapeDtypeStruct((6, 128, 192), jnp.float32),
        "v": jax.ShapeDtypeStruct((6, 192, 128), jnp.float32),
    }
    return apply_fn, base, jax.ShapeDtypeStruct((2, 128), jnp.float32)


def training(remat, bits):
    """The loss of an adapted stack as a function of lora and base, with abstract arguments."""
    apply_fn, base, x = deep(remat)
    config = rl.LoraConfig(rank=2, alpha=3.0, targets=["w", "v"])
    base = quantize(base, rl.find_sites(apply_fn, base, x), bits) if bits < 32 else base
    params, apply, _ = rl.adapt(apply_fn, base, x, config=config, key=jax.random.key(0))

    def loss(lora, base, x):
        return (apply(rl.LoraParams(base, lora), x) ** 2).sum()

    return loss, params.lora, params.base, x


def shapes_within(jaxpr):
    """Shape and dtype of every value in a program and the programs inside it."""
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            yield tuple(var.aval.shape), var.aval.dtype
        for param in jax.tree.leaves(eqn.params):
            if hasattr(inner := getattr(param, "jaxpr", param), "eqns"):
                yield from shapes_within(inner)


def floats_of(shapes, wanted):
    return [s for s, dtype in shapes if s in wanted and jnp.issubdtype(dtype, jnp.floating)]


STACKS, LAYERS = {(6, 128, 192), (6, 192, 128)}, {(128, 192), (192, 128)}


@pytest.mark.parametrize(("remat", "bits"), [(None, 8), ("full", 8), ("dots", 4), (None, 32)])
def test_a_gradient_forms_no_stack_of_wide_layers_and_keeps_no_wide_layer(remat, bits):
    loss, *arguments = training(remat, bits)
    program = jax.make_jaxpr(jax.value_and_grad(loss))(*arguments)

    def pullback(lora, *rest):
        return jax.vjp(lambda lora: loss(lora, *rest), lora)[1]

    left = jax.tree.leaves(jax.eval_shape(pullback, *arguments))
    kept = [(tuple(leaf.shape), leaf.dtype) for leaf in left]
    found = floats_of(shapes_within(program.jaxpr), STACKS), floats_of(kept, STACKS | LAYERS)
    if bits == 32:
        assert all(found)  # the test sees what it looks for
    else:
        assert found == ([], [])


def test_a_quantized_stack_needs_no_more_temporaries_than_a_float_one():
    def needed(bits):
        loss, *arguments = training(None, bits)
        return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile().memory_analysis()

    layer, (small, wide) = 128 * 192 * 4, (needed(bits) for bits in (8, 32))
    assert small.temp_size_in_bytes < wide.temp_size_in_bytes + layer
    assert small.argument_size_in_bytes < wide.argument_size_in_bytes - 6 * layer
