"""Outputs and gradients of the published implementations, at their parameters."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_lib import LRU, S5SSM, make_DPLR_HiPPO, make_NPLR_HiPPO

GOLDEN = Path(__file__).parent / "golden"
LAYERS = {"s5": S5SSM, "lru": LRU}


def load(path):
    with np.load(path) as data:
        return {key: data[key] for key in data}


def group(data, prefix):
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def near(got, want, tolerance, what):
    assert got.shape == want.shape and got.dtype == want.dtype, what
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert error < tolerance, f"{what}: relative error {error:.1e}"


@pytest.mark.parametrize("path", sorted(p for p in GOLDEN.glob("*.npz") if p.stem.split("_")[0] in LAYERS and "hippo" not in p.stem), ids=lambda p: p.stem)
def test_layer(path):
    data = load(path)
    layer = LAYERS[path.stem.split("_")[0]](**{key: value.item() for key, value in group(data, "config/").items()})
    params = jax.tree.map(jnp.asarray, group(data, "params/"))
    u, w = data["u"], data["w"]

    shapes = jax.tree.map(jnp.shape, layer.init(jax.random.PRNGKey(0), u)["params"])
    assert shapes == jax.tree.map(jnp.shape, params)

    near(layer.apply({"params": params}, u), data["y"], 1e-5, "y")
    loss = lambda params, u: jnp.sum(w * layer.apply({"params": params}, u))
    grads, grad_u = jax.grad(loss, (0, 1))(params, jnp.asarray(u))
    near(grad_u, data["grad_u"], 1e-5, "grad_u")
    golden = group(data, "grad/")
    assert len(golden) >= len(params) - 1
    for name, want in golden.items():
        near(grads[name], want, 1e-5, f"gradient of {name}")
    for name in set(params) - set(golden):
        assert np.abs(grads[name]).max() > 0, f"gradient of {name} is zero"


@pytest.mark.parametrize("N", (4, 8, 16, 64))
def test_hippo_legs(N):
    golden = group(load(GOLDEN / "s5_hippo_legs.npz"), f"N{N}/")
    A, P, B = make_NPLR_HiPPO(N)
    Lambda, _, _, V, _ = make_DPLR_HiPPO(N)
    for got, name in ((A, "A"), (P, "P"), (B, "B"), (Lambda, "Lambda"), ((V * Lambda) @ V.conj().T, "VLVh")):
        want = golden[name]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), err_msg=name)
