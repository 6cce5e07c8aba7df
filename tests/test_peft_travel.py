"""Adapters travel to PEFT folders and back as one function."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rslora_jax as rl
from llama import Llama, LlamaConfig
from rslora_jax.axes import delta_subscripts
from rslora_jax.factors import factors_of
from rslora_jax.folders import open_folder
from rslora_jax.paths import AdapterError, flatten, insert, lookup, unflatten
from rslora_jax.peft import modules as files
from rslora_jax.peft.exporting import hf_tensors, merge_to_hf
from rslora_jax.peft.modules import Module, PeftAdapter
from rslora_jax.peft.names import LLAMA, llama, names
from rslora_jax.peft.placing import place_all, places_of
from rslora_jax.peft.replacing import fetch
from rslora_jax.peft.settings import Settings
from rslora_jax.peft.travel import from_adapter, load, save, to_adapter
from rslora_jax.targets import choose
from tests.quick import compiled

SIZES = LlamaConfig(23, 8, 12, layers=2, heads=4, kv_heads=2, head_dim=2, attention_bias=True)
TOKENS = np.array([[1, 5, 17, 22], [3, 3, 0, 9]], np.int32)
RULES = (rl.Rule(r".*/q_proj/kernel", rank=16, alpha=32), rl.Rule(r".*/down_proj/kernel", rank=1))


@functools.cache
def base(**changes):
    """The example's Llama, random weights, biases that are not zero."""
    model = Llama(dataclasses.replace(SIZES, **changes))
    structs = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    flat, rng = flatten(structs), np.random.default_rng(0)
    leaves = [rng.normal(size=x.shape).astype(np.float32) * 0.3 for x in flat.leaves]
    return model, unflatten(flat, leaves)


@functools.cache
def found(**changes):
    model, params = base(**changes)
    return rl.find_sites(model.apply, params, TOKENS)


def randomized(sites, seed=0):
    rng = np.random.default_rng(seed)
    lora = {}
    for site in sites:
        a, b = (rng.normal(size=s).astype(np.float32) for s in site.factor_shapes)
        insert(lora, site.path, {"a": a, "b": b})
    return lora


@pytest.fixture(scope="module", params=["rslora", "lora"])
def adapter(request):
    """(lora, sites): ranks 1, 4 and 16, an alpha that is no whole number."""
    return adapted(request.param)


@functools.cache
def adapted(scaling="rslora", targets="all-linear", rules=RULES):
    config = rl.LoraConfig(4, 8.5, targets, rules=rules, scaling=scaling)
    with pytest.warns(UserWarning, match="the largest rank") if rules else _quiet():
        sites = choose(found(), config)
    return randomized(sites), sites


def _quiet():
    return contextlib.nullcontext()


def changes(lora, sites):
    """scale * a @ b by path, in float64."""
    made = factors_of(lora, sites)
    return {
        s.path: s.scale
        * np.einsum(
            delta_subscripts(s.axes), *(np.asarray(made[s.path][n], np.float64) for n in "ab")
        )
        for s in sites
    }


def assert_same_change(one, two, rtol=1e-6):
    one, two = changes(*one), changes(*two)
    assert one.keys() == two.keys()
    for path, change in one.items():
        np.testing.assert_allclose(two[path], change, rtol=0, atol=rtol * np.abs(change).max())


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def facts(sites):
    return [(s.path, s.axes, s.rank, s.alpha, s.scale) for s in sites]


def test_a_native_folder_gives_the_same_factors_bit_for_bit(adapter, tmp_path):
    lora, sites = adapter
    save(tmp_path / "out", lora, sites, base_model="tiny")
    loaded = load(tmp_path / "out", base()[1])
    jax.tree.map(np.testing.assert_array_equal, loaded.params.lora, lora)
    assert facts(loaded.sites) == facts(sites)
    assert loaded.replaced == ()
    assert loaded.params.base is not None
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "tiny"


