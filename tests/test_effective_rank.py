"""Effective ranks: closed forms, the seed's matrices, and what is known of a cut spectrum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rl
from rslora_jax.analysis.spectra.effective_rank import (
    effective_ranks,
    energy_by_rank,
    energy_rank,
    gavish_donoho_rank,
    participation_rank,
)
from rslora_jax.analysis.spectra.gavish_donoho import gavish_donoho_threshold


def seed_matrices():
    """The style and facts updates of the articles, in the order of their draws (seed 42)."""
    rng = np.random.RandomState(42)
    found = []
    for rank, values in ((4, np.linspace(5, 0.5, 4)), (64, np.linspace(3, 0.5, 64))):
        u, v = rng.randn(64, rank), rng.randn(64, rank)
        u, v = np.linalg.qr(u)[0], np.linalg.qr(v)[0]
        found.append(u @ np.diag(values) @ v.T + 0.01 * rng.randn(64, 64))
    return found


@pytest.fixture(scope="module")
def spectra():
    return np.stack([np.linalg.svd(matrix, compute_uv=False) for matrix in seed_matrices()])


def test_every_rank_of_k_equal_values_is_k():
    ranks = effective_ranks(np.array([3.0] * 5 + [0.0] * 3))
    assert np.allclose(ranks[:4], 5)
    assert (ranks.energy_90, ranks.energy_95, ranks.energy_99) == (5, 5, 5)
    assert ranks.truncated is False


def test_every_rank_of_zeros_is_zero():
    assert not np.any(effective_ranks(np.zeros((2, 4)))[:8])


def test_tiny_values_do_not_underflow():
    assert np.isclose(participation_rank(np.full(4, 1e-12, np.float32)), 4)


def test_a_geometric_spectrum_has_the_closed_forms():
    q, s = 0.25, 0.5 ** np.arange(60)
    ranks = effective_ranks(s)
    assert np.isclose(ranks.stable, 1 / (1 - q))
    assert np.isclose(ranks.participation, (1 + q) / (1 - q))
    assert np.isclose(ranks.entropy_energy, np.exp(-np.log(1 - q) - q / (1 - q) * np.log(q)))
    assert np.isclose(ranks.entropy, 4)
    assert np.allclose(energy_by_rank(s)[:3], 1 - q ** np.arange(1, 4))


def test_the_seed_matrices_have_the_recorded_ranks(spectra):
    ranks = effective_ranks(spectra)
    assert np.allclose(
        spectra[0][:6], [4.994811, 3.496074, 2.006043, 0.516988, 0.144737, 0.140359], atol=5e-7
    )
    assert np.allclose(spectra[1][:4], [2.999406, 2.959710, 2.913826, 2.874805], atol=5e-7)
    assert np.allclose(ranks.stable, [1.676, 25.68], atol=5e-3)
    assert np.allclose(ranks.entropy, [11.78, 58.28], atol=5e-3)
    assert np.allclose(ranks.entropy_energy, [2.71, 48.51], atol=5e-3)
    assert np.allclose(ranks.participation, [2.22, 42.0], atol=5e-2)
    assert ranks.energy_90.tolist() == [3, 41]
    assert ranks.energy_95.tolist() == [3, 48]
    assert ranks.energy_99.tolist() == [4, 58]
    assert ranks.gavish_donoho.tolist() == [4, 0]


def test_the_seed_matrices_capture_the_recorded_energy(spectra):
    captured = 100 * energy_by_rank(spectra)
    assert np.allclose(captured[0, [3, 7]], [99.1524, 99.3367], atol=5e-5)
    assert np.allclose(captured[1, [3, 7, 15]], [14.9368, 28.3393, 50.8483], atol=5e-5)


def test_jax_numpy_and_traced_spectra_agree(spectra):
    expected = effective_ranks(spectra)
    found = jax.jit(lambda s: effective_ranks(s)[:8])(jnp.asarray(spectra, jnp.float32))
    for x, y in zip(found, expected[:8], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_a_cut_spectrum_is_exact_in_energy_and_a_lower_bound_elsewhere(spectra):
    whole = effective_ranks(spectra)
    total = np.linalg.norm(spectra, axis=-1)
    for k in (3, 8, 50, 63):
        cut = effective_ranks(spectra[:, :k], total=total, shape=(64, 64))
        assert cut.truncated
        np.testing.assert_allclose(cut.stable, whole.stable, rtol=1e-12)
        for name in ("energy_90", "energy_95", "energy_99"):
            exact = getattr(whole, name)
            assert np.array_equal(getattr(cut, name), np.minimum(exact, k + 1))
        for x, y in zip(cut[:8], whole[:8], strict=True):
            assert np.all(x <= y * (1 + 1e-12))
        np.testing.assert_allclose(
            energy_by_rank(spectra[:, :k], total=total), energy_by_rank(spectra)[:, :k], rtol=1e-12
        )
    assert not effective_ranks(spectra, total=total, shape=(64, 64)).truncated


def test_captured_energy_never_falls():
    s = -np.sort(-np.abs(np.random.default_rng(0).normal(size=(100, 12))))
    assert np.all(np.diff(energy_by_rank(s)) >= 0)


def test_the_threshold_follows_the_published_polynomial():
    """Gavish and Donoho 2014, equation 5, good to about 0.02 by their own account."""
    for beta in (0.05, 0.2, 0.5, 0.8, 1.0):
        polynomial = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        assert abs(gavish_donoho_threshold(beta) - polynomial) < 0.02


def test_white_noise_has_no_direction_above_the_threshold():
    rng = np.random.default_rng(0)
    noise = np.linalg.svd(rng.normal(size=(8, 40, 100)), compute_uv=False)
    assert gavish_donoho_rank(noise, shape=(40, 100)).max() == 0
    signal = np.linalg.svd(
        rng.normal(size=(40, 100)) + 50 * np.eye(40, 100) * (np.arange(40) < 3)[:, None],
        compute_uv=False,
    )
    assert gavish_donoho_rank(signal, shape=(40, 100)) == 3


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(rl.AdapterError, match=r"share is a part of the energy, in \(0, 1\]"):
        energy_rank(np.ones(3), share)


def test_more_values_than_the_shape_allows_are_refused():
    with pytest.raises(rl.AdapterError, match=r"k from 1 to 3 \(shape \(3, 9\)\).*shape \(4,\)"):
        effective_ranks(np.ones(4), shape=(3, 9))


def test_an_aspect_ratio_above_one_is_refused():
    with pytest.raises(rl.AdapterError, match=r"smaller side over the larger.*found 2\.0"):
        gavish_donoho_threshold(2.0)
