"""Decompositions of stacks of matrices, one matrix at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.decompositions import eigh, qr, svd

STACK = np.random.default_rng(0).normal(size=(2, 3, 7, 4)).astype(np.float32)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_qr_gives_back_the_matrix_and_orthonormal_columns():
    q, r = jax.jit(qr)(STACK)
    assert_close(q @ r, STACK)
    assert_close(jnp.swapaxes(q, -2, -1) @ q, np.broadcast_to(np.eye(4), (2, 3, 4, 4)))
    assert_close(r, np.triu(r))


def test_svd_gives_the_singular_values_of_numpy():
    u, s, vt = jax.jit(svd)(STACK)
    assert_close(s, np.linalg.svd(STACK, compute_uv=False))
    assert_close((u * s[..., None, :]) @ vt, STACK)


def test_eigh_gives_the_eigenvalues_of_numpy():
    square = np.swapaxes(STACK, -2, -1) @ STACK
    values, vectors = jax.jit(eigh)(square)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(square), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(square @ vectors, vectors * values[..., None, :], atol=2e-5)


@pytest.mark.parametrize("function", [qr, svd, eigh])
def test_a_matrix_without_a_stack_is_taken_as_it_is(function):
    square = STACK[0, 0, :4]
    square = square + square.T
    for found, stacked in zip(function(square), function(square[None]), strict=True):
        assert_close(found, stacked[0])


@pytest.mark.parametrize("function", [qr, svd, eigh])
def test_lapack_never_gets_a_stack(function):
    """A kernel that shares a stack among the threads it runs on can wait for itself."""
    text = jax.jit(function).lower(STACK[..., :4, :]).as_text()
    calls = re.findall(r"custom_call @lapack\w+\((?:.|\n)*?\) -> ", text)
    assert calls
    shapes = [shape for call in calls for shape in re.findall(r"tensor<((?:\d+x)*)f32>", call)]
    assert shapes and all(shape.count("x") <= 2 for shape in shapes)
