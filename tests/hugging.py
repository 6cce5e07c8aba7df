"""Models whose weights Hugging Face arranges, as trees and functions of this side.

The way back from tests/interop/make_fixtures.py, written without the library's own layouts.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import rslora_jax as rl
from llama import Llama, LlamaConfig
from rslora_jax.peft import LLAMA, Name, load, names, save

FIXTURES = Path(__file__).parent / "peft_fixtures"
CASES = sorted(str(f.parent.relative_to(FIXTURES)) for f in FIXTURES.glob("*/*/made.safetensors"))
REFUSED = [case for case in CASES if "dora" in case or case == "zoo/conv2d_grouped"]
HELD = [case for case in CASES if case not in REFUSED]

ZOO = names(
    [
        Name("params/table/embedding", "table.weight", axes="io", kind="embedding"),
        Name("params/mix/kernel", "mix.weight", axes="io", stored="io"),
        Name("params/line/kernel", "line.weight", axes="iio", kind="conv"),
        Name("params/(wide|point|split)/kernel", r"\1.weight", axes="iiio", kind="conv"),
        Name(r"params/(\w+)/kernel", r"\1.weight", axes="io"),
        Name("params/norm/scale", "norm.weight"),
        Name(r"params/(\w+)/bias", r"\1.bias", axes="o"),
    ]
)


class Family(NamedTuple):
    """A base: its function of (params, *inputs), parameters, names and inputs."""

    apply: Any
    params: Any
    names: tuple[Name, ...]
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]


class Zoo(nn.Module):
    """The fixtures' zoo in Flax: kernels [.., in, out], images with channels last."""

    @nn.compact
    def __call__(self, ids, image):
        hidden = jnp.tanh(nn.Dense(10, name="proj")(nn.Embed(13, 6, name="table")(ids)))
        hidden = nn.LayerNorm(1e-5, name="norm")(nn.Dense(14, name="mix")(hidden))
        text = nn.Conv(7, (3,), padding=1, name="line")(nn.Dense(5, name="head")(hidden))
        image = jnp.moveaxis(image, 1, -1)
        image = jnp.tanh(nn.Conv(8, (3, 5), padding=((1, 1), (2, 2)), name="wide")(image))
        image = jnp.tanh(nn.Conv(4, (1, 1), name="point")(image))
        image = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2, name="split")(image)
        return jnp.swapaxes(text, 1, 2), jnp.moveaxis(image, -1, 1)


def experts(params, x):
    """The fixtures' experts with matrices [.., in, out], each expert on its own copy of x."""
    shares = jax.nn.softmax(x @ params["mlp"]["router"])
    each = jnp.broadcast_to(x, (shares.shape[1], *x.shape))
    each = jnp.tanh(jnp.einsum("ebd,edf->ebf", each, params["mlp"]["gate_up_proj"]))
    each = jnp.einsum("ebf,efd->ebd", each, params["mlp"]["down_proj"])
    return jnp.einsum("be,ebd->bd", shares, each)


