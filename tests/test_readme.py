"""The README's example prints what the README says."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("title", ["Example", "Measuring rank stability"])
def test_the_first_example_of_a_section_prints_the_output_that_the_readme_shows(
    title: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, output = (blocks(section(title), language)[0] for language in ("python", "text"))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == output


def test_the_start_section_holds_two_commands_of_one_line() -> None:
    commands = blocks(section("Start"), "bash")
    assert [len(command.strip().splitlines()) for command in commands] == [1, 1]
