"""Quantized trees: their numbers in closed form, and every reader of parameter trees on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import rslora_jax as rl
from rslora_jax.analysis.gradients import gradient_report
from rslora_jax.checkpoint import fingerprint
from rslora_jax.peft.names import names
from rslora_jax.quantize import Quantized, dequantize, error_table, quantize, quantize_weight
from rslora_jax.quantized import is_quantized

# Dettmers et al. 2023, arXiv 2305.14314, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype("float32")


def site_of(axes, *shape, path="w"):
    return rl.Site(path, axes, shape, "float32")


def one(weight, axes="io", **options):
    """One weight, quantized, and the numbers that it stands for."""
    small = quantize_weight(site_of(axes, *weight.shape), weight, **options)
    return small, np.asarray(dequantize(small))


# Numbers.


@pytest.mark.parametrize(
    ("axes", "shape", "scales"),
    [
        ("io", (24, 6), (1, 6)),
        ("oi", (6, 24), (6, 1)),
        ("bio", (3, 24, 6), (3, 1, 6)),
        ("ioo", (24, 2, 3), (1, 2, 3)),
        ("iio", (2, 12, 6), (1, 1, 6)),
    ],
)
def test_int8_has_a_scale_for_each_output_and_errs_by_half_of_it_at_most(axes, shape, scales):
    weight = numbers(*shape)
    small, formed = one(weight, axes)
    assert (small.values.dtype, small.scales.dtype) == (jnp.int8, jnp.float32)
    assert (small.values.shape, small.scales.shape) == (shape, scales)
    assert (np.abs(formed - weight) <= 0.5001 * np.asarray(small.scales)).all()


@pytest.mark.parametrize(
    ("axes", "shape", "block", "scales", "format"),
    [
        ("io", (64, 6), 16, (4, 6), "int4"),
        ("oi", (6, 64), 16, (6, 4), "nf4"),
        ("bio", (3, 64, 6), 64, (3, 1, 6), "int4"),
        ("iio", (2, 64, 6), 4, (2, 16, 6), "nf4"),
        ("io", (100, 2), 64, (2, 2), "nf4"),
    ],
)
def test_in_4_bits_neighbours_along_the_inputs_share_a_scale(axes, shape, block, scales, format):
    weight = numbers(*shape)
    small, formed = one(weight, axes, bits=4, format=format, block=block)
    assert small.scales.shape == scales
    widest = {"nf4": (NF4[1] - NF4[0]) / 2, "int4": 0.5}[format]
    wide = np.asarray(small.scales)
    for k, (n, m) in enumerate(zip(shape, scales, strict=True)):
        wide = np.repeat(wide, n // m, axis=k)
    assert (np.abs(formed - weight) <= 1.001 * widest * wide).all()


def test_the_levels_of_nf4_are_those_of_the_paper():
    """A block of all sixteen, times its largest, comes back as it is."""
    weight = np.outer(NF4, [1.0, 0.25]).astype("float32")
    small, formed = one(weight, bits=4)
    np.testing.assert_array_equal(np.asarray(small.values, int), np.outer(range(16), [1, 1]))
    np.testing.assert_array_equal(small.scales, [[1.0, 0.25]])
    np.testing.assert_allclose(formed, weight, rtol=1e-6)


def test_int8_in_closed_form():
    weight = np.array([[127.5, 0.0], [-1.2, 0.0], [63.6, 0.0]], "float32")
    small, formed = one(weight)
    np.testing.assert_array_equal(small.values, [[127, 0], [-1, 0], [64, 0]])
    np.testing.assert_array_equal(formed, [[127.0, 0.0], [-1.0, 0.0], [64.0, 0.0]])


@pytest.mark.parametrize("bits", [8, 4])
def test_slices_of_a_stack_are_quantized_as_the_stack_is(bits):
    site, stack = site_of("bio", 3, 16, 4), numbers(3, 16, 4)
    parts = [quantize_weight(site, stack[k : k + 1], bits) for k in range(3)]
    whole = quantize_weight(site, stack, bits)
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_abstract_weight_gives_what_a_concrete_one_gives(bits):
    site, weight = site_of("io", 64, 6), jnp.asarray(numbers(64, 6), jnp.bfloat16)
    small = quantize({"w": weight}, [site], bits)
    abstract = quantize({"w": jax.ShapeDtypeStruct((64, 6), jnp.bfloat16)}, [site], bits)
    assert abstract == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small)
    assert small["w"].dtype == abstract["w"].dtype == dequantize(small)["w"].dtype == jnp.bfloat16


def test_a_weight_may_be_quantized_inside_a_jit():
    site, weight = site_of("io", 64, 6), numbers(64, 6)
    inside = jax.jit(lambda w: quantize({"w": w}, [site], 4))(weight)
    jax.tree.map(np.testing.assert_array_equal, inside, quantize({"w": weight}, [site], 4))


# What is wrong.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 5}, r"int8 \(8 bits\), int4 \(4 bits\), nf4 \(4 bits\); found bits=5"),
        ({"bits": "8"}, r"found bits='8'"),
        ({"bits": 8, "format": "nf4"}, r"found bits=8, format='nf4'"),
        ({"bits": 4, "format": "fp4"}, r"found bits=4, format='fp4'"),
        ({"bits": 4, "block": 0}, r"a whole number of neighbours from 1 on, found 0"),
    ],
)
def test_an_unknown_number_format_is_refused_with_those_known(options, match):
    with pytest.raises(rl.AdapterError, match=match):
        quantize({"w": numbers(8, 6)}, [site_of("io", 8, 6)], **options)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (numbers(8, 5), r"'w' is a weight of shape \(8, 6\), found shape \(8, 5\)"),
        (np.ones((8, 6), int), r"'w' is int64; only floating point"),
        (np.ones((8, 6), jnp.float8_e5m2), r"'w' is float8_e5m2; only floating point of 16 bits"),
        (numbers(8, 6) * np.nan, r"'w' holds values that are not finite"),
        (one(numbers(8, 6))[0], r"'w' is quantized already, to int8.*dequantize"),
    ],
    ids=["shape", "integers", "float8", "nan", "twice"],
)
def test_a_weight_that_cannot_be_quantized_is_named(weight, match):
    with pytest.raises(rl.AdapterError, match=match):
        quantize({"w": weight}, [site_of("io", 8, 6)])


def test_a_site_of_another_tree_is_refused_with_the_nearest_paths():
    with pytest.raises(rl.AdapterError, match=r"'w'.*found none.*nearest paths are.*'v'"):
        quantize({"v": numbers(8, 6)}, [site_of("io", 8, 6)])


def test_an_axis_of_a_prime_length_has_no_blocks():
    with pytest.raises(rl.AdapterError, match=r"'w' in nf4.*axis 0 of \(67, 6\).*is 1\. Use 8"):
        quantize({"w": numbers(67, 6)}, [site_of("io", 67, 6)], 4)


def test_without_qwix_quantizing_and_forming_say_what_to_install(monkeypatch):
    def refuse(name):
        raise ImportError(f"No module named {name!r}")

    small = one(numbers(8, 6))[0]
    monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(rl.AdapterError, match=r"needs qwix.*pip install 'rslora_jax\[quantize\]'"):
        quantize({"w": numbers(9, 6)}, [site_of("io", 9, 6)])
    assert dequantize(small).shape == (8, 6)  # int8 needs no table of levels


def test_a_format_that_is_not_known_is_refused_where_the_weight_is_formed():
    with pytest.raises(rl.AdapterError, match=r"a format of \['int4', 'int8', 'nf4'\], found 'q'"):
        dequantize(Quantized(jnp.ones((2, 2), jnp.int8), jnp.ones((1, 2)), "q", "float32"))


# Errors.


def model(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"] + p["bias"]


def tree():
    return {"w": numbers(16, 32) / 4, "v": numbers(32, 16) / 4, "bias": numbers(16)}


X = numbers(5, 16, seed=1)


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64))


def test_the_error_table_says_what_each_weight_changes():
    params, sites = tree(), [site_of("io", 16, 32), site_of("io", 32, 16, path="v")]
    small = quantize(quantize(params, sites[:1]), sites[1:], 4, block=16)
    rows = {row.pop("path"): row for row in error_table(model, params, small, X).records()}
    assert list(rows) == ["v", "w", "all"]
    wide, right = dequantize(small), model(params, X)
    sizes = {"w": 16 * 32 + 32 * 4, "v": 32 * 16 // 2 + 2 * 16 * 4}
    for path, format in (("w", "int8"), ("v", "nf4")):
        gap = np.abs(wide[path] - params[path])
        changed = model({**params, path: wide[path]}, X) - right
        expected = {
            "bytes": sizes[path],
            "shrunk": sizes[path] / (4 * 512),
            "weight_error": norm(gap) / norm(params[path]),
            "largest": gap.max() / np.abs(params[path]).max(),
            "output_error": norm(changed) / norm(right),
        }
        assert rows[path].pop("format") == format
        assert rows[path] == pytest.approx(expected, rel=1e-4)
    last = rows["all"]
    assert (last["format"], last["bytes"]) == ("int8, nf4", sum(sizes.values()))
    assert (last["weight_error"], last["shrunk"]) == (
        rows["v"]["weight_error"],
        last["bytes"] / 4096,
    )
    expected = norm(model(wide, X) - right) / norm(right)
    assert last["output_error"] == pytest.approx(expected, rel=1e-4)


def test_the_error_table_refuses_trees_without_anything_to_compare():
    with pytest.raises(rl.AdapterError, match=r"found 3 and 3 parameters, of which 0 quantized"):
        error_table(model, tree(), tree(), X)
    small = quantize(tree(), [site_of("io", 16, 32)])
    with pytest.raises(rl.AdapterError, match=r"a floating-point output, found none"):
        error_table(lambda p, x: (model(p, x) > 0).astype(int), tree(), small, X)


# Readers of trees.


CONFIG = rl.LoraConfig(rank=2, alpha=3.0, targets=["w", "v"])
NAMES = names([("w", "w.weight", "io"), ("v", "v.weight", "io"), ("bias", "v.bias", "o")])


@functools.cache
def adapted(bits=8):
    """A quantized base and random factors: `(params, apply, sites)`."""
    base = quantize(tree(), rl.find_sites(model, tree(), X), bits)
    params, apply, sites = rl.adapt(model, base, X, config=CONFIG, key=jax.random.key(0))
    lora = jax.tree.map(lambda leaf: jnp.asarray(numbers(*leaf.shape, seed=3)), params.lora)
    return params._replace(lora=lora), apply, sites


def loss_fn(params, x):
    return jnp.mean(adapted()[1](params, x) ** 2)


def test_the_report_counts_the_parameters_that_the_weights_stand_for():
    params, _, sites = adapted(4)
    floats = rl.adapt(model, tree(), X, config=CONFIG, key=jax.random.key(0))
    assert rl.describe(sites) == rl.describe(floats.sites)
    assert [is_quantized(params.base[name]) for name in ("w", "v", "bias")] == [True, True, False]


@pytest.mark.parametrize("bits", [8, 4])
def test_merging_gives_floats_that_compute_what_the_adapted_model_computes(bits):
    params, apply, sites = adapted(bits)
    merged = rl.merge(params, sites)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tree()
    )
    np.testing.assert_allclose(model(merged, X), apply(params, X), rtol=0, atol=1e-4)
    back = rl.unmerge(merged, params.lora, sites)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), back.base, dequantize(params.base)
    )


def test_without_factors_merging_forms_every_weight():
    params, _, _ = adapted()
    merged = rl.merge(rl.LoraParams(params.base, {}), [])
    jax.tree.map(np.testing.assert_array_equal, merged, dequantize(params.base))


@pytest.mark.parametrize("kind", ["pairs", "tree"])
def test_integers_and_blocks_are_split_and_shared_scales_are_not(kind):
    params, apply, sites = adapted(4)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {"w": P("tensor", "fsdp"), "v": P("fsdp", "tensor"), "bias": P()}
    source = spec if kind == "tree" else [*spec.items(), (".*", P())]
    found = rl.sharding.shard(params, mesh, sites, source)
    assert found.base["w"].values.sharding == NamedSharding(mesh, P("tensor", "fsdp"))
    assert found.base["w"].scales.sharding == NamedSharding(mesh, P(None, "fsdp"))
    assert params.base["w"].scales.shape[0] == 1
    again = rl.sharding.shardings(mesh, found, sites)  # read off the base itself
    assert again == rl.sharding.shardings(mesh, params, sites, source)
    outs = jax.jit(apply)(found, X)
    np.testing.assert_allclose(outs, apply(params, X), rtol=0, atol=1e-4)
    lora, _ = rl.sharding.init_sharded(jax.random.key(0), sites, CONFIG, again.lora)
    assert jax.tree.map(lambda x: x.sharding, lora) == again.lora


def test_the_blocks_of_a_weight_are_split_with_its_inputs():
    site = rl.Site("w", "io", (64, 8), "float32", rank=1, alpha=1.0, scale=1.0)
    base = quantize({"w": numbers(64, 8)}, [site], 4, block=16)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    lora = {"w": {"a": jnp.ones((64, 1)), "b": jnp.ones((1, 8))}}
    found = rl.sharding.shard(rl.LoraParams(base, lora), mesh, [site], {"w": P("x")})
    assert found.base["w"].scales.sharding.spec == P("x", None)
    np.testing.assert_array_equal(dequantize(found.base)["w"], dequantize(base)["w"])


def test_scales_whose_blocks_do_not_go_into_the_devices_are_whole():
    site = rl.Site("w", "io", (48, 8), "float32", rank=1, alpha=1.0, scale=1.0)
    base = quantize({"w": numbers(48, 8)}, [site], 4, block=16)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    lora = {"w": {"a": jnp.ones((48, 1)), "b": jnp.ones((1, 8))}}
    params = rl.sharding.shard(rl.LoraParams(base, lora), mesh, [site], {"w": P("x")})
    weight = params.base["w"]
    assert (weight.values.sharding.spec, weight.scales.sharding.spec) == (
        P("x", None),
        P(None, None),
    )
    apply, x = jax.jit(rl.attach(lambda p, x: x @ p["w"], [site])), numbers(2, 48)
    np.testing.assert_allclose(apply(params, x), apply(rl.LoraParams(base, lora), x), rtol=1e-5)


def test_a_checkpoint_of_adapters_knows_the_quantized_base_that_they_belong_to(tmp_path):
    params, _, sites = adapted()
    rl.checkpoint.save(tmp_path / "x", params, sites, CONFIG)
    found = rl.checkpoint.restore(tmp_path / "x", params)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    for base, match in (
        (tree(), r"another base: 'v': only in the given base"),
        (adapted(4)[0].base, r"'v/values': dtype int8 in the saved base, uint4 in the given base"),
    ):
        with pytest.raises(rl.AdapterError, match=match):
            rl.checkpoint.restore(tmp_path / "x", rl.LoraParams(base, params.lora))


def test_fingerprints_tell_integers_scales_formats_and_dtypes_apart():
    small = adapted()[0].base["w"]
    others = [
        Quantized(small.values.at[0, 0].add(1), small.scales, "int8", "float32"),
        Quantized(small.values, small.scales * 2, "int8", "float32"),
        Quantized(small.values, small.scales, "nf4", "float32"),
        Quantized(small.values, small.scales, "int8", "bfloat16"),
    ]
    digests = {fingerprint({"w": one}).digest for one in (small, *others)}
    assert len(digests) == 5
    assert fingerprint({"w": jax.tree.map(jnp.copy, small)}).digest in digests


def test_adapters_on_a_quantized_base_travel_to_hugging_face_and_back(tmp_path):
    params, _, sites = adapted()
    rl.peft.save(tmp_path / "peft", params.lora, sites, NAMES)
    loaded = rl.peft.load(tmp_path / "peft", params.base, NAMES, sites=sites)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    rl.peft.merge_to_hf(tmp_path / "merged", params, sites, NAMES)
    found, merged = load_file(tmp_path / "merged" / "model.safetensors"), rl.merge(params, sites)
    for path, name in (("w", "w.weight"), ("v", "v.weight")):
        np.testing.assert_allclose(found[name], merged[path].T, rtol=1e-6, atol=1e-6)


def test_training_never_moves_a_bit_of_a_quantized_base():
    params, _, sites = adapted()
    inner = rl.optim.record_norms(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), sites
    )
    tx = rl.optim.freeze_base(inner)

    @jax.jit
    def step(params, state):
        grads = rl.value_and_grad(loss_fn)(params, X)[1]
        updates, state = tx.update(grads, state, params)
        whole = rl.LoraParams(jax.tree.map(jnp.zeros_like, params.base), grads)
        everything = optax.apply_updates(params, tx.update(whole, state, params)[0])
        return rl.optim.apply_updates(params, updates), everything, state

    after, whole, state = step(params, tx.init(params))
    for found in (after, whole):
        jax.tree.map(np.testing.assert_array_equal, found.base, params.base)
        assert not np.array_equal(found.lora["w"]["a"], params.lora["w"]["a"])
    grads = rl.value_and_grad(loss_fn)(params, X)[1]
    recorded = rl.optim.recorded(state).norms["w"][0]
    np.testing.assert_allclose(recorded[0], norm(grads["w"]["a"]), rtol=1e-4)
    assert set(jax.tree.leaves(rl.optim.trainable_mask(params).base)) == {False}
    assert set(jax.tree.leaves(rl.optim.labels(params).base)) == {"base"}


def test_the_gradient_report_measures_the_gradients_of_the_floats_that_the_integers_stand_for():
    site = rl.Site("w", "io", (16, 32), "float32", rank=2, alpha=3.0, scale=1.5)
    apply = rl.attach(lambda p, x: jnp.tanh(x @ p["w"]), [site])
    lora = {"w": {"a": numbers(16, 2), "b": numbers(2, 32)}}
    params = rl.LoraParams(quantize({"w": tree()["w"]}, [site]), lora)
    weight = rl.merge(params, [site])["w"]
    gradient = jax.grad(lambda w: jnp.mean(jnp.tanh(X @ w) ** 2))(weight)
    found = gradient_report(
        lambda p, x: jnp.mean(apply(p, x) ** 2), params, [site], X, weights=True
    )
    expected = norm(gradient), 1.5 * norm(lora["w"]["a"].T @ gradient)
    measured = [found.modules["w"][name] for name in ("weight_grad", "grad_b")]
    np.testing.assert_allclose(measured, expected, rtol=1e-4)
