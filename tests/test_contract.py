"""The contract: every construct of the table x every property that adapters promise."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rl
from rslora_jax import norms
from rslora_jax.factors import factors_of
from rslora_jax.taps import SUMS, tap, untap
from tests.constructs import CONSTRUCTS
from tests.quick import compiled, is_array, run

RANK, ALPHA = 2, 3.0
ALL = sorted(CONSTRUCTS)
every_construct = pytest.mark.parametrize("name", ALL)
every_tapped = pytest.mark.parametrize(
    "name",
    [
        "a_batched_product",
        "a_fused_kernel_split_in_three",
        "a_gather_of_one_expert_for_each_token",
        "a_scan_in_a_scan",
        "a_tied_embedding",
        "a_weight_divided_and_negated",
        "a_weight_used_in_both_orientations",
        "an_einsum_of_every_token_with_every_expert",
        "axes_merged_by_reshape",
        "cond",
        "hand_written_einsums",
        "linen_conv_2d",
        "linen_scan_of_remat",
        "ragged_dot",
        "shard_map_with_a_replicated_weight",
    ],
)
every_double = pytest.mark.parametrize("name", [n for n in ALL if CONSTRUCTS[n].double])
half_a_dozen = pytest.mark.parametrize(
    "name",
    [
        "a_tied_embedding",
        "custom_vjp_with_a_rule_of_its_own",
        "linen_attention",
        "nnx_scan_of_remat",
        "plain_products",
        "ragged_dot",
    ],
)


def is_floating(leaf):
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def cast(tree, dtype):
    """A tree in another dtype; statistics stay in float32 beside half precision."""

    def one(keys, leaf):
        statistic = {"mean", "var"} & set(
            jax.tree_util.keystr(keys, simple=True, separator=" ").split()
        )
        kept = statistic and jnp.finfo(dtype).bits < 32
        # Through NumPy, where nothing is compiled.
        cast_it = is_floating(leaf) and not kept
        return jnp.asarray(np.asarray(leaf).astype(dtype)) if cast_it else leaf

    return jax.tree_util.tree_map_with_path(one, tree)


def abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf, tree
    )


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf)]


def random_like(structs, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), structs
    )


def at_initialization(lora):
    """The factors with every `b` at zero."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: np.zeros_like(leaf) if keys[-1].key == "b" else leaf, lora
    )


@functools.cache
def model(name, dtype="float32"):
    """A construct's `(apply_fn, args, params, apply, sites)` in one dtype, with random factors."""
    apply_fn, base, args = CONSTRUCTS[name].build()
    base, args = cast(base, dtype), cast(args, dtype)
    config = rl.LoraConfig(rank=RANK, alpha=ALPHA, targets=list(CONSTRUCTS[name].axes))
    adapted = rl.adapt(apply_fn, abstract(base), *args, config=config, key=jax.random.key(0))
    params = rl.LoraParams(base, random_like(adapted.params.lora))
    return apply_fn, args, params, adapted.apply, adapted.sites


def differentiated(function, lora, args, *, reverse):
    """The outputs, and derivatives with respect to the factors and floating inputs."""
    leaves, treedef = jax.tree.flatten(args)
    places = [k for k, leaf in enumerate(leaves) if is_floating(leaf)]

    def outputs(lora, values):
        filled = dict(enumerate(leaves)) | dict(zip(places, values, strict=True))
        outs = function(lora, *jax.tree.unflatten(treedef, list(filled.values())))
        return floats(outs), outs

    at = (lora, [leaves[k] for k in places])
    if not reverse:
        _, tangents, outs = jax.jvp(outputs, at, jax.tree.map(jnp.cos, at), has_aux=True)
        return outs, tangents
    values, pullback, outs = jax.vjp(outputs, *at, has_aux=True)
    return outs, pullback([jnp.cos(3 * value + 1) for value in values])


class Compared(NamedTuple):
    """What one compiled program tells about a construct, so that many tests can read it."""

    adapted: Any
    merged: Any
    weights: Any
    unmerged: Any


@functools.cache
def comparison(name, dtype):
    """Makes `differentiated` of the adapted function, and of the original when merged."""
    apply_fn, _, _, apply, sites = model(name, dtype)
    reverse = CONSTRUCTS[name].reverse

    def compare(base, lora, args):
        weights = rl.merge(rl.LoraParams(base, lora), sites)
        functions = (
            lambda lora, *args: apply(rl.LoraParams(base, lora), *args),
            lambda lora, *args: apply_fn(rl.merge(rl.LoraParams(base, lora), sites), *args),
        )
        results = (differentiated(f, lora, args, reverse=reverse) for f in functions)
        return Compared(*results, weights, rl.unmerge(weights, lora, sites))

    return compiled(compare)


