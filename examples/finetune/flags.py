"""Flags: the command line, a YAML file with flags over it.

python examples/finetune elements.yaml --rank 64 --dry-run
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from finetune.resolve import Resolved, known_keys, resolve
from finetune.settings import INSTEAD, ConfigError, Settings, hints
from finetune.yaml_file import Value, load

PATHS = ("model", "dataset", "eval_dataset")
# What tyro sees of these instead of the file's values. Of a mapping that is not empty it would
# make one flag for each key; and a field that takes the place of another must not win over a flag.
HIDDEN: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, **dict.fromkeys(INSTEAD)}


class Parsed(NamedTuple):
    """Settings, and for each that is not a default, where it was set."""

    settings: Settings
    sources: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Command:
    """Fine-tune a Llama-family model with rank-stabilized LoRA.

    SIGTERM ends a run after the step at hand, which is saved; so does Ctrl-C where there is one
    process. The same command goes on from there.
    """

    config: Annotated[str | None, tyro.conf.Positional] = None
    """YAML file, first of all arguments; FinLoRA's JSON and Axolotl's keys are read too."""
    run: str | None = None
    """Which run of a JSON file that holds several."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = dataclasses.field(default_factory=Settings)


def read(argv: Sequence[str]) -> Settings:
    """The settings that a command line asks for.

    Args:
      argv: its words, without the program's: a file, then flags, which win over the file.

    Raises:
      ConfigError: with everything that is wrong.
    """
    return parse(argv).settings


def parse(argv: Sequence[str]) -> Parsed:
    """As `read`, with the sources of the settings."""
    config = argv[0] if argv and not argv[0].startswith("-") else None
    run = _run_flag(argv)
    found = Resolved({}, {}) if config is None else from_file(config, run)
    from_keys = _beside(Settings(**found.values), config)
    settings = _flags_over(from_keys, argv, config, run)
    sources = {name: f"{value.where} {value.key}" for name, value in found.places.items()}
    sources |= {name: _flag(name) for name in hints() if _given(name, argv)}
    _check(settings, sources, config)
    return Parsed(settings, sources)


def from_file(config: str, run: str | None = None) -> Resolved:
    """What a file says, or the run `run` of it.

    Raises:
      ConfigError: with everything that is wrong in it.
    """
    whole = load(config)
    entries = whole.entries()
    runs = {} if entries.keys() & set(known_keys()) else entries
    if not runs or not all(value.node.id == "mapping" for value in runs.values()):
        if run is not None:
            raise ConfigError(
                f"{config} holds no runs, but --run {run} asks for one. Leave it out."
            )
        name, found = Path(config).stem, resolve(entries)
    else:
        name = _choose(config, runs, run)
        found = resolve(dataclasses.replace(runs[name], key="").entries())
    found.values.setdefault("output", Path("outputs") / re.sub(r"[^\w.-]+", "_", name))
    return found


def describe(parsed: Parsed) -> str:
    """A line for each setting: name, value, and where it comes from.

    Of a setting that was worked out from the one that replaces it, that one's source.
    """
    replaced = {INSTEAD[name]: name for name in INSTEAD.keys() & parsed.sources.keys()}
    sources = parsed.sources | {name: parsed.sources[by] for name, by in replaced.items()}
    told = parsed.settings.to_dict().items()
    used = [pair for pair in told if pair[1] is not None or pair[0] not in replaced.values()]
    rows = [(name, _shown(value)) for name, value in used]
    names = max(len(name) for name, _ in rows)
    values = min(max(len(shown) for _, shown in rows), 40)
    return "\n".join(
        f"{name:{names}}  {shown:{values}}  {sources.get(name, 'default')}" for name, shown in rows
    )


def _flags_over(
    settings: Settings, argv: Sequence[str], config: str | None, run: str | None
) -> Settings:
    """What the flags do not name stays as it is in `settings`."""
    kept = {name: getattr(settings, name) for name in HIDDEN}
    default = Command(config, run, dataclasses.replace(settings, **HIDDEN))
    command = tyro.cli(Command, prog="python examples/finetune", args=argv, default=default)
    if command.config != config:
        raise ConfigError(f"The file {command.config} must come before all flags.")
    for name in HIDDEN:
        if _given(name, argv) or _given(INSTEAD.get(name, name), argv):
            del kept[name]
    return dataclasses.replace(command.settings, **kept)


def _given(name: str, argv: Sequence[str]) -> bool:
    words = {word.split("=")[0].replace("_", "-") for word in argv}
    return not words.isdisjoint((_flag(name), _flag(f"no_{name}")))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _run_flag(argv: Sequence[str]) -> str | None:
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--run", nargs="?")
    return flags.parse_known_args(argv)[0].run


def _choose(config: str, runs: Mapping[str, Value], run: str | None) -> str:
    if run is None and len(runs) == 1:
        return next(iter(runs))
    if run in runs:
        return run
    asked = "choose one by --run" if run is None else f"there is no {run}"
    names = ", ".join(f"{name} (line {value.line})" for name, value in runs.items())
    raise ConfigError(f"{config} holds {len(runs)} runs, {asked}: {names}.")


def _beside(settings: Settings, config: str | None) -> Settings:
    """With paths that do not exist here, but do beside the file, pointing there."""
    if config is None:
        return settings
    changes = {}
    for name in PATHS:
        path = os.path.expanduser(getattr(settings, name) or "")
        beside = Path(config).parent / path
        if path and not Path(path).exists() and beside.exists():
            changes[name] = str(beside)
    return dataclasses.replace(settings, **changes)


def _check(settings: Settings, sources: Mapping[str, str], config: str | None) -> None:
    """Refuses what lacks a model or data, or names data that is not there."""
    into = f"write `{{}}: ...` in {config}, or" if config else "write"
    problems = [
        f"{name} is missing: {into.format(name)} --{name} on the command line."
        for name in (("model", "dataset") if settings.plan is None else ("model",))
        if not getattr(settings, name)
    ]
    for name in ("dataset", "eval_dataset"):
        path = getattr(settings, name)
        if path and settings.plan is None and not Path(path).is_file():
            where = f", nor in {Path(config).parent.resolve()}" if config else ""
            problems.append(
                f"{sources.get(name, name)}: no file {path!r} in {Path.cwd()}{where}. "
                f"Correct it, or name one by {_flag(name)}."
            )
    if settings.output.exists() and not settings.output.is_dir():
        problems.append(f"output must be a folder, found the file {settings.output}: name another.")
    if problems:
        raise ConfigError(*problems)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else {None: "none"}.get(value, str(value))
