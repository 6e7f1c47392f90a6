"""Every layer of the library through blocks, models and rollouts: whole, pieces and steps agree.

A new layer is tested by adding one line to LAYERS: its factory and the tolerance of its arithmetic in float32,
1e-5 of the largest value for a scan, 3e-4 for a convolution. In float64 it is 1e-12, and 1e-9 for S4.
"""

from functools import partial

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_lib import DSS, LRU, S4, S4D, S5SSM, BatchStackedSSM2DModel, BatchStackedSSMModel, LRUDynamics, SequenceLayer, rollout

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # its place until jax 0.8

LAYERS = {
    "s5_zoh": (partial(S5SSM, d_hidden=16, blocks=2), 1e-5),
    "s5_bilinear": (partial(S5SSM, d_hidden=16, blocks=2, discretization="bilinear", clip_eigs=True), 1e-5),
    "s5_no_conj": (partial(S5SSM, d_hidden=16, blocks=4, conj_sym=False, C_init="complex_normal"), 1e-5),
    "lru": (partial(LRU, d_hidden=16), 1e-5),
    "dss": (partial(DSS, d_hidden=16, l_max=1024), 3e-4),
    "dss_exp": (partial(DSS, d_hidden=16, l_max=1024, kernel="exp"), 3e-4),
    "s4d_zoh": (partial(S4D, d_hidden=16, poles="inv"), 3e-4),
    "s4d_bilinear": (partial(S4D, d_hidden=16, poles="lin", discretization="bilinear"), 3e-4),
    "s4": (partial(S4, d_hidden=16, l_max=1024), 3e-4),
    "s4_legt": (partial(S4, d_hidden=16, l_max=1024, measure="legt"), 3e-4),
}
EQUAL_STEPS_ONLY = ("dss",)  # no dt per step: its kernel is normalised over l_max equal ones
MODELS = {"1d": (BatchStackedSSMModel, 6, 2), "2d": (BatchStackedSSM2DModel, (3, 4), 1)}
KEY = jax.random.PRNGKey(0)
SMALL = LAYERS["lru"][0]
each_layer = pytest.mark.parametrize("name", LAYERS)
each_model = pytest.mark.parametrize("model_class, d_model, n_layers", MODELS.values(), ids=MODELS)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def frames(d_model, T, B=2, C=2):
    return noise(B, T, *np.atleast_1d(d_model), C)


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=tolerance * max(np.abs(want).max(), 1e-30), rtol=0)


def by_step(m, v, u, times=None, batch=()):
    "Steps along axis 0 of u from the zero state, with the per-step arguments in `times`: carry, outputs."
    size = {"batch_size": batch[0]} if batch else {}
    zero = m.apply(v, method="initial_carry", **size)
    return jax.lax.scan(lambda c, at: m.apply(v, c, at[0], method="step", **at[1]), zero, (u, times or {}))


def in_pieces(m, v, u, cuts, times=None, axis=0):
    "Pieces along an axis: carry, outputs."
    carry, outputs = None, []
    for start, end in zip([0, *cuts], [*cuts, u.shape[axis]]):
        piece = jax.lax.slice_in_dim(u, start, end, axis=axis)
        part = {name: t[start:end] for name, t in (times or {}).items()}
        carry, y = m.apply(v, piece, carry, method="prefill", **part)
        outputs.append(y)
    return carry, jnp.concatenate(outputs, axis)


@each_layer
def test_layer_pieces_and_steps(name):
    ssm, tolerance = LAYERS[name]
    layer, u = ssm(d_model=5), noise(1024, 5)
    v = jax.jit(layer.init)(KEY, u)

    @jax.jit
    def ways(v, u):
        return layer.apply(v, u), layer.apply(v, u[:2]), layer.apply(v, u[:1]), in_pieces(layer, v, u, [1, 400, 401]), by_step(layer, v, u)

    whole, two, one, (carry, pieces), (last, steps) = ways(v, u)
    scale = np.abs(whole).max()
    for got, want in ((pieces, whole), (steps, whole), (two, whole[:2]), (one, whole[:1])):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=tolerance * scale)
    jax.tree.map(close, last, carry)


@pytest.mark.parametrize("kernel", ("softmax", "exp"))
def test_dss_over_long_sequences(kernel):
    "16,384 steps: the convolution, the recurrence and double precision agree; every gradient is finite and not zero."
    layer, u = DSS(2, 16, l_max=16_384, kernel=kernel), noise(16_384, 2)
    v = jax.jit(layer.init)(KEY, u)
    loss = lambda v, u: (jnp.sum(layer.apply(v, u) ** 2), layer.apply(v, u))
    (_, whole), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(v, u)
    close(jax.jit(lambda v, u: layer.apply(v, u, method="prefill")[1])(v, u), whole, 3e-4)
    with enable_x64(True):
        v64, u64 = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), (v, u))
        exact = jax.jit(layer.apply)(v64, u64)
    np.testing.assert_allclose(whole, exact, atol=3e-4 * np.abs(exact).max())
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(g).all()) and np.abs(g).max() > 0, path


