"""Arrangements of weights and factors: exact, invertible, and of one function."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rslora_jax as rl
from rslora_jax.axes import delta_subscripts, factor_shapes
from rslora_jax.paths import AdapterError
from rslora_jax.peft import arrange
from rslora_jax.peft.layout import Layout, kind_of, layout_of
from rslora_jax.peft.rules import Found, Name
from rslora_jax.sites import Use


def integers(rng, shape):
    """Small whole numbers, whose sums of products are exact in any order."""
    return rng.integers(-4, 5, shape).astype(np.float32)


def counting(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_a_dense_kernel_is_transposed():
    w = counting(2, 3)
    np.testing.assert_array_equal(arrange.weight_out(Layout("io", (2, 3), "linear"), w), w.T)


def test_a_weight_of_torch_order_stays():
    w = counting(2, 3)
    np.testing.assert_array_equal(arrange.weight_out(Layout("oi", (2, 3), "linear"), w), w)


def test_a_table_and_a_weight_stored_in_out_stay():
    w = counting(2, 3)
    for kind in ("embedding", "linear"):
        layout = Layout("io", (2, 3), kind, stored="io")
        np.testing.assert_array_equal(arrange.weight_out(layout, w), w)


def test_heads_are_flattened_in_the_weights_order():
    q, o = counting(5, 2, 4), counting(2, 4, 5)
    found = arrange.weight_out(Layout("ioo", q.shape, "linear"), q)
    np.testing.assert_array_equal(found, q.reshape(5, 8).T)
    found = arrange.weight_out(Layout("iio", o.shape, "linear"), o)
    np.testing.assert_array_equal(found, o.reshape(8, 5).T)


def test_a_bias_of_heads_is_one_axis():
    layout = layout_of("w", Found(Name("w", "q.bias", "oo"), "q.bias"), (2, 4))
    assert arrange.weight_out(layout, counting(2, 4)).tolist() == list(range(8))


def test_a_norm_is_not_flattened():
    layout = layout_of("w", Found(Name("w", "n.{0}.weight"), "n.{0}.weight"), (2, 4, 3))
    assert arrange.weight_out(layout, counting(4, 3)).shape == (4, 3)


def test_a_convolution_has_its_channels_first():
    w = counting(3, 5, 4, 8)
    layout = Layout("iiio", w.shape, "conv")
    np.testing.assert_array_equal(arrange.weight_out(layout, w), w.transpose(3, 2, 0, 1))
    a, b = arrange.factors_out(layout, counting(3, 5, 4, 2), counting(2, 8))
    np.testing.assert_array_equal(a, counting(3, 5, 4, 2).transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(b[..., 0, 0], counting(2, 8).T)


def test_interleaved_pairs_move_half_a_head_apart():
    layout = Layout("io", (1, 8), "linear", head_dim=4)
    rows = arrange.weight_out(layout, counting(1, 8))[:, 0]
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    _, b = arrange.factors_out(layout, counting(1, 1), counting(1, 8))
    assert b[:, 0].tolist() == rows.tolist()
    bias = Layout("o", (8,), "plain", head_dim=4, flat=True)
    assert arrange.weight_out(bias, counting(8)).tolist() == rows.tolist()


def test_interleaved_rotation_gives_the_scores_of_halves_after_the_permutation():
    """Scores of q and k are the same in both conventions, RoPE included."""
    rng, width, angle = np.random.default_rng(0), 8, np.arange(1, 5) / 3
    wq, wk, x, y = (
        rng.normal(size=(6, width)),
        rng.normal(size=(6, width)),
        *rng.normal(size=(2, 6)),
    )

    def turned(left, right, t):
        return left * np.cos(t) - right * np.sin(t), right * np.cos(t) + left * np.sin(t)

    def beside(v, t):
        return np.stack(turned(v[0::2], v[1::2], t), -1).ravel()

    def apart(v, t):
        return np.concatenate(turned(v[:4], v[4:], t))

    layout = Layout("io", (6, width), "linear", head_dim=width)
    hq, hk = (arrange.weight_out(layout, w) for w in (wq, wk))
    here = beside(x @ wq, angle) @ beside(y @ wk, 3 * angle)
    there = apart(hq @ x, angle) @ apart(hk @ y, 3 * angle)
    np.testing.assert_allclose(here, there, rtol=1e-12)


@st.composite
def layouts(draw):
    """Any order of axes; as many of the stacked ones are split as drawn."""
    count = {role: draw(st.integers(low, 2)) for role, low in (("b", 0), ("i", 1), ("o", 1))}
    letters = draw(st.permutations([role for role, n in count.items() for _ in range(n)]))
    axes = "".join(letters)
    shape = tuple(
        draw(st.lists(st.sampled_from([1, 2, 3]), min_size=len(axes), max_size=len(axes)))
    )
    split = draw(st.integers(0, count["b"]))
    if split < count["b"]:
        kind = "expert"
    else:
        kind = draw(st.sampled_from(["linear", "embedding"]))
    outputs = int(np.prod([n for n, role in zip(shape, axes, strict=True) if role == "o"]))
    head = draw(st.sampled_from([n for n in (0, 2, 4, 6) if n == 0 or outputs % n == 0]))
    return Layout(axes, shape, kind, split, draw(st.sampled_from(["oi", "io"])), head)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layouts(), st.integers(1, 3), st.integers(0, 99))
def test_factors_and_weights_come_back_bit_for_bit_and_compute_the_same(layout, rank, seed):
    rng = np.random.default_rng(seed)
    a, b = (integers(rng, shape) for shape in factor_shapes(layout.axes, layout.shape, rank))
    delta = np.einsum(delta_subscripts(layout.axes), a, b)
    for at in arrange.indices(layout):
        hf_a, hf_b = arrange.factors_out(layout, a, b, at)
        assert (hf_a.shape, hf_b.shape) == arrange.factor_shapes(layout, rank)
        back = arrange.factors_in(layout, hf_a, hf_b)
        np.testing.assert_array_equal(back[0], a[at])
        np.testing.assert_array_equal(back[1], b[at])
        piece = delta[arrange.part(layout, at)]
        weight = arrange.weight_out(layout, piece)
        assert weight.shape == arrange.weight_shape(layout)
        np.testing.assert_array_equal(arrange.weight_in(layout, weight), piece)
        product = hf_b @ hf_a
        wanted = product if layout.stored == "oi" else np.swapaxes(product, -1, -2)
        np.testing.assert_array_equal(weight, wanted)


@pytest.mark.parametrize("axes", ["iiio", "oiii", "iio", "io"])
def test_convolutions_come_back_bit_for_bit_and_compute_the_same(axes):
    rng, shape = np.random.default_rng(0), (3, 2, 5, 4)[: len(axes)]
    layout = Layout("b" + axes, (2, *shape), "conv", split=1)
    a, b = (integers(rng, s) for s in factor_shapes(layout.axes, layout.shape, 2))
    delta = np.einsum(delta_subscripts(layout.axes), a, b)
    for at in arrange.indices(layout):
        hf_a, hf_b = arrange.factors_out(layout, a, b, at)
        assert (hf_a.shape, hf_b.shape) == arrange.factor_shapes(layout, 2)
        for found, wanted in zip(
            arrange.factors_in(layout, hf_a, hf_b), (a[at], b[at]), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)
        weight = arrange.weight_out(layout, delta[at])
        np.testing.assert_array_equal(weight, np.einsum("or...,ri...->oi...", hf_b, hf_a))
        np.testing.assert_array_equal(arrange.weight_in(layout, weight), delta[at])


def test_the_kind_is_what_the_program_does_unless_the_rule_says_otherwise():
    plain, table = Found(Name("w", "l.weight"), "l.weight"), Name("w", "l.weight", kind="embedding")

    def site(primitive="dot_general", kind="product", **fields):
        return rl.Site("w", "io", (2, 3), "float32", (Use(primitive, kind, ""),), **fields)

    assert kind_of(plain, None) == kind_of(plain, site()) == "linear"
    assert (
        kind_of(plain, site(kind="lookup")) == kind_of(plain, site(embedding=True)) == "embedding"
    )
    assert kind_of(plain, site("conv_general_dilated")) == "conv"
    assert kind_of(Found(table, "l.weight"), site()) == "embedding"


def test_a_stack_of_experts_is_one_parameter():
    name = Name("w", "h.{0}.experts.up", "bbio")
    layout = layout_of("w", Found(name, name.tensor), (2, 4, 3, 5))
    assert (layout.kind, layout.stack, arrange.weight_shape(layout)) == ("expert", (2,), (4, 5, 3))


def test_a_convolution_of_mixed_axes_is_refused():
    name = Name("w", "c.weight", "ioi", kind="conv")
    with pytest.raises(AdapterError, match="'w' is a convolution of axes 'ioi'"):
        layout_of("w", Found(name, name.tensor), (3, 2, 4))


def test_a_head_that_does_not_divide_the_outputs_is_refused():
    name = Name("w", "q.weight", "io", rope="interleaved", head_dim=4)
    with pytest.raises(AdapterError, match=r"'w' has 6 outputs.*width 4"):
        layout_of("w", Found(name, name.tensor), (3, 6))
