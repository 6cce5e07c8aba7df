"""The table of constructs: every way of using a weight that the library promises to serve."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Construct:
    """One way of using weights.

    Attributes:
      name: what the parametrized tests are called.
      build: makes ``(apply_fn, params, args)``, in float32.
      axes: path -> axes of every weight that must be found.
      embeddings: which of them are lookups.
      heads: which of them are output heads; None leaves it open.
      double: the original computes in float64 throughout, if its inputs are.
      reverse: JAX differentiates the original in reverse mode.
      batched: the original can be mapped over its inputs with `jax.vmap`.
      stackable: the original can be mapped over a stack of its weights with `jax.vmap`.
    """

    name: str
    build: Callable[[], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    axes: Mapping[str, str]
    embeddings: frozenset[str] = frozenset()
    heads: frozenset[str] | None = None
    double: bool = True
    reverse: bool = True
    batched: bool = True
    stackable: bool = True


CONSTRUCTS: dict[str, Construct] = {}


def construct(axes, embeddings=(), heads=None, **flags):
    """Adds the function below to the table, under its name."""

    def add(build):
        name = build.__name__
        assert name not in CONSTRUCTS
        CONSTRUCTS[name] = Construct(
            name,
            functools.cache(build),
            axes,
            frozenset(embeddings),
            None if heads is None else frozenset(heads),
            **flags,
        )
        return build

    return add


def weight(*shape, seed=0):
    """Reproducible float32 numbers of a size that keeps activations near one."""
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32)


def filled(tree):
    """Random numbers in place of every floating `ShapeDtypeStruct` of a tree."""

    def fill(keys, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        value = weight(*leaf.shape, seed=sum(map(ord, jax.tree_util.keystr(keys))))
        positive = "var" in jax.tree_util.keystr(keys)
        return jnp.asarray(np.abs(value) + 0.5) if positive else value

    return jax.tree_util.tree_map_with_path(fill, tree)


def x():
    return weight(2, 5, 8, seed=9) * 2


def tokens():
    return jnp.array([[1, 2, 3], [4, 10, 1]])


def image():
    return weight(2, 6, 6, 8, seed=9) * 2


def mesh():
    return jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))


def over_layers(body):
    """A stack of three layers `w`, applied one after another by `body(h, layer)`."""

    def apply_fn(p, x):
        return lax.scan(lambda h, layer: (body(h, layer), None), x, p["w"])[0]

    return apply_fn, {"w": weight(3, 8, 8)}, (x(),)


# Products.


@construct({"u": "io", "v": "io"}, heads=["v"])
def plain_products():
    return (
        lambda p, x: jnp.tanh(x @ p["u"] + p["bias"]) @ p["v"],
        {"u": weight(8, 6), "v": weight(6, 4), "bias": weight(6)},
        (x(),),
    )


@construct({"w": "io"}, heads=["w"])
def a_product_with_one_vector():
    return lambda p, x: x @ p["w"], {"w": weight(8, 6)}, (x()[0, 0],)


@construct({"w": "oi"})
def a_weight_on_the_left():
    return lambda p, x: p["w"] @ x[0].T, {"w": weight(6, 8)}, (x(),)


@construct({"w": "oi"}, heads=["w"])
def a_transposed_weight():
    return lambda p, x: x @ p["w"].T, {"w": weight(6, 8)}, (x(),)


@construct({"q": "ioo", "o": "iio"}, heads=["o"])
def hand_written_einsums():
    def apply_fn(p, x):
        heads = jnp.tanh(jnp.einsum("BTD,DNH->BTNH", x, p["q"]))
        return jnp.einsum("BTNH,NHD->BTD", heads, p["o"])

    return apply_fn, {"q": weight(8, 2, 4), "o": weight(2, 4, 8)}, (x(),)


@construct({"kv": "oioo"})
def an_einsum_with_two_kernels_in_one():
    def apply_fn(p, x):
        k, v = jnp.tanh(jnp.einsum("BTD,CDNH->CBTNH", x, p["kv"]))
        return jnp.einsum("BTNH,BSNH->BNTS", k, v)

    return apply_fn, {"kv": weight(2, 8, 2, 4)}, (x(),)


@construct({"w": "oio"})
def an_einsum_that_sums_over_a_middle_axis():
    return lambda p, x: jnp.einsum("btd,ndh->bnth", x, p["w"]), {"w": weight(2, 8, 4)}, (x(),)


@construct({"w": "io"})
def a_product_that_accumulates_in_float32():
    def apply_fn(p, x):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.matmul(x, p["w"], preferred_element_type=wide, precision="highest")

    return apply_fn, {"w": weight(8, 6)}, (x(),)


@construct({"w": "bio"})
def a_batched_product():
    return lambda p, x: x @ p["w"], {"w": weight(2, 8, 6)}, (x(),)


@construct({"w": "io"}, heads=[])
def a_weight_used_twice_in_one_orientation():
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": weight(8, 8)}, (x(),)


@construct({"w": "io"})
def a_weight_used_in_both_orientations():
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": weight(8, 6)}, (x(),)


@construct({"q": "io", "k": "io"})
def a_product_of_two_weights_around_an_activation():
    return (
        lambda p, x: jnp.einsum("btd,de,fe,bsf->bts", x, p["q"], p["k"], x),
        {"q": weight(8, 6), "k": weight(8, 6, seed=1)},
        (x(),),
    )


# Moves: the weight is rearranged before it is used.


@construct({"w": "io"})
def a_weight_cast_to_the_wide_type():
    def apply_fn(p, x):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (x.astype(wide) @ p["w"].astype(wide)).astype(x.dtype)

    return apply_fn, {"w": weight(8, 6)}, (x(),)


@construct({"w": "io"})
def output_axis_split_by_reshape():
    return (
        lambda p, x: jnp.einsum("btd,dnh->btnh", x, p["w"].reshape(8, 3, 4)),
        {"w": weight(8, 12)},
        (x(),),
    )


@construct({"w": "io"})
def input_axis_split_by_reshape():
    return (
        lambda p, x: jnp.einsum("btnh,nhd->btd", x.reshape(2, 5, 2, 4), p["w"].reshape(2, 4, 6)),
        {"w": weight(8, 6)},
        (x(),),
    )


@construct({"w": "ioo", "v": "iio"})
def axes_merged_by_reshape():
    def apply_fn(p, x):
        return jnp.tanh(x @ p["w"].reshape(8, 12)) @ p["v"].reshape(12, 6)

    return apply_fn, {"w": weight(8, 3, 4), "v": weight(3, 4, 6)}, (x(),)


@construct({"w": "bio"})
def a_stack_indexed_by_static_numbers():
    def apply_fn(p, x):
        for layer in range(3):
            x = jnp.tanh(x @ p["w"][layer])
        return x

    return apply_fn, {"w": weight(3, 8, 8)}, (x(),)


@construct({"w": "bio"})
def a_stack_indexed_by_a_traced_number():
    return (
        lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x),
        {"w": weight(3, 8, 8)},
        (x(),),
    )


@construct({"w": "bio"})
def a_stack_unpacked():
    def apply_fn(p, x):
        q, k, v = p["w"]
        return jnp.tanh(x @ q) * (x @ k) + x @ v

    return apply_fn, {"w": weight(3, 8, 6)}, (x(),)


@construct({"w": "bio"})
def one_expert_of_a_stack():
    return lambda p, x: x @ p["w"][1], {"w": weight(3, 8, 6)}, (x(),)


@construct({"w": "bio"})
def one_expert_of_a_stack_chosen_by_an_argument():
    return lambda p, x, e: x @ p["w"][e], {"w": weight(3, 8, 6)}, (x(), jnp.array(2))


@construct({"w": "ibo"})
def one_layer_taken_by_dynamic_index_in_dim():
    return (
        lambda p, x, e: x @ lax.dynamic_index_in_dim(p["w"], e, 1, keepdims=False),
        {"w": weight(8, 3, 6)},
        (x(), jnp.array(2)),
    )


@construct({"w": "io"})
def a_fused_kernel_split_in_three():
    def apply_fn(p, x):
        q, k, v = jnp.split(p["w"], 3, axis=-1)
        return jnp.tanh(x @ q) * (x @ k) + x @ v

    return apply_fn, {"w": weight(8, 12)}, (x(),)


@construct({"w": "io"})
def a_fused_kernel_sliced_in_three():
    def apply_fn(p, x):
        w = p["w"]
        return jnp.tanh(x @ w[:, :4]) * (x @ w[:, 4:8]) + x @ w[:, 8:]

    return apply_fn, {"w": weight(8, 12)}, (x(),)


@construct({"w": "io"})
def a_fused_output_split_in_three():
    def apply_fn(p, x):
        q, k, v = jnp.split(x @ p["w"], 3, axis=-1)
        return jnp.tanh(q) * k + v

    return apply_fn, {"w": weight(8, 12)}, (x(),)


@construct({"w": "ioo"})
def heads_repeated_before_the_product():
    def apply_fn(p, x):
        return jnp.einsum("btd,dnh->btnh", x, jnp.repeat(p["w"], 2, axis=1))

    return apply_fn, {"w": weight(8, 2, 3)}, (weight(2, 3, 8),)


@construct({"w": "io"})
def an_input_axis_sliced_with_a_stride():
    return lambda p, x: x[..., :4] @ p["w"][::2], {"w": weight(8, 6)}, (x(),)


@construct({"w": "io"})
def a_reversed_weight():
    return lambda p, x: x @ p["w"][::-1, ::-1], {"w": weight(8, 6)}, (x(),)


@construct({"w": "bio"})
def a_squeezed_weight():
    return lambda p, x: x @ jnp.squeeze(p["w"], 0), {"w": weight(1, 8, 6)}, (x(),)


@construct({"w": "io"})
def a_broadcast_weight():
    return (
        lambda p, x: jnp.einsum("btd,bdf->btf", x, jnp.broadcast_to(p["w"], (2, 8, 6))),
        {"w": weight(8, 6)},
        (x(),),
    )


@construct({"w": "io"})
def a_weight_times_a_literal():
    return lambda p, x: x @ (p["w"] * 3.0), {"w": weight(8, 6)}, (x(),)


@construct({"w": "io"})
def a_weight_times_a_traced_number():
    return lambda p, x, s: x @ (s * p["w"]), {"w": weight(8, 6)}, (x(), jnp.float32(1.7))


@construct({"w": "io"})
def a_weight_times_a_parameter():
    return (
        lambda p, x: x @ (p["w"] * p["gain"]),
        {"w": weight(8, 6), "gain": jnp.float32(0.6)},
        (x(),),
    )


@construct({"w": "io"})
def a_weight_divided_and_negated():
    return lambda p, x, s: x @ (-p["w"] / s), {"w": weight(8, 6)}, (x(), jnp.float32(1.7))


@construct({"w": "io", "v": "io"})
def weights_constrained_to_a_sharding():
    def apply_fn(p, x):
        w = lax.with_sharding_constraint(p["w"], NamedSharding(mesh(), P(None, "d")))
        v = lax.with_sharding_constraint(p["v"], NamedSharding(mesh(), P("d")))
        return jnp.tanh(x @ w) @ v

    return apply_fn, {"w": weight(8, 6), "v": weight(6, 4)}, (x(),)


@construct({"w": "bio"})
def layers_brought_from_another_memory_one_by_one():
    def layer(h, w):
        return jnp.tanh(h @ jax.device_put(w, jax.memory.Space.Device))

    return over_layers(layer)


@construct({"w": "io"})
def a_weight_named_by_checkpoint_name():
    return lambda p, x: x @ checkpoint_name(p["w"], "w"), {"w": weight(8, 6)}, (x(),)


@construct({"w": "io", "v": "io"})
def weights_behind_an_optimization_barrier():
    def apply_fn(p, x):
        w, v, x = lax.optimization_barrier((p["w"], p["v"], x))
        return jnp.tanh(x @ w) @ v

    return apply_fn, {"w": weight(8, 6), "v": weight(6, 4)}, (x(),)


@construct({"w": "io", "v": "io"})
def a_weight_behind_stop_gradient():
    return (
        lambda p, x: jnp.tanh(x @ lax.stop_gradient(p["w"])) @ p["v"],
        {"w": weight(8, 6), "v": weight(6, 4)},
        (x(),),
    )


# Calls and control flow.


@construct({"w": "io"})
def nested_jit():
    inner = jax.jit(lambda w, x: jnp.sin(x @ w))
    return lambda p, x: jax.jit(inner)(p["w"], inner(p["w"], x)), {"w": weight(8, 8)}, (x(),)


@construct({"u": "io", "v": "io"}, heads=["v"])
def an_apply_function_that_is_jitted_already():
    return (
        jax.jit(lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"]),
        {"u": weight(8, 6), "v": weight(6, 4)},
        (x(),),
    )


@construct({"u": "io", "v": "io"})
def inner_functions_with_warm_caches():
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    fixed = jax.jit(lambda h: h * 2)

    def apply_fn(p, x):
        return fixed(layer(p["v"], layer(p["u"], x)))

    params = {"u": weight(8, 8), "v": weight(8, 8, seed=1)}
    jax.block_until_ready(apply_fn(params, x()))  # fills the caches of the inner functions
    jax.block_until_ready(jax.jit(apply_fn)(params, x()))
    return apply_fn, params, (x(),)


@construct({"w": "io"})
def remat():
    return (
        lambda p, x: jax.checkpoint(lambda w, x: jnp.sin(jnp.cos(x) @ w))(p["w"], x) @ p["w"],
        {"w": weight(8, 8)},
        (x(),),
    )


@construct({"w": "io"})
def remat_with_a_policy():
    policy = jax.checkpoint_policies.save_only_these_names("h")

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(w, x):
        return jnp.sin(checkpoint_name(x @ w, "h"))

    return lambda p, x: layer(p["w"], layer(p["w"], x)), {"w": weight(8, 8)}, (x(),)


@construct({"w": "bio"})
def scan_over_a_stack():
    return over_layers(lambda h, w: jnp.tanh(h @ w))


@construct({"w": "bio"})
def scan_of_remat_over_a_stack():
    return over_layers(jax.checkpoint(lambda h, w: jnp.tanh(h @ w)))


@construct({"w": "ibo"})
def scan_over_a_middle_axis():
    def apply_fn(p, x):
        layers = jnp.moveaxis(p["w"], 1, 0)
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, layers, reverse=True)

    return apply_fn, {"w": weight(8, 3, 8)}, (x(),)


@construct({"w": "bbio"})
def a_scan_in_a_scan():
    def apply_fn(p, x):
        def group(h, ws):
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, ws)[0], None

        return lax.scan(group, x, p["w"], unroll=2)[0]

    return apply_fn, {"w": weight(2, 2, 8, 8)}, (x(),)


@construct({"w": "io"})
def a_constant_of_a_scan():
    return (
        lambda p, x: lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), h.sum()), x, None, length=3),
        {"w": weight(8, 8)},
        (x(),),
    )


@construct({"w": "io"})
def a_weight_carried_through_a_scan():
    def apply_fn(p, x):
        def step(carry, _):
            h, w = carry
            return (jnp.tanh(h @ w), w), None

        return lax.scan(step, (x, p["w"]), None, length=3)[0][0]

    return apply_fn, {"w": weight(8, 8)}, (x(),)


@construct({"w": "io"}, reverse=False)
def while_loop():
    def apply_fn(p, x):
        def step(carry):
            return carry[0] + 1, jnp.tanh(carry[1] @ p["w"])

        return lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))[1]

    return apply_fn, {"w": weight(8, 8)}, (x(),)


@construct({"w": "io"}, reverse=False)
def a_weight_carried_through_a_while_loop():
    def apply_fn(p, x):
        def step(carry):
            return carry[0] + 1, jnp.tanh(carry[1] @ carry[2]), carry[2]

        return lax.while_loop(lambda carry: carry[0] < 3, step, (0, x, p["w"]))[1]

    return apply_fn, {"w": weight(8, 8)}, (x(),)


@construct({"w": "io"}, reverse=False)
def a_weight_in_the_condition_of_a_while_loop():
    def apply_fn(p, x):
        def test(carry):
            return (carry[0] < 3) & (jnp.abs(carry[1] @ p["w"]).sum() < 1e6)

        def step(carry):
            return carry[0] + 1, jnp.tanh(carry[1] @ p["w"])

        return lax.while_loop(test, step, (0, x))[1]

    return apply_fn, {"w": weight(8, 8)}, (x(),)


@construct({"w": "io"})
def fori_loop():
    return (
        lambda p, x: lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x),
        {"w": weight(8, 8)},
        (x(),),
    )


@construct({"u": "io", "v": "io"})
def cond():
    return (
        lambda p, x: lax.cond(x.sum() > 0, lambda x: x @ p["u"], lambda x: jnp.sin(x @ p["v"]), x),
        {"u": weight(8, 6), "v": weight(8, 6, seed=1)},
        (x(),),
    )


@construct({"u": "io", "v": "io"})
def switch():
    branches = [
        lambda u, v, x: x,
        lambda u, v, x: x @ u,
        lambda u, v, x: jnp.tanh(x @ v) @ u,
    ]
    return (
        lambda p, x, k: lax.switch(k, branches, p["u"], p["v"], x),
        {"u": weight(8, 8), "v": weight(8, 8, seed=1)},
        (x(), jnp.array(2)),
    )


@construct({"w": "io"})
def custom_vjp_with_a_rule_of_its_own():
    @jax.custom_vjp
    def product(w, x):
        return jnp.sin(x @ w)

    def backward(residuals, g):
        w, x = residuals
        return 2 * jnp.einsum("...i,...o->io", x, g), 3 * (g @ w.T)

    product.defvjp(lambda w, x: (product(w, x), (w, x)), backward)
    return lambda p, x: product(p["w"], x), {"w": weight(8, 6)}, (x(),)


@construct({"w": "io"})
def custom_jvp_with_a_rule_of_its_own():
    @jax.custom_jvp
    def product(w, x):
        return jnp.sin(x @ w)

    @product.defjvp
    def _(primals, tangents):
        w, x = primals
        return product(w, x), 3 * (tangents[1] @ w + x @ tangents[0])

    return lambda p, x: product(p["w"], x), {"w": weight(8, 6)}, (x(),)


@construct({"w": "io", "v": "io"})
def custom_vjp_on_activations_only():
    @jax.custom_vjp
    def doubled(h):
        return jnp.sin(h)

    doubled.defvjp(lambda h: (jnp.sin(h), h), lambda h, g: (2 * g * jnp.cos(h),))
    return (
        lambda p, x: doubled(x @ p["w"]) @ p["v"],
        {"w": weight(8, 6), "v": weight(6, 4)},
        (x(),),
    )


@construct({"w": "io", "v": "io"})
def custom_jvp_on_activations_only():
    return (
        lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"],
        {"w": weight(8, 6), "v": weight(6, 4)},
        (x(),),
    )


@construct({"w": "io"})
def shard_map_with_a_replicated_weight():
    def apply_fn(p, x):
        def body(w, x):
            return jnp.tanh(x @ w)

        return jax.shard_map(body, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P("d"))(p["w"], x)

    return apply_fn, {"w": weight(8, 6)}, (x(),)


@construct({"w": "io"})
def shard_map_with_a_sharded_contraction():
    def apply_fn(p, x):
        def body(w, x):
            return lax.psum(x @ w, "d")

        specs = (P("d"), P(None, None, "d"))
        return jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=P())(p["w"], x)

    return apply_fn, {"w": weight(8, 6)}, (x(),)


@construct({"w": "io"})
def shard_map_with_a_sharded_output():
    def apply_fn(p, x):
        specs = {"in_specs": (P(None, "d"), P()), "out_specs": P(None, None, "d")}
        return jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=mesh(), **specs)(p["w"], x)

    return apply_fn, {"w": weight(8, 6)}, (x(),)


@construct({"w": "bio", "v": "io"}, heads=["v"])
def shard_map_that_gathers_blocks_of_weights():
    """Fully sharded data parallelism by hand: each layer's blocks in a scan, and a stack."""

    def apply_fn(p, x):
        def body(w, v, x):
            def layer(h, w):
                return jnp.tanh(h @ lax.all_gather(w, "d", axis=1, tiled=True)), None

            h = lax.scan(jax.checkpoint(layer), x, w)[0]
            return h @ lax.all_gather(v, "d").reshape(8, -1)

        specs = (P(None, None, "d"), P("d"), P("d"))
        return jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=P("d"))(p["w"], p["v"], x)

    return apply_fn, {"w": weight(3, 8, 8), "v": weight(8, 6)}, (x(),)


