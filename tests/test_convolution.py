"""Kernels from poles, for weights, poles and lengths drawn at random, against the powers themselves."""

import jax.numpy as jnp
import numpy as np
import pytest

from ssm_lib.convolution import kernel_poles


@pytest.mark.parametrize("length", (1, 2, 7, 100))
def test_kernel_is_the_sum_of_powers(length):
    rng = np.random.default_rng(length)
    lam = rng.uniform(0.5, 0.999, (3, 8)) * np.exp(1j * rng.uniform(0, 3, (3, 8)))
    w = rng.normal(size=(3, 8)) + 1j * rng.normal(size=(3, 8))
    table = (w[..., None] * lam[..., None] ** np.arange(length)).sum(1).real.T
    got = kernel_poles(jnp.asarray(lam, jnp.complex64), jnp.asarray(w, jnp.complex64), length)
    assert got.shape == table.shape
    np.testing.assert_allclose(got, table, atol=1e-5 * np.abs(w).sum())
