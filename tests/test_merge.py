"""Merging adapters into weights, and taking them out again."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import rslora_jax as rl

KEY = jax.random.key(0)
X = np.random.default_rng(5).normal(size=(4, 8)).astype(np.float32)
RNG_SEED = 11


def random(*shape, dtype=jnp.float32):
    rng = np.random.default_rng([RNG_SEED, *shape])
    return jnp.asarray(rng.normal(size=shape) * 0.4, dtype)


def adapted(apply_fn, params, *args, targets):
    config = rl.LoraConfig(rank=2, alpha=3.0, targets=targets)
    found, apply, sites = rl.adapt(apply_fn, params, *args, config=config, key=KEY)
    lora = jax.tree.map(lambda leaf: random(*leaf.shape, dtype=leaf.dtype), found.lora)
    return found._replace(lora=lora), apply, sites


def dense(dtype=jnp.float32):
    params = {"w": random(8, 6, dtype=dtype), "v": random(6, 4, dtype=dtype)}
    x = jnp.asarray(X, dtype)
    return adapted(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, x, targets=["w", "v"])


def assert_close(one, other, tolerance):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def test_the_merged_weight_is_base_plus_scale_times_a_times_b():
    params, _, sites = dense()
    merged = rl.merge(params, sites)
    for name in ("w", "v"):
        a, b = (np.asarray(params.lora[name][k], np.float64) for k in "ab")
        assert_close(merged[name], np.asarray(params.base[name]) + 3 / np.sqrt(2) * a @ b, 1e-6)


def test_merging_no_adapter_gives_the_base():
    params, _, sites = dense()
    merged = rl.merge(rl.LoraParams(params.base, {}), sites)
    assert all(merged[name] is params.base[name] for name in params.base)


def test_merging_does_not_touch_the_base():
    params, _, sites = dense()
    before = jax.tree.map(np.array, params.base)
    rl.merge(params, sites)
    jax.tree.map(np.testing.assert_array_equal, params.base, before)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_weight_is_the_float32_sum_rounded_once(dtype):
    # Powers of two: every product and sum is exact in float32, and only the cast rounds.
    site = rl.Site("w", "io", (2, 3), jnp.dtype(dtype).name, rank=2, alpha=1.0, scale=0.5)
    base = jnp.array([[1.0, -1.0, 2.0], [0.5, 4.0, -8.0]], dtype)
    a = jnp.array([[2.0**-6, 2.0**-9], [2.0**-7, -(2.0**-8)]], jnp.float32)
    b = jnp.array([[1.0, 2.0, 4.0], [-2.0, 1.0, 0.5]], jnp.float32)
    merged = rl.merge(rl.LoraParams({"w": base}, {"w": {"a": a, "b": b}}), [site])["w"]
    exact = np.asarray(base, np.float32) + 0.5 * np.asarray(a) @ np.asarray(b)
    assert merged.dtype == dtype
    assert np.array_equal(merged, jnp.asarray(exact, jnp.float32).astype(dtype))


def test_a_float64_weight_is_merged_in_float64():
    with jax.enable_x64(True):
        params, _, sites = dense(jnp.float64)
        merged = rl.merge(params, sites)
        assert merged["w"].dtype == jnp.float64
        a, b = (np.asarray(params.lora["w"][k]) for k in "ab")
        assert a.dtype == np.float64
        assert_close(merged["w"], np.asarray(params.base["w"]) + 3 / np.sqrt(2) * a @ b, 1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.float64, 1e-15)])
def test_unmerging_restores_the_base_to_rounding(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        params, _, sites = dense(dtype)
        back = rl.unmerge(rl.merge(params, sites), params.lora, sites)
        assert isinstance(back, rl.LoraParams)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        for name in ("w", "v"):
            assert back.base[name].dtype == dtype
            assert_close(back.base[name], params.base[name], tolerance)


def test_unmerging_bfloat16_is_refused_with_the_path_and_the_advice():
    params, _, sites = dense(jnp.bfloat16)
    merged = rl.merge(params, sites)
    with pytest.raises(rl.AdapterError, match=r"'[wv]' is bfloat16.*Keep the base tree"):
        rl.unmerge(merged, params.lora, sites)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_factor_of_a_stack_that_is_not_finite_is_refused_with_the_path(bad):
    params = {"layers": {"kernel": random(3, 8, 8)}}
    found, _, sites = adapted(
        lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"]["kernel"]),
        params,
        X,
        targets=["kernel"],
    )
    a = found.lora["layers"]["kernel"]["a"].at[1, 0, 0].set(bad)
    lora = {"layers": {"kernel": {**found.lora["layers"]["kernel"], "a": a}}}
    with pytest.raises(rl.AdapterError, match=r"'layers/kernel' gives 8 of 192 values .*finite"):
        rl.merge(rl.LoraParams(found.base, lora), sites)


@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 8, 6), "bio"), ((8, 3, 6), "ibo"), ((2, 3, 8, 2, 3), "bbioo")]
)
def test_a_stack_is_merged_layer_by_layer_in_one_product(shape, axes):
    site = rl.Site("w", axes, shape, "float32", rank=2, alpha=2.0, scale=1.5)
    a, b = (random(*s) for s in site.factor_shapes)
    params = rl.LoraParams({"w": random(*shape)}, {"w": {"a": a, "b": b}})
    merged = rl.merge(params, [site])["w"]
    stacked = [k for k, letter in enumerate(axes) if letter == "b"]
    layers = np.moveaxis(np.asarray(merged), stacked, range(len(stacked)))
    originals = np.moveaxis(np.asarray(params.base["w"]), stacked, range(len(stacked)))
    for index in np.ndindex(layers.shape[: len(stacked)]):
        delta = np.asarray(a[index]) @ np.asarray(b[index]).reshape(2, -1)
        expected = originals[index] + 1.5 * delta.reshape(layers[index].shape)
        assert_close(layers[index], expected, 1e-6)


def test_merging_a_deeper_stack_takes_no_more_operations():
    def operations(layers):
        site = rl.Site("w", "bio", (layers, 8, 6), "float32", rank=2, alpha=2.0, scale=1.5)
        a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in site.factor_shapes)
        base = {"w": jax.ShapeDtypeStruct((layers, 8, 6), jnp.float32)}
        params = rl.LoraParams(base, {"w": {"a": a, "b": b}})
        closed = jax.make_jaxpr(lambda params: rl.merge(params, [site]))(params)
        return str(closed).count("=")

    assert operations(2) == operations(200)


def test_a_frozen_dict_stays_one():
    layer = nn.Dense(6)
    variables = FrozenDict(layer.init(KEY, X))
    params, apply, sites = adapted(layer.apply, variables, X, targets=["kernel"])
    merged = rl.merge(params, sites)
    assert isinstance(merged, FrozenDict)
    assert isinstance(merged["params"], FrozenDict)
    assert_close(layer.apply(merged, X), apply(params, X), 1e-5)
    assert isinstance(rl.unmerge(merged, params.lora, sites).base, FrozenDict)


def test_partitioned_boxes_keep_their_names():
    init = nn.with_partitioning(nn.initializers.ones, ("embed", "mlp"))
    layer = nn.Dense(6, kernel_init=init)
    variables = layer.init(KEY, X)
    params, apply, sites = adapted(layer.apply, variables, X, targets=["kernel"])
    merged = rl.merge(params, sites)
    box = merged["params"]["kernel"]
    assert isinstance(box, nn.Partitioned)
    assert box.names == ("embed", "mlp")
    assert nn.get_partition_spec(merged) == nn.get_partition_spec(variables)
    assert_close(layer.apply(merged, X), apply(params, X), 1e-5)


def test_an_nnx_state_stays_one_and_updates_the_model():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    params, apply, sites = adapted(
        lambda state, x: nnx.merge(graph, state)(x), state, X, targets=["kernel"]
    )
    merged = rl.merge(params, sites)
    assert isinstance(merged, nnx.State)
    assert isinstance(merged["kernel"], nnx.Param)
    expected = apply(params, X)
    nnx.update(model, merged)  # the model shares its variables with the base: that moves too
    assert_close(model(X), expected, 1e-5)


def test_an_equinox_module_stays_one_and_can_be_called():
    module = eqx.nn.MLP(8, 4, 6, 1, activation=jnp.tanh, key=KEY)
    params, apply, sites = adapted(
        lambda module, x: jax.vmap(module)(x), module, X, targets=["weight"]
    )
    merged = rl.merge(params, sites)
    assert isinstance(merged, eqx.nn.MLP)
    assert merged.activation is module.activation
    assert_close(jax.vmap(merged)(X), apply(params, X), 1e-5)


def test_merging_under_jit_equals_merging_eagerly():
    params, _, sites = dense()
    eager, compiled = rl.merge(params, sites), jax.jit(lambda p: rl.merge(p, sites))(params)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), eager, compiled)


def test_gradients_flow_through_the_merge_to_base_and_factors():
    params, _, sites = dense()
    grads = jax.grad(lambda params: rl.merge(params, sites)["w"].sum())(params)
    np.testing.assert_allclose(grads.base["w"], np.ones((8, 6)))
    scale, b = 3 / np.sqrt(2), np.asarray(params.lora["w"]["b"])
    np.testing.assert_allclose(
        grads.lora["w"]["a"], np.tile(scale * b.sum(1), (8, 1)), rtol=1e-5, atol=1e-6
    )
    assert not np.any(grads.lora["v"]["a"])


def test_a_stack_of_adapters_can_be_merged_with_vmap():
    params, _, sites = dense()
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, leaf * 0]), params.lora)
    merged = jax.vmap(lambda lora: rl.merge(rl.LoraParams(params.base, lora), sites))(stack)
    assert merged["w"].shape == (3, 8, 6)
    assert np.array_equal(merged["w"][2], params.base["w"])


def test_numpy_weights_are_merged():
    params, _, sites = dense()
    numpy = jax.tree.map(np.asarray, params)
    merged = rl.merge(numpy, sites)
    jax.tree.map(np.testing.assert_array_equal, merged, rl.merge(params, sites))
