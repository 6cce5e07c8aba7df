"""The gradient report against closed forms, whole-weight gradients and hand-kept activations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rslora_jax as rl
from rslora_jax.analysis.gradients import ADAM_EPS, gradient_report

P = PartitionSpec
TX = optax.adam(1e-3)
LAYERS, WIDTH, HIDDEN, ROWS, RANK = 3, 6, 10, 40, 2


def numbers(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape) * 0.5, jnp.result_type(float))


def model(params, x):
    """A scanned, rematerialized stack of two matrices, and a head."""

    def layer(h, weights):
        up, down = weights
        return h + jnp.tanh(h @ up) @ down, None

    h, _ = jax.lax.scan(jax.checkpoint(layer), x, (params["up"], params["down"]))
    return h @ params["head"]


@functools.cache
def adapted():
    base = {
        "up": numbers(LAYERS, WIDTH, HIDDEN),
        "down": numbers(LAYERS, HIDDEN, WIDTH),
        "head": numbers(WIDTH, 1),
    }
    x = numbers(ROWS, WIDTH, seed=1)
    config = rl.LoraConfig(rank=RANK, alpha=3.0)
    params, apply, sites = rl.adapt(model, base, x, config=config, key=jax.random.key(0))
    lora = jax.tree.map(lambda leaf: numbers(*leaf.shape, seed=2).astype(leaf.dtype), params.lora)
    return params._replace(lora=lora), apply, sites, x


def loss_fn(params, x):
    return jnp.mean((adapted()[1](params, x) - 1.0) ** 2)


def measure(params, **options):
    """A report of everything: compiled once for the whole file."""
    _, _, sites, x = adapted()
    return gradient_report(loss_fn, params, sites, x, tx=TX, weights=True, **options)


@functools.cache
def report():
    return measure(adapted()[0])


@functools.cache
def by_hand():
    """Every product of the stack, unrolled: {path: [(x, output, base output), ...]}."""
    params, _, sites, x = adapted()
    scales = {site.path: site.scale for site in sites}
    seen = {"up": [], "down": []}

    def product(path, k, h):
        a, b = (params.lora[path][name][k] for name in "ab")
        output, base = scales[path] * (h @ a) @ b, h @ params.base[path][k]
        seen[path].append((h, output, base))
        return base + output

    h = x
    for k in range(LAYERS):
        h = h + product("down", k, jnp.tanh(product("up", k, h)))
    return seen


@functools.cache
def plain_gradients():
    params, _, _, x = adapted()
    return jax.grad(lambda lora: loss_fn(params._replace(lora=lora), x))(params.lora)


@functools.cache
def merged_gradients():
    """The gradient of every whole weight, through the original model."""
    params, _, sites, x = adapted()
    merged = rl.merge(params, sites)
    return jax.grad(lambda p: jnp.mean((model(p, x) - 1.0) ** 2))(merged)


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("path", ["up", "down"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_gradient_norms_are_those_of_the_gradients_layer_by_layer(path, name):
    grads = plain_gradients()[path][name].reshape(LAYERS, -1)
    found = report().modules[path]
    close(found[f"grad_{name}"], np.linalg.norm(grads, axis=1))
    close(found[f"grad_{name}_rms"], np.sqrt(np.mean(grads**2, axis=1)))


@pytest.mark.parametrize("path", ["up", "down"])
def test_output_moments_are_those_of_the_products_written_by_hand(path):
    found = report().modules[path]
    for k, (x, output, base) in enumerate(by_hand()[path]):
        for m in (1, 2, 4):
            close(found[f"output_{m}"][k], np.mean(np.abs(output) ** m))
        close(found["output_rms"][k], np.sqrt(np.mean(output**2)))
        close(found["base_rms"][k], np.sqrt(np.mean(base**2)))
        close(found["input_rms"][k], np.sqrt(np.mean(x**2)))
        close(found["output_ratio"][k], np.linalg.norm(output) / np.linalg.norm(base))
        cosine = np.vdot(output, base) / np.linalg.norm(output) / np.linalg.norm(base)
        close(found["output_cosine"][k], cosine, 1e-4)


def test_gradients_into_outputs_and_inputs_are_those_of_shifts_added_there():
    """A zero added to an activation has the gradient of that activation."""
    params, _, sites, x = adapted()
    scale = sites[0].scale
    weights = [(params.base[n], params.lora[n]["a"], params.lora[n]["b"]) for n in ("up", "down")]

    def loss(shifts):
        h = x
        for k in range(LAYERS):
            inner = h
            for (w, a, b), (into, out) in zip(weights, shifts[k], strict=True):
                seen = inner + into  # what only the adapter sees
                inner = inner @ w[k] + scale * seen @ a[k] @ b[k] + out
                inner = jnp.tanh(inner) if w is weights[0][0] else inner
            h = h + inner
        return jnp.mean((h @ params.base["head"] - 1.0) ** 2)

    sizes = ((WIDTH, HIDDEN), (HIDDEN, WIDTH))
    zeros = [[tuple(jnp.zeros((ROWS, n)) for n in pair) for pair in sizes] for _ in range(LAYERS)]
    for k, layer in enumerate(jax.grad(loss)(zeros)):
        for path, (into, out) in zip(("up", "down"), layer, strict=True):
            found = report().modules[path]
            close(found["output_grad_rms"][k], np.sqrt(np.mean(out**2)))
            close(found["input_grad_rms"][k], np.sqrt(np.mean(into**2)))
            for m in (1, 2, 4):
                close(found[f"input_grad_{m}"][k], np.mean(np.abs(into) ** m), 1e-4)


@pytest.mark.parametrize("path", ["up", "down"])
def test_the_change_is_measured_without_being_formed(path):
    params, _, sites, _ = adapted()
    site = next(site for site in sites if site.path == path)
    a, b = (np.asarray(params.lora[path][name]) for name in "ab")
    delta = site.scale * a @ b
    found = report().modules[path]
    close(found["delta"], np.linalg.norm(delta, axis=(1, 2)))
    close(found["delta_2"], np.linalg.norm(delta, 2, axis=(1, 2)))
    close(found["delta_ratio"], found["delta"] / np.linalg.norm(params.base[path], axis=(1, 2)))
    grads = np.asarray(merged_gradients()[path])
    close(found["signal"], -np.sum(delta * grads, (1, 2)), 1e-4)
    close(found["weight_grad"], np.linalg.norm(grads, axis=(1, 2)), 1e-4)
    close(found["signal_share"], -np.sum(delta * grads, (1, 2)) / np.sum(grads**2, (1, 2)), 1e-4)


@pytest.mark.parametrize("path", ["up", "down"])
def test_the_captured_share_is_what_both_projections_leave(path):
    params, _, _, _ = adapted()
    for k in range(LAYERS):
        grad = np.asarray(merged_gradients()[path][k], np.float64)
        a, b = (np.asarray(params.lora[path][name][k], np.float64) for name in "ab")
        rest = (np.eye(len(a)) - a @ np.linalg.pinv(a)) @ grad
        rest = rest @ (np.eye(b.shape[1]) - np.linalg.pinv(b) @ b)
        expected = 1 - np.sum(rest**2) / np.sum(grad**2)
        close(report().modules[path]["captured"][k], expected, 1e-4)


def test_at_zero_b_only_the_inputs_side_is_captured():
    params, _, _, x = adapted()
    lora = {p: {**f, "b": jnp.zeros_like(f["b"])} for p, f in params.lora.items()}
    found = measure(params._replace(lora=lora))
    grads = jax.grad(lambda p: jnp.mean((model(p, x) - 1.0) ** 2))(params.base)
    for path in ("up", "down"):
        here = found.modules[path]
        assert np.all(here["grad_a"] == 0) and np.all(here["below_eps_a"] == 1)
        assert np.all(here["output_rms"] == 0) and np.all(here["signal"] == 0)
        for k in range(LAYERS):
            a, grad = np.asarray(lora[path]["a"][k]), np.asarray(grads[path][k])
            share = np.sum((a @ np.linalg.pinv(a) @ grad) ** 2) / np.sum(grad**2)
            close(here["captured"][k], share, 1e-4)


def test_the_update_is_the_optimizers_own():
    params, _, sites, x = adapted()
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    found = gradient_report(loss_fn, params, sites, x, tx=tx)
    grads = plain_gradients()
    updates, _ = tx.update(grads, tx.init(params.lora), params.lora)
    for path, here in found.modules.items():
        predicted = 0
        for name in "ab":
            u, g, w = (
                np.asarray(tree[path][name]).reshape(LAYERS, -1)
                for tree in (updates, grads, params.lora)
            )
            norm = np.linalg.norm(u, axis=1)
            close(here[f"update_{name}"], norm)
            close(here[f"update_ratio_{name}"], norm / np.linalg.norm(w, axis=1))
            predicted += np.sum(g * u, 1)
        close(here["predicted_change"], predicted, 1e-4)
        site = next(site for site in sites if site.path == path)
        a, b = (np.asarray(params.lora[path][n], np.float64) for n in "ab")
        u, v = (np.asarray(updates[path][n], np.float64) for n in "ab")
        moved = np.linalg.norm(site.scale * ((a + u) @ (b + v) - a @ b), axis=(1, 2))
        close(here["update_ratio"], moved / np.linalg.norm(params.base[path], axis=(1, 2)), 1e-4)
    close(found.totals["update"], optax.tree.norm(updates))
    tiny = jax.tree.map(lambda u: 1e-3 * u, updates)
    after = loss_fn(rl.optim.apply_updates(params, tiny), x)
    close(found.totals["predicted_change"], 1e3 * (after - found.loss), 2e-2)


def test_means_run_over_modules_and_totals_over_all_factors():
    found = report()
    every = [np.asarray(found.modules[path]["grad_b"]) for path in ("up", "down")]
    close(found.means["grad_b"], np.mean(np.concatenate(every)))
    close(found.totals["grad"], optax.tree.norm(plain_gradients()))
    close(found.totals["signal"], sum(np.sum(m["signal"]) for m in found.modules.values()))


def test_the_share_below_eps_counts_entries():
    params = adapted()[0]
    grads = np.abs(np.asarray(plain_gradients()["up"]["b"])).reshape(LAYERS, -1)
    eps = float(np.median(grads))
    found = measure(params, eps=eps)
    close(found.modules["up"]["below_eps_b"], np.mean(grads < eps, axis=1))
    assert ADAM_EPS == optax.adam.__defaults__[2]


def second_moment(spectrum, rows=800):
    """Inputs [rows, n] whose second moment has exactly this spectrum."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(spectrum))))
    right, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    return jnp.asarray(left * np.sqrt(spectrum) @ right.T, jnp.float32)


