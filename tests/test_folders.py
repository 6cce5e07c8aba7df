"""Two safetensors folders: paired by name, read one tensor at a time, drawn."""

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import rslora_jax as rl
from rslora_jax.analysis.spectra import folders
from rslora_jax.analysis.spectra.folders import compare_folders
from rslora_jax.analysis.spectra.spectrum import Spectra, Spectrum
from rslora_jax.analysis.spectra.spectrum_plot import plot_energy
from rslora_jax.files import whole_file, whole_folder
from rslora_jax.folders import open_folder, write_file
from rslora_jax.peft.shards import write_folder
from tests.disks import full_disk

RNG = np.random.default_rng(0)
BASE = {
    "embed": RNG.normal(size=(20, 16)).astype(ml_dtypes.bfloat16),
    "layers.0.q": RNG.normal(size=(16, 20)).astype("float32"),
    "layers.1.q": RNG.normal(size=(16, 20)).astype("float32"),
    "experts": RNG.normal(size=(2, 16, 20)).astype("float32"),
    "conv": RNG.normal(size=(16, 1, 4)).astype("float32"),
    "norm": np.ones(16, "float32"),
    "positions": np.arange(16),
}
CHANGE = {name: RNG.normal(size=BASE[name].shape) for name in ("layers.0.q", "experts")}
TUNED = {name: (x + CHANGE.get(name, 0)).astype(x.dtype) for name, x in BASE.items()}


