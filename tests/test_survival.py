"""A training run survives: whatever kills it, it ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

TOTAL, EVERY, KILLS = 72, 4, 20
SURVIVOR = Path(__file__).with_name("survivor.py")
UNFINISHED = "*.orbax-checkpoint-tmp*"


class Server:
    """The process that forks a training process for each command."""

    def __init__(self, folder):
        self.folder, self.cache = folder, str(folder / "cache")
        self.errors = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(SURVIVOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        # A hang becomes the end of the output, and the test that waits for a line fails.
        self.watchdog = threading.Timer(300, self.process.kill)
        self.watchdog.start()
        assert self.read() == ["ready", "1"], "threads are running at the fork"

    def read(self):
        words = self.process.stdout.readline().split()
        assert words, self.said()
        return words

    def said(self):
        self.errors.seek(0)
        return self.errors.read()[-3000:]

    def start(self, task, devices, *arguments):
        command = json.dumps([task, devices, self.cache, *map(str_of, arguments)])
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        name, pid = self.read()
        assert name == "pid"
        return int(pid)

    def finish(self):
        """Everything that is said until the process ends, and how it ended."""
        lines = [self.read()]
        while lines[-1][0] != "exit":
            lines.append(self.read())
        return lines[:-1], int(lines[-1][1])

    def train(self, folder, result):
        self.start("train", 1, folder, result, TOTAL, EVERY)
        lines, code = self.finish()
        assert code == 0, self.said()
        return lines

    def close(self):
        self.watchdog.cancel()
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0
        self.process.stdout.close()
        self.errors.close()


def str_of(argument):
    return str(argument) if isinstance(argument, Path) else argument


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def uninterrupted(server):
    """Every leaf of the final state of a run that nothing disturbed."""
    server.train(server.folder / "whole", server.folder / "whole.npz")
    return read(server.folder / "whole.npz")


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


def assert_identical(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


def steps_in(folder):
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit())


def is_saving(folder):
    return next(folder.glob(UNFINISHED), None) is not None


def kill_at(server, folder, pid, moment, rng):
    """Kills once `moment` has come; returns the step from which the run had resumed, if any."""
    resumed, step = None, -1
    if moment == "start":
        time.sleep(rng.uniform(0, 0.8))
    else:
        target, inside = moment
        while step < target:
            name, number = server.read()
            assert name in ("resumed", "step", "saved"), server.said()
            resumed = int(number) if name == "resumed" else resumed
            step = TOTAL if name == "saved" else int(number) if name == "step" else step
        while inside and step < TOTAL and not stopped_in_save(folder, pid, rng):
            time.sleep(0.0005)
        if not inside:
            time.sleep(rng.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)
    lines, code = server.finish()
    assert code == -signal.SIGKILL
    early = [int(line[1]) for line in lines if line[0] == "resumed"]
    return early[0] if early else resumed


def stopped_in_save(folder, pid, rng):
    """Freezes the process while it saves, at no particular moment of the save."""
    if not is_saving(folder):
        return False
    time.sleep(rng.uniform(0, 0.03))
    os.kill(pid, signal.SIGSTOP)
    if is_saving(folder):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def test_a_run_killed_at_20_moments_ends_like_one_that_was_not(server, uninterrupted):
    folder, result = server.folder / "killed", server.folder / "killed.npz"
    rng = random.Random(0)
    # Over the whole run: before the first save, inside the first, then anywhere.
    steps = [1, EVERY, *sorted(rng.sample(range(EVERY, TOTAL - 2 * EVERY), KILLS - 4))]
    moments = [(step, place % 2 == 1) for place, step in enumerate(steps)]
    moments.insert(7, "start")
    moments.insert(14, "start")
    assert len(moments) == KILLS
    saves_hit, resumed, saved = 0, [], []
    for moment in moments:
        pid = server.start("train", 1, folder, result, TOTAL, EVERY, True)
        resumed.append(kill_at(server, folder, pid, moment, rng))
        saves_hit += is_saving(folder)
        saved.append(max(steps_in(folder), default=0))
    assert saved[0] == 0, "the first kill comes before any save"
    assert saves_hit >= 6
    starts = [step for step in resumed if step is not None]
    assert starts == sorted(starts) and len(set(starts)) >= 8, "no progress between kills"
    lines = server.train(folder, result)
    assert lines[0] == ["resumed", str(saved[-1])]
    assert not is_saving(folder), "what was half-written is still there"
    assert_identical(read(result), uninterrupted)
    assert len(uninterrupted["data.losses"]) == TOTAL


def test_a_preemption_notice_saves_exits_cleanly_and_resumes_identically(server, uninterrupted):
    folder, result = server.folder / "preempted", server.folder / "preempted.npz"
    pid = server.start("train", 1, folder, result, TOTAL, EVERY)
    while server.read() != ["step", str(EVERY + 5)]:
        pass
    os.kill(pid, signal.SIGTERM)
    lines, code = server.finish()
    assert code == 0, server.said()
    name, step = lines[-1]
    assert name == "saved" and EVERY < int(step) < TOTAL
    assert steps_in(folder)[-1] == int(step) and not is_saving(folder)
    assert server.train(folder, result)[0] == ["resumed", step]
    assert_identical(read(result), uninterrupted)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_a_state_moves_from_eight_devices_to_two(server, tmp_path, explicit):
    for mode, devices in (("save", 8), ("restore", 2)):
        server.start("cross", devices, tmp_path / "run", mode, devices, explicit)
        assert server.finish() == ([], 0), server.said()