def test_a_portable_folder_computes_the_same_without_patterns_or_flags(adapter, tmp_path):
    lora, sites = adapter
    save(tmp_path / "out", lora, sites, form="portable")
    config = config_of(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == 16
    assert config["use_rslora"] is False
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    # Whoever reads alpha over the tensor's own rank finds 1 everywhere.
    assert {m.a.shape[0] for m in files.read(tmp_path / "out").modules} == {16}
    loaded = load(tmp_path / "out", base()[1])
    assert_same_change((lora, sites), (loaded.params.lora, loaded.sites))


def test_the_loaded_adapter_computes_the_same_logits_and_adapt_finds_its_sites(tmp_path):
    model, params = base()
    lora, sites = adapted()
    save(tmp_path / "out", lora, sites)
    loaded = load(tmp_path / "out", params, sites=found())
    apply = rl.attach(model.apply, loaded.sites)
    found_logits, wanted = compiled(
        lambda one, two: (apply(one, TOKENS), model.apply(rl.merge(two, sites), TOKENS))
    )(loaded.params, rl.LoraParams(params, lora))
    bound = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(found_logits, wanted, rtol=0, atol=bound)
    assert all(site.uses for site in loaded.sites)
    with pytest.warns(UserWarning, match="the largest rank"):
        again = choose(found(), loaded.config)
    assert facts(again) == facts(loaded.sites)


def test_single_layers_and_scanned_layers_write_the_same_folder(tmp_path):
    lora, sites = adapted()
    single, many = {}, []
    for site in sites:
        for k in range(2):
            path = site.path.replace("layers/", f"layers_{k}/")
            one = dataclasses.replace(site, path=path, axes="io", shape=site.shape[1:])
            many.append(one)
            factors = lookup(lora, site.path)
            insert(single, path, {name: factors[name][k] for name in "ab"})
    one, two = to_adapter(lora, sites), to_adapter(single, many)
    for left, right in zip(sorted(one.modules), sorted(two.modules), strict=True):
        assert left[0] == right[0] and left[4:7] == right[4:7]
        np.testing.assert_array_equal(left.a, right.a)
        np.testing.assert_array_equal(left.b, right.b)


def llama_adapter(settings, *, rank=None, keep=lambda name: True, suffix=("q_proj",)):
    """An adapter in Hugging Face's space for the example's q projections."""
    rng, made = np.random.default_rng(1), []
    for k in range(2):
        for last in suffix:
            name = f"model.layers.{k}.self_attn.{last}"
            r, alpha = settings.rank_alpha(name)
            a, b = (rng.normal(size=s).astype(np.float32) for s in ((r, 8), (8, r)))
            made.append(Module(name, "linear", a, b, r, alpha, settings.scale(name)))
    return PeftAdapter(settings, tuple(m for m in made if keep(m.name)), {}, {})


def test_layers_of_different_ranks_and_scales_are_padded_and_folded_into_one_site():
    settings = Settings(2, 8, True, rank_pattern={r"layers\.1\..*": 4}, target_modules=("q_proj",))
    adapter = llama_adapter(settings)
    loaded = from_adapter(adapter, base()[1])
    (site,) = loaded.sites
    assert (site.rank, site.alpha, site.scale) == (4, 8, 4.0)
    (change,) = changes(loaded.params.lora, loaded.sites).values()
    for k, module in enumerate(adapter.modules):
        wanted = module.scale * (module.b.astype(np.float64) @ module.a).T
        np.testing.assert_allclose(change[k], wanted, rtol=1e-5, atol=1e-5)
    assert not np.asarray(
        loaded.params.lora["params"]["layers"]["self_attn"]["q_proj"]["kernel"]["a"]
    )[0, :, 2:].any()


def test_layers_that_the_settings_leave_out_get_zero_factors():
    settings = Settings(2, target_modules=("q_proj",), layers_to_transform=(1,))
    loaded = from_adapter(llama_adapter(settings, keep=lambda n: ".1." in n), base()[1])
    (change,) = changes(loaded.params.lora, loaded.sites).values()
    assert not change[0].any() and change[1].any()


def test_a_layer_that_should_be_there_is_an_error_that_names_it():
    adapter = llama_adapter(Settings(2, target_modules=("q_proj",)), keep=lambda n: ".1." in n)
    with pytest.raises(AdapterError, match=r"no factors for 'model.layers.0.self_attn.q_proj'"):
        from_adapter(adapter, base()[1])
    adapter = llama_adapter(Settings(2, target_modules=r".*\.[qv]_proj"))
    with pytest.raises(AdapterError, match=r"no factors for 'model.layers.0.self_attn.v_proj'"):
        from_adapter(adapter, base()[1])


def test_a_name_that_the_base_has_not_is_an_error_with_the_nearest():
    adapter = llama_adapter(Settings(2, target_modules=("q_prj",)), suffix=("q_prj",))
    with pytest.raises(AdapterError, match=r"q_prj.weight'.*nearest.*self_attn.q_proj.weight"):
        from_adapter(adapter, base()[1])


def test_factors_of_another_width_are_an_error_with_both_shapes():
    adapter = llama_adapter(Settings(2, target_modules=("k_proj",)), suffix=("k_proj",))
    with pytest.raises(AdapterError, match=r"\(8, 2\).*takes \(2, 8\) and \(4, 2\)"):
        from_adapter(adapter, base()[1])


def test_sites_of_another_rank_or_that_the_file_has_not_are_an_error():
    adapter = llama_adapter(Settings(2, target_modules=("q_proj",)))
    _, sites = adapted(targets=r".*/q_proj/kernel", rules=())
    with pytest.raises(AdapterError, match=r"rank 4 and scale 4.25 in the sites, 2 and 4"):
        from_adapter(adapter, base()[1], sites=sites)
    fitting = [dataclasses.replace(sites[0], rank=2, alpha=8.0, scale=4.0)]
    assert from_adapter(adapter, base()[1], sites=fitting).sites[0].scale == 4.0
    other = dataclasses.replace(fitting[0], path="params/layers/self_attn/o_proj/kernel")
    with pytest.raises(AdapterError, match=r"o_proj/kernel' and 0 more a rank"):
        from_adapter(adapter, base()[1], sites=[*fitting, other])
    with pytest.raises(AdapterError, match="not among the 1 sites"):
        from_adapter(adapter, base()[1], sites=[dataclasses.replace(other, rank=None)])


def test_magnitudes_of_dora_are_refused_by_name():
    adapter = llama_adapter(Settings(2, target_modules=("q_proj",), use_dora=True))
    dora = tuple(m._replace(magnitude=np.ones(8, np.float32)) for m in adapter.modules)
    with pytest.raises(AdapterError, match=r"layers.0.self_attn.q_proj' and 1 more.*Merge"):
        from_adapter(adapter._replace(modules=dora), base()[1])


def test_saved_modules_replace_leaves_in_the_bases_dtype_and_all_others_stay():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), base()[1])
    adapter = llama_adapter(
        Settings(2, target_modules=("q_proj",), modules_to_save=("lm_head", "norm"))
    )
    saved = {
        "lm_head.weight": np.full((23, 8), 2, np.float32),
        "model.norm.weight": np.ones(8, np.float32),
    }
    loaded = from_adapter(adapter._replace(saved=saved), params)
    assert loaded.replaced == ("params/lm_head/kernel", "params/norm/scale")
    head = loaded.params.base["params"]["lm_head"]["kernel"]
    assert head.dtype == jnp.bfloat16 and head.shape == (8, 23) and (head == 2).all()
    old, new = flatten(params), flatten(loaded.params.base)
    same = [path for path, x, y in zip(old.paths, old.leaves, new.leaves, strict=True) if x is y]
    assert len(same) == len(old.paths) - 2


