"""Spectra of changes: closed forms, parity with NumPy in float64, sharding and bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rslora_jax as rl
from rslora_jax.analysis.spectra.pairs import pairs, unpaired
from rslora_jax.analysis.spectra.randomized import delta_svd
from rslora_jax.analysis.spectra.spectrum import delta_spectrum, spectrum
from rslora_jax.factors import delta

P = PartitionSpec
SHAPES = {"io": (12, 9), "oi": (9, 12), "bio": (3, 8, 7), "ioo": (8, 3, 5), "iio": (2, 5, 8)}
SHAPES |= {"ibo": (8, 3, 7), "oioo": (2, 8, 3, 2)}


def adapter(axes, rank=4, scale=0.5):
    site = rl.Site("w", axes, SHAPES[axes], "float32", rank=rank, alpha=1.0, scale=scale)
    rng = np.random.default_rng(len(axes))
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in site.factor_shapes)
    return site, {"w": {"a": a, "b": b}}


def as_matrices(weight, axes):
    """The same weight as a stack of float64 matrices, by NumPy alone."""
    order = [k for role in "bio" for k, axis in enumerate(axes) if axis == role]
    moved = np.asarray(weight, np.float64).transpose(order)
    stack = [weight.shape[k] for k in order[: axes.count("b")]]
    inputs = int(np.prod([n for n, axis in zip(weight.shape, axes, strict=True) if axis == "i"]))
    return moved.reshape(*stack, inputs, -1)


def matrix_with(s, shape, seed=0):
    """A float32 matrix of given singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, len(s))))[0] for n in shape)
    return jnp.asarray((u * s) @ v.T, jnp.float32)


# Adapters.


@pytest.mark.parametrize("axes", SHAPES)
def test_an_adapter_has_the_singular_values_of_its_whole_change(axes):
    site, lora = adapter(axes)
    found = spectrum(lora, [site])[0]
    whole = as_matrices(delta(site, lora["w"]), axes)
    exact = np.linalg.svd(whole, compute_uv=False)[..., :4]
    np.testing.assert_allclose(found.s, exact, rtol=1e-5)
    np.testing.assert_allclose(found.total, np.linalg.norm(whole, axis=(-2, -1)), rtol=1e-5)
    assert found.matrix == whole.shape[-2:]


def test_a_rank_above_the_smaller_side_gives_no_spurious_values():
    site, lora = adapter("io", rank=16)
    s = spectrum(lora, [site])[0].s
    assert s.shape == (9,)
    exact = np.linalg.svd(as_matrices(delta(site, lora["w"]), "io"), compute_uv=False)
    np.testing.assert_allclose(s, exact, rtol=1e-5)


def test_a_fresh_adapter_has_rank_zero_by_every_definition():
    site, lora = adapter("bio")
    lora["w"]["b"] *= 0
    table = spectrum(rl.LoraParams({}, lora), [site]).ranks()
    for name in ("norm", "stable", "entropy", "participation", "energy_99", "gavish_donoho"):
        assert table.column(name) == [0, 0, 0]
    assert table.column("module") == ["0", "1", "2"]


def test_the_energy_table_of_an_adapter_ends_at_one():
    site, lora = adapter("io")
    table = spectrum(lora, [site]).energy(ranks=(1, 4, 8, 10))
    assert table.column("rank") == [1, 4, 8]
    assert np.allclose(table.column("energy")[1:], 1)


def test_no_adapter_at_all_is_refused():
    with pytest.raises(rl.AdapterError, match=r"spectrum needs adapters.*`delta_spectrum`"):
        spectrum({}, [adapter("io")[0]])


def test_factors_that_are_not_finite_are_refused_by_path():
    site, lora = adapter("io")
    lora["w"]["a"] = lora["w"]["a"].at[0, 0].set(jnp.nan)
    with pytest.raises(rl.AdapterError, match=r"'w': the change of 12x9 is not finite"):
        spectrum(lora, [site])


# Full fine-tunes.


@pytest.mark.parametrize("axes", ["io", "ibo", "oioo"])
def test_a_sketch_as_wide_as_the_module_is_exact(axes):
    rng = np.random.default_rng(1)
    base, change = (jnp.asarray(rng.normal(size=SHAPES[axes]), jnp.float32) for _ in range(2))
    site = rl.Site("w", axes, SHAPES[axes], "float32")
    found = delta_spectrum({"w": base}, {"w": base + change}, k=5, sites=[site])[0]
    whole = as_matrices(change, axes)
    np.testing.assert_allclose(
        found.s, np.linalg.svd(whole, compute_uv=False)[..., :5], rtol=1e-5, atol=2e-6
    )
    np.testing.assert_allclose(found.total, np.linalg.norm(whole, axis=(-2, -1)), rtol=1e-6)
    np.testing.assert_allclose(
        found.base, np.linalg.norm(as_matrices(base, axes), axis=(-2, -1)), rtol=1e-6
    )
    assert np.all(found.residual < 2e-3)


