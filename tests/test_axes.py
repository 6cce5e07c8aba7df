"""Axis letters in closed form: shapes, einsums and fans that can be counted by hand."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rslora_jax.axes import (
    RANK,
    delta_subscripts,
    factor_dims,
    factor_shapes,
    factor_specs,
    fan_in,
    fan_out,
)

CASES = {
    "a dense kernel": ("io", (5, 7), (5, 2), (2, 7)),
    "a transposed kernel": ("oi", (7, 5), (5, 2), (2, 7)),
    "a stack of layers": ("bio", (3, 5, 7), (3, 5, 2), (3, 2, 7)),
    "heads as outputs": ("ioo", (5, 3, 4), (5, 2), (2, 3, 4)),
    "heads as inputs": ("iio", (3, 4, 5), (3, 4, 2), (2, 5)),
    "layers of experts": ("bbio", (2, 3, 5, 7), (2, 3, 5, 2), (2, 3, 2, 7)),
    "a stack on the last axis": ("iob", (5, 7, 3), (3, 5, 2), (3, 2, 7)),
    "outputs around inputs": ("oio", (3, 5, 4), (5, 2), (2, 3, 4)),
    "a convolution": ("iiio", (3, 3, 5, 7), (3, 3, 5, 2), (2, 7)),
}


@pytest.mark.parametrize("case", CASES)
def test_factors_own_the_stacked_axes_and_their_own_role(case):
    axes, shape, a, b = CASES[case]
    assert factor_shapes(axes, shape, rank=2) == (a, b)


@pytest.mark.parametrize("case", CASES)
def test_the_rank_is_last_in_a_and_follows_the_stacked_axes_in_b(case):
    axes, *_ = CASES[case]
    a, b = factor_dims(axes)
    assert a.index(RANK) == len(a) - 1
    assert b.index(RANK) == axes.count("b")


def test_the_dims_of_the_factors_of_stacked_heads_are_known_by_hand():
    assert factor_dims("bioo") == ((0, 1, RANK), (0, RANK, 2, 3))
    assert factor_dims("iob") == ((2, 0, RANK), (2, RANK, 1))


def test_the_einsum_of_a_dense_kernel_is_a_matrix_product():
    assert delta_subscripts("io") == "az,zb->ab"
    assert delta_subscripts("oi") == "bz,za->ab"


@pytest.mark.parametrize("case", CASES)
def test_the_einsum_of_the_factors_has_the_shape_and_sum_of_the_weight(case):
    axes, shape, a_shape, b_shape = CASES[case]
    a, b = np.full(a_shape, 2.0), np.full(b_shape, 3.0)
    delta = np.einsum(delta_subscripts(axes), a, b)
    # Two ranks, each 2 * 3.
    np.testing.assert_array_equal(delta, np.full(shape, 12.0))


def test_each_layer_of_a_stack_meets_only_its_own_factors():
    a = np.arange(1.0, 4.0).reshape(3, 1, 1)
    b = np.ones((3, 1, 1))
    delta = np.einsum(delta_subscripts("bio"), a, b)
    np.testing.assert_array_equal(delta, a)


@pytest.mark.parametrize(
    ("axes", "shape", "inputs", "outputs"),
    [
        ("io", (5, 7), 5, 7),
        ("oi", (5, 7), 7, 5),
        ("bio", (3, 5, 7), 5, 7),
        ("iio", (3, 4, 5), 12, 5),
        ("ioo", (5, 3, 4), 5, 12),
        ("iiio", (3, 3, 5, 7), 45, 7),
    ],
)
def test_fans_multiply_the_axes_of_their_role_and_leave_stacks_out(axes, shape, inputs, outputs):
    assert fan_in(axes, shape) == inputs
    assert fan_out(axes, shape) == outputs


@pytest.mark.parametrize(
    ("axes", "spec", "a", "b"),
    [
        ("io", ("x", "y"), P("x", None), P(None, "y")),
        ("oi", ("x", "y"), P("y", None), P(None, "x")),
        ("bioo", ("w", "x", "y", "z"), P("w", "x", None), P("w", None, "y", "z")),
        ("iob", ("x", "y", ("w", "z")), P(("w", "z"), "x", None), P(("w", "z"), None, "y")),
        ("iio", ("x", None, "y"), P("x", None, None), P(None, "y")),
    ],
)
def test_factors_have_the_specs_of_the_axes_that_they_own(axes, spec, a, b):
    assert factor_specs(axes, spec) == (a, b)
    split_a, split_b = factor_specs(axes, spec, rank="r")
    assert split_a[len(a) - 1] == split_b[axes.count("b")] == "r"
