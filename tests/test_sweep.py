"""A sweep in one compilation is the separate training runs that it stands for."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rslora_jax as rl
from rslora_jax.analysis.gradients import gradient_report
from rslora_jax.analysis.sweeps.batches import batches_of
from rslora_jax.analysis.sweeps.budget import divide, peak_bytes
from rslora_jax.analysis.sweeps.sweep import rank_sweep
from tests.quick import run as quick_run

RANKS = (2, 8)
SEEDS = (0, 7)
STEPS = 3
RATE = 0.02
OPTIMIZERS = {
    "sgd": optax.sgd,
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.3),
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(0.05), optax.adam(rate)),
}
ALONE = ((2, "lora"), (2, "rslora"), (8, "rslora"))
TARGETS = ["in", "layers"]


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    """The sweep compiles by itself, so that `tests.quick` cannot help here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def model(p, x):
    h = jnp.tanh(x @ p["in"])
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, p["layers"])
    return h @ p["out"]


def arrays(dtype="float32"):
    rng = np.random.default_rng(3)
    shapes = {"in": (9, 10), "layers": (2, 10, 10), "out": (10, 4)}
    base = {n: (rng.normal(size=s) / math.sqrt(s[-2])).astype(dtype) for n, s in shapes.items()}
    batches = (rng.normal(size=(STEPS, 5, 9)), rng.normal(size=(STEPS, 5, 4)))
    return base, tuple(array.astype(dtype) for array in batches)


@functools.cache
def adapted(rank=8, dtype="float32", seed=0, scaling="rslora"):
    """The loss, all that a sweep needs, and the factors at the start."""
    base, batches = arrays(dtype)
    config = rl.LoraConfig(rank=rank, targets=TARGETS, scaling=scaling)
    key = jax.random.key(seed)
    params, apply, sites = rl.adapt(model, base, batches[0][0], config=config, key=key)

    def loss(params, batch):
        return jnp.mean((apply(params, batch[0]) - batch[1]) ** 2)

    return loss, base, sites, batches, params.lora


def sweep_of(dtype="float32", **options):
    options = {"ranks": RANKS, "quantities": ("loss",), **options}
    loss, base, sites, batches, _ = adapted(dtype=dtype)
    return rank_sweep(loss, base, sites, options.pop("batches", batches), **options)


# Parity with runs that were never padded.


def alone(optimizer, rank, scaling):
    """A function that trains one run a seed with an `adapt` of its own, in a plain loop."""
    loss, base, _, batches, small = adapted(rank, "float64", 0, scaling)
    tx = OPTIMIZERS[optimizer](RATE)

    def step(carry, batch):
        lora, state = carry
        value, grads = rl.value_and_grad(loss)(rl.LoraParams(base, lora), batch)
        updates, state = tx.update(grads, state, lora)
        return (optax.apply_updates(lora, updates), state), value

    def train(a):
        lora = {n: {"a": a[n][..., :rank], "b": small[n]["b"]} for n in TARGETS}
        (trained, _), losses = jax.lax.scan(step, (lora, tx.init(lora)), batches)
        return losses, trained

    wholes = [adapted(8, "float64", seed)[-1] for seed in SEEDS]
    drawn = {n: np.stack([whole[n]["a"] for whole in wholes]) for n in TARGETS}
    return lambda: jax.vmap(train)(drawn)


@functools.cache
def references():
    keys = [(optimizer, *pair) for optimizer in OPTIMIZERS for pair in ALONE]
    trains = [alone(*key) for key in keys]
    return dict(zip(keys, quick_run(lambda: [train() for train in trains]), strict=True))


def test_activations_are_those_that_a_report_of_the_same_factors_shows():
    names = ("output_trained", "input_grad")
    sweep = sweep_of(
        scalings=("lora",),
        learning_rates=(RATE,),
        quantities=names,
        return_factors=True,
        batches=[jax.tree.map(operator.itemgetter(0), adapted()[3])],
        steps=STEPS + 1,
    )
    before = sweep_of(
        scalings=("lora",),
        learning_rates=(RATE,),
        return_factors=True,
        batches=[jax.tree.map(operator.itemgetter(0), adapted()[3])],
        steps=STEPS,
    )
    loss, base, sites, batches, _ = adapted()
    batch = jax.tree.map(operator.itemgetter(0), batches)
    for run in range(len(sweep.runs)):
        params = rl.LoraParams(base, before.lora(run))
        report = gradient_report(loss, params, sites, batch)
        for name, found in zip(names, ("output_rms", "input_grad_rms"), strict=True):
            expected = float(report.means[found])
            np.testing.assert_allclose(sweep.traces[name][run, STEPS], expected, rtol=1e-4)


