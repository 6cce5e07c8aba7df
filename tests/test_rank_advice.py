"""Rank advice: the loss first, everything else as a hint."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rl
from rslora_jax.analysis.spectra.bits import Bits, bits_rank
from rslora_jax.analysis.spectra.rank_advice import advise_rank

RNG = np.random.default_rng(0)
U, V = (np.linalg.qr(RNG.normal(size=(12, 12)))[0] for _ in range(2))
S = np.array([4.0, 3.0, 2.0, 1.0, *[0.01] * 8])
BASE = {"w": RNG.normal(size=(12, 12)).astype("float32"), "gain": np.ones(12, "float32")}
TUNED = {**BASE, "w": (BASE["w"] + (U * S) @ V.T).astype("float32")}
BATCHES = [RNG.normal(size=(6, 12)).astype("float32") for _ in range(2)]


def loss(tree, x):
    """Half of the squared distance of all outputs from those of the tuned tree."""
    return 0.5 * ((tree["w"] - TUNED["w"]) ** 2).sum() + 0 * (x @ tree["w"]).sum()


def advise(**changed):
    arguments = {"loss_fn": loss, "base": BASE, "tuned": TUNED, "batches": BATCHES}
    return advise_rank(**{**arguments, "ranks": (1, 2, 3, 4, 8), **changed})


@pytest.fixture(scope="module")
def advice():
    return advise(bits=Bits(100.0, per_parameter=0.5))


def test_the_losses_are_the_energy_that_each_rank_leaves(advice):
    left = 0.5 * np.array([(S[rank:] ** 2).sum() for rank in (0, 1, 2, 3, 4, 8)])
    np.testing.assert_allclose(advice.losses.column("loss")[:-1], left, atol=1e-4)
    assert advice.losses.column("loss")[-1] == 0


def test_the_rank_is_the_smallest_that_keeps_the_improvement(advice):
    # Rank 3 leaves 1/30 of the energy, rank 2 leaves 5/30.
    assert advice.rank == 3
    assert advise(tolerance=0.2).rank == 2
    assert advise(tolerance=0.01).rank == 4


def test_hints_are_ordered_by_trust_and_the_gradient_warns(advice):
    assert advice.table.columns == ("hint", "rank", "trust", "why")
    assert advice.table.column("trust") == ["high", "medium", "low", "low", "very low"]
    assert "any task" in advice.table.column("why")[-1]
    assert advice.table.column("rank")[:4] == [3, math.ceil(100 / (0.5 * 24)), 3, 4]
    assert "loss against truncation" in str(advice)


def test_the_gradient_hint_is_that_of_the_mean_gradient(advice):
    # The gradient of this loss at the base is minus the change.
    assert advice.table.column("rank")[-1] == 3


def test_all_ranks_and_batches_take_one_compilation():
    count = []

    def counted(tree, x):
        count.append(1)
        return loss(tree, x)

    advise(loss_fn=counted)
    assert len(count) == 3  # once for its shape, once for the losses, once for the gradient


def test_an_adapter_is_read_without_its_merged_weights():
    site = rl.Site("w", "io", (12, 12), "float32", rank=4, alpha=1.0, scale=0.5)
    a, b = U[:, :4] * S[:4] * 2, V[:, :4].T
    lora = {"w": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}
    found = advise(tuned=rl.LoraParams(BASE, lora), sites=[site])
    assert found.rank == 3
    np.testing.assert_allclose(found.losses.column("loss")[-1], 0.5 * 8e-4, atol=1e-4)


def test_a_spectrum_that_is_cut_gives_a_lower_bound_also_where_the_search_saw_it_all():
    # The sketch has 12 columns: nothing remains unseen, but only 2 of 4 values are kept.
    u, v = (np.linalg.qr(np.random.default_rng(k).normal(size=(12, 12)))[0] for k in (1, 9))
    base = {"w": np.zeros((12, 12), "float32")}
    tuned = {"w": ((u[:, :4] * 2.0 ** np.arange(2, -2, -1)) @ v[:4]).astype("float32")}
    tuned["w"] += 2 * np.outer(u[:, 4], v[4]).astype("float32")
    found = advise(
        base=base,
        tuned=tuned,
        loss_fn=lambda tree, _: 0.5 * ((tree["w"] - tuned["w"]) ** 2).sum(),
        ranks=(1, 2),
    )
    hints = {row["hint"]: row for row in found.table.records()}
    for name in ("90 % of the energy", "above the noise", "90 % of the gradient"):
        assert hints[name]["why"].startswith("at least; ")
    # 20 of 25.25 is below 90 %, whatever the two kept values hold of each other.
    assert hints["90 % of the energy"]["rank"] == hints["90 % of the gradient"]["rank"] == 3


def test_a_spectrum_that_is_known_whole_is_no_lower_bound():
    whole = advise(ranks=(1, 12))
    site = rl.Site("w", "io", (12, 12), "float32", rank=2, alpha=1.0, scale=1.0)
    lora = {"w": {"a": jnp.asarray(U[:, :2] * S[:2]), "b": jnp.asarray(V[:, :2].T)}}
    exact = advise(tuned=rl.LoraParams(BASE, lora), sites=[site], ranks=(1, 12))
    for found in (whole, exact):
        assert not any("at least" in why for why in found.table.column("why"))


def test_stacked_weights_share_one_rank():
    base = {"w": np.zeros((2, 12, 12), "float32")}
    tuned = {"w": np.stack([(U * S) @ V.T, 2 * V @ U.T]).astype("float32")}
    site = rl.Site("w", "bio", (2, 12, 12), "float32")
    found = advise(
        loss_fn=lambda tree, _: ((tree["w"] - tuned["w"])[0] ** 2).sum(),
        base=base,
        tuned=tuned,
        sites=[site],
        bits=Bits(480.0, 1.0),
    )
    assert found.rank == 3
    assert found.table.column("rank")[1] == 10  # 2 modules of 24 parameters a rank


def test_leaves_that_no_adapter_holds_stay_as_in_the_base():
    tuned = {**TUNED, "gain": np.zeros(12, "float32")}
    found = advise(tuned=tuned, loss_fn=lambda tree, x: loss(tree, x) + tree["gain"].sum())
    assert found.rank is None
    assert "no rank up to 8 gets within 5 %" in found.table.column("why")[0]


def test_a_loss_that_is_not_finite_is_shown_and_never_chosen():
    def broken(tree, x):
        value = loss(tree, x)
        return jnp.where((value > 1) & (value < 4), jnp.nan, value)  # at rank 2

    found = advise(loss_fn=broken, tolerance=0.2)
    assert found.rank == 3
    assert found.table.column("why")[0].endswith("the loss is not finite at rank 2")
    assert math.isnan(found.losses.select(rank=2).column("loss")[0])


def test_a_fine_tune_that_does_not_help_gives_no_rank():
    found = advise(loss_fn=lambda tree, x: -loss(tree, x))
    assert found.rank is None
    assert "does not lower this loss" in found.table.column("why")[0]


def test_bits_are_divided_by_what_the_parameters_hold():
    assert bits_rank(Bits(5120, 2.0), 2304) == 2
    assert bits_rank(Bits(1, 2.0), 2304) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ranks": (4, 2)}, r"ranks must rise from at least 1, found \[4, 2\]"),
        ({"ranks": ()}, r"ranks must rise from at least 1, found \[\]"),
        ({"tolerance": 5}, r"tolerance is a share of the improvement.*found 5"),
        ({"bits": Bits(0)}, r"bits_rank needs numbers above 0"),
        ({"batches": []}, r"without batches"),
        (
            {"batches": [BATCHES[0], BATCHES[1][:3]]},
            r"batch 0 holds .*\(6, 12\).*batch 1 .*\(3, 12",
        ),
        ({"loss_fn": lambda tree, x: x @ tree["w"]}, r"must give one number, found .*6, ?12"),
        ({"loss_fn": lambda tree, x: (loss(tree, x), x)}, r"must give one number"),
        ({"tuned": {**TUNED, "w": BASE["w"][:3]}}, r"'w' has shape \(12, 12\) in base and \(3, 12"),
        ({"tuned": rl.LoraParams(BASE, {})}, r"needs its factors and sites"),
        ({"tuned": {**TUNED, "w": BASE["w"] * np.nan}}, r"'w': the change is not finite"),
    ],
)
def test_bad_input_is_refused(changed, message):
    with pytest.raises(rl.AdapterError, match=message):
        advise(**changed)


def test_nothing_is_traced_into_the_result(advice):
    assert not any(isinstance(cell, jax.Array) for row in advice.losses.rows for cell in row)
