"""Base specs are the same from every source that a model can keep them in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rslora_jax.paths import AdapterError
from rslora_jax.sharding import base_specs

RULES = [("embed", "fsdp"), ("mlp", "tensor"), ("layers", None)]
WANT = {"params/Dense_0/bias": P(None), "params/Dense_0/kernel": P("fsdp", "tensor")}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def boxed(wrapper, names=("fsdp", "tensor"), **options):
    init = wrapper(nn.initializers.zeros, names, **options)
    return jax.eval_shape(nn.Dense(4, kernel_init=init).init, jax.random.key(0), jnp.ones((1, 8)))


def linen(wrapper, names=("fsdp", "tensor"), **options):
    return {"params": {"Dense_0": boxed(wrapper, names, **options)["params"]}}


def plain():
    return nn.unbox(linen(nn.with_partitioning))


def placed(mesh, struct=jax.ShapeDtypeStruct):
    specs = {"bias": P(), "kernel": P("fsdp", "tensor")}
    layer = plain()["params"]["Dense_0"]
    return {
        "params": {
            "Dense_0": {
                name: struct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, specs[name]))
                for name, leaf in layer.items()
            }
        }
    }


def concrete(shape, dtype, sharding):
    return jax.device_put(np.zeros(shape, dtype), sharding)


SOURCES = {
    "a tree of specs": lambda mesh: nn.get_partition_spec(linen(nn.with_partitioning)),
    "a tree of shardings": lambda mesh: nn.get_sharding(linen(nn.with_partitioning), mesh),
    "abstract arrays": placed,
    "arrays": lambda mesh: placed(mesh, concrete),
    "boxes": lambda mesh: linen(nn.with_partitioning),
    "patterns": lambda mesh: [(".*kernel", P("fsdp", "tensor")), (".*", P())],
    "patterns of tuples": lambda mesh: ((".*kernel", NamedSharding(mesh, P("fsdp", "tensor"))),
                                        (".*", None)),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_a_linen_model_gives_the_same_specs(source, mesh):
    assert base_specs(SOURCES[source](mesh), plain()) == WANT


LOGICAL = {
    "boxes of logical axes": lambda: linen(nn.with_logical_partitioning, ("embed", "mlp")),
    "plain boxes with logical names": lambda: linen(nn.with_partitioning, ("embed", "mlp")),
    "a tree of logical specs": lambda: nn.get_partition_spec(
        linen(nn.with_logical_partitioning, ("embed", "mlp"))
    ),
    "boxes of mesh axes": lambda: linen(nn.with_partitioning),
}


@pytest.mark.parametrize("source", LOGICAL)
def test_logical_axis_rules_map_logical_names_and_leave_mesh_axes_alone(source):
    assert base_specs(LOGICAL[source](), plain(), rules=RULES) == WANT


def test_logical_names_are_mapped_as_flax_maps_them():
    source = linen(nn.with_logical_partitioning, ("embed", "unlisted"))
    theirs = nn.logical_to_mesh(nn.get_partition_spec(source), RULES)
    assert base_specs(source, rules=RULES)["params/Dense_0/kernel"] == P("fsdp", None)
    assert theirs["params"]["Dense_0"]["kernel"] == P("fsdp", None)


def test_boxes_bring_their_own_rules_or_take_those_of_the_context():
    own = linen(nn.with_logical_partitioning, ("embed", "mlp"), rules=RULES)
    assert base_specs(own, plain()) == WANT
    with nn.logical_axis_rules(RULES):
        assert base_specs(LOGICAL["boxes of logical axes"](), plain()) == WANT


def test_logical_names_without_rules_are_refused():
    message = r"(?s)'params/Dense_0/kernel' has the logical axes \('embed', 'mlp'\).*Pass rules="
    with pytest.raises(AdapterError, match=message):
        base_specs(LOGICAL["boxes of logical axes"]())


def test_scanned_layers_keep_the_entry_of_their_stack():
    dense = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.zeros, ("fsdp", None)))
    body = nn.scan(
        lambda layer, x, _: (layer(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
        metadata_params={nn.PARTITION_NAME: "stage"},
    )

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(dense.copy(name="dense", parent=self), x, None)[0]

    variables = jax.eval_shape(Stack().init, jax.random.key(0), jnp.ones((1, 8)))
    assert base_specs(variables, variables)["params/dense/kernel"] == P("stage", "fsdp", None)


@pytest.mark.parametrize("logical", [False, True])
def test_an_nnx_state_speaks_by_its_metadata(logical, mesh):
    names, rules = (("embed", "mlp"), RULES) if logical else (("fsdp", "tensor"), None)
    init = nnx.with_partitioning(nnx.initializers.zeros, names)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules or ()):
        state = nnx.state(nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0)))
        theirs = nnx.get_partition_spec(state)
    want = {"bias": P(None), "kernel": P("fsdp", "tensor")}
    assert base_specs(state, state, rules=rules) == want
    assert base_specs(theirs, state) == want
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), theirs)
    assert base_specs(named, state) == want


def test_an_nnx_state_without_metadata_speaks_by_where_it_lies(mesh):
    state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    state = jax.device_put(state, NamedSharding(mesh, P("fsdp")))
    want = {"bias": P("fsdp"), "kernel": P("fsdp", None)}
    assert base_specs(state, state) == want
    assert base_specs(jax.tree.map(lambda x: x.sharding, state), state) == want


def test_what_lies_on_one_device_or_nowhere_is_not_sharded():
    tree = {
        "host": np.ones((4, 8)),
        "device": jnp.ones((4, 8)),
        "second": jax.device_put(jnp.ones((4, 8)), jax.devices()[1]),
        "struct": jax.ShapeDtypeStruct((4, 8), "float32"),
    }
    assert base_specs(tree, tree) == dict.fromkeys(sorted(tree), P(None, None))


def test_none_and_unconstrained_axes_are_not_sharded():
    tree = {"a": None, "b": P(P.UNCONSTRAINED, "fsdp"), "c": P((), "fsdp")}
    assert base_specs(tree) == {"a": P(), "b": P(None, "fsdp"), "c": P(None, "fsdp")}


def test_an_absent_bias_needs_no_spec_and_a_spec_of_none_serves_any_weight():
    params = {"w": jnp.ones((4, 8)), "bias": None}
    assert base_specs({"w": None, "bias": None}, params) == {"w": P(None, None)}


def test_the_first_pattern_wins_and_scalars_need_none():
    params = {"q": jnp.ones((4, 8)), "k": jnp.ones((4, 8)), "count": jnp.ones(()), "b": jnp.ones(3)}
    found = base_specs([("q", P("fsdp")), ("q|k", P(None, "fsdp"))], params)
    assert found == {"q": P("fsdp", None), "k": P(None, "fsdp"), "count": P()}


def test_under_a_jit_explicit_axes_are_read_from_the_types():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    w = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P("fsdp", "tensor")))
    found = []
    jax.eval_shape(lambda w: found.append(base_specs({"w": w})), w)
    assert found == [{"w": P("fsdp", "tensor")}]


PARAMS = {"w": jnp.ones((4, 8)), "bias": jnp.ones(8)}
ERRORS = {
    "missing paths": ({"w": P()}, r"no spec for 'bias'; specs without a parameter: none"),
    "extra paths": (
        {"w": P(), "bias": P(), "v": P()},
        r"no spec for none; specs without a parameter: 'v'",
    ),
    "a level too many": (
        {"params": {"w": P(), "bias": P()}},
        r"no spec for 'bias', 'w'; specs without a parameter: 'params/bias', 'params/w'.*nearest "
        r"to 'bias' are 'params/bias'.*same tree",
    ),
    "too many entries": (
        {"w": P(None, None, "fsdp"), "bias": P()},
        r"'w' has the spec P\(None, None, 'fsdp'\) with 3 entries.*2 axes",
    ),
    "no regex": ([("*", P())], r"'\*', which is no regular expression"),
    "a name for a spec": ({"w": "fsdp", "bias": P()}, r"'w' is read from a PartitionSpec.*'fsdp'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_source_that_does_not_fit_the_base_is_refused(case):
    source, message = ERRORS[case]
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        base_specs(source, PARAMS)


def test_patterns_without_paths_are_refused():
    with pytest.raises(AdapterError, match=r"need the paths.*base_specs\(rules, params\)"):
        base_specs([("w", P())])


def test_a_sharding_that_names_no_mesh_axes_is_refused():
    class Unnamed(jax.sharding.Sharding):
        is_fully_replicated = False

    with pytest.raises(AdapterError, match=r"'w' has the sharding.*names no mesh axes"):
        base_specs({"w": Unnamed()})
