"""Several processes over loopback: they save, die, and go on in any number with the same losses."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import hosts
import pod_finetune
import texts
from hosts import Losses, mesh_of
from pod_finetune import Options

POD = Path(__file__).with_name("pod.py")
EVERY = 4
SIZES = ("--tensor", "2", "--batch", "8", "--length", "16", "--save-every", str(EVERY))
PATIENCE = 200  # seconds for anything to happen on a busy machine


class Process(NamedTuple):
    pid: int
    output: Path

    def said(self):
        return self.output.read_text() if self.output.exists() else ""


class Pod:
    """Starts processes that share four devices, and kills what is left of them at the end."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(Path(pod_finetune.__file__).parent),
        }
        self.server = subprocess.Popen(
            [sys.executable, str(POD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        # A hang becomes the end of the output, and the test that waits for a line fails.
        self.watchdog = threading.Timer(3 * PATIENCE, self.server.kill)
        self.watchdog.start()
        assert self.read() == ["ready", "1"], "threads are running at the fork"

    def read(self):
        words = self.server.stdout.readline().split()
        assert words, "the server ended"
        return words

    def ask(self, *command):
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        answer = self.read()[1]
        return None if answer == "None" else int(answer)

    def start(self, count, task, *flags):
        """Processes that have met; once more where another program took the port meanwhile."""
        for _ in range(3):
            started = self.launch(count, task, flags)
            if self.have_met(started[0]):
                return started
            self.kill(started)
        raise AssertionError(started[0].said()[-3000:])

    def launch(self, count, task, flags):
        coordinator, started = f"127.0.0.1:{free_port()}", []
        for process in range(count):
            self.count += 1
            output = self.folder / f"output{self.count}"
            met = {"--coordinator": coordinator, "--processes": count, "--process-id": process}
            words = [str(word) for pair in met.items() for word in pair] if count > 1 else []
            cache = str(self.folder / "cache")
            pid = self.ask(task, str(output), 4 // count, cache, *map(str, flags), *words)
            started.append(Process(pid, output))
        return started

    def have_met(self, process):
        end = time.monotonic() + PATIENCE
        while "mesh" not in process.said():
            if self.ask("wait", process.pid, 0.05) is not None:
                assert "in use" in process.said(), process.said()[-3000:]
                return False
            assert time.monotonic() < end, process.said()[-3000:]
        return True

    def kill(self, started):
        running = [each.pid for each in started if self.ask("wait", each.pid, 0) is None]
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        for pid in running:
            assert self.ask("wait", pid, PATIENCE) == -signal.SIGKILL

    def finish(self, started):
        codes = [self.ask("wait", process.pid, PATIENCE) for process in started]
        ends = "\n".join(process.said()[-2000:] for process in started)
        assert codes == [0] * len(codes), f"{codes}: {ends}"
        return [process.said() for process in started]

    def close(self):
        self.watchdog.cancel()
        self.server.stdin.close()
        assert self.server.wait(timeout=PATIENCE) == 0
        self.server.stdout.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pod(tmp_path_factory):
    pod = Pod(tmp_path_factory.mktemp("pod"))
    yield pod
    pod.close()


class Story(NamedTuple):
    """What became of one run that was killed, moved and interrupted, and of one that was not."""

    killed: list  # lines of losses.jsonl when both of two processes were killed
    moved: list  # after one process of four devices went on
    noticed: list  # after two processes went on until one of them got SIGTERM
    whole: list  # of one process that nothing disturbed
    said: list  # what the two processes said that got the notice
    steps: list  # complete checkpoints in the end


@pytest.fixture(scope="module")
def story(pod):
    folder = pod.folder / "run"

    def flags(steps, output=folder):
        return ("fine_tune", *SIZES, "--steps", steps, "--output", output)

    both = pod.start(2, *flags(10_000))
    wait_for(lambda: len(lines(folder)) >= EVERY + 2 and steps_in(folder))
    pod.kill(both)
    killed, newest = lines(folder), steps_in(folder)[-1]
    pod.finish(pod.start(1, *flags(newest + 6)))
    moved = lines(folder)
    both = pod.start(2, *flags(10_000))
    wait_for(lambda: len(lines(folder)) >= newest + 8)
    os.kill(both[1].pid, signal.SIGTERM)
    said = pod.finish(both)
    noticed = lines(folder)
    pod.finish(pod.start(1, *flags(newest + 14, pod.folder / "whole")))
    return Story(killed, moved, noticed, lines(pod.folder / "whole"), said, steps_in(folder))


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def lines(folder):
    return hosts.read_lines(folder / "losses.jsonl")


def steps_in(folder):
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def assert_same_losses(found, expected):
    count = min(len(found), len(expected))
    for one, other in zip(found[:count], expected[:count], strict=True):
        assert one["step"] == other["step"]
        # Gloo may add up parts of a sum in another order than one process. Here the losses were
        # seen to be bit-identical: a sum over an axis of two devices has two terms.
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5, atol=0)


def test_two_processes_train_as_one_does(story):
    assert len(story.killed) >= EVERY + 2
    assert_same_losses(story.killed, story.whole)


def test_a_killed_run_of_two_processes_goes_on_with_the_same_losses_on_one(story):
    assert len(story.moved) > EVERY + 5
    assert_same_losses(story.moved, story.whole)


def test_a_run_of_one_process_goes_on_with_the_same_losses_on_two(story):
    assert len(story.noticed) > len(story.moved) + 1
    assert_same_losses(story.noticed, story.whole)
    assert story.whole[-1]["loss"] < story.whole[0]["loss"]


def test_every_step_is_logged_once(story):
    for found in (story.killed, story.moved, story.noticed, story.whole):
        assert [line["step"] for line in found] == list(range(1, len(found) + 1))


def test_a_notice_to_one_process_makes_all_save_the_same_step_and_exit_cleanly(story):
    last = story.noticed[-1]["step"]
    assert story.steps[-1] == last < 10_000
    assert f"step {last} is saved" in story.said[0]
    assert "run it again to go on" in story.said[0]


def test_only_the_first_process_speaks(story):
    assert "trainable parameters" in story.said[0] and "going on from step" in story.said[0]
    for word in ("trainable", "going on", "loss", "saved"):
        assert word not in story.said[1]


def test_processes_save_and_restore_together_and_fail_together(pod):
    folder = pod.folder / "together"
    folder.mkdir()
    pod.finish(pod.start(2, "agree", "--folder", folder))
    reports = [json.loads((folder / f"report{process}").read_text()) for process in (0, 1)]
    exists, differs, alone, missing, damaged = zip(*reports, strict=True)
    assert all("which exists" in said for said in exists)
    assert all("save the same adapters" in said and "in process 1" in said for said in differs)
    assert "Process 1 of 2 failed: PermissionError: the disk of this one" in alone[0]
    assert alone[1] == "PermissionError: the disk of this one is read-only"
    assert missing[0].startswith("AdapterError: Process 1 of 2 failed: AdapterError: Adapters were")
    assert "does not exist" in missing[1]
    assert "Process 1 of 2 failed: AdapterError: The arrays of" in damaged[0]
    assert "cannot be read: ValueError: a damaged chunk" in damaged[1]


# Within this process.


def test_the_order_is_the_same_for_every_process_and_holds_each_window_once_a_pass():
    steps = [texts.order(step, count=7, batch=3, seed=5) for step in range(7)]
    passes = np.concatenate(steps).reshape(3, 7)
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3
    assert (texts.order(4, 7, 3, 5) == steps[4]).all()
    assert sorted(texts.order(0, count=2, batch=6, seed=0)) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("spec", [P(("data", "fsdp")), P("fsdp"), P(None, "data"), P()], ids=str)
def test_rows_become_one_global_array_in_their_order(spec):
    table = np.arange(60, dtype=np.int32).reshape(10, 6)
    rows = np.array([9, 0, 4, 4, 1, 7, 2, 8])
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    found = texts.read(table, rows, NamedSharding(mesh, spec))
    assert (np.asarray(found) == table[rows]).all() and found.sharding.spec == spec


def test_windows_overlap_by_the_token_that_is_predicted():
    assert texts.windows(range(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    with pytest.raises(ValueError, match="length must be below the text's 8 tokens, found 8"):
        texts.windows(range(8), 8)
    assert len(texts.reference()) > 100_000


def test_losses_after_the_checkpoint_and_a_line_cut_short_are_dropped(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    with Losses(path, after=1) as log:
        log.add(2, 0.5)
    assert hosts.read_lines(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"batch": 0}, "batch must be above 0, found 0"),
        ({"processes": 2}, "processes needs coordinator"),
        ({"rank": 0}, "rank"),
    ],
    ids=str,
)
def test_flags_out_of_range_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        pod_finetune.prepare(Options(**flags))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"fsdp": 3}, r"must be the 8 devices that there are, found 1 \* 3 \* 1"),
        ({"tensor": 16}, r"must be the 8 devices that there are, found 1 \* 1 \* 16"),
        ({"batch": 12}, "batch must be a multiple of data \\* fsdp = 8, found 12"),
    ],
    ids=str,
)
def test_meshes_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(**{"data": 1, "fsdp": None, "tensor": 1, "batch": 16, **flags})
