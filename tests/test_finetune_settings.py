import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rslora_jax as rl
from finetune import flags, keys, modules
from finetune.resolve import resolve
from finetune.settings import ConfigError, Settings, hints
from finetune.settling import in_steps, on_mesh
from finetune.translations import TRANSLATIONS
from finetune.yaml_file import load
from llama import Llama, LlamaConfig

LAST = "settings.yaml"


def written(folder, text, name=LAST):
    path = folder / name
    path.write_text(text)
    return path


def values(folder, text):
    """What the keys of `text` set; `{}` if they set nothing."""
    return resolve(load(written(folder, text)).entries()).values


def problems(folder, text, name=LAST):
    """What is wrong with a file, each with the place cut to `:LINE: `."""
    path = written(folder, text, name)
    with pytest.raises(ConfigError, match=re.escape(name)) as caught:
        flags.from_file(str(path))
    return [problem.replace(str(path), "") for problem in caught.value.problems]


# One line for each key of each vocabulary: what it sets. More than one value of a key: more lines.
MEANINGS = [
    # FinLoRA's documentation
    ("model_name: a/b", {"model": "a/b"}),
    ("dataset: x.jsonl", {"dataset": "x.jsonl"}),
    ("use_rsLoRA: true", {"use_rslora": True}),
    ("use_rsLoRA: false", {"use_rslora": False}),
    ("lora_rank: 64", {"rank": 64, "use_rslora": False}),
    ("lora_alpha: 32", {"alpha": 32.0, "use_rslora": False}),
    ("quant_bits: 8", {"quant_bits": 8}),
    # FinLoRA's JSON
    ("base_model: a/b", {"model": "a/b"}),
    ("dataset_path: x.jsonl", {"dataset": "x.jsonl"}),
    ("lora_r: 8", {"rank": 8, "use_rslora": False}),
    ("peft_use_rslora: true", {"use_rslora": True}),
    ("num_epochs: 4", {"epochs": 4.0}),
    ("batch_size: 8", {"batch_per_device": 8}),
    ("gradient_accumulation_steps: 2", {"accumulation": 2}),
    ("learning_rate: 1e-4", {"learning_rate": 1e-4}),
    # Axolotl
    ("datasets: [{path: x.jsonl}]", {"dataset": "x.jsonl"}),
    ("test_datasets: [{path: y.jsonl, type: chat_template}]", {"eval_dataset": "y.jsonl"}),
    ("val_set_size: 0.02", {"eval_fraction": 0.02}),
    ("output_dir: ./out", {"output": Path("out")}),
    ("lora_target_modules: [v_proj, q_proj]", {"targets": ("q_proj/kernel", "v_proj/kernel")}),
    ("lora_target_modules: q_proj", {"targets": ("q_proj/kernel",)}),
    (r"lora_target_modules: .*\.[qv]_proj", {"targets": ("q_proj/kernel", "v_proj/kernel")}),
    ("lora_target_modules: all-linear", {"targets": "all-linear"}),
    ("lora_target_modules: [all-linear]", {"targets": "all-linear"}),
    ("lora_target_linear: true", {"targets": "all-linear"}),
    ("lora_rank_pattern: {q_proj: 4}", {"rank_pattern": {"q_proj": 4}}),
    ("lora_alpha_pattern: {q_proj: 4}", {"alpha_pattern": {"q_proj": 4.0}}),
    ("adapter: lora", {}),
    ("adapter: qlora", {"quant_bits": 4}),
    ("load_in_8bit: true", {"quant_bits": 8}),
    ("load_in_4bit: true", {"quant_bits": 4}),
    ("load_in_8bit: false", {}),
    ("bnb_4bit_quant_type: nf4", {"quant_format": "nf4"}),
    ("bnb_4bit_compute_dtype: bfloat16", {"bfloat16": True}),
    ("loraplus_lr_ratio: 16", {"lora_plus_ratio": 16.0}),
    ("max_steps: 100", {"steps": 100}),
    ("max_steps: -1", {}),
    ("micro_batch_size: 2", {"batch_per_device": 2}),
    ("warmup_ratio: 0.1", {"warmup": 0.1}),
    ("warmup_steps: 10", {"warmup_steps": 10}),
    ("weight_decay: 0.0", {"weight_decay": 0.0}),
    ("max_grad_norm: 0.5", {"clip": 0.5}),
    ("sequence_len: 4096", {"length": 4096}),
    ("sample_packing: false", {"packing": False}),
    ("bf16: true", {"bfloat16": True}),
    ("bf16: full", {"bfloat16": True}),
    ("bf16: auto", {"bfloat16_on": "accelerators"}),
    ("bfloat16: no", {"bfloat16": False}),
    ("gradient_checkpointing: true", {"remat": "full"}),
    ("gradient_checkpointing: false", {"remat": "none"}),
    ("seed: 42", {"seed": 42}),
    ("eval_steps: 50", {"eval_every": 50}),
    ("evals_per_epoch: 4", {"evals_per_epoch": 4}),
    ("eval_strategy: epoch", {"evals_per_epoch": 1}),
    ("eval_strategy: 'no'", {"eval_every": 0}),
    ("eval_strategy: no", {"eval_every": 0}),
    ("save_steps: 50", {"save_every": 50}),
    ("saves_per_epoch: 1", {"saves_per_epoch": 1}),
    ("save_strategy: steps", {}),
    ("save_total_limit: 3", {"keep_last": 3}),
    ("use_tensorboard: false", {"tensorboard": False}),
    ("merge_lora: true", {"merge": True}),
    ("dp_replicate_size: 2", {"data": 2}),
    ("dp_shard_size: 4", {"fsdp": 4}),
    ("tensor_parallel_size: 2", {"tensor": 2}),
    # PEFT and TRL
    ("model_name_or_path: a/b", {"model": "a/b"}),
    ("r: 8", {"rank": 8, "use_rslora": False}),
    ("target_modules: [mlp.up_proj]", {"targets": ("up_proj/kernel",)}),
    ("num_train_epochs: 2", {"epochs": 2.0}),
    ("per_device_train_batch_size: 2", {"batch_per_device": 2}),
    ("max_length: 64", {"length": 64}),
    ("special_tokens: {pad_token: <|end_of_text|>}", {}),
]


