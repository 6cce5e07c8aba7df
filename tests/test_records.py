"""What an optimizer's state remembers of every step."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rl
from rslora_jax.optim.records import QUANTITIES

LAYERS, INTO, OUT, RANK, STEPS = 3, 5, 7, 2, 6
SITES = (
    rl.Site("layers/w", "bio", (LAYERS, INTO, OUT), "float32", rank=RANK, alpha=2.0, scale=2.0),
    rl.Site("v", "ioo", (INTO, 2, 3), "float32", rank=RANK, alpha=2.0, scale=0.5),
)


def tree(seed):
    """Random numbers in the shapes of all factors."""
    rng = np.random.default_rng(seed)
    drawn = [
        {
            n: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for n, shape in zip("ab", shapes, strict=True)
        }
        for shapes in (site.factor_shapes for site in SITES)
    ]
    return {"layers": {"w": drawn[0]}, "v": drawn[1]}


def train(tx, steps=STEPS):
    """Runs `tx` on random gradients inside one scan: `(lora, state, [(before, g, u), ...])`."""
    lora, grads = tree(0), [tree(k + 1) for k in range(steps)]

    def step(carry, g):
        lora, state = carry
        updates, state = tx.update(g, state, lora)
        return (optax.apply_updates(lora, updates), state), (lora, updates)

    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    (lora, state), seen = jax.jit(lambda: jax.lax.scan(step, (lora, tx.init(lora)), stack))()
    before, updates = (
        [jax.tree.map(lambda leaf, k=k: leaf[k], part) for k in range(steps)] for part in seen
    )
    return lora, state, list(zip(before, grads, updates, strict=True))


def expected(before, grads, updates):
    """The quantities of one step, from NumPy: {path: [modules, quantities]}."""
    rows = {}
    for site in SITES:
        lora, g, u = (at(found, site.path) for found in (before, grads, updates))
        modules = range(LAYERS) if "b" in site.axes else [...]
        rows[site.path] = [
            [
                *(np.linalg.norm(np.ravel(g[n][k])) for n in "ab"),
                *(np.linalg.norm(np.ravel(u[n][k])) for n in "ab"),
                -np.sum(lora["b"][k] * g["b"][k]),
                sum(np.sum(g[n][k] * u[n][k]) for n in "ab"),
            ]
            for k in modules
        ]
    return rows


def at(tree, path):
    """The factors at a path, as NumPy arrays."""
    for name in path.split("/"):
        tree = tree[name]
    return {name: np.asarray(factor) for name, factor in tree.items()}


def test_every_step_of_every_module_is_recorded():
    _, state, seen = train(rl.optim.record_norms(optax.adam(0.1), SITES))
    records = rl.optim.recorded(state)
    assert records.steps.tolist() == list(range(STEPS))
    for k, step in enumerate(seen):
        for path, rows in expected(*step).items():
            found = records.norms[path][k].reshape(len(rows), -1)
            np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-6)


def test_the_signal_is_how_far_the_change_follows_the_gradient_of_the_weight():
    """<b, grad b> equals <scale * a @ b, G> when the gradients are those of a weight's G."""
    site, lora = SITES[0], tree(0)["layers"]["w"]
    grad = np.random.default_rng(9).normal(size=site.shape)
    a, b = (np.asarray(lora[n]) for n in "ab")
    grads = {
        "a": site.scale * np.einsum("lio,lro->lir", grad, b),
        "b": site.scale * np.einsum("lio,lir->lro", grad, a),
    }
    tx = rl.optim.record_norms(optax.sgd(0.1), [site])
    wrapped = [{"layers": {"w": jax.tree.map(jnp.float32, leaf)}} for leaf in (lora, grads)]
    _, state = tx.update(wrapped[1], tx.init(wrapped[0]), wrapped[0])
    signal = rl.optim.recorded(state).norms["layers/w"][0, :, QUANTITIES.index("signal")]
    change = site.scale * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(signal, -np.sum(change * grad, (1, 2)), rtol=1e-4)


def test_the_recorded_transform_gives_the_same_updates():
    plain, _, _ = train(optax.adamw(0.1))
    watched, _, _ = train(rl.optim.record_norms(optax.adamw(0.1), SITES))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), watched, plain)


def test_a_ring_keeps_the_latest_steps():
    _, state, _ = train(rl.optim.record_norms(optax.sgd(0.1), SITES, capacity=4))
    _, whole, _ = train(rl.optim.record_norms(optax.sgd(0.1), SITES))
    records = rl.optim.recorded(state)
    assert records.steps.tolist() == [2, 3, 4, 5]
    for path, found in records.norms.items():
        np.testing.assert_array_equal(found, rl.optim.recorded(whole).norms[path][2:])