def test_an_embedding_that_shows_no_inputs_is_no_failure():
    rng = np.random.default_rng(0)
    base = {"e": rng.normal(size=(7, 6)).astype("float32"), "out": np.ones((6, 2), "float32")}
    tokens = np.array([1, 4, 4])
    config = rl.LoraConfig(rank=2, targets=["e"])
    _, apply, sites = rl.adapt(
        lambda p, t: jnp.tanh(jnp.asarray(p["e"])[t]) @ p["out"],
        base,
        tokens,
        config=config,
        key=jax.random.key(0),
    )
    sweep = rank_sweep(
        lambda p, t: (apply(p, t) ** 2).mean(),
        base,
        sites,
        [tokens],
        ranks=(1, 2),
        steps=2,
        quantities=("output_trained", "input_grad"),
    )
    assert np.isnan(sweep.traces["input_grad"]).all()
    assert (sweep.traces["output_trained"][:, 1] > 0).all()
    assert sweep.failures.rows == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": optax.adam(1e-3)}, "must make a transform from a learning rate"),
        ({"learning_rates": 1e-3}, "learning_rates must be a tuple or list, found 0.001"),
        ({"scalings": "lora"}, "scalings must be a tuple or list, found 'lora'"),
    ],
)
def test_likely_mistakes_are_refused_with_the_remedy(options, message):
    with pytest.raises(rl.AdapterError, match=message):
        sweep_of(**options)