def test_whole_leaves_can_replace_shapes_and_parts_of_them_cannot():
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base()[1])
    adapter = llama_adapter(Settings(2, target_modules=("q_proj",)))
    norms = {f"model.layers.{k}.input_layernorm.weight": np.full(8, k, np.float32) for k in (0, 1)}
    loaded = from_adapter(adapter._replace(saved=norms), structs)
    assert loaded.params.base["params"]["layers"]["input_layernorm"]["scale"][:, 0].tolist() == [
        0,
        1,
    ]
    norms.popitem()
    with pytest.raises(AdapterError, match="replaces 1 of the 2 layers"):
        from_adapter(adapter._replace(saved=norms), structs)
    kept = from_adapter(adapter._replace(saved=norms), base()[1])
    scale = kept.params.base["params"]["layers"]["input_layernorm"]["scale"]
    np.testing.assert_array_equal(
        scale[1], base()[1]["params"]["layers"]["input_layernorm"]["scale"][1]
    )
    assert not scale[0].any()


def test_a_saved_tensor_that_the_base_has_not_or_of_another_shape_is_an_error():
    adapter = llama_adapter(Settings(2, target_modules=("q_proj",)))
    with pytest.raises(AdapterError, match=r"'score.weight', which no parameter"):
        from_adapter(adapter._replace(saved={"score.weight": np.ones((2, 8))}), base()[1])
    with pytest.raises(AdapterError, match=r"of shape \(24, 8\).*takes \(23, 8\)"):
        from_adapter(adapter._replace(saved={"lm_head.weight": np.ones((24, 8))}), base()[1])


