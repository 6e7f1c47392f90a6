"""Outputs and gradients of the published implementations, at their parameters."""

from pathlib import Path

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_lib import LRU, S5SSM, make_DPLR_HiPPO, make_NPLR_HiPPO

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # its place until jax 0.8
GOLDEN = Path(__file__).parent / "golden"
LAYERS = {"s5": S5SSM, "lru": LRU}


def load(path):
    with np.load(path) as data:
        return {key: data[key] for key in data}


def group(data, prefix):
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def error(got, want):
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    return np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max() / np.abs(want).max()


def evaluate(layer, data, dtype):
    "Output and gradients of sum(y·w) in a given precision, by name."
    params = {name: jnp.asarray(value, dtype) for name, value in group(data, "params/").items()}
    u, w = jnp.asarray(data["u"], dtype), jnp.asarray(data["w"], dtype)

    def loss(params, u):
        y = layer.apply({"params": params}, u)
        return jnp.sum(w * y), y

    (_, y), (grads, grad_u) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, u)
    return {"y": y, "grad_u": grad_u, **{f"grad/{name}": value for name, value in grads.items()}}


LAYER_FILES = sorted(path for path in GOLDEN.glob("*.npz") if path.stem.split("_")[0] in LAYERS and "hippo" not in path.stem)


@pytest.mark.parametrize("path", LAYER_FILES, ids=lambda path: path.stem)
def test_layer(path):
    """Within 1e-5 of the truth, the same layer in float64, and of the golden value beyond the golden value's own error.

    One golden number is itself further than 1e-5 from float64: the gradient of Lambda_im in `s5_clip`, where the
    published formula (exp(λΔ) − 1)/λ in float32 cancels at Re λ = −1e-4.
    """
    data = load(path)
    layer = LAYERS[path.stem.split("_")[0]](**{key: value.item() for key, value in group(data, "config/").items()})
    shapes = jax.tree.map(jnp.shape, layer.init(jax.random.PRNGKey(0), data["u"])["params"])
    assert shapes == {name: value.shape for name, value in group(data, "params/").items()}

    ours = evaluate(layer, data, jnp.float32)
    with enable_x64(True):
        truth = {name: np.asarray(value) for name, value in evaluate(layer, data, jnp.float64).items()}
    for name, got in ours.items():
        assert got.dtype == jnp.float32 and truth[name].dtype == np.float64
        assert error(got, truth[name]) < 1e-5, f"{name} against float64"
        if name in data:
            assert error(data[name], truth[name]) < 2e-5, f"golden {name} against float64"
            assert error(got, data[name]) < max(1e-5, 1.1 * error(data[name], truth[name])), name
        else:
            assert np.abs(got).max() > 0, f"{name} is zero"


@pytest.mark.parametrize("N", (4, 8, 16, 64))
def test_hippo_legs(N):
    golden = group(load(GOLDEN / "s5_hippo_legs.npz"), f"N{N}/")
    A, P, B = make_NPLR_HiPPO(N)
    Lambda, _, _, V, _ = make_DPLR_HiPPO(N)
    for got, name in ((A, "A"), (P, "P"), (B, "B"), (Lambda, "Lambda"), ((V * Lambda) @ V.conj().T, "VLVh")):
        want = golden[name]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), err_msg=name)
