"""The command line: exit codes, one line for each error, help that lists the commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rslora_jax as rl
from rslora_jax import cli
from rslora_jax.tables import Table

SPEAKER = """
import sys
from rslora_jax import cli

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
    return cli.sections()


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
        ([], "Expected one of {walkthrough}"),
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
        cli.show(TABLE)


def test_a_table_is_plain_text_where_there_is_no_terminal(capsys):
    cli.show(TABLE, "Loss", "One run.")
    assert capsys.readouterr().out == f"Loss\n\n{TABLE}\n\nOne run.\n\n"


def test_a_table_is_ruled_on_a_terminal(capsys, monkeypatch):
    use_terminal(monkeypatch)
    cli.show(TABLE, "Loss", "One run.")
    title, header, rule, first, second, note, end = capsys.readouterr().out.splitlines()
    assert (title, note, end) == ("Loss", "One run.", "")
    assert header.split() == ["rank", "final", "loss", "note"]
    assert set(rule) == {"─"}
    assert first.split() == ["4", "1.25", "[4.99", "3.5]"]
    assert second.split() == ["16", "0.5"]


def test_an_empty_table_is_shown_on_a_terminal_too(capsys, monkeypatch):
    use_terminal(monkeypatch)
    cli.show(Table(("rank",)))
    assert "rank" in capsys.readouterr().out


def test_no_table_of_the_walkthrough_breaks_a_number_at_80_columns(sections, capsys, monkeypatch):
    use_terminal(monkeypatch)
    for section in sections[:-1]:
        cli.show(section.table)
        lines = capsys.readouterr().out.splitlines()
        rule = next(n for n, line in enumerate(lines) if set(line) == {"─"})
        assert len(lines) == rule + 1 + len(section.table.rows) + 1
        assert max(map(len, lines)) <= 80


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
