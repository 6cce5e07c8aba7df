"""A fine-tune from a YAML file, from end to end, on a tiny random Llama made on the fly."""

import contextlib
import datetime
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import rslora_jax as rl
from finetune import beginning, flags, job, program, report
from finetune.batches import Batch
from finetune.failures import keep_failed
from finetune.journal import Journal
from finetune.step import Told
from pretrained import open_model
from tests.disks import full_disk

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(29))]
SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
CONFIG |= SIZES | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True}
MATRICES = [f"self_attn.{name}_proj" for name in "qkvo"]
MATRICES += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
NORMS = ("input_layernorm", "post_attention_layernorm")


def make_model(folder):
    """A Llama of two tiny layers whose words are w0, w1, ..., as Hugging Face would save it.

    All matrices, and the factors of rank 8, have one shape: fewer programs to compile.
    """
    draw = np.random.default_rng(0)
    folder.mkdir()
    tensors = {"model.norm.weight": np.ones(8)}
    tensors |= {"model.embed_tokens.weight": draw.normal(size=(32, 8))}
    for layer in range(2):
        start = f"model.layers.{layer}."
        tensors |= {f"{start}{name}.weight": draw.normal(size=(8, 8)) / 3 for name in MATRICES}
        tensors |= {f"{start}{name}.weight": np.ones(8) for name in NORMS}
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in WORDS[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def make_rows(path, count=24):
    draw = np.random.default_rng(1)
    rows = [
        {"prompt": f"w{draw.integers(29)} w{n % 5}", "completion": f" w{n % 5 + 10}"}
        for n in range(count)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and rows."""
    folder = tmp_path_factory.mktemp("finetune")
    make_model(folder / "model")
    make_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of one shape share their compiled programs, also with another process."""
    cache = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs"))}
    cache |= {"jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in cache}
    for values in (cache, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is cache:
            yield


@pytest.fixture
def one_device(monkeypatch):
    """The program sees one of the eight devices."""
    monkeypatch.setattr(program, "mesh_of", first_device)


@pytest.fixture
def base_leaves(monkeypatch):
    """How many arrays of the base are there once it is loaded, and at the end."""
    make, write, count, leaves = job.make, report.write, {}, []

    def note(name):
        count[name] = sum(leaf() is not None for leaf in leaves)

    def made(*args):
        found = make(*args)
        leaves.extend(map(weakref.ref, jax.tree.leaves(found.base)))
        note("loaded")
        return found

    def written(*args):
        note("when the report is written")
        return write(*args)

    monkeypatch.setattr(job, "make", made)
    monkeypatch.setattr(report, "write", written)
    return count


def first_device(*_):
    axes, types = ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), axes, axis_types=types, devices=jax.devices()[:1])


def config_of(place, name, **changes):
    """A YAML file for a short run without evaluations, exports or events."""
    found = {"model": str(place / "model"), "dataset": str(place / "rows.jsonl")}
    found |= {"output": str(place / name), "length": 16, "batch": 4, "learning_rate": 0.01}
    found |= {"steps": 4, "save_every": 3, "eval_fraction": 0, "tensorboard": False, "export": []}
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(found | {"targets": ["q_proj", "down_proj"]} | changes))
    return str(path)


def run(*argv):
    return program.main(argv, meet=lambda: None)


def losses(place, name):
    rows = map(json.loads, (place / name / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def steps(place, name):
    return sorted(path.name for path in (place / name / "checkpoints").iterdir())


def assert_same_end(place, *names, within=0.0):
    """Losses and adapters of both runs are the same, by default bit by bit."""
    folders = [place / name / "checkpoints" / "4" for name in names]
    ends = [rl.checkpoint.restore(folder).params for folder in folders]
    assert losses(place, names[0]) == pytest.approx(losses(place, names[1]), rel=within, abs=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, within, within), *ends)


def at_step(monkeypatch, step, do):
    """Does something when a step was done."""

    def stepped(self, state, told, before=Journal.stepped):
        before(self, state, told)
        if state.step == step:
            do()

    monkeypatch.setattr(Journal, "stepped", stepped)


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "mesh_of", first_device)
        assert run(config_of(place, "whole")) == 0
    return place


def test_a_killed_run_goes_on_where_it_was(whole, one_device, capsys):
    script = (
        "import os, signal, sys, time; sys.path[:0] = sys.argv[3:]\n"
        "from finetune import journal, program\n"
        "def stepped(self, state, told, before=journal.Journal.stepped):\n"
        "    before(self, state, told)\n"
        "    while state.step == 4:\n"
        "        if os.path.isdir(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "        time.sleep(0.01)\n"
        "journal.Journal.stepped = stepped\n"
        "program.main(sys.argv[1:2], meet=lambda: None)\n"
    )
    told = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    told |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    told |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    config = config_of(whole, "killed")
    saved = str(whole / "killed" / "checkpoints" / "3")
    words = [sys.executable, "-c", script, config, saved, *filter(None, sys.path)]
    done = subprocess.run(words, check=False, capture_output=True, env=os.environ | told)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert run(config) == 0
    assert "going on from step 3" in capsys.readouterr().out
    # The killed process compiled for itself; on jax 0.12 that moves the last bit of a loss.
    assert_same_end(whole, "killed", "whole", within=1e-5)


def test_a_notice_saves_the_step_and_the_run_goes_on_with_every_bit(
    whole, one_device, monkeypatch, capsys
):
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(config_of(whole, "noticed")) == 128 + signal.SIGTERM
    assert "step 2 is saved" in capsys.readouterr().out
    assert steps(whole, "noticed") == ["2"]
    assert run(config_of(whole, "noticed")) == 0
    assert_same_end(whole, "noticed", "whole")


def test_an_interrupt_saves_the_step_too(whole, one_device, monkeypatch):
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    config = config_of(whole, "interrupted")
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt, match=r"^$"):  # the program itself prints a line
            run(config)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert steps(whole, "interrupted") == ["1"]


