"""Adapters out of full fine-tunes, and ranks under a budget."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rslora_jax as rl
from rslora_jax.analysis.spectra.allocate import allocate_ranks, parameters_per_rank
from rslora_jax.analysis.spectra.extract import extract
from rslora_jax.analysis.spectra.spectrum import Spectra, Spectrum, delta_spectrum
from rslora_jax.axes import delta_subscripts
from tests import quick

RNG = np.random.default_rng(0)
SHAPES = {"q": (8, 2, 5), "o": (2, 5, 8), "layers": (3, 8, 8), "up": (8, 12), "head": (12, 4)}
BASE = {name: RNG.normal(size=shape).astype("float32") / 3 for name, shape in SHAPES.items()}
BASE["gain"] = np.ones(12, "float32")
X = RNG.normal(size=(6, 8)).astype("float32")


def model(p, x):
    heads = jnp.tanh(jnp.einsum("td,dnh->tnh", x, p["q"]))
    x = jnp.einsum("tnh,nhd->td", heads, p["o"])
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
    return (jnp.tanh(x @ p["up"]) * p["gain"]) @ p["head"]


def adapted(config):
    """Everything that `adapt` gives, without computing anything."""
    return rl.adapt(model, jax.eval_shape(lambda: BASE), X, config=config, key=jax.random.key(0))


@pytest.fixture(scope="module")
def tuned():
    """A model with a change of rank 3 at every site, of falling singular values, and sites."""
    sites = adapted(rl.LoraConfig(rank=3, alpha=2.0)).sites
    merged = dict(BASE)
    for n, site in enumerate(sites):
        a, b = (RNG.normal(size=shape) for shape in site.factor_shapes)
        falling = 0.3 * np.array([1, 0.2 + 0.2 * n, 0.1])
        change = np.einsum(delta_subscripts(site.axes), a * falling, b)
        merged[site.path] = (BASE[site.path] + change).astype("float32")
    return merged, sites


def test_a_known_adapter_comes_back_as_the_same_function(tuned):
    merged, sites = tuned
    assert {s.path: s.axes for s in sites} == {
        "q": "ioo",
        "o": "iio",
        "layers": "bio",
        "up": "io",
    }
    config = rl.LoraConfig(rank=3, alpha=5.0)
    found = extract(BASE, merged, sites, config=config)
    again = adapted(found.config)
    assert again.sites == found.sites
    np.testing.assert_allclose(
        quick.run(again.apply, found.params, X), quick.run(model, merged, X), atol=1e-5
    )
    whole = rl.merge(found.params, found.sites)
    for path in ("q", "o", "layers", "up"):
        np.testing.assert_allclose(whole[path], merged[path], atol=1e-5)
    assert max(found.errors.column("error")) < 2e-3
    assert found.errors.select(path="layers").column("module") == ["0", "1", "2"]


def test_the_scale_is_that_of_the_config(tuned):
    merged, sites = tuned
    config = rl.LoraConfig(rank=3, alpha=5.0, scaling="lora", dtype="bfloat16")
    found = extract(BASE, merged, sites, config=config)
    assert {site.scale for site in found.sites} == {rl.scale(5.0, 3, "lora")}
    assert {x.dtype.name for x in jax.tree.leaves(found.params.lora)} == {"bfloat16"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("rank", [3, 2])
def test_errors_hold_what_the_cast_of_the_factors_takes_away(tuned, dtype, rank):
    merged, sites = tuned
    found = extract(BASE, merged, sites, config=rl.LoraConfig(rank=rank, dtype=dtype))
    for site in found.sites:
        a, b = (np.asarray(found.params.lora[site.path][n], np.float64) for n in "ab")
        added = site.scale * np.einsum(delta_subscripts(site.axes), a, b)
        change = merged[site.path].astype("float64") - BASE[site.path]
        stack = sum(letter == "b" for letter in site.axes)
        axes = tuple(range(stack, change.ndim))
        expected = np.sqrt(((change - added) ** 2).sum(axes) / (change**2).sum(axes))
        rows = found.errors.select(path=site.path)
        np.testing.assert_allclose(rows.column("error"), expected.ravel(), rtol=0.01, atol=1e-4)
        np.testing.assert_allclose(rows.column("energy"), 1 - expected.ravel() ** 2, atol=1e-3)


def test_all_the_energy_needs_the_rank_of_the_adapter(tuned):
    merged, sites = tuned
    found = extract(BASE, merged, sites, energy=0.9999)
    assert {site.rank for site in found.sites} == {3}
    assert min(found.errors.column("energy")) >= 0.9999


def test_less_energy_gives_each_site_its_own_smallest_rank(tuned):
    merged, sites = tuned
    found = extract(BASE, merged, sites, energy=0.8, config=rl.LoraConfig(rank=1, alpha=3.0))
    assert len({site.rank for site in found.sites}) > 1
    assert min(found.errors.column("energy")) >= 0.8
    assert {site.alpha for site in found.sites} == {3.0}
    smaller = tuple(rl.Rule(s.path, rank=s.rank - 1) for s in found.sites if s.rank > 1)
    less = extract(BASE, merged, sites, config=rl.LoraConfig(rank=1, rules=smaller))
    for rule in smaller:
        assert min(less.errors.select(path=rule.pattern).column("energy")) < 0.8


def test_a_cap_on_the_rank_is_kept_and_its_loss_is_told(tuned):
    merged, sites = tuned
    found = extract(BASE, merged, sites, energy=0.9999, max_rank=2)
    assert {site.rank for site in found.sites} == {2}
    assert max(found.errors.column("error")) > 0.1


def test_the_result_is_the_best_approximation_of_its_rank():
    change = np.random.default_rng(0).normal(size=(12, 9))
    found = extract({"w": jnp.zeros((12, 9))}, {"w": jnp.asarray(change, jnp.float32)}, rank=4)
    u, s, vt = np.linalg.svd(change)
    whole = rl.merge(found.params, found.sites)["w"]
    np.testing.assert_allclose(whole, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)
    error = np.linalg.norm(s[4:]) / np.linalg.norm(s)
    np.testing.assert_allclose(found.errors.column("error"), [error], rtol=1e-4)
    a, b = found.params.lora["w"]["a"], found.params.lora["w"]["b"]
    np.testing.assert_allclose(jnp.linalg.norm(a), jnp.linalg.norm(b), rtol=1e-5)


def test_a_sharded_fine_tune_is_extracted_under_explicit_axes():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    change = np.random.default_rng(0).normal(size=(12, 9)).astype("float32")
    base, tuned = ({"w": x} for x in (0 * change, change))
    placed = jax.device_put((base, tuned), NamedSharding(mesh, PartitionSpec("d")))
    with jax.set_mesh(mesh):
        found = extract(*placed, rank=9)
        whole = rl.merge(found.params, found.sites)["w"]
    np.testing.assert_allclose(whole, change, atol=1e-5)


def test_a_rank_above_the_smaller_side_is_filled_with_zeros():
    change = jnp.asarray(np.random.default_rng(0).normal(size=(12, 9)), jnp.float32)
    with pytest.warns(UserWarning, match="rank 11 is above 9"):
        found = extract({"w": jnp.zeros((12, 9))}, {"w": change}, rank=11)
    assert found.params.lora["w"]["a"].shape == (12, 11)
    np.testing.assert_allclose(rl.merge(found.params, found.sites)["w"], change, atol=1e-5)


def test_a_change_that_no_adapter_holds_is_reported():
    base = {"w": jnp.zeros((12, 9)), "gain": jnp.ones(4)}
    tuned = {"w": jnp.ones((12, 9)), "gain": jnp.zeros(4)}
    row = extract(base, tuned, rank=1).errors.select(path="gain").records()[0]
    assert row["rank"] is None and row["error"] == 1.0 and row["norm"] == 2.0


def test_extract_needs_a_size():
    tree = {"w": jnp.ones((12, 9))}
    with pytest.raises(rl.AdapterError, match=r"needs a rank or a share of the energy"):
        extract(tree, tree)
    with pytest.raises(rl.AdapterError, match=r"found rank=2, energy=0\.5"):
        extract(tree, tree, rank=2, energy=0.5)
    with pytest.raises(rl.AdapterError, match=r"energy is a share.*found 90"):
        extract(tree, tree, energy=90)
    with pytest.raises(rl.AdapterError, match=r"max_rank limits what energy"):
        extract(tree, tree, rank=2, max_rank=3)


def test_extract_refuses_trees_of_two_models():
    with pytest.raises(rl.AdapterError, match=r"'w' has shape \(12, 9\) in base and \(9, 12\)"):
        extract({"w": jnp.ones((12, 9))}, {"w": jnp.ones((9, 12))}, rank=1)


def test_extract_refuses_weights_that_are_not_finite():
    with pytest.raises(rl.AdapterError, match=r"'w': the change is not finite"):
        extract({"w": jnp.zeros((12, 9))}, {"w": jnp.full((12, 9), jnp.nan)}, rank=4)


# Ranks under a budget.


def spectra(seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for n in range(6):
        stack = (3,) if n % 2 else ()
        s = -np.sort(-rng.exponential(size=(*stack, 8)), axis=-1)
        matrix = tuple(rng.integers(8, 40, 2).tolist())
        found.append(Spectrum(f"layer.{n}/w+", matrix, s, np.linalg.norm(s, axis=-1) * 1.2))
    return Spectra(found)


def cost(found, rules):
    return sum(r.rank * parameters_per_rank(item) for r, item in zip(rules, found, strict=True))


@pytest.mark.parametrize("relative", [True, False])
def test_no_budget_is_ever_exceeded_and_little_is_left(relative):
    for seed in range(10):
        found = spectra(seed)
        least = cost(found, [rl.Rule("x", rank=1)] * 6)
        for budget in (least, least + 1, 2 * least, 3 * least):
            rules = allocate_ranks(found, budget, relative=relative)
            assert cost(found, rules) <= budget
            cheapest = min(
                parameters_per_rank(item)
                for item, rule in zip(found, rules, strict=True)
                if rule.rank < 8
            )
            assert budget - cost(found, rules) < cheapest or budget == 3 * least


def test_more_budget_never_takes_energy_away():
    found = spectra()
    captured = [
        sum(
            float((item.s[..., : rule.rank] ** 2 / item.total[..., None] ** 2).sum())
            for item, rule in zip(found, allocate_ranks(found, budget), strict=True)
        )
        for budget in range(900, 4000, 100)
    ]
    assert np.all(np.diff(captured) >= -1e-9)


def test_the_largest_budget_gives_every_known_rank():
    assert {rule.rank for rule in allocate_ranks(spectra(), 10**9)} == {8}


def test_the_greedy_order_captures_the_most_where_costs_are_equal():
    steep, flat = np.array([8.0, 1, 1, 1]), np.array([4.0, 4, 4, 4])
    found = Spectra(
        [Spectrum(name, (8, 8), s, np.linalg.norm(s)) for name, s in (("a", steep), ("b", flat))]
    )
    assert [rule.rank for rule in allocate_ranks(found, 16 * 5)] == [1, 4]


def test_a_pattern_matches_its_own_path_alone():
    found = spectra()
    for rule, item in zip(allocate_ranks(found, 10**9), found, strict=True):
        assert [i.path for i in found if re.fullmatch(rule.pattern, i.path)] == [item.path]


def test_adapt_accepts_the_rules_and_keeps_to_the_budget(tuned):
    merged, sites = tuned
    rules = allocate_ranks(delta_spectrum(BASE, merged, k=3, sites=sites), 200)
    adapters = adapted(rl.LoraConfig(rank=1, rules=rules)).sites
    assert 150 < sum(site.parameters for site in adapters) <= 200
    assert {site.path: site.rank for site in adapters} == {r.pattern: r.rank for r in rules}


def test_a_budget_too_small_names_the_least_that_suffices():
    found = spectra()
    least = cost(found, [rl.Rule("x", rank=1)] * 6)
    with pytest.raises(rl.AdapterError, match=rf"rank 1 everywhere takes {least:,}"):
        allocate_ranks(found, least - 1)


def test_no_spectra_at_all_are_refused():
    with pytest.raises(rl.AdapterError, match="asked for 0 sites"):
        allocate_ranks(Spectra(), 100)