@each_layer
def test_layer_times(name):
    "dt, mask and reset together: pieces and steps agree with the whole; gaps and the past leave no trace."
    ssm, tolerance = LAYERS[name]
    L, layer, rng = 60, ssm(d_model=5), np.random.default_rng(1)
    mask, reset = jnp.asarray(rng.random(L) < 0.7), jnp.zeros(L, bool).at[30].set(True)
    times = dict(dt=jnp.asarray(rng.uniform(0.2, 3, L), jnp.float32), mask=mask, reset=reset)
    u = jnp.where(mask[:, None], noise(L, 5), jnp.nan)
    v = jax.jit(layer.init)(KEY, noise(L, 5))
    if name in EQUAL_STEPS_ONLY:
        with pytest.raises(ValueError, match="dt"):
            layer.apply(v, u, dt=times.pop("dt"))
    kept = {key: t[mask] for key, t in times.items() if key == "dt"}
    kept["reset"] = jnp.zeros(int(mask.sum()), bool).at[int(mask[:30].sum())].set(True)

    @jax.jit
    def ways(v, u):
        past = jax.grad(lambda u: jnp.sum(layer.apply(v, u, **times)[30:] ** 2))(jnp.nan_to_num(u))[:30]
        return layer.apply(v, u, **times), in_pieces(layer, v, u, [41], times)[1], by_step(layer, v, u, times)[1], past

    whole, pieces, steps, past = ways(v, u)
    assert bool(jnp.isfinite(whole).all()) and np.all(np.asarray(past) == 0)
    for got, want in ((pieces, whole), (steps, whole), (jax.jit(layer.apply)(v, u[mask], **kept), whole[mask])):
        close(got, want)
    half_speed = jax.jit(lambda v, u: (layer.apply(v, u, dt=0.5), by_step(layer, v, u, {"dt": jnp.full(L, 0.5)})[1]))
    close(*half_speed(v, jnp.nan_to_num(u)), tolerance)


@each_layer
def test_layer_dtypes(name):
    ssm, tolerance = LAYERS[name]
    layer, u = ssm(d_model=5), noise(200, 5)
    v = jax.jit(layer.init)(KEY, u)
    apply = jax.jit(layer.apply)
    y, half = apply(v, u), apply(v, u.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), y, 0.02)
    with enable_x64(True):
        v64, u64 = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), (v, u))
        y64, steps = jax.jit(lambda v, u: (layer.apply(v, u), by_step(layer, v, u)[1]))(v64, u64)
        assert y64.dtype == jnp.float64
        close(steps, y64, 1e-9 if isinstance(layer, S4) else 1e-12)
    np.testing.assert_allclose(y, y64, atol=tolerance * np.abs(y64).max())


@each_layer
def test_initial_condition_layer(name):
    ssm, tolerance = LAYERS[name]
    layer, u = ssm(d_model=5, n_steps=20), noise(20, 5)
    v = jax.jit(layer.init)(KEY, u)

    @jax.jit
    def ways(v, u):
        silent = {"params": {**v["params"], "D": jnp.zeros(5)}}
        full = ssm(d_model=5).apply(silent, jnp.zeros((20, 5)).at[0].set(u[0]))
        return layer.apply(v, u), full, in_pieces(layer, v, u, [7])[1], by_step(layer, v, u)[1]

    y, *others = ways(v, u)
    assert y.shape == (20, 5)
    for other in others:
        close(other, y, tolerance)
    np.testing.assert_array_equal(ways(v, u.at[1:].set(jnp.nan))[0], y)


@each_layer
@each_model
def test_model(name, model_class, d_model, n_layers):
    "Whole = pieces = steps; every parameter gets a finite gradient; variables mix; a rollout is the naive loop."
    (ssm, tolerance), x = LAYERS[name], frames(d_model, 9)
    model = model_class(ssm, d_model=d_model, d_vars=2, n_layers=n_layers, training=False)
    v = jax.jit(model.init)(KEY, x)

    @jax.jit
    def ways(v, x):
        def loss(v):
            y = model.apply(v, x)
            return jnp.mean((y[:, :-1] - x[:, 1:]) ** 2), y

        (_, whole), grads = jax.value_and_grad(loss, has_aux=True)(v)
        steps = jnp.moveaxis(by_step(model, v, jnp.moveaxis(x, 1, 0), batch=(2,))[1], 0, 1)
        return whole, grads, in_pieces(model, v, x, [5], axis=1)[1], steps

    whole, grads, pieces, steps = ways(v, x)
    close(pieces, whole, tolerance)
    close(steps, whole, tolerance)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(g).all()) and np.abs(g).max() > 0, path
    apply = jax.jit(model.apply)
    assert np.abs(apply(v, x.at[..., 0].add(1.0)) - whole)[..., 1].max() > 1e-3

    future, seen = rollout(model, v, x, 2), x
    for _ in range(2):
        seen = jnp.concatenate([seen, apply(v, seen)[:, -1:]], 1)
    close(future, seen[:, 9:], max(tolerance, 2e-5))


