"""Every layer of the library through blocks, models and rollouts: whole, pieces and steps agree.

A new layer is tested by adding one line to LAYERS.
"""

from functools import partial

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_lib import LRU, S5SSM, BatchStackedSSM2DModel, BatchStackedSSMModel, LRUDynamics, SequenceLayer, rollout

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # its place until jax 0.8

LAYERS = {
    "s5_zoh": partial(S5SSM, d_hidden=16, blocks=2),
    "s5_bilinear": partial(S5SSM, d_hidden=16, blocks=2, discretization="bilinear", clip_eigs=True),
    "s5_no_conj": partial(S5SSM, d_hidden=16, blocks=4, conj_sym=False, C_init="complex_normal"),
    "lru": partial(LRU, d_hidden=16),
}
MODELS = {"1d": (BatchStackedSSMModel, 6), "2d": (BatchStackedSSM2DModel, (3, 4))}
KEY = jax.random.PRNGKey(0)
each_layer = pytest.mark.parametrize("ssm", LAYERS.values(), ids=LAYERS)
each_model = pytest.mark.parametrize("model_class, d_model", MODELS.values(), ids=MODELS)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def frames(d_model, T, B=2, C=2):
    return noise(B, T, *np.atleast_1d(d_model), C)


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=tolerance * max(np.abs(want).max(), 1e-30), rtol=0)


@partial(jax.jit, static_argnums=0)
def by_step(m, v, carry, u, times):
    "Steps along axis 0 of u, with the per-step arguments in `times`."
    return jax.lax.scan(lambda c, at: m.apply(v, c, at[0], method="step", **at[1]), carry, (u, times))


@each_layer
@pytest.mark.parametrize("L, cuts", ((1, []), (2, [1]), (1000, [1, 400, 401])))
def test_layer_pieces_and_steps(ssm, L, cuts):
    layer, u = ssm(d_model=5), noise(L, 5)
    v = layer.init(KEY, u)
    carry, pieces = None, []
    for piece in jnp.split(u, cuts):
        carry, y = layer.apply(v, piece, carry, method="prefill")
        pieces.append(y)
    whole = layer.apply(v, u)
    close(jnp.concatenate(pieces), whole)
    last, steps = by_step(layer, v, layer.apply(v, method="initial_carry"), u, {})
    close(steps, whole)
    close(last, carry)


@each_layer
def test_layer_times(ssm):
    "dt, mask and reset together: pieces and steps agree with the whole; gaps and the past leave no trace."
    L, layer, rng = 60, ssm(d_model=5), np.random.default_rng(1)
    mask, reset = jnp.asarray(rng.random(L) < 0.7), jnp.zeros(L, bool).at[30].set(True)
    times = dict(dt=jnp.asarray(rng.uniform(0.2, 3, L), jnp.float32), mask=mask, reset=reset)
    u = jnp.where(mask[:, None], noise(L, 5), jnp.nan)
    v = layer.init(KEY, noise(L, 5))
    whole = layer.apply(v, u, **times)
    assert bool(jnp.isfinite(whole).all())
    close(by_step(layer, v, layer.apply(v, method="initial_carry"), u, times)[1], whole)
    part = jax.tree.map(lambda t: t[:41], times), jax.tree.map(lambda t: t[41:], times)
    carry, head = layer.apply(v, u[:41], method="prefill", **part[0])
    close(jnp.concatenate([head, layer.apply(v, u[41:], carry, method="prefill", **part[1])[1]]), whole)
    kept = {name: t[mask] for name, t in times.items() if name == "dt"}
    kept["reset"] = jnp.zeros(int(mask.sum()), bool).at[int(mask[:30].sum())].set(True)
    close(layer.apply(v, u[mask], **kept), whole[mask])
    past = jax.grad(lambda u: jnp.sum(layer.apply(v, u, **times)[30:] ** 2))(jnp.nan_to_num(u))[:30]
    assert np.all(np.asarray(past) == 0)