def embedding_adapter(copy=None):
    rng = np.random.default_rng(2)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 23), (8, 2)))
    module = Module("model.embed_tokens", "embedding", a, b, 2, 8, 4.0)
    saved = {} if copy is None else {"model.embed_tokens.weight": copy}
    return PeftAdapter(Settings(2, 8, target_modules=("embed_tokens",)), (module,), saved, {})


def test_an_embeddings_copy_of_its_base_is_compared_not_used():
    table = base()[1]["params"]["embed_tokens"]["embedding"]
    loaded = from_adapter(embedding_adapter(table), base()[1])
    assert loaded.replaced == () and loaded.sites[0].embedding
    rounded = np.asarray(jnp.asarray(table, jnp.bfloat16))
    assert from_adapter(embedding_adapter(rounded), base()[1]).replaced == ()
    with pytest.raises(AdapterError, match=r"up to 1: it was trained on another base"):
        from_adapter(embedding_adapter(table + 1), base()[1])


def test_an_embedding_comes_back_bit_for_bit_with_its_rows_as_inputs(tmp_path):
    adapter = embedding_adapter()
    loaded = from_adapter(adapter, base()[1])
    factors = loaded.params.lora["params"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(factors["a"], adapter.modules[0].a.T)
    save(tmp_path / "out", loaded.params.lora, loaded.sites)
    (module,) = files.read(tmp_path / "out").modules
    assert module.kind == "embedding"
    np.testing.assert_array_equal(module.a, adapter.modules[0].a)
    np.testing.assert_array_equal(module.b, adapter.modules[0].b)


def test_a_tied_embedding_is_refused_both_ways():
    _, params = base(tied=True)
    with pytest.raises(AdapterError, match="there is no lm_head"):
        from_adapter(embedding_adapter(), params)
    sites = found(tied=True)
    with pytest.raises(AdapterError, match="used in a product too"):
        from_adapter(embedding_adapter(), params, sites=sites)
    site = next(dataclasses.replace(s, rank=2, alpha=8.0, scale=4.0) for s in sites if s.embedding)
    for one in (site, dataclasses.replace(site, uses=())):  # as found, and as restored
        with pytest.raises(AdapterError, match="PEFT adapts the lookup alone"):
            to_adapter(randomized([one]), [one])


def test_the_bias_of_b_is_added_to_the_models_bias_times_the_scale():
    adapter = llama_adapter(Settings(2, 8, lora_bias=True, target_modules=("q_proj",)))
    biased = tuple(m._replace(bias=np.arange(8, dtype=np.float32)) for m in adapter.modules)
    loaded = from_adapter(adapter._replace(modules=biased), base()[1])
    path = "params/layers/self_attn/q_proj/bias"
    assert loaded.replaced == (path,)
    wanted = lookup(base()[1], path) + 4 * np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(lookup(loaded.params.base, path), wanted)
    with pytest.raises(AdapterError, match=r"q_proj.bias', which no parameter"):
        from_adapter(adapter._replace(modules=biased), base(attention_bias=False)[1])


def test_rows_of_tokens_replace_rows_and_travel_back(tmp_path):
    rows = np.full((2, 8), 7, np.float32)
    adapter = llama_adapter(Settings(2, target_modules=("q_proj",), trainable_token_indices=(3, 9)))
    loaded = from_adapter(
        adapter._replace(tokens={"model.embed_tokens": ((3, 9), rows)}), base()[1]
    )
    path = "params/embed_tokens/embedding"
    assert loaded.tokens == {path: (3, 9)} and loaded.replaced == (path,)
    table = lookup(loaded.params.base, path)
    assert (table[[3, 9]] == 7).all()
    np.testing.assert_array_equal(table[:3], lookup(base()[1], path)[:3])
    tokens = {path: (loaded.tokens[path], table)}
    save(tmp_path / "out", loaded.params.lora, loaded.sites, tokens=tokens)
    again = load(tmp_path / "out", base()[1])
    np.testing.assert_array_equal(lookup(again.params.base, path), table)
    far = adapter._replace(tokens={"model.embed_tokens": ((3, 23), rows)})
    with pytest.raises(AdapterError, match=r"is a table of \(23, 8\)"):
        from_adapter(far, base()[1])


def test_saved_leaves_and_biases_travel_back(tmp_path):
    lora, sites = adapted()
    _, params = base()
    paths = ("params/norm/scale", "params/lm_head/kernel", "params/layers/self_attn/q_proj/bias")
    saved = {path: lookup(params, path) + 1 for path in paths}
    save(tmp_path / "out", lora, sites, saved=saved)
    config = config_of(tmp_path / "out")
    assert config["bias"] == "lora_only"
    assert config["modules_to_save"] == ["lm_head", "model.norm"]
    loaded = load(tmp_path / "out", params)
    assert set(loaded.replaced) == set(paths)
    for path in paths:
        np.testing.assert_array_equal(lookup(loaded.params.base, path), saved[path])


def test_a_folder_is_read_without_a_base(tmp_path):
    lora, sites = adapted()
    save(tmp_path / "out", lora, sites)
    loaded = load(tmp_path / "out", None)
    assert loaded.params.base is None
    assert facts(loaded.sites) == facts(sites)
    jax.tree.map(np.testing.assert_array_equal, loaded.params.lora, lora)
    half = llama_adapter(Settings(2, target_modules=("q_proj",)), keep=lambda n: ".1." in n)
    with pytest.raises(AdapterError, match=r"no factors for 'model.layers.0"):
        from_adapter(half, None)
    odd = llama_adapter(Settings(2, target_modules=("w",)), suffix=("w",))
    with pytest.raises(AdapterError, match="No rule can be read backwards"):
        from_adapter(odd, None)


def layer(params, x, tokens):
    """Heads, a convolution, experts, a table and a weight of torch's order, by hand."""
    x = x + params["table"][tokens]
    q = jnp.einsum("btd,dhk->bthk", x, params["q"])
    x = jnp.einsum("bthk,hkd->btd", jnp.tanh(q), params["o"])
    numbers = ("NHC", "HIO", "NHC")
    x = jax.lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=numbers)
    x = jnp.einsum("btd,edf->bef", x, params["experts"]["up"])
    x = jnp.einsum("bef,efd->bed", x, params["experts"]["down"])
    return jnp.tanh(x @ params["torch"].T) @ params["head"]


