"""Intruder dimensions: closed cases, chance, and the oracle of a full SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rslora_jax as rl
from rslora_jax.analysis.spectra.intruders import chance_cosine, intruders

RNG = np.random.default_rng(0)
Q, P = (np.linalg.qr(RNG.normal(size=(40, 40)))[0] for _ in range(2))
S = np.linspace(5, 1, 40)
# Orthonormal directions whose cosine with every output vector of BASE is at most sqrt(2 / 40).
WAVES = np.sqrt(2 / 40) * np.cos(np.pi * np.outer(np.arange(1, 4), np.arange(40) + 0.5) / 40) @ P.T
BASE = {"w": jnp.asarray((Q * S) @ P.T, jnp.float32)}


def test_scaled_singular_values_are_no_intruders():
    tuned = {"w": jnp.asarray((Q * (2 * S)) @ P.T, jnp.float32)}
    found = intruders(BASE, tuned)
    assert found.table.column("intruders") == [0]
    np.testing.assert_allclose(found.cosines["w"], np.ones(10), atol=1e-4)


def test_a_large_change_in_new_directions_intrudes():
    tuned = {"w": BASE["w"] + jnp.asarray((Q[:, :3] * [300, 200, 100]) @ WAVES, jnp.float32)}
    found = intruders(BASE, tuned, k=3)
    assert found.table.column("intruders") == [3]
    assert np.all(found.cosines["w"] < 0.25)


def test_the_cosines_are_those_of_the_output_vectors():
    tuned = BASE["w"] + jnp.asarray(RNG.normal(size=(40, 40)), jnp.float32)
    before, after = (np.linalg.svd(np.asarray(x, float))[2] for x in (BASE["w"], tuned))
    exact = np.abs(after[:10] @ before.T).max(1)
    found = intruders(BASE, {"w": tuned}).cosines["w"]
    np.testing.assert_allclose(found, exact, atol=2e-3)


def test_stacks_and_other_layouts_give_one_count_a_module():
    still = np.asarray(BASE["w"])
    new = still + 100 * Q[:, :1] @ WAVES[:1]
    stack = {"w": jnp.asarray(np.stack([still, still]).transpose(2, 0, 1).reshape(8, 5, 2, 40))}
    tuned = {"w": jnp.asarray(np.stack([still, new]).transpose(2, 0, 1).reshape(8, 5, 2, 40))}
    site = rl.Site("w", "oobi", (8, 5, 2, 40), "float32")
    found = intruders(stack, {"w": tuned["w"].astype("float32")}, k=1, sites=[site])
    assert found.table.column("intruders") == [0, 1]
    assert found.table.column("module") == ["0", "1"]


def test_an_adapter_counts_like_its_merged_weights():
    site = rl.Site("w", "io", (40, 40), "float32", rank=1, alpha=1.0, scale=5.0)
    a, b = (jnp.asarray(x, jnp.float32) for x in (20 * Q[:, :1], WAVES[:1]))
    params = rl.LoraParams(BASE, {"w": {"a": a, "b": b}})
    found = intruders(BASE, params, k=1, sites=[site])
    merged = intruders(BASE, rl.merge(params, [site]), k=1)
    np.testing.assert_array_equal(found.cosines["w"], merged.cosines["w"])
    assert found.table.column("intruders") == [1]


def test_sharded_weights_count_the_same_under_explicit_axes():
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(AxisType.Explicit,) * 2)
    tuned = {"w": BASE["w"] + jnp.asarray(100 * Q[:, :1] @ WAVES[:1], jnp.float32)}
    placed = jax.device_put((BASE, tuned), NamedSharding(mesh, PartitionSpec("d", "e")))
    assert intruders(*placed, k=1).table.column("intruders") == [1]


@pytest.mark.parametrize("size", [100, 400])
def test_chance_is_what_random_directions_reach(size):
    """Simulated: the cosines of a random direction with the vectors of any basis."""
    directions = RNG.normal(size=(2000, size))
    cosines = np.abs(directions / np.linalg.norm(directions, axis=1, keepdims=True)).max(1)
    assert 0.9 < cosines.mean() / chance_cosine(size) < 1.0


def test_the_table_shows_chance_beside_epsilon():
    row = intruders(BASE, BASE).table.records()[0]
    assert row["epsilon"] == 0.5
    assert row["chance"] == chance_cosine(40)


def test_an_adapter_needs_its_sites():
    with pytest.raises(rl.AdapterError, match=r"LoraParams without sites"):
        intruders(BASE, rl.LoraParams(BASE, {}))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"epsilon": 0.0}, {"epsilon": 1.5}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(rl.AdapterError, match=r"needs k of at least 1 and epsilon in \(0, 1\]"):
        intruders(BASE, BASE, **wrong)


def test_weights_that_are_not_finite_are_refused_by_path():
    with pytest.raises(rl.AdapterError, match=r"'w': the singular vectors are not finite"):
        intruders(BASE, {"w": BASE["w"] * jnp.nan})
