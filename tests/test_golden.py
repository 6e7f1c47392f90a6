"""Outputs and gradients of the published implementations, at their parameters."""

import itertools
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from sweep import enable_x64

from ssm_lib import (
    LRU,
    RGLRU,
    S5SSM,
    CausalConv,
    GriffinBlock,
    LinOSS,
    MambaBlock,
    Plan,
    causal_convolution,
    complex_softmax,
    discretize_dense,
    dss_kernel,
    dss_ssm,
    from_published,
    kernel_dense,
    make_DPLR_HiPPO,
    make_NPLR_HiPPO,
    run_dense,
    selective_scan,
    to_published,
)
from ssm_lib.convolution import kernel_poles
from ssm_lib.discretization import zoh
from ssm_lib.s4 import discretize_dplr, kernel_dplr, untruncate
from ssm_lib.scan import SCAN_BACKENDS

GOLDEN = Path(__file__).parent / "golden"
LAYERS = {"s5": S5SSM, "lru": LRU}


def load(path):
    with np.load(path) as data:
        return {key: data[key] for key in data}


def group(data, prefix):
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def error(got, want):
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    return np.abs(np.asarray(got, np.complex128) - np.asarray(want, np.complex128)).max() / np.abs(want).max()


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
    """By every scan within 1e-5 of the truth, the same layer in float64, and of the golden value beyond its own error.

    One golden number is itself further than 1e-5 from float64: the gradient of Lambda_im in `s5_clip`, where the
    published formula (exp(λΔ) − 1)/λ in float32 cancels at Re λ = −1e-4.
    """
    data = load(path)
    config = {key: value.item() for key, value in group(data, "config/").items()}
    layers = {backend: LAYERS[path.stem.split("_")[0]](**config, plan=Plan(backend)) for backend in SCAN_BACKENDS}
    shapes = jax.eval_shape(layers["sequential"].init, jax.random.PRNGKey(0), data["u"])["params"]
    assert jax.tree.map(jnp.shape, shapes) == {name: value.shape for name, value in group(data, "params/").items()}

    ours = {name: evaluate(layer, data, jnp.float32) for name, layer in layers.items()}
    with enable_x64(True):
        exact = evaluate(layers["sequential"], data, jnp.float64)
        truth = {name: np.asarray(value) for name, value in exact.items()}
    for name, backend in itertools.product(truth, SCAN_BACKENDS):
        got, at = ours[backend][name], f"{name}, {backend}"
        assert got.dtype == jnp.float32 and truth[name].dtype == np.float64
        assert error(got, truth[name]) < 1e-5, f"{at} against float64"
        if name in data:
            assert error(data[name], truth[name]) < 2e-5, f"golden {name} against float64"
            assert error(got, data[name]) < max(1e-5, 1.1 * error(data[name], truth[name])), at
        else:
            assert np.abs(got).max() > 0, f"{at} is zero"


@pytest.mark.parametrize("N", (4, 8, 16, 64))
def test_hippo_legs(N):
    golden = group(load(GOLDEN / "s5_hippo_legs.npz"), f"N{N}/")
    A, P, B = make_NPLR_HiPPO(N)
    Lambda, _, _, V, _ = make_DPLR_HiPPO(N)
    for got, name in ((A, "A"), (P, "P"), (B, "B"), (Lambda, "Lambda"), ((V * Lambda) @ V.conj().T, "VLVh")):
        want = golden[name]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), err_msg=name)


KERNELS = load(GOLDEN / "dss_s4d_s4_kernels.npz")


def ours_dss(g):
    L, step = int(g["L"]), float(g["step"])
    A_bar, B_bar, C_bar = dss_ssm(g["W"], g["Lambda"], L, step)
    K, u = dss_kernel(g["W"], g["Lambda"], L, step), g["u"]
    yield from {"K": K, "Abar": A_bar, "Bbar": B_bar, "Cbar": C_bar, "softmax_out": complex_softmax(g["softmax_in"])}.items()
    yield from {"y_conv": causal_convolution(u, K), "y_rec": run_dense(A_bar, B_bar[:, 0], C_bar[0], u)[1]}.items()


