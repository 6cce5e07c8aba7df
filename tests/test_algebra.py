"""Sums, multiples, ranks and scalings of adapters keep the function that they promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rslora_jax as rl
from rslora_jax import algebra
from rslora_jax.axes import delta_subscripts
from rslora_jax.config import alpha_of

SHAPES = {"bio": (3, 6, 5), "ioo": (4, 3, 2), "oi": (5, 6)}
SCALINGS = ("rslora", "lora")


def adapter(rank=4, scaling="rslora", seed=0, *, alpha=3.0, shapes=SHAPES, dtype="float32"):
    """An adapter with random factors at a site of each axes string."""
    rng = np.random.default_rng(seed)
    sites, lora = [], {}
    for axes, shape in shapes.items():
        scale = rl.scale(alpha, rank, scaling)
        site = rl.Site(axes, axes, shape, "float32", rank=rank, alpha=alpha, scale=scale)
        a, b = (jnp.asarray(rng.normal(size=s), dtype) for s in site.factor_shapes)
        sites.append(site)
        lora[axes] = {"a": a, "b": b}
    return lora, rl.Sites(sites)


def changes(lora, sites):
    """scale * a @ b of every site, by NumPy in float64."""
    found = {}
    for site in sites:
        a, b = (np.asarray(lora[site.path][name], np.float64) for name in "ab")
        found[site.path] = site.scale * np.einsum(delta_subscripts(site.axes), a, b)
    return found


def assert_changes(found, wanted, atol=1e-5):
    got = changes(found.lora, found.sites)
    assert got.keys() == wanted.keys()
    for path, change in wanted.items():
        np.testing.assert_allclose(got[path], change, rtol=0, atol=atol * np.abs(change).max())


def assert_same_arrays(lora, other):
    jax.tree.map(np.testing.assert_array_equal, lora, other)


def assert_follows_config(found):
    """Every scale is what the returned config gives for its site."""
    config = found.config
    for site in found.sites:
        assert site.scale == pytest.approx(rl.scale(site.alpha, site.rank, config.scaling))
    assert rl.LoraConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rank", [1, 3, 4, 16])
@pytest.mark.parametrize("alpha", [1.0, 3.0, 16.5])
def test_one_adapter_of_weight_one_comes_back_as_itself(scaling, rank, alpha):
    lora, sites = adapter(rank, scaling, alpha=alpha)
    for found in (
        algebra.combine([(lora, sites, 1.0)]),
        algebra.combine([(lora, sites, 1)], rank=rank),
        algebra.scale_by(lora, sites, 1.0),
        algebra.resize(lora, sites, rank),
        algebra.convert(lora, sites, scaling),
    ):
        assert_same_arrays(found.lora, lora)
        assert found.sites == sites
        assert [site.scale for site in found.sites] == [site.scale for site in sites]
        assert found.config.scaling == (scaling if rank > 1 else found.config.scaling)
        assert found.errors.rows == ()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_an_adapter_copied_at_a_new_rank_is_not_off_by_the_root_of_the_rank(scaling):
    lora, sites = adapter(4, scaling)
    both = algebra.combine([(lora, sites, 0.5), (lora, sites, 0.5)])
    assert {site.rank for site in both.sites} == {8}
    assert_changes(both, changes(lora, sites))
    assert_changes(algebra.combine([(lora, sites, 1.0)], rank=16), changes(lora, sites))
    assert_changes(algebra.combine([(lora, sites, 0.5)] * 2, rank=4), changes(lora, sites))


@pytest.mark.parametrize(("one", "two"), list(itertools.product(SCALINGS, SCALINGS)))
def test_a_weighted_sum_is_the_sum_of_the_changes_under_every_pair_of_scalings(one, two):
    left, right = adapter(4, one, 0, alpha=2.5), adapter(6, two, 1, alpha=7.0)
    found = algebra.combine([(*left, 0.75), (*right, -2.0)])
    one_change, two_change = changes(*left), changes(*right)
    assert_changes(found, {p: 0.75 * one_change[p] - 2 * two_change[p] for p in one_change})
    assert {site.rank for site in found.sites} == {10}
    assert found.config.scaling == one
    assert [site.scale for site in found.sites] == pytest.approx([s.scale for s in left[1]])
    assert_follows_config(found)


def test_three_adapters_sum_in_any_grouping():
    parts = [adapter(2, seed=n) for n in range(3)]
    at_once = algebra.combine([(*part, 1.0) for part in parts])
    first = algebra.combine([(*parts[0], 1.0), (*parts[1], 1.0)])
    then = algebra.combine([(first.lora, first.sites, 1.0), (*parts[2], 1.0)])
    assert_same_arrays(at_once.lora, then.lora)


def test_a_site_that_one_adapter_lacks_keeps_the_change_of_the_other():
    left = adapter(2, shapes={"io": (6, 7)})
    right = adapter(3, "lora", shapes={"bio": (2, 4, 5), "io": (6, 7)})
    found = algebra.combine([(*left, 1.0), (*right, 2.0)])
    assert [site.path for site in found.sites] == ["io", "bio"]
    assert [site.rank for site in found.sites] == [5, 3]
    wanted = {p: 2 * c for p, c in changes(*right).items()}
    wanted["io"] = wanted["io"] + changes(*left)["io"]
    assert_changes(found, wanted)
    assert_follows_config(found)


def test_a_sum_cut_to_a_rank_is_the_best_approximation_and_says_how_far_it_is_off():
    left, right = adapter(3, seed=0), adapter(3, "lora", seed=1)
    exact, cut = (
        algebra.combine([(*left, 1.0), (*right, 0.5)]),
        algebra.combine([(*left, 1.0), (*right, 0.5)], rank=2),
    )
    wanted, got = changes(exact.lora, exact.sites), changes(cut.lora, cut.sites)
    rows = {(row["path"], row["module"]): row for row in cut.errors.records()}
    assert len(rows) == 3 + 2
    for site in exact.sites:
        stack = 3 if "b" in site.axes else 1
        for n in range(stack):
            matrix, other = (
                _matrix(site, c[site.path].reshape(stack, *_inner(site))[n]) for c in (wanted, got)
            )
            s = np.linalg.svd(matrix, compute_uv=False)
            best = np.sqrt((s[2:] ** 2).sum())
            row = rows[site.path, str(n) if "b" in site.axes else ""]
            assert np.linalg.norm(matrix - other) == pytest.approx(best, rel=1e-4, abs=1e-4)
            assert row["norm"] == pytest.approx(np.linalg.norm(matrix), rel=1e-5)
            assert row["error"] == pytest.approx(best / np.linalg.norm(matrix), abs=1e-6)
            assert row["rank"] == 2


def _inner(site):
    return [n for n, role in zip(site.shape, site.axes, strict=True) if role != "b"]


def _matrix(site, array):
    axes = site.axes.replace("b", "")
    order = [k for role in "io" for k, r in enumerate(axes) if r == role]
    inputs = np.prod([n for n, r in zip(array.shape, axes, strict=True) if r == "i"])
    return array.transpose(order).reshape(int(inputs), -1)


def test_a_cut_in_bfloat16_counts_what_the_cast_takes_away():
    lora, sites = adapter(2, shapes={"io": (32, 24)}, dtype="bfloat16")
    found = algebra.combine([(lora, sites, 0.5), (lora, sites, 0.5)], rank=2)
    assert found.lora["io"]["a"].dtype == jnp.bfloat16
    exact, got = changes(lora, sites)["io"], changes(found.lora, found.sites)["io"]
    error = np.linalg.norm(exact - got) / np.linalg.norm(exact)
    assert 1e-3 < error < 1e-2
    assert found.errors.column("error")[0] == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize(("rank", "scaling"), [(5, "rslora"), (64, "lora")])
def test_a_larger_rank_changes_no_number_of_the_function_and_can_train(rank, scaling):
    lora, sites = adapter(4, scaling)
    found = algebra.resize(lora, sites, rank, key=jax.random.key(7))
    assert {site.rank for site in found.sites} == {rank}
    for site in found.sites:
        old, new = lora[site.path], found.lora[site.path]
        axis = site.axes.count("b")
        old, new = (jax.tree.map(np.asarray, factors) for factors in (old, new))
        np.testing.assert_array_equal(new["a"][..., :4], old["a"])
        np.testing.assert_array_equal(new["b"].take(np.arange(4), axis), old["b"])
        assert not new["b"].take(np.arange(4, rank), axis).any()
        assert np.all(np.any(new["a"][..., 4:] != 0, axis=-2))
        bound = 1 / np.sqrt(
            np.prod([n for n, r in zip(site.shape, site.axes, strict=True) if r == "i"])
        )
        assert 0.5 * bound < np.abs(new["a"][..., 4:]).max() <= bound
    assert [s.scale for s in found.sites] == pytest.approx([s.scale for s in sites], rel=1e-15)
    assert found.errors.rows == ()
    again = algebra.resize(found.lora, found.sites, 4)
    assert_changes(again, changes(lora, sites))
    assert max(again.errors.column("error")) < 1e-6


def test_another_key_draws_other_columns_and_the_same_key_the_same():
    lora, sites = adapter(2)
    one, same, other = (
        algebra.resize(lora, sites, 4, key=jax.random.key(k)).lora["oi"]["a"] for k in (0, 0, 1)
    )
    assert_same_arrays(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 7, 12, 100])
def test_another_scaling_keeps_factors_and_scales_and_comes_back(rank):
    lora, sites = adapter(rank, "rslora")
    other = algebra.convert(lora, sites, "lora")
    assert_same_arrays(other.lora, lora)
    assert [s.scale for s in other.sites] == pytest.approx([s.scale for s in sites], rel=1e-15)
    assert [s.alpha for s in other.sites] == pytest.approx([3.0 * rank**0.5] * len(sites))
    back = algebra.convert(other.lora, other.sites, "rslora")
    assert [s.alpha for s in back.sites] == pytest.approx([3.0] * len(sites), rel=1e-15)
    assert rank == 1 or other.config.scaling == "lora"


def test_converted_adapters_apply_to_the_same_outputs_bit_for_bit():
    lora, sites = adapter(4, shapes={"io": (6, 7)})
    base, x = {"io": jnp.ones((6, 7))}, jnp.linspace(-1, 1, 12).reshape(2, 6)

    def model(p, x):
        return x @ p["io"]

    other = algebra.convert(lora, sites, "lora")
    one = rl.attach(model, sites)(rl.LoraParams(base, lora), x)
    two = rl.attach(model, other.sites)(rl.LoraParams(base, other.lora), x)
    np.testing.assert_array_equal(one, two)


def test_the_config_of_a_result_gives_its_sites_in_adapt():
    base = {"up": jnp.ones((6, 8)), "down": jnp.ones((8, 6)), "head": jnp.ones((6, 3))}

    def model(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"] @ p["head"]

    config = rl.LoraConfig(2, 3.0, rules=(rl.Rule("down", rank=3, alpha=5.0),))
    x, key = jnp.ones((2, 6)), jax.random.key(0)
    params, _, sites = rl.adapt(model, base, x, config=config, key=key)
    found = algebra.combine([(params.lora, sites, 1.0), (params.lora, sites, 2.0)])
    _, apply, same = rl.adapt(model, base, x, config=found.config, key=key)
    assert [vars(s) | {"rule": ""} for s in same] == [vars(s) | {"rule": ""} for s in found.sites]
    assert [left.path for left in found.sites.left] == ["head"]
    out = apply(rl.LoraParams(base, found.lora), x)
    np.testing.assert_allclose(out, model(base, x), rtol=1e-6)  # b starts at zero


def test_a_difference_from_itself_changes_nothing_and_a_negative_multiple_undoes():
    lora, sites = adapter(3, "lora")
    zero = algebra.subtract((lora, sites), (lora, sites))
    for change in changes(zero.lora, zero.sites).values():
        np.testing.assert_allclose(change, 0, atol=1e-6)
    less = algebra.scale_by(lora, sites, -0.25)
    assert less.sites == sites
    assert_changes(less, {p: -0.25 * c for p, c in changes(lora, sites).items()})
    assert_changes(
        algebra.subtract((lora, sites), (less.lora, less.sites), rank=3),
        {p: 1.25 * c for p, c in changes(lora, sites).items()},
    )


def test_zero_adapters_have_no_error_when_they_are_cut():
    lora, sites = adapter(3)
    zero = algebra.scale_by(lora, sites, 0.0)
    cut = algebra.resize(zero.lora, zero.sites, 1)
    assert set(cut.errors.column("error")) == {0.0}
    assert all(not change.any() for change in changes(cut.lora, cut.sites).values())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_factors_combine_and_resize(kind):
    lora, sites = adapter(4, shapes={"bio": (4, 8, 8), "io": (8, 8)})
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {
        "bio": {"a": (None, "x", None), "b": (None, None, "y")},
        "io": {"a": ("x", None), "b": (None, "y")},
    }
    placed = jax.tree.map(
        lambda array, spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec))),
        lora,
        specs,
    )
    with jax.set_mesh(mesh):
        found = algebra.combine([(placed, sites, 1.0), (placed, sites, 0.5)], rank=4)
        wide = algebra.resize(placed, sites, 6)
    assert_changes(found, {p: 1.5 * c for p, c in changes(lora, sites).items()})
    assert_changes(wide, changes(lora, sites))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_alpha_of_inverts_scale(scaling):
    rng = np.random.default_rng(0)
    for rank, alpha in zip(rng.integers(1, 2000, 500), rng.uniform(0.01, 500, 500), strict=True):
        value = rl.scale(alpha, rank, scaling)
        found = alpha_of(value, rank, scaling)
        assert abs(rl.scale(found, rank, scaling) - value) <= np.spacing(value)
        assert found == pytest.approx(alpha, rel=1e-15)


def test_bad_requests_say_what_is_wrong():
    lora, sites = adapter(2)
    with pytest.raises(rl.AdapterError, match="found none"):
        algebra.combine([])
    for weight in (float("nan"), float("inf"), "1"):
        with pytest.raises(rl.AdapterError, match="weight of an adapter must be a finite number"):
            algebra.combine([(lora, sites, weight)])
    with pytest.raises(rl.AdapterError, match=r"'oi' has axes and shape.*of one base model"):
        algebra.combine([(lora, sites, 1.0), (*adapter(2, shapes={"oi": (6, 8)}), 1.0)])
    with pytest.raises(rl.AdapterError, match=r"scaling must be one of.*found 'sqrt'"):
        algebra.convert(lora, sites, "sqrt")
    for rank in (0, -1, 2.0, True):
        with pytest.raises(rl.AdapterError, match="rank must be an int of at least 1"):
            algebra.resize(lora, sites, rank)
    with pytest.raises(rl.AdapterError, match="The lora tree is empty, and there are 3 sites"):
        algebra.resize({}, sites, 4)
    with pytest.raises(rl.AdapterError, match="Factor 'bio/a' must have shape"):
        algebra.resize(lora, adapter(3)[1], 4)
    with pytest.raises(rl.AdapterError, match=r"alpha/sqrt\(r\) or alpha/r for all sites alike"):
        odd = [rl.Site("w", "io", (2, 2), "float32", rank=4, alpha=2.0, scale=0.7)]
        algebra.combine([({"w": {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 2))}}, odd, 1.0)])


def test_a_multiple_that_overflows_is_refused():
    lora, sites = adapter(2, dtype="float16")
    with pytest.raises(rl.AdapterError, match="times 1e\\+06 is not finite in float16"):
        algebra.scale_by(lora, sites, 1e6)
