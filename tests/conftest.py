"""Fixtures for every test."""

import pytest
from sweep import quickly


@pytest.fixture
def quick_compilation():
    """Compile without optimisation: for tests of laws on small arrays, which are all compilation.

    The pages, and most tests of accuracy and of published values (by the usual scan), compile as users do.
    """
    with quickly():
        yield
