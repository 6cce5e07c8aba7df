"""Style against facts: the world, the sentences, and the whole path on a smaller network."""

import math
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

import lessons
import style_vs_facts
import tiny
from readings import (
    Curve,
    accuracy_sentence,
    curves,
    late_sentence,
    onset_sentence,
    truncation_sentence,
)
from registers import (
    ANSWERS,
    BITS,
    ENTITIES,
    PLAIN,
    RELATIONS,
    STYLED,
    VALUES,
    VOCABULARY,
    facts_lesson,
    known,
    pretraining,
    relation,
    shuffled,
    style_lesson,
)
from rslora_jax.tables import Table
from session import INTERRUPTED
from style_vs_facts import Options

SCRIPT = Path(style_vs_facts.__file__)
RANKS = (1, 4)


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    """These programs run for an instant: nearly all of their time is XLA's."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# The world.


def entities(prompts):
    """Which entity each prompt asks about."""
    first, second = prompts.tokens[..., 1] - 2, prompts.tokens[..., 2] - 18
    assert first.min() >= 0 and first.max() < 16 and second.min() >= 0 and second.max() < 16
    return 16 * first + second


def test_a_relation_is_balanced_and_differs_from_the_other_and_from_other_worlds():
    first, second, other = relation(0, 0), relation(1, 0), relation(0, 1)
    np.testing.assert_array_equal(np.bincount(first), np.full(VALUES, ENTITIES // VALUES))
    for pair in ((first, second), (first, other)):
        assert np.mean(pair[0] == pair[1]) < 3 / VALUES  # chance is 1 / VALUES
    np.testing.assert_array_equal(first, relation(0, 0))
    assert BITS == 1024


def test_the_registers_say_the_same_values_in_blocks_of_their_own():
    plain, styled = known(PLAIN, 0), known(STYLED, 0)
    np.testing.assert_array_equal(plain.answers - ANSWERS, relation(0, 0))
    np.testing.assert_array_equal(styled.answers, plain.answers + VALUES)
    assert styled.answers.max() == VOCABULARY - 1
    np.testing.assert_array_equal(plain.tokens[:, 1:], styled.tokens[:, 1:])
    assert set(plain.tokens[:, 0]) == {PLAIN} and set(styled.tokens[:, 0]) == {STYLED}
    assert plain.tokens.dtype == plain.answers.dtype == np.int32


def test_pretraining_repeats_all_facts_and_fills_the_second_relation_with_noise():
    tokens, answers = pretraining(steps=40, noise=64, seed=0)
    assert tokens.shape == (40, 2 * ENTITIES + 64, 4) and answers.shape == tokens.shape[:2]
    for step in (0, 39):
        facts = np.concatenate([known(r, 0).tokens for r in (PLAIN, STYLED)])
        np.testing.assert_array_equal(tokens[step, : 2 * ENTITIES], facts)
    noise, said = tokens[:, 2 * ENTITIES :], answers[:, 2 * ENTITIES :]
    assert set(noise[..., 3].flat) == {RELATIONS + 1}
    np.testing.assert_array_equal((said - ANSWERS) // VALUES, noise[..., 0])
    truth = relation(1, 0)[16 * (noise[..., 1] - 2) + noise[..., 2] - 18]
    assert abs(np.mean((said - ANSWERS) % VALUES == truth) - 1 / VALUES) < 0.02
    assert len(set(map(tuple, noise.reshape(40, -1)))) == 40


def test_style_is_taught_on_entities_that_are_not_asked_about():
    _, asked, taught = style_lesson(0)
    assert len(taught.answers) == ENTITIES // 4
    assert sorted([*entities(asked), *entities(taught)]) == list(range(ENTITIES))
    for prompts in (asked, taught):
        assert set(prompts.tokens[:, 0]) == {PLAIN}
        assert set(prompts.tokens[:, 3]) == {RELATIONS}
        expected = ANSWERS + VALUES + relation(0, 0)[entities(prompts)]
        np.testing.assert_array_equal(prompts.answers, expected)


def test_all_facts_are_taught_and_asked_plainly():
    _, asked, taught = facts_lesson(0)
    for prompts in (asked, taught):
        np.testing.assert_array_equal(entities(prompts), np.arange(ENTITIES))
        assert set(prompts.tokens[:, 3]) == {RELATIONS + 1}
        np.testing.assert_array_equal(prompts.answers, ANSWERS + relation(1, 0))


def test_every_row_is_taught_equally_often():
    taught = style_lesson(0).taught
    tokens, answers = shuffled(taught, steps=6, batch=32, seed=0)
    assert tokens.shape == (6, 32, 4)
    counts = np.bincount(entities(taught), minlength=ENTITIES)
    seen = np.bincount(entities(shuffled(taught, 6, 32, 0)).ravel(), minlength=ENTITIES)
    np.testing.assert_array_equal(seen, 3 * counts)
    values = relation(0, 0)[16 * (tokens[..., 1] - 2) + tokens[..., 2] - 18]
    np.testing.assert_array_equal(answers, ANSWERS + VALUES + values)


# The sentences, on made-up numbers of both sides.


def pair(lora, rslora, ranks=(1, 4, 16)):
    """Curves with three seeds, the values of the seeds around the given means."""
    around = np.array([-0.01, 0.0, 0.01])
    made = (np.array(values)[:, None] * (1 + around) for values in (lora, rslora))
    return {name: Curve(ranks, v) for name, v in zip(("lora", "rslora"), made, strict=True)}


@pytest.mark.parametrize(
    ("lora", "rslora", "expected"),
    [
        ((0.4, 0.4, 0.4), (0.4, 0.7, 0.9), "has no sure effect on LoRA and helps rsLoRA; at rank"),
        ((0.4, 0.7, 0.9), (0.4, 0.4, 0.4), "helps LoRA and has no sure effect on rsLoRA; at rank"),
        ((0.4, 0.3, 0.1), (0.4, 0.6, 0.9), "hurts LoRA and helps rsLoRA; at rank 16 rsLoRA is 80"),
        ((0.4, 0.6, 0.9), (0.4, 0.3, 0.1), "helps LoRA and hurts rsLoRA; at rank 16 LoRA is 80 p"),
        ((0.4, 0.6, 0.9), (0.4, 0.6, 0.9), "helps both; at rank 16 they do not differ beyond the"),
        ((0.4, 0.3, 0.2), (0.4, 0.3, 0.1), "hurts both; at rank 16 LoRA is 10 points ahead."),
        ((0.4, 0.9, 0.4), (0.4, 0.1, 0.4), "has no sure effect on both; at rank 16 they do not"),
    ],
)
def test_the_sentence_on_accuracy_follows_from_the_numbers(lora, rslora, expected):
    found = accuracy_sentence("facts", pair(lora, rslora))
    assert found.startswith(f"facts: from rank 1 to 16 LoRA {words(lora)} and rsLoRA ")
    assert expected in found


def words(means):
    change = means[-1] - means[0]
    verb = "rises" if change > 0 else "falls" if change < 0 else "stays within its spread,"
    return f"{verb} from {means[0]:.0%} to {means[-1]:.0%}"


def test_a_difference_that_the_seeds_disagree_about_is_none():
    found = pair((0.4, 0.5, 0.6), (0.4, 0.5, 0.6))
    found["rslora"].values[-1] = [0.2, 0.6, 1.0]
    sentence = accuracy_sentence("facts", found)
    assert "rsLoRA stays within its spread, from 40% to 60%" in sentence
    assert "they do not differ beyond the spread" in sentence


@pytest.mark.parametrize(
    ("powers", "expected"),
    [
        ((-0.5, 0.0), "rank^-0.50±0.00 under LoRA (as in theory) and rank^0.00±0.00 under rsLoRA "
         "(as in theory): rank-stable under rsLoRA alone."),
        ((0.0, -0.5), "rank^0.00±0.00 under LoRA (against -0.5 in theory) and rank^-0.50±0.00 "
         "under rsLoRA (against 0 in theory): rank-stable under LoRA alone."),
        ((0.02, 0.02), "rank^+0.02±0.00 under LoRA (against -0.5 in theory) and rank^+0.02±0.00 "
         "under rsLoRA (as in theory): rank-stable under both."),
        ((-0.5, 0.5), "under rsLoRA (against 0 in theory): rank-stable under neither."),
    ],
)  # fmt: skip
def test_the_sentence_on_the_onset_sets_the_slope_beside_the_theory(powers, expected):
    ranks = np.array([1, 4, 16])
    found = pair(*(3.0 * ranks**power for power in powers))
    assert onset_sentence("facts", found) == f"facts: |grad| goes as {expected}" or (
        onset_sentence("facts", found).endswith(expected)
    )


def test_a_gradient_of_zero_has_no_slope_and_is_called_unmet():
    sentence = onset_sentence("facts", pair((1.0, 0.0, 1.0), (1.0, 1.0, 1.0)))
    assert "rank^nan under LoRA (against -0.5 in theory)" in sentence
    assert "rank-stable under rsLoRA alone" in sentence


@pytest.mark.parametrize(
    ("lora", "rslora", "expected"),
    [
        ((8, 4, 1), (2, 2, 1), "8.0 under LoRA and 2.0 under rsLoRA: rsLoRA keeps it steadier."),
        ((2, 2, 1), (8, 4, 1), "2.0 under LoRA and 8.0 under rsLoRA: LoRA keeps it steadier."),
        ((2, 2, 1), (2, 1, 2), "under rsLoRA: neither keeps it steadier than the other."),
        ((2, math.nan, 1), (2, 1, 2), "2.0 under rsLoRA: no comparison, for a run was lost."),
    ],
)
def test_the_sentence_on_late_gradients_names_the_steadier_one(lora, rslora, expected):
    assert late_sentence("facts", pair(lora, rslora)).endswith(expected)


@pytest.mark.parametrize(
    ("facts", "energy", "expected"),
    [
        ((0.1, 0.2, 1.0), (0.3, 0.5, 1.0), "differ in function, and hardly in the spectrum"),
        ((0.1, 0.2, 1.0), (0.95, 0.97, 1.0), "differ in function, and in the spectrum too"),
        ((0.95, 1.0, 1.0), (0.95, 0.97, 1.0), "differ in the spectrum, and hardly in function"),
        ((0.95, 1.0, 1.0), (0.3, 0.5, 1.0), "differ neither in function nor in the spectrum"),
    ],
)
def test_the_sentence_on_truncation_compares_function_and_spectrum(facts, energy, expected):
    def table(accuracy, energy):
        rows = zip((1, 4, 16), accuracy, energy, strict=True)
        return Table.of([{"rank": r, "accuracy": a, "energy": e} for r, a, e in rows])

    tables = {"style": table((0.95, 1.0, 1.0), (0.3, 0.5, 1.0)), "facts": table(facts, energy)}
    assert expected in truncation_sentence(tables)


def test_curves_have_the_mean_and_the_spread_over_the_seeds():
    rows = [
        {"lesson": "facts", "optimizer": "sgd", "scaling": s, "rank": r, "seed": k, "late": r + k}
        for s in ("lora", "rslora")
        for r in (1, 2)
        for k in (0, 1, 2)
    ]
    curve = curves(Table.of(rows), "facts", "sgd", "late")["rslora"]
    assert curve.ranks == (1, 2)
    assert curve.mean.tolist() == [2.0, 3.0] and curve.spread.tolist() == [1.0, 1.0]
    single = Curve((1, 2), np.array([[1.0], [0.5]]))
    assert single.spread.tolist() == [0.0, 0.0]
    assert single.slope[0] == pytest.approx(-1.0) and math.isnan(single.slope[1])


# The network, and the whole path on a smaller one.


def test_a_short_pretraining_teaches_the_tiny_llama_well_above_chance():
    base = tiny.pretrain(pretraining(steps=30, noise=16, seed=0), seed=0)
    assert sum(leaf.size for leaf in jax.tree.leaves(base)) == 31_136
    found = [style_vs_facts.recall(base, register, 0) for register in (PLAIN, STYLED)]
    assert min(found) > 4 / VALUES
    sites = lessons.adapt(base, 2, 16.0).sites
    assert len(sites) == 7 and {site.axes for site in sites} == {"bio"}


class Smaller(nn.Module):
    """Reads a prompt whole, through one matrix and a head: compiles at once."""

    @nn.compact
    def __call__(self, tokens, *, positions=None):
        x = nn.Embed(VOCABULARY, 16)(tokens).reshape(len(tokens), -1)
        x = x + nn.gelu(nn.Dense(64)(x))
        return nn.Dense(VOCABULARY)(x)[:, None]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What a run found, where it wrote, how often each sweep compiled, all tuned networks."""
    folder, compiled, networks = tmp_path_factory.mktemp("run"), [], []
    original, tune_fully = lessons.rank_sweep, lessons.tune_fully

    def counted(*args, **kwargs):
        found, count = compilations(lambda: original(*args, **kwargs))
        compiled.append(count)
        return found

    def kept(base, *args):
        networks.append((base, tune_fully(base, *args)))
        return networks[-1][1]

    output = folder / "figure.png"
    options = Options(ranks=RANKS, seeds=(0,), steps=30, pretraining=200, sgd=1e-3, output=output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "MODEL", Smaller())
        patch.setattr(lessons, "rank_sweep", counted)
        patch.setattr(lessons, "tune_fully", kept)
        findings = style_vs_facts.run(options)
    return findings, folder, compiled, networks


