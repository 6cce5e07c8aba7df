"""Runs of training: every step that is listed restores as it was, or an error says why not."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from rslora_jax.checkpoint import Preemption, Runs, RunState, fingerprint, restore
from rslora_jax.optim import freeze_base, record_norms
from rslora_jax.paths import AdapterError, flatten
from tests.disks import full_disk

CONFIG = rl.LoraConfig(rank=4, alpha=8.0)
SITES = (
    rl.Site("q", "bio", (2, 8, 16), "float32", rank=4, alpha=8.0, scale=4.0),
    rl.Site("up", "io", (8, 8), "float32", rank=4, alpha=8.0, scale=4.0),
)
BASE = fingerprint({"q": np.ones((2, 8, 16), np.float32), "up": np.ones((8, 8), np.float32)})


def factors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        site.path: {
            name: jnp.asarray(rng.normal(size=shape).astype(np.float32))
            for name, shape in zip("ab", site.factor_shapes, strict=True)
        }
        for site in SITES
    }


LORA = factors()
TX = optax.sgd(0.1, momentum=0.9)


def state_at(step, seed=0, data=None):
    lora = factors(seed)
    return RunState(lora, TX.init(lora), step, jax.random.key(seed), data)


def open_run(folder, sites=SITES, config=CONFIG, base=BASE, **options):
    return Runs(folder, sites, config, base=base, **options)


def assert_same(left, right):
    """Equal bits, types, dtypes and containers."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, one, two in zip(
        flatten(right).paths, jax.tree.leaves(left), jax.tree.leaves(right), strict=True
    ):
        assert type(one) is type(two), path
        if not hasattr(two, "dtype"):
            assert repr(one) == repr(two), path
            continue
        assert (one.dtype, one.shape) == (two.dtype, two.shape), path
        assert getattr(one, "weak_type", None) == getattr(two, "weak_type", None), path
        assert bits(one) == bits(two), path


def bits(array):
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the steps 1, 2 and 3; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with open_run(folder) as runs:
        for step in (1, 2, 3):
            assert runs.save(state_at(step, seed=step, data={"index": np.arange(step)}))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


# What comes back.


class Position(NamedTuple):
    epoch: int
    order: np.ndarray


DATA = {
    "int": 2**40,
    "float": [float("nan"), float("-inf"), 0.1, -0.0],
    "flags": (True, False, None),
    "text": "pass ä/\n",
    "bytes": b"\x00\xff iterator",
    "empty": [{}, (), np.zeros((0, 3), np.float32), jnp.zeros((2, 0))],
    "numpy": np.arange(6, dtype=np.int64).reshape(2, 3).T,
    "scalar": np.float64(1 / 3),
    "jax": jnp.arange(3, dtype=jnp.bfloat16),
    "weak": jnp.asarray(0.5),
    "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2),
    "own": Position(3, np.array([2, 0, 1], np.uint16)),
    "layers": {7: {"a/b": jnp.int8(-3)}},
}


def test_every_leaf_comes_back_with_its_bits_and_its_type(tmp_path):
    state = state_at(jnp.int32(5), data=DATA)
    with open_run(tmp_path) as runs:
        assert runs.save(state)
        assert_same(runs.restore(state), state)
        like = abstract(state)._replace(data={"own": Position(0, np.zeros(3))})
        assert_same(runs.restore(like), state)


def transforms():
    labels = {"q": "fast", "up": "slow"}
    masked = optax.masked(optax.trace(0.9), {"q": True, "up": False})
    split = optax.multi_transform({"fast": optax.adam(1e-2), "slow": optax.set_to_zero()}, labels)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)
    tuned = optax.inject_hyperparams(optax.adamw)(learning_rate=schedule, weight_decay=0.1)
    chain = optax.chain(optax.clip_by_global_norm(1.0), masked, split)
    return {
        "many": optax.MultiSteps(optax.chain(chain, optax.scale_by_schedule(schedule)), 2),
        "tuned": tuned,
        "frozen": freeze_base(record_norms(optax.adam(1e-3), SITES, 4)),
        "lbfgs": optax.lbfgs(linesearch=None, memory_size=2),
    }