@pytest.mark.parametrize(
    "wrap",
    [
        rl.optim.freeze_base,
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.inject_hyperparams(lambda x: optax.chain(optax.scale(x), tx))(x=1.0),
    ],
    ids=["freeze_base", "chain", "inject_hyperparams"],
)
def test_records_are_found_inside_other_states(wrap):
    tx = wrap(rl.optim.record_norms(optax.sgd(0.1), SITES))
    _, state = tx.update(tree(1), tx.init(tree(0)), tree(0))
    assert rl.optim.recorded(state).steps.tolist() == [0]


def test_freeze_base_around_it_takes_a_whole_lora_params():
    params = rl.LoraParams({"layers": {"w": jnp.ones(3)}}, tree(0))
    tx = rl.optim.freeze_base(rl.optim.record_norms(optax.sgd(0.1), SITES))
    grads = rl.LoraParams(jax.tree.map(jnp.ones_like, params.base), tree(1))
    updates, state = tx.update(grads, tx.init(params), params)
    assert float(jnp.abs(updates.base["layers"]["w"]).max()) == 0
    assert len(rl.optim.recorded(state).table().rows) == LAYERS + 1


def test_reading_records_in_a_loop_compiles_the_step_once():
    tx = rl.optim.record_norms(optax.sgd(0.1), SITES)
    step = jax.jit(tx.update)
    state = tx.init(tree(0))
    for k in range(3):
        _, state = step(tree(k), state, tree(0))
        assert rl.optim.recorded(state).steps[-1] == k
    assert step._cache_size() == 1


def test_records_are_written_as_csv_and_json_lines(tmp_path):
    _, state, _ = train(rl.optim.record_norms(optax.sgd(0.1), SITES))
    table = rl.optim.recorded(state).table()
    table.to_csv(tmp_path / "norms.csv")
    table.to_jsonl(tmp_path / "norms.jsonl")
    rows = list(csv.DictReader((tmp_path / "norms.csv").read_text().splitlines()))
    lines = [json.loads(line) for line in (tmp_path / "norms.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == STEPS * (LAYERS + 1)
    assert rows[1]["path"] == lines[1]["path"] == "layers/w" and rows[1]["index"] == "1"
    assert [float(row["grad_b"]) for row in rows] == [line["grad_b"] for line in lines]
    assert table.to_frame()["update_a"].tolist() == table.column("update_a")


def test_scalars_are_means_of_norms_and_sums_of_changes():
    _, state, seen = train(rl.optim.record_norms(optax.sgd(0.1), SITES))
    scalars = {(tag, step): value for tag, value, step in rl.optim.recorded(state).scalars("run")}
    for k, step in enumerate(seen):
        rows = np.concatenate(list(expected(*step).values()))
        np.testing.assert_allclose(scalars["run/grad_b", k], rows[:, 1].mean(), rtol=1e-4)
        np.testing.assert_allclose(scalars["run/predicted_change", k], rows[:, 5].sum(), rtol=1e-4)


def test_no_record_costs_a_product():
    """Recording adds sums over the factors and their gradients, never a matrix product."""
    tx = rl.optim.record_norms(optax.sgd(0.1), SITES)
    lowered = jax.jit(tx.update).lower(tree(1), tx.init(tree(0)), tree(0))
    assert "dot_general" not in lowered.as_text()


def test_a_state_without_records_is_refused():
    with pytest.raises(rl.AdapterError, match="reads the state of one `record_norms`, found 0"):
        rl.optim.recorded(optax.adam(0.1).init(tree(0)))


def test_two_recorders_in_one_state_are_refused():
    tx = rl.optim.record_norms(optax.sgd(0.1), SITES)
    with pytest.raises(rl.AdapterError, match="found 2"):
        rl.optim.recorded(optax.chain(tx, tx).init(tree(0)))


def test_an_update_without_parameters_is_refused():
    tx = rl.optim.record_norms(optax.sgd(0.1), SITES)
    with pytest.raises(rl.AdapterError, match=r"call tx.update\(grads, state, params.lora\)"):
        tx.update(tree(1), tx.init(tree(0)))


@pytest.mark.parametrize(
    ("sites", "capacity", "message"),
    [((), 4, "needs the sites"), (SITES, 0, "capacity of at least 1, found 0")],
)
def test_a_recorder_without_sites_or_room_is_refused(sites, capacity, message):
    with pytest.raises(rl.AdapterError, match=message):
        rl.optim.record_norms(optax.sgd(0.1), sites, capacity=capacity)


def test_factors_that_no_site_knows_are_refused():
    tx = rl.optim.record_norms(optax.sgd(0.1), SITES[:1])
    with pytest.raises(rl.AdapterError, match="no site knows"):
        tx.init(tree(0))
