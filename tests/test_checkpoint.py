"""Adapters on disk: what comes back is what was saved, or an error that says what is wrong."""

import builtins
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rl
from rslora_jax.checkpoint import Record, fingerprint, read_record, restore, save, storage
from rslora_jax.checkpoint.plain import checksum
from rslora_jax.paths import AdapterError

CONFIG = rl.LoraConfig(rank=4, alpha=8.0)
SCALE = 4.0
SITES = (
    rl.Site("layers/q", "bio", (2, 8, 96), "float32", rank=4, alpha=8.0, scale=SCALE, head=True),
    rl.Site("mlp.up/~/w", "io", (8, 6), "bfloat16", rank=4, alpha=8.0, scale=SCALE),
    rl.Site("mlp/up.~/w", "io", (8, 6), "bfloat16", rank=4, alpha=8.0, scale=SCALE),
)
BASE = {
    "layers": {"q": np.ones((2, 8, 96), np.float32)},
    "mlp.up": {"~": {"w": np.ones((8, 6), np.float32)}},
    "mlp": {"up.~": {"w": np.ones((8, 6), np.float32)}},
}


def factors(sites=SITES, seed=0):
    """Random factors: float32 for float32 weights, else bfloat16."""
    rng = np.random.default_rng(seed)
    tree = {}
    for site in sites:
        *parents, last = site.path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        dtype = jnp.dtype(site.dtype)
        a, b = (jnp.asarray(rng.standard_normal(s).astype(dtype)) for s in site.factor_shapes)
        node[last] = {"a": a, "b": b}
    return tree


LORA = factors()
PARAMS = rl.LoraParams(BASE, LORA)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def replaced(which, **fields):
    return tuple(dataclasses.replace(s, **fields) if s.path == which else s for s in SITES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "adapter"
    save(path, PARAMS, SITES, CONFIG, step=7, extra={"seed": 3, "losses": [0.5, 0.25]})
    return path


# What comes back.


def test_everything_comes_back_bit_by_bit(saved):
    found = restore(saved)
    assert_same(found.lora, LORA)
    assert tuple(found.sites) == SITES and found.config == CONFIG
    assert (found.step, found.extra, found.left_out) == (7, {"seed": 3, "losses": [0.5, 0.25]}, ())


def test_the_special_numbers_come_back(tmp_path):
    site = rl.Site("w", "io", (2, 2), "float32", rank=1, alpha=1.0, scale=1.0)
    tiny = np.float32(1e-45)
    lora = {"w": {"a": np.float32([[-0.0], [tiny]]), "b": np.float32([[3e38, -tiny]])}}
    save(tmp_path / "x", lora, [site], rl.LoraConfig(1, 1.0))
    assert_same(restore(tmp_path / "x").lora, lora)


def test_an_adapted_model_computes_the_same_again(tmp_path):
    base = {"w": jnp.ones((4, 8)), "head": jnp.ones((8, 2))}

    def model(p, x):
        return jnp.tanh(x @ p["w"]) @ p["head"]

    x = jnp.ones((3, 4))
    config = rl.LoraConfig(2, 4.0, targets=["w", "head"])
    params, apply, sites = rl.adapt(model, base, x, config=config, key=jax.random.key(0))
    params.lora["w"]["b"] = jnp.ones((2, 8))
    save(tmp_path / "x", params, sites, config)
    found = restore(tmp_path / "x", params)
    assert found.params.base is base
    assert (rl.attach(model, found.sites)(found.params, x) == apply(params, x)).all()
    text = (tmp_path / "x" / "record" / "metadata").read_text()
    assert "dot_general" in text and "test_checkpoint" not in text
    assert [use.where for site in found.sites for use in site.uses] == ["", ""]
    assert [line.split() for line in str(found.sites).splitlines()[:4]] == [
        line.split() for line in str(sites).splitlines()[:4]
    ]


def test_the_record_is_read_without_the_arrays(saved):
    record = read_record(saved)
    assert record.step == 7 and record.library == rl.__version__
    assert record.base == fingerprint(BASE) and tuple(record.sites) == SITES


def test_like_gives_structure_shardings_and_base(saved):
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("p", "q"), axis_types=(kind, kind))
        spread = NamedSharding(mesh, P(None, None, "q"))
        whole = NamedSharding(mesh, P("q"))

        def struct(leaf, spread=spread, whole=whole):
            sharding = spread if leaf.ndim == 3 else whole
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        like = jax.tree.map(struct, LORA)
        found = restore(saved, rl.LoraParams(BASE, like)).params
        assert found.base is BASE
        assert_same(found.lora, LORA)
        for leaf, wanted in zip(jax.tree.leaves(found.lora), jax.tree.leaves(like), strict=True):
            assert leaf.sharding == wanted.sharding


