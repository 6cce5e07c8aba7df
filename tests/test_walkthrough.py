"""The walkthrough of the articles: their numbers, what they mean, and the figure."""

import math
import sys

import numpy as np
import pytest

import rslora_jax as rl
from rslora_jax.analysis.articles import walkthrough
from rslora_jax.analysis.articles.claims import claims
from rslora_jax.analysis.articles.first_steps import first_steps
from rslora_jax.analysis.articles.style_facts import (
    error_table,
    errors,
    rank_table,
    singular_values,
    updates,
    width_table,
)


@pytest.fixture(scope="module")
def sections():
    return walkthrough.sections()


@pytest.fixture(scope="module")
def shown(sections):
    """The tables as they are printed: the header, then the rows, cell by cell."""
    return [
        [list(section.table.columns), *([str(cell) for cell in row] for row in section.table.rows)]
        for section in sections
    ]


@pytest.fixture(scope="module")
def measured():
    return first_steps()


def test_the_leading_singular_values_are_printed_digit_for_digit(shown):
    assert shown[0][1:] == [
        ["style", "[4.99 3.5  2.01 0.52 0.14 0.14 0.14 0.13 0.13 0.12]"],
        ["facts", "[3.   2.96 2.91 2.87 2.84 2.8  2.75 2.73 2.7  2.64]"],
    ]


def test_the_table_of_errors_is_printed_digit_for_digit(shown):
    header, *rows = shown[1]
    assert header[:5] == ["rank", "style_lora", "facts_lora", "facts_rslora", "style_rslora"]
    assert [row[:5] for row in rows] == [
        ["2", "6.608", "2.165", "3.016", "9.730"],
        ["4", "2.989", "1.482", "2.858", "6.971"],
        ["8", "1.000", "1.000", "2.620", "4.642"],
        ["16", "0.064", "0.701", "2.251", "2.995"],
        ["32", "0.501", "0.628", "1.701", "1.828"],
        ["48", "0.667", "0.686", "1.297", "1.309"],
    ]


def test_the_errors_stand_beside_their_scale_and_the_best_that_the_rank_allows(shown):
    header, *rows = shown[1]
    assert header[5:] == ["s_lora", "s_rslora", "style_best", "facts_best"]
    assert [row[5:] for row in rows] == [
        ["8.000", "11.314", "0.333", "0.961"],
        ["4.000", "8.000", "0.092", "0.922"],
        ["2.000", "5.657", "0.081", "0.847"],
        ["1.000", "4.000", "0.064", "0.701"],
        ["0.500", "2.828", "0.034", "0.438"],
        ["0.333", "2.309", "0.012", "0.215"],
    ]


def test_the_table_of_scales_is_printed_digit_for_digit(shown):
    assert shown[2] == [
        ["rank", "lora", "rslora"],
        ["1", "16.0000", "16.0000"],
        ["4", "4.0000", "8.0000"],
        ["8", "2.0000", "5.6569"],
        ["16", "1.0000", "4.0000"],
        ["32", "0.5000", "2.8284"],
        ["64", "0.2500", "2.0000"],
    ]


def test_the_table_of_captured_energy_is_printed_digit_for_digit(shown):
    assert shown[3] == [
        ["rank", "style", "facts"],
        ["2", "88.9", "7.7"],
        ["4", "99.2", "14.9"],
        ["8", "99.3", "28.3"],
        ["16", "99.6", "50.8"],
        ["32", "99.9", "80.8"],
    ]


def test_the_note_on_errors_says_what_no_update_has(sections):
    section = sections[1]
    assert "1.0 = no update" in section.title
    assert "err^2 = (s - 1)^2 c + 1 - c" in section.note


def test_the_singular_values_are_those_on_record():
    style, facts = singular_values()
    recorded = [4.994811, 3.496074, 2.006043, 0.516988, 0.144737, 0.140359]
    assert np.allclose(style[:6], recorded, rtol=0, atol=5e-7)
    assert np.allclose(facts[:4], [2.999406, 2.959710, 2.913826, 2.874805], rtol=0, atol=5e-7)


def test_the_effective_ranks_are_those_on_record():
    style, facts = rank_table().rows
    assert (style[0], round(style[1], 4), round(style[2], 3)) == ("style", 6.4666, 1.676)
    assert [round(value, 2) for value in style[3:6]] == [11.78, 2.71, 2.22]
    assert style[6:] == (3, 3, 4, 4)
    assert (facts[0], round(facts[1], 4), round(facts[2], 2)) == ("facts", 15.2003, 25.68)
    assert [round(value, 2) for value in facts[3:5]] == [58.28, 48.51]
    assert round(facts[5], 1) == 42.0
    assert facts[6:] == (41, 48, 58, 0)