# Spectrum, and how far above the truth ten steps of power iteration leave r*.
SPECTRA = {
    "rank one": (np.eye(64)[0] + 1e-12, 1e-3),
    "isotropic": (np.ones(64), 1e-3),
    "1/i": (1 / np.arange(1, 65), 0.02),
    "exponential": (0.8 ** np.arange(64), 0.1),
    "wide, 1/i": (1 / np.arange(1, 513), 0.02),
    "wide, 1/sqrt(i)": (np.arange(1, 513) ** -0.5, 0.1),
    "wide, a spike": (np.where(np.arange(512) == 0, 5.0, 1.0), 0.02),
}


@functools.cache
def one_matrix(inputs):
    """The adapted function of one matrix and a head, and its loss: compiled once per width."""
    base = {"w": numbers(inputs, 4), "head": numbers(4, 1)}
    config = rl.LoraConfig(rank=RANK, alpha=1.0, targets=["w"])
    params, apply, sites = rl.adapt(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"],
        base,
        jnp.ones((1, inputs)),
        config=config,
        key=jax.random.key(0),
    )
    return params, sites, lambda p, x: jnp.mean(apply(p, x) ** 2)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_intrinsic_dimension_is_the_trace_over_the_largest_eigenvalue(name):
    spectrum, tolerance = SPECTRA[name]
    params, sites, loss = one_matrix(len(spectrum))
    found = gradient_report(loss, params, sites, second_moment(spectrum))
    expected = np.sum(spectrum) / np.max(spectrum)
    ratio = float(found.means["intrinsic_dim"]) / expected
    assert 1 - 1e-3 <= ratio <= 1 + tolerance