@construct({"w": "io", "v": "io"})
def shard_map_on_activations_only():
    def apply_fn(p, x):
        def body(h):
            return h - lax.pmean(h, "d")

        h = jax.shard_map(body, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))(x @ p["w"])
        return h @ p["v"]

    return apply_fn, {"w": weight(8, 6), "v": weight(6, 4)}, (x(),)


@construct({"w": "bio"})
def vmap_over_a_stack():
    return (
        lambda p, x: jax.vmap(lambda w, x: jnp.tanh(x @ w))(p["w"], x),
        {"w": weight(2, 8, 6)},
        (x(),),
    )


@construct({"w": "io"})
def vmap_over_activations():
    return (
        lambda p, x: jax.vmap(jax.vmap(lambda x: jnp.tanh(p["w"].T @ x)))(x),
        {"w": weight(8, 6)},
        (x(),),
    )


# Experts.


@construct({"w": "bio", "v": "bio"}, heads=["v"])
def a_batched_einsum_over_experts():
    def apply_fn(p, x):
        h = jnp.tanh(jnp.einsum("ebd,edf->ebf", x, p["w"]))
        return jnp.einsum("ebf,efd->ebd", h, p["v"])

    return apply_fn, {"w": weight(2, 8, 6), "v": weight(2, 6, 8)}, (x(),)