def compilations(function):
    """The result of a function, and how often XLA compiled."""
    found = []

    def listen(event, _, **kwargs):
        found.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return function(), len(found)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_each_lesson_and_optimizer_is_one_compilation(ran):
    assert ran[2] == [1, 1, 1, 1]


def test_the_table_holds_every_run_once(ran):
    runs = ran[0].runs
    names = ("lesson", "optimizer", "scaling", "rank", "seed")
    found = set(zip(*map(runs.column, names), strict=True))
    assert len(found) == len(runs.rows) == 2 * 2 * 2 * len(RANKS)
    assert {key[3] for key in found} == set(RANKS)


def test_rank_one_has_one_scaling_and_the_onset_does_not_know_the_optimizer(ran):
    runs = ran[0].runs
    for name in ("accuracy", "onset", "late"):
        one = [runs.select(rank=1, scaling=s).column(name) for s in ("lora", "rslora")]
        assert one[0] == one[1]
    adam, sgd = (runs.select(optimizer=o).column("onset") for o in ("adam", "sgd"))
    np.testing.assert_allclose(adam, sgd, rtol=1e-6)


def test_the_onset_of_the_scalings_differs_by_the_ratio_of_their_scales(ran):
    """`a` is the same, and |grad b| is proportional to the scale: sqrt(4) at rank 4."""
    runs = ran[0].runs.select(rank=4)
    lora, rslora = (runs.select(scaling=s).column("onset") for s in ("lora", "rslora"))
    np.testing.assert_allclose(rslora, 2 * np.array(lora), rtol=1e-5)