def test_an_expert_sees_only_the_tokens_that_are_sent_to_it():
    base = {"w": numbers(3, WIDTH, 4)}
    sizes = jnp.array([7, 0, 13], jnp.int32)
    x = numbers(20, WIDTH)
    config = rl.LoraConfig(rank=RANK, alpha=1.0, targets=["w"])
    params, apply, sites = rl.adapt(
        lambda p, x, n: jax.lax.ragged_dot(x, p["w"], n),
        base,
        x,
        sizes,
        config=config,
        key=jax.random.key(0),
    )
    lora = jax.tree.map(lambda leaf: numbers(*leaf.shape, seed=3), params.lora)
    params = params._replace(lora=lora)
    found = gradient_report(lambda p, x, n: jnp.sum(apply(p, x, n) ** 2), params, sites, x, sizes)
    here = found.modules["w"]
    for expert, tokens in ((0, x[:7]), (2, x[7:])):
        a, b = (params.lora["w"][name][expert] for name in "ab")
        close(here["input_rms"][expert], np.sqrt(np.mean(tokens**2)))
        close(here["output_rms"][expert], np.sqrt(np.mean((sites[0].scale * tokens @ a @ b) ** 2)))
    assert np.isnan(here["input_rms"][1])
    assert np.isfinite(found.means["input_rms"])


