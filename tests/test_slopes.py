"""The slopes of a sweep, its figures and its page."""

import base64
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

import rslora_jax as rl
from rslora_jax.analysis.sweeps import page
from rslora_jax.analysis.sweeps.advice import advice
from rslora_jax.analysis.sweeps.budget import Budget
from rslora_jax.analysis.sweeps.plots import against_rank, against_step
from rslora_jax.analysis.sweeps.runs import grid
from rslora_jax.analysis.sweeps.slopes import FAMILIES, Slope, judged, series, slopes
from rslora_jax.analysis.sweeps.sweep import Sweep

RANKS = (2, 4, 16, 64)


def power_laws(exponents, *, noise=(0.0,), scalings=("lora",), steps=4, optimizer="sgd"):
    """A sweep whose quantities are exactly 3 r^exponent; `noise` adds to it, seed by seed."""
    runs = grid(RANKS, scalings, tuple(range(len(noise))), (0.1,))
    ranks = np.array([run.rank for run in runs])
    extra = np.array([noise[run.seed] for run in runs])
    traces = {"loss": np.ones((len(runs), steps))}
    for name, exponent in exponents.items():
        sign = -3 if name == "predicted_change" else 3
        traces[name] = sign * np.repeat((ranks ** (exponent + extra))[:, None], steps, axis=1)
    return Sweep(runs, traces, Budget(1, 1, len(runs), 1, 1), {}, optimizer, "kaiming")


def row(table, **equals):
    (found,) = table.select(**equals).records()
    return found


@pytest.mark.parametrize(
    ("exponent", "verdict"), [(-0.5, "collapsing"), (0.0, "stable"), (0.75, "exploding")]
)
def test_the_slope_of_a_power_law_is_its_exponent(exponent, verdict):
    table = slopes(power_laws({"grad_b": exponent, "predicted_change": exponent}))
    for name in ("grad_b", "predicted_fall"):
        for time in ("start", "run"):
            found = row(table, quantity=name, time=time)
            assert found["slope"] == pytest.approx(exponent, abs=1e-10)
            assert found["verdict"] == verdict
            assert found["ranks"] == 4


def test_the_standard_error_is_over_seeds():
    found = row(slopes(power_laws({"grad_b": -0.5}, noise=(-0.3, 0.0, 0.3))), time="start")
    assert found["slope"] == pytest.approx(-0.5)
    assert found["error"] == pytest.approx(0.3 / math.sqrt(3))
    assert row(slopes(power_laws({"grad_b": -0.5})), time="start")["error"] is None


def test_a_rank_whose_value_has_no_logarithm_is_left_out():
    sweep = power_laws({"grad_b": -0.5})
    sweep.traces["grad_b"][3] = math.nan
    found = row(slopes(sweep), time="start")
    assert (found["slope"], found["ranks"]) == (pytest.approx(-0.5), 3)
    sweep.traces["grad_b"][1:3] = [[0.0], [math.inf]]
    found = row(slopes(sweep), time="start")
    assert (found["verdict"], found["ranks"]) == ("unknown", 1)
    assert math.isnan(found["slope"])


def test_each_quantity_is_fitted_at_the_step_that_the_theory_speaks_of():
    sweep = power_laws({"grad_b": -0.5, "grad_a": -1.5, "delta": -1.5})
    ranks = np.array([run.rank for run in sweep.runs])[:, None]
    for name, other in (("grad_b", slice(1, None)), ("grad_a", 0), ("delta", 0)):
        sweep.traces[name][:, other] = ranks**2.0 if name == "grad_b" else 0.0
    table = slopes(sweep).select(time="start")
    assert table.column("slope") == pytest.approx([-0.5, -1.5, -1.5])


def test_the_exponents_of_the_theory_stand_beside_the_slopes():
    quantities = dict.fromkeys(("grad_b", "predicted_change", "delta"), 0.0)
    sweep = power_laws(quantities, scalings=("lora", "rslora"), optimizer="adam")
    table = slopes(sweep).select(time="start")
    ends = {(r["scaling"], r["quantity"]): (r["low"], r["high"]) for r in table.records()}
    assert ends == {
        ("lora", "grad_b"): (-0.5, -0.5),
        ("lora", "predicted_fall"): (0.0, 0.0),
        ("lora", "delta"): (-0.5, 0.0),
        ("rslora", "grad_b"): (0.0, 0.0),
        ("rslora", "predicted_fall"): (0.5, 0.5),
        ("rslora", "delta"): (0.0, 0.5),
    }
    low = row(slopes(sweep, regime="low"), scaling="lora", quantity="delta", time="start")
    assert (low["low"], low["high"]) == (-0.5, -0.5)


def test_the_theory_is_left_out_where_it_says_nothing():
    unknown = power_laws({"grad_b": 0.0}, optimizer="<lambda>")
    assert row(slopes(unknown), time="start")["low"] is None
    assert row(slopes(unknown, optimizer="sgd"), time="start")["low"] == -0.5
    assert row(slopes(unknown, optimizer="sgd"), time="run")["low"] is None
    own = power_laws({"grad_b": 0.0}, scalings=(("own", lambda alpha, rank: 1.0),))
    assert row(slopes(own), time="start")["low"] is None


