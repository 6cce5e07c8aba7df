"""The commands on adapters: what they show and write, and what they refuse in one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rslora_jax as rl
from rslora_jax import cli
from rslora_jax.peft.exporting import hf_tensors

RULES = [
    {"path": r"blocks/(up|down)", "tensor": r"model.layers.{0}.mlp.\1.weight", "axes": "bio"},
    {"path": "head", "tensor": "lm_head.weight", "axes": "io"},
]
NAMES = rl.peft.names([tuple(rule.values()) for rule in RULES])


def model(params, x):
    def layer(x, block):
        return x + jnp.tanh(x @ block["up"]) @ block["down"], None

    return jax.lax.scan(layer, x, params["blocks"])[0] @ params["head"]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASE = {"blocks": {"up": draw(2, 6, 9), "down": draw(2, 9, 6)}, "head": draw(6, 5)}


@pytest.fixture(scope="module")
def adapters():
    """Two adapters of one base: (params, sites, config)."""
    made = []
    for seed, scaling, rank in ((1, "rslora", 4), (2, "lora", 3)):
        config = rl.LoraConfig(
            rank, 5.0, scaling=scaling, rules=(rl.Rule("blocks/down", rank=2, alpha=3.5),)
        )
        key = jax.random.key(seed)
        params, _, sites = rl.adapt(model, BASE, jnp.ones((2, 6)), config=config, key=key)
        lora = jax.tree.map(lambda x, s=seed: jnp.asarray(draw(*x.shape, seed=s)), params.lora)
        made.append((rl.LoraParams(BASE, lora), sites, config))
    return made


@pytest.fixture
def folders(adapters, tmp_path):
    """The same in folders: the base, two Orbax adapters, and the first one as PEFT's."""
    (tmp_path / "names.json").write_text(json.dumps(RULES))
    (tmp_path / "base").mkdir()
    save_file(dict(hf_tensors(BASE, (), NAMES)), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "toy"}')
    for name, (params, sites, config) in zip(("one", "two"), adapters, strict=True):
        rl.checkpoint.save(tmp_path / name, params, sites, config, step=7)
    params, sites, _ = adapters[0]
    rl.peft.save(tmp_path / "theirs", params.lora, sites, NAMES)
    return tmp_path


def run(folders, *arguments):
    """Runs a command with the folders' names in place of bare words."""
    here = {path.name for path in folders.iterdir()} | {"out"}
    return cli.main([str(folders / each) if each in here else each for each in arguments])


def assert_same_function(found, adapter, weight=1.0):
    params, sites, _ = adapter
    got = rl.merge(rl.LoraParams(BASE, found.lora), found.sites)
    want = rl.merge(params, sites)
    for one, two, base in zip(*map(jax.tree.leaves, (got, want, BASE)), strict=True):
        np.testing.assert_allclose(one - base, weight * (two - base), rtol=0, atol=2e-4)


def rows(text):
    header, *lines = [line.split(",") for line in text.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_inspect_shows_every_site_of_an_orbax_folder(adapters, folders, capsys):
    assert run(folders, "inspect", "one", "--csv", str(folders / "t.csv")) == 0
    out, err = capsys.readouterr()
    assert "orbax, scaling rslora, 2 sites, 180 parameters, step 7, base " in out and err == ""
    params, sites, _ = adapters[0]
    found = rows((folders / "t.csv").read_text())
    assert [row["site"] for row in found] == ["blocks/down", "blocks/up"]
    for row, site in zip(found, sites, strict=True):
        factors = params.lora["blocks"][site.path.split("/")[1]]
        change = site.scale * np.einsum("bir,bro->bio", factors["a"], factors["b"])
        s = np.linalg.svd(change, compute_uv=False)
        assert float(row["scale"]) == pytest.approx(rl.scale(site.alpha, site.rank))
        assert float(row["norm"]) == pytest.approx(np.sqrt((s**2).sum(-1)).max(), rel=1e-4)
        stable = ((s**2).sum(-1) / s[:, 0] ** 2).mean()
        assert float(row["stable_rank"]) == pytest.approx(stable, rel=1e-4)


def test_inspect_shows_every_module_of_a_peft_folder_or_puts_them_together(folders, capsys):
    assert run(folders, "inspect", "theirs") == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.up.weight" in out
    assert "peft, scaling rslora, 4 sites, 180 parameters\n" in out
    assert run(folders, "inspect", "theirs", "--names", "names.json") == 0
    out = capsys.readouterr().out
    assert "blocks/up" in out and "peft, scaling rslora, 2 sites, 180 parameters\n" in out


def test_inspect_of_a_run_shows_its_newest_step(adapters, folders, capsys):
    params, sites, config = adapters[0]
    state = rl.checkpoint.RunState(params.lora, (), 0, jax.random.key(0))
    with rl.checkpoint.Runs(folders / "run", sites, config, base=BASE) as runs:
        for step in (9, 10):
            runs.save(state._replace(step=step))
    assert run(folders, "inspect", "run") == 0
    assert "2 sites, 180 parameters, step 10" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["peft", "peft-portable"])