def test_sharded_factors_are_saved_and_restored_onto_another_mesh(tmp_path):
    four = jax.make_mesh((4,), ("p",), axis_types=(AxisType.Auto,))
    two = jax.make_mesh((2,), ("p",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    last = P(None, None, "p")
    lora = {"layers": {"q": jax.device_put(LORA["layers"]["q"], NamedSharding(four, last))}}
    save(tmp_path / "x", lora, SITES[:1], CONFIG)
    like = jax.device_put(lora, NamedSharding(two, P(None, "p")))
    found = restore(tmp_path / "x", like).lora
    assert_same(found, {"layers": LORA["layers"]})
    assert found["layers"]["q"]["a"].sharding == NamedSharding(two, P(None, "p"))
    assert restore(tmp_path / "x").lora["layers"]["q"]["a"].committed is False


def test_factors_that_no_one_placed_stay_free(saved):
    found = restore(saved, LORA).lora
    assert not any(leaf.committed for leaf in jax.tree.leaves(found))
    placed = jax.device_put(LORA, jax.devices()[3])
    found = restore(saved, placed).lora
    assert {leaf.device for leaf in jax.tree.leaves(found)} == {jax.devices()[3]}


def test_float64_factors_need_the_flag(tmp_path):
    site = rl.Site("w", "io", (2, 2), "float64", rank=1, alpha=1.0, scale=1.0)
    lora = {"w": {"a": np.full((2, 1), 1 / 3), "b": np.full((1, 2), 1e300)}}
    save(tmp_path / "x", lora, [site], rl.LoraConfig(1, 1.0))
    with pytest.raises(AdapterError, match=r"'w/a' was saved as float64.*jax_enable_x64"):
        restore(tmp_path / "x")
    with jax.enable_x64(True):
        assert_same(restore(tmp_path / "x").lora, lora)


def test_a_base_fingerprint_serves_in_place_of_the_base(tmp_path):
    save(tmp_path / "x", LORA, SITES, CONFIG, base=fingerprint(BASE))
    assert read_record(tmp_path / "x").base == fingerprint(BASE)
    restore(tmp_path / "x", LORA, base=BASE)
    with pytest.raises(AdapterError, match="another base: 'w': only in the given base"):
        restore(tmp_path / "x", LORA, base=fingerprint({**BASE, "w": np.ones(3)}))
    save(tmp_path / "y", LORA, SITES, CONFIG)
    assert read_record(tmp_path / "y").base is None
    restore(tmp_path / "y", rl.LoraParams({"w": 1.0}, LORA))  # not known, so not compared


# What does not fit.


def other_rank():
    return factors(replaced("layers/q", rank=5, scale=8 / 5**0.5))


def without(path, name=None):
    lora = factors(SITES if name else [site for site in SITES if site.path != path])
    if name:
        del lora["layers"]["q"][name]
    return lora


MISFITS = {
    "rank": (other_rank, "'layers/q': rank 4 in the checkpoint, 5 in what was given"),
    "missing site": (
        lambda: without("layers/q"),
        "'layers/q': in the checkpoint, not in what was given",
    ),
    "extra site": (
        lambda: {**factors(), "v": {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 2))}},
        "'v': in what was given, not in the checkpoint",
    ),
    "missing leaf": (
        lambda: without("layers/q", "b"),
        "'layers/q/b': in the checkpoint, not in what was given",
    ),
    "dtype": (
        lambda: factors(replaced("layers/q", dtype="bfloat16")),
        "'layers/q/a': dtype float32 in the checkpoint, bfloat16 in what was given",
    ),
    "shape": (
        lambda: factors(replaced("layers/q", shape=(2, 9, 96))),
        r"'layers/q/a': shape \(2, 8, 4\) in the checkpoint, \(2, 9, 4\) in what was given",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_tree_that_does_not_fit_is_refused_by_path_and_loaded_in_part(saved, case):
    make, message = MISFITS[case]
    like = make()
    with pytest.raises(AdapterError, match=f"does not fit: .*{message}.*strict=False"):
        restore(saved, like)
    found = restore(saved, like, strict=False)
    assert len(found.left_out) == 1
    assert_same(found.lora["mlp.up"], LORA["mlp.up"])
    assert set(found.lora) == set(LORA) - (set() if case == "extra site" else {"layers"})
    assert rl.factors.factors_of(found.lora, found.sites)  # they belong together
    paths = {site.path for site in SITES}
    assert {s.path for s in found.sites} == (
        paths if case == "extra site" else paths - {"layers/q"}
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 5}, "'layers/q': rank 4 in the checkpoint, 5 in what was given"),
        ({"axes": "ibo"}, "'layers/q': axes bio in the checkpoint, ibo in"),
        (
            {"scale": 2.0},
            r"'layers/q': scale 4 \(alpha 8\) in the checkpoint, scale 2 \(alpha 8\) in",
        ),
        ({"scale": None}, "'layers/q': scale 4.0 in the checkpoint, None in"),
        ({"path": "layers/k"}, "'layers/k': in what was given, not in the checkpoint; 'layers/q'"),
    ],
)
def test_sites_that_differ_are_refused_by_path(saved, fields, message):
    sites = replaced("layers/q", **fields)
    with pytest.raises(AdapterError, match=message):
        restore(saved, sites=sites)
    found = restore(saved, LORA, sites=sites, strict=False)
    assert_same(found.lora, LORA)
    assert found.left_out and tuple(found.sites) == sites
    assert "layers" not in restore(saved, sites=sites, strict=False).lora