def ours_s4d(g):
    Lambda_bar, gamma = zoh(g["Lambda"], float(g["step"]))
    yield from {"Abar": jnp.diag(Lambda_bar), "Bbar": gamma[:, None]}.items()
    yield "K", kernel_poles(Lambda_bar, g["C"][0] * gamma, int(g["L"]))


def ours_s4(g):
    L, step, u = int(g["L"]), float(g["step"]), g["u"]
    A_bar, B_bar = discretize_dplr(g["Lambda"], g["P"], g["B"], step)
    C = untruncate(g["C"], A_bar, L)
    K = kernel_dplr(g["Lambda"], g["P"][None], g["B"], C, step, L, conj_sym=False)
    yield from {"Abar": A_bar, "Bbar": B_bar[:, None], "Cbar": C[None], "K": K}.items()
    yield from {"y_conv": causal_convolution(u, K), "y_rec": run_dense(A_bar, B_bar, C, u)[1]}.items()


def ours_ssm(g):
    A_bar, B_bar = discretize_dense(g["A"], g["B"][:, 0], float(g["step"]))
    C, u = g["C"][0], g["u16"]
    yield from {"Abar": A_bar, "Bbar": B_bar[:, None], "K16": kernel_dense(A_bar, B_bar, C, 16)}.items()
    yield "y16", run_dense(A_bar, B_bar, C, u)[1]
    yield "y16", causal_convolution(u, kernel_dense(A_bar, B_bar, C, 16))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("ours", (ours_dss, ours_s4d, ours_s4, ours_ssm))
def test_kernels(ours, dtype):
    "Kernels, one-step maps and outputs of the published DSS, S4D, S4 and dense systems, from the same arguments, within 1e-4."
    golden = group(KERNELS, ours.__name__.removeprefix("ours_") + "/")
    with enable_x64(dtype == jnp.float64):
        wide = {name: jnp.asarray(x, jnp.result_type(x.dtype, dtype)) if x.ndim else x for name, x in golden.items()}
        for name, got in ours(wide):
            assert error(got, golden[name]) < 1e-4, name


@pytest.mark.parametrize("path", LAYER_FILES, ids=lambda path: path.stem)
def test_published_trees_are_ours(path):
    "S5's and LRU's parameters by the published names: as they are, there and back; refused where they do not fit."
    data = load(path)
    config = {key: value.item() for key, value in group(data, "config/").items()}
    layer, params = LAYERS[path.stem.split("_")[0]](**config), group(data, "params/")
    for given in (params, {"params": params}):
        found = from_published(layer, given)
        back = to_published(layer, found)
        assert back.keys() == params.keys() == found["params"].keys()
        for name, value in params.items():
            np.testing.assert_array_equal(found["params"][name], value)
            np.testing.assert_array_equal(back[name], value)
    with pytest.raises(ValueError, match="params lacks D;"):
        from_published(layer, {name: value for name, value in params.items() if name != "D"})
    with pytest.raises(ValueError, match="params has D as an array"):
        from_published(layer, params | {"D": params["D"][:-1]})


# --- Newer layers: float64 from float32 inputs, with carried states and resets ------------------------------------------


class Scan:
    "Mamba's selective scan as if it were a layer, whose parameters are its inputs."

    def __init__(self, softplus):
        self.softplus = softplus

    def apply(self, v, u, x0, *, method, reset):
        y, last = selective_scan(u, **v["params"], delta_softplus=self.softplus, x0=x0, reset=reset)
        return last, y


def newer(config):
    "The layer of a golden file, and the names of its states there, in our order."
    kind = config["layer"]
    if kind == "RGLRU":
        return RGLRU(config["width"], config["num_heads"]), ("",)
    if kind == "Conv1D":
        return CausalConv(config["width"], config["temporal_width"]), ("",)
    if kind == "RecurrentBlock":
        width = config["conv1d_temporal_width"]
        return GriffinBlock(config["width"], config["lru_width"], config["num_heads"], width), ("/conv_1d", "/rg_lru")
    if kind == "Mamba block":
        fields = ("d_model", "d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias")
        return MambaBlock(**{name: config[name] for name in fields}), ("/conv", "/ssm")
    if "LinOSS" in kind:
        method = config["discretization"].lower().removesuffix("1")
        return LinOSS(config["d_model"], config["d_state"], method, config["damping"]), ("/z", "/x")
    return Scan(config["delta_softplus"]), ("",)