@construct({"w": "oio", "v": "iio"})
def an_einsum_of_every_token_with_every_expert():
    # Without a shared batch axis the experts are one wide layer: e is kept, then summed over.
    def apply_fn(p, x):
        h = jnp.tanh(jnp.einsum("btd,edf->betf", x, p["w"]))
        return jnp.einsum("betf,efd->btd", h, p["v"])

    return apply_fn, {"w": weight(3, 8, 6), "v": weight(3, 6, 8)}, (x(),)


@construct({"w": "bio"})
def per_expert_slices():
    def apply_fn(p, x, gates):
        outs = [jnp.tanh(x @ p["w"][e]) * gates[e] for e in range(3)]
        return sum(outs)

    return apply_fn, {"w": weight(3, 8, 6)}, (x(), weight(3))


@construct({"w": "bio"})
def a_gather_of_one_expert_for_each_token():
    def apply_fn(p, x, chosen):
        return jnp.einsum("btd,btdf->btf", x, p["w"][chosen])

    chosen = jnp.array([[0, 2, 1, 1, 0], [2, 2, 0, 1, 2]])
    return apply_fn, {"w": weight(3, 8, 6)}, (x(), chosen)


@construct({"w": "bio"}, batched=False, stackable=False)  # JAX maps all operands or none
def ragged_dot():
    return (
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
        {"w": weight(3, 8, 6)},
        (x()[0], jnp.array([2, 0, 3])),
    )


