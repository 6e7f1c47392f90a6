"""The HiPPO toolkit against the published matrices, and its laws for every measure."""

from pathlib import Path

import numpy as np
import pytest

from ssm_lib import transition

with np.load(Path(__file__).parent / "golden/hippo_matrices.npz") as data:
    GOLDEN = {key: data[key] for key in data}

# Which call makes which published matrix; where nothing is said, the name alone.
PUBLISHED = {"s4/legt": {"window": 2.0}}
DENSE = sorted({key.rsplit("/", 2)[0] for key in GOLDEN if "nplr" not in key} - {"s4/diagonal"})
ORDERS = (4, 16, 64)


def relative(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype, f"{got.shape} {got.dtype} is not {want.shape} {want.dtype}"
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("N", ORDERS)
@pytest.mark.parametrize("name", DENSE)
def test_published_matrices(name, N):
    A, B = transition(name.split("/")[1], N, **PUBLISHED.get(name, {}))
    assert relative(A, GOLDEN[f"{name}/N{N}/A"]) < 1e-10
    assert relative(B, GOLDEN[f"{name}/N{N}/B"][:, 0]) < 1e-10