@pytest.mark.parametrize("line, wanted", MEANINGS)
def test_a_key_of_another_tool_sets_our_field(tmp_path, line, wanted):
    assert values(tmp_path, line) == wanted


def test_every_spelling_that_the_table_names_is_tried_above():
    assert set(keys.FIELDS) <= {line.split(":")[0] for line, _ in MEANINGS}


def test_the_table_of_spellings_names_our_fields_and_prints_as_markdown():
    assert {spelling.field for spelling in keys.SPELLINGS} <= set(hints())
    table = keys.markdown().splitlines()
    assert "| `rank` | `lora_rank` | `lora_r` | `lora_r` | `r` |" in table
    assert len(table) == len(keys.SPELLINGS) + 2


@pytest.mark.parametrize("inert", keys.INERT, ids=lambda inert: inert.names.split()[0])
def test_a_key_that_can_change_nothing_is_read_at_such_values_alone(tmp_path, inert):
    for name in inert.names.split():
        accepted = ["7" if word == "*" else word for word in inert.accepted.split()]
        for value in ["", "null", "[]", "''", *accepted]:
            assert values(tmp_path, f"{name}: {value}") == {}
        if inert.accepted != "*":
            (problem,) = problems(tmp_path, f"seed: 1\n{name}: strange")
            assert problem.startswith(f":2: {name}: strange is not supported")
            assert inert.why in problem


def test_a_field_of_ours_is_read_by_its_own_name_and_by_its_type(tmp_path):
    text = """
        model: 'no'
        rank: 16
        alpha: 1_6
        use_rslora: YES
        quant_bits: "4"
        steps: 20
        learning_rate: "1e-3"
        targets: [self_attn/q_proj/kernel, k_proj]
        export: [portable]
        rank_pattern: {q_proj: 2}
        remat: dots
        dry_run: off
        eval_dataset:
    """
    assert values(tmp_path, text) == {
        "model": "no",
        "rank": 16,
        "alpha": 16.0,
        "use_rslora": True,
        "quant_bits": 4,
        "steps": 20,
        "learning_rate": 1e-3,
        "targets": ("q_proj/kernel", "k_proj/kernel"),
        "export": ("portable",),
        "rank_pattern": {"q_proj": 2},
        "remat": "dots",
        "dry_run": False,
    }