def test_several_misfits_are_named_at_once_and_then_counted(tmp_path):
    sites = [
        rl.Site(f"w{k}", "io", (2, 2), "float32", rank=1, alpha=1.0, scale=1.0) for k in range(9)
    ]
    save(tmp_path / "x", factors(sites), sites, rl.LoraConfig(1, 1.0))
    wide = [dataclasses.replace(site, rank=2, scale=2**-0.5) for site in sites]
    like = factors(wide)
    with pytest.raises(AdapterError, match=r"'w0': rank 1 .*'w5': rank 1 .*; and 3 more\. Restore"):
        restore(tmp_path / "x", like)
    with pytest.raises(AdapterError, match=r"Nothing of .* fits: 'w0': rank 1"):
        restore(tmp_path / "x", like, strict=False)


def test_another_base_is_refused_by_path_with_both_values(saved):
    base = {**BASE, "layers": {"q": np.zeros((2, 8, 96), np.float32)}}
    left, right = (fingerprint(tree).leaves[0].content for tree in (BASE, base))
    message = f"another base: 'layers/q': content {left} in the saved base, {right} in the given"
    with pytest.raises(AdapterError, match=f"{message}.* computes something else"):
        restore(saved, rl.LoraParams(base, LORA))
    found = restore(saved, rl.LoraParams(base, LORA), strict=False)
    assert len(found.left_out) == 1 and message in found.left_out[0]
    assert_same(found.lora, LORA)


def test_of_an_abstract_base_shapes_are_compared(saved):
    struct = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BASE)
    restore(saved, rl.LoraParams(struct, LORA))
    struct["layers"]["q"] = jax.ShapeDtypeStruct((2, 9, 96), jnp.float32)
    with pytest.raises(AdapterError, match=r"'layers/q': shape \(2, 8, 96\).*\(2, 9, 96\) in"):
        restore(saved, rl.LoraParams(struct, LORA))


def test_no_adapters_and_other_trees_are_refused(saved, tmp_path):
    with pytest.raises(AdapterError, match="Adapters were to be saved, found none"):
        save(tmp_path / "x", {}, SITES, CONFIG)
    with pytest.raises(AdapterError, match="found list"):
        save(tmp_path / "x", [1], SITES, CONFIG)
    with pytest.raises(AdapterError, match="found a ShapeDtypeStruct"):
        structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), LORA)
        save(tmp_path / "x", structs, SITES, CONFIG)
    with pytest.raises(AdapterError, match="found int"):
        restore(saved, 3)
    with pytest.raises(AdapterError, match="two of one path"):
        restore(saved, sites=(*SITES, SITES[0]))
    assert list(tmp_path.iterdir()) == []