def test_convert_there_and_back_keeps_the_function(adapters, folders, to, capsys):
    names = ("--names", "names.json")
    assert run(folders, "convert", "one", "out", "--to", to, *names) == 0
    settings = json.loads((folders / "out" / "adapter_config.json").read_text())
    assert settings["use_rslora"] is (to == "peft")
    assert settings["rank_pattern"] == {} or to == "peft"
    assert run(folders, "convert", "out", str(folders / "back"), "--to", "orbax", *names) == 0
    assert_same_function(rl.checkpoint.restore(folders / "back"), adapters[0])
    assert "written: " in capsys.readouterr().out


def test_convert_to_orbax_keeps_step_and_base(folders):
    assert run(folders, "convert", "one", "out", "--to", "orbax") == 0
    record = rl.checkpoint.read_record(folders / "out")
    assert record.step == 7 and record.base == rl.checkpoint.fingerprint(BASE)


@pytest.mark.parametrize("kind", ["one", "theirs"])
def test_merge_writes_the_merged_weights_of_both_kinds_of_adapters(adapters, folders, kind):
    assert run(folders, "merge", "base", kind, "out", "--names", "names.json") == 0
    params, sites, _ = adapters[0]
    found = load_file(folders / "out" / "model.safetensors")
    wanted = dict(hf_tensors(params, sites, NAMES))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=2e-5)
    assert json.loads((folders / "out" / "config.json").read_text()) == {"model_type": "toy"}


