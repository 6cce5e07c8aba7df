"""Arrays lie where the shardings say, on Auto and Explicit meshes, and jit takes the trees."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from rslora_jax.paths import AdapterError
from rslora_jax.sharding import optimizer_shardings, shard, shardings, specs

KEY = jax.random.key(7)
CONFIG = rl.LoraConfig(rank=4, targets=["w"])
SPECS = {"w": P("fsdp", "tensor"), "bias": P("tensor")}


@pytest.fixture(scope="module", params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(request.param,) * 2)


def model(p, x):
    return x @ p["w"] + p["bias"]


@functools.cache
def adapted():
    base = {"w": jnp.arange(128.0).reshape(8, 16), "bias": jnp.ones(16)}
    return rl.adapt(model, base, jnp.ones((2, 8)), config=CONFIG, key=KEY)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def placed(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def test_arrays_lie_where_the_shardings_say_with_the_values_they_had(mesh):
    params, _, sites = adapted()
    places = shardings(mesh, params, sites, SPECS)
    found = shard(params, mesh, sites, SPECS)
    assert placed(found) == places
    assert places.lora["w"]["a"] == NamedSharding(mesh, P("fsdp", None))
    assert places.base["w"] == NamedSharding(mesh, P("fsdp", "tensor"))
    jax.tree.map(np.testing.assert_array_equal, found, params)  # and `params` is still alive


def test_a_base_that_is_sharded_already_stays_where_it_is_and_draws_the_factors_along(mesh):
    params, _, sites = adapted()
    base = jax.device_put(params.base, {n: NamedSharding(mesh, s) for n, s in SPECS.items()})
    found = shard(params._replace(base=base), mesh, sites)
    for name in base:
        ours, theirs = (x.addressable_shards[0].data for x in (found.base[name], base[name]))
        assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()
    assert found.lora["w"]["b"].sharding == NamedSharding(mesh, P(None, "tensor"))


def test_a_base_on_one_device_is_replicated_with_its_factors_only_if_asked_to_be(mesh):
    params, _, sites = adapted()
    with pytest.raises(AdapterError, match=r"read off the base, and no weight.*Pass a source"):
        shard(params, mesh, sites)
    found = placed(shard(params, mesh, sites, [(".*", P())]))
    assert all(place.is_fully_replicated for place in jax.tree.leaves(found))


def test_a_misspelt_pattern_does_not_leave_all_weights_whole(mesh):
    params, _, sites = adapted()
    with pytest.raises(AdapterError, match=r"'W'.*are to split weights, and match none.*'w'"):
        shard(params, mesh, sites, [("W", P("fsdp", "tensor")), (".*", P())])


def test_patterns_passed_as_logical_rules_are_refused(mesh):
    params, _, sites = adapted()
    with pytest.raises(AdapterError, match=r"rules are logical axis rules.*as the source"):
        shard(params, mesh, sites, rules=[("w", P("fsdp", "tensor"))])


def test_a_weight_that_is_kept_in_the_hosts_memory_stays_there():
    params, _, sites = adapted()
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    host = NamedSharding(mesh, P("fsdp", "tensor"), memory_kind="pinned_host")
    base = {**params.base, "w": jax.device_put(params.base["w"], host)}
    found = shard(params._replace(base=base), mesh, sites)
    kinds = {x.sharding.memory_kind for x in (*jax.tree.leaves(found.lora), found.base["bias"])}
    assert (found.base["w"].sharding, kinds) == (host, {"device"})


def test_structs_get_the_shardings_attached(mesh):
    params, _, sites = adapted()
    found = shard(abstract(params), mesh, sites, SPECS)
    assert placed(found) == shardings(mesh, params, sites, SPECS)
    assert abstract(found) == abstract(params)
    again = shard(found, mesh, sites)
    assert placed(again) == placed(found)


def test_an_abstract_mesh_serves_structs():
    params, _, sites = adapted()
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    found = shard(abstract(params), mesh, sites, SPECS)
    assert found.lora["w"]["a"].sharding == NamedSharding(mesh, P("fsdp", None))


def test_the_mesh_that_is_set_serves_when_none_is_given(mesh):
    params, _, sites = adapted()
    with jax.set_mesh(mesh):
        found = shard(params, None, sites, SPECS)
    assert placed(found) == shardings(mesh, params, sites, SPECS)


def test_boxes_of_flax_stay_round_the_shardings_of_their_arrays(mesh):
    init = nn.with_partitioning(nn.initializers.ones, ("fsdp", "tensor"))
    layer = nn.Dense(16, kernel_init=init)
    variables = layer.init(KEY, jnp.ones((2, 8)))
    config = rl.LoraConfig(rank=4, targets=".*kernel")
    params, _, sites = rl.adapt(layer.apply, variables, jnp.ones((2, 8)), config=config, key=KEY)
    places = shardings(mesh, params, sites)
    assert jax.tree.structure(places) == jax.tree.structure(params)
    found = shard(params, mesh, sites)
    assert found.base["params"]["kernel"].value.sharding.spec == P("fsdp", "tensor")
    assert found.lora["params"]["kernel"]["a"].sharding.spec == P("fsdp", None)


def test_a_base_without_adapters_can_be_placed(mesh):
    params, _, sites = adapted()
    assert shardings(mesh, rl.LoraParams(params.base, {}), sites, SPECS).lora == {}


def step_of(apply, tx):
    @rl.value_and_grad
    def loss_of(params, x):
        return jnp.mean(apply(params, x) ** 2)

    def step(params, state, x):
        loss, grads = loss_of(params, x)
        updates, state = tx.update(grads, state, params.lora)
        return rl.optim.apply_updates(params, updates), state, loss

    return step


def test_jit_takes_the_trees_as_in_and_out_shardings_and_donates_what_they_place(mesh):
    params, apply, sites = adapted()
    tx = rl.optim.freeze_base(optax.adamw(0.1))
    step, x = step_of(apply, tx), jnp.linspace(-1.0, 1.0, 16).reshape(2, 8)
    want, _, want_loss = jax.jit(step)(params, tx.init(params), x)

    source = {"w": P(None, "tensor"), "bias": P("tensor")}
    places = shardings(mesh, params, sites, source)
    state_places = optimizer_shardings(tx, params, places)
    sharded = shard(params, mesh, sites, source)
    state = jax.jit(tx.init, out_shardings=state_places)(sharded)
    everywhere = NamedSharding(mesh, P())
    fast = jax.jit(
        step,
        in_shardings=(places, state_places, everywhere),
        out_shardings=(places, state_places, everywhere),
        donate_argnums=(0, 1),
    )
    found, new_state, loss = fast(sharded, state, jax.device_put(x, everywhere))
    assert placed(found) == places
    assert placed(new_state) == state_places
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(sharded))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, want)


def test_bare_specs_serve_jit_under_the_mesh_that_is_set(mesh):
    params, _, sites = adapted()
    found = specs(SPECS, sites)
    with jax.set_mesh(mesh):
        halved = jax.jit(
            lambda lora: jax.tree.map(lambda x: x / 2, lora),
            in_shardings=(found,),
            out_shardings=found,
        )(params.lora)
    assert halved["w"]["a"].sharding == NamedSharding(mesh, P("fsdp", None))
    np.testing.assert_array_equal(halved["w"]["a"], params.lora["w"]["a"] / 2)


ERRORS = {
    "an axis that the mesh lacks": (
        {"w": P("fsdb", None), "bias": P()},
        "inherit",
        r"base weight 'w'.*no axis 'fsdb'.*nearest to 'fsdb' is 'fsdp'",
    ),
    "a size that does not divide, also where no adapter is": (
        {"w": P(), "bias": P(("fsdp", "tensor", "pod"))},
        "inherit",
        r"base weight 'bias' has shape \(16,\).*axis 0 has size 16.*'pod': 3\} do not divide into",
    ),
    "another structure": ({"w": P()}, "inherit", r"another structure than the base.*'bias'"),
    "a weight without a pattern": (
        [("w", P("fsdp"))],
        "inherit",
        r"No pattern gives the base weight 'bias' a spec.*\"\.\*\", PartitionSpec",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_base_that_does_not_fit_the_mesh_is_refused(case):
    source, policy, message = ERRORS[case]
    params, _, sites = adapted()
    mesh = AbstractMesh((2, 2, 3), ("fsdp", "tensor", "pod"))
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        shardings(mesh, params, sites, source, policy)


def test_what_is_no_mesh_and_no_lora_params_is_refused():
    params, _, sites = adapted()
    with pytest.raises(AdapterError, match=r"There is no mesh.*jax.set_mesh"):
        shardings(None, params, sites)
    with pytest.raises(AdapterError, match=r"A mesh is.*found tuple.*jax.make_mesh"):
        shardings((4, 2), params, sites)
    with pytest.raises(AdapterError, match=r"LoraParams that `adapt` returned, found dict"):
        shardings(AbstractMesh((1,), ("x",)), params.base, sites)