def test_a_scale_that_is_not_the_configs_is_not_saved(tmp_path):
    sites = replaced("layers/q", scale=1.0)
    with pytest.raises(AdapterError, match=r"'layers/q'\) has scale 1; alpha 8 and rank 4 give 4"):
        save(tmp_path / "x", LORA, sites, CONFIG)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_factors_that_are_not_finite_are_neither_saved_nor_restored(tmp_path, bad):
    lora = factors()
    lora["layers"]["q"]["b"] = lora["layers"]["q"]["b"].at[1, 2, 3].set(bad)
    with pytest.raises(AdapterError, match="found NaN or infinity in layers/q/b"):
        save(tmp_path / "x", lora, SITES, CONFIG)
    arrays = {f"{s.path}/{n}": rl_get(lora, s.path)[n] for s in SITES for n in "ab"}
    record = Record(CONFIG, SITES, fingerprint(arrays))
    storage.write(tmp_path / "x", arrays, record, overwrite=False)
    with pytest.raises(AdapterError, match="to be restored, found NaN or infinity in layers/q/b"):
        restore(tmp_path / "x")


def rl_get(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


# The record.


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"x": (1, 2)}, r"extra\['x'\] is a tuple"),
        ({"x": {"y": [0, np.float32(1)]}}, r"extra\['x'\]\['y'\]\[1\] is a float32"),
        ({"x": float("nan")}, r"extra\['x'\] is nan"),
        ({"x": jnp.ones(2)}, r"extra\['x'\] is a ArrayImpl"),
        ({"x": {3: 1}}, r"The keys of extra\['x'\] must be text, found 3"),
        ({3: 1}, "The keys of extra must be text, found 3"),
        ({"x": 2**63}, r"extra\['x'\] is a int"),
        ([1], "extra must be a dict"),
    ],
)
def test_extra_values_that_json_would_change_are_refused_by_key(tmp_path, extra, message):
    with pytest.raises(AdapterError, match=message):
        save(tmp_path / "x", LORA, SITES, CONFIG, extra=extra)


def test_nested_extra_values_end_somewhere(tmp_path):
    extra = []
    extra.append(extra)
    with pytest.raises(AdapterError, match="nested deeper than 50"):
        save(tmp_path / "x", LORA, SITES, CONFIG, extra={"x": extra})


@pytest.mark.parametrize("step", [-1, 1.5, True, None])
def test_a_step_is_a_count(tmp_path, step):
    with pytest.raises(AdapterError, match="step must be an int of at least 0"):
        save(tmp_path / "x", LORA, SITES, CONFIG, step=step)


def test_a_record_comes_back_from_its_text(saved):
    record = read_record(saved)
    again = Record.from_json(record.to_json())
    assert again == record and again.to_json() == record.to_json()


CHANGES = {
    "format": (lambda d: d.update(format=99, library="7.1"), "format 99, written by .* '7.1'"),
    "kind": (lambda d: d.update(kind="x"), "has the kind 'rslora_jax.adapters', found"),
    "missing": (lambda d: d.pop("total"), "has the keys"),
    "unknown": (lambda d: d.update(more=1), "has the keys"),
    "step": (lambda d: d.update(step=-1), "'step' of 0 or more, found -1"),
    "bool step": (lambda d: d.update(step=True), "a whole number for 'step', found True"),
    "config": (lambda d: d["config"].update(rank=0), "LoraConfig.rank must be"),
    "config key": (lambda d: d["config"].update(more=0), "Unknown keys"),
    "config kind": (lambda d: d.update(config=[]), "read from a mapping"),
    "sites": (lambda d: d.update(sites={}), "a list for 'sites'"),
    "site": (lambda d: d["sites"].__setitem__(0, 3), "Site 0 of the record has the keys"),
    "site key": (lambda d: d["sites"][0].pop("uses"), "Site 0 of the record has the keys"),
    "path": (lambda d: d["sites"][0].update(path=3), "text for 'path', found 3"),
    "no path": (lambda d: d["sites"][0].update(path=""), "needs a path"),
    "axes": (lambda d: d["sites"][0].update(axes="bix"), "axes of b, i and o"),
    "short axes": (lambda d: d["sites"][0].update(axes="io"), "has axes 'io' and shape"),
    "shape": (lambda d: d["sites"][0].update(shape=[2, 8, 0]), "has axes 'bio' and shape"),
    "dtype": (lambda d: d["sites"][0].update(dtype="float33"), "unknown dtype 'float33'"),
    "rank": (lambda d: d["sites"][0].update(rank=0), "'rank' of 1 or more, found 0"),
    "rank kind": (lambda d: d["sites"][0].update(rank=4.0), "whole number for 'rank'"),
    "alpha": (lambda d: d["sites"][0].update(alpha=-1.0), "'alpha' of 0 or more, found -1"),
    "alpha text": (lambda d: d["sites"][0].update(alpha="8"), "a number for 'alpha', found '8'"),
    "scale": (lambda d: d["sites"][0].update(scale=4.001), "has scale 4.001; .* give 4 under"),
    "head": (lambda d: d["sites"][0].update(head=1), "true or false for 'head', found 1"),
    "use": (lambda d: d["sites"][0].update(uses=[{}]), "A use in Site 0"),
    "twice": (lambda d: d["sites"].append(d["sites"][0]), "'layers/q' twice"),
    "inside": (
        lambda d: d["sites"].append({**d["sites"][0], "path": "layers/q/a"}),
        "'layers/q/a' twice, or inside",
    ),
    "factors": (lambda d: d["sites"].pop(), "do not fit its sites: 'mlp/up.~/w/a'"),
    "no factors": (lambda d: d.update(lora=None), "A fingerprint has a digest"),
    "base": (lambda d: d.update(base=3), "A fingerprint has a digest"),
    "extra": (lambda d: d.update(extra=[]), "extra must be a dict"),
    "library": (lambda d: d.update(library=3), "text for 'library', found 3"),
    "list": (lambda d: d.clear(), "has the kind"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_with_a_wrong_value_is_refused(saved, change):
    apply, message = CHANGES[change]
    data = json.loads(read_record(saved).to_json())
    apply(data)
    with pytest.raises(AdapterError, match=f"checksum|{message}"):
        Record.from_json(json.dumps(data))  # the checksum tells
    data.pop("checksum", None)
    data["checksum"] = checksum(data)
    with pytest.raises(AdapterError, match=message):
        Record.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}', "3", "null", "\ud800"]
)
def test_text_that_is_no_record_is_refused(text):
    with pytest.raises(AdapterError, match=r"is not JSON|has the kind"):
        Record.from_json(text)