def test_a_lora_params_is_refused_as_base():
    loss, base, sites, batches, lora = adapted()
    with pytest.raises(rl.AdapterError, match=r"found a LoraParams: pass params.base"):
        rank_sweep(loss, rl.LoraParams(base, lora), sites, batches, ranks=RANKS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_run_equals_the_run_that_was_never_padded(name):
    with jax.enable_x64(True):
        sweep = sweep_of(
            "float64",
            optimizer=OPTIMIZERS[name],
            learning_rates=(RATE,),
            seeds=SEEDS,
            return_factors=True,
        )
        _, _, sites, _, _ = adapted(dtype="float64")
        for k, run in enumerate(sweep.runs):
            if (run.rank, run.scaling) not in ALONE:
                continue
            seed, every = SEEDS.index(run.seed), references()[name, run.rank, run.scaling]
            losses, lora = jax.tree.map(operator.itemgetter(seed), every)
            np.testing.assert_allclose(sweep.traces["loss"][k], losses, rtol=1e-12)
            found, gamma = sweep.lora(k), rl.scale(16.0, run.rank, run.scaling)
            for site in sites:
                a, b = found[site.path]["a"], found[site.path]["b"] * site.scale / gamma
                close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
                close(a[..., : run.rank], lora[site.path]["a"])
                close(b[..., : run.rank, :], lora[site.path]["b"])
                assert not a[..., run.rank :].any() and not b[..., run.rank :, :].any()


def test_a_clip_after_adam_without_eps_spreads_the_zeros_of_the_padding():
    def make(rate):
        # The first gradient of `a` is 0: without its eps no run would be finite.
        adams = {"a": optax.adam(rate), "b": optax.adam(rate, eps=0.0)}
        return optax.chain(optax.partition(adams, rl.optim.labels), optax.clip_by_global_norm(1.0))

    with pytest.warns(UserWarning, match=r"1 of 2 runs met .* at the ranks \[2\]"):
        sweep = sweep_of(optimizer=make, scalings=("rslora",))
    assert [bool(np.isfinite(trace).all()) for trace in sweep.traces["loss"]] == [False, True]


def test_a_scaling_of_ones_own_is_the_scale_of_its_runs():
    custom = ("own", lambda alpha, rank: rl.scale(alpha, rank, "lora"))
    sweep = sweep_of(scalings=("lora", custom), optimizer=optax.sgd)
    for rank in RANKS:
        (k,), (own,) = (sweep.select(rank=rank, scaling=name) for name in ("lora", "own"))
        np.testing.assert_allclose(sweep.traces["loss"][own], sweep.traces["loss"][k], rtol=1e-6)


# One compilation, however the runs are divided.


@functools.cache
def undivided():
    return sweep_of(seeds=(0, 1, 2), optimizer=optax.sgd)


def compilations(function):
    """The result of a function, and how often XLA compiled."""
    found = []

    def listen(event, _, **kwargs):
        found.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return function(), len(found)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_sweep_is_one_compilation(chunked):
    undivided()
    memory = 4 * undivided().budget.per_run if chunked else None
    sweep, count = compilations(
        lambda: sweep_of(
            seeds=(0, 1, 2), learning_rates=(0.01, 0.02), optimizer=optax.sgd, memory=memory
        )
    )
    assert len(sweep.runs) == 24
    assert (sweep.budget.rounds, sweep.budget.chunk) == ((6, 4) if chunked else (1, 24))
    assert count == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_runs_can_be_spread_over_a_mesh_axis_and_chunked(kind):
    mesh = jax.make_mesh((2, 2), ("runs", "other"), axis_types=(kind, kind))
    whole = undivided()
    sweep, count = compilations(
        lambda: sweep_of(
            seeds=(0, 1, 2),
            optimizer=optax.sgd,
            memory=2 * whole.budget.per_run,
            sharding=NamedSharding(mesh, PartitionSpec("runs")),
        )
    )
    assert count == 1
    assert sweep.budget[2:] == (2, 3, 2)  # 12 runs: 2 side by side on each of 2 devices
    np.testing.assert_allclose(sweep.traces["loss"], whole.traces["loss"], rtol=1e-6)


def test_runs_can_be_spread_over_all_devices():
    sharding = NamedSharding(jax.make_mesh((4,), ("runs",)), PartitionSpec("runs"))
    sweep = sweep_of(seeds=(0, 1, 2), optimizer=optax.sgd, sharding=sharding, return_factors=True)
    assert sweep.budget[2:] == (3, 1, 4)
    np.testing.assert_allclose(sweep.traces["loss"], undivided().traces["loss"], rtol=1e-6)
    assert sweep.lora(11)["in"]["a"].shape == (9, 8)


# What is recorded, in closed form: a loss that is linear in the weight has one gradient.

IDENTITY = np.stack([np.eye(6, dtype=np.float64)] * 2)
GRADIENT = np.random.default_rng(8).normal(size=(2, 6, 5))


@functools.cache
def linear(init="kaiming"):
    """Two stacked modules, the loss <G, W>, SGD at 0.1: the sweep and the draw of `a`."""
    base = {"w": np.zeros((2, 6, 5))}
    config = rl.LoraConfig(
        rank=4, alpha=3.0, init="normal" if init != "kaiming" else init, targets=["w"]
    )
    params, apply, sites = rl.adapt(
        lambda p, x: jnp.einsum("bni,bio->bno", x, p["w"]),
        base, IDENTITY, config=config, key=jax.random.key(5),
    )  # fmt: skip
    sweep = rank_sweep(
        lambda params, batch: jnp.sum(apply(params, batch) * GRADIENT),
        base, sites, [IDENTITY], ranks=(1, 2, 4), seeds=(5,), optimizer=optax.sgd,
        learning_rates=(0.1,), steps=3, init=init,
    )  # fmt: skip
    return sweep, np.asarray(params.lora["w"]["a"])


def norm(x):
    return np.sqrt((x**2).sum((-2, -1))).mean()


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_every_quantity_has_its_closed_form(rank, scaling):
    with jax.enable_x64(True):
        sweep, drawn = linear()
    (k,) = sweep.select(rank=rank, scaling=scaling)
    gamma, a, b = rl.scale(3.0, rank, scaling), drawn[..., :rank], np.zeros((2, rank, 5))
    transposed = GRADIENT.swapaxes(-1, -2)
    for step in range(3):
        grad_b = gamma * a.swapaxes(-1, -2) @ GRADIENT
        grad_a = (gamma * b @ transposed).swapaxes(-1, -2)
        square = (grad_a**2).sum() + (grad_b**2).sum()
        expected = {
            "loss": (gamma * a @ b * GRADIENT).sum(),
            "grad_a": norm(grad_a),
            "grad_b": norm(grad_b),
            "grad_b_rms": norm(grad_b) / math.sqrt(5 * rank),
            "grad": math.sqrt(square),
            "delta": norm(gamma * a @ b),
            "signal": -(gamma * a @ b * GRADIENT).sum(),
            "predicted_change": -0.1 * square,
            "update": 0.1 * math.sqrt(square),
        }
        found = {name: values[k, step] for name, values in sweep.traces.items()}
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)
        a, b = a - 0.1 * grad_a, b - 0.1 * grad_b