@functools.cache
def family(name):
    """A family of tests/peft_fixtures."""
    folder = FIXTURES / name
    made = load_file(folder / "base.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    if name == "llama":
        apply, params = llama_of(folder / "base")
        rules = LLAMA
    elif name == "zoo":
        apply, params, rules = Zoo().apply, zoo_of(base), ZOO
    else:
        stored = "oi" if name.endswith("out_in") else "io"
        apply, params, rules = experts, experts_of(base, stored), experts_names(stored)
    return Family(apply, params, rules, numbered(made, "in"), numbered(made, "out"))


@functools.cache
def sites_of(name):
    made = family(name)
    return rl.find_sites(made.apply, made.params, *made.inputs)


@functools.cache
def loaded(case):
    name = case.split("/")[0]
    return load(FIXTURES / case, family(name).params, family(name).names, sites=sites_of(name))


def resave(case, folder, form):
    """Writes what was loaded, with everything that it replaced."""
    one, name = loaded(case), case.split("/")[0]
    flat = rl.paths.flatten(one.params.base)
    leaves = dict(zip(flat.paths, flat.leaves, strict=True))
    save(
        folder,
        one.params.lora,
        one.sites,
        family(name).names,
        form,
        task_type=one.adapter.settings.task_type,
        saved={path: leaves[path] for path in one.replaced if path not in one.tokens},
        tokens={path: (rows, leaves[path]) for path, rows in one.tokens.items()},
    )
    return folder


def numbered(made, name):
    """`name.0`, `name.1`, ... of a file, in order."""
    return tuple(made[key] for key in sorted(made) if key.startswith(name + "."))


def assert_close(found, wanted, tolerance=1e-5):
    """Equal in shape and within the tolerance of the largest number."""
    found = np.asarray(found)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def llama_of(folder):
    """The example's Llama with the weights of a transformers folder: (apply, params)."""
    said = json.loads((Path(folder) / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=said["vocab_size"],
        d_model=said["hidden_size"],
        d_ff=said["intermediate_size"],
        layers=said["num_hidden_layers"],
        heads=said["num_attention_heads"],
        kv_heads=said["num_key_value_heads"],
        head_dim=said["head_dim"],
        rope_theta=said["rope_parameters"]["rope_theta"],
        norm_eps=said["rms_norm_eps"],
        tied=said["tie_word_embeddings"],
    )
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return Llama(config).apply, {"params": llama_tree(tensors, config.layers)}


def llama_tree(tensors, layers):
    """Hugging Face tensors, all of them used, as the example's tree."""
    left = dict(tensors)

    def stack(name):
        return np.stack([left.pop(f"model.layers.{k}.{name}.weight") for k in range(layers)])

    def kernels(block, parts):
        return {f"{p}_proj": {"kernel": stack(f"{block}.{p}_proj").mT} for p in parts}

    tree = {
        "embed_tokens": {"embedding": left.pop("model.embed_tokens.weight")},
        "layers": {
            "self_attn": kernels("self_attn", "qkvo"),
            "mlp": kernels("mlp", ("gate", "up", "down")),
            "input_layernorm": {"scale": stack("input_layernorm")},
            "post_attention_layernorm": {"scale": stack("post_attention_layernorm")},
        },
        "norm": {"scale": left.pop("model.norm.weight")},
    }
    if "lm_head.weight" in left:
        tree["lm_head"] = {"kernel": left.pop("lm_head.weight").T}
    assert not left
    return jax.tree.map(np.ascontiguousarray, tree)


def zoo_of(tensors):
    """The zoo's tensors as Flax names and arranges them."""
    tree = {}
    for name, tensor in tensors.items():
        layer, leaf = name.split(".")
        if leaf == "weight":
            leaf = {"table": "embedding", "norm": "scale"}.get(layer, "kernel")
        if leaf == "kernel" and layer != "mix":
            tree.setdefault(layer, {})[leaf] = np.ascontiguousarray(
                np.moveaxis(tensor, (1, 0), (-2, -1))  # (out, in, window) before
            )
            continue
        tree.setdefault(layer, {})[leaf] = np.ascontiguousarray(tensor)
    return {"params": tree}


def experts_of(tensors, stored):
    """The experts' tensors with matrices [.., in, out]."""
    tree = {name.removeprefix("mlp."): tensor for name, tensor in tensors.items()}
    turned = tree if stored == "oi" else ("router",)
    tree |= {name: tree[name].mT for name in turned}
    return {"mlp": jax.tree.map(np.ascontiguousarray, tree)}


def experts_names(stored):
    """Names of the experts; the router is a parameter (out, in) either way."""
    return names(
        [
            Name("mlp/router", "mlp.router", axes="io"),
            Name(r"mlp/(\w+)", r"mlp.\1", axes="bio", kind="expert", stored=stored),
        ]
    )