MIXED = {
    "table": (11, 6), "q": (6, 2, 4), "o": (2, 4, 6), "conv": (3, 6, 6),
    "experts": {"up": (3, 6, 5), "down": (3, 5, 6)}, "torch": (7, 6), "head": (7, 2),
}  # fmt: skip
MIXED_NAMES = names(
    [
        ("table", "emb.weight"),
        ("(q|o)", r"attn.\1_proj.weight"),
        ("conv", "conv.weight"),
        ("experts/(up|down)", r"mlp.experts.\1_proj"),
        ("torch", "lin.weight"),
        ("head", "head.weight"),
    ]
)


def test_sharded_factors_are_written_as_the_whole_arrays(tmp_path):
    lora, sites = adapted()
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    spread = jax.device_put(lora, NamedSharding(mesh, PartitionSpec("x")))
    save(tmp_path / "out", spread, sites)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out", base()[1]).params.lora, lora)


def test_dtypes_are_the_files_unless_asked_for(tmp_path):
    lora, sites = adapted()
    save(tmp_path / "out", lora, sites, dtype=jnp.bfloat16)
    kinds = {m.a.dtype.name for m in files.read(tmp_path / "out").modules}
    assert kinds == {"bfloat16"}
    leaf = jax.tree.leaves(load(tmp_path / "out", base()[1]).params.lora)[0]
    assert leaf.dtype == jnp.bfloat16
    leaf = jax.tree.leaves(load(tmp_path / "out", base()[1], dtype="float32").params.lora)[0]
    assert leaf.dtype == jnp.float32


