"""The command line: exit codes, one line for each error, help that lists the commands."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import rslora_jax as rl
from rslora_jax import cli, terminal
from rslora_jax.analysis.articles import walkthrough as article
from rslora_jax.analysis.sweeps.studies import find_study
from rslora_jax.factors import init_abstract
from rslora_jax.tables import Table

SPEAKER = """
import sys
from rslora_jax import cli, terminal

def say() -> None:
    'Speak.'
    print("hello")

cli.COMMANDS = (say,)
sys.exit(cli.main(["say"]))
"""
TABLE = Table.of(
    [{"rank": 4, "final_loss": 1.25, "note": "[4.99 3.5]"}, {"rank": 16, "final_loss": 0.5}]
)


def run(*arguments, stdout=subprocess.PIPE):
    """A fresh interpreter, as the installed script starts it."""
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def command(monkeypatch, error):
    """Makes `rslora broken` a command that raises."""

    def broken() -> None:
        """Fail."""
        raise error

    monkeypatch.setattr(cli, "COMMANDS", (broken, cli.walkthrough))


def use_terminal(monkeypatch):
    """Makes standard output a terminal of 80 columns without colours."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture(scope="module")
def sections():
    return article.sections()


def test_the_walkthrough_prints_its_tables_and_draws_the_figure(tmp_path, capsys):
    path = tmp_path / "new folder" / "figure.png"
    assert cli.main(["walkthrough", "--output", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "4     2.989       1.482       2.858         6.971" in out
    assert out.endswith(f"figure: {path}\n")
    assert err == ""
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_bad_output_is_refused_in_one_line_before_anything_is_printed(tmp_path, capsys):
    assert cli.main(["walkthrough", "--output", str(tmp_path / "figure.txt")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    path = str(tmp_path / "figure.txt")
    assert err == f"rslora: The walkthrough is drawn as a .png file, found {path!r}.\n"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["walkthrough", "--output", str(tmp_path / "file" / "figure.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rslora: [Errno")
    assert err.count("\n") == 1


def test_a_message_of_many_lines_is_shown_in_one(monkeypatch, capsys):
    command(monkeypatch, rl.AdapterError("Asked for a.\n  Found b.\nUse c."))
    assert cli.main(["broken"]) == 2
    assert capsys.readouterr().err == "rslora: Asked for a. Found b. Use c.\n"


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    command(monkeypatch, KeyboardInterrupt())
    assert cli.main(["broken"]) == 130
    assert capsys.readouterr().err == "rslora: interrupted; no file is left half-written.\n"


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    command(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["broken"])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "Missing subcommand"),
        (["walk"], "walkthrough"),
        (["walkthrough", "--outptu", "a.png"], "--output PATH"),
    ],
)
def test_a_wrong_command_or_flag_exits_with_2_and_a_hint(arguments, hint, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert hint in err


def test_help_lists_every_command_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for each in cli.COMMANDS:
        assert f"• {each.__name__}" in out
    assert "Exit codes: 0 done, 2 bad input" in out
    assert "Start with `rslora walkthrough`" in out


def test_help_on_the_walkthrough_explains_its_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["walkthrough", "--help"])
    out = capsys.readouterr().out
    assert "--output PATH" in out
    assert "an older file is" in out
    assert str(Path("outputs/walkthrough.png")) in out


def test_the_arguments_of_the_process_are_the_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rslora", "walkthrough", "--output", "figure.txt"])
    assert cli.main() == 2
    assert "found 'figure.txt'" in capsys.readouterr().err


def test_a_missing_parser_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro.extras", None)
    assert cli.main(["walkthrough"]) == 2
    err = capsys.readouterr().err
    assert "The command rslora needs tyro" in err
    assert "Run `pip install 'rslora_jax[cli]'`." in err
    assert err.count("\n") == 1


def test_a_terminal_without_rich_says_what_to_install(monkeypatch):
    use_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(rl.AdapterError, match=r"needs rich.*`pip install 'rslora_jax\[cli\]'`"):
        terminal.show(TABLE)


def test_a_table_is_plain_text_where_there_is_no_terminal(capsys):
    terminal.show(TABLE, "Loss", "One run.")
    assert capsys.readouterr().out == f"Loss\n\n{TABLE}\n\nOne run.\n\n"


def test_a_table_is_ruled_on_a_terminal(capsys, monkeypatch):
    use_terminal(monkeypatch)
    terminal.show(TABLE, "Loss", "One run.")
    title, header, rule, first, second, note, end = capsys.readouterr().out.splitlines()
    assert (title, note, end) == ("Loss", "One run.", "")
    assert header.split() == ["rank", "final", "loss", "note"]
    assert set(rule) == {"─"}
    assert first.split() == ["4", "1.25", "[4.99", "3.5]"]
    assert second.split() == ["16", "0.5"]


def test_an_empty_table_is_shown_on_a_terminal_too(capsys, monkeypatch):
    use_terminal(monkeypatch)
    terminal.show(Table(("rank",)))
    assert "rank" in capsys.readouterr().out


def test_no_table_of_the_walkthrough_breaks_a_number_at_80_columns(sections, capsys, monkeypatch):
    use_terminal(monkeypatch)
    for section in sections[:-1]:
        terminal.show(section.table)
        lines = capsys.readouterr().out.splitlines()
        rule = next(n for n, line in enumerate(lines) if set(line) == {"─"})
        assert len(lines) == rule + 1 + len(section.table.rows) + 1
        assert max(map(len, lines)) <= 80


STUDY = """
import jax
import numpy as np

import rslora_jax as rl


def linear(rank):
    base = {"w": np.ones((6, 5), np.float32), "head": np.ones((5, 2), np.float32)}
    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    config = rl.LoraConfig(rank=rank)
    model = lambda p, x: jax.numpy.tanh(x @ p["w"]) @ p["head"]
    _, apply, sites = rl.adapt(model, base, x, config=config, key=jax.random.key(0))
    return lambda params, x: (apply(params, x) ** 2).mean(), base, sites, [x]


def odd(rank):
    return rank
"""


@pytest.fixture
def study(tmp_path):
    """A file with a model of one matrix, and with a function that is no study."""
    (tmp_path / "own.py").write_text(STUDY)
    return f"{tmp_path / 'own.py'}"


def stability(study, *flags):
    few = ("--ranks", "1", "2", "4", "--steps", "3", "--scalings", "rslora")
    return cli.main(["stability", study, *few, *flags])


def test_stability_prints_slopes_and_advice_and_writes_its_files(study, tmp_path, capsys):
    html, csv = tmp_path / "out" / "page.html", tmp_path / "out" / "steps.csv"
    assert stability(f"{study}:linear", "--html", str(html), "--csv", str(csv)) == 0
    out, err = capsys.readouterr()
    assert "slopes of log(quantity) against log(rank)" in out
    assert [line.split()[2] for line in out.splitlines() if line.startswith("rslora  ")][::2] == [
        *("grad_b", "grad_b_rms", "grad_a", "grad", "predicted_fall", "delta"),
        *("output_trained", "input_grad"),
    ]
    assert "rslora: " in out and f"written: {html}" in out and err == ""
    assert len(csv.read_text().splitlines()) == 1 + 3 * 3 * 3  # ranks, seeds, steps
    page = html.read_text()
    assert page.startswith("<!doctype html>") and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py:linear", "There is no file 'missing.py'"),
        ("{}:lineer", "has no function 'lineer'. The nearest are 'linear'"),
        ("{}", "has no function ''"),
        ("{}:odd", r"must return (loss_fn, base, sites, batches), found int"),
    ],
)
def test_a_study_that_is_none_is_refused_in_one_line(study, name, message, capsys):
    assert stability(name.format(study)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "stability needs a model"), (["own.py:linear", "--ranks", "4"], "name two or more")],
)
def test_nothing_to_compare_is_refused_before_anything_runs(arguments, message, capsys):
    assert cli.main(["stability", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_ranks_that_do_not_increase_are_refused_in_one_line(study, capsys):
    assert cli.main(["stability", f"{study}:linear", "--ranks", "4", "2"]) == 2
    err = capsys.readouterr().err
    assert "increas" in err and err.count("\n") == 1


def folder(path, tensors):
    path.mkdir()
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return str(path)


def test_spectrum_prints_the_ranks_of_a_change_and_draws_it(tmp_path, capsys):
    rng = np.random.default_rng(0)
    base = {"w.weight": rng.normal(size=(12, 10)).astype(np.float32)}
    change = np.outer(rng.normal(size=12), rng.normal(size=10)).astype(np.float32)
    tuned = {"w.weight": base["w.weight"] + change}
    folders = [folder(tmp_path / name, found) for name, found in (("b", base), ("t", tuned))]
    plot, csv = tmp_path / "s.png", tmp_path / "s.csv"
    assert cli.main(["spectrum", *folders, "--plot", str(plot), "--csv", str(csv)]) == 0
    out = capsys.readouterr().out
    assert "Energy captured by rank" in out and "w.weight" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    header, row = (line.split(",") for line in csv.read_text().splitlines())
    assert float(dict(zip(header, row, strict=True))["stable"]) == pytest.approx(1, abs=1e-3)


def test_folders_of_different_models_are_refused_in_one_line(tmp_path, capsys):
    one = folder(tmp_path / "b", {"w.weight": np.ones((4, 3), np.float32)})
    other = folder(tmp_path / "t", {"w.weight": np.ones((4, 5), np.float32)})
    assert cli.main(["spectrum", one, other]) == 2
    err = capsys.readouterr().err
    assert "w.weight" in err and "(4, 3)" in err and "(4, 5)" in err and err.count("\n") == 1


def test_a_model_of_the_examples_is_a_study():
    loss_fn, base, sites, batches = find_study("examples/models.py:llama")(4)
    assert {site.rank for site in sites} == {4}
    params = rl.LoraParams(base, init_abstract(sites, rl.LoraConfig(rank=4)))
    assert jax.eval_shape(loss_fn, params, batches[0]).shape == ()


def test_the_module_is_a_program_too():
    done = run("-m", "rslora_jax.cli", "walkthrough", "--output", "figure.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rslora: The walkthrough is drawn as a .png file")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_ends_the_program_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run("-c", SPEAKER, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_example_is_the_same_walkthrough(sections, tmp_path, capsys, monkeypatch):
    import walkthrough

    drawn = []
    monkeypatch.setattr(walkthrough, "draw", drawn.append)
    monkeypatch.setattr(walkthrough, "sections", lambda: sections)
    walkthrough.main(tmp_path / "figure.png")
    out = capsys.readouterr().out
    assert "4     2.989       1.482       2.858         6.971" in out
    assert drawn == [tmp_path / "figure.png"]


def test_the_example_refuses_a_bad_output_in_one_line(tmp_path):
    import walkthrough

    with pytest.raises(SystemExit, match=r"drawn as a \.png file"):
        walkthrough.main(tmp_path / "figure.txt")