def test_checkpoints_of_another_run_are_refused_and_kept(whole, one_device, capsys):
    before = steps(whole, "whole")
    assert run(config_of(whole, "whole", learning_rate=0.02)) == 2
    said = capsys.readouterr().err
    assert "another run: learning_rate 0.01 there, 0.02 now. Use the settings of that run" in said
    assert run(config_of(whole, "whole", alpha=3)) == 2
    assert "another run: alpha 16.0 there, 3.0 now. Use the settings" in capsys.readouterr().err
    assert run(config_of(whole, "whole", steps=5)) == 2
    assert "another run: steps 4 there, 5 now. Use the settings" in capsys.readouterr().err
    make_rows(whole / "others.jsonl", 20)
    assert run(config_of(whole, "whole", dataset=str(whole / "others.jsonl"))) == 2
    assert "another run: order of the data" in capsys.readouterr().err
    assert steps(whole, "whole") == before
    assert len(losses(whole, "whole")) == 4


def test_a_full_disk_keeps_what_is_complete(whole, one_device, monkeypatch, capsys):
    folder = whole / "full"
    with contextlib.ExitStack() as stack:

        def fill():
            while not (folder / "checkpoints" / "2").exists():
                time.sleep(0.01)  # another thread writes it
            stack.enter_context(full_disk((folder / "metrics.jsonl").stat().st_size))

        at_step(monkeypatch, 3, fill)
        assert run(config_of(whole, "full", save_every=2)) == 1
    said = capsys.readouterr().err
    assert "metrics.jsonl: File too large. Make room" in said and "Traceback" not in said
    assert steps(whole, "full") == ["2"] and list(losses(whole, "full")) == [1, 2, 3]


def test_a_finished_run_that_is_started_again_tells_of_its_first_start(
    whole, one_device, monkeypatch, capsys
):
    shutil.copytree(whole / "whole", whole / "again")
    with (whole / "again" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "warning": "the gradient exploded"}\n')
    save = rl.peft.save
    monkeypatch.setattr(rl.peft, "save", full_disk(1500)(save))
    config = config_of(whole, "again", export=["native"])
    assert run(config) == 1
    assert "adapter_model.safetensors: File too large. Make room" in capsys.readouterr().err
    page = (whole / "again" / "report.md").read_text()
    assert "- the gradient exploded" in page
    assert re.search(r"\| tokens per second \| \d", page)
    assert not (whole / "again" / "adapter").exists()
    monkeypatch.setattr(rl.peft, "save", save)
    assert run(config) == 0
    assert rl.peft.read(whole / "again" / "adapter").settings.r == 8