# Embeddings.


@construct({"e": "io", "w": "io"}, embeddings=["e"], heads=["w"])
def an_embedding_and_a_head():
    return (
        lambda p, t: jnp.tanh(p["e"][t]) @ p["w"],
        {"e": weight(11, 8), "w": weight(8, 5)},
        (tokens(),),
    )


@construct({"e": "io"}, embeddings=["e"], heads=["e"])
def a_tied_embedding():
    return lambda p, t: jnp.tanh(p["e"][t]) @ p["e"].T, {"e": weight(11, 8)}, (tokens(),)


@construct({"e": "io", "w": "io"}, embeddings=["e"])
def an_embedding_looked_up_with_take():
    return (
        lambda p, t: jnp.tanh(jnp.take(p["e"], t, axis=0)) @ p["w"],
        {"e": weight(11, 8), "w": weight(8, 5)},
        (tokens(),),
    )


@construct({"e": "io", "w": "io"}, embeddings=["e"])
def one_row_of_an_embedding():
    return (
        lambda p, t: jnp.tanh(p["e"][t[0, 0]]) @ p["w"],
        {"e": weight(11, 8), "w": weight(8, 5)},
        (tokens(),),
    )


@construct({"e": "io", "w": "io"}, embeddings=[])
def an_embedding_as_a_product_with_one_hot():
    return (
        lambda p, t: jnp.tanh(jax.nn.one_hot(t, 11, dtype=p["e"].dtype) @ p["e"]) @ p["w"],
        {"e": weight(11, 8), "w": weight(8, 5)},
        (tokens(),),
    )


