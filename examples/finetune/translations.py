"""Translations: keys of other tools whose values are not ours, or that say less than ours do."""

from collections.abc import Callable
from typing import Any, NamedTuple

from finetune.yaml_file import FALSE, TRUE, Value, read

FORMATS = ((None, None), ("context", "target"), ("prompt", "completion"))
PLAIN = "{instruction}"
DATASET = {
    "ds_type": ("json", "jsonl"),
    "split": ("train",),
    "field_messages": ("messages",),
    "chat_template": ("tokenizer_default",),
    "train_on_eos": ("turn", "last"),
}
"""What else may stand in an entry of `datasets`, with its values."""


class Not(NamedTuple):
    """A value that a field must not have; of others it says nothing."""

    value: Any


def adapter(value: Value) -> dict[str, Any]:
    """`lora`, or `qlora`: 4 bits."""
    if value.is_text and value.text in ("lora", "qlora"):
        return {"quant_bits": 4} if value.text == "qlora" else {}
    raise value.wrong("must be lora or qlora: only adapters of these kinds are trained")


def bits(count: int) -> Callable[[Value], dict[str, Any]]:
    """`load_in_8bit`, `load_in_4bit`: false says only what the bits are not."""
    return lambda value: {"quant_bits": count if read(value, bool) else Not(count)}


def linear(value: Value) -> dict[str, Any]:
    """`lora_target_linear`: false says only that targets are named elsewhere."""
    return {"targets": "all-linear" if read(value, bool) else Not("all-linear")}


def brain_float(value: Value) -> dict[str, Any]:
    """`bf16`: `auto` asks the devices, once they are known."""
    if value.is_text and value.text == "auto":
        return {"bfloat16_on": "accelerators"}
    return {"bfloat16": (value.is_text and value.text == "full") or read(value, bool)}


def compute_dtype(value: Value) -> dict[str, Any]:
    """`bnb_4bit_compute_dtype`."""
    if value.is_text and value.text in ("bfloat16", "float32"):
        return {"bfloat16": value.text == "bfloat16"}
    raise value.wrong("must be bfloat16 or float32")


def checkpointing(value: Value) -> dict[str, Any]:
    """`gradient_checkpointing`: of whole layers, or none."""
    if value.is_text and value.text.lower() in TRUE + FALSE:
        return {"remat": "full" if read(value, bool) else "none"}
    raise value.wrong("must be true or false (remat: dots is a third way)")


def share(value: Value) -> dict[str, Any]:
    """`val_set_size`: a share of the rows; Axolotl also reads counts."""
    found = read(value, float)
    if not 0 <= found < 1:
        raise value.wrong("must be a share of the rows, from 0 to below 1")
    return {"eval_fraction": found}


def steps(value: Value) -> dict[str, Any]:
    """`max_steps`: -1 is none."""
    found = read(value, int)
    if found < 1 and found != -1:
        raise value.wrong("must be at least 1")
    return {} if found == -1 else {"steps": found}


def strategy(often: str, never: dict[str, Any] | None) -> Callable[[Value], dict[str, Any]]:
    """`eval_strategy`, `save_strategy`: `steps` says nothing of how many."""
    meanings = {"steps": {}, "epoch": {often: 1}} | ({} if never is None else {"no": never})

    def translate(value: Value) -> dict[str, Any]:
        if not value.is_text or value.text not in meanings:
            raise value.wrong(f"must be one of {', '.join(meanings)}")
        return meanings[value.text]

    return translate


def special_tokens(value: Value) -> dict[str, Any]:
    """Padding has no weight in the loss, so any token will do for it; others matter."""
    for name, entry in value.entries().items():
        if name != "pad_token" and not entry.is_null:
            raise entry.error("is not supported: special tokens are those of the tokenizer")
    return {}


def data_file(field: str) -> Callable[[Value], dict[str, Any]]:
    """`datasets`, `test_datasets`: one file of rows whose form we read."""

    def translate(value: Value) -> dict[str, Any]:
        items = value.items()
        if len(items) != 1:
            raise value.wrong("must name one file (join several into one)")
        entries = items[0].entries()
        if "path" not in entries or entries["path"].is_null:
            raise items[0].error("has no path: name a JSONL file")
        for name, entry in entries.items():
            if name != "path" and not entry.is_null:
                _check_dataset(name, entry)
        return {field: read(entries["path"], str)}

    return translate


def _check_dataset(name: str, value: Value) -> None:
    if name == "type":
        _check_type(value)
    elif name == "roles_to_train":
        if [read(item, str) for item in value.items()] != ["assistant"]:
            raise value.error("must be [assistant]: the loss is on answers only")
    elif name not in DATASET:
        known = ", ".join(("path", "type", "roles_to_train", *DATASET))
        raise value.error(f"is not known in a data set. Known are {known}")
    elif read(value, str) not in DATASET[name]:
        raise value.wrong(f"must be {' or '.join(DATASET[name])}")


def _check_type(value: Value) -> None:
    if value.is_text:
        if value.text != "chat_template":
            raise value.wrong(
                "must be chat_template, a mapping or left out: rows are messages, "
                "context and target, or prompt and completion"
            )
        return
    texts = {name: read(v, str) for name, v in value.entries().items() if not _is_empty(v)}
    fields = texts.pop("field_instruction", None), texts.pop("field_output", None)
    if fields not in FORMATS:
        raise value.error(
            f"asks for rows of {fields[0]} and {fields[1]}, but rows are messages, context and "
            "target, or prompt and completion"
        )
    texts.pop("field_system", None)
    for name, text in texts.items():
        if name not in ("format", "no_input_format") or text != PLAIN:
            raise value.entries()[name].wrong(
                "is not supported: prompts are read as they stand in the data. Leave it out, or "
                "write them out there"
            )


def _is_empty(value: Value) -> bool:
    return value.is_null or (value.is_text and not value.text)


TRANSLATIONS: dict[str, Callable[[Value], dict[str, Any]]] = {
    "adapter": adapter,
    "load_in_8bit": bits(8),
    "load_in_4bit": bits(4),
    "lora_target_linear": linear,
    "bf16": brain_float,
    "bnb_4bit_compute_dtype": compute_dtype,
    "gradient_checkpointing": checkpointing,
    "val_set_size": share,
    "max_steps": steps,
    "eval_strategy": strategy("evals_per_epoch", {"eval_every": 0}),
    "save_strategy": strategy("saves_per_epoch", None),
    "special_tokens": special_tokens,
    "datasets": data_file("dataset"),
    "test_datasets": data_file("eval_dataset"),
}