def test_a_step_that_is_not_finite_is_told_also_where_it_cannot_be_kept(tmp_path):
    told = Told(loss=np.nan, grad_norm=np.nan, tokens=0, answers=0, finite=False)
    batch = Batch(*np.zeros((6, 4, 16), np.int32))
    with full_disk():
        said = str(keep_failed(tmp_path, 3, batch, told, 2))
    assert "Step 3 is not finite" in said and "could not be written: [Errno 27]" in said
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_program_itself_is_a_traceback(whole, one_device, monkeypatch, capsys):
    monkeypatch.setattr(program, "read", lambda _: int("a bug"))
    with pytest.raises(SystemExit, match=r"^1$"):
        run(config_of(whole, "bug"))
    assert "Traceback" in capsys.readouterr().err


def test_chats_are_told_the_day_on_which_the_run_began(place):
    dated = "w{{ strftime_now('%d') | int }}{% for m in messages %} {{ m.content }}{% endfor %}"
    model = edited(place, "dated", tokenizer_config={"chat_template": dated})
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (place / "talk.jsonl").write_text(json.dumps({"messages": turns}))
    config = config_of(place, "day", model=model, dataset=str(place / "talk.jsonl"))
    (place / "day").mkdir()
    beginning.keep(place / "day", datetime.datetime(2024, 2, 7))
    read = program.read(flags.read([config])).rows
    assert (read.now.day, read.train[0].tokens.tolist()) == (7, [10, 4, 5, 1])
    (place / "day" / "started").write_text("noon")
    assert run(config) == 2


def test_what_cannot_be_exported_is_refused_before_it_is_loaded(place, one_device, capsys):
    config = config_of(place, "tied", targets=["q_proj", "embed_tokens"], export=["portable"])
    for more in ((), ("--dry-run",)):
        assert run(config, *more) == 2
        assert "targets and export do not go together" in capsys.readouterr().err
    assert not (place / "tied" / "checkpoints").exists()


def test_a_quantized_run_in_bfloat16_trains_saves_by_time_and_reports(
    whole, one_device, monkeypatch
):
    made = []
    monkeypatch.setattr(
        job, "make", lambda *args, make=job.make: made.append(make(*args)) or made[0]
    )
    changes = {"quant_bits": 4, "bfloat16": True, "save_every": 100, "save_minutes": 1e-9}
    assert run(config_of(whole, "small", **changes)) == 0
    assert steps(whole, "small") == ["3", "4"]
    told = losses(whole, "small")
    assert list(told) == [1, 2, 3, 4] and told[4] < told[1]
    base = made[0].base["params"]["layers"]
    small, whole_one = (base["self_attn"][f"{name}_proj"]["kernel"] for name in "qk")
    assert (whole_one.dtype, small.values.dtype) == (jnp.bfloat16, jnp.uint4)
    assert 4 * small.values.size // 8 == whole_one.nbytes // 4
    page = (whole / "small" / "report.md").read_text()
    assert "| quant_bits | 4 |" in page and "| bfloat16 | True |" in page


def test_a_step_that_is_not_finite_is_kept_and_not_applied(whole, one_device, capsys):
    assert run(config_of(whole, "bad", learning_rate=1e30)) == 1
    said = capsys.readouterr().err
    assert "Step 1 is not finite" in said
    assert "checkpoint is that of step 0" in said
    folder = whole / "bad" / "failed_step_1"
    assert load_file(folder / "batch.safetensors")["tokens"].shape == (4, 16)
    assert (folder / "what.txt").read_text() in said
    assert steps(whole, "bad") == ["0"]


def test_eight_devices_train_as_one_does(whole):
    assert run(config_of(whole, "eight", data=2, tensor=2, save_every=100)) == 0
    one, eight = (losses(whole, name) for name in ("whole", "eight"))
    assert one.keys() == eight.keys()
    np.testing.assert_allclose(list(one.values()), list(eight.values()), atol=1e-5)


def test_a_run_evaluates_exports_merges_and_reports(whole, one_device, base_leaves, capsys):
    make_rows(whole / "asked.jsonl", 5)
    changes = {"eval_dataset": str(whole / "asked.jsonl"), "eval_generate": 2, "merge": True}
    changes |= {"export": ["native", "portable"], "tensorboard": True, "eval_fraction": None}
    assert run(config_of(whole, "told", **{k: v for k, v in changes.items() if v is not None})) == 0
    assert "step 4: held-out loss" in capsys.readouterr().out
    folder = whole / "told"
    assert "| before | after step 4 |" in (folder / "report.md").read_text()
    adapter, portable = (rl.peft.read(folder / f"adapter{end}") for end in ("", "-portable"))
    assert (adapter.settings.use_rslora, portable.settings.use_rslora) == (True, False)
    state = rl.checkpoint.restore(folder / "checkpoints" / "4")
    base = open_model(whole / "model").load()
    merged, wanted = open_model(folder / "merged").load(), rl.LoraParams(base, state.params)
    compare = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(compare, merged, rl.merge(wanted, state.sites))
    assert losses(whole, "told") == losses(whole, "whole")
    saved = yaml.safe_load((folder / "settings.yaml").read_text())
    assert (saved["rank"], saved["save_every"]) == (8, 3)
    assert base_leaves == {"loaded": 11, "when the report is written": 0}