def test_states_of_nested_optimizers_come_back_with_their_types(tmp_path):
    params = {"frozen": rl.LoraParams({"q": jnp.ones((2, 8, 16)), "up": jnp.ones((8, 8))}, LORA)}
    states = {
        name: jax.eval_shape(tx.init, params.get(name, LORA)) for name, tx in transforms().items()
    }
    text = str(jax.tree.structure(states))
    for kind in ("MaskedNode", "EmptyState", "MultiStepsState", "RecordsState"):
        assert kind in text
    rng = np.random.default_rng(0)

    def used(leaf):
        if leaf.weak_type:
            return jnp.asarray(rng.normal())
        return jnp.asarray((100 * rng.normal(size=leaf.shape)).astype(leaf.dtype))

    state = RunState(LORA, jax.tree.map(used, states), 1, jax.random.key(0))
    with open_run(tmp_path) as runs:
        runs.save(state)
        assert_same(runs.restore(state._replace(opt_state=states)), state)


def test_a_step_is_a_checkpoint_of_adapters_too(saved):
    with open_run(saved, read_only=True) as runs:
        found = restore(runs.path(2), LORA, sites=SITES, base=BASE)
    assert found.step == 2
    assert_same(found.params, factors(2))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_state_moves_to_another_mesh_shard_by_shard(tmp_path, kind):
    specs = {"up": {"a": P("x", None), "b": P(None, "x")}}

    def on(count):
        mesh = jax.make_mesh((count,), ("x",), axis_types=(kind,), devices=jax.devices()[:count])
        place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
        lora = jax.tree.map(place, {"up": LORA["up"]}, specs)
        return RunState(lora, {"trace": lora}, 1, place(jax.random.key(3), P()), [lora["up"]["a"]])

    def struct(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    with open_run(tmp_path, sites=SITES[1:]) as runs:
        runs.save(on(4))
        for count in (2, 1):
            wanted = on(count)
            found = runs.restore(jax.tree.map(struct, wanted))
            assert_same(found, wanted)
            for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                assert getattr(one, "sharding", None) == getattr(two, "sharding", None)


def test_an_array_that_no_one_has_placed_stays_free(saved):
    placed = jax.device_put(state_at(0).opt_state, jax.devices()[1])
    with open_run(saved, read_only=True) as runs:
        free = runs.restore(state_at(0))
        bound = runs.restore(state_at(0)._replace(opt_state=placed))
    assert not any(leaf.committed for leaf in jax.tree.leaves((free.opt_state, free.key)))
    assert {leaf.device for leaf in jax.tree.leaves(bound.opt_state)} == {jax.devices()[1]}


# Asynchronous saves.


def test_buffers_may_be_donated_and_positions_changed_while_a_save_is_written(tmp_path):
    @functools.partial(jax.jit, donate_argnames="tree")
    def overwrite(tree):
        return jax.tree.map(lambda x: x * 0 - 1, tree)

    expected, position = state_at(1, data=np.arange(4)), np.arange(4)
    with open_run(tmp_path) as runs:
        state = state_at(1, data=position)
        runs.save(state)
        tree = (state.lora, state.opt_state)
        for _ in range(3):
            tree = overwrite(tree)
        position[:] = -1
        jax.block_until_ready(tree)
        assert_same(runs.restore(expected), expected)


def test_saves_that_wait_are_complete_when_they_return(tmp_path):
    with open_run(tmp_path, asynchronous=False) as runs:
        runs.save(state_at(1))
        assert [p.name for p in tmp_path.iterdir()] == ["1"]


# Which steps are saved and kept.


def test_the_newest_and_the_best_steps_are_kept_and_known_again(tmp_path):
    losses = {1: 0.5, 2: 0.1, 3: 0.9, 4: float("nan"), 5: 0.2}
    options = {"keep_last": 1, "keep_best": 2}
    with open_run(tmp_path, **options) as runs:
        for step, loss in losses.items():
            runs.save(state_at(step), {"loss": jnp.float32(loss), "other": step})
        assert runs.steps() == (2, 5)
    with open_run(tmp_path, **options) as runs:
        runs.restore(state_at(0))
        runs.save(state_at(6), {"loss": 0.15})
        runs.save(state_at(7))
        assert runs.steps() == (2, 6, 7)
        with pytest.raises(AdapterError, match=r"ranks the steps by 'loss', .* have .'other'"):
            runs.save(state_at(8), {"other": 1})
    with open_run(tmp_path, keep_last=1, keep_best=1, best_mode="max") as runs:
        runs.restore(state_at(0))
        runs.save(state_at(8))
        assert runs.steps() == (6, 8)


def test_steps_are_saved_when_they_are_due_and_never_twice(tmp_path):
    with open_run(tmp_path, save_every=2) as runs:
        assert runs.latest() is None
        begun = [runs.save(state_at(step)) for step in range(1, 6)]
        assert begun == [False, True, False, True, False]
        assert runs.save(state_at(5), force=True)
        assert not runs.save(state_at(5), force=True)
        assert (runs.steps(), runs.latest()) == ((2, 4, 5), 5)


def test_a_run_that_went_back_deletes_the_later_steps_before_it_saves(copy):
    with open_run(copy) as runs:
        with pytest.raises(AdapterError, match=r"holds steps up to 3, .* did not come from"):
            runs.save(state_at(1))
        runs.restore(state_at(0), step=1)
        with pytest.raises(AdapterError, match=r"Step 2 was .*discard\(after=1\)"):
            runs.save(state_at(2))
        runs.discard(after=1)
        assert runs.save(state_at(2, seed=9))
        assert_same(runs.restore(state_at(0), step=2).lora, factors(9))
        assert runs.steps() == (1, 2)


def test_what_a_killed_save_left_is_skipped_and_removed_but_not_by_a_reader(copy):
    left = copy / "4.orbax-checkpoint-tmp"
    shutil.copytree(copy / "3", left)
    with open_run(copy, read_only=True) as runs:
        assert runs.restore(state_at(0)).step == 3
        with pytest.raises(AdapterError, match="read_only=True"):
            runs.save(state_at(4))
        with pytest.raises(AdapterError, match="read_only=True"):
            runs.discard(after=1)
    assert left.is_dir()
    with open_run(copy) as runs:
        assert runs.restore(state_at(0)).step == 3
        runs.save(state_at(4))
        assert runs.steps() == (2, 3, 4)
    assert sorted(p.name for p in copy.iterdir()) == ["2", "3", "4"]


def test_a_reader_sees_the_steps_that_were_added(copy):
    with open_run(copy, read_only=True) as reader, open_run(copy) as runs:
        runs.restore(state_at(0))
        runs.save(state_at(4))
        runs.wait()
        assert reader.restore(state_at(0)).step == 4


# What does not fit.


OTHER_RANK = (SITES[0], rl.Site("up", "io", (8, 8), "float32", rank=1, alpha=8.0, scale=8.0))
MISFITS = {
    "another rank": ({"sites": OTHER_RANK}, {}, "'up': rank 4 in .*, 1 in"),
    "a site less": ({"sites": SITES[:1]}, {}, "'up': in the checkpoint, not in"),
    "another config": (
        {"config": rl.LoraConfig(4, 8.0, exclude=["k"])},
        {},
        r"another config: exclude \[\] in the checkpoint, \['k'\] in what was given",
    ),
    "another base": (
        {"base": fingerprint({"q": np.ones((2, 8, 16), np.float32), "up": np.zeros((8, 8))})},
        {},
        "another base: 'up': dtype float32 .* float64",
    ),
    "another optimizer": (
        {},
        {"opt_state": optax.adam(1e-3).init(LORA)},
        "that `like` has not: 'opt_state/0/trace/q/a', .* not saved: 'opt_state/0/count'",
    ),
    "another dtype": (
        {},
        {"opt_state": jax.tree.map(lambda x: x.astype(jnp.bfloat16), TX.init(LORA))},
        r"'opt_state/0/trace/q/a' was saved as .* float32\[2, 8, 4\].* has .* bfloat16",
    ),
    "another kind of key": (
        {},
        {"key": jax.random.key(0, impl="rbg")},
        "'key' was saved as a key of key<fry>.*, and `like` has a key of key<rbg>",
    ),
    "a step that is no number": ({}, {"step": "3"}, "'step' was saved as a Python int.* str"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_another_run_is_refused_by_path_with_both_values(saved, name):
    options, fields, message = MISFITS[name]
    like = state_at(0)._replace(**fields)
    with open_run(saved, read_only=True, **options) as runs:
        with pytest.raises(AdapterError, match=f"(?s)Step 3 of .*: .*{message}"):
            runs.restore(like)


def test_steps_that_are_not_there_are_named(saved, tmp_path):
    with open_run(saved, read_only=True) as runs:
        with pytest.raises(AdapterError, match=r"holds no step 7; it holds \[1, 2, 3\]"):
            runs.restore(state_at(0), step=7)
    with open_run(tmp_path) as runs:
        with pytest.raises(AdapterError, match="no complete step"):
            runs.restore(state_at(0))


BAD_STATES = {
    "the base": ({"lora": rl.LoraParams({}, LORA)}, "LoraParams with the base. Pass params.lora"),
    "no factors": ({"lora": {}}, "found none"),
    "a missing factor": ({"lora": {"q": LORA["q"]}}, "up"),
    "a factor that is not finite": (
        {"lora": {**LORA, "up": jax.tree.map(lambda x: x / 0, LORA["up"])}},
        "NaN or infinity in up/a; up/b",
    ),
    "an object": ({"data": [object()]}, "'data/0' is a object"),
    "text as an array": ({"data": np.array(["a"])}, "'data/0' has the dtype <U1"),
    "a step below zero": ({"step": -1}, "at least 0, found -1"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path, name):
    fields, message = BAD_STATES[name]
    with open_run(tmp_path) as runs:
        with pytest.raises(AdapterError, match=message):
            runs.save(state_at(1)._replace(**fields))
        with pytest.raises(AdapterError, match="must be a RunState, found dict"):
            runs.save({})
    assert not list(tmp_path.iterdir())


BAD_OPTIONS = {
    "keep_last": ({"keep_last": 0}, "keep_last must be an int of at least 1, found 0"),
    "keep_best": ({"keep_best": 1.5}, "keep_best must be an int"),
    "save_every": ({"save_every": True}, "save_every must be an int"),
    "best_mode": ({"best_mode": "least"}, "'min' or 'max', found 'least'"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_out_of_range_are_refused(tmp_path, name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(AdapterError, match=message):
        open_run(tmp_path, **options)


def test_a_bucket_is_to_be_mounted():
    with pytest.raises(AdapterError, match="local or mounted disk, found 'gs://bucket/run'"):
        open_run("gs://bucket/run")


def test_data_of_ones_own_type_needs_its_counterpart(tmp_path):
    with open_run(tmp_path) as runs:
        runs.save(state_at(1, data=Position(1, np.arange(2))))
        with pytest.raises(AdapterError, match="saved with a Position of 2 leaves"):
            runs.restore(state_at(0))


def test_64_bit_arrays_of_jax_need_the_flag(tmp_path):
    state = RunState({"up": LORA["up"]}, (), 1, jax.random.key(0))
    with jax.enable_x64(True), open_run(tmp_path, sites=SITES[1:]) as runs:
        wide = state._replace(data=jnp.asarray([1 / 3]))
        runs.save(wide)
        assert_same(runs.restore(wide), wide)
    with open_run(tmp_path, sites=SITES[1:], read_only=True) as runs:
        with pytest.raises(AdapterError, match=r"'data/0' was saved as float64.*jax_enable_x64"):
            runs.restore(state)


# Damage.


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip(content, rng):
    place = rng.randrange(len(content))
    return (
        content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    )


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def a_damaged_step_is_an_error_or_makes_no_difference(copy, damage):
    rng, refused = random.Random(1), 0
    expected = state_at(3, seed=3, data={"index": np.arange(3)})
    with open_run(copy) as runs:
        for file in files_of(copy / "3" / "state") + files_of(copy / "3" / "run"):
            whole = file.read_bytes()
            file.write_bytes(damage(whole, rng))
            try:
                assert_same(runs.restore(state_at(0)), expected)
            except AdapterError as error:
                assert f"Step 3 of {copy} cannot be restored" in str(error)
                assert "Other complete steps: [1, 2]; take one with step=" in str(error)
                refused += 1
            file.write_bytes(whole)
    assert refused >= 4
    shutil.rmtree(copy / "3" / "state")
    (copy / "3" / "run" / "metadata").write_text("{}")
    with open_run(copy, keep_best=1) as runs:
        with pytest.raises(AdapterError, match=r"'run'. cannot be read: KeyError"):
            runs.restore(state_at(0))
        assert_same(runs.restore(state_at(0), step=runs.steps()[-2]).lora, factors(2))


def on_a_full_disk_the_next_call_says_so_and_the_steps_before_stay(copy, asynchronous):
    with open_run(copy, asynchronous=asynchronous) as runs:
        before = runs.restore(state_at(0))
        with pytest.raises(OSError, match=r"Step 4 could .*complete steps: \[1, 2, 3\]"):
            with full_disk(200):
                runs.save(state_at(4))
                runs.wait()
        assert runs.steps() == (1, 2, 3)
        assert_same(runs.restore(state_at(0)), before)
        assert runs.save(state_at(4))
        assert runs.steps() == (2, 3, 4)


def leaving_a_run_on_a_full_disk_says_which_step_was_lost(copy):
    with pytest.raises(OSError, match=r"Step 4 could not be saved.*\[1, 2, 3\]"), full_disk(200):
        with open_run(copy) as runs:
            runs.restore(state_at(0))
            runs.save(state_at(4))


def an_error_of_a_save_surfaces_at_the_next_save_even_if_none_is_due(copy):
    with open_run(copy, save_every=2) as runs:
        runs.restore(state_at(0))
        with full_disk(200):
            runs.save(state_at(4))
            while runs._manager.is_saving_in_progress():
                time.sleep(0.01)
        with pytest.raises(OSError, match="Step 4 could not be saved"):
            runs.save(state_at(5))
        assert runs.steps() == (1, 2, 3)


def a_folder_that_cannot_be_written_is_an_error_and_its_steps_restore_later(copy):
    aside = copy.with_name("aside")
    with open_run(copy) as runs:
        runs.restore(state_at(0))
        copy.rename(aside)
        copy.write_text("in the way")
        with pytest.raises(OSError, match="Step 4 could not be saved"):
            runs.save(state_at(4))
            runs.wait()
        copy.unlink()
        aside.rename(copy)
        assert runs.restore(state_at(0)).step == 3
        assert runs.save(state_at(4))
    (copy.parent / "file").write_text("")
    with pytest.raises(OSError, match="file/run cannot be opened for a run"):
        open_run(copy.parent / "file" / "run")


ELSEWHERE = {
    "a flipped bit in a file is an error or makes no difference": functools.partial(
        a_damaged_step_is_an_error_or_makes_no_difference, damage=flip
    ),
    "a file cut short is an error or makes no difference": functools.partial(
        a_damaged_step_is_an_error_or_makes_no_difference, damage=cut
    ),
    "on a full disk the next call says so": functools.partial(
        on_a_full_disk_the_next_call_says_so_and_the_steps_before_stay, asynchronous=True
    ),
    "leaving a run on a full disk says so": leaving_a_run_on_a_full_disk_says_which_step_was_lost,
    "on a full disk a save that waits says so": functools.partial(
        on_a_full_disk_the_next_call_says_so_and_the_steps_before_stay, asynchronous=False
    ),
    "an error surfaces even if no save is due": (
        an_error_of_a_save_surfaces_at_the_next_save_even_if_none_is_due
    ),
    "a folder that cannot be written is an error": (
        a_folder_that_cannot_be_written_is_an_error_and_its_steps_restore_later
    ),
}


def in_another_process(saved, folder):
    """What must not happen in pytest's process, where late callbacks of TensorStore are errors."""
    said = {}
    for place, (name, check) in enumerate(ELSEWHERE.items()):
        try:
            check(shutil.copytree(saved, Path(folder, str(place), "copy")))
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()
    print(json.dumps(said))


@pytest.fixture(scope="module", autouse=True)
def other_process(saved, tmp_path_factory):
    """Begins with the first test, and works on the other core."""
    code = "import sys, test_runs; test_runs.in_another_process(*sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(saved), str(tmp_path_factory.mktemp("elsewhere"))],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def elsewhere(other_process):
    out, err = other_process.communicate(timeout=120)
    assert other_process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


# Preemption.


def test_a_notice_sets_the_flag_and_reaches_the_earlier_handler_afterwards():
    calls = []
    earlier = signal.signal(signal.SIGTERM, lambda *args: calls.append(args[0]))
    try:
        with Preemption() as notice:
            assert not notice.received and not notice.reached(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.received and notice.reached(2) and not calls
        assert calls == [signal.SIGTERM]
        with Preemption():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, earlier)


def test_a_notice_is_awaited_in_the_main_thread_and_once():
    found = []

    def enter():
        with pytest.raises(AdapterError, match=r"main thread, found the thread 'other'") as error:
            Preemption().__enter__()
        found.append(error)

    thread = threading.Thread(target=enter, name="other")
    thread.start()
    thread.join()
    assert len(found) == 1
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as notice, pytest.raises(AdapterError, match="in use already"):
        notice.__enter__()
    assert signal.getsignal(signal.SIGTERM) is before


def test_several_processes_ask_for_the_step_that_all_agree_on(monkeypatch):
    asked = []

    def agreed(step):
        asked.append(step)
        return step == 3

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("orbax.checkpoint.utils.reached_preemption", agreed)
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as notice:
        assert signal.getsignal(signal.SIGTERM) is before, "JAX's own service takes the signal"
        assert [notice.reached(step) for step in (1, 2, 3, 4)] == [False, False, True, True]
    assert asked == [1, 2, 3] and notice.received


def test_the_modules_import_nothing_heavy():
    for name in ("runs", "steps", "manager", "preemption"):
        text = Path(rl.__file__).with_name("checkpoint").joinpath(f"{name}.py").read_text()
        assert not [line for line in text.splitlines() if line.startswith("import orbax")]


# What was tried in the other process.


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_fails_is_an_error_and_the_steps_before_restore(elsewhere, name):
    assert elsewhere[name] == ""