def both(name, dtype, lora):
    _, args, params, _, _ = model(name, dtype)
    return comparison(name, dtype)(params.base, lora, args)


@functools.cache
def result(name, dtype):
    return both(name, dtype, model(name, dtype)[2].lora)


@functools.cache
def at_zero_b(name):
    """The outputs of the adapted function and of the merged model at zero `b`, compiled."""
    results = both(name, "float32", at_initialization(model(name)[2].lora))
    return results.adapted[0], results.merged[0]


def assert_close(found, expected, tolerance):
    """Each leaf agrees relative to its largest entry; what is zero must be zero exactly."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for pair in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(leaf, np.float64) for leaf in pair)
        assert one.shape == other.shape
        assert np.isfinite(other).all()
        worst = np.abs(one - other).max(initial=0)
        assert worst <= tolerance * np.abs(other).max(initial=0)


def same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@every_construct
def test_every_weight_is_found_with_its_axes(name):
    construct = CONSTRUCTS[name]
    apply_fn, params, args = construct.build()
    sites = rl.find_sites(apply_fn, params, *args)
    assert {site.path: site.axes for site in sites} == construct.axes
    assert {site.path for site in sites if site.embedding} == construct.embeddings
    if construct.heads is not None:
        assert {site.path for site in sites if site.head} == construct.heads


@every_construct
def test_abstract_arguments_find_the_same_sites(name):
    apply_fn, params, args = CONSTRUCTS[name].build()
    concrete = rl.find_sites(apply_fn, params, *args)
    found = rl.find_sites(apply_fn, abstract(params), *abstract(args))
    assert found == concrete


@every_construct
def test_adapters_with_zero_b_change_no_bit_of_the_eager_outputs(name):
    apply_fn, args, params, apply, _ = model(name)
    start = params._replace(lora=at_initialization(params.lora))
    same_bits(apply(start, *args), apply_fn(params.base, *args))


@every_construct
def test_adapters_with_zero_b_change_nothing_when_compiled(name):
    assert_close(*at_zero_b(name), 1e-6)


@every_construct
def test_outputs_equal_those_of_the_merged_model(name):
    assert_close(result(name, "float32").adapted[0], result(name, "float32").merged[0], 1e-5)


@every_construct
def test_gradients_equal_those_through_the_merged_model(name):
    assert_close(result(name, "float32").adapted[1], result(name, "float32").merged[1], 1e-4)


@every_double
def test_outputs_equal_those_of_the_merged_model_in_float64(name):
    with jax.enable_x64(True):
        (adapted, _), (merged, _), *_ = result(name, "float64")
        assert all(out.dtype == jnp.float64 for out in floats(adapted))
        assert_close(adapted, merged, 1e-12)


@every_double
def test_gradients_equal_those_through_the_merged_model_in_float64(name):
    with jax.enable_x64(True):
        (_, adapted), (_, merged), *_ = result(name, "float64")
        assert_close(adapted, merged, 1e-10)


@every_construct
def test_adapters_change_the_outputs(name):
    base, moved = floats(at_zero_b(name)[0]), floats(result(name, "float32").adapted[0])
    pairs = zip(map(np.asarray, base), map(np.asarray, moved), strict=True)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in pairs)


@functools.cache
def tapped(name):
    """The float32 outputs, the derivatives, and the taps' share of them: `{path: taps}`."""
    _, args, params, apply, sites = model(name)

    def function(base, lora, args):
        adapted = functools.partial(with_base, apply, base)
        outs, (grads, *rest) = differentiated(adapted, lora, args, reverse=True)
        grads, taps = untap(grads, sites)
        return outs, (grads, *rest), taps

    return compiled(function)(params.base, tap(params.lora, sites, spectral=True), args)


def with_base(apply, base, lora, *args):
    return apply(rl.LoraParams(base, lora), *args)


@every_tapped
def test_taps_change_no_output_and_no_gradient(name):
    outs, derivatives, _ = tapped(name)
    plain_outs, plain_derivatives = result(name, "float32").adapted
    assert_close(outs, plain_outs, 1e-6)
    assert_close(derivatives, plain_derivatives, 1e-5)


@every_tapped
def test_taps_see_in_each_module_at_least_the_work_that_the_adapter_does_there(name):
    """<b, grad b> is the inner product of output and its gradient, and of input and its own."""
    _, (grads, *_), taps = tapped(name)
    _, _, params, _, sites = model(name)
    lora, grads = (factors_of(tree, sites) for tree in (params.lora, grads))
    for site in sites:
        sums = {n: taps[site.path]["sums"][..., k] for k, n in enumerate(SUMS)}
        work = np.abs(norms.inner(site, lora[site.path], grads[site.path])["b"])
        assert np.all(work**2 <= 1.001 * sums["output_2"] * sums["output_grad_2"])
        if not site.embedding:
            assert np.all(work**2 <= 1.001 * sums["input_2"] * sums["input_grad_2"])


