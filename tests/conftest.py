"""Fixtures for every test."""

import jax
import pytest


@pytest.fixture
def quick_compilation():
    """Compile without optimisation: for tests of laws on small arrays, which are all compilation.

    The pages, and most tests of accuracy and of published values (by the usual scan), compile as users do.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