def test_a_looked_up_embedding_shows_its_outputs_but_no_inputs():
    base = {"e": numbers(9, WIDTH), "head": numbers(WIDTH, 2)}
    tokens = jnp.array([1, 1, 5])
    config = rl.LoraConfig(rank=RANK, alpha=1.0, targets=["e"])
    params, apply, sites = rl.adapt(
        lambda p, t: jnp.tanh(p["e"][t]) @ p["head"],
        base,
        tokens,
        config=config,
        key=jax.random.key(0),
    )
    lora = jax.tree.map(lambda leaf: numbers(*leaf.shape, seed=3), params.lora)
    params = params._replace(lora=lora)
    found = gradient_report(lambda p, t: jnp.sum(apply(p, t) ** 2), params, sites, tokens)
    rows = sites[0].scale * lora["e"]["a"][tokens] @ lora["e"]["b"]
    close(found.modules["e"]["output_rms"], np.sqrt(np.mean(rows**2)))
    assert np.isnan(found.modules["e"]["input_rms"])
    assert found.table().column("input_rms") == [None]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_and_base_give_the_same_report(axis_type):
    params, _, sites, x = adapted()
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)

    def put(value, *spec):
        return jax.device_put(value, NamedSharding(mesh, P(*spec)))

    base = {
        "up": put(params.base["up"], None, None, "model"),
        "down": put(params.base["down"], None, "model", None),
        "head": put(params.base["head"]),
    }
    lora = jax.tree.map(put, params.lora)
    with jax.set_mesh(mesh):
        found = gradient_report(
            sharded_loss(axis_type), rl.LoraParams(base, lora), sites, put(x, "data")
        )
    for path, here in report().modules.items():
        for name, value in here.items():
            if name in found.modules[path]:
                close(found.modules[path][name], value, 1e-4)


@functools.cache
def sharded_loss(axis_type):
    """The same loss; on an explicit mesh the contraction over `model` says where it ends."""

    def explicit(params, x):
        def layer(h, weights):
            up, down = weights
            hidden = jnp.tanh(jnp.einsum("ti,io->to", h, up))
            return h + jnp.einsum("ti,io->to", hidden, down, out_sharding=P("data", None)), None

        h, _ = jax.lax.scan(jax.checkpoint(layer), x, (params["up"], params["down"]))
        return h @ params["head"]

    if axis_type == AxisType.Auto:
        return loss_fn
    params, _, _, x = adapted()
    config = rl.LoraConfig(rank=RANK, alpha=3.0)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"up": P(None, None, "model"), "down": P(None, "model", None), "head": P()}
    with jax.set_mesh(mesh):
        base = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in params.base.items()}
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        _, apply, _ = rl.adapt(explicit, base, x, config=config, key=jax.random.key(0))
    return lambda params, x: jnp.mean((apply(params, x) - 1.0) ** 2)


def test_a_report_forms_no_product_of_the_size_of_a_weight():
    params, _, sites, x = adapted()
    shapes = [[str(WIDTH), str(HIDDEN)], [str(HIDDEN), str(WIDTH)]]

    def weight_sized(weights):
        def function(params, x):
            return gradient_report(loss_fn, params, sites, x, weights=weights)

        text = jax.jit(function).lower(params, x).as_text()
        results = re.findall(r"stablehlo.dot_general.*-> tensor<(\w+)>", text)
        assert len(results) > 10
        return [found for found in results if found.split("x")[-3:-1] in shapes]

    assert weight_sized(False) == []
    assert weight_sized(True)


def test_a_second_report_compiles_nothing():
    params, _, sites, x = adapted()
    state = TX.init(params.lora)
    first, other = report(), x + 1
    with jax.no_tracing():
        second = gradient_report(loss_fn, params, sites, other, tx=TX, weights=True, state=state)
    assert first.loss != second.loss


def test_taps_stay_zero_in_a_penalty_on_the_adapters():
    params, sites, loss = one_matrix(64)
    lora = {"w": {**params.lora["w"], "b": numbers(RANK, 4)}}
    params, x = params._replace(lora=lora), second_moment(1 / np.arange(1, 65))

    def penalized(params, x):
        return loss(params, x) + 0.1 * optax.tree.norm(params.lora, squared=True)

    found = gradient_report(penalized, params, sites, x)
    without = gradient_report(loss, params, sites, x)
    close(found.loss, penalized(params, x))
    for name in ("output_rms", "input_grad_rms", "intrinsic_dim"):
        close(found.means[name], without.means[name])


