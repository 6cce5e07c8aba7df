"""Travel: Hugging Face PEFT folders to adapters of this library, and back."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rslora_jax.peft import modules
from rslora_jax.peft.inward import Loaded, from_adapter
from rslora_jax.peft.names import LLAMA
from rslora_jax.peft.outward import to_adapter
from rslora_jax.peft.rules import Name
from rslora_jax.sites import Site

__all__ = ["Loaded", "from_adapter", "load", "save", "to_adapter"]


def load(
    folder: str | os.PathLike[str],
    params: Any,
    names: Sequence[Name] = LLAMA,
    sites: Sequence[Site] | None = None,
    *,
    dtype: Any = None,
) -> Loaded:
    """Reads a PEFT folder onto a base.

    Strict: every tensor of the file is used once, every module that its settings name is there,
    and every name is in the base. Layers of a stacked weight share one rank and scale here: those
    of other ranks are padded with zeros (which stay zero in training), and a scale that differs is
    folded into `b`, which keeps the function to rounding. Layers that the settings leave out get
    factors of zero.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      params: the base, arrays or `jax.ShapeDtypeStruct`s; None for tools that have none: the
        tree is then read off the names, every layer must be in the file, and nothing else.
      names: the mapping between paths and names; `LLAMA`, or `names([...])`.
      sites: from `find_sites` or `adapt`: their axes count, and how weights are used is known.
        Without them axes are those of `names`. Sites with ranks must agree with the file.
      dtype: of the factors; None keeps the file's.

    Returns:
      `Loaded(params, sites, config, replaced, tokens, adapter)`; `rl.attach(apply_fn, sites)`
      applies it.

    Raises:
      AdapterError: if the folder cannot be read (`peft.read`); if a name is not in the base or
        one of the base is missing in the file; if shapes, ranks or scales disagree; for DoRA and
        grouped convolutions, which have to be merged; if the file's copy of the base's embedding
        differs; or if the embedding is the output head too.

    Example:
      >>> import tempfile, jax.numpy as jnp, rslora_jax as rl
      >>> from rslora_jax.peft.names import names
      >>> site = rl.Site("w", "io", (2, 3), "float32", rank=4, alpha=2.0, scale=1.0)
      >>> lora = {"w": {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 3))}}
      >>> mine = names([("w", "lin.weight", "io")])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/adapter", lora, [site], mine)
      ...     loaded = load(folder + "/adapter", {"w": jnp.zeros((2, 3))}, mine)
      >>> loaded.sites[0].scale, loaded.params.lora["w"]["a"].shape
      (1.0, (2, 4))
    """
    adapter = modules.read(os.fspath(folder))
    return from_adapter(adapter, params, names, sites, dtype=dtype)


def save(  # noqa: PLR0913
    folder: str | os.PathLike[str],
    lora: Mapping[str, Any],
    sites: Sequence[Site],
    names: Sequence[Name] = LLAMA,
    form: str = "native",
    *,
    base_model: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    saved: Mapping[str, Any] | None = None,
    tokens: Mapping[str, tuple[Sequence[int], Any]] | None = None,
    fan_in_fan_out: bool | None = None,
    overwrite: bool = False,
    dtype: Any = None,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
      folder: where; it appears whole, or not at all.
      lora: the factors, a nested dict as in `LoraParams`; sharded arrays are fetched site by
        site.
      sites: their sites, with ranks and scales.
      names: the mapping between paths and names.
      form: ``"native"`` keeps ranks, alphas and the scaling, as ``rank_pattern``,
        ``alpha_pattern`` and ``use_rslora``: for training on. ``"portable"`` pads every module to
        the largest rank and folds its scale into B, with ``use_rslora: false`` and no patterns:
        PEFT, vLLM, SGLang and llama.cpp compute the same function.
      base_model: written as ``base_model_name_or_path``.
      task_type: such as ``"CAUSAL_LM"``.
      saved: leaves to store in full, by path: as modules to save, or as biases of adapted
        modules.
      tokens: trained rows by the embedding's path: ``(indices, table)``, the whole table.
      fan_in_fan_out: True if the base's linear layers store (in, out); None asks `Name.stored`.
      overwrite: True replaces a folder that is there.
      dtype: to store; None keeps that of the arrays.

    Raises:
      AdapterError: if the folder exists; a path has no name, or two share one; a scale is neither
        alpha/r nor alpha/sqrt(r) (native); values are not finite; or the embedding is the output
        head too, of which PEFT would adapt the lookup alone.

    Example:
      >>> import tempfile, pathlib, jax.numpy as jnp, rslora_jax as rl
      >>> from rslora_jax.peft.names import names
      >>> site = rl.Site("w", "io", (2, 3), "float32", rank=4, alpha=2.0, scale=1.0)
      >>> lora = {"w": {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 3))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/adapter", lora, [site], names([("w", "lin.weight")]), "portable")
      ...     sorted(file.name for file in pathlib.Path(folder, "adapter").iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    adapter = to_adapter(
        lora,
        sites,
        names,
        form,
        base_model=base_model,
        task_type=task_type,
        saved=saved,
        tokens=tokens,
        fan_in_fan_out=fan_in_fan_out,
        dtype=dtype,
    )
    modules.write(os.fspath(folder), adapter, overwrite)