@each_layer
def test_layer_dtypes(ssm):
    layer, u = ssm(d_model=5), noise(200, 5)
    v = layer.init(KEY, u)
    y = layer.apply(v, u)
    half = layer.apply(v, u.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), y, 0.02)
    with enable_x64(True):
        v64, u64 = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), (v, u))
        y64 = layer.apply(v64, u64)
        assert y64.dtype == jnp.float64
        close(by_step(layer, v64, layer.apply(v64, method="initial_carry"), u64, {})[1], y64, 1e-12)
    np.testing.assert_allclose(y, y64, atol=1e-5 * np.abs(y64).max())


@each_layer
def test_initial_condition_layer(ssm):
    layer, u = ssm(d_model=5, n_steps=20), noise(20, 5)
    v = layer.init(KEY, u)
    y = layer.apply(v, u)
    assert y.shape == (20, 5)
    full = ssm(d_model=5).apply({"params": {**v["params"], "D": jnp.zeros(5)}}, jnp.zeros((20, 5)).at[0].set(u[0]))
    close(y, full)
    np.testing.assert_array_equal(layer.apply(v, u.at[1:].set(jnp.nan)), y)
    carry, head = layer.apply(v, u[:7], method="prefill")
    close(jnp.concatenate([head, layer.apply(v, u[7:], carry, method="prefill")[1]]), y)


@each_layer
@each_model
def test_model(ssm, model_class, d_model):
    "Whole = pieces = steps; every parameter gets a finite gradient; variables mix; a rollout is the naive loop."
    x = frames(d_model, 12)
    model = model_class(ssm, d_model=d_model, d_vars=2, n_layers=2, training=False)
    v = model.init(KEY, x)
    whole = model.apply(v, x)
    carry, head = model.apply(v, x[:, :5], method="prefill")
    close(jnp.concatenate([head, model.apply(v, x[:, 5:], carry, method="prefill")[1]], 1), whole)
    zero = model.apply(v, method="initial_carry", batch_size=2)
    close(jnp.moveaxis(by_step(model, v, zero, jnp.moveaxis(x, 1, 0), {})[1], 0, 1), whole)

    grads = jax.jit(jax.grad(lambda v: jnp.mean((model.apply(v, x)[:, :-1] - x[:, 1:]) ** 2)))(v)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(g).all()) and np.abs(g).max() > 0, path
    other = model.apply(v, x.at[..., 0].add(1.0))
    assert np.abs(other - whole)[..., 1].max() > 1e-3

    future, seen = rollout(model, v, x, 4), x
    for _ in range(4):
        seen = jnp.concatenate([seen, model.apply(v, seen)[:, -1:]], 1)
    close(future, seen[:, 12:], 2e-5)


@each_layer
@each_model
def test_initial_condition_model(ssm, model_class, d_model):
    x = frames(d_model, 9)
    model = model_class(ssm, d_model=d_model, d_vars=2, n_layers=2, ssm_first_layer=partial(ssm, n_steps=9))
    v = model.init(KEY, x)
    y = model.apply(v, x)
    assert y.shape == x.shape
    np.testing.assert_array_equal(model.apply(v, x.at[:, 1:].set(jnp.nan)), y)
    close(rollout(model, v, x[:, :1], 9), y, 2e-5)
    close(model.clone(n_steps=9).apply(v, x), y)


def test_times_per_sample():
    x = frames(6, 10)
    model = BatchStackedSSMModel(LAYERS["lru"], d_model=6, d_vars=2, n_layers=2)
    v = model.init(KEY, x)
    dt, mask = noise(2, 10) ** 2 + 0.1, jnp.ones((2, 10), bool).at[1, 4].set(False)
    y = model.apply(v, x, dt=dt, mask=mask)
    close(model.apply(v, x[1:], dt=dt[1], mask=mask[1]), y[1:])
    assert np.abs(model.apply(v, x, dt=dt[0])[1] - y[1]).max() > 1e-3