def test_an_existing_folder_is_refused_and_replaced_on_request(tmp_path):
    lora, sites = adapted()
    save(tmp_path / "out", lora, sites)
    before = config_of(tmp_path / "out")
    with pytest.raises(AdapterError, match="exists already"):
        save(tmp_path / "out", lora, sites, form="portable")
    assert config_of(tmp_path / "out") == before
    save(tmp_path / "out", lora, sites, form="portable", overwrite=True)
    assert config_of(tmp_path / "out")["r"] == 16


def test_values_that_are_not_finite_are_refused_with_their_path(tmp_path):
    lora, sites = adapted()
    broken = jax.tree.map(np.array, lora)
    lookup(broken, sites[0].path)["b"][0, 0, 0] = np.nan
    with pytest.raises(AdapterError, match=f"'{sites[0].path}/b' holds 1 values"):
        save(tmp_path / "out", broken, sites)
    assert not (tmp_path / "out").exists()
    big = jax.tree.map(lambda x: x * 1e6, lora)
    with pytest.raises(AdapterError, match="overflows in float16"):
        to_adapter(big, sites, dtype=np.float16)


def test_requests_that_cannot_be_met_are_refused():
    lora, sites = adapted()
    with pytest.raises(AdapterError, match="form must be one of"):
        to_adapter(lora, sites, form="gguf")
    with pytest.raises(AdapterError, match="found no factors"):
        to_adapter({}, sites)
    with pytest.raises(AdapterError, match="No name matches the path"):
        to_adapter(lora, sites, names([("w", "lin.weight")]))
    same = names([(r".*/kernel", "m.{0}.lin.weight")])
    with pytest.raises(AdapterError, match=r"are both named 'm\.0\.lin\.weight'"):
        to_adapter(lora, sites, same)
    with pytest.raises(AdapterError, match="no weight of a module"):
        to_adapter(lora, sites, names([(r".*/(\w+)/kernel", r"m.{0}.\1.bias")]))
    path = sites[0].path
    with pytest.raises(AdapterError, match="is adapted and was to be saved in full"):
        to_adapter(lora, sites, saved={path: lookup(base()[1], path)})


def test_scales_of_no_rule_travel_in_the_portable_form_alone():
    lora, sites = adapted()
    odd = [dataclasses.replace(sites[0], scale=0.3), *sites[1:]]
    with pytest.raises(AdapterError, match=r"Scales must be alpha/sqrt\(r\) or alpha/r"):
        to_adapter(lora, odd)
    loaded = from_adapter(to_adapter(lora, odd, form="portable"), base()[1])
    assert_same_change((lora, odd), (loaded.params.lora, loaded.sites))


def test_one_name_at_the_end_of_another_keeps_its_own_rank():
    sites = [
        rl.Site("a", "io", (3, 4), "float32", rank=2, alpha=2.0, scale=1.0),
        rl.Site("b", "io", (3, 4), "float32", rank=1, alpha=1.0, scale=1.0),
        rl.Site("c", "io", (3, 4), "float32", rank=3, alpha=3.0, scale=1.0),
    ]
    mine = names([("a", "proj.weight"), ("b", "in.proj.weight"), ("c", "inxproj.weight")])
    adapter = to_adapter(randomized(sites), sites, mine)
    for module in adapter.modules:
        assert adapter.settings.rank_alpha(module.name) == (module.rank, module.alpha)
        assert adapter.settings.scale(module.name) == module.scale


def test_interleaved_rows_are_permuted_with_the_base(tmp_path):
    """What is written for a model of interleaved pairs is the permuted base's change."""
    lora, sites = adapted(targets=r".*/[qv]_proj/kernel", rules=())
    plain, turned = (to_adapter(lora, sites, rules) for rules in (LLAMA, llama(interleaved=2)))
    for one, two in zip(plain.modules, turned.modules, strict=True):
        np.testing.assert_array_equal(one.b, two.b)  # a head of one pair stays as it is
    turned = to_adapter(lora, sites, llama(interleaved=4))
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    for one, two in zip(plain.modules, turned.modules, strict=True):
        rows = order if "q_proj" in one.name else range(len(one.b))
        np.testing.assert_array_equal(two.b, one.b[list(rows)])
        np.testing.assert_array_equal(two.a, one.a)
    back = from_adapter(turned, base()[1], llama(interleaved=4))
    jax.tree.map(np.testing.assert_array_equal, back.params.lora, lora)
    placed = place_all(llama(interleaved=4), base()[1], None)
    where = places_of(placed.values())["model.layers.1.self_attn.q_proj.bias"]
    leaf = lookup(base()[1], where.placed.path)
    np.testing.assert_array_equal(fetch(where, leaf), leaf[1][order])