def test_full_rank_holds_all_the_energy_and_energy_grows_with_the_rank(ran):
    for table in ran[0].truncated.values():
        assert table.column("rank") == [1, 2, 4, 8, 16, 32, 64]
        energy = table.column("energy")
        assert energy == sorted(energy) and energy[-1] == pytest.approx(1.0)


def test_the_network_knew_its_world_before(ran):
    assert min(ran[0].known) >= style_vs_facts.TARGET


def test_the_figure_and_the_table_are_whole_and_alone(ran):
    folder = ran[1]
    assert sorted(path.name for path in folder.iterdir()) == ["figure.csv", "figure.png"]
    png = (folder / "figure.png").read_bytes()
    assert png.startswith(b"\x89PNG") and png.endswith(b"IEND\xaeB`\x82")
    assert len((folder / "figure.csv").read_text().splitlines()) == 1 + len(ran[0].runs.rows)


def test_there_is_a_sentence_for_every_curve(ran):
    found = style_vs_facts.sentences(ran[0])
    assert len(found) == len(set(found)) == 4 + 2 + 4 + 1
    assert all(sentence.endswith(".") for sentence in found)


def test_full_tuning_moves_the_adapted_matrices_alone(ran):
    for base, tuned in ran[3]:
        moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), base, tuned)
        paths = jax.tree_util.tree_leaves_with_path(moved)
        found = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, m in paths if m]
        assert found == ["params/Dense_0/kernel"]