def test_bidirectional():
    "The backward pass is the forward pass of the reversed sequence; carried ways are refused."
    layer, u = S5SSM(5, 16, blocks=2, bidirectional=True), noise(30, 5)
    v = layer.init(KEY, u)
    p = v["params"]
    swapped = {"params": {**p, "C1": p["C2"], "C2": p["C1"]}}
    close(layer.apply(swapped, u[::-1])[::-1], layer.apply(v, u))
    joined = {name: value for name, value in p.items() if name not in ("C1", "C2")} | {"C": jnp.concatenate([p["C1"], p["C2"]], 1)}
    close(layer.apply({"params": joined}, u), layer.apply(v, u))
    for call in (lambda: layer.apply(v, u, method="prefill"), lambda: layer.apply(v, jnp.zeros(8, jnp.complex64), u[0], method="step")):
        with pytest.raises(ValueError, match="bidirectional"):
            call()


def test_dropout_and_batch_norm():
    x = frames(6, 10, B=4)
    model = BatchStackedSSMModel(LAYERS["lru"], d_model=6, d_vars=2, n_layers=2, norm="batch", dropout=0.3)
    v = model.init({"params": KEY, "dropout": KEY}, x)
    run = lambda seed: model.apply(v, x, rngs={"dropout": jax.random.PRNGKey(seed)}, mutable=["batch_stats"])
    (y, state), (other, _) = run(1), run(2)
    assert np.abs(y - other).max() > 1e-3
    mean = state["batch_stats"]["blocks_0"]["normalize"]["mean"]
    assert mean.shape == (12,) and np.abs(mean).max() > 0
    assert rollout(model, {**v, **state}, x, 3).shape == (4, 3, 6, 2)


def test_stays_stable_under_noisy_updates():
    "clip_eigs and the LRU's form: no update of the parameters, however large, makes a pole grow."
    for layer in (S5SSM(2, 8, blocks=1, clip_eigs=True), LRU(8, 2), LRUDynamics(8, 0.9, 1.0, 6.28, clip_eigs=True)):
        dynamics = isinstance(layer, LRUDynamics)
        start = (jnp.ones(8), 2) if dynamics else (noise(3, 2),)
        params = layer.init(KEY, *start)
        for seed in range(20):
            noisy = jax.tree.map(lambda p, seed=seed: p + 3 * noise(*p.shape, seed=seed), params)
            if dynamics:
                assert np.abs(layer.apply(noisy, *start)[1]).max() < 1
            else:
                assert np.abs(layer.apply(noisy, None, method="system").Lambda_bar).max() <= 1


@pytest.mark.parametrize("steps", (1, 50))
def test_lru_dynamics(steps):
    dyn = LRUDynamics(d_hidden=64, r_min=0.99, r_max=1.0, max_phase=jnp.pi * 2, clip_eigs=False)
    v = dyn.init(KEY, jnp.ones((64,)), steps)
    orbit = dyn.apply(v, jnp.ones((1, 64)), steps)
    assert orbit.shape == (steps, 64) and bool(jnp.isfinite(orbit).all())
    np.testing.assert_array_equal(orbit[0], np.ones(64))


BAD = {
    "rank": (lambda: S5SSM(4, 32).init(KEY, jnp.ones((2, 5, 4))), "expected \\(L, 4\\)"),
    "size": (lambda: LRU(16, 4).init(KEY, jnp.ones((5, 3))), "d_model"),
    "blocks": (lambda: S5SSM(4, 20), "divisible"),
    "odd": (lambda: S5SSM(4, 48), "odd"),
    "option": (lambda: S5SSM(4, 32, discretization="euler"), "'zoh', 'bilinear'"),
    "n_steps": (lambda: LRU(16, 4, n_steps=0), "≥ 1"),
    "dt_min": (lambda: S5SSM(4, 32, dt_min=0.0), "0 < dt_min"),
    "activation": (lambda: SequenceLayer(LAYERS["lru"], 4, activation="relu"), "half_glu1"),
    "d_model": (lambda: BatchStackedSSMModel(LAYERS["lru"], 6, 1, 1).init(KEY, jnp.ones((2, 5, 7, 1))), "d_model"),
    "d_model 2d": (lambda: BatchStackedSSM2DModel(LAYERS["lru"], 6, 1, 1), "H"),
    "integers": (lambda: LRU(16, 4).init(KEY, jnp.ones((5, 4), int)), "floating"),
}


@pytest.mark.parametrize("call, says", BAD.values(), ids=BAD)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