# Flax Linen.


def linen(module, *args, **kwargs):
    """A Linen module's apply function with filled variables."""
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), *args))
    return functools.partial(module.apply, **kwargs), variables, args


class Layer(nn.Module):
    """One layer in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, h, _):
        return nn.tanh(nn.Dense(8)(h)), None


class Scanned(nn.Module):
    """Three layers with their parameters stacked along `axis`."""

    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        layers = nn.scan(
            layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return layers(name="layers")(x, None)[0]


class Sequence(nn.Module):
    """Calls functions and modules that `make` creates, one after another."""

    make: Callable[[], list[Any]]

    @nn.compact
    def __call__(self, x):
        for layer in self.make():
            x = layer(x)
        return x


@construct({"params/Dense_0/kernel": "io", "params/Dense_1/kernel": "io"})
def linen_dense():
    return linen(Sequence(lambda: [nn.Dense(6), nn.tanh, nn.Dense(4)]), x())


@construct({"params/a/kernel": "ioo", "params/b/kernel": "iio"})
def linen_dense_general():
    layers = [(2, 4), 8]
    return linen(
        Sequence(
            lambda: [
                nn.DenseGeneral(layers[0], name="a"),
                nn.tanh,
                nn.DenseGeneral(layers[1], axis=(-2, -1), name="b"),
            ]
        ),
        x(),
    )


@construct({"params/Einsum_0/kernel": "ioo"})
def linen_einsum():
    return linen(Sequence(lambda: [nn.Einsum((8, 2, 4), "...d,dnh->...nh")]), x())


@construct(
    {
        "params/query/kernel": "ioo",
        "params/key/kernel": "ioo",
        "params/value/kernel": "ioo",
        "params/out/kernel": "iio",
    },
    heads=["params/out/kernel"],
)
def linen_attention():
    return linen(nn.MultiHeadDotProductAttention(num_heads=2), x())


class Tied(nn.Module):
    """A language model that shares its embedding with its head."""

    @nn.compact
    def __call__(self, t):
        embed = nn.Embed(11, 8, name="embed")
        return embed.attend(nn.tanh(nn.Dense(8, name="dense")(embed(t))))


@construct(
    {"params/dense/kernel": "io", "params/embed/embedding": "io"},
    embeddings=["params/embed/embedding"],
    heads=["params/embed/embedding"],
)
def linen_embed_and_attend():
    return linen(Tied(), tokens())


@construct({"params/kernel": "iio"})
def linen_conv_1d():
    return linen(nn.Conv(6, (3,)), x())


@construct({"params/kernel": "iiio"})
def linen_conv_2d():
    return linen(nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID"), image())


@construct({"params/kernel": "iiio"})
def linen_conv_2d_with_dilation():
    return linen(
        nn.Conv(6, (3, 2), padding=((2, 1), (0, 2)), kernel_dilation=2, input_dilation=2), image()
    )


@construct({"params/kernel": "iio"})
def linen_conv_transpose():
    return linen(nn.ConvTranspose(6, (3,), strides=(2,)), x())


@construct({"params/layers/Dense_0/kernel": "bio"})
def linen_scan():
    return linen(Scanned(), x())


@construct({"params/layers/Dense_0/kernel": "ibo"})
def linen_scan_on_axis_1():
    return linen(Scanned(axis=1), x())


@construct({"params/layers/Dense_0/kernel": "bio"})
def linen_scan_of_remat():
    return linen(Scanned(remat=True), x())


@construct({"params/CheckpointDense_0/kernel": "io", "params/CheckpointDense_1/kernel": "io"})
def linen_remat():
    return linen(Sequence(lambda: [nn.remat(nn.Dense)(8), nn.tanh, nn.remat(nn.Dense)(6)]), x())


@construct({"params/VmapDense_0/kernel": "bio"})
def linen_vmap():
    mapped = nn.vmap(
        nn.Dense,
        in_axes=1,
        out_axes=1,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    return linen(Sequence(lambda: [mapped(6)]), x())


class Normed(nn.Module):
    """A model with batch statistics."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(6, name="u")(x))
        return nn.Dense(4, name="v")(nn.LayerNorm()(h))


