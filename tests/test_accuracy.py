"""Long times, small and large steps, and rough training, against double precision and exact values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep import KEY, enable_x64, noise

from ssm_lib import DSS, LRU, RGLRU, S4, S4D, S5SSM, LinOSS, LRUDynamics, MambaBlock, Plan, linear_scan
from ssm_lib.discretization import DISCRETIZATIONS, clip_poles
from ssm_lib.scan import SCAN_BACKENDS


@pytest.mark.parametrize("backend", SCAN_BACKENDS)
def test_a_million_steps(backend):
    "|λ| from 0.6 to 1 − 1e-6: within 2e-3 of the largest state of each pole."
    L, P, rng = 1_000_000, 8, np.random.default_rng(0)
    size = np.concatenate([[0.6, 0.9, 0.99], 1 - np.array([1e-3, 1e-4, 1e-5, 1e-6, 1e-6])])
    phase = np.append(rng.uniform(0, np.pi, P - 1), 0.0)
    poles = jnp.asarray(size * np.exp(1j * phase), jnp.complex64)
    Bu = jnp.asarray(rng.normal(size=(L, P)) + 1j * rng.normal(size=(L, P)), jnp.complex64)
    got = np.asarray(linear_scan(poles, Bu, backend=backend))
    with enable_x64(True):
        exact = np.asarray(linear_scan(poles.astype(jnp.complex128), Bu.astype(jnp.complex128), backend="sequential"))
    assert np.isfinite(got).all()
    assert np.all(np.abs(got - exact).max(0) < 2e-3 * np.abs(exact).max(0))


LONG = {"rglru": RGLRU(2, 1), "linoss": LinOSS(2, 4, "imex", damped=True, max_phase=1.0), "mamba": MambaBlock(2, 2)}
SLOW = {"rglru": {"a_param": jnp.full(2, -15.0)}, "linoss": {"G_diag": jnp.full(4, 1e-4)}, "mamba": {}}


@pytest.mark.parametrize("name", LONG)
def test_a_million_steps_of_a_layer(name):
    """Memories of a million steps (RG-LRU) and of 40,000 (LinOSS), and Mamba's: within 2e-3 of the largest value.

    An oscillator's angle is rounded, and what it remembers of that grows with its memory: 6e-3 where that is 400,000 steps.
    """
    layer = LONG[name]
    u = noise(1_000_000, 2)
    v = jax.jit(layer.init)(KEY, u[:2])
    v = {"params": v["params"] | SLOW[name]}
    run = jax.jit(layer.apply)
    got = np.asarray(run(v, u))
    with enable_x64(True):
        exact = np.asarray(run(*jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), (v, u))))
    assert np.isfinite(got).all()
    assert np.all(np.abs(got - exact).max(0) < 2e-3 * np.abs(exact).max(0))


def test_a_long_layer():
    "Both directions, in segments and by the scan of long sequences: values and gradients against a plain double precision loop."
    L, make = 2**14 + 5, partial(S5SSM, 4, 64, blocks=4, bidirectional=True)
    layer, plain = make(plan=Plan("lanes")), make(plan=Plan("sequential", segment=2**15))
    u, w = noise(L, 4), noise(L, 4, seed=1)
    v = jax.jit(layer.init)(KEY, u[:9])

    def run(layer, v, u):
        loss = lambda v, u: (jnp.mean(w * layer.apply(v, u)), layer.apply(v, u))
        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(v, u)

    (_, y), grads = run(layer, v, u)
    with enable_x64(True):
        (_, exact), slopes = run(plain, *jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), (v, u)))
    for got, want in zip(jax.tree.leaves((y, grads)), jax.tree.leaves((exact, slopes))):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def exact_step(rule, z, Delta):
    "Lambda_bar and gamma for z = λΔ in double precision; the series of expm1 where it would cancel."
    if rule == "bilinear":
        return (1 + z / 2) / (1 - z / 2), Delta / (1 - z / 2)
    small = np.abs(z) < 1e-4
    safe = np.where(small, 1.0, z)
    return np.exp(z), Delta * np.where(small, 1 + z / 2 + z**2 / 6 + z**3 / 24, np.expm1(safe) / safe)


@pytest.mark.parametrize("rule", DISCRETIZATIONS)
def test_discretisations_from_tiny_to_huge(rule):
    """λ = 0 and |λ|, Δ from 1e-8 to 1e2, at angles in the left half plane; values and derivatives.

    A rounding of z = λΔ alone turns e^z by |z| units in the last place, so that is what is allowed, times 4; for slopes
    times 16, of the largest slope of that kind. (∂γ/∂Δ = e^z is formed from two terms of size |γ|/Δ that cancel as e^z
    dies: its unit is theirs.)
    """
    sizes, angles = np.logspace(-8, 2, 21), np.array([0.5, 0.6, 0.75, 0.9, 1.0]) * np.pi
    Lambda = np.append((sizes[:, None] * np.exp(1j * angles)).ravel(), 0.0)
    Lambda, Delta = (m.ravel() for m in np.meshgrid(np.asarray(Lambda, np.complex64), np.asarray(sizes, np.float32)))
    wide = Lambda.astype(np.complex128), Delta.astype(np.float64)
    z, unit = wide[0] * wide[1], np.finfo(np.float32).eps
    step = DISCRETIZATIONS[rule]
    for got, exact, scale in zip(step(jnp.asarray(Lambda), jnp.asarray(Delta)), exact_step(rule, z, wide[1]), (1.0, wide[1])):
        assert got.dtype == jnp.complex64
        assert np.all(np.abs(np.asarray(got) - exact) <= 4 * unit * (1 + np.abs(z)) * np.maximum(np.abs(exact), unit * scale))

    def parts(re, im, Delta):
        Lambda_bar, gamma = step(jax.lax.complex(re, im), Delta)
        return jnp.stack([Lambda_bar.real, Lambda_bar.imag, gamma.real, gamma.imag])

    slopes = jax.jit(jax.vmap(jax.jacrev(parts, (0, 1, 2))))
    got = np.stack(slopes(Lambda.real, Lambda.imag, Delta), -1)
    with enable_x64(True):
        exact = np.stack(slopes(wide[0].real, wide[0].imag, wide[1]), -1)
    assert np.isfinite(got).all() and got.dtype == np.float32 and exact.dtype == np.float64
    scale = np.abs(exact).max(1, keepdims=True)
    scale[..., 2] = np.maximum(scale[..., 2], (np.abs(exact_step(rule, z, 1.0)[1]))[:, None])
    assert np.all(np.abs(got - exact) <= 16 * unit * (1 + np.abs(z))[:, None, None] * scale + 1e-30)


@pytest.mark.parametrize("rule", DISCRETIZATIONS)
@pytest.mark.parametrize("part", (0, 1), ids=("Lambda_bar", "gamma"))
def test_derivatives_in_double_precision(rule, part):
    "The float64 slopes that the sweep above trusts, against central differences."
    z, h = np.array([0.0, -1e-9, -1e-3 + 1e-3j, -0.3 + 2j, -40 + 3j]), 1e-5
    with enable_x64(True):
        value = lambda t: DISCRETIZATIONS[rule](jnp.asarray(z) + t, jnp.ones(5))[part]
        slope = jax.jvp(value, (jnp.zeros(5),), (jnp.ones(5),))[1]
    want = (exact_step(rule, z + h, 1.0)[part] - exact_step(rule, z - h, 1.0)[part]) / (2 * h)
    np.testing.assert_allclose(slope, want, atol=1e-9)


# Re λ < 0 always, but exp(−1e-4 Δ) of a short step is 1 in single precision, and a rounded e^{iθ} is off the circle by a unit.
INSIDE = 1 + 2 * np.finfo(np.float32).eps
WALKERS = {
    "s5_zoh": S5SSM(2, 8, blocks=1, clip_eigs=True),
    "s5_bilinear": S5SSM(2, 8, blocks=1, clip_eigs=True, discretization="bilinear"),
    "lru": LRU(8, 2),
    "dss": DSS(2, 8, l_max=64),
    "s4d_zoh": S4D(2, 8),
    "s4d_bilinear": S4D(2, 8, discretization="bilinear"),
}


def walk(params, worst, updates=10_000):
    "The largest `worst(params)` along a random walk with large steps that pushes outwards half of the time."
    leaves, tree = jax.tree.flatten(params)

    def step(leaves, key):
        keys = jax.random.split(key, len(leaves))
        push = [0.3 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves)]
        leaves = [jnp.clip(p + d, -30, 30) for p, d in zip(leaves, push)]
        return leaves, worst(tree.unflatten(leaves))

    return jax.jit(lambda leaves: jax.lax.scan(step, leaves, jax.random.split(KEY, updates))[1])(leaves)


@pytest.mark.parametrize("layer", WALKERS.values(), ids=WALKERS)
def test_poles_stay_inside_over_ten_thousand_noisy_updates(layer):
    params = jax.jit(layer.init)(KEY, noise(3, 2))
    sizes = walk(params, lambda p: jnp.abs(layer.apply(p, method="system").step(None)[0]).max())
    assert np.isfinite(sizes).all() and sizes.max() <= INSIDE


def test_lru_dynamics_stays_inside():
    layer = LRUDynamics(8, 0.9, 1.0, 6.28, clip_eigs=True)
    params = layer.init(KEY, jnp.ones(8), 2)
    sizes = walk(params, lambda p: jnp.abs(layer.apply(p, jnp.ones(8), 2)[1]).max())
    assert np.isfinite(sizes).all() and sizes.max() < INSIDE


def test_s4_dies_out_over_ten_thousand_noisy_updates():
    "Not diagonal: no state may grow in a step without input, whatever the parameters are (A + A* stays negative)."
    layer, u = S4(2, 8, l_max=64), jnp.zeros(2)
    params = jax.jit(layer.init)(KEY, u[None])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 2)) @ [1, 1j], jnp.complex64)

    def growth(p):
        after = layer.apply(p, x, u, method="step")[0]
        return (jnp.linalg.norm(after, axis=1) / jnp.linalg.norm(x, axis=1)).max()

    ratios = walk(params, growth)
    assert np.isfinite(ratios).all() and ratios.max() <= 1 + 1e-5


RULES = [(method, damped) for method in ("im", "imex") for damped in (False, True)]


@pytest.mark.parametrize("method, damped", RULES)
def test_oscillators_stay_stable_over_ten_thousand_noisy_updates(method, damped):
    "By Jury's criterion: the roots of t² − τ t + δ lie in the closed disc where δ ≤ 1 and |τ| ≤ 1 + δ."
    layer = LinOSS(2, 8, method, damped)

    def worst(p):
        a, b, c, d, *_ = layer.apply(p, method="system").coefficients(None)
        determinant = a * d - b * c
        return jnp.maximum(determinant, jnp.abs(a + d) - determinant).max()

    sizes = walk(jax.jit(layer.init)(KEY, noise(3, 2)), worst)
    assert np.isfinite(sizes).all() and sizes.max() <= INSIDE + 1e-6  # determinants are differences of rounded products


def test_gated_states_die_out_over_ten_thousand_noisy_updates():
    "Without input no state of RG-LRU's or Mamba's grows in a step, whatever the parameters are."
    for layer, x in ((RGLRU(2, 1), jnp.ones(2)), (MambaBlock(2, 2, conv_bias=False), (jnp.zeros((3, 4)), jnp.ones((4, 2))))):
        largest = lambda p, layer=layer, x=x: jnp.abs(jax.tree.leaves(layer.apply(p, x, jnp.zeros(2), method="step")[0])[-1]).max()
        ratios = walk(jax.jit(layer.init)(KEY, noise(3, 2)), largest)
        assert np.isfinite(ratios).all() and ratios.max() <= INSIDE


def test_a_clipped_pole_can_come_back():
    "The gradient goes through the clip: gradient descent on a clipped pole moves it."
    slope = jax.grad(lambda re: jnp.sum(clip_poles(re) ** 2))(jnp.array([0.5, -1.0]))
    assert np.abs(slope).min() > 0
