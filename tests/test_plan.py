"""Plans: the TPU compiler asked for real on small steps, and everything that can go wrong."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError
from rslora_jax.plan import Plan, abstract_mesh, compare, compiling, exporting, plan
from rslora_jax.plan.exhaustion import exhausted
from rslora_jax.plan.exporting import export
from rslora_jax.plan.inputs import inputs

LAYERS, TOKENS, WIDTH, RANK = 4, 64, 256, 8
MESH = {"fsdp": 2, "tensor": 2}
SPECS = {"a": P(), "b": P(None, None, "tensor")}
GIB = 2**30


def train(params, x):
    def loss(lora):
        def layer(h, weights):
            w, a, b = weights
            return jnp.tanh(h @ w + (h @ a) @ b), None

        h, _ = jax.lax.scan(layer, x, (params.base, lora["a"], lora["b"]))
        return (h.astype(jnp.float32) ** 2).sum()

    grads = jax.grad(loss)(params.lora)
    lora = jax.tree.map(lambda p, g: p - 0.1 * g, params.lora, grads)
    return params._replace(lora=jax.lax.with_sharding_constraint(lora, SPECS))


def abstract(shape, spec=None, mesh=MESH, dtype=jnp.bfloat16):
    sharding = NamedSharding(abstract_mesh(mesh), spec or P())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def arguments():
    a = abstract((LAYERS, WIDTH, RANK), SPECS["a"])
    b = abstract((LAYERS, RANK, WIDTH), SPECS["b"])
    base = abstract((LAYERS, WIDTH, WIDTH), P(None, None, "tensor"))
    return LoraParams(base, {"a": a, "b": b}), abstract((TOKENS, WIDTH), P("fsdp"))


def outer(x):
    return jnp.sort(x[:, None] * x, axis=0) @ x


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def asked(folder):
    """Four questions to the compiler, two at a time: processes of their own side by side."""
    where = {"topology": "v5e:2x2", "mesh_shape": MESH, "cache": folder}

    def explicit(key, rate, w, x):
        y = jnp.einsum("ti,io->to", x, w, out_sharding=P("fsdp", "tensor"))
        return w - rate * jax.random.normal(key, w.shape, w.dtype), y

    key = jax.eval_shape(lambda: jax.random.key(0))
    sliced = {"data": 2, "fsdp": 2, "tensor": 2}
    questions = {
        "lora": lambda: plan(jax.jit(train, donate_argnums=0), arguments(), name="lora", **where),
        "short": lambda: plan(outer, (abstract((200_000,), dtype=jnp.float32),), **where),
        "explicit": lambda: plan(
            explicit,
            (key, 0.1, abstract((WIDTH, WIDTH)), abstract((TOKENS, WIDTH))),
            specs=(None, None, P(None, "tensor"), P("fsdp")),
            axis_types=AxisType.Explicit,
            **where,
        ),
        "slices": lambda: plan(
            lambda w, x: jax.grad(lambda w: (x @ w).sum())(w),
            (abstract((WIDTH, WIDTH)), abstract((TOKENS, WIDTH), P(("data", "fsdp")), sliced)),
            topology="v5e:2x2",
            num_slices=2,
            mesh_shape=sliced,
            cache=folder,
        ),
    }
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(question) for name, question in questions.items()}
        return {name: future.result() for name, future in futures.items()}


def test_a_small_step_fits_and_its_bytes_are_those_of_its_shards(asked):
    found = asked["lora"]
    assert found.fits and found.devices == 4
    assert found.arguments == {
        "base": LAYERS * WIDTH * WIDTH * 2 // 2,
        "lora": LAYERS * (WIDTH * RANK * 2 + RANK * WIDTH * 2 // 2),
        "x": TOKENS * WIDTH * 2 // 2,
    }
    assert found.memory["arguments"] == sum(found.arguments.values())
    assert found.gradients == found.arguments["lora"]


def test_the_peak_is_what_is_alive_at_once(asked):
    found = asked["lora"]
    said = found.memory
    assert said["aliased"] == found.arguments["base"] + found.arguments["lora"]
    parts = said["arguments"] + said["outputs"] + said["temporaries"] + said["code"]
    assert found.need == parts - said["aliased"]
    assert found.have == 15.75 * GIB
    assert found.spare == found.have - found.need > 0


def test_the_flops_are_those_of_a_frozen_base_with_factors(asked):
    # Forward and dx of the weight, forward, dx and gradients of the factors: design, issue 3.
    each = 4 * TOKENS * WIDTH * WIDTH + 6 * TOKENS * RANK * (WIDTH + WIDTH)
    assert asked["lora"].flops == LAYERS * each / 4


def test_the_roofline_names_the_longest_of_its_parts(asked):
    found = asked["lora"]
    assert found.unknown == ()
    assert found.seconds["compute"] == found.flops / 197e12
    assert found.seconds["memory"] == found.hbm_bytes / 819e9
    assert found.step_seconds == found.seconds[found.bound] == max(found.seconds.values())


def test_no_collective_moves_a_whole_weight(asked):
    kinds = {each.kind: each for each in asked["lora"].collectives}
    assert set(kinds) <= {"all-gather", "all-reduce", "reduce-scatter"}
    weight = WIDTH * WIDTH * 2
    assert all(each.bytes / each.count < weight for each in kinds.values())


def test_explicit_axes_typed_keys_numbers_and_specs_are_taken(asked):
    found = asked["explicit"]
    assert found.fits
    assert found.arguments["w"] == WIDTH * WIDTH * 2 // 2
    assert found.arguments["x"] == TOKENS * WIDTH * 2 // 2
    assert list(found.arguments) == ["key", "rate", "w", "x"]
    assert found.gradients is None


def test_several_slices_talk_over_the_network_between_them(asked):
    found = asked["slices"]
    assert (found.num_slices, found.devices) == (2, 8)
    assert found.seconds["dcn"] > 0
    assert compare([found]).column("topology") == ["2 x v5e:2x2"]


def test_running_out_of_memory_is_an_answer(asked):
    found = asked["short"]
    assert not found.fits
    assert found.have == 15.75 * GIB
    # Two arrays of 200,000 x 200,000 float32: the products, and their order.
    assert found.need == pytest.approx(2 * 4 * 200_000**2, rel=1e-3)
    assert found.spare < 0
    assert (found.flops, found.bound, found.memory) == (None, None, {})


def test_a_second_identical_plan_starts_no_process(asked, folder, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    step = jax.jit(train, donate_argnums=0)
    where = {"topology": "v5e:2x2", "mesh_shape": MESH, "cache": folder}
    again = plan(step, arguments(), name="lora", **where)
    assert again.cached and not asked["lora"].cached
    assert again.memory == asked["lora"].memory
    assert again.hlo == asked["lora"].hlo
    short = plan(outer, (abstract((200_000,), dtype=jnp.float32),), **where)
    assert (short.cached, short.need) == (True, asked["short"].need)


def test_a_shape_that_libtpu_refuses_is_a_message(tmp_path):
    message = "libtpu .* does not know v5e:3x3: .*The nearest known ones are 'v5e:"
    with pytest.raises(AdapterError, match=message):
        plan(jnp.sin, (1.0,), topology="v5e:3x3", mesh_shape={"x": 9}, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_plans_survive_json(asked):
    for found in asked.values():
        assert Plan.from_json(found.to_json()) == found
    assert "HloModule" in asked["lora"].hlo
    assert "HloModule" not in asked["lora"].to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is no JSON"),
        ("[]", "not one that this version wrote"),
        ('{"collectives": [], "unknown": [], "size": 1}', "not one that this version wrote"),
    ],
)
def test_text_that_is_no_plan_is_refused(text, message):
    with pytest.raises(AdapterError, match=message):
        Plan.from_json(text)


def test_tables_hold_what_the_plan_holds(asked):
    tables = asked["lora"].tables()
    assert list(tables) == ["memory", "cost", "collectives"]
    parts = dict(zip(tables["memory"].column("part"), tables["memory"].column("GiB"), strict=True))
    assert parts["base"] == asked["lora"].arguments["base"] / GIB
    assert parts["peak"] + parts["spare"] == parts["available"] == 15.75
    assert sum(tables["collectives"].column("count")) > 0
    assert list(asked["short"].tables()) == ["memory"]


def test_plans_stand_side_by_side(asked):
    table = compare([asked["lora"], asked["short"]])
    assert table.column("fits") == ["yes", "no"]
    assert table.column("lora GiB") == [asked["lora"].arguments["lora"] / GIB, None]
    assert table.column("step ms")[1] is None


# What the other process does when it does not compile.


def run_instead(monkeypatch, tmp_path, code):
    script = tmp_path / "child.py"
    script.write_text(f"import json, os, pathlib, subprocess, sys, time\n{code}\n")
    monkeypatch.setattr(compiling, "CHILD", script)
    return {"topology": "v5e:2x2", "mesh_shape": MESH, "cache": tmp_path / "cache"}


ANSWER = {
    "memory": dict.fromkeys(["arguments", "outputs", "aliased", "temporaries", "code"], 1),
    "seconds": 1.0,
    "hlo": "",
    "unread": "the fake has no text",
}
COUNTED = f"""
with open(pathlib.Path(__file__).with_name("starts"), "a") as file:
    file.write("x")