WRONG = [
    ("lora_r: 8.5", ":1: lora_r must be a whole number, found 8.5."),
    ("rank: 010", ":1: rank must be a whole number, found 010."),
    ("rank: 0", ":1: rank must be at least 1, found 0."),
    ("rank: [8]", ":1: rank must be a whole number, found a list of 1."),
    ("alpha: -1", ":1: alpha must be above 0, found -1.0."),
    ("learning_rate: fast", ":1: learning_rate must be a number, found fast."),
    ("learning_rate: .inf", ":1: learning_rate must be a number, found .inf."),
    ("warmup_ratio: 10", ":1: warmup_ratio must be from 0 to 1, a share of the steps, found 10.0."),
    ("val_set_size: 100", "must be a share of the rows, from 0 to below 1, found 100."),
    ("eval_fraction: 1", ":1: eval_fraction must be from 0 to below 1, found 1.0."),
    ("quant_bits: 3", ":1: quant_bits must be one of 16, 8, 4, found 3."),
    ("quant_bits: true", ":1: quant_bits must be one of 16, 8, 4, found true."),
    ("use_rsLoRA: maybe", ":1: use_rsLoRA must be true or false, found maybe."),
    ("model: 8", ":1: model must be text (in quotes, if that is meant), found 8."),
    ("model: off", ":1: model must be text (in quotes, if that is meant), found off."),
    ("model: ''", ":1: model must be text, found ''."),
    ("export:\n- native\n- torch", ":3: export[1] must be one of native, portable, found torch."),
    ("rank_pattern: 8", ":1: rank_pattern must be a mapping of keys to values, found 8."),
    ("rank_pattern:\n  q_proj: 0", ":2: rank_pattern.q_proj must be at least 1, found 0."),
    ("rank_pattern:\n  q_proj: a", ":2: rank_pattern.q_proj must be a whole number, found a."),
    ("alpha_pattern:\n  q_proj: 0", ":2: alpha_pattern.q_proj must be above 0, found 0.0."),
    ("rank_pattern:\n  (q: 8", ":2: rank_pattern.(q '(q' is not a regular expression"),
    ("rank_pattern:\n  q: 8", "'q' names no weight of the model. The nearest are "),
    ("rank_pattern:\n  layers.0.self_attn.q_proj: 8", "names some layers of 'q_proj/kernel' only"),
    ("targets: [q_proj]\nrank_pattern:\n  v_proj: 8", ":3: rank_pattern.v_proj 'v_proj' matches "),
    ("targets:\n- q_proj\n- z_proj", ":3: targets[1] 'z_proj' names no weight of the model."),
    ("targets: [0.q_proj]", "'0.q_proj' names no weight of the model. The nearest are q_proj"),
    (r"targets: model\.layers\.[0-3]\..*q_proj", "names some layers of 'q_proj/kernel' only"),
    ("targets: []", ":1: targets names nothing."),
    ("adapter: llama-adapter", ":1: adapter must be lora or qlora"),
    ("datasets: x.jsonl", ":1: datasets must be a list, found x.jsonl."),
    (
        "datasets: [{path: a}, {path: b}]",
        "must name one file (join several into one), found a list",
    ),
    ("datasets:\n- type: chat_template", ":2: datasets[0] has no path"),
    ("datasets:\n- path: a\n  type: alpaca", ":3: datasets[0].type must be chat_template"),
    ("datasets:\n- path: a\n  shards: 2", ":3: datasets[0].shards is not known in a data set."),
    ("datasets:\n- path: a\n  split: test", ":3: datasets[0].split must be train, found test."),
    ("datasets:\n- path: a\n  roles_to_train: [user]", ":3: datasets[0].roles_to_train must be"),
    (
        "datasets:\n- path: a\n  type: {field_instruction: question, field_output: target}",
        ":3: datasets[0].type asks for rows of question and target, but rows are",
    ),
    (
        "datasets:\n- path: a\n  type:\n    format: '[INST] {instruction} [/INST]'",
        ":4: datasets[0].type.format is not supported: prompts are read as they",
    ),
    (
        "datasets:\n- path: a\n  type:\n    no_input_format: '{instruction}'\n"
        '    format: "{instruction}\\n"',
        ":5: datasets[0].type.format is not supported: prompts are read as they",
    ),
    ("special_tokens:\n  eos_token: x", ":2: special_tokens.eos_token is not supported"),
    ("max_steps: 0", ":1: max_steps must be at least 1, found 0."),
    ("gradient_checkpointing: offload", ":1: gradient_checkpointing must be true or false"),
    ("bnb_4bit_compute_dtype: float16", "must be bfloat16 or float32, found float16."),
    ("eval_strategy: often", ":1: eval_strategy must be one of steps, epoch, no, found often."),
    ("save_strategy: no", ":1: save_strategy must be one of steps, epoch, found no."),
    ("fsdp: [full_shard]", ":1: fsdp must be a whole number, found a list of 1."),
    ("lora_dropout: 0.05", ":1: lora_dropout: 0.05 is not supported, only 0: adapters have no"),
    ("use_dora: true", ":1: use_dora: true is not supported, only false: DoRA is not among"),
    ("lora_dropuot: 0", ":1: lora_dropuot is not known. The nearest are lora_dropout"),
    ("use-rslora: true", ":1: use-rslora is not known. The nearest are use_rslora"),
    ("USE_RSLORA: true", ":1: USE_RSLORA is not known. The nearest are"),
    ("qwertyuiop: 1", ":1: qwertyuiop is not known. Leave it out."),
    ("rank: 1\n<<: {rank: 8}", ":2: << is not known."),
]


