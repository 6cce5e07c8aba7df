"""What an adapted training step costs once compiled, against LoRA written in by hand.

The models are those of the benchmark; its timings are not asserted here.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rl
from tests.benchmarks import step_cost
from tests.benchmarks.step_cost import HAND, LOOPS, Size

# No two of these numbers are equal: the shape of a frozen weight is the shape of nothing else.
SMALL = Size(
    layers=2, width=40, heads=2, head_dim=24, hidden=104, classes=72, batch=2, length=16, rank=4
)
MERGED = "merged in the step"
CASES = [*((loop, "float32") for loop in LOOPS), ("unrolled", "bfloat16")]


@functools.cache
def compiled(loop, way, dtype="float32"):
    """The compiled loss and gradients, once for the whole file."""
    size = dataclasses.replace(SMALL, dtype=dtype)
    lowered = step_cost.ways(size, loop)[way].lower_gradients()
    # Without LLVM's optimizations, which change neither number, compiling takes half the time.
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def cost_ratio(cost, loop, way, dtype="float32"):
    mine, theirs = (step_cost.compiled_cost(compiled(loop, w, dtype)) for w in (way, HAND))
    return mine[cost] / theirs[cost]


def weight_shaped_products(text):
    """The matrix products in a compiled program whose result has the shape of a frozen weight."""
    matrices = set(SMALL.matrices.values()) | {(SMALL.width, SMALL.classes)}
    shapes = {tuple(sorted(shape)) for shape in matrices}
    products = re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", text)
    found = [tuple(sorted(int(n) for n in dims.split(",") if n)) for dims in products]
    return [dims for dims in found if dims in shapes]


@pytest.mark.parametrize(("loop", "dtype"), CASES)
def test_an_adapted_step_computes_what_the_handwritten_one_does(loop, dtype):
    assert cost_ratio("flops", loop, "adapted", dtype) <= 1.01


@pytest.mark.parametrize(("loop", "dtype"), CASES)
def test_an_adapted_step_needs_the_memory_of_the_handwritten_one(loop, dtype):
    assert cost_ratio("temp_bytes", loop, "adapted", dtype) <= 1.05


@pytest.mark.parametrize("loop", LOOPS)
def test_tracing_an_adapted_model_calls_python_little_more_often(loop):
    """The limit on tracing time, in a measure that is the same in every run."""
    ways = step_cost.ways(dataclasses.replace(SMALL, layers=12), loop)
    mine, theirs = (step_cost.count_calls(ways[way].lower_gradients) for way in ("adapted", HAND))
    assert mine <= 1.5 * theirs


@pytest.mark.parametrize("loop", LOOPS)
def test_an_adapted_step_has_no_gradient_of_a_frozen_weight(loop):
    assert weight_shaped_products(compiled(loop, "adapted").as_text()) == []


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("way", [MERGED, "full fine-tuning"])
def test_the_search_for_weight_gradients_finds_them_where_they_are(loop, way):
    found = weight_shaped_products(compiled(loop, way).as_text())
    assert set(found) >= {tuple(sorted(shape)) for shape in SMALL.matrices.values()}


@pytest.mark.parametrize("loop", LOOPS)
def test_merging_in_the_step_would_exceed_the_limit(loop):
    assert cost_ratio("flops", loop, MERGED) > 1.05


@pytest.mark.parametrize("way", [HAND, MERGED])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_benchmark_trains_the_same_model_in_every_way(loop, way):
    adapted = step_cost.ways(SMALL, loop)["adapted"]
    arguments = random_like((adapted.trained, *adapted.fixed))
    results = (compiled(loop, w)(*arguments) for w in ("adapted", way))
    jax.tree.map(assert_close, *results)


def random_like(structs):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(s.dtype), structs)


def assert_close(actual, expected):
    atol = 1e-5 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


COUNT, TOKENS, INTO, OUT, RANK = 4, 32, 48, 56, 2
PRODUCT = 2 * TOKENS * INTO * OUT
THIN = 2 * TOKENS * RANK * (INTO + OUT)


def stack_of_adapters():
    """The compiled apply of one matrix over a stack of adapters."""
    base, x = {"w": jnp.ones((INTO, OUT))}, jnp.ones((TOKENS, INTO))
    config = rl.LoraConfig(rank=RANK, alpha=1.0, targets=["w"])
    params, apply, _ = rl.adapt(
        lambda p, x: x @ p["w"], base, x, config=config, key=jax.random.key(0)
    )
    lora = jax.tree.map(lambda leaf: jnp.stack([leaf] * COUNT), params.lora)
    stacked = rl.LoraParams(base, lora)
    batched = jax.vmap(apply, in_axes=(rl.LoraParams(None, 0), None))
    return jax.jit(batched).lower(stacked, x).compile()


def test_a_stack_of_adapters_multiplies_by_the_base_once():
    flops = step_cost.compiled_cost(stack_of_adapters())["flops"]
    added = COUNT * TOKENS * (OUT + RANK)  # the sum of both products, and the scale
    assert PRODUCT + COUNT * THIN <= flops <= PRODUCT + COUNT * THIN + 2 * added


def test_a_stack_of_adapters_never_stacks_the_base():
    text = stack_of_adapters().as_text()
    assert not re.search(rf"\[{COUNT},({INTO},{OUT}|{OUT},{INTO})\]", text)
