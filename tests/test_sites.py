"""Which weights are adapted, by which rule, and what the report says about each of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import rslora_jax as rl

KEY = jax.random.key(0)
TOKENS = jnp.array([[1, 2, 3]])
VOCAB, WIDTH = 11, 6


def adapted(apply_fn, params, *args, **config):
    """Abstract parameters: nothing is computed."""
    return concrete(apply_fn, jax.eval_shape(lambda tree: tree, params), *args, **config)


def concrete(apply_fn, params, *args, **config):
    return rl.adapt(apply_fn, params, *args, config=rl.LoraConfig(**{"rank": 2, **config}), key=KEY)


def chosen(apply_fn, params, *args, **config):
    """The paths that get an adapter."""
    return {site.path for site in adapted(apply_fn, params, *args, **config).sites}


def reasons(sites):
    return {left.path: left.reason for left in sites.left}


def heads(apply_fn, params, *args):
    return {site.path for site in rl.find_sites(apply_fn, params, *args) if site.head}


# The same small language model, five times.


class LinenModel(nn.Module):
    tied: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        h = nn.relu(nn.Dense(WIDTH, name="up")(embed(tokens)))
        h = nn.LayerNorm(name="norm")(nn.Dense(WIDTH, name="down")(h))
        return embed.attend(h) if self.tied else nn.Dense(VOCAB, name="unembed")(h)


class NnxModel(nnx.Module):
    def __init__(self, tied, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.unembed = None if tied else nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        h = nnx.relu(self.up(self.embed(tokens)))
        h = self.norm(self.down(h))
        return self.embed.attend(h) if self.unembed is None else self.unembed(h)


def linen_model(tied):
    model = LinenModel(tied)
    return model.apply, jax.eval_shape(model.init, KEY, TOKENS)


def nnx_model(tied):
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxModel(tied, nnx.Rngs(0))))
    return lambda params, tokens: nnx.merge(graph, params)(tokens), state


def plain_model(tied):
    params = {
        "embed": {"embedding": jnp.ones((VOCAB, WIDTH))},
        "up": {"kernel": jnp.ones((WIDTH, WIDTH))},
        "down": {"kernel": jnp.ones((WIDTH, WIDTH))},
        "norm": {"scale": jnp.ones(WIDTH)},
    }
    if not tied:
        params["unembed"] = {"kernel": jnp.ones((WIDTH, VOCAB))}

    def apply_fn(p, tokens):
        h = jax.nn.relu(p["embed"]["embedding"][tokens] @ p["up"]["kernel"])
        h = jnp.tanh(h @ p["down"]["kernel"]) * p["norm"]["scale"]
        return h @ (p["embed"]["embedding"].T if tied else p["unembed"]["kernel"])

    return apply_fn, params


MODELS = {"linen": linen_model, "nnx": nnx_model, "plain": plain_model}


def inner(paths):
    return {path.removeprefix("params/") for path in paths}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("library", MODELS)
def test_all_linear_takes_the_inner_products_alone(library, tied):
    assert inner(chosen(*MODELS[library](tied), TOKENS)) == {"up/kernel", "down/kernel"}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("library", MODELS)
def test_the_report_says_that_embedding_and_head_were_left_alone(library, tied):
    _, _, sites = adapted(*MODELS[library](tied), TOKENS)
    why = {path.removeprefix("params/"): reason for path, reason in reasons(sites).items()}
    if tied:
        assert why["embed/embedding"] == "not targeted (embedding and head)"
    else:
        assert why["embed/embedding"] == "not targeted (embedding)"
        assert why["unembed/kernel"] == "not targeted (head)"
    assert why["norm/scale"] == "a vector"


@pytest.mark.parametrize("library", MODELS)
def test_a_tied_embedding_can_be_targeted_by_name(library):
    assert inner(chosen(*MODELS[library](True), TOKENS, targets=["embedding"])) == {
        "embed/embedding"
    }


def test_a_jitted_model_has_the_same_sites_as_its_function():
    apply_fn, params = plain_model(False)
    assert (
        rl.find_sites(jax.jit(apply_fn), params, TOKENS).left
        == rl.find_sites(apply_fn, params, TOKENS).left
    )
    assert chosen(jax.jit(apply_fn), params, TOKENS) == chosen(apply_fn, params, TOKENS)


def test_abstract_arguments_give_the_same_sites():
    apply_fn, params = plain_model(False)
    structs = jax.eval_shape(lambda: (params, TOKENS))
    assert [site.path for site in rl.find_sites(apply_fn, *structs)] == [
        site.path for site in rl.find_sites(apply_fn, params, TOKENS)
    ]


# Heads are found by data flow.


def square(*names, width=4):
    return {name: jnp.eye(width) for name in names}


def test_a_head_may_have_any_name():
    def apply_fn(p, x):
        return jnp.tanh(x @ p["lm_head"]) @ p["first"]

    assert heads(apply_fn, square("lm_head", "first"), jnp.ones((2, 4))) == {"first"}


def test_a_head_followed_by_bias_cap_and_softmax_is_a_head():
    def apply_fn(p, x):
        logits = jnp.tanh(x @ p["up"]) @ p["out"] + p["bias"]
        return jax.nn.log_softmax(30.0 * jnp.tanh(logits / 30.0))

    params = {**square("up", "out"), "bias": jnp.ones(4)}
    assert heads(apply_fn, params, jnp.ones((2, 4))) == {"out"}


def test_a_model_with_two_heads_has_both_of_them_left_out():
    def apply_fn(p, x):
        h = jax.nn.relu(jax.nn.relu(x @ p["first"]) @ p["second"])
        return {"policy": jax.nn.softmax(h @ p["policy"]), "value": h @ p["value"]}

    params = square("first", "second", "policy", "value")
    assert heads(apply_fn, params, jnp.ones((2, 4))) == {"policy", "value"}
    assert chosen(apply_fn, params, jnp.ones((2, 4))) == {"first", "second"}


def test_a_head_stays_one_when_hidden_states_are_returned_beside_the_logits():
    def apply_fn(p, x):
        h = jnp.tanh(jnp.tanh(x @ p["first"]) @ p["second"])
        return h @ p["out"], h

    params = square("first", "second", "out")
    assert heads(apply_fn, params, jnp.ones((2, 4))) == {"out"}


def test_a_scanned_stack_without_a_head_has_no_head():
    def apply_fn(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])[0]

    params = {"stack": jnp.ones((3, 4, 4))}
    assert heads(apply_fn, params, jnp.ones((2, 4))) == set()
    assert chosen(apply_fn, params, jnp.ones((2, 4))) == {"stack"}


def test_a_scanned_residual_stack_without_a_head_has_no_head():
    def layer(h, p):
        return h + jax.nn.relu(h @ p["up"]) @ p["down"], None

    def apply_fn(p, x):
        return jax.lax.scan(layer, x, p)[0]

    params = {"up": jnp.ones((3, 4, 8)), "down": jnp.ones((3, 8, 4))}
    assert chosen(apply_fn, params, jnp.ones((2, 4))) == {"up", "down"}


def test_an_indexed_stack_without_a_head_has_no_head():
    def apply_fn(p, x):
        for layer in range(3):
            x = jnp.tanh(x @ p["stack"][layer])
        return x

    params = {"stack": jnp.ones((3, 4, 4))}
    assert chosen(apply_fn, params, jnp.ones((2, 4))) == {"stack"}


def test_a_scanned_stack_with_a_head_keeps_its_layers():
    def apply_fn(p, x):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])[0]
        return h @ p["out"]

    params = {"stack": jnp.ones((3, 4, 4)), "out": jnp.ones((4, 5))}
    assert heads(apply_fn, params, jnp.ones((2, 4))) == {"out"}
    assert chosen(apply_fn, params, jnp.ones((2, 4))) == {"stack"}


def attention(p, h):
    q, k, v = (h @ p[name] for name in "qkv")
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


def encoder(p, x):
    for layer in p["layers"]:
        x = x + attention(layer, x)
        x = x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]
    return x * p["scale"]


ENCODER = {
    "layers": [square("q", "k", "v", "o", "up", "down") for _ in range(2)],
    "scale": jnp.ones(4),
}


def test_an_encoder_with_a_residual_stream_has_no_head():
    assert heads(encoder, ENCODER, jnp.ones((3, 4))) == set()
    assert len(chosen(encoder, ENCODER, jnp.ones((3, 4)))) == 12


def test_a_remat_and_a_branch_do_not_hide_the_head():
    def apply_fn(p, x, flip):
        h = jax.checkpoint(lambda h: jnp.tanh(h @ p["up"]))(x)
        h = jax.lax.cond(flip, jnp.negative, jnp.tanh, h)
        return jax.jit(jnp.matmul)(h, p["out"])

    assert heads(apply_fn, square("up", "out"), jnp.ones((2, 4)), jnp.array(True)) == {"out"}


# Targets, excludes and rules.


def test_a_regex_must_match_the_whole_path():
    args = (encoder, ENCODER, jnp.ones((3, 4)))
    assert chosen(*args, targets=r"layers/0/[qv]") == {"layers/0/q", "layers/0/v"}
    with pytest.raises(rl.AdapterError, match=r"'layers/0' matches nothing \(as a regex"):
        chosen(*args, targets=r"layers/0")


def test_a_suffix_ends_at_a_slash():
    params = {"q": jnp.eye(4), "deq": jnp.eye(4), "layer": {"q": jnp.eye(4)}, "out": jnp.eye(4)}

    def apply_fn(p, x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ p["q"]) @ p["deq"]) @ p["layer"]["q"]) @ p["out"]

    assert chosen(apply_fn, params, jnp.ones(4), targets=["q"]) == {"q", "layer/q"}
    assert chosen(apply_fn, params, jnp.ones(4), targets=["layer/q"]) == {"layer/q"}


def test_suffixes_of_a_list_add_up():
    args = (encoder, ENCODER, jnp.ones((3, 4)))
    assert chosen(*args, targets=["0/q", "down"]) == {
        "layers/0/q",
        "layers/0/down",
        "layers/1/down",
    }


def test_a_regex_that_also_matches_vectors_takes_the_matrices():
    args = (encoder, ENCODER, jnp.ones((3, 4)))
    assert len(chosen(*args, targets=r".*")) == 12


@pytest.mark.parametrize("exclude", [["o", "1/q"], r"layers/(\d/o|1/q)"], ids=["suffixes", "regex"])
def test_what_is_excluded_is_left_alone_and_said_to_be(exclude):
    _, _, sites = adapted(encoder, ENCODER, jnp.ones((3, 4)), exclude=exclude)
    gone = {"layers/0/o", "layers/1/o", "layers/1/q"}
    assert len(sites) == 12 - 3
    assert {path for path, reason in reasons(sites).items() if reason == "excluded"} == gone


def test_a_target_that_is_also_excluded_is_left_out():
    args = (encoder, ENCODER, jnp.ones((3, 4)))
    assert chosen(*args, targets=["q", "k"], exclude=["k"]) == {"layers/0/q", "layers/1/q"}


RULES = (
    rl.Rule(r"layers/0/q", rank=1),
    rl.Rule(r"layers/0/.*", alpha=5.0),
    rl.Rule(r".*/(q|up)", rank=3, alpha=7.0),
)


def test_the_first_matching_rule_wins():
    _, _, sites = adapted(encoder, ENCODER, jnp.ones((3, 4)), rank=2, alpha=4.0, rules=RULES)
    got = {site.path: (site.rank, site.alpha, site.rule) for site in sites}
    assert got["layers/0/q"] == (1, 4.0, r"layers/0/q")
    assert got["layers/0/up"] == (2, 5.0, r"layers/0/.*")
    assert got["layers/1/q"] == (3, 7.0, r".*/(q|up)")
    assert got["layers/1/k"] == (2, 4.0, "all-linear")


def test_the_order_of_rules_decides():
    rules = RULES[::-1]
    _, _, sites = adapted(encoder, ENCODER, jnp.ones((3, 4)), rules=rules[:2])
    got = {site.path: site.rank for site in sites}
    assert (got["layers/0/q"], got["layers/0/k"]) == (3, 2)


@pytest.mark.parametrize("scaling", ["rslora", "lora"])
def test_the_scale_of_a_site_follows_its_own_rank_and_alpha(scaling):
    config = {"rank": 2, "alpha": 4.0, "rules": RULES, "scaling": scaling}
    _, _, sites = adapted(encoder, ENCODER, jnp.ones((3, 4)), **config)
    for site in sites:
        assert site.scale == rl.scale(site.alpha, site.rank, scaling)


def test_sites_keep_the_order_of_the_parameter_tree():
    _, _, sites = adapted(encoder, ENCODER, jnp.ones((3, 4)), targets=["up", "q", "o"])
    assert [site.path for site in sites] == [
        f"layers/{n}/{name}" for n in "01" for name in ("o", "q", "up")
    ]


def test_a_rule_of_a_higher_rank_leaves_the_other_factors_as_they_were():
    plain = concrete(encoder, ENCODER, jnp.ones((3, 4))).params.lora["layers"]
    ruled = concrete(encoder, ENCODER, jnp.ones((3, 4)), rules=RULES).params.lora["layers"]
    assert (plain["1"]["k"]["a"] == ruled["1"]["k"]["a"]).all()
    assert plain["1"]["q"]["a"].shape != ruled["1"]["q"]["a"].shape


# The report.


def small(p, tokens):
    h = jax.nn.relu(p["embed"][tokens] @ p["up"]["kernel"] + p["up"]["bias"])
    h = jnp.einsum("td,dnh->tnh", h, p["heads"])
    return jnp.einsum("tnh,nhv->tv", h, p["head"]) + p["steps"]


SMALL = {
    "embed": jnp.ones((10, 4)),  # 40 numbers
    "up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},  # 32 and 8
    "heads": jnp.ones((8, 2, 3)),  # 48
    "head": jnp.ones((2, 3, 5)),  # 30
    "steps": jnp.ones((), jnp.int32),  # 1
    "unused": jnp.ones((7, 3)),  # 21
}


def small_sites():
    rules = (rl.Rule("heads", rank=4, alpha=8.0),)
    return adapted(small, SMALL, jnp.array([1, 2]), rank=2, alpha=6.0, rules=rules).sites


def row(report, path):
    return next(line for line in report.splitlines() if line.split()[0] == path).split()


def test_the_report_holds_every_number_of_a_site():
    report = rl.describe(small_sites())
    # 6 / sqrt(2) = 4.243 and 8 / sqrt(4) = 4; 4*2 + 2*8 = 24 and 8*4 + 4*2*3 = 56 numbers.
    assert row(report, "up/kernel") == [
        "up/kernel", "io", "4x8", "all-linear", "2", "6", "4.243", "4x2", "2x8", "24",
    ]  # fmt: skip
    assert row(report, "heads") == [
        "heads", "ioo", "8x2x3", "heads", "4", "8", "4", "8x4", "4x2x3", "56",
    ]  # fmt: skip


def test_the_report_has_a_heading_for_every_column():
    heading = rl.describe(small_sites()).splitlines()[0].split()
    assert heading == [
        "path", "axes", "shape", "by", "rank", "alpha", "scale", "a", "b", "parameters",
    ]  # fmt: skip


def test_the_report_counts_what_trains_against_everything():
    # The base holds 40 + 32 + 8 + 48 + 30 + 1 + 21 = 180 numbers, the factors 24 + 56 = 80:
    # 80 of 260 is 30.77 %.
    report = rl.describe(small_sites())
    assert "trainable parameters: 80 of 260 (30.77 %) in 2 sites" in report.splitlines()


def test_the_report_says_why_each_other_parameter_was_left_alone():
    lines = rl.describe(small_sites()).splitlines()
    assert "left alone, not targeted (embedding): embed" in lines
    assert "left alone, not targeted (head): head" in lines
    assert "left alone, a vector: up/bias" in lines
    assert "left alone, int32, not floating point: steps" in lines
    assert "left alone, never used by the traced program: unused" in lines


def test_every_parameter_is_either_a_site_or_left_with_a_reason():
    sites = small_sites()
    paths = [site.path for site in sites] + [left.path for left in sites.left]
    assert sorted(paths) == ["embed", "head", "heads", "steps", "unused", "up/bias", "up/kernel"]
    assert all(left.reason for left in sites.left)


def test_print_shows_the_report(capsys):
    sites = small_sites()
    print(sites)
    assert capsys.readouterr().out == rl.describe(sites) + "\n"


def test_the_report_counts_the_factors_that_exist():
    params, _, sites = concrete(small, SMALL, jnp.array([1, 2]))
    made = sum(leaf.size for leaf in jax.tree.leaves(params.lora))
    assert sum(site.parameters for site in sites) == made


def test_numbers_above_a_thousand_are_grouped():
    params = {"w": jnp.ones((1000, 500)), "v": jnp.ones((500, 1))}
    _, _, sites = adapted(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, jnp.ones(1000), rank=4
    )
    report = rl.describe(sites)
    assert row(report, "w")[-1] == "6,000"
    # 6,000 of 500,500 + 6,000 is 1.18 %.
    assert "trainable parameters: 6,000 of 506,500 (1.18 %) in 1 sites" in report


def test_a_long_list_of_parameters_is_cut_with_its_count():
    params = {"w": jnp.eye(3), "v": jnp.eye(3), "scales": [jnp.ones(3) for _ in range(20)]}
    _, _, sites = adapted(
        lambda p, x: jnp.tanh(x @ p["w"] * sum(p["scales"])) @ p["v"], params, jnp.ones(3)
    )
    [line] = [line for line in rl.describe(sites).splitlines() if "a vector" in line]
    assert line.endswith("scales/5 and 14 more")


def test_found_sites_are_reported_before_any_rank_is_known():
    report = rl.describe(rl.find_sites(small, SMALL, jnp.array([1, 2])))
    assert row(report, "embed")[:4] == ["embed", "io", "10x4", "embedding"]
    assert row(report, "head")[:4] == ["head", "iio", "2x3x5", "head"]
    assert "4 weights can be adapted, of 180 parameters" in report


def test_a_plain_list_of_sites_is_described_without_a_total():
    report = rl.describe(list(small_sites()))
    assert "trainable parameters: 80 in 2 sites" in report.splitlines()


def test_a_site_says_where_the_program_uses_it():
    [site] = [site for site in small_sites() if site.path == "up/kernel"]
    [use] = site.uses
    assert use.primitive == "dot_general"
    assert "test_sites.py" in use.where
    assert "(small)" in use.where


def test_a_weight_that_is_formed_whole_is_reported():
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    product.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))
    _, _, sites = adapted(
        lambda p, x: jnp.tanh(product(x, p["w"])) @ p["v"], square("w", "v"), jnp.ones((2, 4))
    )
    [line] = [line for line in rl.describe(sites).splitlines() if line.startswith("formed whole")]
    assert line.startswith("formed whole: w: ")
    assert "test_sites.py" in line


def test_sites_survive_pickling():
    import pickle

    sites = small_sites()
    copy = pickle.loads(pickle.dumps(sites))
    assert (copy, copy.left, copy.total) == (sites, sites.left, sites.total)
    assert rl.describe(copy) == rl.describe(sites)


def test_a_head_used_in_slices_is_one_head():
    def apply_fn(p, x):
        h = jnp.tanh(x @ p["w"])
        return jnp.concatenate([h @ p["head"][:, :2], h @ p["head"][:, 2:]], axis=-1)

    params = {"w": jnp.ones((4, 4)), "head": jnp.ones((4, 5))}
    assert chosen(apply_fn, params, jnp.ones((2, 4)), rank=1) == {"w"}


def test_every_call_of_a_jitted_function_counts_as_a_use():
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    [site] = rl.find_sites(lambda p, x: inner(p, inner(p, x)), jnp.eye(4), jnp.ones((2, 4)))
    assert [use.primitive for use in site.uses] == ["dot_general", "dot_general"]


def test_a_weight_that_passes_through_a_custom_gradient_is_said_to_be_formed_whole():
    @jax.custom_vjp
    def halve_gradient(w):
        return w

    halve_gradient.defvjp(lambda w: (w, None), lambda _, g: (g / 2,))
    sites = rl.find_sites(lambda p, x: x @ halve_gradient(p["w"]), {"w": jnp.eye(4)}, jnp.ones(4))
    assert "formed whole: w: `custom_vjp_call`" in str(sites)