def test_a_dry_run_tells_all_and_writes_nothing(place, one_device, capsys):
    assert run(config_of(place, "dry"), "--dry-run", "--accumulation", "2") == 0
    said = capsys.readouterr().out
    for words in ("learning_rate", "params/layers/mlp/down_proj/kernel", "trainable parameters:"):
        assert words in said
    assert "4 steps of at most 128 tokens; nothing was trained" in said
    assert "activations and gradients" in said
    assert not (place / "dry").exists()


def test_a_plan_is_what_the_compiler_says_of_a_run(place, capsys):
    assert run(config_of(place, "planned"), "--plan", "v5e:2x2") == 0
    said = capsys.readouterr().out
    assert "rank 8: 4 x 16 tokens a step on v5e:2x2 as data 1, fsdp 4, tensor 1" in said
    assert "it fits: each device needs 0.0" in said
    assert not (place / "planned").exists()


def test_the_compiler_is_asked_about_the_run_itself_without_weights(place, monkeypatch, capsys):
    def plan(step, args, *, mesh_shape, **told):
        with jax.sharding.use_abstract_mesh(rl.plan.abstract_mesh(mesh_shape)):
            _, _, said = jax.eval_shape(step, *args)
        assert said.loss.shape == ()
        assert args[0]["params"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (16, 2048, 8192)
        gib, name = 2**30, told["name"]
        fits = need <= 15
        return rl.plan.Plan(name, told["topology"], 1, mesh_shape, fits, need * gib, 15 * gib, {})

    need = 1

    monkeypatch.setattr(rl.plan, "plan", plan)
    flags = ("--plan", "v5e:2x2", "--model", "meta-llama/Llama-3.2-1B-Instruct", "--rank", "64")
    assert run(config_of(place, "plan"), *flags, "--bfloat16", "--batch-per-device", "2") == 0
    said = capsys.readouterr().out
    assert "llama-3.2-1b, rank 64: 8 x 16 tokens a step on v5e:2x2 as data 1, fsdp 4" in said
    assert "it fits: each device needs 1.00 of 15.00 GiB" in said
    need = 20
    assert run(config_of(place, "plan"), *flags, "--bfloat16", "--quant-bits", "8") == 0
    said = capsys.readouterr().out
    assert "it does not fit: each device needs 20.00 GiB and has 15.00, 5.00 too few" in said
    assert (
        "Try remat: full, fewer quant_bits, a larger tensor axis, or a smaller batch or length."
        in said
    )
    assert run(config_of(place, "plan"), "--plan", "v5e:4x4") == 2
    assert "batch must be a multiple of data * fsdp = 16 on v5e:4x4" in capsys.readouterr().err


def edited(place, name, **changes):
    """A copy of the model with another config.json or tokenizer_config.json."""
    folder = place / name
    shutil.copytree(place / "model", folder)
    for file, values in changes.items():
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(folder)


def bad_inputs(place):
    """Each wrong input, the code it ends with, and what is said of it."""
    (place / "empty.jsonl").write_text("\n")
    (place / "file").write_text("")
    other = edited(place, "other", config={"model_type": "gpt_neox"})
    endless = edited(place, "endless", tokenizer_config={"eos_token": None})
    yield ("--model", str(place / "none")), 1, "No model"
    yield ("--model", other), 1, "gpt_neox"
    yield ("--model", endless), 1, "no token that ends an answer"
    yield ("--dataset", str(place / "none.jsonl")), 2, "no file"
    yield ("--dataset", str(place / "empty.jsonl")), 1, "it is empty"
    yield ("--length", "128"), 2, "length 128 is more than the context"
    yield ("--output", str(place / "file" / "run")), 1, "file"


def test_bad_input_is_one_message_and_no_traceback(place, one_device, capsys):
    for words_given, code, words in bad_inputs(place):
        assert run(config_of(place, "wrong"), *words_given) == code
        said = capsys.readouterr().err
        assert words in said
        assert "Traceback" not in said