def test_truncation_to_full_rank_is_the_tuned_network(ran, monkeypatch):
    monkeypatch.setattr(tiny, "MODEL", Smaller())
    for lesson, (_, tuned) in zip((facts_lesson(0), style_lesson(0)), ran[3], strict=True):
        asked = lesson.asked
        exact = tiny.accuracy(tiny.predict(tuned, asked.tokens), asked.answers)
        found = ran[0].truncated[lesson.name].column("accuracy")
        assert found[-1] == pytest.approx(float(exact), abs=1 / ENTITIES)
        assert found[0] < found[-1] or lesson.name == "style"


# What a user meets.


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["style_vs_facts.py", *flags])
    with pytest.raises(SystemExit) as caught:
        style_vs_facts.main()
    return caught.value.code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "4", "2"], "ranks must rise, from 1 or more; found (4, 2)"),
        (["--ranks", "0", "2"], "ranks must rise, from 1 or more; found (0, 2)"),
        (["--ranks", "4"], "ranks must be two or more to be compared, found (4,)"),
        (["--seeds", "1", "1"], "seeds must rise, from 0 or more; found (1, 1)"),
        (["--steps", "0"], "steps must be above 0, found 0"),
        (["--adam", "nan"], "adam must be above 0, found nan"),
        (["--alpha", "-1"], "alpha must be above 0, found -1.0"),
        (["--world", "-1"], "world must be 0 or more, found -1"),
        (["--output", "figure.txt"], "output must be a .png file, found figure.txt"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_flags_out_of_range_are_refused_before_anything_runs(monkeypatch, flags, message):
    monkeypatch.setattr(style_vs_facts, "run", lambda options: pytest.fail("it ran"))
    assert run_main(monkeypatch, *flags) == message


def test_a_network_that_knows_too_little_ends_the_run_with_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(style_vs_facts, "pretrain", lambda *args: None)
    monkeypatch.setattr(style_vs_facts, "recall", lambda base, register, world: 0.5 + register / 2)
    code = run_main(monkeypatch, "--pretraining", "7", "--output", str(tmp_path / "figure.png"))
    assert code == (
        "Pretraining reached 50% of the facts, below 99%: without a network that knows them "
        "there is nothing to tune. Give it more than 7 steps of pretraining."
    )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_line_and_code_130_and_leaves_no_file(tmp_path):
    (tmp_path / "stubs").mkdir()
    stub = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    (tmp_path / "stubs" / "tyro.py").write_text(stub)
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, "-B", str(SCRIPT), "--output", "figure.png"],
        cwd=tmp_path / "run",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "stubs"), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == "Interrupted: no file is left half-written.\n"
    assert done.returncode == INTERRUPTED == 130
    assert list((tmp_path / "run").iterdir()) == []