@pytest.mark.parametrize(
    ("power", "energy_bound", "value_bound"),
    [(2.0, 1e-6, 2e-4), (1.0, 1e-3, 0.01), (0.5, 0.01, 0.05)],
)
def test_decaying_spectra_are_found_within_bounds(power, energy_bound, value_bound):
    s = np.arange(1, 97.0) ** -power
    change = matrix_with(s, (128, 96))
    found = delta_spectrum({"w": jnp.zeros((128, 96))}, {"w": change}, k=16)[0]
    assert np.all(np.abs(found.s / s[:16] - 1) < value_bound)
    exact = (s[:16] ** 2).sum() / (s**2).sum()
    captured = (found.s**2).sum() / found.total**2
    assert exact - energy_bound < captured <= exact + 1e-6


def test_a_flat_spectrum_is_underestimated_and_says_so():
    s = np.linspace(3, 0.5, 64)
    matrix = {"w": matrix_with(s, (64, 64))}
    zeros = {"w": jnp.zeros((64, 64))}
    exact = (s[:8] ** 2).sum() / (s**2).sum()
    few, many = (delta_spectrum(zeros, matrix, k=8, iterations=q)[0] for q in (2, 20))
    captured = [(item.s**2).sum() / item.total**2 for item in (few, many)]
    assert 0.8 * exact < captured[0] < exact
    assert captured[0] < captured[1] <= exact + 1e-6
    assert few.residual > 0.7


def test_the_residual_is_what_the_found_range_misses():
    s = np.arange(1, 41.0) ** -0.5
    change = matrix_with(s, (50, 40))
    found = delta_svd(None, change, "io", 6, oversample=0)
    whole, u = np.asarray(change, np.float64), np.asarray(found.u, np.float64)
    missed = np.linalg.norm(whole - u @ (u.T @ whole)) / np.linalg.norm(whole)
    np.testing.assert_allclose(found.residual, missed, rtol=1e-5)
    np.testing.assert_allclose(u.T @ u, np.eye(6), atol=1e-5)
    np.testing.assert_allclose((u * found.s) @ found.vt, u @ (u.T @ whole), atol=1e-5)


def test_float64_weights_are_compared_in_float64():
    with jax.enable_x64(True):
        s = np.array([1e-3, 1e-6, 1e-9])
        rng = np.random.default_rng(0)
        u, v = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (20, 15))
        base = jnp.asarray(rng.normal(size=(20, 15)))
        found = delta_spectrum({"w": base}, {"w": base + (u * s) @ v.T}, k=3)[0]
        np.testing.assert_allclose(found.s, s, rtol=1e-5)


def test_a_small_change_of_large_weights_keeps_its_energy():
    s = np.arange(1, 97.0) ** -1.0
    change = 1e-3 * matrix_with(s, (128, 96))
    base = jnp.asarray(np.random.default_rng(0).normal(size=(128, 96)), jnp.float32)
    found = delta_spectrum({"w": base}, {"w": base + change}, k=16)[0]
    captured = (found.s**2).sum() / found.total**2
    np.testing.assert_allclose(captured, (s[:16] ** 2).sum() / (s**2).sum(), rtol=1e-2)
    np.testing.assert_allclose(found.s, 1e-3 * s[:16], rtol=3e-2)


def test_equal_trees_have_no_spectrum():
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 9)), jnp.float32)}
    found = delta_spectrum(tree, tree, k=5)
    assert not found[0].total.any()
    assert found.ranks().column("stable") == [0]
    assert found.ranks().column("relative") == [0]


def test_captured_energy_never_falls_and_is_unknown_above_k():
    rng = np.random.default_rng(0)
    tree = {"w": jnp.asarray(rng.normal(size=(128, 96)), jnp.float32)}
    found = delta_spectrum(jax.tree.map(jnp.zeros_like, tree), tree, k=16)
    energies = np.array(found.energy(ranks=range(1, 20)).column("energy"), float)
    assert np.all(np.diff(energies[:16]) > 0)
    assert np.all((energies[:16] > 0) & (energies[:16] <= 1))
    assert np.all(np.isnan(energies[16:]))
    assert found.ranks().column("truncated") == [True]


# Sharding.


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (P("d"), AxisType.Explicit),
        (P(None, "e", "d"), AxisType.Auto),
    ],
)
def test_sharded_weights_give_the_same_spectrum(spec, kind):
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(kind, kind))
    base, tuned = sharded_pair()
    site = rl.Site("w", "bio", base.shape, "float32")
    alone = delta_spectrum({"w": base}, {"w": tuned}, k=3, sites=[site])[0]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (base, tuned)]
    with jax.set_mesh(mesh):
        found = delta_spectrum({"w": placed[0]}, {"w": placed[1]}, k=3, sites=[site])[0]
    np.testing.assert_allclose(found.s, alone.s, rtol=1e-4)
    np.testing.assert_allclose(found.total, alone.total, rtol=1e-6)


