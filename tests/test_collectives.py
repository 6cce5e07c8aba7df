"""What adapters add to the communication of the scanned Llama, on eight CPU devices."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Var

import rslora_jax as rl
from llama import LlamaConfig
from rslora_jax.plan.collectives import collectives, table
from tests.benchmarks.collectives import (
    FROZEN,
    LENGTH,
    RANK,
    Setting,
    added,
    by_cpu,
    known,
    on_weights,
    sent,
    unexplained,
)

SMALL = Setting(
    {"fsdp": 4, "tensor": 2},
    rank=4 * RANK,
    batch=8,
    length=2 * LENGTH,
    model=LlamaConfig(160, 64, 176, 3, 4, 2, 24),
)
POLICIES = ("inherit", "without fsdp")
FORWARD = 2  # with remat, once again in the backward pass
ROWS = ("o", "down")


@functools.cache
def found():
    return {name: collectives(text) for name, text in by_cpu(SMALL, POLICIES).items()}


@functools.cache
def more(policy):
    ours, frozen = (sent(found()[name], SMALL.mesh) for name in (policy, FROZEN))
    return added(ours, frozen)


@functools.cache
def things():
    return known(SMALL)


def widths():
    """Inputs and outputs of one layer's weights."""
    c = SMALL.model
    inner, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
    columns = {"q": inner, "k": narrow, "v": narrow, "gate": c.d_ff, "up": c.d_ff}
    return {
        **{name: (c.d_model, out) for name, out in columns.items()},
        "o": (inner, c.d_model),
        "down": (c.d_ff, c.d_model),
    }


def bytes_added(policy, kind, along):
    return 4 * sum(
        count * key.elements
        for key, count in more(policy).items()
        if (key.kind, key.along) == (kind, along) and key.of_rank
    )


def gathers(name):
    return table(found()[name]).select(kind="all-gather").column("calls")[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_adapters_add_no_collective_on_an_array_of_a_base_weights_size(policy):
    assert on_weights(more(policy), things()) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_all_that_adapters_send_is_factors_and_activations_of_the_rank(policy):
    assert unexplained(more(policy), things()) == []
    assert sum(more(policy).values()) > 0


def test_the_search_finds_collectives_on_weights_where_they_are():
    frozen = sent(found()[FROZEN], SMALL.mesh)
    gathered = {key for key in on_weights(frozen, things()) if key.kind == "all-gather"}
    assert {key.elements for key in gathered} >= {
        math.prod(shape) // SMALL.mesh["tensor"] for shape in widths().values()
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_activations_of_the_rank_are_summed_over_the_tensor_axis(policy):
    """Once for each pass of a weight split by its inputs, once backward for one by its outputs."""
    sums = FORWARD * len(ROWS) + len(widths()) - len(ROWS)
    expected = SMALL.model.layers * sums * SMALL.tokens * SMALL.rank * 4
    assert bytes_added(policy, "all-reduce", "tensor") == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_the_factors_are_summed_over_the_batch(policy):
    split = SMALL.mesh["tensor"]
    each = [
        SMALL.rank * (into // split + out if name in ROWS else into + out // split)
        for name, (into, out) in widths().items()
    ]
    assert bytes_added(policy, "all-reduce", "fsdp") == SMALL.model.layers * sum(each) * 4


def test_factors_that_inherit_the_fsdp_axis_are_gathered_with_their_weights():
    """The side of a weight that fsdp splits, which is `d_model` of each, once in each pass."""
    gathered = FORWARD * len(widths()) * SMALL.model.d_model * SMALL.rank * 4
    assert bytes_added("inherit", "all-gather", "fsdp") == SMALL.model.layers * gathered
    assert gathers("inherit") == 2 * gathers(FROZEN)


def test_factors_that_leave_the_fsdp_axis_off_are_not_gathered():
    kinds = {key.kind for key, count in more("without fsdp").items() if count > 0}
    assert kinds == {"all-reduce"}


def test_gradients_of_an_input_add_up_apart_from_those_through_the_factors():
    """XLA sums over devices once for all weights only what is added to one another first."""
    base = {name: jnp.ones((8, 5)) for name in "qkv"}
    config, x = rl.LoraConfig(rank=2, alpha=1.0), jnp.ones((3, 8))

    def model(p, x):
        return sum((x @ p[name]) ** 2 for name in "qkv")

    params, apply, _ = rl.adapt(model, base, x, config=config, key=jax.random.key(0))
    program = jax.make_jaxpr(jax.grad(lambda x: apply(params, x).sum()))(x).jaxpr
    through: dict[Any, set[str]] = {}
    joined = []
    for eqn in program.eqns:
        sources = [through.get(v, set()) for v in eqn.invars if isinstance(v, Var)]
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape == x.shape:
            weight = any(v.aval.shape == (8, 5) for v in eqn.invars)
            sources = [{"weight" if weight else "factor"}]
        if eqn.primitive.name in {"jit", "pjit"}:
            sources = [{"factor"}]
        if eqn.primitive.name == "add_any":
            joined.append(sources)
        through |= dict.fromkeys(eqn.outvars, set().union(*sources))
    assert joined.count([{"weight"}, {"weight"}]) == 2