@every_construct
def test_compiled_outputs_equal_eager_ones(name):
    _, args, params, apply, _ = model(name)
    assert_close(apply(params, *args), result(name, "float32").adapted[0], 1e-5)


def variants(args):
    """Two sets of inputs, stacked along a new first axis."""

    def other(leaf):
        if is_floating(leaf):
            return np.asarray(leaf) * 0.7 + 0.1
        return np.flip(leaf) if leaf.ndim else np.asarray(leaf) - 1

    return jax.tree.map(lambda leaf: np.stack([leaf, other(leaf)]).astype(leaf.dtype), args)


def nth(tree, k):
    return jax.tree.map(lambda leaf: leaf[k], tree)


def two_adapters(lora):
    return jax.tree.map(lambda leaf: np.stack([leaf, np.cos(7 * leaf)]), lora)


@functools.cache
def mapped(name):
    """The outputs for two inputs and those for two adapters, each by a `vmap`."""
    _, args, params, apply, _ = model(name)
    construct = CONSTRUCTS[name]

    def map_both(base, lora, args, inputs, adapters):
        over_inputs = jax.vmap(lambda *x: apply(rl.LoraParams(base, lora), *x))
        over_adapters = jax.vmap(lambda lora: apply(rl.LoraParams(base, lora), *args))
        return (
            over_inputs(*inputs) if construct.batched else None,
            over_adapters(adapters) if construct.stackable else None,
        )

    return run(map_both, *params, args, variants(args), two_adapters(params.lora))


def once(name, lora, args):
    """The outputs for one input and one adapter."""
    return comparison(name, "float32")(model(name)[2].base, lora, args).adapted[0]


@pytest.mark.parametrize("name", [n for n in ALL if CONSTRUCTS[n].batched])
def test_vmap_over_inputs_equals_a_loop(name):
    _, args, params, _, _ = model(name)
    for k in range(2):
        alone = once(name, params.lora, nth(variants(args), k))
        assert_close(nth(mapped(name)[0], k), alone, 1e-5)


@pytest.mark.parametrize("name", [n for n in ALL if CONSTRUCTS[n].stackable])
def test_vmap_over_a_stack_of_adapters_equals_a_loop(name):
    _, args, params, _, _ = model(name)
    for k in range(2):
        alone = once(name, nth(two_adapters(params.lora), k), args)
        assert_close(nth(mapped(name)[1], k), alone, 1e-5)


def assert_close_in_half_precision(name, dtype, tolerance):
    """Base and inputs in `dtype`, factors in float32, against the merged float32 model."""
    apply_fn, args, params, apply, sites = model(name, dtype)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params.lora))
    originals = []

    def adapt_and_merge(params, args):
        originals.append(abstract(apply_fn(params.base, *args)))
        return apply(params, *args), rl.merge(params, sites)

    adapted, merged = run(adapt_and_merge, params, args)
    wide = (cast(tree, jnp.float32) for tree in (params.base, params.lora, args))
    reference, _ = comparison(name, "float32")(*wide).merged
    assert_same_types(merged, params.base)
    assert_same_types(abstract(adapted), originals[0])
    assert_close(floats(adapted), floats(reference), tolerance)


def assert_same_types(found, expected):
    assert type(found) is type(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if is_array(other):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        else:
            assert one is other


@every_construct
def test_bfloat16_models_and_merged_weights_keep_their_dtype_and_stay_near_the_float32_model(name):
    # bfloat16 keeps 8 bits: one rounding is 0.4 %, and a model here chains up to twenty.
    assert_close_in_half_precision(name, jnp.bfloat16, 4e-2)


@half_a_dozen
def test_float16_models_keep_their_dtype_and_stay_near_the_float32_model(name):
    # float16 keeps 11 bits: eight times the precision of bfloat16.
    assert_close_in_half_precision(name, jnp.float16, 5e-3)


@every_construct
def test_merged_weights_keep_structure_and_dtypes_and_can_be_unmerged(name):
    _, _, params, _, sites = model(name)
    _, _, merged, back = result(name, "float32")
    assert_same_types(merged, params.base)
    pairs = list(zip(floats(merged), floats(params.base), strict=True))
    assert sum(not np.array_equal(one, other) for one, other in pairs) == len(sites)
    assert_same_types(back, params)
    assert_close(floats(back.base), floats(params.base), 1e-6)
