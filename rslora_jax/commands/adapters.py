"""Adapters: the commands that look at adapters and take them from tool to tool."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax import algebra, peft
from rslora_jax.analysis.spectra.effective_rank import effective_ranks
from rslora_jax.commands.sources import (
    Source,
    check_base,
    names_of,
    open_source,
    write_source,
)
from rslora_jax.factors import factors_of
from rslora_jax.folders import INDEX, SINGLE
from rslora_jax.norms import factor_norm, factored_svd
from rslora_jax.paths import AdapterError
from rslora_jax.peft.rules import find
from rslora_jax.peft.travel import to_adapter
from rslora_jax.tables import Table
from rslora_jax.terminal import progress, show

__all__ = ["combine", "convert", "inspect", "merge"]

Form = Literal["orbax", "peft", "peft-portable"]


def inspect(folder: Path, /, names: str = "", csv: Path | None = None) -> None:
    """Show what an adapter holds: sites, ranks, alphas, scales, norms, effective ranks.

    FOLDER is one that rslora_jax.checkpoint wrote (of a run: its newest step) or a PEFT folder.
    Norms are of a, b and of the change scale * a @ b, the largest of a site's layers; the stable
    rank |D|_F^2 / |D|^2 and the entropy rank of the change are means over its layers. A stable
    rank far below the rank says that a smaller one would do (`rslora combine --rank`).

    Args:
      folder: The adapter.
      names: For a PEFT folder, put its modules together as this mapping says: llama, or a JSON
        file. Without it each module is a line.
      csv: Write the table here, with all digits.
    """
    if csv is not None and csv.is_dir():
        raise AdapterError(f"--csv is the file to write, found the folder {csv}.")
    with progress("inspect") as report:
        source = open_source(folder, names_of(names) if names else None)
        factors = factors_of(source.lora, source.sites)
        rows = []
        for done, site in enumerate(source.sites):
            report(done, len(source.sites), site.path)
            rows.append(_row(site, factors[site.path]))
    total = sum(site.parameters for site in source.sites)
    known = source.base.digest if source.base else None
    note = (
        f"{source.kind}, scaling {source.config.scaling}, {len(rows)} sites, {total:,} parameters"
    )
    note += f", step {source.step}" if source.kind == "orbax" else ""
    note += f", base {known[:16]}" if known else ""
    if source.held:
        note += (
            f"; beside them {len(source.held)} tensors of the base: {', '.join(source.held[:4])}"
        )
    show(Table.of(rows), str(folder), note)
    if csv is not None:
        csv.parent.mkdir(parents=True, exist_ok=True)
        Table.of(rows).to_csv(csv)
        print(f"written: {csv}")


def convert(
    source: Path,
    output: Path,
    /,
    to: Form,
    names: str = "llama",
    overwrite: bool = False,
) -> None:
    """Take an adapter from one format to another; the function stays the same.

    `--to peft` keeps ranks, alphas and use_rslora. `--to peft-portable` pads every module to one
    rank, folds the scale into B and writes use_rslora: false, so that PEFT, vLLM, SGLang and
    llama.cpp compute the same function: some of them ignore use_rslora and rank patterns.
    `--to orbax` writes what rslora_jax.checkpoint.restore reads.

    Args:
      source: The adapter: an Orbax or a PEFT folder.
      output: The folder to write. It appears whole or not at all.
      to: The format.
      names: How paths and Hugging Face names belong together: llama, or a JSON file.
      overwrite: Replace the output if it is there.
    """
    rules = names_of(names)
    _refuse_existing(output, overwrite, source)
    with progress("convert") as report:
        report(0, 2, f"reading {source}")
        found = open_source(source, rules)
        report(1, 2, f"writing {output}")
        write_source(output, found, to, rules, overwrite=overwrite)
    print(f"written: {output} ({to}, {len(found.sites)} sites)")


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    /,
    names: str = "llama",
    max_shard_gb: float = 5.0,
    any_base: bool = False,
    overwrite: bool = False,
) -> None:
    """Fold an adapter into its model: a folder of plain weights that transformers loads.

    BASE is a Hugging Face folder with safetensors. Each weight becomes W + scale * B A, summed in
    float32 and cast once; weights are read and written one at a time. DoRA, saved modules and
    token rows of a PEFT adapter are merged too. An Orbax adapter that knows its base is refused
    on another one.

    Args:
      base: The folder of the model.
      adapter: The adapter: a PEFT or an Orbax folder.
      output: The folder to write. It appears whole or not at all.
      names: For an Orbax adapter, how paths and Hugging Face names belong together: llama, or a
        JSON file.
      max_shard_gb: The size of one weight file, in GB.
      any_base: Do not compare the base with the one that the adapter was trained on.
      overwrite: Replace the output if it is there.
    """
    _refuse_existing(output, overwrite, base, adapter)
    if not max_shard_gb > 0:
        raise AdapterError(f"--max-shard-gb must be above 0, found {max_shard_gb}.")
    with progress("merge") as report:
        found = _for_merging(base, adapter, names, any_base)
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        peft.merge_folders(
            base,
            found,
            output,
            overwrite=overwrite,
            max_shard_bytes=int(max_shard_gb * 1e9),
            progress=report,
        )
    if not (output / "config.json").exists():
        print(f"{base} has no config.json, so {output} has none: transformers needs one beside it.")
    print(f"written: {output}")


def combine(
    output: Path,
    adapters: tuple[Path, ...],
    /,
    weights: tuple[float, ...] = (),
    rank: int | None = None,
    to: Form = "orbax",
    names: str = "llama",
    overwrite: bool = False,
) -> None:
    """Add adapters up, each with a weight, into one adapter.

    The sum is exact: ranks add up, and scales are folded in, so that one adapter of weight 1 comes
    back as itself. With `--rank` each module is cut to its best approximation, and what that loses
    is printed. One adapter and a rank is a resize.

    Args:
      output: The folder to write. It appears whole or not at all.
      adapters: The adapters: Orbax or PEFT folders of one base model.
      weights: One for each adapter; without them all are 1.
      rank: Of every site of the result.
      to: The format of the result.
      names: How paths and Hugging Face names belong together: llama, or a JSON file.
      overwrite: Replace the output if it is there.
    """
    weights = weights or (1.0,) * len(adapters)
    if not adapters or len(weights) != len(adapters):
        raise AdapterError(
            f"combine needs adapters and one weight for each, found {len(adapters)} adapters and "
            f"{len(weights)} weights."
        )
    _refuse_existing(output, overwrite, *adapters)
    rules = names_of(names)
    with progress("combine") as report:
        sources = []
        for done, folder in enumerate(adapters):
            report(done, len(adapters) + 1, f"reading {folder}")
            sources.append(open_source(folder, rules))
        report(len(adapters), len(adapters) + 1, "adding")
        _check_one_tree(adapters, sources, rules)
        parts = [(s.lora, s.sites, w) for s, w in zip(sources, weights, strict=True)]
        found = algebra.combine(parts, rank=rank)
        base = _common_base(adapters, sources)
        told = sources[0].told
        made = Source(sources[0].kind, found.lora, found.sites, found.config, base=base, told=told)
        write_source(output, made, to, rules, overwrite=overwrite)
    if found.errors.rows:
        show(found.errors, "What the rank cuts off")
    print(f"written: {output} ({to}, {len(found.sites)} sites)")


def _row(site: Any, factors: Any) -> dict[str, Any]:
    size = {name: float(np.max(norm)) for name, norm in factor_norm(site, factors).items()}
    s = np.asarray(factored_svd(site, factors).s)
    ranks = effective_ranks(s)
    return {
        "site": site.path,
        "shape": "x".join(map(str, site.shape)),
        "rank": site.rank,
        "alpha": site.alpha,
        "scale": site.scale,
        "norm_a": size["a"],
        "norm_b": size["b"],
        "norm": float(np.sqrt((s**2).sum(-1)).max()),
        "stable_rank": float(np.mean(ranks.stable)),
        "entropy_rank": float(np.mean(ranks.entropy)),
        "parameters": site.parameters,
    }


def _for_merging(base: Path, folder: Path, names: str, any_base: bool) -> peft.PeftAdapter:
    if (folder / "adapter_config.json").exists():
        return peft.read(folder)
    rules = names_of(names)
    source = open_source(folder, rules)
    if source.base is None:
        print(f"{folder} does not know its base: only names and shapes were compared.")
    elif not any_base:
        check_base(base, source, rules)
    # Wide factors: scale * b is then not rounded before it is summed.
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(source.lora)))
    return to_adapter(source.lora, source.sites, rules, "portable", dtype=dtype)


def _common_base(folders: tuple[Path, ...], sources: list[Source]) -> Any:
    known = [(folder, s.base) for folder, s in zip(folders, sources, strict=True) if s.base]
    for folder, base in known[1:]:
        first, print_ = known[0]
        differences = print_.differences(base, (str(first), str(folder)))
        if differences:
            raise AdapterError(f"The adapters were trained on different bases: {differences[0]}")
    return known[0][1] if known else None


def _check_one_tree(
    folders: tuple[Path, ...], sources: list[Source], rules: Sequence[peft.Name]
) -> None:
    """One weight must have one path in all adapters."""
    paths: dict[str, tuple[str, Path]] = {}
    for folder, source in zip(folders, sources, strict=True):
        for site in source.sites:
            found = find(rules, site.path)
            tensor = found.tensor if found else site.path
            path, first = paths.setdefault(tensor, (site.path, folder))
            if path != site.path:
                raise AdapterError(
                    f"{tensor!r} is {path!r} in {first} and {site.path!r} in {folder}: they are of "
                    "differently named trees. Give --names a JSON file whose paths are those of "
                    "the Orbax folder."
                )


def _refuse_existing(output: Path, overwrite: bool, *sources: Path) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise AdapterError(
            f"{output} exists already and is left as it is. Pass --overwrite to replace it, or "
            "choose another folder."
        )
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()):
            raise AdapterError(
                f"{output} is, or holds, {source}, which is read and would be replaced. Write to "
                "another folder."
            )
    here = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if here and not here & {"adapter_config.json", "record", SINGLE, INDEX}:
        raise AdapterError(
            f"{output} is no adapter and no model, but holds {sorted(here)[:4]}, which --overwrite "
            "would delete. Choose another folder, or remove it yourself."
        )
