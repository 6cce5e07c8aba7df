"""Training the adapters while not one bit of the base moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rl
from tests.quick import compiled, run

X = np.random.default_rng(5).normal(size=(4, 8)).astype(np.float32)
Y = np.random.default_rng(6).normal(size=(4, 3)).astype(np.float32)

OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.5),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4, weight_decay_rate=0.5),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "muon": optax.contrib.muon(1e-2, weight_decay=0.5),
    "lion": optax.lion(1e-2, weight_decay=0.5),
    "clipped": optax.chain(
        optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.5), optax.adam(1e-2)
    ),
    "accumulated": optax.MultiSteps(optax.adamw(1e-2, weight_decay=0.5), every_k_schedule=2),
}
every_optimizer = pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def model(p, x):
    return jnp.tanh(x @ p["w"] + p["bias"]) @ p["v"]


@functools.cache
def adapted():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 7)).astype(np.float32)
    w[0, :6] = [-0.0, 0.0, 1e-45, -1e-45, 1.1754942e-38, -3.4e38 * 0]  # zeros and subnormals
    v = rng.normal(size=(7, 3)).astype(np.float32)
    base = {"w": jnp.asarray(w), "v": jnp.asarray(v), "bias": jnp.full(7, -0.0)}
    config = rl.LoraConfig(rank=2, alpha=4.0, targets=["w", "v"])
    return rl.adapt(model, base, X, config=config, key=jax.random.key(0))


def loss_of(apply):
    return lambda params: jnp.mean((apply(params, X) - Y) ** 2)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def train(params, tx, gradients, steps=4):
    """Steps on whole `LoraParams`, compiled."""

    @compiled
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    state = run(tx.init, params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def train_adapters(params, tx, loss, steps=4):
    """Steps on the adapters, with `value_and_grad`, compiled."""

    @compiled
    def step(params, state):
        _, grads = rl.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return params._replace(lora=optax.apply_updates(params.lora, updates)), state

    state = run(tx.init, params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@every_optimizer
def test_the_base_does_not_move_by_one_bit_under_gradients_of_the_whole(tx):
    params, apply, _ = adapted()
    after = train(params, rl.optim.freeze_base(tx), jax.grad(loss_of(apply)))
    assert bits(after.base) == bits(params.base)
    assert all(not np.array_equal(a, b) for a, b in _pairs(after.lora, params.lora))


@every_optimizer
def test_gradients_of_the_adapters_alone_train_the_same(tx):
    params, apply, _ = adapted()
    frozen, loss = rl.optim.freeze_base(tx), loss_of(apply)
    whole = train(params, frozen, jax.grad(loss), steps=2)
    alone = train_adapters(params, frozen, loss, steps=2)
    assert bits(alone.base) == bits(params.base)
    for one, other in _pairs(alone.lora, whole.lora):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def _pairs(one, other):
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


@every_optimizer
def test_the_state_holds_nothing_for_the_base(tx):
    params, _, _ = adapted()
    state = jax.eval_shape(rl.optim.freeze_base(tx).init, params)
    alone = jax.eval_shape(tx.init, params.lora)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (state, alone)]
    assert shapes[0] == shapes[1]
    assert not {(8, 7), (7, 3), (7,)} & set(shapes[0])


def test_a_plain_mask_moves_the_base_and_freezing_does_not():
    # Why `freeze_base` exists: `optax.masked` hands on raw gradients of what it masks.
    params, apply, _ = adapted()
    grads = jax.grad(loss_of(apply))
    masked = optax.masked(optax.sgd(0.1), rl.optim.trainable_mask)
    assert bits(train(params, masked, grads).base) != bits(params.base)
    frozen = rl.optim.freeze_base(optax.sgd(0.1))
    assert bits(train(params, frozen, grads).base) == bits(params.base)


def test_training_lowers_the_loss():
    params, apply, _ = adapted()
    loss = loss_of(apply)
    after = train_adapters(params, rl.optim.freeze_base(optax.adam(3e-2)), loss, steps=60)
    assert loss(after) < 0.5 * loss(params)


def test_decay_and_norms_never_read_the_base():
    params, apply, _ = adapted()
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.adamw(1e-2, weight_decay=0.5))
    grads = run(jax.grad(loss_of(apply)), params)
    frozen = rl.optim.freeze_base(tx)
    update = compiled(lambda grads, params: frozen.update(grads, frozen.init(params), params))
    updates, _ = update(grads, params)
    poisoned = params._replace(base=jax.tree.map(lambda leaf: leaf * np.nan, params.base))
    huge = grads._replace(base=jax.tree.map(lambda leaf: leaf + 1e30, grads.base))
    again, _ = update(huge, poisoned)
    for one, other in _pairs(updates.lora, again.lora):
        assert np.array_equal(one, other)


def test_the_update_of_a_frozen_weight_keeps_its_dtype_and_adds_nothing():
    base = {
        "narrow": jnp.array([-0.0, 1e-40, 1.0], jnp.bfloat16),
        "half": jnp.array([-0.0, 6e-8, 0.0], jnp.float16),
    }
    params = rl.LoraParams(base, {"w": {"a": jnp.ones(2), "b": jnp.ones(2)}})
    frozen = rl.optim.freeze_base(optax.adamw(1.0))
    grads = jax.tree.map(jnp.ones_like, params)

    def step(params, grads):
        updates, _ = frozen.update(grads, frozen.init(params), params)
        return updates, optax.apply_updates(params, updates)

    updates, new = run(step, params, grads)
    assert [leaf.dtype for leaf in jax.tree.leaves(updates.base)] == [jnp.float16, jnp.bfloat16]
    assert bits(new.base) == bits(base)


def test_accumulation_inside_equals_one_step_on_the_mean():
    params, apply, _ = adapted()
    loss = loss_of(apply)
    tx = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=3)
    three = train_adapters(params, rl.optim.freeze_base(tx), loss, steps=3)
    one = train_adapters(params, rl.optim.freeze_base(optax.sgd(0.1)), loss, steps=1)
    for left, right in _pairs(three.lora, one.lora):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_accumulation_around_a_frozen_optimizer_leaves_every_number_of_the_base():
    # Outside of `freeze_base`, MultiSteps adds zeros of its own: they clear the sign of a zero
    # and flush subnormals. Inside, as in the other tests, not one bit moves.
    params, apply, _ = adapted()
    tx = rl.optim.freeze_base(optax.adamw(1e-2, weight_decay=0.5))
    around = optax.MultiSteps(tx, every_k_schedule=2)
    after = train(params, around, jax.grad(loss_of(apply)))
    for one, other in _pairs(after.base, params.base):
        np.testing.assert_allclose(one, other, rtol=0, atol=np.finfo(np.float32).tiny)
    inside = rl.optim.freeze_base(OPTIMIZERS["accumulated"])
    expected = train(params, inside, jax.grad(loss_of(apply)))
    for one, other in _pairs(after.lora, expected.lora):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_extra_arguments_reach_the_optimizer():
    params, apply, _ = adapted()
    loss = loss_of(apply)
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    frozen = rl.optim.freeze_base(tx)
    value, grads = rl.value_and_grad(loss)(params)
    updates, _ = frozen.update(grads, frozen.init(params), params, value=value)
    assert jax.tree.structure(updates) == jax.tree.structure(params.lora)


def test_the_mask_says_true_for_what_trains():
    params, _, _ = adapted()
    mask = rl.optim.trainable_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert jax.tree.leaves(mask.base) == [False] * 3
    assert jax.tree.leaves(mask.lora) == [True] * 4


def test_labels_name_every_leaf_for_a_partition():
    params, apply, _ = adapted()
    assert rl.optim.labels(params) == rl.LoraParams(
        {"w": "base", "v": "base", "bias": "base"},
        {"w": {"a": "a", "b": "b"}, "v": {"a": "a", "b": "b"}},
    )
    parts = {"a": optax.sgd(0.1), "b": optax.sgd(0.3), "base": optax.set_to_zero()}
    tx = optax.partition(parts, rl.optim.labels)
    grads = run(jax.grad(loss_of(apply)), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    for name in ("w", "v"):
        np.testing.assert_allclose(updates.lora[name]["a"], -0.1 * grads.lora[name]["a"])
        np.testing.assert_allclose(updates.lora[name]["b"], -0.3 * grads.lora[name]["b"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates.base))


def split(lora, name):
    return {path: factors[name] for path, factors in lora.items()}


@pytest.mark.parametrize(
    "rate",
    [1e-2, optax.linear_schedule(1e-1, 1e-3, 4), optax.warmup_cosine_decay_schedule(0, 0.1, 2, 6)],
    ids=["constant", "linear", "cosine"],
)
def test_lora_plus_equals_two_optimizers(rate):
    params, apply, _ = adapted()
    loss = loss_of(apply)

    def faster(step):
        return 8 * rate(step)

    txs = {
        "a": optax.adamw(rate, weight_decay=0.1),
        "b": optax.adamw(faster if callable(rate) else 8 * rate, weight_decay=0.1),
    }
    gradient = compiled(jax.grad(lambda lora: loss(params._replace(lora=lora))))
    lora = params.lora
    states = {name: tx.init(split(lora, name)) for name, tx in txs.items()}
    for _ in range(4):
        grads = gradient(lora)
        new = {}
        for name, tx in txs.items():
            own = split(lora, name)
            updates, states[name] = tx.update(split(grads, name), states[name], own)
            new[name] = optax.apply_updates(own, updates)
        lora = {path: {name: new[name][path] for name in "ab"} for path in lora}

    def adamw(rate):
        return optax.adamw(rate, weight_decay=0.1)

    plus = rl.optim.lora_plus(rate, ratio=8.0, optimizer=adamw)
    found = train_adapters(params, plus, loss)
    for one, other in _pairs(found.lora, lora):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_lora_plus_leaves_the_base_alone_and_its_state_holds_nothing_for_it():
    params, apply, _ = adapted()
    tx = rl.optim.lora_plus(1e-2)
    after = train(params, tx, jax.grad(loss_of(apply)))
    assert bits(after.base) == bits(params.base)
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(tx.init(params))}
    assert shapes == {(), (8, 2), (7, 2), (2, 7), (2, 3)}


def test_a_schedule_is_followed():
    params, apply, _ = adapted()
    rate = optax.piecewise_constant_schedule(0.1, {2: 0.0})
    loss = loss_of(apply)
    tx = rl.optim.freeze_base(optax.sgd(rate))
    two, four = (train_adapters(params, tx, loss, steps=n) for n in (2, 4))
    assert bits(two.lora) == bits(four.lora)
    assert bits(two.lora) != bits(params.lora)


def test_apply_updates_hands_the_base_on_with_every_bit():
    base = {"w": jnp.asarray([1e-41, -0.0, 1.0, jnp.inf])}
    params = rl.LoraParams(base, {"w": {"a": jnp.ones(2), "b": jnp.ones(2)}})
    tx = rl.optim.freeze_base(optax.sgd(0.5))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    after = rl.optim.apply_updates(params, updates)
    assert bits(after.base) == bits(params.base)
    assert after.lora["w"]["a"].tolist() == [0.5, 0.5]


def test_lora_plus_accumulates_inside_freeze_base():
    params, apply, _ = adapted()
    tx = rl.optim.freeze_base(optax.MultiSteps(rl.optim.lora_plus(1e-2), 2))
    after = train_adapters(params, tx, loss_of(apply), steps=4)
    assert bits(after.base) == bits(params.base)
    assert bits(after.lora) != bits(params.lora)
