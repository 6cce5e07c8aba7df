"""What a fine-tune writes about itself: metrics, events, progress, warnings, curves, the report."""

import dataclasses
import errno
import io
import json
import math
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import rslora_jax as rl
from finetune import curves, metrics, report
from finetune.evaluation import Answer, Evaluation, Held, read
from finetune.metrics import Lines, Metrics, read_lines
from finetune.progress import Progress, Speed
from finetune.watch import Magnitudes, Watch
from tests.disks import full_disk


def lines(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """The files of a TensorBoard folder, each as its events."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(Path(folder, "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0
        found.append([])
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            found[-1].append(Event.FromString(content[place + 12 : place + 12 + size]))
            place += 16 + size
    return found


def test_each_step_is_one_line_that_is_on_the_disk_at_once(tmp_path):
    with Metrics(tmp_path) as written:
        written.write(1, {"loss": jnp.float32(0.5), "tokens": np.int64(7)})
        assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "tokens": 7}]
        written.write(2, {"loss": 0.25})
        assert written.rows() == [*lines(tmp_path)] and len(lines(tmp_path)) == 2


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    with Metrics(tmp_path) as written:
        written.write(1, {"loss": jnp.nan, "grad_norm": np.float32(np.inf)})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]
    steps, values = metrics.column(lines(tmp_path), "loss")
    assert steps == [1] and math.isnan(values[0])
    assert metrics.finite({"a": (1.0, math.inf), "b": "NaN"}) == {"a": [1.0, None], "b": "NaN"}


def test_a_resumed_run_keeps_the_lines_up_to_its_step(tmp_path):
    for start, stop in ((0, 6), (3, 5)):
        with Metrics(tmp_path, start) as written:
            for step in range(start + 1, stop):
                written.write(step, {"loss": 10 * start + step})
    assert [line["loss"] for line in lines(tmp_path)] == [1, 2, 3, 34]
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "metrics.jsonl"}


def test_a_warning_is_kept_with_the_numbers_up_to_the_step_that_a_run_goes_on_from(tmp_path):
    with Metrics(tmp_path) as written:
        for step in (1, 2, 3):
            written.warn(step, f"warning {step}")
    with Metrics(tmp_path, 2) as written:
        assert [row["warning"] for row in written.rows()] == ["warning 1", "warning 2"]
        assert metrics.column(written.rows(), "loss") == ([], [])


def test_a_run_from_the_start_begins_empty_files(tmp_path):
    for _ in range(2):
        with Metrics(tmp_path) as written:
            written.write(0, {"held_out/loss": 1.0})
    assert len(lines(tmp_path)) == 1


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    whole = b'{"step": 1, "loss": 2.0}\n'
    for torn in (b'{"step": 2, "los', b'{"step": 2, "said": "\xc3', b"\0\0\0", b"[2]", b"2"):
        (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
        assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
        with Metrics(tmp_path, 5) as written:
            written.write(6, {"loss": 1.0})
        assert [line["step"] for line in lines(tmp_path)] == [1, 6]


def test_truncation_leaves_the_old_file_if_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        Lines(path, 1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_an_error_with_the_file_and_closes_quietly(tmp_path):
    written = Lines(tmp_path / "metrics.jsonl")
    written.add({"step": 1})
    with full_disk(20), pytest.raises(OSError, match=r"File too large: '.*metrics\.jsonl'"):
        written.add({"step": 2})
    written.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]


def test_a_line_is_finished_where_the_system_takes_it_in_parts():
    class Slow(io.BytesIO):
        def write(self, line):
            return super().write(line[:5])

    written = object.__new__(Lines)
    written._file = Slow()
    written.add({"step": 1, "loss": 2.0})
    assert written._file.getvalue() == b'{"step": 1, "loss": 2.0}\n'


def test_other_processes_write_nothing(tmp_path):
    with Metrics(tmp_path / "other", tensorboard=True, writer=False) as written:
        written.write(1, {"loss": 1.0})
        written.write_answers(1, [Answer("a", "b", "c")])
    assert list(tmp_path.iterdir()) == []
    assert written.rows() == []


def test_tensorboard_holds_the_same_numbers_and_forgets_what_is_done_again(tmp_path):
    for start in (0, 2):
        with Metrics(tmp_path, start, tensorboard=True) as written:
            for step in range(start + 1, start + 4):
                written.write(step, {"loss": step / 4, "held_out/loss": math.nan})
    first, second = events(tmp_path)
    assert [event.step for event in first] == [0, 0, 1, 2, 3]
    assert [event.step for event in second] == [0, 3, 3, 4, 5]
    # TensorBoard drops all that it has of this step and later ones when it meets such an event.
    assert [files[1].session_log.status for files in (first, second)] == [1, 1]
    values = {value.tag: value.simple_value for value in second[-1].summary.value}
    assert values["loss"] == 1.25 and math.isnan(values["held_out/loss"])


def test_tensorboard_is_not_imported_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX.event_file_writer", None)
    with Metrics(tmp_path) as written:
        written.write(1, {"loss": 1.0})
    with pytest.raises(rl.AdapterError, match=r"tensorboard: true .*rslora_jax\[finetune\]"):
        Metrics(tmp_path, tensorboard=True)


def test_evaluations_are_read_back_with_their_answers(tmp_path):
    held, answers = Held(0.5, 0.75, 0.25, 8), (Answer("q", "44", "45"), Answer("r", "é|", "\n"))
    with Metrics(tmp_path) as written:
        for step in (0, 10):
            written.write_answers(step, answers[1:])  # and then a kill
            written.write_answers(step, answers[: 1 + step])
            written.write(step, held.metrics())
            written.write(step + 1, {"loss": 1.0})
    assert read(tmp_path) == (Evaluation(0, held, answers[:1]), Evaluation(10, held, answers))
    with Metrics(tmp_path, 5):
        assert read(tmp_path) == (Evaluation(0, held, answers[:1]),)


def console(terminal):
    return Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)


def test_where_there_is_no_terminal_a_plain_line_comes_now_and_then():
    shown, times = console(False), iter((0.0, 5.0, 10.0, 14.0, 21.0))
    values = {"loss": jnp.float32(0.5), "grad_norm": 2.0, "tokens_per_second": 1234.5, "other": 1}
    with Progress(105, 100, seconds=10.0, console=shown, clock=lambda: next(times)) as progress:
        progress.update(101, values | {"tokens_per_second": math.nan})
        progress.update(102, values)
        progress.update(103, values)
        progress.say("saved [bold]step 103")
        progress.update(104, values)
        progress.update(105, values | {"loss": math.nan})
    assert shown.file.getvalue().splitlines() == [
        "step 101/105  loss 0.5000  grad norm 2",
        "step 103/105  loss 0.5000  grad norm 2  1,234 tokens/s  0:00:10 left",
        "saved [bold]step 103",
        "step 105/105  loss nan  grad norm 2  1,234 tokens/s",
    ]


def test_a_terminal_shows_a_bar_with_the_numbers_beside_it():
    shown = console(True)
    with Progress(4, 2, console=shown) as progress:
        progress.update(3, {"loss": 0.5, "grad_norm": 2.0, "tokens_per_second": 99.0})
        progress.say("a sentence")
        progress.update(4, {"loss": 0.25})
    text = shown.file.getvalue()
    assert "4/4" in text and "loss 0.2500" in text and "a sentence\n" in text


def test_only_process_0_shows_its_progress(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for terminal in (False, True):
        shown = console(terminal)
        with Progress(4, console=shown) as progress:
            progress.update(1, {"loss": 0.5})
            progress.say("a sentence")
        assert shown.file.getvalue() == ""


def test_speed_forgets_old_steps_and_the_compilation():
    times = iter((60.0, 61.0, 62.0, 62.5))
    speed = Speed(steps=1, clock=lambda: next(times))
    assert math.isnan(speed.add(100))
    assert [speed.add(100) for _ in range(3)] == [100.0, 100.0, 200.0]


def magnitudes(values, first=1):
    values = np.asarray(values, float)
    places = tuple(f"layers/q/kernel[{k}]" for k in range(values.shape[1]))
    return Magnitudes(np.arange(first, first + len(values)), places, values)


def steady(count=16, places=3):
    return np.random.default_rng(0).uniform(0.5, 2.0, (count, places))


def test_gradients_that_are_as_ever_draw_no_warning():
    watch = Watch(use_rslora=True, learning_rate=1e-3)
    assert watch.compare(magnitudes(steady(3) * [[1], [1], [1e4]])) == []  # too early to tell
    assert watch.compare(magnitudes(steady(64))) == []
    # Ten times a step is no explosion, nor is a slow fall to a millionth.
    assert watch.compare(magnitudes(steady(12) * np.geomspace(1, 1e-2, 12)[:, None], 65)) == []
    assert watch.compare(magnitudes(steady(12) * 1e-4 * np.eye(12)[:, :1] * 10 + 1e-3, 77)) == []


def test_an_explosion_is_told_once_with_site_size_and_advice():
    watch, values = Watch(use_rslora=True, learning_rate=3e-3), np.ones((16, 3))
    values[14, 1], values[14, 2] = 45.0, 31.0
    (said,) = watch.compare(magnitudes(values))
    assert said.startswith(
        "step 15: the gradient at layers/q/kernel[1], and 1 more like it exploded to 45 times its "
        "median (45 after 1). Try a learning_rate of 0.001 in place of 0.003"
    )
    values[15] = 100.0
    assert watch.compare(magnitudes(values)) == []


def test_steps_before_the_resumed_one_are_not_told_again():
    values = np.ones((16, 1))
    values[3] = 45.0
    assert Watch(True, 1e-3, after_step=16).compare(magnitudes(values)) == []
    assert len(Watch(True, 1e-3, after_step=3).compare(magnitudes(values))) == 1


def test_a_hard_batch_after_all_is_learned_is_no_explosion():
    watch = Watch(use_rslora=True, learning_rate=1e-3)
    assert watch.compare(magnitudes(np.ones((12, 1)))) == []
    values = np.full((12, 1), 0.01)
    values[6] = 1.5  # as large as at the start
    assert watch.compare(magnitudes(values, first=200)) == []


@pytest.mark.parametrize(
    ("use_rslora", "advice"),
    [(False, "try use_rslora: true"), (True, "a learning_rate below 0.01")],
)
def test_a_collapse_is_told_when_it_lasts(use_rslora, advice):
    watch, values = Watch(use_rslora, learning_rate=1e-2), np.ones((16, 2))
    values[14:, 0] = 1e-4
    assert watch.compare(magnitudes(values)) == []
    values[13, 0] = 1e-4
    (said,) = watch.compare(magnitudes(values))
    assert "layers/q/kernel[0] collapsed to 0.0001 of its median (0.0001 after 1)" in said
    assert advice in said
    assert watch.compare(magnitudes(values)) == []


def test_a_collapse_at_the_first_steps_is_told_and_is_no_explosion_before():
    values = np.full((16, 2), 1e-5)
    values[:3] = 1.0
    (said,) = Watch(True, 3.0).compare(magnitudes(values))
    assert said.startswith("step 16: the gradient at layers/q/kernel[0], and 1 more like it collap")
    assert Watch(True, 3.0, after_step=100).compare(magnitudes(values, first=101)) == []


def test_an_explosion_at_the_first_steps_is_told_though_it_stays():
    values = np.full((16, 1), 100.0)
    values[:3] = 1.0
    assert Watch(True, 1e-3).compare(magnitudes(values))[0].startswith("step 4: ")


def test_a_site_without_any_gradient_is_told():
    (said,) = Watch(True, 1e-3).compare(magnitudes(np.ones((12, 2)) * [1.0, 0.0]))
    assert "layers/q/kernel[1] is 0 in all of the last 12 steps" in said


def test_gradients_that_are_not_numbers_are_explosions():
    values = np.ones((16, 2))
    values[15, 0] = np.inf
    assert "exploded to inf times" in Watch(True, 1e-3).compare(magnitudes(values))[0]


def test_the_watch_reads_what_the_optimizer_recorded():
    sites = (
        rl.Site("layers/q", "bio", (2, 4, 3), "float32", rank=2, alpha=1.0, scale=1.0),
        rl.Site("head", "io", (3, 5), "float32", rank=1, alpha=1.0, scale=1.0),
    )
    ones = lambda *shape: jnp.ones(shape)  # noqa: E731
    lora = {
        "layers": {"q": {"a": ones(2, 4, 2), "b": ones(2, 2, 3)}},
        "head": {"a": ones(3, 1), "b": ones(1, 5)},
    }
    tx = rl.optim.freeze_base(rl.optim.record_norms(optax.sgd(0.1), sites, capacity=16))
    params = rl.LoraParams({}, lora)

    @jax.jit
    def train(sizes):
        def step(state, size):
            grads = jax.tree.map(lambda x: size * x, lora)
            return tx.update(grads, state, params.lora)[1], None

        return jax.lax.scan(step, tx.init(params), sizes)[0]

    state = train(jnp.ones(20).at[18].set(100.0))
    found = Magnitudes.of(rl.optim.recorded(state))
    assert found.places == ("head", "layers/q[0]", "layers/q[1]")
    np.testing.assert_array_equal(found.steps, np.arange(5, 21))
    np.testing.assert_allclose(found.values[0], np.sqrt([8, 14, 14]), rtol=1e-6)
    (said,) = Watch(True, 1e-3).look(state)
    assert said.startswith("step 19: the gradient at ") and "100 times" in said


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str = "smollm2"
    rank: int = 8
    eval_dataset: Path | None = None
    targets: tuple[str, ...] = ("q_proj/kernel", "v_proj/kernel")
    learning_rate: float = 1e-3


ROWS = [
    {"step": 0, "held_out/loss": 2.5},
    *({"step": k, "loss": 2.0 / k, "grad_norm": 0.5} for k in range(1, 6)),
    {"step": 6, "loss": None, "grad_norm": None},
    {"step": 6, "held_out/loss": 0.5},
]


def test_the_report_tells_all_of_a_run_in_markdown(tmp_path):
    facts = report.Facts(
        sites="path  rank\nlayers/q  8",
        data={"rows": 12, "padding": 0.25},
        seconds={"load": 1.25, "train": 10.0},
        speed={"tokens per second": 321.0},
        warnings=["step 3: the gradient at q[0] exploded."],
        files={"adapter": "the adapter, for PEFT"},
        ended="Done after 6 steps.",
    )
    before = Evaluation(0, Held(2.5, 0.25, 0.0, 8), (Answer("2+2?", "4", "fish | chips"),))
    after = Evaluation(6, Held(0.5, 0.9, 0.75, 8), (Answer("2+2?", "4", "<b>4\nor 5"),))
    path = report.write(tmp_path, Settings(), facts, ROWS, [before, before, after])
    text = path.read_text()
    for line in (
        "Done after 6 steps.",
        "|  | before | after step 6 |",
        "| loss (nats per answer token) | 2.5 | 0.5 |",
        "| exact match | 0.00% | 75.00% |",
        "| prompt | right | before | at step 6 |",
        "| 2+2? | 4 | fish \\| chips | &lt;b&gt;4<br>or 5 |",
        "- step 3: the gradient at q\\[0\\] exploded.",
        "| padding | 0.25 |",
        "| total | 11.2 s |",
        "| tokens per second | 321 |",
        "layers/q  8",
        "| eval_dataset | none |",
        "| targets | q_proj/kernel, v_proj/kernel |",
        "| adapter | the adapter, for PEFT |",
        f"| jax | {jax.__version__} |",
    ):
        assert line in text.splitlines(), line
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["curves.png", "report.md"]


def test_rows_that_ask_the_same_keep_their_own_answers():
    held = Held(1.0, 0.5, 0.5, 2)
    before, after = (
        Evaluation(step, held, tuple(Answer("why?", right, f"{right}{step}") for right in "ab"))
        for step in (0, 6)
    )
    lines = report.page(Settings(), report.Facts(), [before, after]).splitlines()
    assert "| why? | a | a0 | a6 |" in lines and "| why? | b | b0 | b6 |" in lines
    fewer = before._replace(answers=before.answers[1:])
    lines = report.page(Settings(), report.Facts(), [fewer, after]).splitlines()
    assert "| why? | a |  | a6 |" in lines and "| why? | b |  | b6 |" in lines


def test_the_report_of_a_run_that_did_nothing_has_no_empty_sections():
    text = report.page(Settings(), report.Facts(), [])
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == ["# Fine-tune", "## Curves", "## Settings", "## Versions"]


def test_other_processes_write_no_report(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    report.write(tmp_path, Settings(), report.Facts(), ROWS, [])
    assert list(tmp_path.iterdir()) == []


def test_curves_are_drawn_of_runs_without_numbers_and_of_gradients_that_are_all_zero(tmp_path):
    for rows in ([], [{"step": 1, "loss": 1.0, "grad_norm": 0.0}]):
        curves.draw(rows, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
