"""Report: one page of Markdown about a run, with its curves, for people."""

import dataclasses
import html
import itertools
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from finetune.evaluation import Answer, Evaluation
from rslora_jax.files import whole_file

REPORT, CURVES = "report.md", "curves.png"
PACKAGES = (
    *("rslora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "qwix", "grain"),
    *("tokenizers", "safetensors", "numpy"),
)
MARKS = re.compile(r"[|`*\[\]\\]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # within a line of Markdown
LONGEST = 400  # characters of a text that a table shows


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a report tells beside the settings and the metrics.

    Attributes:
      sites: what is adapted, as text: the report of `rl.describe`.
      data: statistics of the data, by name.
      seconds: wall time of each phase, by name.
      speed: tokens per second and the like, by name.
      warnings: sentences that were said during the run.
      files: what was written, by path, with what it is.
      ended: how the run ended, a sentence.
    """

    sites: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    speed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warnings: Sequence[str] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ended: str = ""


def write(
    folder: Path,
    settings: Any,
    facts: Facts,
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
) -> Path:
    """Writes `curves.png` and then `report.md`, each whole or not at all; in process 0 alone.

    Args:
      folder: where they go.
      settings: a dataclass of all settings of the run.
      facts: what else there is to tell.
      rows: the metrics, as `Metrics` wrote them.
      evaluations: in the order of their steps; the first and the last are compared.

    Returns:
      The path of the report.
    """
    path = Path(folder, REPORT)
    if jax.process_index() == 0:
        from finetune import curves  # noqa: PLC0415  (matplotlib is of no use before the end)

        curves.draw(rows, Path(folder, CURVES))
        with whole_file(path) as temporary:
            temporary.write_text(page(settings, facts, evaluations), encoding="utf-8")
    return path


def page(settings: Any, facts: Facts, evaluations: Sequence[Evaluation]) -> str:
    """The report as Markdown; sections without content are left out."""
    parts = (
        ("", _line(facts.ended)),
        ("Held-out rows", _held(evaluations)),
        ("Curves", f"![loss, held-out loss and gradient norm over the steps]({CURVES})"),
        ("Answers", _answers(evaluations)),
        ("Warnings", "\n".join(f"- {_line(text)}" for text in facts.warnings)),
        ("Data", _pairs(facts.data)),
        ("Time and speed", _pairs({**_seconds(facts.seconds), **facts.speed})),
        ("Adapted weights", _block(facts.sites)),
        ("Settings", _pairs(settings_of(settings))),
        ("Files", _pairs(facts.files, ("file", "what it is"))),
        ("Versions", _pairs(versions())),
    )
    texts = (f"## {title}\n\n{text}" if title else text for title, text in parts if text)
    return "\n\n".join(("# Fine-tune", *texts)) + "\n"


def settings_of(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass by name."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def versions() -> dict[str, str]:
    """Python, the device, and the packages that a run depends on, as far as they are installed."""
    found = {"Python": platform.python_version()}
    found["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    r"""A Markdown table; texts with line breaks, bars or tags stay within their cells.

    Example:
      >>> print(table(("said", "loss"), [("a|b <i>", 0.123456)]))
      | said | loss |
      | --- | --- |
      | a\|b &lt;i&gt; | 0.1235 |
    """
    lines = (header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _held(evaluations: Sequence[Evaluation]) -> str:
    """First and last evaluation side by side: what training changed."""
    if not evaluations:
        return ""
    shown = [evaluations[0]] if len(evaluations) == 1 else [evaluations[0], evaluations[-1]]
    header = ("", *(f"after step {found.step}" if found.step else "before" for found in shown))
    rows = (
        ("loss (nats per answer token)", *(found.held.loss for found in shown)),
        ("token accuracy", *(f"{found.held.token_accuracy:.2%}" for found in shown)),
        ("exact match", *(f"{found.held.exact_match:.2%}" for found in shown)),
        ("rows", *(found.held.rows for found in shown)),
    )
    return table(header, rows)


def _answers(evaluations: Sequence[Evaluation]) -> str:
    """Right answers beside those before and after training."""
    told = [found for found in evaluations if found.answers]
    if not told:
        return ""
    last = told[-1]
    if len(told) == 1:
        return table(("prompt", "right", f"at step {last.step}"), last.answers)
    header = ("prompt", "right", "before", f"at step {last.step}")
    # By number, not by prompt: two rows may ask the same.
    pairs = itertools.zip_longest(told[0].answers[: len(last.answers)], last.answers)
    rows = ((now.prompt, now.right, _earlier(old, now), now.said) for old, now in pairs)
    return table(header, rows)


def _earlier(old: Answer | None, now: Answer) -> str:
    """What was said before; nothing if that was asked of another row, with other settings."""
    return old.said if old and (old.prompt, old.right) == (now.prompt, now.right) else ""


def _seconds(seconds: Mapping[str, float]) -> dict[str, str]:
    total = {"total": sum(seconds.values())} if seconds else {}
    return {name: f"{value:.1f} s" for name, value in {**seconds, **total}.items()}


def _pairs(values: Mapping[str, Any], header: tuple[str, str] = ("", "")) -> str:
    return table(header, values.items()) if values else ""


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```" if text.strip() else ""


def _line(text: str) -> str:
    """Text as Markdown shows it, not as markup."""
    return MARKS.sub(r"\\\g<0>", html.escape(str(text), quote=False))


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        value = ", ".join(map(str, value))
    text = str(value).strip()
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return "<br>".join(map(_line, text.splitlines()))