@construct({"params/u/kernel": "io", "params/v/kernel": "io"})
def linen_batch_stats_that_are_read():
    return linen(Normed(), x())


@construct({"params/u/kernel": "io", "params/v/kernel": "io"})
def linen_batch_stats_that_are_updated():
    return linen(Normed(), x(), train=True, mutable=["batch_stats"])


@construct({"params/Dense_0/kernel": "io", "params/Dense_1/kernel": "io"})
def linen_parameters_in_partitioned_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("x", None))
    return linen(Sequence(lambda: [nn.Dense(6, kernel_init=init), nn.tanh, nn.Dense(4)]), x())


@construct({"params/Dense_0/kernel": "io", "params/Dense_1/kernel": "io"})
def linen_parameters_in_logically_partitioned_boxes():
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    return linen(Sequence(lambda: [nn.Dense(6, kernel_init=init), nn.tanh, nn.Dense(4)]), x())


@construct({"params/Dense_0/kernel": "io"})
def linen_parameters_in_a_frozen_dict():
    apply_fn, params, args = linen(Sequence(lambda: [nn.Dense(6)]), x())
    return apply_fn, FrozenDict(params), args


# Flax NNX.


def nnx_model(make, *args):
    """An NNX model through `nnx.split` and `nnx.merge`, with a filled state."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return lambda state, *args: nnx.merge(graph, state)(*args), filled(state), args


class Block(nnx.Module):
    """A residual block whose parameters lie in nested containers."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 8, rngs=rngs)])
        self.inner = nnx.Dict(gate=nnx.Param(jnp.zeros((8, 8))))

    def __call__(self, h):
        out = self.layers[1](nnx.tanh(self.layers[0](h)))
        return h + out * nnx.sigmoid(h @ self.inner["gate"][...])