pathlib.Path(sys.argv[1], "answer.json").write_text({json.dumps(ANSWER)!r})
"""


def test_a_compiler_that_aborts_is_a_message(monkeypatch, tmp_path):
    words = "F0000 00:00:1.2 33 layout.cc:5] Check failed: x < y\\n*** Check failure stack trace:"
    where = run_instead(
        monkeypatch, tmp_path, f'os.write(2, b"{words}\\n    @ 0x7f\\n"); os.abort()'
    )
    message = r"was ended by signal 6: F0000 .*Check failed: x < y\. Try a smaller step"
    with pytest.raises(AdapterError, match=message):
        plan(jnp.sin, (1.0,), **where)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit(3)", "ended with code 3: it said nothing"),
        ("raise ImportError('no libtpu.so')", "ended with code 1: ImportError: no libtpu.so"),
    ],
)
def test_a_compiler_that_ends_without_an_answer_is_a_message(monkeypatch, tmp_path, code, message):
    with pytest.raises(AdapterError, match=message):
        plan(jnp.sin, (1.0,), **run_instead(monkeypatch, tmp_path, code))


def test_a_refusal_is_a_message_and_vmem_is_not_memory(monkeypatch, tmp_path):
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32M of 16M vmem."
    answer = json.dumps({"error": "JaxRuntimeError", "text": text})
    code = f"pathlib.Path(sys.argv[1], 'answer.json').write_text({answer!r})"
    with pytest.raises(AdapterError, match="refused the program for v5e:2x2: JaxRuntimeError: RES"):
        plan(jnp.sin, (1.0,), **run_instead(monkeypatch, tmp_path, code))


SLEEP = """
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pids = pathlib.Path(__file__).with_name("pids")
pids.with_suffix(".part").write_text(f"{os.getpid()} {inner.pid}")
pids.with_suffix(".part").rename(pids)
time.sleep(60)
"""


def ended(pid):
    """Whether a process is gone, or only its entry is left for init to collect."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition):
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_compiler_that_takes_too_long_is_ended_with_all_its_processes(monkeypatch, tmp_path):
    where = run_instead(monkeypatch, tmp_path, SLEEP)
    pids = tmp_path / "pids"
    clock = SimpleNamespace(monotonic=lambda: 900.0 * pids.exists())
    monkeypatch.setattr(compiling, "time", clock)
    with pytest.raises(AdapterError, match="was given 600 seconds and was not done"):
        plan(jnp.sin, (1.0,), time_limit=600.0, **where)
    assert wait_until(lambda: all(map(ended, pids.read_text().split())))