@pytest.mark.parametrize("text, wanted", WRONG)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, wanted):
    (problem,) = problems(tmp_path, text)
    assert wanted in problem


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("rank: 8\nlora_alpha: 1\nlora_r: 9", ":3: lora_r sets rank to 9, but rank on line 1 sets"),
        (
            "adapter: qlora\nload_in_8bit: true",
            ":2: load_in_8bit sets quant_bits to 8, but adapter",
        ),
        ("load_in_8bit: true\nload_in_4bit: true", ":2: load_in_4bit sets quant_bits to 4, but"),
        ("quant_bits: 8\nload_in_8bit: false", ":2: load_in_8bit is false, but quant_bits is 8"),
        ("adapter: qlora\nload_in_4bit: false", ":2: load_in_4bit is false, but quant_bits is 4"),
        ("lora_target_linear: false", ":1: lora_target_linear is false, but targets is all-linear"),
        (
            "lora_target_modules: [q_proj]\nlora_target_linear: true",
            ":2: lora_target_linear sets targets to all-linear, but lora_target_modules on line 1",
        ),
        ("warmup_ratio: 0.1\nwarmup_steps: 10", ":2: warmup_steps takes the place of warmup_ratio"),
        ("batch: 4\nbatch_size: 1", ":2: batch_size takes the place of batch on line 1"),
        ("bf16: auto\nbfloat16: true", ":1: bf16 takes the place of bfloat16 on line 2"),
        ("max_steps: 5\nnum_epochs: 3", ":1: max_steps takes the place of num_epochs on line 2"),
        (
            "test_datasets: [{path: a}]\nval_set_size: 0.1",
            ":1: test_datasets takes the place of val_set_size on line 2",
        ),
        ("rank: 8\nseed: 1\nrank: 8", ":3: rank stands on line 1 already. Keep one."),
    ],
)
def test_keys_that_contradict_each_other_are_named_with_both_lines(tmp_path, text, wanted):
    (problem,) = problems(tmp_path, text)
    assert wanted in problem