def test_every_flipped_bit_of_a_record_is_found(saved):
    record = read_record(saved)
    text = record.to_json().encode()
    rng = random.Random(0)
    for _ in range(400):
        data = bytearray(text)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(7)
        with pytest.raises(AdapterError):
            assert Record.from_json(data.decode()) != record


# What is on the disk.


def test_a_target_that_exists_is_refused_and_overwritten_on_request(tmp_path):
    path = tmp_path / "x"
    save(path, LORA, SITES, CONFIG)
    with pytest.raises(AdapterError, match=r"which exists.*overwrite=True"):
        save(path, LORA, SITES, CONFIG, step=1)
    save(path, factors(seed=1), SITES, CONFIG, step=2, overwrite=True)
    found = restore(path)
    assert found.step == 2
    assert_same(found.lora, factors(seed=1))
    assert [child.name for child in tmp_path.iterdir()] == ["x"]


def in_another_process(folder):
    """What must not happen in pytest's process, where late callbacks of TensorStore are errors."""
    assert not any(name.startswith("orbax") for name in sys.modules), "orbax was imported"
    results = {
        "full": [fill_disk(Path(folder, "full"), limit) for limit in (0, 300, 2000)],
        "points": [stop_at(Path(folder, point), point) for point in POINTS],
        "damage": damage_files(Path(folder, "damage")),
    }
    print(json.dumps(results))


def test_missing_folders_around_a_target_are_made(tmp_path):
    save(tmp_path / "new" / "folder" / "x", LORA, SITES, CONFIG)
    assert_same(restore(tmp_path / "new" / "folder" / "x").lora, LORA)


def test_a_target_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match=r"to be saved to .*/file, which is a file"):
        save(tmp_path / "file", LORA, SITES, CONFIG, overwrite=True)
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    code = "import sys, test_checkpoint; test_checkpoint.in_another_process(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path_factory.mktemp("elsewhere"))],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def try_to_save(folder):
    """What is said about a save that fails."""
    try:
        save(folder / "x", factors(seed=1), SITES, CONFIG, step=1, overwrite=True)
        said = "saved"
    except OSError as error:
        said = f"{error.errno} {error}"
    return said


def outcome(folder, said):
    """That, and what is there afterwards: the checkpoint before it, bit by bit."""
    found = restore(folder / "x")
    assert_same(found.lora, LORA)
    return [said, found.step, [child.name for child in folder.iterdir()]]


