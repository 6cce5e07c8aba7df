"""Optimizer states follow the factors, and both are made where they lie."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from rslora_jax.factors import init
from rslora_jax.paths import AdapterError, flatten
from rslora_jax.sharding import Policy, init_sharded, optimizer_shardings, shardings, specs
from rslora_jax.sharding.creation import initializer

KEY = jax.random.key(7)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SPECS = {"layers": {"w": P(None, "fsdp", "tensor")}, "v": P("fsdp", "tensor")}
SITES = [
    rl.Site("layers/w", "bio", (3, 16, 8), "float32", rank=16, alpha=1.0, scale=1.0),
    rl.Site("v", "io", (16, 8), "float32", rank=16, alpha=1.0, scale=1.0),
]
CONFIG = rl.LoraConfig(rank=16)


def mesh_of(types, sizes=(4, 2)):
    return jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(types,) * 2)


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


LORA = {
    "layers": {"w": {"a": struct(3, 16, 16), "b": struct(3, 16, 8)}},
    "v": {"a": struct(16, 16), "b": struct(16, 8)},
}
PLACES = specs(SPECS, SITES, Policy(without=("tensor",), rank="tensor"))
PARAMS = rl.LoraParams({"layers": {"w": struct(3, 16, 8)}, "v": struct(16, 8)}, LORA)
MASK = {"layers": {"w": {"a": True, "b": True}}, "v": {"a": False, "b": False}}

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.trace(0.9), optax.ema(0.9)
    ),
    "masked": lambda: optax.masked(optax.adam(1e-3), MASK),
    "partition": lambda: optax.partition(
        {"a": optax.adam(1.0), "b": optax.sgd(1.0, momentum=0.9)}, rl.optim.labels
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-3), 4),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(1.0, 0.0, 10)
    ),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4, momentum=0.9),
    "adafactor, small factors": lambda: optax.adafactor(1e-3),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-3),
    "lookahead": lambda: optax.apply_if_finite(optax.lion(1e-3), 3),
    "freeze_base": lambda: rl.optim.freeze_base(optax.MultiSteps(optax.adam(1e-3), 2)),
    "lora_plus": lambda: rl.optim.lora_plus(1e-3),
    "records": lambda: rl.optim.record_norms(optax.adam(1e-3), SITES, capacity=4),
}


def padded(sharding, ndim):
    spec = tuple(getattr(sharding, "spec", None) or ())
    return spec + (None,) * (ndim - len(spec))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_as_jax_types_the_state_of_sharded_factors(name):
    tx, mesh = OPTIMIZERS[name](), mesh_of(EXPLICIT)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), PLACES)
    typed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), LORA, places
    )
    with jax.set_mesh(mesh):
        want = jax.eval_shape(tx.init, typed)
    found = optimizer_shardings(tx, LORA, places)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for path, x, place in zip(*flatten(want)[:2], jax.tree.leaves(found), strict=True):
        assert padded(place, x.ndim) == padded(x.sharding, x.ndim), path
        assert place.mesh == mesh
    bare = optimizer_shardings(tx, LORA, PLACES)
    assert jax.tree.map(lambda place: place.spec, found) == bare


def test_the_factored_moments_of_adafactor_lack_the_axis_that_their_factor_has():
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    lora = {"w": {"a": struct(3, 32, 16), "b": struct(3, 16, 32)}}
    places = {"w": {"a": P("stage", "fsdp", "tensor"), "b": P("stage", None, "tensor")}}
    state = optimizer_shardings(tx, lora, places)
    assert state.v_row == {"w": {"a": P("stage", "tensor"), "b": P("stage", None)}}
    assert state.v_col == {"w": {"a": P("stage", "fsdp"), "b": P("stage", "tensor")}}
    assert state.v == {"w": {"a": P(), "b": P()}}
    assert state.count == P()


def test_the_rows_of_a_square_factor_lack_its_second_axis():
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    lora = {"w": {"a": struct(16, 16), "b": struct(16, 8)}}
    places = {"w": {"a": P("fsdp", "tensor"), "b": P("tensor", None)}}
    state = optimizer_shardings(tx, lora, places)
    assert (state.v_row["w"]["a"], state.v_col["w"]["a"]) == (P("fsdp"), P("tensor"))


def test_the_histories_of_lbfgs_have_their_factors_axes_behind_their_own():
    places = optimizer_shardings(optax.scale_by_lbfgs(memory_size=5), LORA, PLACES)
    assert places.params == PLACES
    assert places.diff_params_memory["v"]["a"] == P(None, *PLACES["v"]["a"])
    assert places.weights_memory == P()


def test_a_transform_of_whole_params_is_placed_by_the_whole_shardings():
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    places = shardings(mesh, PARAMS, SITES, SPECS)
    frozen = optimizer_shardings(rl.optim.freeze_base(optax.adam(1.0)), PARAMS, places)
    assert frozen[0].mu == places.lora
    assert frozen == optimizer_shardings(optax.adam(1.0), LORA, places.lora)
    assert frozen == optimizer_shardings(optax.adam(1.0), LORA, places)
    assert frozen == optimizer_shardings(rl.optim.freeze_base(optax.adam(1.0)), PARAMS, places.lora)
    masked = optax.masked(optax.adam(1.0), rl.optim.trainable_mask)
    assert optimizer_shardings(masked, PARAMS, places).inner_state[0].nu.lora == places.lora
    whole = optimizer_shardings(optax.adam(1.0), PARAMS, places)
    assert whole[0].mu == places
    assert whole[0].count.is_fully_replicated


def test_a_factor_whose_path_ends_another_ones_is_told_apart():
    lora = {"w": {"a": struct(4, 2), "b": struct(2, 4)}}
    lora["layers"] = {"w": dict(lora["w"])}
    places = {"w": {"a": P("x"), "b": P("y")}, "layers": {"w": {"a": P("z"), "b": P()}}}
    padded = jax.tree.map(lambda spec: P(*spec, *[None] * (2 - len(spec))), places)
    assert optimizer_shardings(optax.adam(1.0), lora, places)[0].mu == padded


def test_moments_of_the_base_are_not_placed_unasked():
    with pytest.raises(
        AdapterError, match=r"'0/mu/base/layers/w', which belongs to the base.*freeze_base"
    ):
        optimizer_shardings(optax.adam(1.0), PARAMS, PLACES)


def test_shardings_of_other_factors_are_refused():
    with pytest.raises(AdapterError, match=r"do not fit the parameters: 'v/b' is in one of them"):
        optimizer_shardings(optax.adam(1.0), LORA, {**PLACES, "v": {"a": P()}})
    with pytest.raises(AdapterError, match=r"do not fit the sites: 'v/b' is in one of them"):
        init_sharded(KEY, SITES, CONFIG, {**PLACES, "v": {"a": P()}})
    mesh = mesh_of(AUTO)
    wrong = jax.tree.map(lambda _: NamedSharding(mesh, P(("fsdp", "tensor"))), PLACES)
    with pytest.raises(AdapterError, match=r"Factor 'layers/w/a' has shape \(3, 16, 16\).*size 3"):
        init_sharded(KEY, SITES, CONFIG, wrong)
    with pytest.raises(AdapterError, match=r"placed by NamedShardings or PartitionSpecs, found 1"):
        init_sharded(KEY, SITES, CONFIG, jax.tree.map(lambda _: 1, PLACES))
    with pytest.raises(AdapterError, match=r"There is no mesh"):
        init_sharded(KEY, SITES, CONFIG, PLACES)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def model(p, x):
    return jnp.einsum("nbi,nio->nbo", x, p["layers"]["w"]).sum(0) @ p["v"].T


@functools.cache
def adapted(start="kaiming"):
    base = {"layers": {"w": jnp.zeros((3, 16, 8))}, "v": jnp.zeros((16, 8))}
    config = rl.LoraConfig(rank=8, targets=".*", init=start)
    x = jnp.ones((3, 2, 16))
    return config, rl.adapt(model, base, x, config=config, key=KEY)


@pytest.mark.parametrize("start", ["kaiming", "normal"])
@pytest.mark.parametrize("sizes", [(1, 1), (4, 2)])
def test_created_factors_have_the_bits_that_adapt_gives_them(start, sizes):
    config, (params, _, sites) = adapted(start)
    places = shardings(mesh_of(AUTO, sizes), params, sites, SPECS)
    lora, state = init_sharded(KEY, sites, config, places.lora)
    assert state is None
    assert jax.tree.map(lambda x: x.sharding, lora) == places.lora
    assert bits(lora) == bits(params.lora)


@pytest.mark.parametrize("types", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_factors_and_state_are_created_under_a_mesh_from_bare_specs_and_any_key(types):
    config, (params, _, sites) = adapted()
    mesh, tx = mesh_of(types), rl.optim.freeze_base(optax.adam(1.0))
    with jax.set_mesh(mesh):
        key = jax.random.key(7)  # lies on the mesh
        lora, state = init_sharded(key, sites, config, PLACES, tx)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), PLACES)
    assert jax.tree.map(lambda x: x.sharding, lora) == places
    assert jax.tree.map(lambda x: x.sharding, state) == optimizer_shardings(tx, lora, places)
    assert bits(lora) == bits(params.lora)
    assert bits(state) == bits(tx.init(params.lora))


def test_a_key_on_another_device_serves_too():
    config, (params, _, sites) = adapted()
    places = shardings(mesh_of(AUTO), params, sites, SPECS)
    key = jax.device_put(KEY, jax.devices()[3])
    assert bits(init_sharded(key, sites, config, places.lora)[0]) == bits(params.lora)


def test_keys_of_another_generator_give_the_bits_that_adapt_gives_too():
    config, (params, _, sites) = adapted()
    places = shardings(mesh_of(AUTO), params, sites, SPECS)
    key = jax.random.key(7, impl="rbg")
    assert bits(init_sharded(key, sites, config, places.lora)[0]) == bits(init(key, sites, config))


@pytest.mark.parametrize("types", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_no_device_ever_holds_a_whole_factor(types):
    site = rl.Site("w", "io", (1024, 1024), "float32", rank=64, alpha=1.0, scale=1.0)
    policy = Policy(without=("tensor",), rank="tensor")
    places = specs({"w": P("fsdp", "tensor")}, [site], policy)
    tx = rl.optim.freeze_base(optax.adam(1.0))
    with jax.set_mesh(mesh_of(types)):
        compiled = initializer([site], CONFIG, places, tx).lower(KEY).compile()
    # a, b and two moments of each, in float32: a is in 8 parts, b in 2.
    part, whole = 1024 * 64 * 4 // 8, 1024 * 64 * 4
    memory = compiled.memory_analysis()
    assert 0 <= memory.output_size_in_bytes - 3 * (part + whole // 2) < 256
    assert memory.temp_size_in_bytes < whole
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest == 1024 * 64 // 2