def test_keys_that_say_the_same_twice_are_fine(tmp_path):
    text = "rank: 8\nlora_r: 8\nuse_rslora: true\nadapter: qlora\nload_in_4bit: true\n"
    more = "load_in_8bit: false\nlora_target_linear: false\nlora_target_modules: [q_proj]\n"
    found = values(tmp_path, text + more + "target_modules: self_attn.q_proj\nval_set_size: 0\n")
    wanted = {"rank": 8, "use_rslora": True, "quant_bits": 4, "targets": ("q_proj/kernel",)}
    assert found == {**wanted, "eval_fraction": 0.0}


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    found = problems(tmp_path, "rank: 0\nlora_dropout: 0.1\nbatch: x\nwhat: 1")
    assert [problem[:4] for problem in found] == [":1: ", ":2: ", ":3: ", ":4: "]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("", ": is empty. It needs at least model and dataset."),
        ("- rank", "must be a mapping of keys to values, found a list of 1"),
        ("rank: 8\n  alpha: 2", ":2: is not YAML: mapping values are not allowed here."),
        ("rank: 8\n---\nrank: 9", ": is not YAML: but found another document."),
        ("rank: 8\nmodel: !!python/object/apply:os.getcwd []", ":2: the tag"),
        ("rank: !secret 8", ":1: the tag '!secret' is not read."),
        ("? [a]\n: 1", ":1: a key must be a word"),
        ("targets: &a [*a]", "targets[0] must be text, found a list of 1"),
        ("targets: " + "[" * 900, ": is nested too deeply."),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text, wanted):
    (problem,) = problems(tmp_path, text)
    assert wanted in problem


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        flags.from_file(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        flags.from_file(str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: is no UTF-8 text"):
        flags.from_file(str(tmp_path / "bytes.yaml"))


RUN = {
    "base_model": "meta-llama/Llama-3.1-8B-Instruct",
    "dataset_path": "train.jsonl",
    "lora_r": 8,
    "quant_bits": 8,
    "learning_rate": 0.0001,
    "num_epochs": 4,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, with a data file."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "", "train.jsonl")
    return tmp_path


def test_finloras_json_of_one_run_is_read_and_names_the_output(here):
    written(
        here, json.dumps({"ner_r8": {**RUN, "peft_use_rslora": True}}, indent="\t"), "runs.json"
    )
    found = flags.read(["runs.json"])
    assert found.model == RUN["base_model"]
    assert (found.rank, found.quant_bits, found.epochs, found.batch_per_device) == (8, 8, 4.0, 8)
    assert found.use_rslora and found.output == Path("outputs/ner_r8")


def test_of_several_runs_one_must_be_chosen(here):
    runs = {"plain": RUN, "stable": {**RUN, "peft_use_rslora": True, "lora_r": 64}}
    written(here, json.dumps(runs, indent=1), "runs.json")
    with pytest.raises(ConfigError, match=r"2 runs, choose one by --run: plain \(line 2\), stable"):
        flags.read(["runs.json"])
    with pytest.raises(ConfigError, match="holds 2 runs, there is no other: plain"):
        flags.read(["runs.json", "--run", "other"])
    plain, stable = (flags.read(["runs.json", "--run", name]) for name in runs)
    assert (plain.scaling, plain.rank, stable.scaling, stable.rank) == ("lora", 8, "rslora", 64)
    written(here, "model: m\ndataset: train.jsonl\n")
    with pytest.raises(ConfigError, match="holds no runs, but --run other asks for one"):
        flags.read([LAST, "--run=other"])


def test_an_error_in_a_run_names_its_line(here):
    written(here, json.dumps({"a": {**RUN, "quant_bits": 2}}, indent=1), "runs.json")
    with pytest.raises(ConfigError, match=r"^runs\.json:6: quant_bits must be one of 16, 8, 4, fo"):
        flags.read(["runs.json"])


def test_the_file_of_finloras_documentation_is_read_verbatim(here):
    text = """\
# Enable rsLoRA with higher rank for complex tasks
use_rsLoRA: true
lora_rank: 64        # Higher ranks work effectively with rsLoRA
lora_alpha: 16
quant_bits: 8

# rsLoRA particularly beneficial for complex financial tasks
dataset: "train.jsonl"
model_name: "meta-llama/Llama-3.1-8B-Instruct"
"""
    written(here, text)
    config = flags.read([LAST]).lora_config()
    assert config == rl.LoraConfig(rank=64, alpha=16.0)
    assert config.scale == 2.0
    written(here, text.replace("use_rsLoRA: true", "use_rsLoRA: false"))
    assert flags.read([LAST]).lora_config().scale == 0.25


def test_flags_win_over_the_file_and_the_rest_stays(here):
    written(
        here,
        "model: m\ndataset: train.jsonl\nrank: 8\nalpha: 4\nwarmup_steps: 5\nseed: 3\n"
        "max_steps: 7\nrank_pattern: {q_proj: 2}\n",
    )
    line = "--rank 64 --warmup 0.5 --no-packing --targets q_proj v_proj --epochs 2 --dry-run"
    settings, sources = flags.parse([LAST, *line.split()])
    assert (settings.rank, settings.alpha, settings.seed) == (64, 4.0, 3)
    assert (settings.warmup, settings.warmup_steps) == (0.5, None)
    assert (settings.epochs, settings.steps) == (2.0, None)
    assert settings.targets == ("q_proj/kernel", "v_proj/kernel")
    assert settings.rank_pattern == {"q_proj": 2}
    assert settings.dry_run and not settings.packing
    assert sources["rank"] == "--rank" and sources["packing"] == "--packing"
    assert sources["alpha"] == f"{LAST}:4 alpha" and "batch" not in sources
    shown = flags.describe(flags.Parsed(settings, sources)).splitlines()
    assert any(line.split() == ["rank", "64", "--rank"] for line in shown)
    assert any(line.split() == ["batch", "none", "default"] for line in shown)


def test_everything_can_be_said_by_flags_alone(here):
    line = "--model m --dataset train.jsonl --rank-pattern q_proj 2 up_proj 4 --steps 3"
    found = flags.read(line.split())
    assert found == Settings(
        model="m", dataset="train.jsonl", rank_pattern={"q_proj": 2, "up_proj": 4}, steps=3
    )


def test_flags_out_of_range_or_place_are_refused(here, capsys):
    written(here, "model: m\ndataset: train.jsonl\n")
    with pytest.raises(SystemExit, match="2"):
        flags.read([LAST, "--rank", "0"])
    assert "rank must be at least 1, found 0." in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"The file {LAST} must come before all flags"):
        flags.read(["--rank", "1", LAST])


def test_a_missing_model_or_data_file_is_said_with_its_place(here):
    written(here, "rank: 8\n")
    with pytest.raises(
        ConfigError, match=r"(?s)^model is missing: write .*dataset is missing"
    ) as e:
        flags.read([LAST])
    assert "`dataset: ...` in settings.yaml, or --dataset" in str(e.value)
    written(here, "model: m\ndataset: none.jsonl\n")
    with pytest.raises(ConfigError, match=r"^settings\.yaml:2 dataset: no file 'none\.jsonl' in /"):
        flags.read([LAST])
    assert flags.read([LAST, "--plan", "v5e:2x2"]).plan == "v5e:2x2"
    with pytest.raises(ConfigError, match=rf"output must be a folder, found the file {LAST}: name"):
        flags.read([LAST, "--dataset", LAST, "--output", LAST])


def test_paths_are_looked_for_here_and_then_beside_the_file(here):
    beside = here / "configs"
    beside.mkdir()
    written(beside, "model: weights\ndataset: train.jsonl\neval_dataset: test.jsonl\n")
    (beside / "weights").mkdir()
    for folder, name in ((beside, "train.jsonl"), (beside, "test.jsonl")):
        written(folder, "", name)
    found = flags.read([f"configs/{LAST}"])
    assert found.dataset == "train.jsonl"
    assert found.eval_dataset == "configs/test.jsonl"
    assert found.model == "configs/weights"


def test_resolved_settings_read_back_to_the_same(here):
    settings = Settings(
        model="smollm2",
        dataset="train.jsonl",
        eval_dataset="train.jsonl",
        output=Path("outputs/a b"),
        targets=["v_proj", "q_proj"],
        rank_pattern={"q_proj": 4, ".*": 2},
        alpha_pattern={r"self_attn\.v_proj": 0.5},
        quant_bits=4,
        learning_rate=1e-5,
        warmup_steps=3,
        steps=9,
        export=["native"],
        plan=None,
        bfloat16=True,
    )
    settings.save("run.yaml")
    again = flags.read(["run.yaml"])
    assert again == settings
    assert list(again.rank_pattern) == list(settings.rank_pattern)
    assert [path.name for path in here.iterdir() if "run" in path.name] == ["run.yaml"]
    Settings("m", "train.jsonl").save("run.yaml")
    assert flags.read(["run.yaml"]) == Settings("m", "train.jsonl")


def test_a_failed_save_leaves_the_old_file_alone(here, monkeypatch):
    Settings("m", "train.jsonl").save("run.yaml")
    before = Path("run.yaml").read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        Settings("m", "train.jsonl", rank=99).save("run.yaml")
    assert Path("run.yaml").read_text() == before
    assert [path.name for path in here.glob("*run*")] == ["run.yaml"]


def test_settings_check_types_and_ranges_however_they_are_made():
    with pytest.raises(ConfigError, match="rank must be a whole number, found '8'"):
        Settings(rank="8")
    with pytest.raises(ConfigError, match="rank must be a whole number, found True"):
        Settings(rank=True)
    with pytest.raises(ConfigError, match="learning_rate must be a finite number, found nan"):
        Settings(learning_rate=math.nan)
    with pytest.raises(ConfigError, match="remat must be one of none, full, dots, found 'some'"):
        Settings(remat="some")
    with pytest.raises(ConfigError, match="rank_pattern must be at least 1, found 0"):
        Settings(rank_pattern={"q_proj": 0})
    with pytest.raises(
        ConfigError, match="rank_pattern 'v_proj' matches none of the targets q_proj"
    ):
        Settings(targets="q_proj", rank_pattern={"v_proj": 4})
    with pytest.raises(ConfigError, match=r"(?s)batch must be at least 1.*seed must be from 0"):
        Settings(batch=0, seed=-1)
    with pytest.raises(dataclasses.FrozenInstanceError, match="rank"):
        Settings().rank = 4


def test_patterns_become_rules_by_pefts_rule():
    settings = Settings(
        rank=8,
        targets=["q_proj", "v_proj", "up_proj"],
        rank_pattern={r"self_attn\.v_proj": 32, "(q|v)_proj": 4},
        alpha_pattern={r"model\.layers\.\d+\.mlp\.up_proj": 2, "mlp/up_proj/kernel": 3},
        use_rslora=False,
    )
    config = settings.lora_config()
    assert config.scaling == "lora"
    assert config.targets == ("q_proj/kernel", "v_proj/kernel", "up_proj/kernel")
    assert config.rules == (
        rl.Rule("(.*/)?layers/self_attn/q_proj/kernel", 4, None),
        rl.Rule("(.*/)?layers/self_attn/v_proj/kernel", 32, None),
        rl.Rule("(.*/)?layers/mlp/up_proj/kernel", None, 2.0),
    )


def test_every_name_of_a_module_is_a_weight_of_the_llama_and_takes_its_rank():
    sizes = LlamaConfig(32, 16, 32, layers=2, heads=2, kv_heads=1, head_dim=8)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    model = Llama(sizes)
    structs = jax.eval_shape(model.init, jax.random.key(0), tokens)
    every = [module.suffix for module in modules.MODULES]
    settings = Settings(
        rank=2, alpha=8, targets=every, rank_pattern={"q_proj": 4}, alpha_pattern={"lm_head": 2}
    )
    config, key = settings.lora_config(), jax.random.key(0)
    sites = rl.adapt(model.apply, structs, tokens, config=config, key=key).sites
    found = {site.path: (site.rank, site.scale) for site in sites}
    wanted = {f"params/{module.path}": (2, 8 / 2**0.5) for module in modules.MODULES}
    wanted |= {"params/layers/self_attn/q_proj/kernel": (4, 4.0)}
    wanted |= {"params/lm_head/kernel": (2, 2 / 2**0.5)}
    assert found == wanted


def test_what_was_asked_per_epoch_becomes_steps():
    asked = Settings(warmup_steps=5, evals_per_epoch=4, saves_per_epoch=3, epochs=3)
    found = in_steps(asked, total=30, epoch=10)
    assert (found.eval_every, found.save_every) == (2, 3)
    assert round(found.warmup * 30) == 5
    assert (found.warmup_steps, found.evals_per_epoch, found.saves_per_epoch) == (None, None, None)
    assert in_steps(Settings(warmup_steps=99), 30, 10).warmup == 1.0
    assert in_steps(Settings(), 30, 10) == Settings()


@pytest.mark.parametrize(
    "asked, one, sixteen",
    [
        ({}, 4, 16),
        ({"batch": 32}, 32, 32),
        ({"batch_per_device": 3}, 3, 48),
        ({"batch": 5, "batch_per_device": 3}, 3, 48),
    ],
)
def test_rows_of_a_device_become_those_of_all_and_the_default_is_rounded_up(asked, one, sixteen):
    for axes, wanted in (((1, 1, 2), one), ((2, 8, 4), sixteen)):
        mesh = dict(zip(("data", "fsdp", "tensor"), axes, strict=True))
        found = on_mesh(Settings(**asked), mesh, "cpu")
        assert (found.batch, found.batch_per_device) == (wanted, None)
        assert on_mesh(found, mesh, "cpu") == found


def test_a_batch_that_does_not_divide_is_refused_with_those_that_do():
    mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    wanted = r"= 8 on these devices, found 12; pass --batch 16, --batch-per-device 2 or"
    with pytest.raises(ConfigError, match=wanted):
        on_mesh(Settings(batch=12), mesh, "cpu")
    with pytest.raises(ConfigError, match="= 8 on v5e:2x4, found 1; pass --batch 8, "):
        on_mesh(Settings(batch=1, plan="v5e:2x4"), mesh, "tpu")


@pytest.mark.parametrize("platform, wanted", [("cpu", False), ("gpu", True), ("tpu", True)])
def test_bfloat16_on_accelerators_asks_the_devices(platform, wanted):
    asked = Settings(bfloat16_on="accelerators")
    found = on_mesh(asked, {"data": 1, "fsdp": 1, "tensor": 1}, platform)
    assert (found.bfloat16, found.bfloat16_on) == (wanted, None)


def test_flags_choose_the_batch_whichever_way_the_file_says_it(here):
    common = "model: m\ndataset: train.jsonl\n"
    mesh = {"data": 1, "fsdp": 2, "tensor": 1}
    for text, flag, wanted in (
        ("", [], 4),
        ("micro_batch_size: 8", [], 16),
        ("micro_batch_size: 8", ["--batch", "6"], 6),
        ("micro_batch_size: 8", ["--batch-per-device", "5"], 10),
        ("batch: 8", ["--batch-per-device", "5"], 10),
    ):
        written(here, common + text)
        assert on_mesh(flags.read([LAST, *flag]), mesh, "cpu").batch == wanted


def test_a_setting_that_was_worked_out_is_shown_with_where_its_source_stands(here):
    written(here, "model: m\ndataset: train.jsonl\nmicro_batch_size: 8\nbf16: auto\n")
    parsed = flags.parse([LAST])
    settled = on_mesh(parsed.settings, {"data": 2, "fsdp": 2, "tensor": 1}, "gpu")
    shown = [line.split() for line in flags.describe(parsed._replace(settings=settled)).split("\n")]
    assert ["batch", "32", f"{LAST}:3", "micro_batch_size"] in shown
    assert ["bfloat16", "True", f"{LAST}:4", "bf16"] in shown
    assert not {"batch_per_device", "bfloat16_on"} & {line[0] for line in shown}


def test_a_rank_or_alpha_of_another_tool_means_its_scale_unless_rslora_is_said(tmp_path):
    for text in ("lora_alpha: 16", "rank: 8\nlora_alpha: 16", "r: 8", "alpha: 4\nlora_r: 8"):
        assert values(tmp_path, text)["use_rslora"] is False
        assert values(tmp_path, f"{text}\nuse_rslora: true")["use_rslora"] is True
    for text in ("rank: 8\nalpha: 16", "lora_r:\nlora_alpha: null"):
        assert "use_rslora" not in values(tmp_path, text)


def test_every_field_is_explained_and_no_two_keys_of_the_tables_clash(capsys):
    with pytest.raises(SystemExit, match="0"):
        flags.read(["--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in hints():
        assert f"--{name.replace('_', '-')}" in told
    assert "FinLoRA's JSON and Axolotl's keys are read too" in told
    assert not set(keys.INERT_KEYS) & (set(hints()) | set(keys.FIELDS))
    assert not set(keys.INERT_KEYS) & set(TRANSLATIONS)
