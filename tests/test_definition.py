"""Definition 3.1 over many draws: what the theorem says, and what one run sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rl
from rslora_jax.analysis.laws import random_adapters
from rslora_jax.analysis.laws.definition import definition_check, definition_slopes
from rslora_jax.analysis.laws.theory import theory
from rslora_jax.tables import Table

RANKS, N = (4, 8, 16, 32, 64), 512


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Optimizations are worth their time where small programs run on many draws."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@functools.cache
def checked(scaling, optimizer="sgd", init="kaiming", steps=1):
    return definition_check(RANKS, scaling, optimizer, init, draws=192, steps=steps, n=N)


def slopes(*setting, quantity, moment=2):
    return definition_slopes(checked(*setting)).select(quantity=quantity, moment=moment)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("init", ["kaiming", "normal"])
def test_the_mean_over_draws_follows_the_theorem_and_the_norms_the_theory(scaling, optimizer, init):
    low, both = (theory(scaling, optimizer, init, regime) for regime in ("low", None))
    for row in definition_slopes(checked(scaling, optimizer, init)).records():
        name = row["quantity"]
        if name == "output":
            assert row["slope_of_mean"] is None
        else:
            assert row["slope_of_mean"] == pytest.approx(low["signal"].low, abs=0.05)
        if name == "input_grad":
            assert both[name].distance(row["slope_of_norm"]) == 0
        else:
            assert row["slope_of_norm"] == pytest.approx(low[name].low, abs=0.05)


def test_only_in_expectation_does_rslora_keep_the_gradient_into_the_input():
    (row,) = slopes("rslora", quantity="input_grad").records()
    assert (row["verdict_of_mean"], row["verdict_of_norm"]) == ("stable", "collapsing")
    assert row["slope_of_norm"] == pytest.approx(-0.47, abs=0.03)
    rows = checked("rslora").select(quantity="input_grad")
    expected = np.sqrt(1 + (N - 0.2) / np.array(RANKS))  # E|a a^T x|^2 over |E a a^T x|^2
    found = np.divide(rows.column("mean_of_norm"), rows.column("norm_of_mean"))
    np.testing.assert_allclose(found, expected, rtol=0.12)


def test_one_step_on_the_trained_input_has_the_size_of_its_closed_form():
    rows = checked("rslora").select(quantity="output_trained", moment=2)
    x, _, gradient = data()
    size = random_adapters.LEARNING_RATE * 16.0**2 * jnp.sum(x**2) / (3 * N)
    expected = size * jnp.sqrt(jnp.mean(gradient**2))
    np.testing.assert_allclose(rows.column("norm_of_mean"), float(expected), rtol=0.1)


def data():
    from rslora_jax.analysis.laws.definition import _data

    return _data(jax.random.split(jax.random.key(0))[1], N)


def test_the_orthogonal_input_sees_no_mean_at_all():
    x, other, _ = data()
    assert abs(float(x @ other)) < 1e-3 * float(x @ x)
    rows = checked("rslora").select(quantity="output", moment=2)
    small = np.divide(rows.column("norm_of_mean"), rows.column("mean_of_norm"))
    assert small.max() < 0.25


def test_under_adam_rslora_is_stable_away_from_the_trained_input_and_grows_on_it():
    (trained,) = slopes("rslora", "adam", quantity="output_trained").records()
    (other,) = slopes("rslora", "adam", quantity="output").records()
    assert (trained["verdict_of_norm"], other["verdict_of_norm"]) == ("exploding", "stable")


def test_a_standard_deviation_of_one_over_the_rank_collapses_under_rslora():
    (row,) = slopes("rslora", "sgd", "gaussian", quantity="output_trained").records()
    assert row["slope_of_mean"] == pytest.approx(-2, abs=0.05)
    assert row["theory_of_mean"] == "-2"


def test_several_small_steps_keep_the_exponents_of_one():
    (row,) = slopes("rslora", "sgd", "kaiming", 3, quantity="output_trained").records()
    assert row["slope_of_mean"] == pytest.approx(0, abs=0.05)
    one, three = (
        checked("rslora", "sgd", "kaiming", steps)
        .select(quantity="output_trained", moment=2)
        .column("mean_of_norm")
        for steps in (1, 3)
    )
    np.testing.assert_allclose(np.divide(three, one), 3, rtol=0.1)


@pytest.mark.parametrize("moment", [1, 2, 4])
def test_the_moments_are_means_of_powers(moment):
    """The output is a multiple of the output gradient, so their moments have one ratio."""
    rows = checked("rslora").select(quantity="output_trained")
    gradient = np.abs(np.asarray(data().gradient, np.float64))
    ratio = (gradient**moment).mean() ** (1 / moment) / (gradient**2).mean() ** 0.5
    found, square = (rows.select(moment=m).column("mean_of_norm") for m in (moment, 2))
    np.testing.assert_allclose(np.divide(found, square), ratio, rtol=1e-5)


@functools.cache
def overflowing():
    """A check whose largest rank overflows, and how often its program was traced."""
    traced, original = [], random_adapters._train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_adapters, "_train", lambda *args: traced.append(1) or original(*args))
        return definition_check((1, 2, 4096), 9.0, draws=2, n=4, steps=2), len(traced)


def test_all_ranks_share_one_compilation():
    assert overflowing()[1] == 1


def test_a_rank_that_overflows_is_reported_and_left_out_of_the_slope():
    table, _ = overflowing()
    shares = table.select(quantity="input_grad").column("finite")
    assert shares == [1.0, 1.0, 0.0]
    (last,) = table.select(quantity="input_grad", rank=4096).records()
    assert np.isnan([last["norm_of_mean"], last["mean_of_norm"], last["noise"]]).all()
    (row,) = definition_slopes(table).select(quantity="output", moment=2).records()
    assert row["ranks"] == 2 and np.isfinite(row["slope_of_norm"])


@functools.cache
def tiny(ranks, seed=0):
    key = jax.random.key(seed)
    return definition_check(ranks, "rslora", "adam", draws=1, n=7, steps=2, key=key)


def test_a_padded_rank_gives_the_numbers_of_its_own_run():
    padded, alone = tiny((2, 5)).select(rank=2), tiny((2,))
    norms, own = (np.array(table.column("mean_of_norm")) for table in (padded, alone))
    np.testing.assert_allclose(norms, own, rtol=1e-4)
    assert (own > 0).all()


def test_the_same_key_gives_the_same_draws_and_no_key_is_that_of_zero():
    assert tiny((2, 5)) != tiny((2, 5), seed=1)
    assert tiny((2, 5)) == definition_check((2, 5), "rslora", "adam", draws=1, n=7, steps=2)


def test_one_rank_and_one_draw_have_no_slope_and_no_noise():
    assert set(tiny((2,)).column("noise")) == {0.0}
    assert set(definition_slopes(tiny((2,))).column("slope_of_norm")) == {None}


def test_slopes_of_several_settings_stay_apart():
    rows = checked("lora").records() + checked("rslora").records()
    found = definition_slopes(Table.of(rows)).select(quantity="input_grad")
    assert found.column("verdict_of_mean") == ["collapsing", "stable"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: definition_check(()), r"ranks must be ints of at least 1, found \(\)"),
        (lambda: definition_check((0, 4)), r"ranks must be ints of at least 1, found \(0, 4\)"),
        (lambda: definition_check((8, 4)), r"ranks must increase, found \(8, 4\). Sort them"),
        (lambda: definition_check((4, 4)), r"ranks must increase, found \(4, 4\)"),
        (lambda: definition_check((4,), "rs"), r"scaling must be one of .*found 'rs'"),
        (lambda: definition_check((4,), optimizer="lion"), r"optimizer must .*found 'lion'"),
        (lambda: definition_check((4,), init="zero"), r"init must be one of .*found 'zero'"),
        (lambda: definition_check((4,), draws=0), r"draws must be an int of at least 1, found 0"),
        (lambda: definition_check((4,), steps=0), r"steps must be an int of at least 1, found 0"),
        (lambda: definition_check((4,), n=1.5), r"n must be an int of at least 1, found 1.5"),
        (lambda: definition_slopes(Table(("rank",), ((4,),))), r"no column 'scaling'"),
    ],
)
def test_bad_input_is_refused_with_what_was_found(call, message):
    with pytest.raises(rl.AdapterError, match=message):
        call()