def fill_disk(folder, limit):
    folder.mkdir(exist_ok=True)
    save(folder / "x", LORA, SITES, CONFIG, overwrite=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    said = try_to_save(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return outcome(folder, said)


def stop_at(folder, point):
    """Saves over a checkpoint while one function of the operating system fails."""
    folder.mkdir()
    save(folder / "x", LORA, SITES, CONFIG)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(POINTS[point], point, full)
        said = try_to_save(folder)
    return outcome(folder, said)


POINTS = {"mkdir": os, "open": builtins, "rename": os, "fsync": os, "iterdir": Path}


def damage_files(folder):
    """Bits flipped, bytes zeroed, files cut and removed, 200 times."""
    folder.mkdir()
    path = folder / "x"
    save(path, PARAMS, SITES, CONFIG, step=7, extra={"seed": 3})
    wanted, record = restore(path), read_record(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert any(file.stat().st_size > 2500 for file in files)  # arrays of their own
    rng = random.Random(0)
    refused = set()
    for trial in range(200):
        file = files[trial % len(files)]
        content = file.read_bytes()
        damage(file, content, rng)
        try:
            found = restore(path)
            assert_same(found.lora, wanted.lora)
            assert found[1:] == wanted[1:] and read_record(path) == record
        except AdapterError as error:
            assert str(path) in str(error)
            refused.add(str(file.relative_to(path)))
        file.write_bytes(content)
    assert_same(restore(path).lora, LORA)
    return sorted(refused)


def damage(file, content, rng):
    data, place = bytearray(content), rng.randrange(len(content))
    kind = rng.choice(["flip", "flip", "zero", "cut", "gone"])
    if kind == "gone":
        return file.unlink()
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        data[place : place + 16] = bytes(len(data[place : place + 16]))
    file.write_bytes(data[:place] if kind == "cut" else data)
    return None


def test_on_a_full_disk_the_old_checkpoint_stays(elsewhere):
    assert len(elsewhere["full"]) == 3
    for said, step, names in elsewhere["full"]:
        assert (step, names) == (0, ["x"])
        assert said.startswith(f"{errno.EFBIG} ") and "unchanged" in said
        assert "File too large" in said


def test_the_old_checkpoint_stays_wherever_the_new_one_fails(elsewhere):
    assert len(elsewhere["points"]) == len(POINTS)
    for said, step, names in elsewhere["points"]:
        assert (step, names) == (0, ["x"])
        assert said.startswith(f"{errno.ENOSPC} ") and "No space left on device" in said


def test_damaged_files_are_errors_or_make_no_difference(elsewhere):
    """Of 200 damages none gave a wrong array or record, or another error."""
    assert "record/metadata" in elsewhere["damage"] and "lora/_METADATA" in elsewhere["damage"]
    arrays = [name for name in elsewhere["damage"] if "ocdbt.process_0/d/" in name]
    assert arrays  # not in Orbax's tables alone


def test_arrays_of_another_checkpoint_are_found_out(saved, tmp_path):
    path = tmp_path / "x"
    save(path, factors(seed=1), SITES, CONFIG)
    shutil.rmtree(path / "lora")
    shutil.copytree(saved / "lora", path / "lora")
    with pytest.raises(AdapterError, match=r"damaged: its arrays .*'layers/q/a': content"):
        restore(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("x"), "which is a file"),
        (lambda path: path.mkdir(), r"no checkpoint of adapters. It holds \[\]"),
        (lambda path: (path / "step_3" / "record").mkdir(parents=True), "Did you mean .*/step_3"),
        (lambda path: (path / "lora").mkdir(parents=True), "lacks 'record': it is incomplete"),
        (lambda path: (path / "record").mkdir(parents=True), "lacks 'lora': it is incomplete"),
        (
            lambda path: [path.mkdir(), (path / "adapter_config.json").write_text("{}")],
            "a Hugging Face PEFT folder: `rl.peft.load`",
        ),
        (
            lambda path: [(path / name).mkdir(parents=True) for name in ("lora", "record")],
            "record of .* cannot be read",
        ),
    ],
)
def test_other_folders_are_refused_with_what_they_are(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(AdapterError, match=message):
        restore(tmp_path / "x")


def test_a_save_that_was_cut_short_is_not_restored(saved, tmp_path):
    path = tmp_path / "x.orbax-checkpoint-tmp"
    shutil.copytree(saved, path)
    with pytest.raises(AdapterError, match="a save that was cut short"):
        restore(path)
    with pytest.raises(AdapterError, match=r"Beside it there are \['x.orbax-checkpoint-tmp'\]"):
        restore(tmp_path / "x")


def test_what_may_not_be_read_is_an_error(saved, monkeypatch):
    def forbidden(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(AdapterError, match=r"record of .* cannot be read: .*Permission denied"):
        restore(saved)
    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(AdapterError, match=r"which cannot be read: .*Permission denied"):
        restore(saved)