def test_ctrl_c_ends_the_compiler(monkeypatch, tmp_path):
    where = run_instead(monkeypatch, tmp_path, SLEEP)
    said = []

    def report(what, seconds):
        said.append(what)
        if (tmp_path / "pids").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(jnp.sin, (1.0,), report=report, **where)
    assert set(said) == {"Compiling for v5e:2x2"}
    assert wait_until(lambda: all(map(ended, (tmp_path / "pids").read_text().split())))


def test_a_compiler_whose_planner_is_killed_ends_itself_and_leaves_nothing(tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    (given / "program.bin").write_bytes(b"program")
    code = f"""
import subprocess, sys, time
child = "import runpy, sys, time; m = runpy.run_path({str(compiling.CHILD)!r}); \
import os, threading; given = m['Path'](sys.argv[1]); \
threading.Thread(target=m['_watch'], args=(os.getppid(), given)).start(); \
print(os.getpid(), flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child, {str(given)!r}])
time.sleep(60)
"""
    planner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with planner:
        assert planner.stdout is not None
        pid = planner.stdout.readline().strip()
        planner.kill()
    assert wait_until(lambda: ended(pid))
    assert not given.exists()


def test_text_that_is_not_as_expected_is_not_counted_and_hides_nothing(monkeypatch, tmp_path):
    answer = json.dumps({**ANSWER, "hlo": "HloModule changed"})
    code = f"pathlib.Path(sys.argv[1], 'answer.json').write_text({answer!r})"

    def changed(text):
        return {}["replica_groups"]

    monkeypatch.setattr(sys.modules["rslora_jax.plan.plan"], "parse", changed)
    found = plan(jnp.sin, (1.0,), **run_instead(monkeypatch, tmp_path, code))
    said = "the text of the compiled program is not as expected (KeyError: 'replica_groups')"
    assert found.fits and (found.flops, found.unknown) == (None, (said,))


def test_a_program_whose_text_cannot_be_read_still_fits(monkeypatch, tmp_path):
    found = plan(jnp.sin, (1.0,), **run_instead(monkeypatch, tmp_path, COUNTED))
    assert found.fits and found.need == 3
    assert (found.flops, found.unknown) == (None, ("the fake has no text",))
    assert "the fake has no text" in str(found.tables()["cost"])
    assert compare([found]).column("sent GB") == [None]


def test_answers_are_kept_by_all_that_they_depend_on(monkeypatch, tmp_path):
    where = run_instead(monkeypatch, tmp_path, COUNTED)
    x = abstract((8, 8))
    other = {**where, "mesh_shape": {"fsdp": 4, "tensor": 1}}
    asked = [
        plan(jnp.sin, (x,), **where).cached,
        plan(jnp.sin, (x,), **where).cached,
        plan(jnp.cos, (x,), **where).cached,
        plan(jnp.sin, (x,), specs=(P("fsdp"),), **where).cached,
        plan(jnp.sin, (x,), donate=0, **where).cached,
        plan(jnp.sin, (x,), compiler_options={"xla_a": True}, **where).cached,
        plan(jnp.sin, (x,), **other).cached,
    ]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_b=true")
    asked += [plan(jnp.sin, (x,), **where).cached]
    monkeypatch.setattr(compiling, "_version", lambda name: "9.9")
    asked += [plan(jnp.sin, (x,), **where).cached, plan(jnp.sin, (x,), **where).cached]
    assert asked == [False, True, *[False] * 7, True]
    assert (tmp_path / "starts").read_text() == "x" * 8


def test_a_damaged_answer_is_asked_for_again(monkeypatch, tmp_path):
    where = run_instead(monkeypatch, tmp_path, COUNTED)
    plan(jnp.sin, (1.0,), **where)
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    for damaged in (
        b"",
        whole[:20],
        whole[:-1],
        b"\x1f\x8b" + whole[:9],
        whole[:-9] + b"123456789",
    ):
        kept.write_bytes(damaged)
        assert not plan(jnp.sin, (1.0,), **where).cached
    assert plan(jnp.sin, (1.0,), **where).cached


def test_without_a_cache_nothing_is_kept_and_a_cache_that_cannot_be_is_no_error(
    monkeypatch, tmp_path
):
    where = run_instead(monkeypatch, tmp_path, COUNTED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    plan(jnp.sin, (1.0,), **{**where, "cache": False})
    assert not (tmp_path / "home").exists()
    assert not plan(jnp.sin, (1.0,), **{**where, "cache": True}).cached
    assert plan(jnp.sin, (1.0,), **{**where, "cache": True}).cached
    assert [file.suffix for file in (tmp_path / "home/rslora_jax/plans").iterdir()] == [".gz"]
    (tmp_path / "a file").write_text("")
    assert plan(jnp.sin, (1.0,), **{**where, "cache": tmp_path / "a file"}).fits


def test_where_a_step_is_written_does_not_change_its_digest():
    def digest(lines):
        space: dict[str, Any] = {"jax": jax}
        code = "\n" * lines + "def step(w, x):\n    return jax.numpy.sort(x @ w)"
        exec(compile(code, f"file{lines}.py", "exec"), space)
        args = (abstract((8, 8)), abstract((8, 8)))
        mesh = abstract_mesh(MESH)
        return export(space["step"], args, inputs(space["step"], args, mesh), mesh).digest

    assert digest(1) == digest(50)


# What is refused before anything is compiled.


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    message = r"libtpu .*is not installed\. Run `pip install 'rslora_jax\[tpu-plan\]'`\."
    with pytest.raises(AdapterError, match=message):
        plan(jnp.sin, (1.0,), topology="v5e:2x2", mesh_shape=MESH)


def test_without_flatbuffers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(AdapterError, match=r"needs flatbuffers.*rslora_jax\[tpu-plan\]"):
        plan(jnp.sin, (1.0,), topology="v5e:2x2", mesh_shape=MESH)


def test_the_planner_does_not_load_the_compiler_itself():
    # JAX does in any process, unless it is told to use the CPU.
    code = f"""
import jax, sys; sys.path.insert(0, {os.getcwd()!r})
from rslora_jax.plan import abstract_mesh, exporting, inputs
mesh = abstract_mesh({MESH})
x = jax.ShapeDtypeStruct((8,), "float32")
exporting.export(jax.numpy.sin, (x,), inputs.inputs(jax.numpy.sin, (x,), mesh), mesh)
print("libtpu" in open("/proc/self/maps").read(), "libtpu" in sys.modules)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("w",)}, "2 arguments, but 1 names were given for them: w"),
        ({"specs": (P("fsdp"),)}, "The specs' tree does not go with the arguments' tree"),
        (
            {"specs": (P("fdsp"), None)},
            r"'w' .*no axis 'fdsp'.*'fsdp'\. Correct the name\.",
        ),
        ({"specs": (P("fsdp", None, None), None)}, r"'w' .* 3 entries, but .*\(6, 4\) has 2 axes"),
        ({"specs": (P(("fsdp", "tensor")), None)}, "'w' .* size 6, .* not divide into 4 equal"),
        ({"donate": 2}, r"The arguments at \(2,\) were to be donated, but the step has 2"),
        ({"trained": "lora"}, "gradients of 'lora' were asked for, but the arguments are w, x"),
        ({"topology": "v5e:4x4"}, "fsdp=2,tensor=2 has 4 devices, but v5e:4x4 has 16"),
        ({"topology": "v5q:4x4"}, "'v5q' was asked for"),
    ],
)
def test_what_cannot_be_is_refused_before_compiling(monkeypatch, options, message):
    monkeypatch.setattr(subprocess, "Popen", None)
    args = abstract((6, 4)), abstract((4, 6))
    given = {"topology": "v5e:2x2", "mesh_shape": MESH, **options}
    with pytest.raises(AdapterError, match=message):
        plan(lambda w, x: w @ x, args, **given)


@pytest.mark.parametrize(
    ("text", "need", "have"),
    [
        ("(298.12G) exceeds available HBM (15.75G). HLO", 298.12 * GIB, 15.75 * GIB),
        ("(1.50T) exceeds available HBM (95.73G). HLO", 1.5 * 2**40, 95.73 * GIB),
        ("memory space hbm. Used 21.95G of 15.48G hbm.", 21.95 * GIB, 15.48 * GIB),
        ("memory space hbm. Used 512.50M of 100.00M hbm.", 512.5 * 2**20, 100 * 2**20),
    ],
)
def test_every_wording_of_too_little_memory_is_read(text, need, have):
    found = exhausted(f"RESOURCE_EXHAUSTED: Ran out of memory {text} Exceeded by more.")
    assert found == (int(need), int(have))


def test_inputs_carry_their_paths_groups_and_static_values():
    mesh = abstract_mesh(MESH)
    params = LoraParams({"w": abstract((8, 8))}, {"w": {"a": abstract((8, 2), P("fsdp"))}})
    found = inputs(lambda params, mode, *rest: rest, (params, "fast", 2.0, 3), mesh)
    assert [each.path for each in found] == [
        "params/base/w",
        "params/lora/w/a",
        "mode",
        "rest",
        "rest",
    ]
    assert [each.group for each in found] == ["base", "lora", "mode", "rest", "rest"]
    assert [each.bytes for each in found] == [128, 16, 0, 4, 4]
    assert found[2].value == "fast"


def test_static_values_stay_what_they_are_and_donation_counts_without_them():
    mesh = abstract_mesh(MESH)
    args = (abstract((8,)), "twice", abstract((4,)))

    def step(x, mode, y):
        assert mode == "twice"
        return 2 * x, y

    program = export(step, args, inputs(step, args, mesh), mesh, donate=2)
    assert [each.shape for each in program.arrays] == [(8,), (4,)]
    assert program.donated == (1,)


def test_a_jitted_step_donates_what_it_donates():
    mesh = abstract_mesh(MESH)
    args = ({"w": abstract((8,)), "v": abstract((8,))}, abstract((8,)))
    step = jax.jit(lambda p, x: jax.tree.map(lambda w: w + x, p), donate_argnums=0)
    assert export(step, args, inputs(step, args, mesh), mesh).donated == (0, 1)
    assert export(step, args, inputs(step, args, mesh), mesh, donate=()).donated == ()


def test_arrays_with_shardings_of_another_mesh_keep_their_specs():
    small = jax.make_mesh((2, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(jnp.ones((64, 4)), NamedSharding(small, P("fsdp")))
    (found,) = inputs(jnp.sin, (x,), abstract_mesh({"fsdp": 32, "tensor": 8}), names=("x",))
    assert found.bytes == 64 * 4 * 4 // 32


def test_plans_made_in_threads_do_not_disturb_one_another(monkeypatch, tmp_path):
    where = run_instead(monkeypatch, tmp_path, COUNTED)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: plan(jnp.sin, (1.0,), **where), range(4)))
    assert {each.need for each in found} == {3}
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert threading.active_count() < 20
    assert exporting.INSTALL == "rslora_jax[tpu-plan]"
