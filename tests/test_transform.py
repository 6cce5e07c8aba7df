"""The transform beyond exactness: traces, constants, gradients, keys, stacking and arguments."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import rslora_jax as rl
from tests.quick import run

KEY = jax.random.key(0)
CONFIG = rl.LoraConfig(rank=2, alpha=3.0, targets=["w", "v"])


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) * 0.4, jnp.float32)


def model(p, x):
    return jnp.tanh(x @ p["w"] + p["bias"]) @ p["v"]


def base():
    # The shapes of the weights occur nowhere else, so that they can be looked for.
    return {"w": numbers(13, 17), "bias": numbers(17), "v": numbers(17, 11)}


X = np.random.default_rng(5).normal(size=(2, 5, 13)).astype(np.float32)


def with_b(params, seed=1):
    """Params whose `b` is no longer zero."""
    leaves, treedef = jax.tree.flatten(params.lora)
    new = [numbers(*leaf.shape, seed=seed + k) for k, leaf in enumerate(leaves)]
    return params._replace(lora=jax.tree.unflatten(treedef, new))


def adapted(apply_fn=model, config=CONFIG, key=KEY):
    params, apply, sites = rl.adapt(apply_fn, base(), X, config=config, key=key)
    return with_b(params), apply, sites


def counted(apply_fn):
    """A function that counts its own traces."""

    def counting(*args):
        counting.traces += 1
        return apply_fn(*args)

    counting.traces = 0
    return counting


def assert_close(one, other, tolerance=1e-5):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def equations(closed):
    return getattr(closed, "jaxpr", closed).eqns


# How often the model is traced.


def test_adapt_traces_the_model_once():
    counting = counted(model)
    adapted(counting)
    assert counting.traces == 1


def test_a_compiled_apply_traces_the_model_once():
    counting = counted(model)
    params, apply, _ = adapted(counting)
    counting.traces = 0
    step = jax.jit(apply)
    for _ in range(3):
        step(params, X)
    assert counting.traces == 1


def test_adapters_of_the_same_shape_swap_without_a_retrace():
    counting = counted(model)
    params, apply, _ = adapted(counting)
    step = jax.jit(apply)
    first = step(params, X)
    counting.traces = 0
    second = step(with_b(params, seed=7), X)
    other_base = jax.tree.map(lambda leaf: leaf * 2, params.base)
    step(params._replace(base=other_base), X)
    assert counting.traces == 0
    assert not np.allclose(first, second)


def test_a_compiled_gradient_step_traces_the_model_once():
    counting = counted(model)
    params, apply, _ = adapted(counting)
    counting.traces = 0
    step = jax.jit(rl.value_and_grad(lambda params, x: apply(params, x).sum()))
    for seed in range(3):
        step(with_b(params, seed=seed), X)
    assert counting.traces == 1


def test_a_batch_of_another_shape_is_traced_again_and_served():
    counting = counted(model)
    params, apply, sites = adapted(counting)
    counting.traces = 0
    step, merged = jax.jit(apply), rl.merge(params, sites)
    for batch in (X, X[:1], X[0, 0], X):
        assert_close(step(params, batch), run(model, merged, batch))
    assert counting.traces == 3


def test_a_function_that_is_called_twice_is_lowered_once():
    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ w)

    def twice(p, x):
        return layer(p["w"], layer(p["w"], x))

    config = rl.LoraConfig(rank=2, targets=["w"])
    params, apply, _ = rl.adapt(twice, {"w": numbers(13, 13)}, X, config=config, key=KEY)
    text = jax.jit(apply).lower(params, X).as_text()
    assert text.count("call @layer") == 2
    assert text.count("func.func private @layer") == 1


# What the compiled program holds.


def constants(closed):
    return [const for const in getattr(closed, "consts", ()) if np.ndim(const) == 2]


def test_base_parameters_are_arguments_and_never_constants():
    params, apply, _ = adapted()
    closed = jax.make_jaxpr(apply)(params, X)
    assert constants(closed) == []
    shapes = [var.aval.shape for var in getattr(closed, "jaxpr", closed).invars]
    assert shapes.count((13, 17)) == shapes.count((17, 11)) == 1
    captured = jax.make_jaxpr(lambda x: apply(params, x))(X)
    assert {const.shape for const in constants(captured)} >= {(13, 17), (17, 11)}


def test_the_lowered_program_holds_no_large_constant():
    params, apply, _ = adapted()
    text = jax.jit(apply).lower(params, X).as_text()
    literals = re.findall(r"stablehlo\.constant dense<([^>]*)>", text)
    assert literals
    assert all(len(literal) < 40 for literal in literals)


def products_of_shape(function, args, shape):
    text = jax.jit(function).lower(*args).as_text()
    tail = "x".join(map(str, shape))
    return len(re.findall(rf"stablehlo\.dot_general.*-> tensor<{tail}xf32>", text))


def test_a_gradient_step_computes_no_gradient_of_a_frozen_weight():
    params, apply, _ = adapted()

    def loss(params, x):
        return jnp.sum(apply(params, x) ** 2)

    for shape in ((13, 17), (17, 13), (17, 11), (11, 17)):
        assert products_of_shape(rl.value_and_grad(loss), (params, X), shape) == 0
    full = jax.grad(loss)
    found = [products_of_shape(full, (params, X), shape) for shape in ((13, 17), (17, 13))]
    assert sum(found) == 1


def test_a_compiled_gradient_step_holds_no_array_of_a_frozen_weights_shape_but_the_weight():
    params, apply, _ = adapted()

    def loss(params, x):
        return jnp.sum(apply(params, x) ** 2)

    step = rl.value_and_grad(loss)
    text = jax.jit(step).lower(params, X).compile().as_text()
    made = re.findall(r"= f32\[(?:13,17|17,13)\]\S* ([\w-]+)\(", text)
    assert made
    assert set(made) <= {"parameter", "copy", "bitcast", "transpose", "fusion"}
    assert not re.search(r"= f32\[(?:13,17|17,13)\]\S* (?:dot|add|multiply)\(", text)


def test_a_gradient_step_through_a_scan_stacks_no_gradient_of_the_layers():
    def deep(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    stack = {"w": numbers(3, 13, 13)}
    config = rl.LoraConfig(rank=2, targets=["w"])
    params, apply, _ = rl.adapt(deep, stack, X, config=config, key=KEY)

    def loss(params, x):
        return jnp.sum(apply(params, x) ** 2)

    def stacked(function):
        text = jax.jit(function).lower(params, X).as_text()
        return len(re.findall(r"dynamic_update_slice.*-> tensor<3x13x13xf32>", text))

    assert stacked(rl.value_and_grad(loss)) == 0
    assert stacked(jax.grad(loss)) == 1


def test_a_stack_of_adapters_leaves_the_base_product_unbatched():
    params, apply, _ = adapted()
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), params.lora)
    closed = jax.make_jaxpr(
        jax.vmap(lambda lora, x: apply(rl.LoraParams(params.base, lora), x), in_axes=(0, None))
    )(stack, X)
    first = [
        eqn.outvars[0].aval.shape
        for eqn in equations(closed)
        if eqn.primitive.name == "dot_general"
        and any(var.aval.shape == (13, 17) for var in eqn.invars)
    ]
    assert first == [(2, 5, 17)]


def test_name_scopes_of_the_model_are_kept():
    def scoped(p, x):
        with jax.named_scope("the_tower"):
            return model(p, x)

    params, apply, _ = adapted(scoped)
    assert "the_tower" in jax.jit(apply).lower(params, X).as_text(debug_info=True)


def test_callbacks_of_the_model_still_run():
    seen = []

    def talking(p, x):
        h = model(p, x)
        jax.debug.callback(lambda value: seen.append(float(value)), h.sum())
        return h

    params, apply, _ = adapted(talking)
    seen.clear()
    out = jax.jit(apply)(params, X)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [float(out.sum())], rtol=1e-5)


# How factors start.


def test_adding_a_target_does_not_change_the_factors_of_another_site():
    one = rl.LoraConfig(rank=2, targets=["w"])
    alone = rl.adapt(model, base(), X, config=one, key=KEY).params.lora["w"]
    beside = rl.adapt(model, base(), X, config=CONFIG, key=KEY).params.lora["w"]
    for name in "ab":
        assert np.array_equal(alone[name], beside[name])


def test_adding_a_rule_does_not_change_the_factors_of_another_site():
    rule = rl.Rule("v", rank=3, alpha=1.0)
    ruled = rl.LoraConfig(rank=2, alpha=3.0, targets=["w", "v"], rules=(rule,))
    plain = rl.adapt(model, base(), X, config=CONFIG, key=KEY).params.lora
    other = rl.adapt(model, base(), X, config=ruled, key=KEY).params.lora
    assert np.array_equal(plain["w"]["a"], other["w"]["a"])
    assert other["v"]["a"].shape == (17, 3)


def test_sites_of_one_shape_start_differently_and_other_keys_start_elsewhere():
    params = {"w": numbers(13, 13), "v": numbers(13, 13)}
    two = rl.LoraConfig(rank=2, targets=["w", "v"])

    def start(key):
        return rl.adapt(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, X, config=two, key=key)

    here, again, there = (start(jax.random.key(seed)).params.lora for seed in (0, 0, 1))
    assert np.array_equal(here["w"]["a"], again["w"]["a"])
    assert not np.array_equal(here["w"]["a"], here["v"]["a"])
    assert not np.array_equal(here["w"]["a"], there["w"]["a"])


@pytest.mark.parametrize(("init", "variance"), [("kaiming", 1 / (3 * 200)), ("normal", 1 / 200)])
@pytest.mark.parametrize("rank", [4, 64])
def test_the_variance_of_a_does_not_depend_on_the_rank(init, variance, rank):
    stack = {"w": jnp.zeros((3, 200, 80))}
    config = rl.LoraConfig(rank=rank, init=init, targets=["w"])
    x = np.zeros((3, 5, 200), np.float32)
    lora = rl.adapt(lambda p, x: x @ p["w"], stack, x, config=config, key=KEY).params.lora
    assert lora["w"]["a"].shape == (3, 200, rank)
    assert float(jnp.var(lora["w"]["a"])) == pytest.approx(variance, rel=0.1)
    assert not lora["w"]["b"].any()


def test_an_initializer_of_the_users_is_called_with_each_sites_shape_and_dtype():
    asked = []

    def init(key, shape, dtype):
        asked.append((shape, dtype))
        return jax.random.uniform(key, shape, dtype, 0.25, 0.5)

    config = rl.LoraConfig(rank=2, targets=["w", "v"], init=init, dtype=jnp.bfloat16)
    lora = rl.adapt(model, base(), X, config=config, key=KEY).params.lora
    assert ((13, 2), jnp.bfloat16) in asked
    assert ((17, 2), jnp.bfloat16) in asked
    assert np.all(np.asarray(lora["w"]["a"], np.float32) >= 0.25)


def test_factors_have_the_dtype_of_the_config_or_at_least_float32():
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base())
    x = X.astype(jnp.bfloat16)
    for dtype, expected in ((None, jnp.float32), ("bfloat16", jnp.bfloat16)):
        config = rl.LoraConfig(rank=2, targets=["w"], dtype=dtype)
        lora = rl.adapt(model, narrow, x, config=config, key=KEY).params.lora
        assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(expected)}


# Abstract values.


def test_abstract_parameters_give_abstract_factors_without_any_computation():
    huge = 1 << 20  # four terabytes each, if it were made
    params = {
        "w": jax.ShapeDtypeStruct((huge, huge), jnp.float32),
        "v": jax.ShapeDtypeStruct((huge, huge), jnp.bfloat16),
        "bias": jax.ShapeDtypeStruct((huge,), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((huge, huge), jnp.float32)
    found, apply, sites = rl.adapt(model, params, x, config=CONFIG, key=KEY)
    assert found.base is params
    struct = jax.ShapeDtypeStruct
    assert found.lora == {
        "w": {"a": struct((huge, 2), jnp.float32), "b": struct((2, huge), jnp.float32)},
        "v": {"a": struct((huge, 2), jnp.float32), "b": struct((2, huge), jnp.float32)},
    }
    assert jax.eval_shape(apply, found, x) == struct((huge, huge), jnp.float32)
    assert jax.eval_shape(lambda params: rl.merge(params, sites), found) == params


def test_abstract_and_concrete_parameters_give_the_same_sites_and_shapes():
    structs = jax.eval_shape(base)
    one = rl.adapt(model, structs, X, config=CONFIG, key=KEY)
    other = rl.adapt(model, base(), X, config=CONFIG, key=KEY)
    assert one.sites == other.sites
    assert one.params.lora == jax.eval_shape(lambda: other.params.lora)


# Adapters on adapters.


def test_adapters_stack_on_an_adapted_function():
    params, apply, sites = adapted()
    config = rl.LoraConfig(rank=3, alpha=2.0, targets=["w"])
    second = rl.adapt(apply, params, X, config=config, key=KEY)
    assert [site.path for site in second.sites] == ["base/w"]
    assert np.array_equal(second.apply(second.params, X), apply(params, X))
    both = with_b(second.params, seed=3)
    merged = rl.merge(rl.merge(both, second.sites), sites)
    assert not np.allclose(merged["w"], rl.merge(params, sites)["w"])
    assert_close(run(second.apply, both, X), run(model, merged, X))


def test_outer_adapters_train_alone():
    params, apply, _ = adapted()
    config = rl.LoraConfig(rank=3, targets=["v"])
    outer, outer_apply, _ = rl.adapt(apply, params, X, config=config, key=KEY)
    _, grads = rl.value_and_grad(lambda p: outer_apply(p, X).sum())(outer)
    assert jax.tree.structure(grads) == jax.tree.structure(outer.lora)


def test_no_adapter_at_all_is_the_base_model_bit_for_bit():
    params, apply, _ = adapted()
    plain = apply(rl.LoraParams(params.base, {}), X)
    assert np.asarray(plain).tobytes() == np.asarray(model(params.base, X)).tobytes()
    compiled = jax.jit(apply)(rl.LoraParams(params.base, {}), X)
    assert np.asarray(compiled).tobytes() == np.asarray(jax.jit(model)(params.base, X)).tobytes()


# Composition with JAX.


def test_apply_composes_with_scan_remat_and_jit():
    params, apply, sites = adapted()
    batches = jnp.stack([X, X * 2, X - 1])

    @jax.jit
    def losses(params):
        step = jax.checkpoint(lambda total, x: (total + apply(params, x).sum(), None))
        return lax.scan(step, 0.0, batches)[0]

    expected = sum(model(rl.merge(params, sites), x).sum() for x in batches)
    assert_close(losses(params), expected)
    grads = jax.grad(lambda lora: losses(params._replace(lora=lora)))(params.lora)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_second_derivatives_equal_those_of_the_merged_model():
    params, apply, sites = adapted()

    def curvature(function):
        def slope(lora):
            grads = jax.grad(lambda lora: jnp.sum(jnp.sin(function(lora))))(lora)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads))

        return run(jax.grad(slope), params.lora)

    one = curvature(lambda lora: apply(params._replace(lora=lora), X))
    other = curvature(lambda lora: model(rl.merge(params._replace(lora=lora), sites), X))
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), one, other)


def test_value_and_grad_equals_jax_and_hands_on_auxiliary_data():
    params, apply, _ = adapted()

    def loss(params, x, power=2):
        out = apply(params, x)
        return jnp.sum(out**power), {"out": out}

    found, expected = (
        run(functools.partial(make(loss, has_aux=True), power=3), params, X)
        for make in (rl.value_and_grad, jax.value_and_grad)
    )
    (value, aux), grads = found
    (plain, _), full = expected
    assert_close(value, plain)
    assert aux["out"].shape == (2, 5, 11)
    jax.tree.map(assert_close, grads, full.lora)


# Mixed precision in one model.


def test_a_bfloat16_weight_that_is_cast_up_serves_float32_exactly():
    def widened(p, x):
        return model(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p), x)

    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base())
    params, apply, _ = rl.adapt(widened, narrow, X, config=CONFIG, key=KEY)
    params = with_b(params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params.base)
    wide_sites = rl.adapt(model, wide, X, config=CONFIG, key=KEY).sites
    out = apply(params, X)
    assert out.dtype == jnp.float32
    assert_close(out, model(rl.merge(rl.LoraParams(wide, params.lora), wide_sites), X))


def test_a_float32_weight_that_is_cast_down_keeps_the_narrow_output():
    layer = nn.Dense(17, dtype=jnp.bfloat16)
    variables = layer.init(KEY, X)
    config = rl.LoraConfig(rank=2, targets=["kernel"])
    params, apply, sites = rl.adapt(layer.apply, variables, X, config=config, key=KEY)
    params = with_b(params)
    out = apply(params, X)
    assert out.dtype == jnp.bfloat16
    merged = rl.merge(params, sites)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.float32)}
    assert_close(out, layer.apply(merged, X), 2e-2)  # three roundings of 0.4 % each


def test_the_delta_accumulates_in_the_type_that_the_original_product_asks_for():
    def wide(p, x):
        return lax.dot_general(
            x, p["w"], (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    narrow = {"w": numbers(13, 17).astype(jnp.bfloat16)}
    x = X.astype(jnp.bfloat16)
    config = rl.LoraConfig(rank=2, targets=["w"])
    params, apply, _ = rl.adapt(wide, narrow, x, config=config, key=KEY)
    text = jax.jit(apply).lower(with_b(params), x).as_text()
    products = re.findall(
        r"stablehlo\.dot_general.*: \(\S+?(\w+)>, \S+?(\w+)>\) -> \S+?(\w+)>", text
    )
    types = [tuple(part.split("x")[-1] for part in product) for product in products]
    assert types == [("bf16", "bf16", "f32")] * 3


# Arguments and leaves of other kinds.


class Noisy(nn.Module):
    """A model with dropout, statistics and static arguments."""

    @nn.compact
    def __call__(self, x, scale=1, *, train, activation="tanh"):
        h = getattr(jnp, activation)(nn.Dense(17, name="w")(x) * scale)
        h = nn.BatchNorm(use_running_average=not train)(h)
        return nn.Dense(11, name="v")(nn.Dropout(0.5, deterministic=not train)(h))


def test_static_arguments_keys_and_mutable_collections_work_as_in_the_original():
    noisy = Noisy()
    variables = noisy.init(KEY, X, train=False)
    config = rl.LoraConfig(rank=2, targets=["w/kernel", "v/kernel"])
    call = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
    params, apply, sites = rl.adapt(noisy.apply, variables, X, config=config, key=KEY, **call)
    params = with_b(params)
    merged = rl.merge(params, sites)
    for options in (call, {"train": False}, {"train": False, "activation": "sin", "scale": 2}):
        found, expected = (
            run(functools.partial(function, **options), tree, X)
            for function, tree in ((apply, params), (noisy.apply, merged))
        )
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(assert_close, found, expected)


def test_a_new_dropout_key_does_not_retrace():
    noisy = Noisy()
    variables = noisy.init(KEY, X, train=False)
    counting = counted(
        lambda variables, x, key: noisy.apply(
            variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )
    )
    config = rl.LoraConfig(rank=2, targets=["w/kernel"])
    params, apply, _ = rl.adapt(counting, variables, X, KEY, config=config, key=KEY)
    counting.traces = 0
    step = jax.jit(apply)
    one, two = (step(params, X, jax.random.key(seed))[0] for seed in (1, 2))
    assert counting.traces == 1
    assert not np.allclose(one, two)


def test_parameters_that_are_no_floats_pass_through():
    params = {
        "w": numbers(13, 17),
        "steps": jnp.array([[3, 4], [5, 6]]),
        "mask": jnp.arange(17) % 2 == 0,
        "key": jax.random.key(3),
        "name": "a model",
        "size": 17,
        "none": None,
    }

    def apply_fn(p, x):
        noise = jax.random.normal(p["key"], (p["size"],))
        out = jnp.where(p["mask"], x @ p["w"], noise)
        return {"out": out, "steps": p["steps"] + 1, "name": p["name"], "none": p["none"]}

    config = rl.LoraConfig(rank=2, targets=["w"])
    found, apply, sites = rl.adapt(apply_fn, params, X, config=config, key=KEY)
    found = with_b(found)
    merged = rl.merge(found, sites)
    assert {name: merged[name] is params[name] for name in params} == {
        name: name != "w" for name in params
    }
    one, other = apply(found, X), apply_fn(merged, X)
    assert_close(one.pop("out"), other.pop("out"))
    assert np.array_equal(one.pop("steps"), other.pop("steps"))
    assert one == other == {"name": "a model", "none": None}


def test_numpy_parameters_and_inputs_are_served():
    params = jax.tree.map(np.asarray, base())
    found, apply, sites = rl.adapt(model, params, X, config=CONFIG, key=KEY)
    found = with_b(found)
    assert_close(apply(found, X), model(rl.merge(found, sites), X))


def test_arrays_may_be_passed_by_keyword():
    def by_name(p, *, x, offset):
        return model(p, x) + offset

    params, apply, sites = rl.adapt(by_name, base(), x=X, offset=1, config=CONFIG, key=KEY)
    params = with_b(params)
    out = jax.jit(apply)(params, x=X, offset=2.0)
    assert_close(out, model(rl.merge(params, sites), X) + 2)


def test_an_unused_adapter_of_a_branch_that_is_not_taken_is_no_error():
    def apply_fn(p, x, deep=True):
        h = x @ p["w"]
        return jnp.tanh(h) @ p["v"] if deep else h

    params, apply, sites = adapted(apply_fn)
    merged = rl.merge(params, sites)
    assert_close(apply(params, X, deep=False), X @ merged["w"])
    assert_close(apply(params, X, True), apply_fn(merged, X))
