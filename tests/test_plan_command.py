"""`rslora plan` and what it plans: the steps, the advice, the output."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rslora_jax import cli
from rslora_jax.commands import plan as command
from rslora_jax.paths import AdapterError, flatten
from rslora_jax.plan import advice, llama, training
from rslora_jax.plan.layout import Layout
from rslora_jax.plan.models import find_model
from rslora_jax.plan.report import Plan
from rslora_jax.plan.sizes import Model
from rslora_jax.plan.topologies import abstract_mesh
from tests.quick import compiled

TINY = Model("tiny", 256, 128, 256, 2, 4, 2, 32)
MESH = {"fsdp": 2, "tensor": 2}
RUN = training.Run(TINY, MESH, 4, 64)
GIB = 2**30


@pytest.fixture
def config(tmp_path):
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **counts}))
    return folder


def reckoned(need, seconds=1.0, **changes):
    """A plan of `need` GiB on a chip of 16."""
    fits = need <= 16
    made = Plan("LoRA r=8", "v5e:2x2", 1, dict(MESH), fits, int(need * GIB), 16 * GIB, {"base": 0})
    told = {"seconds": {"compute": seconds}, "flops": 1e12} if fits else {}
    return dataclasses.replace(made, **told, **changes)


def run_command(*arguments):
    return cli.main(["plan", *map(str, arguments)])


def sizes(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


# The command, with the real compiler.


def test_a_small_model_is_planned_for_v5e(config, tmp_path, capsys):
    file = tmp_path / "new" / "plan.json"
    flags = ["--model", config, "--mesh", "fsdp=2,tensor=2", "--topology", "v5e:2x2"]
    flags += ["--batch", 4, "--length", 64, "--rank", 8, "--no-frozen", "--remat", "none"]
    assert run_command(*flags, "--json", file, "--no-cache") == 0
    out, err = capsys.readouterr()
    assert out.startswith("tiny on v5e:2x2 as fsdp=2,tensor=2, for each device\n")
    assert "LoRA r=8 fits: it needs 0.0" in out and err == ""
    told = json.loads(file.read_text())
    (found,) = told["plans"]
    assert found["fits"] and found["memory"]["aliased"] > 0
    matrices = TINY.parameters - 5 * TINY.width  # the norms are on every chip
    assert found["arguments"]["base"] == 2 * (matrices // 4 + 5 * TINY.width)
    assert found["arguments"]["optimizer"] == 2 * found["arguments"]["lora"] + 4
    # The loss, the gradient of the activations, and the head a second time: 2 FLOPs a weight.
    head, tokens = TINY.vocab * TINY.width, 4 * 64 // 4
    least = 2 * tokens * (2 * (matrices - 2 * head) + 3 * head)
    assert least < found["flops"] < 1.6 * least
    assert {each["kind"] for each in found["collectives"]} >= {"all-gather"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "fsdp=32,tensor"], "--mesh is a size for each axis, such as fsdp=32,tensor=8"),
        (["--mesh", "fsdp=2,fsdp=2"], "--mesh is a size for each axis"),
        (["--mesh", "fsdp=2,model=2"], "an axis 'model', and a planned Llama is split over data"),
        (["--mesh", "fsdp=4", "--batch", "6"], "The batch is 6, which the mesh axes fsdp=4 do not"),
        (["--mesh", "sequence=4", "--length", "6"], "The length is 6, which the mesh axes seq"),
        (["--mesh", "fsdp=4", "--no-frozen", "--rank"], "There is nothing to plan"),
        (["--mesh", "fsdp=4", "--rank", "0"], "LoraConfig.rank must be an int of at least 1"),
        (["--mesh", "fsdp=4", "--batch", "0"], "The batch of a step is 0. Use at least 1"),
        (["--mesh", "fsdp=4", "--length", "0"], "The length of a step is 0. Use at least 1"),
        (["--mesh", "fsdp=4", "--json", "."], "--json is the file to write, and . is a folder"),
        (["--mesh", "fsdp=4", "--json", __file__ + "/a/b"], "b, but its folder cannot be made"),
        (["--mesh", "fsdp=3", "--batch", "3"], "The mesh fsdp=3 has 3 devices, but v5e:2x2 has 4"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(config, capsys, flags, message):
    assert run_command("--model", config, "--topology", "v5e:2x2", *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rslora: ") and err.count("\n") == 1
    assert message in err


def test_what_does_not_fit_is_said_with_the_change_that_does(config, tmp_path, capsys, monkeypatch):
    def compile_step(step, args, *, name, **kwargs):
        batch = args[-1][0].shape[0]
        asked.append(name)
        return reckoned(batch * (0.5 if name == "frozen base" else 2), batch, name=name)

    asked = []
    monkeypatch.setattr(command, "compile_step", compile_step)
    flags = ["--model", config, "--mesh", "fsdp=4", "--topology", "v5e:2x2", "--batch", 16]
    file = tmp_path / "plan.json"
    assert run_command(*flags, "--full", "--advise", "--rank", 4, 8, "--json", file) == 0
    out = capsys.readouterr().out
    assert "full does not fit: it needs 32.00 GiB and has 16.00, which is 16.00 too few." in out
    assert "full: the nearest change that fits is batch 8: 16.00 GiB." in out
    assert "LoRA r=4: what was tried, the best first" in out
    assert "LoRA r=4: the nearest change that fits is batch 8: 16.00 GiB." in out
    # The four that were asked for, five changes at r=4, and three each at r=8 and in full.
    assert out.count("The compiler was asked 5 times more.") == 1 and len(asked) == 4 + 5 + 3 + 3
    told = json.loads(file.read_text())
    assert [one["name"] for one in told["plans"]] == ["frozen base", "LoRA r=4", "LoRA r=8", "full"]
    assert told["advice"]["full"][0]["plan"]["need"] == 16 * GIB


# Advice, with a planner that reckons.


def test_what_fits_is_ranked_by_its_time_and_what_does_not_comes_last():
    def planner(what, run):
        if run.layout.remat == "dots":
            raise AdapterError("the compiler took too long")
        return reckoned(20 if run.layout.remat == "none" else 8, run.mesh["tensor"])

    tried = advice.advise(RUN, planner)
    assert [one.change for one in tried] == [
        "mesh fsdp=4,tensor=1",
        "as asked",
        "mesh fsdp=1,tensor=4",
        "remat none",
        "remat dots",
    ]
    assert tried[0].run.mesh == {"fsdp": 4, "tensor": 1}
    table = advice.ranking(tried)
    assert table.column("fits") == [
        "yes",
        "yes",
        "yes",
        "no",
        "refused: the compiler took too long",
    ]


def test_the_batch_that_fits_is_reckoned_before_it_is_compiled():
    run = training.Run(find_model("llama-3.1-8b"), {"fsdp": 4}, 64, 2048, Layout("dots"))
    asked = []

    def planner(what, run):
        asked.append(what)
        return reckoned(run.batch * (1.0 if run.layout.remat == "full" else 2.0))

    found = advice.nearest_fit(run, planner("as asked", run), planner)
    assert (found.change, found.plan.need) == ("batch 16, remat full", 16 * GIB)
    assert asked[1:3] == ["remat full", "mesh fsdp=2,tensor=2, remat full"] and len(asked) == 5


def test_copies_of_the_weights_are_split_before_anything_else_of_the_mesh():
    model = find_model("llama-3.2-1b")
    assert advice.meshes(training.Run(model, {"data": 4}, 8, 64)) == [
        {"fsdp": 4},
        {"fsdp": 2, "tensor": 2},
        {"fsdp": 1, "tensor": 4},
    ]
    found = advice.meshes(training.Run(model, {"data": 2, "tensor": 2}, 8, 64))
    assert list(found[0].items()) == [("fsdp", 2), ("tensor", 2)]
    assert {"data": 1, "fsdp": 4} not in advice.meshes(
        training.Run(model, {"data": 1, "fsdp": 4}, 8, 64)
    )


def test_less_is_recomputed_before_more():
    run = dataclasses.replace(RUN, layout=Layout("none"))

    def planner(what, run):
        return reckoned({"none": 20, "dots": 16, "full": 8}[run.layout.remat])

    assert advice.nearest_fit(run, planner("", run), planner).change == "remat dots"


@pytest.mark.parametrize(("have", "change"), [(10, "batch 8"), (7.9, "batch 4")])
def test_batches_are_the_multiples_that_the_mesh_divides(have, change):
    run = training.Run(dataclasses.replace(TINY, heads=3, kv_heads=3), {"fsdp": 4}, 12, 64)

    def planner(what, run):
        asked.append(what)
        return reckoned(run.batch, fits=run.batch <= have, have=int(have * GIB))

    asked = []
    assert advice.nearest_fit(run, planner("as asked", run), planner).change == change
    assert len(asked) == 2  # no mesh goes with three heads, and the batch is reckoned


def test_changes_that_the_mesh_does_not_divide_are_left_out():
    run = training.Run(TINY, {"fsdp": 2, "sequence": 2}, 2, 6)
    asked = []

    def planner(what, run):
        asked.append(run)
        return reckoned(99)

    assert advice.nearest_fit(run, reckoned(99), planner) is None
    assert {one.length for one in asked} == {6}


def test_when_nothing_fits_it_says_so():
    assert advice.nearest_fit(RUN, reckoned(99), lambda what, run: reckoned(99)) is None
    assert not any(one.fits for one in advice.advise(RUN, lambda what, run: reckoned(99)))


# The steps.


@pytest.mark.parametrize("variant", ["adapters", "full", "frozen"])
def test_a_step_returns_what_it_takes(variant):
    made = getattr(training, variant)(RUN, *([8] if variant == "adapters" else []))
    with jax.sharding.use_abstract_mesh(abstract_mesh(MESH)):
        found = jax.eval_shape(made.step, *made.args)
    *updated, loss = found if made.donate else (found[0],)
    assert sizes(updated) == sizes([made.args[k] for k in made.donate])
    assert (loss.shape, loss.dtype) == ((), jnp.float32)


def test_factors_lie_as_the_library_puts_them_and_moments_as_their_factors():
    made = training.adapters(RUN, 8)
    base, lora, (adam, *_), _ = made.args
    assert base["layers"]["mlp"]["down_proj"]["kernel"].sharding.spec == PartitionSpec(
        None, ("tensor",), ("fsdp",)
    )
    kept = [path for path in flatten(base).paths if "proj" in path]
    assert sorted({path.rpartition("/")[0] for path in flatten(lora).paths}) == sorted(kept)
    for moments in (adam.mu, adam.nu):
        assert sizes(moments) == sizes(lora)
        assert [leaf.sharding for leaf in jax.tree.leaves(moments)] == [
            leaf.sharding for leaf in jax.tree.leaves(lora)
        ]
    assert adam.count.sharding.spec == PartitionSpec()


def test_axes_that_the_mesh_lacks_are_left_off():
    made = training.frozen(training.Run(TINY, {"data": 4}, 4, 64))
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(made.args[0])} <= {
        PartitionSpec(*[None] * n) for n in range(4)
    }
    assert made.args[2][0].sharding.spec == PartitionSpec(("data",), None)


def test_on_a_mesh_the_loss_is_that_of_one_device():
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "sequence", "tensor"), (AxisType.Auto,) * 3)
    model = dataclasses.replace(TINY, kv_heads=1, layers=1)  # the key head must be repeated
    layout = Layout("full", block=4, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    structs = llama.structs(model, jnp.float32)
    base = jax.tree.map(lambda s: np.float32(rng.normal(0, 0.2, s.shape)), structs)
    tokens = rng.integers(0, model.vocab, (4, 16), np.int32)

    def graded(base):
        return jax.value_and_grad(lambda base: llama.loss(model, base, (tokens,) * 2, layout))(base)

    wanted = compiled(graded)(base)
    with jax.set_mesh(mesh):
        split = jax.device_put(base, NamedSharding(mesh, PartitionSpec()))
        found = compiled(graded)(split)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert math.isfinite(float(found[0]))