LAYOUT = {"/conv": lambda w: w.T[1:]}  # Mamba's window is (D, W), and its oldest column is never used
HELD = {"dlinoss": {"A_diag": (0, 1), "G_diag": (2,)}, "linoss": {"A_diag": (0,)}}  # published slopes are cut off there
NEWER = sorted(p for p in GOLDEN.glob("*.npz") if p.stem.split("_")[0] in "rglru conv1d griffin linoss dlinoss s6 mamba".split())


@partial(jax.jit, static_argnums=0)
def carried(apply, variables, u, state, reset):
    "Outputs, the last state and the gradient of sum(y²) by parameters, input and the state before."

    def loss(variables, u, state):
        last, y = apply(variables, u, state, reset=reset)
        return jnp.sum(y**2), (y, last)

    (_, (y, last)), slopes = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(variables, u, state)
    return y, last, *slopes


def without(tree, held):
    "Published gradients, and ours, without the entries in which we let through what the published code holds back."
    return {name: np.delete(g, held[name], 0) if name in held else g for name, g in tree.items()}


APPLY = {}  # one function for each layer, so that its programs are compiled once


@pytest.mark.parametrize("dtype", (np.float32, np.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("path", NEWER, ids=lambda path: path.stem)
def test_newer_layer(path, dtype):
    "By the names and layouts of the published parameters: values and states within 1e-5, slopes 1e-4; in float64 1e-10."
    data = load(path)
    config = json.loads(str(data["config"]))
    layer, states = newer(config)
    apply = APPLY.setdefault(json.dumps(config), partial(layer.apply, method="prefill"))
    into = (lambda tree: {"params": tree}) if isinstance(layer, Scan) else partial(from_published, layer)
    tree = lambda prefix: unflatten_dict(group(data, prefix), sep="/")
    carry = lambda name: [LAYOUT.get(state, np.asarray)(data[name + state]) for state in states]
    values, slopes = {np.float32: (1e-5, 1e-4), np.float64: (1e-10, 1e-10)}[dtype]
    if dtype == np.float64:  # torch's softplus above 20, and the cap of the root's slope in the files
        values, slopes = {"s6_stiff": (1e-8, 1e-8), "rglru_longmemory": (1e-10, 1e-7)}.get(path.stem, (values, slopes))
    with enable_x64(dtype == np.float64):
        wide = lambda tree: jax.tree.map(lambda z: jnp.asarray(z, np.result_type(z.dtype, dtype)), tree)
        single = lambda z: np.zeros(z.shape, np.complex64 if np.iscomplexobj(z) else np.float32)
        started = "state0" + states[0] in data
        before = wide(carry("state0") if started else [single(z) for z in carry("state")])
        state = tuple(before) if len(states) > 1 else before[0]
        v, u = wide(into(tree("params/"))), wide(data["u"])
        y, last, grad_v, grad_u, grad_state = carried(apply, v, u, state, jnp.asarray(data["reset"]))
        assert error(y, data["y"]) < values
        for got, name, want in zip(jax.tree.leaves(last), states, carry("state")):
            if path.stem == "conv1d_reset":  # the file's first row is from before the last start
                assert not np.asarray(got)[0].any()
                got, want = got[1:], want[1:]
            assert error(got, want) < values, name
        assert error(grad_u, data["grad_u"]) < slopes
        held = HELD.get(path.stem.split("_")[0], {})
        ours, theirs = (without(g["params"], held) for g in (grad_v, into(tree("grad/"))))
        if not isinstance(layer, Scan):
            back = flatten_dict(to_published(layer, v), sep="/")
            assert back.keys() == group(data, "params/").keys()
            assert all(np.array_equal(back[name], value) for name, value in group(data, "params/").items())
        for (name, got), want in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
            assert error(got, want) < slopes, name
        if started:
            for got, name, want in zip(jax.tree.leaves(grad_state), states, carry("grad_state0")):
                got = np.stack([got.real, -got.imag], -1) if jnp.iscomplexobj(got) else got
                assert error(got, want) < slopes, name