@each_layer
@each_model
def test_initial_condition_model(name, model_class, d_model, n_layers):
    (ssm, tolerance), x = LAYERS[name], frames(d_model, 9)
    model = model_class(ssm, d_model=d_model, d_vars=2, n_layers=n_layers, ssm_first_layer=partial(ssm, n_steps=9))
    v = jax.jit(model.init)(KEY, x)
    apply = jax.jit(model.apply)
    y = apply(v, x)
    assert y.shape == x.shape
    np.testing.assert_array_equal(apply(v, x.at[:, 1:].set(jnp.nan)), y)
    close(rollout(model, v, x[:, :1], 9), y, max(tolerance, 2e-5))


def test_initial_condition_model_by_n_steps():
    x = frames(6, 9)
    options = dict(d_model=6, d_vars=2, n_layers=2)
    by_layer = BatchStackedSSMModel(SMALL, ssm_first_layer=partial(SMALL, n_steps=9), **options)
    v = jax.jit(by_layer.init)(KEY, x)
    by_model = BatchStackedSSMModel(SMALL, n_steps=9, **options)
    close(jax.jit(by_model.apply)(v, x), jax.jit(by_layer.apply)(v, x))


def test_times_per_sample():
    x = frames(6, 10)
    model = BatchStackedSSMModel(SMALL, d_model=6, d_vars=2, n_layers=1)
    v, apply = jax.jit(model.init)(KEY, x), jax.jit(model.apply)
    dt, mask = noise(2, 10) ** 2 + 0.1, jnp.ones((2, 10), bool).at[1, 4].set(False)
    y = apply(v, x, dt=dt, mask=mask)
    close(apply(v, x[1:], dt=dt[1], mask=mask[1]), y[1:])
    assert np.abs(apply(v, x, dt=dt[0])[1] - y[1]).max() > 1e-3


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
    model = BatchStackedSSMModel(SMALL, d_model=6, d_vars=2, n_layers=1, norm="batch", dropout=0.3)
    v = jax.jit(model.init)({"params": KEY, "dropout": KEY}, x)
    apply = jax.jit(lambda key: model.apply(v, x, rngs={"dropout": key}, mutable=["batch_stats"]))
    run = lambda seed: apply(jax.random.PRNGKey(seed))
    (y, state), (other, _) = run(1), run(2)
    assert np.abs(y - other).max() > 1e-3
    mean = state["batch_stats"]["blocks_0"]["normalize"]["mean"]
    assert mean.shape == (12,) and np.abs(mean).max() > 0
    assert rollout(model, {**v, **state}, x, 3).shape == (4, 3, 6, 2)


STABLE = {
    "s5": S5SSM(2, 8, blocks=1, clip_eigs=True),
    "lru": LRU(8, 2),
    "dss": DSS(2, 8, l_max=64),
    "s4d": S4D(2, 8, discretization="bilinear"),
}


@pytest.mark.parametrize("layer", STABLE.values(), ids=STABLE)
def test_stays_stable_under_noisy_updates(layer):
    "No update of the parameters, however large, makes a pole grow."
    params = jax.jit(layer.init)(KEY, noise(3, 2))
    poles = jax.jit(lambda p: jnp.abs(layer.apply(p, None, method="system").Lambda_bar).max())
    for seed in range(20):
        assert poles(jax.tree.map(lambda p, seed=seed: p + 3 * noise(*p.shape, seed=seed), params)) <= 1


def test_lru_dynamics_stays_stable():
    layer = LRUDynamics(8, 0.9, 1.0, 6.28, clip_eigs=True)
    params = layer.init(KEY, jnp.ones(8), 2)
    for seed in range(20):
        noisy = jax.tree.map(lambda p, seed=seed: p + 3 * noise(*p.shape, seed=seed), params)
        assert np.abs(layer.apply(noisy, jnp.ones(8), 2)[1]).max() < 1


def test_s4_stays_stable_under_noisy_updates():
    "Its state dies out from any start: A + A* is negative whatever the parameters are."
    layer, u = S4(2, 8, l_max=64), jnp.zeros((1, 2))
    params = jax.jit(layer.init)(KEY, u)
    step = jax.jit(lambda p, x: layer.apply(p, x, u[0], method="step")[0])
    for seed in range(20):
        noisy = jax.tree.map(lambda p, seed=seed: p + 3 * noise(*p.shape, seed=seed), params)
        x = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 4, 2)) @ [1, 1j], jnp.complex64)
        after = step(noisy, x)
        assert np.all(np.linalg.norm(after, axis=1) <= np.linalg.norm(x, axis=1) * (1 + 1e-6))


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
    "activation": (lambda: SequenceLayer(SMALL, 4, activation="relu"), "half_glu1"),
    "d_model": (lambda: BatchStackedSSMModel(SMALL, 6, 1, 1).init(KEY, jnp.ones((2, 5, 7, 1))), "d_model"),
    "d_model 2d": (lambda: BatchStackedSSM2DModel(SMALL, 6, 1, 1), "H"),
    "integers": (lambda: LRU(16, 4).init(KEY, jnp.ones((5, 4), int)), "floating"),
}


@pytest.mark.parametrize("call, says", BAD.values(), ids=BAD)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