def test_the_names_of_optimizers_are_optax_names():
    import optax

    missing = [n for n in FAMILIES if not hasattr(optax, n)]
    assert missing == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: slopes(s, optimizer="adamw"), "optimizer must be one of .*found 'adamw'"),
        (lambda s: series(s, "delta"), r"did not record 'delta', only \('loss', 'grad_b'\)"),
        (lambda s: series(s, "predicted_fall"), "did not record 'predicted_change'"),
        (lambda s: against_step(s, "grad"), "did not record 'grad'"),
    ],
)
def test_bad_input_is_refused_with_what_was_found(call, message):
    with pytest.raises(rl.AdapterError, match=message):
        call(power_laws({"grad_b": 0.0}))


def test_a_slope_needs_two_ranks():
    runs = grid((4,), ("lora",), (0,), (0.1,))
    sweep = Sweep(runs, {"loss": np.ones((1, 3))}, Budget(1, 1, 1, 1, 1), {}, "sgd", "kaiming")
    with pytest.raises(rl.AdapterError, match="at least two ranks"):
        slopes(sweep)


# What it means.


def test_the_advice_says_what_the_slopes_mean_and_how_the_best_run_ended():
    sweep = power_laws({"grad_b": 0.0, "predicted_change": 0.5}, scalings=("rslora",))
    sweep.traces["loss"][2, -1] = 0.25
    text = advice(sweep)["rslora"]
    assert "Gradient norms do not depend on the rank (slope +0.00)" in text
    assert "do more at high ranks" in text
    assert "(slope +0.50)" in text
    assert "was 0.25, at rank 16 and learning rate 0.1." in text


def test_the_advice_names_the_ranks_that_failed():
    sweep = power_laws({"grad_b": -0.5})
    sweep.traces["loss"][3, 2:] = math.nan
    text = advice(sweep)["lora"]
    assert "shrink as the rank grows" in text
    assert text.endswith("1 runs met values that are not finite, at the ranks [64].")


# Figures and the page.


def full():
    quantities = {"grad": 0.0, "grad_b": 0.0, "predicted_change": 0.5, "delta": 0.1}
    return power_laws(
        quantities, noise=(0.0, 0.04), scalings=("lora", ("<own>", lambda alpha, rank: 1.0))
    )


def test_a_figure_has_a_panel_for_each_scaling_and_a_line_for_each_rank():
    for figure in (against_step(full(), "grad"), against_step(full(), "loss")):
        assert isinstance(figure, Figure)
        assert [panel.get_title() for panel in figure.axes] == ["lora", "<own>"]
        for panel in figure.axes:
            assert [line.get_label() for line in panel.lines] == [f"r = {r}" for r in RANKS]
    assert pyplot.get_fignums() == []  # nothing keeps them alive


def test_the_figure_over_ranks_shows_slopes_and_the_theory():
    legend = against_rank(full()).axes[0].get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == 4
    assert re.fullmatch(r"gradient norm of b: \+0\.02 ± 0\.02 \(theory -0\.5\)", labels[0])
    assert labels[3].endswith("(theory -1.5 to -1)")


class Reader(HTMLParser):
    """Tags that are open, and every address that the page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_loads_nothing(tmp_path):
    path = tmp_path / "report.html"
    sweep = full()
    sweep.traces["loss"][1, 2] = math.nan
    page.write(path, sweep, title="Tuning <script> & more")
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(reader.addresses) == 3
    assert all(address.startswith("data:image/svg+xml;base64,") for address in reader.addresses)
    assert b"<svg" in base64.b64decode(reader.addresses[0].split(",", 1)[1])
    assert "<script>" not in text
    assert "<own>" not in text
    assert "Tuning &lt;script&gt; &amp; more" in text
    assert "&lt;own&gt;" in text
    assert "Runs with values that are not finite" in text


def test_the_same_sweep_gives_the_same_page(tmp_path):
    for name in ("one.html", "two.html"):
        page.write(tmp_path / name, full())
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    single = grid((4,), ("lora",), (0,), (0.1,))
    sweep = Sweep(single, {"loss": np.ones((1, 3))}, Budget(1, 1, 1, 1, 1), {}, "sgd", "kaiming")
    with pytest.raises(rl.AdapterError, match="at least two ranks"):
        page.write(tmp_path / "report.html", sweep)
    assert list(tmp_path.iterdir()) == []


def test_a_slope_that_its_seeds_do_not_settle_is_unresolved():
    noisy, clear = (judged(Slope(0.2, error, 4), 0.1) for error in (0.08, 0.02))
    assert (noisy, clear) == ("unresolved", "exploding")
    assert judged(Slope(0.2, None, 4), 0.1) == "exploding"