@functools.cache
def sharded_pair():
    rng = np.random.default_rng(0)
    base = jnp.asarray(rng.normal(size=(2, 32, 24)), jnp.float32)
    return base, base + jnp.asarray(rng.normal(size=(2, 32, 24)), jnp.float32)


@pytest.mark.parametrize("spec", [P("d"), P("e", "d")])
def test_no_weight_is_gathered(spec):
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    weight = jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=NamedSharding(mesh, spec))
    step = jax.jit(lambda x, y: delta_svd(x, y, "io", 4, oversample=4, iterations=1)[:2])
    text = step.lower(weight, weight).compile().as_text()
    sizes = [
        int(np.prod([int(n) for n in dims.split(",")]))
        for dims in re.findall(r"f32\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective)", text)
    ]
    assert max(sizes, default=0) <= 512 * 8
    assert "f32[512,256]" not in text


# Bad input.


def test_trees_that_do_not_match_name_paths_and_shapes():
    base = {"q": jnp.ones((4, 8)), "k": jnp.ones((4, 4)), "gone": jnp.ones(3)}
    tuned = {"q": jnp.ones((4, 6)), "k": jnp.ones((4, 4)), "new": jnp.ones(3)}
    with pytest.raises(rl.AdapterError) as caught:
        delta_spectrum(base, tuned)
    message = str(caught.value)
    assert "3 differ" in message
    assert "'q' has shape (4, 8) in base and (4, 6) in tuned" in message
    assert "'gone' is only in base" in message and "'new' is only in tuned" in message


def test_adapted_parameters_are_refused_with_the_remedy():
    with pytest.raises(rl.AdapterError, match=r"tuned must be a plain parameter tree.*merge\("):
        delta_spectrum({"w": jnp.ones((2, 2))}, rl.LoraParams({"w": jnp.ones((2, 2))}, {}))


def test_a_site_that_is_not_in_the_trees_names_the_nearest():
    tree, site = {"layer/q": jnp.ones((4, 8))}, rl.Site("layer/k", "io", (4, 8), "float32")
    with pytest.raises(rl.AdapterError, match=r"'layer/k' is not in the trees.*'layer/q'"):
        delta_spectrum(tree, tree, sites=[site])


def test_a_site_of_another_shape_names_both():
    tree, site = {"q": jnp.ones((4, 8))}, rl.Site("q", "io", (4, 6), "float32")
    with pytest.raises(rl.AdapterError, match=r"shape \(4, 6\), but the trees hold \(4, 8\)"):
        delta_spectrum(tree, tree, sites=[site])


def test_empty_sites_are_refused():
    tree = {"q": jnp.ones((4, 8))}
    with pytest.raises(rl.AdapterError, match="No matrix to compare: sites is empty"):
        delta_spectrum(tree, tree, sites=[])


def test_trees_without_a_matrix_are_refused():
    tree = {"bias": jnp.ones(4), "table": jnp.ones((2, 2), int)}
    with pytest.raises(rl.AdapterError, match=r"the trees hold no floating leaf.*'?bias'?"):
        delta_spectrum(tree, tree)


def test_weights_that_are_not_finite_are_refused_by_path():
    tree = {"q": jnp.ones((12, 9))}
    with pytest.raises(rl.AdapterError, match=r"'q': the change of 12x9 is not finite"):
        delta_spectrum(tree, {"q": tree["q"].at[0, 0].set(jnp.inf)}, k=5)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"oversample": -1}, {"iterations": -1}])
def test_sizes_out_of_range_are_refused(wrong):
    tree = {"q": jnp.ones((4, 8))}
    with pytest.raises(rl.AdapterError, match=r"delta_svd needs k of at least 1"):
        delta_spectrum(tree, tree, **wrong)


def test_without_sites_a_matrix_is_inputs_by_outputs():
    tree = {"w": jnp.ones((4, 8)), "bias": jnp.ones(8)}
    assert [(pair.path, pair.axes, pair.matrix) for pair in pairs(tree, tree)] == [
        ("w", "io", (4, 8))
    ]


def test_a_leaf_of_three_axes_asks_for_sites():
    tree = {"layers": {"w": jnp.ones((2, 4, 8)), "bias": jnp.ones((2, 8))}}
    with pytest.raises(rl.AdapterError, match=r"'layers/w' has shape \(2, 4, 8\).*Pass sites="):
        delta_spectrum(tree, tree)
    site = rl.Site("layers/w", "bio", (2, 4, 8), "float32")
    assert [pair.path for pair in pairs(tree, tree, [site])] == ["layers/w"]


def test_leaves_that_moved_without_being_a_matrix_are_reported():
    base = {"w": jnp.ones((4, 8)), "bias": jnp.zeros(4), "norm": jnp.ones(3)}
    tuned = {**base, "bias": jnp.ones(4)}
    assert unpaired(base, tuned, pairs(base, tuned)) == {"bias": 2.0}