def test_the_popular_bugs_draw_a_with_a_variance_that_falls_with_the_rank():
    with jax.enable_x64(True):
        sound, wide, narrow = (linear(i)[0] for i in ("normal", "fan_out", "gaussian"))
    start = {id(s): s.traces["grad_b"][:, 0] for s in (sound, wide, narrow)}
    ranks = np.array([run.rank for run in sound.runs])
    ratio = start[id(wide)] / start[id(sound)] * np.sqrt(ranks)
    np.testing.assert_allclose(ratio, math.sqrt(6), rtol=1e-10)  # undoes the 1 / sqrt(fan_in)
    np.testing.assert_allclose(start[id(narrow)] * np.sqrt(ranks), start[id(wide)], rtol=1e-10)


def test_the_table_has_one_row_for_each_step_of_each_run():
    sweep = undivided()
    table = sweep.table()
    assert table.columns == ("rank", "scaling", "seed", "learning_rate", "step", "loss")
    assert len(table.rows) == len(sweep.runs) * STEPS
    (row,) = table.select(rank=8, scaling="lora", seed=2, step=1).records()
    (k,) = sweep.select(rank=8, scaling="lora", seed=2)
    assert row["loss"] == sweep.traces["loss"][k, 1]


def test_the_trained_factors_give_the_function_that_the_run_learned():
    loss, base, _, batches, _ = adapted()
    one = jax.tree.map(lambda x: x[0], batches)
    longer, shorter = (
        sweep_of(batches=[one], steps=steps, optimizer=optax.adam, return_factors=True)
        for steps in (3, 2)
    )
    after = quick_run(
        lambda: [loss(rl.LoraParams(base, shorter.lora(k)), one) for k in range(len(shorter.runs))]
    )
    np.testing.assert_allclose(after, longer.traces["loss"][:, 2], rtol=1e-5)


# Values that are not finite, and bad input.


def test_a_run_that_diverges_is_reported_with_its_rank_and_step():
    loss, base, sites, batches, _ = adapted()

    def fragile(params, batch):
        moved = jnp.any(params.lora["in"]["b"][4:] != 0)  # rows that only ranks above 4 have
        return jnp.where(moved, jnp.nan, loss(params, batch))

    with pytest.warns(UserWarning, match=r"1 of 2 runs .* ranks \[8\]: first loss = nan at step 1"):
        sweep = rank_sweep(fragile, base, sites, batches, ranks=(1, 8), scalings=("rslora",))
    (row,) = sweep.failures.records()
    assert (row["rank"], row["step"], row["quantity"], row["value"]) == (8, 1, "loss", "nan")
    assert np.isfinite(sweep.traces["loss"][0]).all()


def test_a_sweep_without_failures_has_an_empty_table_of_them():
    assert undivided().failures.rows == ()
    assert undivided().failures.columns[-3:] == ("step", "quantity", "value")