BLOCK = {"inner/gate": "io", "layers/0/kernel": "io", "layers/1/kernel": "io"}


@construct(BLOCK)
def nnx_nested_state():
    return nnx_model(Block, x())


@construct(BLOCK)
def nnx_nested_state_as_a_plain_dict():
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(nnx.Rngs(0))))

    def apply_fn(pure, x):
        new = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(new, pure)
        return nnx.merge(graph, new)(x)

    return apply_fn, filled(nnx.to_pure_dict(state)), (x(),)


class NnxTied(nnx.Module):
    """A convolution, products over several axes and a tied embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.embed.dtype = None  # else it is that of the initializer, whatever the state holds
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.general = nnx.LinearGeneral((8,), (2, 4), rngs=rngs)
        self.einsum = nnx.Einsum("...nh,nhd->...d", (2, 4, 8), rngs=rngs)

    def __call__(self, t):
        h = self.conv(self.embed(t))
        return self.embed.attend(self.einsum(nnx.tanh(self.general(h))))


@construct(
    {
        "conv/kernel": "iio",
        "einsum/kernel": "iio",
        "embed/embedding": "io",
        "general/kernel": "ioo",
    },
    embeddings=["embed/embedding"],
    heads=["embed/embedding"],
)
def nnx_layers():
    return nnx_model(NnxTied, tokens())


@construct(
    {"key/kernel": "ioo", "out/kernel": "iio", "query/kernel": "ioo", "value/kernel": "ioo"},
    heads=["out/kernel"],
    double=False,  # Flax computes this softmax in float32
)
def nnx_attention():
    return nnx_model(lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs), x())


class NnxStack(nnx.Module):
    """Three layers, made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs, remat):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = make(rngs)
        self.remat = remat

    def __call__(self, x):
        def call(layer, h):
            return nnx.tanh(layer(h))

        step = nnx.remat(call) if self.remat else call

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(h, layer):
            return step(layer, h)

        return run(x, self.layers)


