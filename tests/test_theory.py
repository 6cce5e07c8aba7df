"""The exponents and closed forms of the theory, against tables, and against random adapters."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rl
from rslora_jax.analysis.laws.closed_forms import (
    adam_first_step,
    crossover_rank,
    grad_b_square,
    reconstruction_error,
    sgd_first_step,
)
from rslora_jax.analysis.laws.theory import (
    LAWS,
    QUANTITIES,
    Exponent,
    theory,
    verdict,
)

RATE = 1e-3
SCALINGS = ("lora", "rslora", "constant")
LOW = (8, 16, 32, 64, 128, 256)
HIGH = (256, 512, 1024, 2048, 4096)

# (optimizer, quantity, regime): exponents under alpha/r, alpha/sqrt(r) and a constant scale.
TABLE = {
    ("sgd", "grad_b", "low"): (-0.5, 0, 0.5),
    ("adam", "grad_b", "low"): (-0.5, 0, 0.5),
    ("sgd", "grad_b_rms", "low"): (-1, -0.5, 0),
    ("sgd", "signal", "low"): (-1, 0, 1),
    ("sgd", "output_trained", "low"): (-1, 0, 1),
    ("sgd", "delta", "low"): (-1.5, -0.5, 0.5),
    ("sgd", "output", "low"): (-1.5, -0.5, 0.5),
    ("sgd", "input_grad", "low"): (-1.5, -0.5, 0.5),
    ("sgd", "delta", "high"): (-1, 0, 1),
    ("sgd", "output", "high"): (-1, 0, 1),
    ("sgd", "input_grad", "high"): (-1, 0, 1),
    ("sgd", "grad_a", "low"): (-1.5, -0.5, 0.5),
    ("adam", "signal", "low"): (0, 0.5, 1),
    ("adam", "output_trained", "low"): (0, 0.5, 1),
    ("adam", "delta", "low"): (-0.5, 0, 0.5),
    ("adam", "delta", "high"): (0, 0.5, 1),
    ("adam", "grad_a", "low"): (-0.5, 0, 0.5),
    ("adam", "grad", "low"): (-0.5, 0, 0.5),
    ("normalized", "signal", "low"): (-0.5, 0, 0.5),
}
# (init, quantity) under SGD: exponents under alpha/r and alpha/sqrt(r).
WRONG_INITS = {
    ("gaussian", "grad_b"): (-1.5, -1),
    ("gaussian", "signal"): (-3, -2),
    ("fan_out", "grad_b"): (-1, -0.5),
    ("fan_out", "signal"): (-2, -1),
}


@pytest.mark.parametrize("row", TABLE, ids="-".join)
@pytest.mark.parametrize("init", ["kaiming", "normal"])
def test_the_exponents_are_those_of_the_published_table(row, init):
    optimizer, quantity, regime = row
    for scaling, exponent in zip(SCALINGS, TABLE[row], strict=True):
        found = theory(scaling, optimizer, init, regime)[quantity]
        assert found == Exponent(exponent, exponent)


@pytest.mark.parametrize("row", WRONG_INITS, ids="-".join)
def test_an_init_that_shrinks_with_the_rank_adds_its_own_exponent(row):
    init, quantity = row
    for scaling, exponent in zip(SCALINGS, WRONG_INITS[row], strict=False):
        assert theory(scaling, "sgd", init)[quantity] == Exponent(exponent, exponent)


@pytest.mark.parametrize("optimizer", LAWS)
def test_only_the_root_of_the_rank_keeps_what_sgd_steps_along_the_gradient(optimizer):
    stable = {"sgd": -0.5, "normalized": -0.5, "adam": -1.0}[optimizer]
    for scaling in (-1.25, -1.0, -0.75, -0.5, -0.25, 0.0):
        assert (theory(scaling, optimizer)["signal"].low == 0) == (scaling == stable)


@pytest.mark.parametrize("optimizer", LAWS)
def test_no_regime_is_the_range_of_both(optimizer):
    low, high, both = (theory("rslora", optimizer, regime=r) for r in ("low", "high", None))
    for name in QUANTITIES:
        least = low["output" if name == "output_trained" else name]  # inputs that interfere
        assert both[name] == Exponent(least.low, high[name].high)


def test_the_whole_gradient_is_a_range_where_that_of_a_takes_over():
    found = theory("rslora", "adam", "gaussian")
    assert found["grad"] == Exponent(found["grad_b"].low, found["grad_a"].high) == Exponent(-1, 0)


def test_the_exponents_are_a_mapping_of_all_quantities_and_print_as_a_table():
    found = theory("lora", "sgd")
    assert tuple(found) == QUANTITIES and len(found) == len(QUANTITIES)
    assert found.table().select(quantity="signal").rows == (
        ("signal", "gamma^2 r sigma^2", "-1", "collapsing"),
    )
    assert str(found) == str(found.table())


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (0.0, "stable"),
        (0.1, "stable"),
        (-0.1, "stable"),
        (0.11, "exploding"),
        (-0.11, "collapsing"),
        (Exponent(-0.5, 0.0), "collapsing"),
        (Exponent(-0.5, 0.5), "exploding"),
        (Exponent(-0.05, 0.05), "stable"),
        (float("nan"), "unknown"),
        (float("-inf"), "collapsing"),
    ],
)
def test_a_verdict_is_that_of_the_worse_end(exponent, expected):
    assert verdict(exponent) == expected


def test_a_tolerance_widens_what_counts_as_stable():
    assert (verdict(0.3, tolerance=0.3), verdict(0.3, tolerance=0.0)) == ("stable", "exploding")


def test_the_distance_to_a_range_is_zero_inside_it():
    found = [Exponent(-0.5, 0.0).distance(x) for x in (-1.0, -0.5, -0.2, 0.0, 0.5)]
    assert found == [0.5, 0.0, 0.0, 0.0, 0.5]


# Measured: one step of y = x (W + scale a b) from b = 0, with nested a: every rank, scaling,
# optimizer and init in one program, by the definitions and not by the theory's identities.

INITS = ("kaiming", "normal", "gaussian", "fan_out")
OPTIMIZERS = ("sgd", "adam", "normalized")


@functools.cache
def measure(inputs, ranks, samples, draws):
    """{(scaling, optimizer, init): {quantity: mean over draws, [ranks]}}."""
    x, u, other = (
        jax.random.normal(jax.random.key(k), (rows, width))
        for k, rows, width in ((1, samples, inputs), (2, samples, 16), (3, 32, inputs))
    )
    cases = [(s, i, r) for s in SCALINGS for i in INITS for r in ranks]
    scales = jnp.array([rl.scale(16.0, r, s) if s != "constant" else 16.0 for s, _, r in cases])
    stds = jnp.array([std(i, inputs, r) for _, i, r in cases])
    uniform = jnp.array([i == "kaiming" for _, i, _ in cases])
    sizes = jnp.array([r for *_, r in cases])

    def draw(key):
        normal = jax.random.normal(key, (inputs, ranks[-1]))
        flat = jax.random.uniform(key, normal.shape, minval=-1.0)

        def case(row):
            size, deviation, is_uniform, scale = row
            a = jnp.where(is_uniform, flat, normal) * deviation * (jnp.arange(ranks[-1]) < size)
            return one_step(a, size, scale, (x, u, other))

        return jax.lax.map(case, (sizes, stds, uniform, scales))

    found = jax.jit(lambda keys: jax.lax.map(draw, keys))(
        jax.random.split(jax.random.key(0), draws)
    )
    means = {name: np.asarray(v, np.float64).mean(0) for name, v in found.items()}
    return {
        (s, o, i): {
            name: v.reshape(len(SCALINGS), len(INITS), len(ranks), 3)[j, k, :, m]
            for name, v in means.items()
        }
        for j, s in enumerate(SCALINGS)
        for k, i in enumerate(INITS)
        for m, o in enumerate(OPTIMIZERS)
    }


def std(init, inputs, rank):
    """The multiplier of a draw from N(0, 1), or for "kaiming" from U(-1, 1)."""
    return {"gaussian": 1 / rank, "fan_out": rank**-0.5}.get(init, inputs**-0.5)


def one_step(a, rank, scale, data):
    """Every quantity for one `a`: scalars by name, [optimizers]."""
    x, u, other = data
    gradient = x.T @ u
    grad_b = scale * a.T @ gradient
    moves = jnp.stack([grad_b, jnp.sign(grad_b), grad_b / jnp.linalg.norm(grad_b)])
    norm = jax.vmap(jnp.linalg.norm)
    overlap = x.T @ jnp.linalg.solve(x @ x.T, x @ other.T)
    b = -RATE * moves
    delta = scale * a @ b
    size = jnp.broadcast_to(jnp.linalg.norm(grad_b), 3)
    grad_a = norm(scale * gradient @ b.mT)
    return {
        "grad_b": size,
        "grad_b_rms": size / jnp.sqrt(rank * b.shape[-1]),
        "grad_a": grad_a,
        "signal": -jnp.sum(delta * gradient, (1, 2)),
        "delta": norm(delta),
        "output": norm(other @ delta),
        "orthogonal": norm((other - overlap.T) @ delta),
        "output_trained": norm(x @ delta),
        "input_grad": norm(u @ delta.mT),
    }


def slope(ranks, values):
    return np.polyfit(np.log(ranks), np.log(values), 1)[0]


every_case = pytest.mark.parametrize(
    "case",
    [(s, o, i) for s in SCALINGS for o in OPTIMIZERS for i in INITS],
    ids="-".join,
)


@every_case
def test_ranks_below_the_width_follow_the_low_regime(case):
    scaling, optimizer, init = case
    expected = theory(scaling, optimizer, init)
    for name, values in measure(1024, LOW, 1, 8)[case].items():
        law = expected["output" if name == "orthogonal" else name]
        assert slope(LOW, values) == pytest.approx(law.low, abs=0.05), name


@every_case
def test_ranks_above_the_width_follow_the_high_regime(case):
    scaling, optimizer, init = case
    low, high = (theory(scaling, optimizer, init, regime) for regime in ("low", "high"))
    for name, values in measure(32, HIGH, 1, 8)[case].items():
        law = low["output"] if name == "orthogonal" else high[name]
        assert slope(HIGH, values) == pytest.approx(law.low, abs=0.05), name


@every_case
def test_a_batch_of_many_inputs_follows_the_same_laws(case):
    scaling, optimizer, init = case
    expected, both = (theory(scaling, optimizer, init, regime) for regime in ("low", None))
    found = measure(1024, LOW, 64, 4)[case]
    for name in ("grad_b", "grad_b_rms", "grad_a", "signal", "delta", "input_grad"):
        assert slope(LOW, found[name]) == pytest.approx(expected[name].low, abs=0.05), name
    interferes = slope(LOW, found["output_trained"])
    assert both["output_trained"].low + 0.1 < interferes < both["output_trained"].high - 0.1


def test_a_standard_deviation_of_one_over_the_rank_undoes_the_stability_of_rslora():
    found = measure(1024, LOW, 1, 8)
    assert slope(LOW, found["rslora", "sgd", "gaussian"]["grad_b"]) == pytest.approx(-1, abs=0.02)
    assert slope(LOW, found["rslora", "sgd", "kaiming"]["grad_b"]) == pytest.approx(0, abs=0.02)


# Closed forms against means over draws.

GRADIENT = jax.random.normal(jax.random.key(7), (48, 5)) * jnp.arange(1.0, 6.0)


@functools.cache
def first_steps(rank, scaling, init):
    """Means over 4,096 draws of |gB|^2 and, for SGD and Adam, of |dW|^2 and <dW, -G>."""
    scale = rl.scale(3.0, rank, scaling)

    def draw(key):
        shape = (len(GRADIENT), rank)
        normal, flat = jax.random.normal(key, shape), jax.random.uniform(key, shape, minval=-1.0)
        a = (normal if init == "normal" else flat) / math.sqrt(len(GRADIENT))
        grad_b = scale * a.T @ GRADIENT
        deltas = [-0.1 * scale * a @ move for move in (grad_b, jnp.sign(grad_b))]
        steps = [(jnp.sum(d**2), -jnp.sum(d * GRADIENT)) for d in deltas]
        return jnp.sum(grad_b**2), *steps

    keys = jax.random.split(jax.random.key(rank), 4096)
    found = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=256))(keys)
    return jax.tree.map(lambda v: np.asarray(v, np.float64).mean(), found)


@pytest.mark.parametrize(("init", "kurtosis"), [("normal", 3.0), ("kaiming", 1.8)])
@pytest.mark.parametrize(("rank", "scaling"), [(4, "lora"), (32, "rslora"), (128, "lora")])
def test_the_closed_forms_are_the_means_over_draws(rank, scaling, init, kurtosis):
    std = 1 / math.sqrt(len(GRADIENT) * (1 if init == "normal" else 3))
    scale = rl.scale(3.0, rank, scaling)
    square, sgd, adam = first_steps(rank, scaling, init)
    near = functools.partial(np.testing.assert_allclose, rtol=0.02)
    near(square, grad_b_square(GRADIENT, scale, std, rank))
    near(sgd, sgd_first_step(GRADIENT, 0.1, scale, std, rank, kurtosis))
    near(adam, adam_first_step(GRADIENT, 0.1, scale, std, rank))


@pytest.mark.parametrize(
    ("optimizer", "step"), [("sgd", sgd_first_step), ("adam", adam_first_step)]
)
def test_the_spread_and_the_signal_weigh_the_same_at_the_crossover(optimizer, step):
    wide = jnp.ones((4096, 1))
    rank = round(crossover_rank(4096, optimizer))
    total = float(step(wide, 1.0, 1.0, 1.0, rank).delta_square)
    along = float(step(wide, 1.0, 1.0, 1.0, rank).signal) ** 2 / 4096
    assert total / along == pytest.approx(2, rel=2e-3)


def test_closed_forms_can_be_compiled():
    step = jax.jit(sgd_first_step, static_argnums=4)(GRADIENT, 0.1, 2.0, 0.5, 8)
    direct = sgd_first_step(GRADIENT, 0.1, 2.0, 0.5, 8)
    np.testing.assert_allclose(step, direct, rtol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 4.0])
def test_a_truncated_and_scaled_matrix_has_the_error_of_its_two_causes(factor):
    rng = np.random.default_rng(3)
    u, s, vt = np.linalg.svd(rng.normal(size=(12, 9)), full_matrices=False)
    truncated = (u[:, :4] * s[:4]) @ vt[:4]
    full = (u * s) @ vt
    found = reconstruction_error(float((s[:4] ** 2).sum() / (s**2).sum()), factor)
    direct = np.linalg.norm(full - factor * truncated) / np.linalg.norm(full)
    assert found.error == pytest.approx(direct, rel=1e-12)
    assert found.scale + found.rank == pytest.approx(found.error**2, rel=1e-12)


def test_no_update_has_the_error_one_and_the_right_factor_leaves_the_rank_alone():
    assert reconstruction_error(0.84, 0.0).error == pytest.approx(1, rel=1e-15)
    assert reconstruction_error(0.84, 1.0) == (pytest.approx(0.4), 0.0, pytest.approx(0.16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory("rs", "sgd"), r"scaling must be one of .*'rslora'.* found 'rs'"),
        (lambda: theory(float("nan"), "sgd"), r"scaling must be .* finite number, found nan"),
        (lambda: theory(True, "sgd"), r"scaling must be .* found True"),
        (lambda: theory("lora", "adamw"), r"optimizer must be .* found 'adamw'. Use 'adam' for"),
        (lambda: theory("lora", "sgd", "xavier"), r"init must be one of .* found 'xavier'"),
        (lambda: theory("lora", "sgd", regime="mid"), r"regime must be 'low'.*found 'mid'"),
        (lambda: theory("lora", "sgd")["gradb"], r"no quantity 'gradb'. The nearest are 'grad_b'"),
        (lambda: verdict(0.0, tolerance=-1), r"tolerance of at least 0, found -1"),
        (lambda: grad_b_square(GRADIENT, 1.0, 1.0, 0), r"rank must be at least 1, found 0"),
        (lambda: sgd_first_step(GRADIENT[0], 1, 1, 1, 1), r"one matrix.*found the shape \(5,\)"),
        (lambda: adam_first_step(GRADIENT[None], 1, 1, 1, 1), r"one matrix.*\(1, 48, 5\)"),
        (lambda: crossover_rank(8, "lion"), r"optimizer must be one of .*found 'lion'"),
        (lambda: crossover_rank(0, "sgd"), r"at least 1 input, found 0"),
        (lambda: reconstruction_error(1.2, 1.0), r"between 0 and 1, found 1.2"),
    ],
)
def test_bad_input_is_refused_with_what_was_found(call, message):
    with pytest.raises(rl.AdapterError, match=message):
        call()