def pairs(shape):
    return {"x": np.ones(shape, np.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (4, 2)}, r"ranks must be increasing ints of at least 1, found \(4, 2\)"),
        ({"ranks": (2, 2)}, r"increasing ints"),
        ({"ranks": (0, 2)}, r"increasing ints of at least 1, found \(0, 2\)"),
        ({"ranks": (2.0,)}, r"increasing ints"),
        ({"ranks": ()}, r"increasing ints"),
        ({"ranks": (2, 16)}, r"reach 16, above the padded size 8 of the site 'in'.*rank=16"),
        ({"scalings": ("rs",)}, r"one of \('lora', 'rslora'\) or a pair .* found 'rs'"),
        ({"scalings": ("lora", "lora")}, r"scalings must hold distinct values"),
        ({"scalings": (("zero", lambda alpha, rank: 0.0),)}, r"'zero' gave 0.0 for alpha 16.0"),
        ({"seeds": ()}, r"seeds must hold distinct values, found \(\)"),
        ({"seeds": (-1,)}, r"seeds holds -1, which is out of range"),
        ({"learning_rates": ("x",)}, r"learning_rates must hold numbers, found 'x'"),
        ({"learning_rates": (math.nan,)}, r"learning_rates holds nan"),
        ({"init": "xavier"}, r"init must be one of .*'gaussian'.* found 'xavier'"),
        ({"quantities": ("gradb",)}, r"cannot record 'gradb'. The nearest are 'grad_b'"),
        ({"alpha": -1.0}, r"alpha must be a finite number above 0, found -1"),
        ({"alpha": 0.0}, r"alpha must be a finite number above 0, found 0.0. Leave it out to keep"),
        ({"alpha": 0, "scalings": (("own", lambda alpha, rank: alpha + 1),)}, r"alpha must be a"),
        ({"memory": 100}, r"given 0.0 MiB for its runs, but one run needs about .* `memory`"),
        ({"batches": []}, r"list of batches is empty"),
        ({"batches": [pairs((3, 9)), pairs((2, 9))]},
         r"'x' is \(3, 9\) float32 in batch 0 and \(2, 9\) float32 in batch 1"),
        ({"batches": [pairs((3, 9)), {"y": 1}]}, r"Batch 1 has the structure"),
        ({"batches": (np.ones((3, 5)), np.ones((4, 5)))}, r"one leading axis of steps, found"),
        ({"steps": 5}, r"steps is 5, but there are 3 batches"),
        ({"steps": 0}, r"steps must be an int of at least 1, found 0"),
        ({"sharding": "runs"}, r"sharding must be NamedSharding\(mesh, PartitionSpec\(axis\)\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_what_was_found(options, message):
    with pytest.raises(rl.AdapterError, match=message):
        sweep_of(**options)


@pytest.mark.parametrize("wrong", [lambda x: x, lambda x: (x.sum(), x), lambda x: x.sum() > 0])
def test_a_loss_that_is_no_real_scalar_is_refused(wrong):
    _, base, sites, batches, _ = adapted()
    with pytest.raises(rl.AdapterError, match="must be one real scalar, found"):
        rank_sweep(lambda params, batch: wrong(batch[0]), base, sites, batches, ranks=(2,))


def test_sites_that_are_empty_or_have_no_rank_are_refused():
    loss, base, _, batches, _ = adapted()
    found = rl.find_sites(model, base, batches[0][0])
    for sites, what in (((), "none"), (found, "sites without a rank")):
        with pytest.raises(rl.AdapterError, match=f"the sites that `adapt` returned, found {what}"):
            rank_sweep(loss, base, sites, batches)


def test_factors_that_were_not_kept_are_refused():
    with pytest.raises(rl.AdapterError, match="return_factors=True"):
        undivided().lora(0)


# Memory.


def test_the_estimate_of_a_program_counts_what_lives_at_the_same_time():
    def function(x):
        y = jnp.sin(x)  # 4000 bytes, until z is there
        z = jnp.cos(y)  # 4000 more
        return jnp.sum(z)

    assert peak_bytes(jax.make_jaxpr(function)(np.ones(1000, np.float32))) == 8000


def test_runs_are_divided_into_equal_chunks():
    assert divide(10, 100, 450)[2:] == (4, 3, 1)
    assert divide(10, 100, 1000)[2:] == (10, 1, 1)
    assert divide(10, 100, 450, shards=4)[2:] == (3, 1, 4)


def test_a_batch_that_is_used_at_each_step_is_held_once():
    batch = pairs((3, 9))
    assert batches_of([batch], 7) == (7, None, batch)
    assert batches_of([batch]).steps == 1