@construct({"layers/kernel": "bio"})
def nnx_scan():
    return nnx_model(lambda rngs: NnxStack(rngs, remat=False), x())


@construct({"layers/kernel": "bio"})
def nnx_scan_of_remat():
    return nnx_model(lambda rngs: NnxStack(rngs, remat=True), x())


class NnxMapped(nnx.Module):
    """Two layers side by side, each on its own part of the batch."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 6, rngs=rngs)

        self.layers = make(rngs)
        self.last = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        h = nnx.vmap(lambda layer, h: layer(h), in_axes=(0, 0), out_axes=0)(self.layers, x)
        return nnx.remat(lambda layer, h: layer(h))(self.last, h)


@construct({"last/kernel": "io", "layers/kernel": "bio"})
def nnx_vmap_and_remat():
    return nnx_model(NnxMapped, x())


class NnxNormed(nnx.Module):
    """A model with batch statistics."""

    def __init__(self, rngs):
        self.u = nnx.Linear(8, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.v = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return self.v(self.norm(self.u(x)))


@construct({"u/kernel": "io", "v/kernel": "io"})
def nnx_that_returns_its_new_statistics():
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxNormed(nnx.Rngs(0))))

    def apply_fn(state, x):
        model = nnx.merge(graph, state, copy=True)
        y = model(x)
        return y, nnx.state(model, nnx.BatchStat)

    return apply_fn, filled(state), (x(),)


# Other libraries.


@construct({"layers/0/weight": "oi", "layers/1/weight": "oi"})
def equinox_arrays():
    arrays, static = eqx.partition(
        eqx.filter_eval_shape(lambda: eqx.nn.MLP(8, 4, 6, 1, key=jax.random.key(0))),
        lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )

    def apply_fn(arrays, x):
        return jax.vmap(jax.vmap(eqx.combine(arrays, static)))(x)

    return apply_fn, filled(arrays), (x(),)


class EquinoxModel(eqx.Module):
    """A module with a function among its leaves, static fields and a nested module."""

    first: eqx.nn.Linear
    act: Callable[..., Any]
    second: eqx.nn.Linear
    times: int = eqx.field(static=True)

    def __init__(self, key):
        self.first = eqx.nn.Linear(8, 8, key=key)
        self.act = jnp.tanh
        self.second = eqx.nn.Linear(8, 4, use_bias=False, key=key)
        self.times = 2

    def __call__(self, x):
        for _ in range(self.times):
            x = self.act(self.first(x))
        return self.second(x)


@construct({"first/weight": "oi", "second/weight": "oi"})
def an_equinox_module_passed_whole():
    model = EquinoxModel(jax.random.key(0))
    return lambda model, x: jax.vmap(jax.vmap(model))(x), model, (x(),)


@construct({"linear/w": "io", "linear_1/w": "io"})
def haiku_layers():
    def forward(x):
        return hk.Linear(4)(jnp.tanh(hk.Linear(6)(x)))

    model = hk.without_apply_rng(hk.transform(forward))
    return model.apply, filled(jax.eval_shape(model.init, jax.random.key(0), x())), (x(),)