def save(path, tensors, shards=1):
    path.mkdir()
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    place = {name: f"model-{n % shards}.safetensors" for n, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({n: x for n, x in tensors.items() if place[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save(root / "base", BASE), save(root / "tuned", TUNED, shards=3)


@pytest.fixture(scope="module")
def compared(pair):
    seen = []
    return compare_folders(*pair, k=20, progress=lambda *step: seen.append(step)), seen


def test_the_spectra_are_those_of_numpy(compared):
    found = {item.path: item for item in compared[0]}
    assert list(found) == ["embed", "experts", "layers.0.q", "layers.1.q"]
    for name in CHANGE:
        exact = np.linalg.svd(TUNED[name].astype(float) - BASE[name], compute_uv=False)
        np.testing.assert_allclose(found[name].s, exact, rtol=1e-4, atol=1e-5)
    assert not found["embed"].total.any() and not found["layers.1.q"].total.any()


def test_the_table_has_a_row_for_every_module(compared):
    table = compared[0].ranks()
    assert table.select(path="experts").column("module") == ["0", "1"]
    exact = np.linalg.norm(CHANGE["layers.0.q"]) / np.linalg.norm(BASE["layers.0.q"])
    np.testing.assert_allclose(table.select(path="layers.0.q").column("relative"), [exact], 1e-5)


def test_progress_is_told_before_each_matrix_and_at_the_end(compared):
    steps = compared[1]
    assert [step[:2] for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[1][2] == "experts"


def test_only_one_tensor_of_each_model_is_read_at_a_time(pair, monkeypatch):
    reads = []
    spectrum_of = folders.pair_spectrum

    class Counted:
        def __init__(self, file, framework):
            self.file = safe_open(file, framework)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            reads.append(name)
            return self.file.get_tensor(name)

    def note(pair, k, **options):
        reads.append("spectrum")
        return spectrum_of(pair, k, **options)

    monkeypatch.setattr("safetensors.safe_open", Counted)
    monkeypatch.setattr(folders, "pair_spectrum", note)
    compare_folders(*pair, k=20)
    assert reads[:6] == ["embed", "embed", "spectrum", "experts", "experts", "spectrum"]
    assert len(reads) == 12


def test_the_plot_is_a_picture_with_the_changed_modules(compared, tmp_path):
    plot_energy(compared[0], tmp_path / "energy.png")
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_any_change_is_refused(tmp_path):
    still = Spectra([Spectrum("w", (4, 4), np.zeros(4), np.array(0.0))])
    with pytest.raises(rl.AdapterError, match=r"none of the 1 weights changed"):
        plot_energy(still, tmp_path / "energy.png")
    assert not list(tmp_path.iterdir())


# Bad input.


def test_folders_that_do_not_match_name_tensors_and_shapes(pair, tmp_path):
    other = {**TUNED, "layers.1.q": np.ones((3, 20), "float32"), "new": np.ones(2, "float32")}
    del other["norm"]
    with pytest.raises(rl.AdapterError) as caught:
        compare_folders(pair[0], save(tmp_path / "other", other))
    message = str(caught.value)
    assert "3 differ" in message and "'norm' is only in" in message and "'new' is only" in message
    assert "'layers.1.q' has shape (16, 20) in" in message and "and (3, 20) in" in message


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(rl.AdapterError, match=r"found no folder .*nowhere"):
        open_folder(tmp_path / "nowhere")


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(rl.AdapterError, match=r"needs model.safetensors.*found \['config.json'\]"):
        open_folder(tmp_path)


def test_pickles_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(rl.AdapterError, match=r"pytorch_model\.bin.*pickles.*are not read"):
        open_folder(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 40, -7])
def test_a_truncated_file_is_named(tmp_path, kept):
    folder = save(tmp_path / "cut", BASE)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(rl.AdapterError, match=r"model\.safetensors \([\d,]+ bytes\) is no whole"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "must be JSON with a 'weight_map'"),
        ("[]", "must be JSON with a 'weight_map'"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "'gone.safetensors', which is missing"),
        ('{"weight_map": {"w": "../up.safetensors"}}', "which is no safetensors file beside it"),
        ('{"weight_map": {"w": "model.bin"}}', "which is no safetensors file beside it"),
        ('{"weight_map": {"w": 3}}', "which is no safetensors file beside it"),
    ],
)
def test_a_broken_index_is_named(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(rl.AdapterError, match=message):
        open_folder(tmp_path)


def test_a_model_without_a_matrix_is_refused(tmp_path):
    folder = save(tmp_path / "flat", {"norm": np.ones(16, "float32")})
    with pytest.raises(rl.AdapterError, match="1 tensors, none of them a floating matrix"):
        compare_folders(folder, folder)


def test_a_tensor_in_two_shards_or_in_none_is_named(pair, tmp_path):
    for n in (1, 2):
        save_file({"w": np.ones(2, "float32")}, tmp_path / f"model-{n}.safetensors")
    index = {"w": "model-1.safetensors", "v": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(rl.AdapterError, match=r"holds 'w' twice, in model-1.* and model-2"):
        open_folder(tmp_path)
    save_file({"u": np.ones(2, "float32")}, tmp_path / "model-2.safetensors")
    with pytest.raises(rl.AdapterError, match=r"lists 1 tensors that are in no shard: \['v'\]"):
        open_folder(tmp_path)


# Writing.


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.txt")}


def test_a_folder_appears_whole(tmp_path):
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "in").mkdir()
        (temporary / "in" / "a.txt").write_text("1")
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path) == {"out/in/a.txt": b"1"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True])
def test_nothing_is_left_of_a_folder_that_failed(tmp_path, error, before):
    if before:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(error, match="stop"):
        with whole_folder(tmp_path / "out", overwrite=True) as temporary:
            (temporary / "a.txt").write_text("1")
            raise error("stop")
    assert contents(tmp_path) == ({"out/old.txt": b"old"} if before else {})
    assert len(list(tmp_path.iterdir())) == before


def test_an_existing_folder_is_refused_and_replaced_only_when_told(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(rl.AdapterError, match=r"out exists already.*Pass overwrite=True"):
        with whole_folder(out):
            pytest.fail("the block must not run")
    with whole_folder(out, overwrite=True) as temporary:
        (temporary / "new.txt").write_text("new")
        assert contents(out) == {"old.txt": b"old"}
    assert contents(tmp_path) == {"out/new.txt": b"new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_the_old_folder_comes_back_if_the_last_rename_fails(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    out.mkdir()
    (out / "old.txt").write_text("old")

    def fail(source, target):
        if str(target) == str(out) and not str(source).endswith(".old"):
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        with whole_folder(out, overwrite=True) as temporary:
            (temporary / "new.txt").write_text("new")
    assert contents(tmp_path) == {"out/old.txt": b"old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(rl.AdapterError, match="exists already"):
        with whole_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs.txt").write_text("theirs")
    assert contents(tmp_path) == {"out/theirs.txt": b"theirs"}


def test_a_file_is_named_and_missing_parents_are_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(rl.AdapterError, match="file is a file, where a folder is to be written"):
        with whole_folder(tmp_path / "file", overwrite=True):
            pytest.fail("the block must not run")
    with whole_folder(tmp_path / "new" / "out") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "new" / "out" / "x").read_text() == "x"


def test_a_full_disk_is_an_error_of_the_system_with_the_name_of_the_file(tmp_path):
    tensors = {"w": np.zeros(400, "f4")}
    with full_disk():
        with pytest.raises(OSError, match=r"File too large: .*a\.safetensors") as caught:
            write_file(tmp_path / "a.safetensors", tensors)
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(OSError, match=r"File too large: .*shard-00001\.safetensors"):
            write_folder(tmp_path / "model", tensors.items())
        with pytest.raises(OSError, match=r"File too large: .*config\.json"):
            with whole_file(tmp_path / "config.json") as temporary:
                temporary.write_text(" " * 200)
    assert list(tmp_path.iterdir()) == []
