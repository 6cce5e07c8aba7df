"""Bad input gets a clear, early error: what was asked, what was found, what to do, and where."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rslora_jax as rl
from rslora_jax.factors import delta

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
BASE = {
    "layer": {"kernel": jnp.linspace(-1.0, 1.0, 32).reshape(4, 8), "bias": jnp.ones(8)},
    "norm": {"scale": jnp.ones(8)},
    "head": jnp.ones((8, 2)),
}
HERE = r"test_errors\.py:\d+ \("


def model(p, x):
    h = jnp.tanh(x @ p["layer"]["kernel"] + p["layer"]["bias"])
    return h * p["norm"]["scale"] @ p["head"]


def adapt(apply_fn=model, params=BASE, args=(X,), key=KEY, **config):
    config = rl.LoraConfig(**{"rank": 2, **config})
    return rl.adapt(apply_fn, params, *args, config=config, key=key)


def refused(match, *args, **kwargs):
    """`adapt` must refuse, with all of these pieces in its message, in order."""
    pattern = match if isinstance(match, str) else ".*".join(match)
    with pytest.raises(rl.AdapterError, match=pattern):
        adapt(*args, **kwargs)


@functools.cache
def model_and_factors():
    """A small adapted model with factors that are not zero."""
    params, apply, sites = adapt()
    lora = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), params.lora)
    return params._replace(lora=lora), apply, sites


# Parameters and arguments that do not fit the function.


def test_a_missing_parameter_names_the_error_and_the_parameters_that_were_given():
    params = {"layer": {"kernel": jnp.ones((4, 8))}, "head": jnp.ones((8, 2))}
    refused(
        ["fails on the example call", "KeyError: 'bias'", "2 parameters", "head, layer/kernel",
         r"\(3, 4\)", "one working call"],
        params=params,
    )  # fmt: skip


def test_a_parameter_of_another_shape_names_the_shapes():
    params = {**BASE, "layer": {"kernel": jnp.ones((5, 8)), "bias": jnp.ones(8)}}
    refused(
        ["fails on the example call", "TypeError", r"\(4,\) and \(5,\)", "layer/kernel",
         "Pass the parameters and arguments of one working call"],
        params=params,
    )  # fmt: skip


def test_a_missing_argument_is_refused_as_a_call_that_fails():
    refused(["fails on the example call", "TypeError", "missing 1 required", "'x'"], args=())


def test_the_cause_of_a_failing_call_is_kept():
    with pytest.raises(rl.AdapterError, match="fails on the example call") as caught:
        adapt(params={"layer": {}})
    assert isinstance(caught.value.__cause__, KeyError)


def test_find_sites_refuses_the_same_calls():
    with pytest.raises(rl.AdapterError, match="fails on the example call, with KeyError"):
        rl.find_sites(model, {"layer": {}}, X)


@pytest.mark.parametrize(
    "use",
    [
        lambda y, n: y if n else -y,
        lambda y, n: y[: int(n)],
        lambda y, n: [y, -y][n],
        lambda y, n: sum([y for _ in range(n)]),
        lambda y, n: y + np.asarray(n),
        lambda y, n: y + jnp.ones(n),
        lambda y, n: y.reshape(n, -1),
    ],
    ids=["if", "int", "index", "range", "numpy", "shape", "reshape"],
)
def test_a_traced_value_used_as_a_static_one_says_to_pass_a_python_value(use):
    def apply_fn(p, x, n):
        return use(model(p, x), n)

    assert adapt(apply_fn, args=(X, 1)).sites
    refused(
        ["uses a traced value as a static one", "pass the argument as a Python bool, int or str"],
        apply_fn,
        args=(X, jnp.array(1)),
    )


def test_parameters_captured_by_a_closure_are_found_out():
    refused(
        ["never uses any of its 4 parameters", "closes over", r"shape \(4, 8\)", "closure",
         r"apply_fn\(params, \*args\)"],
        lambda p, x: model(BASE, x),
    )  # fmt: skip


def test_parameters_captured_by_a_jitted_closure_are_found_out():
    refused(
        ["never uses any of its 4 parameters", "captured by a closure"],
        jax.jit(lambda p, x: model(BASE, x)),
    )


def test_a_function_that_ignores_its_parameters_is_not_accused_of_a_closure():
    with pytest.raises(rl.AdapterError, match="never uses any of its 4 parameters") as caught:
        adapt(lambda p, x: 2 * x)
    assert "closure" not in str(caught.value)


def test_one_captured_weight_among_others_is_refused_when_targeted():
    refused(
        ["'layer/kernel'", r"shape \(4, 8\)", "never used by the traced program",
         r"exclude=\['layer/kernel'\]"],
        lambda p, x: model({**p, "layer": BASE["layer"]}, x),
        targets=["kernel"],
    )  # fmt: skip


def leaky():
    """A function that uses a value of its earlier call."""
    memory = []

    def apply_fn(p, x):
        h = model(p, x) + (memory[-1] if memory else 0.0)
        memory.append(h.sum())
        return h

    return apply_fn


NOT_PURE = r"not pure: it used a value left over.*leaked tracer.*Return such values"


def test_a_leaked_tracer_is_named_when_the_function_is_adapted_again():
    apply_fn = leaky()
    adapt(apply_fn)
    refused(NOT_PURE, apply_fn)


def test_a_leaked_tracer_is_named_when_the_adapted_function_is_called():
    params, apply, _ = adapt(leaky())
    with pytest.raises(rl.AdapterError, match=NOT_PURE):
        apply(params, X)


def test_a_leaked_tracer_does_not_pass_a_jit_in_silence():
    # A surrounding trace cannot tell a dead tracer from a live one; compiling does.
    params, apply, _ = adapt(leaky())
    with pytest.raises((rl.AdapterError, jax.errors.UnexpectedTracerError), match="leaked"):
        jax.jit(apply)(params, X)


def test_a_tracer_of_a_surrounding_trace_is_not_taken_for_a_leak():
    params, _, _ = adapt()

    @jax.jit
    def outer(shift):
        shifted, apply, _ = adapt(lambda p, x: model(p, x) + shift)
        return apply(shifted._replace(lora=params.lora), X)

    np.testing.assert_allclose(outer(jnp.array(2.0)), model(BASE, X) + 2.0, rtol=1e-6)


def test_outputs_that_are_no_arrays_pass_through():
    params, apply, _ = adapt(lambda p, x: {"y": model(p, x), "name": "small", "none": None, "n": 3})
    out = apply(params, X)
    assert (out["name"], out["none"], out["n"]) == ("small", None, 3)
    assert out["y"].shape == (3, 2)


# Numbers of the config.


@pytest.mark.parametrize("rank", [0, -1, True, False, 2.0, 8.5, "8", None, np.float32(2), [2]])
def test_a_rank_that_is_no_int_above_zero_is_refused(rank):
    asked = re.escape(repr(rank))
    with pytest.raises(rl.AdapterError, match=f"LoraConfig.rank must be an int .*, found {asked}"):
        rl.LoraConfig(rank=rank)
    with pytest.raises(rl.AdapterError, match=f"rank must be an int of at least 1, found {asked}"):
        rl.scale(1.0, rank)


BAD_ALPHAS = [0, 0.0, -1.0, float("inf"), -float("inf"), float("nan"), "16", None, True, 1j]


@pytest.mark.parametrize("alpha", BAD_ALPHAS)
def test_an_alpha_that_is_no_finite_number_above_zero_is_refused(alpha):
    asked = re.escape(repr(alpha))
    with pytest.raises(rl.AdapterError, match=f"LoraConfig.alpha must be a finite .* {asked}"):
        rl.LoraConfig(rank=2, alpha=alpha)
    with pytest.raises(rl.AdapterError, match=f"alpha must be a finite number .*, found {asked}"):
        rl.scale(alpha, 2)


def test_an_alpha_beyond_the_floats_is_refused():
    with pytest.raises(rl.AdapterError, match=r"LoraConfig.alpha must be a finite number"):
        rl.LoraConfig(rank=2, alpha=10**400)


def test_the_numbers_of_a_rule_are_refused_with_its_pattern():
    with pytest.raises(rl.AdapterError, match=r"Rule\('q/.\*'\)\.rank must be .*, found 0"):
        rl.Rule("q/.*", rank=0)
    with pytest.raises(rl.AdapterError, match=r"Rule\('q/.\*'\)\.alpha must be .*, found nan"):
        rl.Rule("q/.*", alpha=float("nan"))


def test_a_rule_that_changes_nothing_is_refused():
    with pytest.raises(rl.AdapterError, match=r"Rule\('q/.\*'\) sets neither rank nor alpha"):
        rl.Rule("q/.*")


@pytest.mark.parametrize("pattern", ["(", "*", 3, None])
def test_a_pattern_that_is_no_regex_is_refused(pattern):
    asked = re.escape(repr(pattern))
    with pytest.raises(rl.AdapterError, match=f"Rule.pattern must be a regular .* found {asked}"):
        rl.Rule(pattern, rank=2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("targets", "(", r"LoraConfig\.targets must be a regular expression, found '\('"),
        ("exclude", "[", r"LoraConfig\.exclude must be a regular expression, found '\['"),
        ("targets", 3, r"LoraConfig\.targets must be a regex or a list of path suffixes, found 3"),
        ("targets", None, r"LoraConfig\.targets must be a regex or a list .*, found None"),
        (
            "targets",
            ["q", 3],
            r"LoraConfig\.targets must be a regex or a list .*, found \['q', 3\]",
        ),
        ("exclude", ("",), r"LoraConfig\.exclude must be a regex or a list of path suffixes"),
        ("rules", rl.Rule("q", 2), r"LoraConfig\.rules must be a tuple of Rule, found Rule\("),
        ("rules", [{"pattern": "q"}], r"LoraConfig\.rules must be a tuple of Rule, found \[\{"),
        ("scaling", "alpha", r"LoraConfig\.scaling must be one of \('rslora', 'lora'\).*'alpha'"),
        ("init", "zeros", r"LoraConfig\.init must be one of \('kaiming', 'normal'\).*'zeros'"),
        (
            "unsupported",
            "skip",
            r"LoraConfig\.unsupported must be one of .*'merge'\), found 'skip'",
        ),
        ("dtype", "float31", r"LoraConfig\.dtype is not a dtype: 'float31'"),
        ("dtype", "int8", r"LoraConfig\.dtype must be a floating dtype, found int8"),
        ("dtype", jnp.complex64, r"LoraConfig\.dtype must be a floating dtype, found complex64"),
        ("dtype", bool, r"LoraConfig\.dtype must be a floating dtype, found bool"),
    ],
)
def test_a_field_out_of_range_says_what_it_may_be(field, value, message):
    with pytest.raises(rl.AdapterError, match=message):
        rl.LoraConfig(**{"rank": 2, field: value})


def test_an_unknown_scaling_is_refused_by_scale_too():
    with pytest.raises(rl.AdapterError, match=r"scaling must be one of \('rslora', 'lora'\)"):
        rl.scale(1.0, 2, "sqrt")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"rank": 2, "r": 3, "lora_alpha": 1},
            r"Unknown keys \['lora_alpha', 'r'\] for LoraConfig",
        ),
        ({"rank": 2, "r": 3}, r"It knows \['rank', 'alpha', 'targets', 'exclude', 'rules'"),
        ({"alpha": 2.0}, r"LoraConfig needs the keys \['rank'\], found \['alpha'\]"),
        ({"rank": 2, "rules": {"q": 4}}, r"rules must be a list of mappings, found \{'q': 4\}"),
        ({"rank": 2, "rules": ["q"]}, r"Rule is read from a mapping, found 'q'"),
        ({"rank": 2, "rules": [{"pattern": "q", "r": 4}]}, r"Unknown keys \['r'\] for Rule"),
        ({"rank": 2, "rules": [{"rank": 4}]}, r"Rule needs the keys \['pattern'\]"),
        ({"rank": 2, "rules": [{"pattern": "q"}]}, r"Rule\('q'\) sets neither rank nor alpha"),
        ({"rank": 2.5}, r"LoraConfig\.rank must be an int of at least 1, found 2\.5"),
        ([("rank", 2)], r"LoraConfig is read from a mapping, found \[\('rank', 2\)\]"),
    ],
)
def test_a_written_config_that_does_not_fit_is_refused(data, message):
    with pytest.raises(rl.AdapterError, match=message):
        rl.LoraConfig.from_dict(data)


def test_a_config_with_a_function_cannot_be_written():
    config = rl.LoraConfig(rank=2, init=jax.random.normal)
    with pytest.raises(rl.AdapterError, match=r"LoraConfig\.init is the function .*'kaiming'"):
        config.to_dict()


@pytest.mark.parametrize(
    ("init", "found"),
    [
        (lambda key, shape, dtype: jax.random.normal(key, (2, 2), dtype), r"\(2, 2\) of float32"),
        (
            lambda key, shape, dtype: jax.random.normal(key, shape, jnp.bfloat16),
            r"\(4, 2\) of bfloat16",
        ),
    ],
    ids=["shape", "dtype"],
)
def test_an_initializer_that_returns_something_else_is_refused(init, found):
    asked = r"LoraConfig\.init was asked for \(4, 2\) of float32 at 'layer/kernel' and gave "
    refused(asked + found, init=init)


@pytest.mark.parametrize("init", [jax.nn.initializers.zeros, jax.nn.initializers.ones])
def test_a_constant_initializer_is_accepted_without_a_warning(init):
    params, _, _ = adapt(init=init)
    assert len(set(params.lora["layer"]["kernel"]["a"].ravel().tolist())) == 1


def by_rank(key, shape, dtype):
    return jax.random.normal(key, shape, dtype) / shape[-1] ** 0.5


def test_an_initializer_whose_variance_depends_on_the_rank_warns_under_rslora():
    message = r"LoraConfig\.init draws .* at rank 16 and .* rank 1024.*rank-stable.*'kaiming'"
    with pytest.warns(UserWarning, match=message):
        adapt(init=by_rank)


def test_an_initializer_whose_variance_depends_on_the_rank_is_fine_under_lora():
    assert adapt(init=by_rank, scaling="lora").sites


# A rank above the largest that a weight can have.


def test_a_rank_above_the_smaller_side_warns_with_the_path_and_the_limit():
    with pytest.warns(UserWarning, match=r"'layer/kernel': rank 5 is above 4, .*\(4, 8\)") as seen:
        adapt(rank=5)
    assert [warning.filename for warning in seen] == [__file__]


def test_a_rank_above_the_smaller_side_still_works():
    with pytest.warns(UserWarning, match="rank 5 is above 4"):
        params, apply, sites = adapt(rank=5)
    params = params._replace(lora=jax.tree.map(lambda f: jnp.full_like(f, 0.3), params.lora))
    assert params.lora["layer"]["kernel"]["a"].shape == (4, 5)
    expected = model(rl.merge(params, sites), X)
    np.testing.assert_allclose(apply(params, X), expected, rtol=1e-5)


def test_the_largest_possible_rank_does_not_warn():
    assert adapt(rank=4).sites[0].rank == 4


def test_a_rule_with_too_large_a_rank_warns_for_its_site():
    with pytest.warns(UserWarning, match="'layer/kernel': rank 9 is above 4"):
        adapt(rules=(rl.Rule("layer/kernel", rank=9),))


# Targets, excludes and rules that do not fit the model.

LIST = r"print\(rl\.find_sites\(\.\.\.\)\) lists every path"


def test_a_suffix_that_matches_nothing_names_the_nearest_paths():
    refused(
        [r"The target 'kernal' matches nothing \(as a path suffix\)", "nearest paths are",
         "'layer/kernel'", LIST],
        targets=["kernal"],
    )  # fmt: skip


def test_a_regex_that_matches_nothing_names_the_nearest_paths():
    refused(
        [r"The target 'layer/kern' matches nothing \(as a regex for whole paths\)",
         "nearest paths are 'layer/kernel'", LIST],
        targets="layer/kern",
    )  # fmt: skip


def test_one_entry_of_a_list_that_matches_nothing_is_refused():
    refused(
        [r"The target 'hed' matches nothing", "nearest paths are 'head'"],
        targets=["kernel", "hed"],
    )


def test_an_exclude_that_matches_nothing_is_refused():
    refused(
        [r"The exclude 'lm_head' matches nothing \(as a path suffix\)", "'head'", LIST],
        exclude=["lm_head"],
    )


def test_a_rule_that_matches_no_site_is_refused():
    refused(
        [r"The rule 'layers/\.\*' matches none of the \d+ adapted weights, as a regex for whole",
         "nearest are 'layer/kernel'"],
        rules=(rl.Rule("layers/.*", rank=4),),
    )  # fmt: skip


def test_a_rule_for_a_weight_that_is_not_adapted_is_refused():
    refused(
        "The rule 'head' matches none.*or choose the weight with targets",
        rules=(rl.Rule("head", rank=1),),
    )


def test_a_rule_that_is_always_too_late_is_still_a_match():
    rules = (rl.Rule(".*", rank=1), rl.Rule("layer/kernel", rank=2))
    assert [site.rank for site in adapt(rules=rules).sites] == [1]


@pytest.mark.parametrize("targets", [["bias"], ["bias", "kernel"], r".*/(bias|scale)"])
def test_a_target_that_matches_only_vectors_says_what_can_be_adapted(targets):
    refused(
        ["The target ", "matches only", r"'layer/bias' of shape \(8,\) \(a vector\)", "nearest",
         "'layer/kernel'"],
        targets=targets,
    )  # fmt: skip


def test_one_entry_of_a_list_that_matches_only_vectors_is_refused():
    refused(["The target 'scale' matches only", "'norm/scale'"], targets=["kernel", "scale"])


def test_no_targets_at_all_are_refused_with_what_there_is():
    refused(
        [r"Nothing is left to adapt with targets=\(\)", "'layer/kernel': not targeted",
         "'layer/bias': a vector", r"LoraConfig\(targets=\[\.\.\.\]\)"],
        targets=[],
    )  # fmt: skip


def test_excluding_everything_is_refused():
    refused(
        ["Nothing is left to adapt", r"exclude=\('kernel',\)", "'layer/kernel': excluded"],
        exclude=["kernel"],
    )


def test_a_model_of_one_head_alone_is_refused_under_all_linear():
    refused(
        ["Nothing is left to adapt with targets='all-linear'", r"'w': not targeted \(head\)"],
        lambda p, x: x @ p["w"],
        {"w": jnp.ones((4, 4))},
    )


@pytest.mark.parametrize("dtype", ["complex64", "int8", "int32", "bool"])
def test_a_weight_that_is_no_real_float_cannot_be_targeted(dtype):
    params = {"w": jnp.ones((4, 4), dtype), "v": jnp.eye(4), "head": jnp.eye(4)}
    refused(
        [r"'w' of shape \(4, 4\) is targeted", f"{dtype}, not floating point", r"exclude=\['w'\]"],
        lambda p, x: jnp.tanh((x @ p["w"]).real @ p["v"]) @ p["head"],
        params,
        targets=["w"],
    )


def test_a_weight_that_is_no_real_float_is_left_alone_by_all_linear_with_a_warning():
    params = {"w": jnp.ones((4, 4), jnp.int8), "v": jnp.eye(4), "head": jnp.eye(4)}
    with pytest.warns(UserWarning, match="leaves out 'w' .*int8, not floating point"):
        sites = adapt(lambda p, x: jnp.tanh(x @ p["w"] @ p["v"]) @ p["head"], params).sites
    assert [site.path for site in sites] == ["v"]
    assert "left alone, int8, not floating point: w" in str(sites)


def test_a_complex_weight_is_not_said_to_be_in_no_matrix_product():
    params = {"w": jnp.eye(4, dtype="complex64"), "v": jnp.eye(4), "head": jnp.eye(4)}
    with pytest.raises(rl.AdapterError, match="complex64, not floating point") as caught:
        adapt(lambda p, x: jnp.tanh((x @ p["w"]).real @ p["v"]) @ p["head"], params, targets=["w"])
    assert "no matrix product" not in str(caught.value)


def test_two_parameters_of_one_path_are_refused():
    params = {"a": {"b": jnp.eye(4)}, "a/b": jnp.eye(4)}
    refused(
        ["'a/b' names more than one leaf", "Rename one of the keys"],
        lambda p, x: x @ p["a"]["b"] @ p["a/b"],
        params,
    )


# Uses without a low-rank form.


def sorting(p, x):
    return model(p, x) + jnp.sort(p["layer"]["kernel"], axis=0)[0, :2]


def spectral(p, x):
    return model(p, x) / jnp.linalg.svd(p["layer"]["kernel"], compute_uv=False)[0]


def factorized(p, x):
    return model(p, x) + jnp.linalg.qr(p["layer"]["kernel"])[1].sum()


def squared(p, x):
    return model(p, x) + (p["layer"]["kernel"] ** 2).sum()


def largest(p, x):
    return model(p, x) * p["layer"]["kernel"].max()


def normalized(p, x):
    w = p["layer"]["kernel"]
    return model({**p, "layer": {**p["layer"], "kernel": w / jnp.linalg.norm(w, axis=0)}}, x)


def rounded(p, x):
    w = p["layer"]["kernel"]
    return model({**p, "layer": {**p["layer"], "kernel": w.astype(jnp.int32)}}, x)


OPAQUE = {
    sorting: "sort",
    spectral: "svd",
    factorized: "(geqrf|qr|householder_product)",
    squared: "(square|integer_pow|mul)",
    largest: "reduce_max",
}


def test_a_weight_that_no_product_uses_directly_names_its_use():
    refused(
        [r"'layer/kernel' of shape \(4, 8\) is targeted",
         f"used by `convert_element_type` at .*{HERE}rounded", "cast to int32",
         r"exclude=\['layer/kernel'\]", "unsupported='merge'"],
        rounded,
        targets=["kernel"],
    )  # fmt: skip


@pytest.mark.parametrize("apply_fn", OPAQUE, ids=lambda f: f.__name__)
def test_a_use_without_a_low_rank_form_names_path_primitive_file_and_line(apply_fn):
    refused(
        [r"'layer/kernel' of shape \(4, 8\) is targeted, but it cannot be adapted",
         f"used by `{OPAQUE[apply_fn]}` at .*{HERE}{apply_fn.__name__}",
         r"exclude=\['layer/kernel'\]", r"unsupported='merge'"],
        apply_fn,
        targets=["kernel"],
    )  # fmt: skip


def test_a_normalized_weight_names_the_first_such_use():
    refused(
        ["'layer/kernel'", f"at .*{HERE}normalized", "unsupported='merge'"],
        normalized,
        targets=["kernel"],
    )


@pytest.mark.parametrize(
    "apply_fn", [sorting, spectral, squared, largest], ids=lambda f: f.__name__
)
def test_all_linear_refuses_a_product_weight_with_another_use_too(apply_fn):
    refused(["'layer/kernel'", "besides its matrix product"], apply_fn)


@pytest.mark.parametrize(
    "apply_fn", [sorting, spectral, squared, largest, normalized], ids=lambda f: f.__name__
)
def test_merging_the_unsupported_gives_exactly_the_merged_model(apply_fn):
    params, apply, sites = adapt(apply_fn, targets=["kernel"], unsupported="merge")
    keys = jax.random.split(KEY, 2)
    factors = {
        name: 0.3 * jax.random.normal(key, leaf.shape)
        for key, (name, leaf) in zip(keys, params.lora["layer"]["kernel"].items(), strict=True)
    }
    params = params._replace(lora={"layer": {"kernel": factors}})
    expected = apply_fn(rl.merge(params, sites), X)
    assert not np.allclose(expected, apply_fn(BASE, X), rtol=1e-2)
    np.testing.assert_allclose(apply(params, X), expected, rtol=1e-5, atol=1e-6)


def columns_scaled(p, x):
    """The second kernel reaches its product through a reparametrization alone."""
    h = jnp.tanh(x @ p["first"]["kernel"])
    return jnp.tanh(h @ (p["second"]["kernel"] * p["second"]["scale"])) @ p["head"]


SCALED = {
    "first": {"kernel": jnp.eye(4)},
    "second": {"kernel": jnp.eye(4), "scale": jnp.arange(4.0)},
    "head": jnp.eye(4),
}


@pytest.mark.parametrize("targets", [["kernel"], r".*/kernel"], ids=["suffix", "regex"])
def test_a_target_never_drops_one_of_its_weights_in_silence(targets):
    refused(
        [r"'second/kernel' of shape \(4, 4\) is targeted, but it cannot be adapted",
         f"`mul` at .*{HERE}columns_scaled", "unsupported='merge'"],
        columns_scaled,
        SCALED,
        targets=targets,
    )  # fmt: skip


@pytest.mark.parametrize("targets", [["kernel"], r".*/kernel"], ids=["suffix", "regex"])
def test_merging_the_unsupported_adapts_every_weight_of_a_target(targets):
    sites = adapt(columns_scaled, SCALED, targets=targets, unsupported="merge").sites
    assert [site.path for site in sites] == ["first/kernel", "second/kernel"]


def test_all_linear_warns_of_a_weight_that_hides_behind_a_reparametrization():
    message = (
        rf"leaves out 'second/kernel' of shape \(4, 4\), which .*`mul` at .*{HERE}columns_scaled"
    )
    with pytest.warns(UserWarning, match=message) as seen:
        sites = adapt(columns_scaled, SCALED).sites
    assert [site.path for site in sites] == ["first/kernel"]
    assert [warning.filename for warning in seen] == [__file__]


def test_excluding_the_hidden_weight_silences_the_warning():
    assert adapt(columns_scaled, SCALED, exclude=["second/kernel"]).sites


def test_merging_is_said_in_the_report():
    sites = adapt(sorting, targets=["kernel"], unsupported="merge").sites
    [line] = [line for line in str(sites).splitlines() if line.startswith("formed whole")]
    assert re.search(f"layer/kernel: `sort` at .*{HERE}sorting", line)


def test_a_use_that_the_example_did_not_show_is_refused_when_it_comes():
    def apply_fn(p, x, late=False):
        return sorting(p, x) if late else model(p, x)

    params, apply, _ = adapt(apply_fn)
    message = f"'layer/kernel' has an adapter, but `sort` at .*{HERE}.*example call that shows this"
    with pytest.raises(rl.AdapterError, match=message):
        apply(params, X, late=True)


GROUPED = {"conv": jnp.ones((3, 1, 4)), "w": jnp.eye(4), "head": jnp.eye(4)}


def grouped(p, x):
    names = ("NWC", "WIO", "NWC")
    h = jax.lax.conv_general_dilated(
        x[None], p["conv"], (1,), "SAME", dimension_numbers=names, feature_group_count=4
    )
    return jnp.tanh(h[0] @ p["w"]) @ p["head"]


def test_a_grouped_convolution_is_refused_with_its_line_and_the_remedy():
    refused(
        ["'conv' of shape", r"\(3, 1, 4\)", f"`conv_general_dilated` at .*{HERE}grouped",
         "a grouped convolution has no low-rank form; exclude it"],
        grouped,
        GROUPED,
        targets=["conv", "w"],
    )  # fmt: skip


def test_a_grouped_convolution_is_left_alone_with_its_reason_by_all_linear():
    with pytest.warns(UserWarning, match=f"leaves out 'conv' of shape .*at .*{HERE}grouped"):
        sites = adapt(grouped, GROUPED).sites
    assert [site.path for site in sites] == ["w"]
    assert "a grouped convolution has no low-rank form" in str(sites)


SPREAD = {"conv": jnp.ones((3, 1, 4)), "head": jnp.eye(4)}


def spread(p, x):
    """A kernel of one channel, repeated over the channels of the input."""
    kernel = jnp.broadcast_to(p["conv"], (3, 4, 4))
    h = jax.lax.conv_general_dilated(
        x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(h[0]) @ p["head"]


def test_a_repeated_convolution_kernel_is_refused_as_a_use_and_not_as_a_bad_example():
    with pytest.raises(
        rl.AdapterError, match=f"'conv'.*conv_general_dilated` at .*{HERE}"
    ) as caught:
        adapt(spread, SPREAD, targets=["conv"])
    assert "example call" not in str(caught.value)


def test_a_repeated_convolution_kernel_can_be_merged():
    params, apply, sites = adapt(spread, SPREAD, targets=["conv"], unsupported="merge")
    params = params._replace(lora=jax.tree.map(lambda f: jnp.full_like(f, 0.3), params.lora))
    expected = spread(rl.merge(params, sites), X)
    np.testing.assert_allclose(apply(params, X), expected, rtol=1e-5)


# Keys and configs of the wrong kind.


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (jax.random.PRNGKey(0), r"of shape \(2,\)"),
        (jax.random.split(KEY, 3), r"of shape \(3,\)"),
        (0, "int"),
        (None, "NoneType"),
        (np.zeros(2, np.uint32), r"ndarray of shape \(2,\)"),
    ],
    ids=["old style", "a batch", "an int", "none", "numpy"],
)
def test_anything_but_one_typed_key_is_refused(key, found):
    refused(f"key must be one typed PRNG key, found .*{found}.*jax\\.random\\.key\\(0\\)", key=key)


@pytest.mark.parametrize("config", [{"rank": 2}, None, 2])
def test_a_config_of_another_type_is_refused(config):
    found = type(config).__name__
    with pytest.raises(rl.AdapterError, match=f"config must be a LoraConfig, found {found}"):
        rl.adapt(model, BASE, X, config=config, key=KEY)


# Anything but the LoraParams that `adapt` returned.


@pytest.mark.parametrize("params", [BASE, None, (BASE, {}), X], ids=["base", "none", "tuple", "x"])
def test_apply_refuses_anything_but_lora_params(params):
    _, apply, _ = model_and_factors()
    found = type(params).__name__
    message = rf"apply takes the LoraParams .*, found {found}.*LoraParams\(base, \{{\}}\)"
    with pytest.raises(rl.AdapterError, match=message):
        apply(params, X)


@pytest.mark.parametrize(
    ("params", "found"),
    [
        (BASE, "dict"),
        (None, "NoneType"),
        (rl.LoraParams(BASE, {}), "a LoraParams without adapters"),
    ],
)
def test_value_and_grad_refuses_anything_but_adapters(params, found):
    with pytest.raises(rl.AdapterError, match=f"differentiates the adapters .*, found {found}"):
        rl.value_and_grad(lambda p: 0.0)(params)


@pytest.mark.parametrize(
    "use",
    [
        rl.optim.freeze_base(optax.sgd(0.1)).init,
        rl.optim.lora_plus(0.1).init,
        rl.optim.trainable_mask,
    ],
    ids=["freeze_base", "lora_plus", "trainable_mask"],
)
def test_optim_refuses_anything_but_lora_params(use):
    with pytest.raises(
        rl.AdapterError, match=r"LoraParams that `adapt` returned, found dict.*base"
    ):
        use(BASE)


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan")])
def test_lora_plus_refuses_a_ratio_that_is_not_above_zero(ratio):
    with pytest.raises(rl.AdapterError, match=f"lora_plus needs a ratio above 0, found {ratio!r}"):
        rl.optim.lora_plus(0.1, ratio)


def test_merge_refuses_anything_but_lora_params():
    _, _, sites = model_and_factors()
    with pytest.raises(rl.AdapterError, match=r"LoraParams.*found dict"):
        rl.merge(BASE, sites)


# Factors and bases that do not fit the sites.


def both_ways(params, message):
    """Applying and merging refuse the same factors with the same message."""
    _, apply, sites = model_and_factors()
    with pytest.raises(rl.AdapterError, match=message):
        apply(params, X)
    with pytest.raises(rl.AdapterError, match=message):
        rl.merge(params, sites)


def test_factors_of_another_rank_are_refused_with_path_and_rank():
    other = adapt(rank=3).params
    found = r"'layer/kernel/a' must have shape \(4, 2\) \(rank 2, axes 'io'\), found \(4, 3\)"
    both_ways(other, found)


def test_a_second_factor_of_another_shape_is_refused_by_its_own_path():
    params, _, _ = model_and_factors()
    factors = {**params.lora["layer"]["kernel"], "b": jnp.ones((2, 9))}
    params = params._replace(lora={"layer": {"kernel": factors}})
    both_ways(params, r"'layer/kernel/b' must have shape \(2, 8\) .*, found \(2, 9\)")


def test_unknown_factors_are_refused_with_their_paths():
    params, _, _ = model_and_factors()
    extra = {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 2))}
    params = params._replace(lora={**params.lora, "head": extra})
    both_ways(params, r"no site knows: \['head/a', 'head/b'\]. The sites are \['layer/kernel'\]")


@pytest.mark.parametrize(
    ("lora", "found"),
    [
        ({"layer": {"kernel": {"a": jnp.ones((4, 2))}}}, r"\['a'\]"),
        ({"layer": {"kernel": {"a": 1, "b": 2, "c": 3}}}, r"\['a', 'b', 'c'\]"),
        ({"layer": {"kernal": {"a": 1, "b": 2}}}, "nothing"),
        ({"layer": {"kernel": jnp.ones((4, 8))}}, "nothing"),
    ],
    ids=["one missing", "one too many", "another path", "an array"],
)
def test_missing_factors_are_refused_with_the_path_and_what_was_found(lora, found):
    params = rl.LoraParams(BASE, lora)
    both_ways(params, rf"'layer/kernel' needs the factors \['a', 'b'\], found {found}\. Pass")


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", ["a", "b"])
def test_factors_that_are_not_finite_are_refused_at_the_merge(name, bad):
    params, _, sites = model_and_factors()
    factors = dict(params.lora["layer"]["kernel"])
    factors[name] = factors[name].at[0, 0].set(bad)
    params = params._replace(lora={"layer": {"kernel": factors}})
    # One row of `a` reaches 8 outputs, one column of `b` reaches 4 inputs.
    count = {"a": 8, "b": 4}[name]
    message = rf"'layer/kernel' gives {count} of 32 values that are not finite.*NaN or infinity"
    with pytest.raises(rl.AdapterError, match=message):
        rl.merge(params, sites)


def test_a_merge_that_overflows_its_dtype_is_refused():
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), BASE)
    params, _, sites = adapt(params=base, args=(X.astype(jnp.float16),))
    lora = jax.tree.map(lambda leaf: jnp.full_like(leaf, 300.0), params.lora)
    message = r"'layer/kernel' gives 32 of 32 .* in float16.*wider dtype"
    with pytest.raises(rl.AdapterError, match=message):
        rl.merge(rl.LoraParams(base, lora), sites)


def test_factors_that_are_not_finite_pass_a_traced_merge():
    params, _, sites = model_and_factors()
    merged = jax.jit(lambda p: rl.merge(p, sites))(params)
    np.testing.assert_allclose(
        merged["layer"]["kernel"], rl.merge(params, sites)["layer"]["kernel"], rtol=1e-6
    )


def test_a_base_of_another_shape_is_refused_with_the_path():
    params, apply, sites = adapt(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"][: p["w"].shape[1]],
        {"w": jnp.ones((4, 4)), "v": jnp.ones((8, 2))},
    )
    params = params._replace(base={**params.base, "w": jnp.ones((4, 5))})
    message = r"The site 'w' needs a base weight of shape \(4, 4\), found \(4, 5\)"
    with pytest.raises(rl.AdapterError, match=message):
        apply(params, X)
    with pytest.raises(rl.AdapterError, match=message):
        rl.merge(params, sites)


def test_a_base_without_the_weight_is_refused_with_the_path():
    params, _, sites = model_and_factors()
    message = r"The site 'layer/kernel' needs a base weight of shape \(4, 8\), found none"
    with pytest.raises(rl.AdapterError, match=message):
        rl.merge(params._replace(base={"head": BASE["head"]}), sites)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_taking_factors_out_of_a_narrow_weight_is_refused_with_the_advice(dtype):
    params, _, sites = model_and_factors()
    merged = jax.tree.map(lambda leaf: leaf.astype(dtype), rl.merge(params, sites))
    message = f"'layer/kernel' is {dtype}: the merge rounded.*Keep the base tree"
    with pytest.raises(rl.AdapterError, match=message):
        rl.unmerge(merged, params.lora, sites)


def test_a_site_without_a_rank_has_no_factor_shapes():
    [site] = [site for site in rl.find_sites(model, BASE, X) if site.path == "layer/kernel"]
    with pytest.raises(rl.AdapterError, match="'layer/kernel' has no adapter yet: `adapt` gives"):
        _ = site.factor_shapes


def test_found_sites_are_not_merged_without_an_adapter():
    params, _, _ = model_and_factors()
    with pytest.raises(rl.AdapterError, match="'head' needs the factors"):
        rl.merge(params, rl.find_sites(model, BASE, X))


def test_no_adapter_at_all_is_no_error():
    _, apply, sites = model_and_factors()
    empty = rl.LoraParams(BASE, {})
    assert (apply(empty, X) == model(BASE, X)).all()
    assert (rl.merge(empty, sites)["head"] == BASE["head"]).all()


def test_an_adapter_error_is_a_value_error():
    assert issubclass(rl.AdapterError, ValueError)
    params, _, [site] = model_and_factors()
    # alpha / sqrt(r) * r * 0.5 * 0.5, with alpha = 16 and r = 2.
    change = delta(site, params.lora["layer"]["kernel"])
    np.testing.assert_allclose(change, np.full((4, 8), 16 / 2**0.5 * 2 * 0.25), rtol=1e-6)


def masked(p, x, mask):
    return x @ p["first"]["kernel"] @ jnp.where(mask, p["second"]["kernel"], 0.0)


def summed_by_hand(p, x, mask):
    h = x @ p["first"]["kernel"]
    return (h[..., None] * p["second"]["kernel"]).sum(-2)


@pytest.mark.parametrize("apply_fn", [masked, summed_by_hand])
def test_a_matrix_without_a_low_rank_form_is_not_dropped_beside_others(apply_fn):
    params = {"first": {"kernel": jnp.eye(4)}, "second": {"kernel": jnp.eye(4)}}
    config = rl.LoraConfig(rank=1, targets=["kernel"])
    with pytest.raises(rl.AdapterError, match=r"'second/kernel' .* targeted, but it cannot"):
        rl.adapt(
            apply_fn, params, jnp.ones((2, 4)), jnp.eye(4) > 0, config=config, key=jax.random.key(0)
        )


def test_all_linear_warns_of_a_matrix_masked_by_an_argument():
    params = {"first": {"kernel": jnp.eye(4)}, "second": {"kernel": jnp.eye(4)}, "head": jnp.eye(4)}
    config, key = rl.LoraConfig(rank=1), jax.random.key(0)
    with pytest.warns(UserWarning, match="leaves out 'second/kernel'"):
        adapted = rl.adapt(
            lambda p, *args: jnp.tanh(masked(p, *args)) @ p["head"],
            params,
            jnp.ones((2, 4)),
            jnp.eye(4) > 0,
            config=config,
            key=key,
        )
    assert [site.path for site in adapted.sites] == ["first/kernel"]


def test_an_nnx_module_that_is_changed_in_place_is_refused():
    class Normed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    config, key = rl.LoraConfig(rank=1, targets=["dense/kernel"]), jax.random.key(0)
    with pytest.raises(rl.AdapterError, match=r"not pure: it changes an nnx object .*nnx\.split"):
        rl.adapt(lambda m, x: m(x), Normed(nnx.Rngs(0)), jnp.ones((2, 4)), config=config, key=key)


def test_factors_that_are_no_floats_are_refused():
    adapted = rl.adapt(
        lambda p, x: x @ p["w"],
        {"w": jnp.eye(4)},
        jnp.ones(4),
        config=rl.LoraConfig(rank=1, targets=["w"]),
        key=jax.random.key(0),
    )
    lora = jax.tree.map(lambda leaf: leaf.astype(int), adapted.params.lora)
    with pytest.raises(rl.AdapterError, match="'w/a' must be floating point, found int32"):
        adapted.apply(adapted.params._replace(lora=lora), jnp.ones(4))