def test_merge_refuses_another_base_unless_any_will_do(folders, capsys):
    tensors = load_file(folders / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.up.weight"][0, 0] += 1
    save_file(tensors, folders / "base" / "model.safetensors")
    arguments = ("merge", "base", "one", "out", "--names", "names.json")
    assert run(folders, *arguments) == 2
    err = capsys.readouterr().err
    assert "trained on another base: the weight at 'blocks/up'" in err and err.count("\n") == 1
    assert not (folders / "out").exists()
    assert run(folders, *arguments, "--any-base") == 0


def test_combine_adds_and_cuts_and_says_what_it_lost(adapters, folders, capsys):
    weights = ("--weights", "1.0", "-0.5")
    assert run(folders, "combine", "out", "one", "two", *weights) == 0
    found = rl.checkpoint.restore(folders / "out")
    assert [site.rank for site in found.sites] == [4, 7]
    assert rl.checkpoint.read_record(folders / "out").base == rl.checkpoint.fingerprint(BASE)
    exact = rl.algebra.combine(
        [(p.lora, s, w) for (p, s, _), w in zip(adapters, (1.0, -0.5), strict=True)]
    )
    assert_same_function(found, (rl.LoraParams(BASE, exact.lora), exact.sites, None))
    capsys.readouterr()
    assert run(folders, "combine", "out", "one", "two", "--rank", "2", "--overwrite") == 0
    out = capsys.readouterr().out
    assert "What the rank cuts off" in out and "blocks/up" in out
    assert {site.rank for site in rl.checkpoint.restore(folders / "out").sites} == {2}


def test_combine_of_one_adapter_is_the_same_adapter(adapters, folders):
    assert run(folders, "combine", "out", "theirs", "--names", "names.json", "--to", "peft") == 0
    one, two = (load_file(folders / f / "adapter_model.safetensors") for f in ("theirs", "out"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, two[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "found no folder nowhere"),
        (["inspect", "base"], "base"),
        (["convert", "one", "theirs", "--to", "orbax"], "exists already and is left as it is"),
        (["merge", "base", "one", "theirs"], "Pass --overwrite to replace it"),
        (["combine", "theirs", "one"], "choose another folder"),
        (["convert", "one", "out", "--to", "peft", "--names", "lama"], "found 'lama'"),
        (["convert", "one", "out", "--to", "peft"], "No name matches the path 'blocks/down'"),
        (["combine", "out", "one", "--weights", "1", "2"], "found 1 adapters and 2 weights"),
        (["combine", "out", "one", "--rank", "0"], "rank must be an int of at least 1"),
        (["merge", "base", "one", "out", "--max-shard-gb", "0"], "must be above 0"),
        (["merge", "nowhere", "theirs", "out"], "nowhere"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(folders, arguments, message, capsys):
    before = sorted(path for path in folders.rglob("*"))
    assert run(folders, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert sorted(path for path in folders.rglob("*")) == before


def test_a_pickle_is_refused(folders, capsys):
    (folders / "theirs" / "adapter_model.safetensors").unlink()
    (folders / "theirs" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert run(folders, "inspect", "theirs") == 2
    err = capsys.readouterr().err
    assert "pickle" in err and err.count("\n") == 1


def test_adapters_of_different_bases_are_not_combined(adapters, folders, capsys):
    params, sites, config = adapters[1]
    other = {**BASE, "head": BASE["head"] + 1}
    rl.checkpoint.save(folders / "three", params._replace(base=other), sites, config)
    assert run(folders, "combine", "out", "one", "three") == 2
    err = capsys.readouterr().err
    assert "trained on different bases" in err and "'head'" in err


def peft_folder(path, name, *, tensors=None, **settings):
    """A folder of one module, as PEFT writes it."""
    arrays = {
        f"base_model.model.{name}.lora_A.weight": draw(2, 6),
        f"base_model.model.{name}.lora_B.weight": draw(5, 2),
        **(tensors or {}),
    }
    path.mkdir()
    save_file(arrays, path / "adapter_model.safetensors", metadata={"format": "pt"})
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [name], **settings}
    (path / "adapter_config.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("held", "settings", "name"),
    [
        ("lm_head.lora_B.bias", {"lora_bias": True}, "lm_head.lora_B.bias"),
        ("norm.weight", {"modules_to_save": ["norm"]}, "norm.weight"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "combine"])
def test_what_only_a_model_can_take_is_not_dropped(folders, command, held, settings, name, capsys):
    extra = {f"base_model.model.{held}": draw(5)}
    peft_folder(folders / "holds", "lm_head", tensors=extra, **settings)
    order = ("holds", "out") if command == "convert" else ("out", "holds")
    assert run(folders, command, *order, "--to", "peft-portable", "--names", "names.json") == 2
    err = capsys.readouterr().err
    assert f"also holds {name!r}" in err and "rslora merge" in err and err.count("\n") == 1
    assert not (folders / "out").exists()
    assert run(folders, "inspect", "holds") == 0
    assert f"beside them 1 tensors of the base: {name}" in capsys.readouterr().out


def test_what_a_peft_folder_says_of_its_model_is_kept_on_the_way(folders):
    told = {"base_model_name_or_path": "some/model", "task_type": "SEQ_CLS"}
    peft_folder(folders / "told", "lm_head", **told)
    names = ("--names", "names.json")
    assert run(folders, "convert", "told", "out", "--to", "orbax", *names) == 0
    back = folders / "back"
    assert run(folders, "convert", "out", str(back), "--to", "peft-portable", *names) == 0
    settings = json.loads((back / "adapter_config.json").read_text())
    assert {name: settings[name] for name in told} == told


@pytest.mark.parametrize(
    "arguments",
    [
        ["combine", "work", "work/a", "work/b", "--overwrite"],
        ["convert", "work/a", "work", "--to", "orbax", "--overwrite"],
        ["merge", "base", "work/a", "work", "--overwrite"],
    ],
)
def test_an_output_that_holds_its_source_is_refused(adapters, folders, arguments, capsys):
    (folders / "work").mkdir()
    for name, (params, sites, config) in zip("ab", adapters, strict=True):
        rl.checkpoint.save(folders / "work" / name, params, sites, config)
    there = [str(folders / each) if "work" in each else each for each in arguments]
    assert run(folders, *there) == 2
    assert "which is read and would be replaced" in capsys.readouterr().err
    assert sorted(path.name for path in (folders / "work").iterdir()) == ["a", "b"]


def test_overwrite_replaces_adapters_and_models_alone(folders, capsys):
    (folders / "thesis").mkdir()
    (folders / "thesis" / "notes.txt").write_text("mine")
    where = str(folders / "thesis")
    assert run(folders, "convert", "one", where, "--to", "orbax", "--overwrite") == 2
    assert "is no adapter and no model, but holds ['notes.txt']" in capsys.readouterr().err
    assert (folders / "thesis" / "notes.txt").read_text() == "mine"
    assert run(folders, "convert", "one", "two", "--to", "orbax", "--overwrite") == 0


def test_adapters_of_differently_named_trees_are_not_combined(adapters, folders, capsys):
    other = json.dumps([{**rule, "path": f"(?:params/)?{rule['path']}"} for rule in RULES])
    (folders / "names.json").write_text(other)
    params, sites, config = adapters[0]
    moved = [rl.Site(**{**vars(s), "path": f"params/{s.path}", "rule": ""}) for s in sites]
    config = rl.algebra.combine([(params.lora, sites, 1.0)]).config
    lora = {"params": params.lora}
    rl.checkpoint.save(folders / "moved", lora, moved, config)
    assert run(folders, "combine", "out", "one", "moved", "--names", "names.json") == 2
    err = capsys.readouterr().err
    assert "'params/blocks/down'" in err and "differently named trees" in err


def test_factors_in_bfloat16_are_not_rounded_again_when_they_are_merged(adapters, folders):
    params, sites, config = adapters[0]
    lora = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.lora)
    rl.checkpoint.save(folders / "half", params._replace(lora=lora), sites, config)
    assert run(folders, "merge", "base", "half", "out", "--names", "names.json") == 0
    found = load_file(folders / "out" / "model.safetensors")
    for name, tensor in hf_tensors(rl.LoraParams(BASE, lora), sites, NAMES):
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=2e-5)


def test_another_head_than_the_adapter_was_trained_beside_is_another_base(folders, capsys):
    tensors = load_file(folders / "base" / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, folders / "base" / "model.safetensors")
    assert run(folders, "merge", "base", "one", "out", "--names", "names.json") == 2
    assert "the weight at 'head'" in capsys.readouterr().err