def test_every_error_is_explained_by_its_scale_and_its_captured_energy():
    table = errors(range(1, 65))
    assert len(table.rows) == 2 * 64 * 2
    for row in table.records():
        s, c = row["s"], row["captured"]
        assert math.isclose(row["error"] ** 2, (s - 1) ** 2 * c + 1 - c, abs_tol=1e-12)
        assert math.isclose(row["error"], row["identity"], abs_tol=1e-7)
        assert math.isclose(row["error"] ** 2, row["scale_part"] + row["rank_part"], abs_tol=1e-12)


def test_at_rank_8_alpha_over_r_is_exactly_as_far_off_as_no_update():
    for row in errors([8]).select(scaling="lora").records():
        assert row["s"] == 2.0
        assert math.isclose(row["error"], 1.0, abs_tol=1e-12)


def test_alpha_over_sqrt_r_is_worse_than_alpha_over_r_and_than_no_update():
    for row in error_table().records():
        assert row["style_rslora"] > max(1, row["style_lora"])
        assert row["facts_rslora"] > max(1, row["facts_lora"])


def test_another_alpha_moves_the_dip_to_where_its_scale_is_one():
    table = errors(range(1, 65), alpha=32.0).select(update="style", scaling="lora")
    assert table.column("rank")[int(np.argmin(table.column("error")))] == 32


def test_the_share_of_rank_4_falls_as_the_style_update_is_drawn_wider():
    table = width_table()
    assert np.round(table.column("measured"), 1).tolist() == [99.2, 96.4, 86.7]
    assert np.allclose(table.column("measured"), table.column("law"), rtol=0, atol=0.4)


def test_the_draws_leave_the_global_generator_alone():
    before = np.random.get_state(legacy=False)["state"]["key"].copy()
    first, second = updates(), updates()
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], before)
    assert np.array_equal(first.style, second.style)
    assert np.array_equal(first.facts, second.facts)


def test_the_measured_slopes_agree_with_the_law(measured):
    laws = {(r["quantity"], r["optimizer"], r["scaling"]): r["law"] for r in measured.records()}
    assert laws == {
        ("grad_b", "both", "lora"): -0.5,
        ("grad_b", "both", "rslora"): 0.0,
        ("signal", "sgd", "lora"): -1.0,
        ("signal", "sgd", "rslora"): 0.0,
        ("delta", "sgd", "lora"): -1.5,
        ("delta", "sgd", "rslora"): -0.5,
        ("signal", "adam", "lora"): 0.0,
        ("signal", "adam", "rslora"): 0.5,
        ("delta", "adam", "lora"): -0.5,
        ("delta", "adam", "rslora"): 0.0,
    }
    assert np.allclose(measured.column("slope"), measured.column("law"), rtol=0, atol=0.05)


def test_the_first_steps_are_judged(measured):
    signal = measured.select(quantity="signal")
    verdicts = signal.select(optimizer="sgd"), signal.select(optimizer="adam")
    assert [table.column("verdict") for table in verdicts] == [
        ["collapsing", "stable"],
        ["stable", "exploding"],
    ]


def test_sizes_are_relative_to_the_first_rank(measured):
    assert set(measured.column("r4")) == {1.0}


@pytest.mark.parametrize(("ranks", "draws"), [((4,), 8), ((8, 4), 8), ((4, 4), 8), ((4, 8), 0)])
def test_ranks_that_do_not_rise_and_no_draws_are_refused(ranks, draws):
    with pytest.raises(rl.AdapterError, match=r"at least two rising ranks and one draw, found"):
        first_steps(ranks, draws=draws)


def test_every_claim_has_a_verdict_and_a_reason():
    table = claims()
    assert set(table.column("verdict")) == {"true", "half", "false"}
    assert all(table.column("claim"))
    assert all(table.column("why"))


def test_the_figure_is_a_png_and_needs_no_global_state_of_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    (tmp_path / "figure.PNG").write_text("an older figure")
    walkthrough.draw(tmp_path / "figure.PNG")
    assert (tmp_path / "figure.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [file.name for file in tmp_path.iterdir()] == ["figure.PNG"]


def test_a_figure_that_fails_leaves_the_old_one_untouched(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        walkthrough.draw(path)
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]
    assert path.read_bytes() == b"old"


def test_a_figure_of_another_kind_is_refused():
    with pytest.raises(rl.AdapterError, match=r"drawn as a \.png file, found 'figure\.pdf'"):
        walkthrough.draw("figure.pdf")


def test_a_figure_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(rl.AdapterError, match=r"Run `pip install 'rslora_jax\[cli\]'`"):
        walkthrough.draw(tmp_path / "figure.png")