def test_a_gradient_that_is_not_finite_is_counted_where_it_is():
    params, _, _, _ = adapted()
    lora = {
        **params.lora,
        "up": {**params.lora["up"], "b": params.lora["up"]["b"].at[1].set(jnp.nan)},
    }
    found = measure(params._replace(lora=lora))
    assert found.totals["nonfinite"] > 0
    assert "not finite" in str(found)


def test_the_table_has_one_row_for_each_module():
    table = report().table()
    assert [row[:2] for row in table.rows] == [
        (path, str(k)) for path in ("down", "up") for k in range(LAYERS)
    ]
    assert {"grad_b", "signal", "intrinsic_dim", "captured"} <= set(table.columns)


def test_the_printed_report_shows_means_and_totals():
    text = str(report())
    assert text.splitlines()[0].startswith("path")
    assert "mean of modules" in text and "total grad" in text


def test_without_sites_there_is_nothing_to_report():
    params, _, _, x = adapted()
    with pytest.raises(rl.AdapterError, match="at least one site, found none"):
        gradient_report(loss_fn, params, (), x)


def test_a_loss_that_is_no_scalar_is_refused_with_its_shape():
    params, apply, sites, x = adapted()
    with pytest.raises(rl.AdapterError, match=rf"one scalar, found shapes \({ROWS}, 1\)"):
        gradient_report(apply, params, sites, x)


def test_factors_of_another_rank_are_refused():
    params, _, sites, x = adapted()
    lora = jax.tree.map(lambda leaf: leaf[..., :1], params.lora)
    with pytest.raises(rl.AdapterError, match="must have shape"):
        gradient_report(loss_fn, params._replace(lora=lora), sites, x)


def seen_by(apply_fn, base, x, axes):
    """The report of one weight `w` with random factors."""
    config = rl.LoraConfig(rank=RANK, alpha=1.0, targets=["w"])
    params, apply, sites = rl.adapt(apply_fn, base, x, config=config, key=jax.random.key(0))
    assert [site.axes for site in sites] == [axes]
    lora = jax.tree.map(lambda leaf: numbers(*leaf.shape, seed=3), params.lora)
    return gradient_report(
        lambda p, x: jnp.sum(apply(p, x) ** 2), params._replace(lora=lora), sites, x
    )


def test_the_inputs_of_a_convolution_have_no_intrinsic_dimension():
    def apply_fn(p, x):
        return jax.lax.conv(x, p["w"], (1,), "SAME")

    found = seen_by(apply_fn, {"w": numbers(4, 3, 2)}, numbers(2, 3, 8), "oii")
    assert np.isnan(found.means["intrinsic_dim"])
    assert found.means["output_rms"] > 0


def test_partial_products_of_shards_are_not_taken_for_outputs():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

    def apply_fn(p, x):
        product = jax.shard_map(
            lambda x, w: jax.lax.psum(x @ w, "model"),
            mesh=mesh,
            in_specs=(P(None, "model"), P("model", None)),
            out_specs=P(),
        )
        return product(x, p["w"])

    found = seen_by(apply_fn, {"w": numbers(8, 4)}, numbers(6, 8), "io")
    assert np.isnan(found.means["output_rms"]) and np.isnan(found.means["intrinsic_dim"])
    assert found.means["grad_b"] > 0


def test_rows_of_shards_add_up_to_the_whole_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def apply_fn(p, x):
        product = jax.shard_map(
            lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
        )
        return product(x, p["w"])

    base, x = {"w": numbers(8, 4)}, numbers(40, 8)
    split = seen_by(apply_fn, base, x, "io").means
    whole = seen_by(lambda p, x: x @ p["w"], base, x, "io").means
    for name in ("output_rms", "base_rms", "input_rms", "input_grad_rms", "output_cosine"):
        close(split[name], whole[name], 1e-4)
    # Each shard has its own largest eigenvalue, and their sum is at least that of the whole.
    assert 0.5 * whole["intrinsic_dim"] < split["intrinsic_dim"] <= whole["intrinsic_dim"] * 1.001


def test_a_learning_rate_that_looks_at_the_loss_gets_it():
    params, _, sites, x = adapted()
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    found = gradient_report(loss_fn, params, sites, x, tx=tx)
    close(found.totals["update"], 0.1 * optax.tree.norm(plain_gradients()), 1e-4)


def test_a_base_tree_is_refused_as_params():
    params, _, sites, x = adapted()
    with pytest.raises(rl.AdapterError, match=r"takes the LoraParams .* found dict"):
        gradient_report(loss_fn, params.base, sites, x)
