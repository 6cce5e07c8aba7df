"""PartitionSpecs of the factors: by hand, against JAX's own sharding types, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from rslora_jax.axes import delta_subscripts
from rslora_jax.paths import AdapterError, lookup
from rslora_jax.sharding import DEFAULT, Policy, specs

MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))


def site(path, axes, shape, rank=4):
    return rl.Site(path, axes, shape, "float32", rank=rank, alpha=1.0, scale=1.0)


def pair(axes, shape, spec, policy=DEFAULT, **options):
    found = specs({"w": spec}, [site("w", axes, shape)], policy, **options)["w"]
    return tuple(found["a"]), tuple(found["b"])


CASES = {
    "a dense kernel": ("io", (8, 16), P("fsdp", "tensor"), ("fsdp", None), (None, "tensor")),
    "a transposed kernel": ("oi", (16, 8), P("fsdp", "tensor"), ("tensor", None), (None, "fsdp")),
    "a stack of layers": (
        "bio",
        (2, 8, 16),
        P("data", "fsdp", "tensor"),
        ("data", "fsdp", None),
        ("data", None, "tensor"),
    ),
    "heads as outputs": (
        "ioo",
        (8, 4, 16),
        P("fsdp", "tensor", "data"),
        ("fsdp", None),
        (None, "tensor", "data"),
    ),
    "heads as inputs": (
        "iio",
        (4, 8, 16),
        P("tensor", None, "fsdp"),
        ("tensor", None, None),
        (None, "fsdp"),
    ),
    "a stack on the last axis": (
        "iob",
        (8, 16, 2),
        P("fsdp", "tensor", "data"),
        ("data", "fsdp", None),
        ("data", None, "tensor"),
    ),
    "two mesh axes on one axis": (
        "io",
        (8, 16),
        P(("data", "fsdp"), "tensor"),
        (("data", "fsdp"), None),
        (None, "tensor"),
    ),
    "a spec shorter than the weight": (
        "bio",
        (2, 8, 16),
        P(None, "fsdp"),
        (None, "fsdp", None),
        (None, None, None),
    ),
    "an axis left to the compiler": (
        "io",
        (8, 16),
        P(P.UNCONSTRAINED, "tensor"),
        (None, None),
        (None, "tensor"),
    ),
    "no spec": ("io", (8, 16), None, (None, None), (None, None)),
    "an empty spec": ("io", (8, 16), P(), (None, None), (None, None)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_axis_of_a_factor_has_the_entry_of_the_weights_axis(case):
    axes, shape, spec, a, b = CASES[case]
    assert pair(axes, shape, spec, mesh=MESH) == (a, b)


@pytest.mark.parametrize("case", CASES)
def test_jax_gives_the_product_of_the_factors_the_spec_of_the_weight(case):
    axes, shape, spec, *_ = CASES[case]
    mesh = jax.make_mesh((2, 2, 2), MESH.axis_names, axis_types=(AxisType.Explicit,) * 3)
    shapes = site("w", axes, shape).factor_shapes
    with jax.set_mesh(mesh):
        structs = [
            jax.ShapeDtypeStruct(s, "float32", sharding=jax.NamedSharding(mesh, P(*entries)))
            for s, entries in zip(shapes, pair(axes, shape, spec), strict=True)
        ]
        found = jax.eval_shape(lambda a, b: jnp.einsum(delta_subscripts(axes), a, b), *structs)
    want = tuple(None if e is P.UNCONSTRAINED else e for e in spec or ())
    assert tuple(found.sharding.spec) == want + (None,) * (len(shape) - len(want))


POLICIES = {
    "inherit": (("data", "fsdp"), None, None, "tensor"),
    "replicated": (None, None, None, None),
    Policy(): (("data", "fsdp"), None, None, "tensor"),
    Policy(without=("fsdp",)): ("data", None, None, "tensor"),
    Policy(without=("data", "fsdp")): (None, None, None, "tensor"),
    Policy(without=("tensor",), rank="tensor"): (("data", "fsdp"), "tensor", "tensor", None),
    Policy(rank=("data", "tensor"), replicate=True): (None, *[("data", "tensor")] * 2, None),
    Policy(without="fsdp"): ("data", None, None, "tensor"),
}


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_says_what_is_taken_over_and_what_splits_the_rank(policy):
    a, b = pair("io", (8, 16), P(("data", "fsdp"), "tensor"), policy, mesh=MESH)
    assert (*a, *b) == POLICIES[policy]


def test_the_first_rule_that_matches_a_site_gives_its_policy_and_the_default_serves_the_rest():
    sites = [site(path, "io", (8, 16)) for path in ("layers/q", "layers/k", "out")]
    tree = dict.fromkeys((s.path for s in sites), P("fsdp", "tensor"))
    rules = [(".*/q", "replicated"), ("layers/.*", Policy(without=("fsdp",)))]
    found = specs(tree, sites, rules, mesh=MESH)
    assert found == {
        "layers": {
            "q": {"a": P(None, None), "b": P(None, None)},
            "k": {"a": P(None, None), "b": P(None, "tensor")},
        },
        "out": {"a": P("fsdp", None), "b": P(None, "tensor")},
    }


def test_specs_have_the_structure_of_the_adapter_tree():
    base = {"deep": {"w": jnp.ones((4, 8)), "v": jnp.ones((8, 8))}, "bias": jnp.ones(8)}
    params, _, sites = rl.adapt(
        lambda p, x: jnp.tanh(x @ p["deep"]["w"]) @ p["deep"]["v"] + p["bias"],
        base,
        jnp.ones((1, 4)),
        config=rl.LoraConfig(rank=2, targets=["w", "v"]),
        key=jax.random.key(0),
    )
    found = specs([(".*", P("fsdp"))], sites)
    assert jax.tree.structure(found) == jax.tree.structure(params.lora)


def test_no_device_holds_more_of_a_factor_than_its_share():
    draw = np.random.default_rng(0)
    names = [None, "data", "fsdp", "tensor"]
    for _ in range(100):
        axes = "".join(draw.permutation(list("io" + "".join(draw.choice(list("bio"), 2)))))
        spec = [names[k] for k in draw.permutation(4)]
        one = site("w", axes, (8,) * 4)
        found = specs({"w": P(*spec)}, [one], mesh=MESH)["w"]
        for name, role, shape in zip("ab", "io", one.factor_shapes, strict=True):
            split = sum(e is not None and r in ("b", role) for r, e in zip(axes, spec, strict=True))
            shards = jax.NamedSharding(MESH, found[name]).shard_shape(shape)
            assert np.prod(shards) * 2**split == np.prod(shape)


ERRORS = {
    "an unknown mesh axis": (
        {"w": P("fspd", None)},
        "inherit",
        r"base weight 'w' has the spec P\('fspd', None\).*no axis 'fspd'.*'fsdp': 2.*nearest to "
        r"'fspd' is 'fsdp'.*rules=",
    ),
    "an unknown axis in a policy": (
        {"w": P()},
        Policy(without=("fdsp",)),
        r"Policy\(without=\('fdsp',\).*asked for 'w'.*no axis 'fdsp'.*is 'fsdp'",
    ),
    "an axis that does not divide the weight": (
        {"w": P(None, ("fsdp", "tensor"))},
        "inherit",
        r"base weight 'w' has shape \(8, 6\).*axis 1 has size 6.*\{'fsdp': 2, 'tensor': 2\} do not "
        r"divide into 4",
    ),
    "an axis that does not divide the rank": (
        {"w": P()},
        Policy(rank="tensor"),
        r"Factor 'w/a' has shape \(8, 3\).*axis 1 \(the rank\) has size 3.*\{'tensor': 2\} do not",
    ),
    "a spec longer than the weight": (
        {"w": P(None, None, "fsdp")},
        "inherit",
        r"base weight 'w' has the spec P\(None, None, 'fsdp'\) with 3 entries.*\(8, 6\) has 2 axes",
    ),
    "an axis used for a role and the rank": (
        {"w": P(None, "tensor")},
        Policy(rank="tensor"),
        r"Factor 'w/b'.*mesh axis 'tensor' for axis 0 \(the rank\) and axis 1 \('o', axis 1 of the "
        r"weight\).*Policy\(without=\('tensor',\)",
    ),
    "an axis used twice in the weight": (
        {"w": P("fsdp", "fsdp")},
        "inherit",
        r"base weight 'w'.*mesh axis 'fsdp' for axis 0 and axis 1",
    ),
    "no base spec": (
        {"v": P(), "x": {"w": P()}},
        "inherit",
        r"no base spec for the site 'w'.*nearest of the 2 specs are for 'x/w'",
    ),
    "an unknown policy": (
        {"w": P()},
        "replicate",
        r"one of \['inherit', 'replicated'\].*found 'replicate'.*nearest is 'replicated'",
    ),
    "a policy of another type": ({"w": P()}, {"w": "inherit"}, r"found \{'w': 'inherit'\}"),
    "a policy for no site": (
        {"w": P()},
        [("v", "inherit")],
        r"sharding policy for 'v' matches nothing.*match a whole path.*nearest are 'w'",
    ),
    "a broken policy pattern": ({"w": P()}, [("(", "inherit")], r"'\(', which is no regular"),
    "a source of another kind": ({"w": "fsdp"}, "inherit", r"spec of 'w' is read from.*'fsdp'"),
    "a pattern without a site": ([("w2", P())], "inherit", r"no base spec for the site 'w'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_refused_by_site_axis_and_size(case):
    source, policy, message = ERRORS[case]
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        specs(source, [site("w", "io", (8, 6), rank=3)], policy, mesh=MESH)


def test_rules_of_a_family_may_match_nothing_here():
    rules = [(".*bias", P("tensor")), ("w", P("fsdp"))]
    assert lookup(specs(rules, [site("w", "io", (8, 6))]), "w/a") == P("fsdp", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without": ("",)}, r"without=.*name of a mesh axis"),
        ({"rank": 3}, r"rank=.*name of a mesh axis.*found 3"),
        ({"without": ("fsdp",), "replicate": True}, r"would do nothing"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(arguments, message):
    with pytest.raises(AdapterError, match=message):
        Policy(**arguments)