def everything(folder):
    opened = open_folder(folder)
    return {name: opened.read(name) for name in opened.tensors}


def test_merged_weights_are_written_under_the_names_of_transformers(tmp_path):
    lora, sites = adapted(targets=r".*/([qv]|down)_proj/kernel", rules=())
    params = rl.LoraParams(base()[1], lora)
    seen = []
    merge_to_hf(
        tmp_path / "out",
        params,
        sites,
        config={"tie_word_embeddings": False},
        max_shard_bytes=2_000,
        progress=lambda *call: seen.append(call),
    )
    tensors = everything(tmp_path / "out")
    leaves = dict(zip(*flatten(base()[1])[:2], strict=True))
    for path, change in changes(lora, sites).items():
        leaves[path] = leaves[path] + change
    places = places_of(place_all(LLAMA, base()[1], None).values())
    assert set(tensors) == set(places)
    for name, where in places.items():
        wanted = fetch(where, leaves[where.placed.path])
        np.testing.assert_allclose(tensors[name], wanted, rtol=1e-6, atol=1e-6)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "tie_word_embeddings": False
    }
    assert seen[0][:2] == (0, len(tensors)) and seen[-1] == (len(tensors), len(tensors), "")


def test_a_merged_tree_is_written_as_it_is_in_its_own_dtypes(tmp_path):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), base()[1])
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    merge_to_hf(tmp_path / "out", params, config=tmp_path)
    tensors = everything(tmp_path / "out")
    head = params["params"]["lm_head"]["kernel"]
    assert tensors["lm_head.weight"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(tensors["lm_head.weight"], np.asarray(head).T)
    with pytest.raises(AdapterError, match="exists already"):
        merge_to_hf(tmp_path / "out", params)


def test_one_layer_of_a_stack_is_merged_at_a_time_in_bfloat16_too():
    lora, sites = adapted(targets=r".*/q_proj/kernel", rules=())
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), base()[1])
    tensors = dict(hf_tensors(rl.LoraParams(params, lora), sites))
    weight = np.asarray(lookup(params, sites[0].path), np.float32)
    change = changes(lora, sites)[sites[0].path]
    for k in range(2):
        found_weight = tensors[f"model.layers.{k}.self_attn.q_proj.weight"]
        wanted = (weight[k] + change[k]).astype(np.float32).astype(found_weight.dtype).T
        close = np.abs(found_weight.astype(np.float32) - wanted.astype(np.float32))
        assert (close <= 2.0**-7 * np.abs(wanted.astype(np.float32))).all()
        assert (close == 0).mean() > 0.95


def test_an_export_that_would_not_be_the_model_is_refused(tmp_path):
    lora, sites = adapted()
    params = rl.LoraParams(base()[1], lora)
    with pytest.raises(AdapterError, match="which transformers would not use"):
        merge_to_hf(tmp_path / "out", params, sites, config={"tie_word_embeddings": True})
    with pytest.raises(AdapterError, match="would draw at random"):
        merge_to_hf(tmp_path / "out", base(tied=True)[1], config={"tie_word_embeddings": False})
    with pytest.raises(AdapterError, match="No name matches the path 'extra'"):
        merge_to_hf(tmp_path / "out", {**base()[1], "extra": np.ones(3)})
    with pytest.raises(AdapterError, match="Sites with ranks were given with a plain tree"):
        merge_to_hf(tmp_path / "out", base()[1], sites)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base()[1])
    with pytest.raises(AdapterError, match="is a shape without numbers"):
        merge_to_hf(tmp_path / "out", structs)
    broken = jax.tree.map(np.array, lora)
    lookup(broken, sites[0].path)["b"][1, 0, 0] = np.inf
    with pytest.raises(AdapterError, match=f"Merging '{sites[0].path}' gives"):
        merge_to_hf(tmp_path / "out", rl.LoraParams(base()[1], broken), sites)
    assert list(tmp_path.iterdir()) == []
