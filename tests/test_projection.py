"""HiPPO as memory: the published coefficients, memory that does not grow with the sequence, and the cell under `nn.RNN`."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from ssm_lib import HiPPOCell, project_online, reconstruct, transition
from ssm_lib.convolution import METHODS, discretize_dense
from ssm_lib.projection import BASES, GATES, basis, legs_step

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # its place until jax 0.8
ROOT = Path(__file__).parents[1]
with np.load(ROOT / "tests" / "golden" / "hippo_operators.npz") as data:
    GOLDEN = dict(data)
SIGNAL = GOLDEN["f"]
PUBLISHED_NAMES = {"zoh": "zoh", "bilinear": "bilinear", "backward_diff": "backward", "euler": "forward"}
CLOCKS = {"legs": {}, "legt": {"dt": 1 / 50}, "lmu": {"dt": 1 / 50}, "lagt": {"dt": 0.1}, "tlagt": {"dt": 0.1}}

each_measure = pytest.mark.parametrize("measure", CLOCKS)
each_method = pytest.mark.parametrize("method", METHODS)


def error(got, want):
    assert np.shape(got) == np.shape(want), f"{np.shape(got)} is not {np.shape(want)}"
    return np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(want).max()


# --- The published values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ("backward", "bilinear", "zoh"))
def test_golden_legs(method):
    "Every 20th of the 400 steps. The published zero-order hold starts at time 1 with a zero past."
    start = 1.0 if method == "zoh" else 0.0
    with enable_x64(True):
        c = np.asarray(project_online(SIGNAL, "legs", 32, method=method, start=start))
    assert error(c[19::20], GOLDEN[f"legs/{method}/c"]) < 1e-8
    single = project_online(SIGNAL.astype(np.float32), "legs", 32, method=method, start=start)
    assert single.dtype == jnp.float32 and error(single, c) < 1e-5


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
@pytest.mark.parametrize("measure", ("legt", "lmu", "lagt", "tlagt"))
def test_golden_time_invariant(measure, name):
    run = lambda f: project_online(f, measure, 32, method=PUBLISHED_NAMES[name], dt=float(GOLDEN[f"{measure}/dt"]))
    with enable_x64(True):
        c = np.asarray(run(SIGNAL))
    assert error(c[19::20], GOLDEN[f"{measure}/{name}/c"]) < 1e-8
    assert error(run(SIGNAL.astype(np.float32)), c) < 1e-4


def test_golden_reconstruction():
    "Published from the bilinear coefficients at the last step, oldest moment first."
    dt = float(GOLDEN["lmu/dt"])
    moments = {"legs": np.linspace(0, 1, 400), "lmu": np.arange(0, 1, dt)}
    with enable_x64(True):
        for measure, moment in moments.items():
            clock = {} if measure == "legs" else {"dt": dt}
            c = project_online(SIGNAL, measure, 32, last=True, **clock)
            assert error(reconstruct(c, measure, 1 - moment), GOLDEN[f"{measure}/reconstruct_last"]) < 1e-8
    assert error(basis("legs", 32, 1 - moments["legs"])[::20], GOLDEN["legs/eval_matrix"]) < 1e-8


# --- One step, many signals, other times ------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("N", (1, 33))
def test_legs_step_is_the_dense_one(method, N):
    A, B = transition("legs", N)
    c, f = np.random.default_rng(N).normal(size=N), -0.3
    with enable_x64(True):
        for h in (1.0, 0.5, 1e-4):
            if method == "zoh":
                A_bar = expm(-A * np.log1p(-h)) if h < 1 else np.zeros((N, N))
                want = A_bar @ c + np.linalg.solve(A, (A_bar - np.eye(N)) @ B) * f
            else:
                A_bar, B_bar = discretize_dense(A, B, h, method)
                want = A_bar @ c + B_bar * f
            assert error(jax.jit(legs_step, static_argnames="method")(jnp.asarray(c), f, h, method), want) < 1e-11


def test_legs_step_takes_a_share_per_signal():
    rng = np.random.default_rng(0)
    c, f, h = (x.astype(np.float32) for x in (rng.normal(size=(3, 2, 9)), rng.normal(size=(3, 2)), rng.uniform(0, 1, (3, 2))))
    for method in METHODS:
        step = partial(legs_step, method=method)
        assert error(jax.jit(step)(c, f, h), jax.jit(jax.vmap(jax.vmap(step)))(c, f, h)) < 1e-5


@each_measure
def test_batched_signals_pieces_and_gradient(measure):
    f = np.random.default_rng(1).normal(size=(50, 2, 3)).astype(np.float32)
    run = lambda f, **more: project_online(f, measure, 10, **CLOCKS[measure], **more)
    c = run(f)
    assert c.shape == (50, 2, 3, 10) and c.dtype == jnp.float32
    assert error(run(f[:, 1, 2]), c[:, 1, 2]) < 1e-5
    assert error(run(f, last=True), c[-1]) < 1e-6
    assert error(run(f[20:], c0=c[19], **({"start": 20.0} if measure == "legs" else {})), c[20:]) < 2e-5
    w = np.random.default_rng(2).normal(size=c.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda f: jnp.sum(w * run(f))))(f)
    np.testing.assert_allclose(np.sum(gradient * f), np.sum(w * c), rtol=1e-3)  # linear in f
    assert np.all(gradient[-1] != 0)
    other = np.random.default_rng(3).normal(size=f.shape).astype(np.float32)
    np.testing.assert_allclose(np.sum(gradient * other), np.sum(w * run(other)), rtol=1e-3, atol=1e-3 * np.abs(w).sum() ** 0.5)
    assert run(f.astype(jnp.bfloat16)).dtype == jnp.float32


@each_method
def test_times(method):
    "Times 1, 2, … are the default, their unit is free, and they may be traced."
    f = np.random.default_rng(0).normal(size=40).astype(np.float32)
    N = 6
    c = project_online(f, "legs", N, method=method)
    run = lambda times: project_online(f, "legs", N, method=method, times=times)
    assert np.array_equal(run(np.arange(1, 41)), c)
    assert error(run(1e-3 * np.arange(1, 41)), c) < 1e-5
    assert error(jax.jit(run)(jnp.arange(1.0, 41.0)), c) < 1e-5


@pytest.mark.parametrize("method", ("backward", "bilinear", "zoh"))
def test_irregular_samples_give_the_dense_coefficients(method):
    wave = lambda t: np.sin(7 * t) + t
    with enable_x64(True):
        dense = project_online(wave((np.arange(8000) + 0.5) / 8000), "legs", 12, method="zoh", last=True)
        gaps = []
        for L in (200, 2000):
            steps = np.random.default_rng(L).uniform(0.1, 2.0, L)
            times = np.cumsum(steps) / steps.sum()
            gaps.append(error(project_online(wave(times), "legs", 12, times=times, method=method, last=True), dense))
    assert gaps[0] < 0.1 and gaps[1] < gaps[0] / 7, gaps


def test_a_held_signal_is_projected_exactly():
    "Zero-order hold at irregular times, against the integrals of the step function."
    rng = np.random.default_rng(5)
    f, edges = rng.normal(size=30), np.concatenate([[0], np.cumsum(rng.uniform(0.1, 2, 30))])
    z, w = np.polynomial.legendre.leggauss(40)
    with enable_x64(True):
        c = project_online(f, "legs", 20, times=edges[1:], method="zoh", last=True)
    x = edges / edges[-1]
    nodes, weights = x[:-1, None] + np.diff(x)[:, None] * (z + 1) / 2, np.diff(x)[:, None] * w / 2
    want = np.einsum("k,kj,kjn->n", f, weights, basis("legs", 20, 1 - nodes))
    assert error(c, want) < 1e-12


@each_measure
def test_reconstruction_of_a_recent_past(measure):
    "A slow signal is read back under every measure; for window=2 in the time of the window."
    t, unit = np.arange(400), {"legs": 400, "legt": 50, "lmu": 50}.get(measure, 10)
    f = np.sin(t / 30).astype(np.float32)
    options = {"window": 2.0} if measure in ("legt", "lmu") else {}
    scale = unit * options.get("window", 1)
    clock = {} if measure == "legs" else {"dt": 1 / unit}
    c = project_online(f, measure, 24, method="zoh", last=True, **clock, **options)
    recent = slice(340, 398)
    lag = (400 - 0.5 - t[recent]) / (400 if measure == "legs" else unit)
    assert lag.max() * unit < scale * 10
    assert np.abs(reconstruct(c, measure, lag, **options) - f[recent]).max() < (0.02 if measure != "tlagt" else 0.2)


def test_complex_measures_are_projected():
    f = np.random.default_rng(0).normal(size=20).astype(np.float32)
    c = project_online(f, "s4d_lin", 8, dt=0.1)
    assert c.shape == (20, 8) and c.dtype == jnp.complex64
    np.testing.assert_allclose(c[:, :4], np.conj(c[:, 4:]), atol=1e-6)


# --- Memory -----------------------------------------------------------------------------------------------------------


@each_method
def test_memory_is_flat(method):
    "N = 256: no step keeps a matrix. 10,000 of them would be 2.6 GB in float32; one is 0.26 MB."
    N, matrix = 256, 256 * 256 * 4
    f = lambda L: jax.ShapeDtypeStruct((L,), jnp.float32)
    run = lambda f: project_online(f, "legs", N, method=method)
    last = lambda f: project_online(f, "legs", N, method=method, last=True)
    memory = lambda fun, L: jax.jit(fun).lower(f(L)).compile().memory_analysis().temp_size_in_bytes
    for fun in (last, run):
        assert memory(fun, 10_000) < 2 * matrix, method
    gradient = jax.grad(lambda f: jnp.sum(run(f) ** 2))
    coefficients = 10_000 * N * 4
    assert memory(gradient, 10_000) < 3 * coefficients + 2 * matrix, method


@pytest.mark.parametrize("method", ("backward", "bilinear"))
def test_ten_thousand_steps_in_single_precision(method):
    t = np.linspace(0, 1, 10_000)
    f = np.sin(40 * t) + 0.3 * np.cos(333 * t)
    c = project_online(f.astype(np.float32), "legs", 256, method=method, last=True)
    with enable_x64(True):
        want = project_online(f, "legs", 256, method=method, last=True)
    assert error(c, want) < 2e-5


def test_a_thousand_held_steps_in_single_precision():
    f = np.sin(np.linspace(0, 40, 1000))
    c = project_online(f.astype(np.float32), "legs", 256, method="zoh", last=True)
    with enable_x64(True):
        want = project_online(f, "legs", 256, method="zoh", last=True)
    assert error(c, want) < 2e-5


# --- The cell ---------------------------------------------------------------------------------------------------------


def by_hand(variables, cell, x):
    "The equations of the cell in a Python loop, for one sequence (L, H), with dense matrices."
    params = variables["params"]["cell"]
    A, B = transition(cell.measure, cell.N)
    tau = GATES[cell.gate](cell.features)
    gate = jax.jit(lambda state, cx: tau.apply({"params": params["tau"]}, state, cx))
    state, c, out = tau.initialize_carry(jax.random.PRNGKey(0), x.shape[1:]), np.zeros(cell.N), []
    for k, x_k in enumerate(x):
        state, h = gate(state, np.concatenate([c, x_k]).astype(np.float32))
        f = float(h @ params["feature"]["kernel"][:, 0] + params["feature"]["bias"][0])
        A_bar, B_bar = discretize_dense(A, B, 1 / (k + 1) if cell.measure == "legs" else cell.dt, cell.method)
        c = A_bar @ c + B_bar * f
        out.append(h)
    return np.array(out), c


@pytest.mark.parametrize("gate", GATES)
@each_measure
def test_cell(measure, gate):
    cell = HiPPOCell(features=5, N=7, measure=measure, gate=gate, **CLOCKS[measure])
    model = nn.RNN(cell, return_carry=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3)), jnp.float32)
    variables = model.init(jax.random.PRNGKey(1), x[0, :1])

    def loss(variables):
        carry, h = model.apply(variables, x)
        return jnp.sum(h**2), (carry, h)

    (_, ((_, c, steps), h)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    assert h.shape == (2, 7, 5) and c.shape == (2, 7) and np.all(steps == 7)
    want_h, want_c = by_hand(variables, cell, x[1])
    assert error(h[1], want_h) < 1e-5 and error(c[1], want_c) < 1e-5
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(g)) and np.abs(g).max() > 0, path


@pytest.mark.parametrize("measure", ("legs", "lagt"))
def test_cell_lengths_directions_and_batches(measure):
    cell = HiPPOCell(features=4, N=5, measure=measure, gate="lstm", **CLOCKS[measure])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 2)), jnp.float32)
    model = nn.RNN(cell, return_carry=True)
    variables = jax.jit(model.init)(jax.random.PRNGKey(0), x)
    run = jax.jit(model.apply, static_argnames=("reverse", "keep_order", "time_major"))
    whole = run(variables, x)[1]
    lengths = jnp.array([10, 4, 6])
    (_, c, steps), h = run(variables, x, seq_lengths=lengths)
    assert np.array_equal(steps, lengths) and error(h, whole) < 1e-6
    first, _ = run(variables, x[:, :6])
    assert error(c[2], first[1][2]) < 1e-5
    assert error(run(variables, x[:, 6:], initial_carry=first)[1], whole[:, 6:]) < 1e-5
    assert error(run(variables, x[1])[1], whole[1]) < 1e-5
    back = run(variables, x, reverse=True, keep_order=True)[1]
    assert error(back[:, ::-1], run(variables, x[:, ::-1])[1]) < 1e-5
    major = run(variables, jnp.swapaxes(x, 0, 1), time_major=True)[1]
    assert error(jnp.swapaxes(major, 0, 1), whole) < 1e-5


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: project_online(SIGNAL, "fast", 4), r"measure is 'fast'; expected one of"),
        (lambda: project_online(SIGNAL, "legs", 0), r"N is 0; expected an integer"),
        (lambda: project_online(SIGNAL, "legs", 4, method="euler"), r"method is 'euler'; expected one of"),
        (lambda: project_online(SIGNAL, "legs", 4, dt=0.1), r"dt is 0.1, but LegS has no clock"),
        (lambda: project_online(SIGNAL, "legt", 4), r"dt is None; expected the step"),
        (lambda: project_online(SIGNAL, "legt", 4, dt=-1.0), r"dt is -1.0; expected a finite number"),
        (lambda: project_online(SIGNAL, "legt", 4, dt=0.1, start=1.0), r"times and start are for 'legs'"),
        (lambda: project_online(SIGNAL, "legs", 4, times=np.ones(3)), r"times has shape \(3,\); expected \(400,\)"),
        (lambda: project_online(SIGNAL, "legs", 4, times=np.zeros(400)), r"times do not increase"),
        (lambda: project_online(SIGNAL, "legs", 4, start=-1.0), r"start is -1.0; expected a finite number"),
        (lambda: project_online(1.0, "legs", 4), r"f is 1.0; expected"),
        (lambda: project_online(SIGNAL, "legs", 4, c0=np.zeros(3)), r"c0 has shape \(3,\); expected \(4,\)"),
        (lambda: basis("fout", 4, 0.0), r"measure is 'fout'; expected one of"),
        (lambda: HiPPOCell(4, 4, gate="mgu"), r"gate is 'mgu'; expected one of"),
        (lambda: HiPPOCell(4, 4, "lagt"), r"dt is None; expected the step"),
        (lambda: HiPPOCell(4, 4, "s4d_lin", dt=0.1), r"measure is 's4d_lin', a complex one"),
    ],
)
def test_errors(call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bases_are_measures():
    assert all(transition(measure, 4) for measure in BASES)


# --- The benchmark ----------------------------------------------------------------------------------------------------


def test_benchmark_runs_on_mnist_arrays(tmp_path):
    "The published setting's path, on a handful of made-up images and with small sizes."
    rng = np.random.default_rng(0)
    y = np.arange(20) % 10
    images = rng.integers(0, 255, (20, 4, 4), np.uint8)
    np.savez(tmp_path / "fake.npz", x_train=images, y_train=y, x_test=images, y_test=y)
    small = "--models LegS S5 --seeds 1 --epochs 1 --batch 10 --features 4 --memory 4 --gru 4 --d-model 8".split()
    script = ROOT / "benchmarks" / "permuted_digits.py"
    command = [sys.executable, script, "--mnist", tmp_path / "fake.npz", "--out", tmp_path, *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    table = (tmp_path / "permuted_mnist.md").read_text(encoding="utf-8")
    assert (tmp_path / "permuted_mnist.json").is_file()
    for name in ("LegS", "S5"):
        assert re.search(rf"^\| {name} \|", table, re.M), table
