"""Every layer of the library through blocks, models and rollouts: whole, pieces and steps agree."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep import EQUAL_STEPS_ONLY, KEY, LAYERS, NO_IMPULSE, WHOLE_ONLY, by_step, close, enable_x64, in_pieces, noise

from ssm_lib import DSS, LRU, S5SSM, BatchStackedSSM2DModel, BatchStackedSSMModel, LRUDynamics, Plan, SequenceLayer, rollout
from ssm_lib.blocks import ACTIVATIONS, NORMS
from ssm_lib.scan import SCAN_BACKENDS

SMALL = LAYERS["lru"][0]
MODELS = {"1d": (BatchStackedSSMModel, 6, 1), "2d": (BatchStackedSSM2DModel, (3, 4), 2)}  # class, d_model, n_layers
each_layer = pytest.mark.parametrize("name", LAYERS)
GRIDS = [("1d", name) for name in LAYERS] + [("2d", name) for name in ("s5_zoh", "s4")]  # a grid is flattened to a line
each_model = pytest.mark.parametrize("grid, name", GRIDS)


def frames(d_model, T, B=2, C=2):
    return noise(B, T, *np.atleast_1d(d_model), C)


@cache
def drawn(module, *frame):
    "Variables of a layer or a model, drawn once for all tests: they depend on no input, nor on how many frames come out."
    return jax.jit(module.init)(KEY, noise(*frame))


@each_layer
def test_layer_pieces_and_steps(name, L=1024, cuts=(1, 400, 401)):
    ssm, tolerance = LAYERS[name]
    layer, u = ssm(d_model=5), noise(L, 5)
    v = drawn(layer, 1, 5)

    @jax.jit
    def ways(v, u):
        return layer.apply(v, u), layer.apply(v, u[:2]), layer.apply(v, u[:1]), in_pieces(layer, v, u, cuts), by_step(layer, v, u)

    whole, two, one, (carry, pieces), (last, steps) = ways(v, u)
    scale = np.abs(whole).max()
    for got, want in ((pieces, whole), (steps, whole), (two, whole[:2]), (one, whole[:1])):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=tolerance * scale)
    jax.tree.map(close, last, carry)


@pytest.mark.parametrize("name", ("s5_zoh", "lru"))
@pytest.mark.parametrize("backend", [name for name in SCAN_BACKENDS if name != "sequential"])
def test_laws_hold_for_the_other_scans(name, backend, monkeypatch):
    ssm, tolerance = LAYERS[name]
    monkeypatch.setitem(LAYERS, name, (partial(ssm, plan=Plan(backend, segment=64)), tolerance))
    test_layer_pieces_and_steps(name, 250, (1, 129, 130))
    test_layer_times(name)


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


@pytest.mark.parametrize("name", LAYERS | WHOLE_ONLY)
def test_layer_times(name):
    "dt, mask and reset together: pieces and steps agree with the whole; gaps and the past leave no trace."
    ssm, tolerance = (LAYERS | WHOLE_ONLY)[name]
    L, layer, rng = 60, ssm(d_model=5), np.random.default_rng(1)
    mask, reset = jnp.asarray(rng.random(L) < 0.7), jnp.zeros(L, bool).at[30].set(True)
    times = dict(dt=jnp.asarray(rng.uniform(0.2, 3, L), jnp.float32), mask=mask, reset=reset)
    u = jnp.where(mask[:, None], noise(L, 5), jnp.nan)
    v = drawn(layer, 1, 5)
    if name in EQUAL_STEPS_ONLY:
        with pytest.raises(ValueError, match="dt"):
            layer.apply(v, u, dt=times.pop("dt"))
    kept = {key: t[mask] for key, t in times.items() if key == "dt"}
    kept["reset"] = jnp.zeros(int(mask.sum()), bool).at[int(mask[:30].sum())].set(True)

    @jax.jit
    def ways(v, u):
        past = jax.grad(lambda u: jnp.sum(layer.apply(v, u, **times)[30:] ** 2))(jnp.nan_to_num(u))[:30]
        carried = (in_pieces(layer, v, u, [41], times)[1], by_step(layer, v, u, times)[1]) if name in LAYERS else ()
        return layer.apply(v, u, **times), past, carried

    whole, past, carried = ways(v, u)
    assert bool(jnp.isfinite(whole).all()) and np.all(np.asarray(past) == 0)
    close(jax.jit(layer.apply)(v, u[mask], **kept), whole[mask])
    for other in carried:
        close(other, whole)
    if name in WHOLE_ONLY:
        future = jax.grad(lambda u: jnp.sum(layer.apply(v, u, **times)[:30] ** 2))(jnp.nan_to_num(u))[30:]
        assert np.all(np.asarray(future) == 0)
        return
    all_there = jnp.ones(L, bool)

    @jax.jit
    def scalar(v, u):  # a scalar dt: as a convolution where there is one, and as a scan
        whole = layer.apply(v, u, dt=0.5), layer.apply(v, u, dt=0.5, mask=mask)
        steps = lambda mask: by_step(layer, v, u, {"dt": jnp.full(L, 0.5), "mask": mask})[1]
        return whole, jax.lax.map(steps, jnp.stack([all_there, mask]))

    whole, steps = scalar(v, jnp.nan_to_num(u))
    for got, want in zip(whole, steps):
        close(got, want, tolerance)


@each_layer
def test_layer_dtypes(name):
    ssm, tolerance = LAYERS[name]
    layer, u = ssm(d_model=5), noise(200, 5)
    v = drawn(layer, 1, 5)
    apply = jax.jit(layer.apply)
    y, half = apply(v, u), apply(v, u.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), y, 0.02)
    stored = jax.tree.map(lambda p: p.astype(jnp.bfloat16), v)
    close(apply(stored, u), apply(jax.tree.map(lambda p: p.astype(jnp.float32), stored), u))  # computed with in float32
    assert apply(v, u[:0]).shape == (0, 5)
    with enable_x64(True):
        v64, u64 = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), (v, u))
        y64, steps = jax.jit(lambda v, u: (layer.apply(v, u), by_step(layer, v, u)[1]))(v64, u64)
        assert y64.dtype == jnp.float64
        close(steps, y64, 1e-10)
    np.testing.assert_allclose(y, y64, atol=tolerance * np.abs(y64).max())


@each_layer
def test_initial_condition_layer(name):
    ssm, tolerance = LAYERS[name]
    if name in NO_IMPULSE:
        with pytest.raises(ValueError, match="n_steps is 20; expected None"):
            ssm(d_model=5, n_steps=20)
        return
    layer, u = ssm(d_model=5, n_steps=20), noise(20, 5)
    v = drawn(ssm(d_model=5), 1, 5)

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


@pytest.mark.parametrize("name", ("s5_zoh", "s5_bilinear", "s4d_zoh", "s4d_bilinear", "s4"))
def test_a_constant_dt_is_step_rescale(name):
    ssm, u = LAYERS[name][0], noise(40, 5)
    layer, rescaled = ssm(d_model=5), ssm(d_model=5, step_rescale=0.7)
    ways = jax.jit(lambda v, u: (rescaled.apply(v, u), layer.apply(v, u, dt=0.7), layer.apply(v, u, dt=jnp.full(40, 0.7))))
    want, constant, each = ways(drawn(layer, 1, 5), u)
    close(constant, want)
    close(each, want, LAYERS[name][1])


@pytest.mark.parametrize("name", ("s5_zoh", "s5_no_conj", "lru", "dss_exp", "s4d_zoh", "linoss_im"))
def test_a_step_is_two_halves(name):
    "Zero-order hold is exact: an interval cut in two, under the same input, ends in the same state."
    layer, u = LAYERS[name][0](d_model=5), noise(40, 5)
    v = drawn(layer, 1, 5)
    dt = jnp.asarray(np.random.default_rng(2).uniform(0.3, 2, 40), jnp.float32)
    share = jnp.asarray(np.random.default_rng(3).uniform(0.1, 0.9, 40), jnp.float32)
    halves = jnp.stack([dt * share, dt * (1 - share)], 1).reshape(-1)
    close(jax.jit(layer.apply)(v, jnp.repeat(u, 2, 0), dt=halves)[1::2], jax.jit(layer.apply)(v, u, dt=dt))


@pytest.mark.parametrize("name", ("causal_conv", "rglru", "griffin", "mamba", "linoss_im"))
def test_each_place_by_itself(name, B=2, L=9, W=3):
    "A field (B, T, W, H): masks, new starts and steps of a place concern it alone, in outputs and carries."
    layer, u, rng = LAYERS[name][0](d_model=4), noise(B, L, W, 4), np.random.default_rng(4)
    v = drawn(layer, 1, 4)
    said = {"mask": rng.random((B, L, W)) < 0.7, "reset": rng.random((B, L, W)) < 0.2, "dt": rng.uniform(0.5, 2, (B, L, W))}
    said = jax.tree.map(lambda z: jnp.asarray(z, jnp.float32) if z.dtype == float else jnp.asarray(z), said)
    alone = lambda u, said: layer.apply(v, u, method="prefill", all_carries=True, **said)
    places = jax.vmap(jax.vmap(alone, in_axes=1, out_axes=1))  # over samples, then over places
    want = jax.jit(places)(u, said)
    got = jax.jit(lambda u, said: layer.apply(v, u, axis=1, method="prefill", all_carries=True, **said))(u, said)
    jax.tree.map(close, got, want)


BLOCKS = [(activation, "layer", True) for activation in ACTIVATIONS]  # each gate, and each place of each norm
BLOCKS += [("half_glu1", norm, prenorm) for norm in NORMS for prenorm in (True, False) if (norm, prenorm) != ("layer", True)]
BLOCKS = [(*block, False) for block in BLOCKS] + [("gelu", "none", True, True)]  # and with gates of memory


@pytest.mark.parametrize("activation, norm, prenorm, rezero", BLOCKS)
def test_block(activation, norm, prenorm, rezero):
    "Whole = pieces = steps around every gate and norm, from the zero state and from another."
    block, u = SequenceLayer(SMALL, 5, 0.0, norm, False, activation, prenorm, rezero=rezero), noise(40, 5)
    v = jax.jit(block.init)(KEY, u)
    v = jax.tree.map(lambda p: p + 0.3, v) if rezero else v  # gates open

    @jax.jit
    def ways(v, u):
        carry, pieces = in_pieces(block, v, u, [1, 25])
        apart = in_pieces(block, v, u[30:], [4])[1], block.apply(v, u[30:])
        return block.apply(v, u), pieces, by_step(block, v, u), carry, apart

    whole, pieces, (last, steps), carry, apart = ways(v, u)
    for other in (pieces, steps):
        close(other, whole)
    jax.tree.map(close, last, carry)
    close(*apart)


@each_model
def test_model(grid, name):
    "Whole = pieces = steps; every parameter gets a finite gradient; variables mix; a rollout is the naive loop."
    model_class, d_model, n_layers = MODELS[grid]
    (ssm, tolerance), x = LAYERS[name], frames(d_model, 10)
    x = jnp.concatenate([x, x[:1].at[..., 0].add(1.0)])
    model = model_class(ssm, d_model=d_model, d_vars=2, n_layers=n_layers, training=False)
    v = drawn(model, 1, 1, *model.frame)

    @jax.jit
    def ways(v, x):
        def loss(v):
            y = model.apply(v, x)
            return jnp.mean((y[:, :-1] - x[:, 1:]) ** 2), y

        (_, whole), grads = jax.value_and_grad(loss, has_aux=True)(v)
        steps = jnp.moveaxis(by_step(model, v, jnp.moveaxis(x, 1, 0), batch=(3,))[1], 0, 1)
        return whole, grads, in_pieces(model, v, x, [5], axis=1)[1], steps

    whole, grads, pieces, steps = ways(v, x)
    close(pieces, whole, tolerance)
    close(steps, whole, tolerance)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(g).all()) and np.abs(g).max() > 0, path
    assert np.abs(whole[2] - whole[0])[..., 1].max() > 1e-3

    first = whole[:, 8]  # what nine frames foretell; it becomes the tenth
    second = ways(v, x.at[:, 9].set(first))[0][:, 9]
    close(rollout(model, v, x[:, :9], 2), jnp.stack([first, second], 1), max(tolerance, 2e-5))


@pytest.mark.parametrize("grid, name", [(grid, name) for grid, name in GRIDS if name not in NO_IMPULSE])
def test_initial_condition_model(grid, name):
    model_class, d_model, n_layers = MODELS[grid]
    (ssm, tolerance), x = LAYERS[name], frames(d_model, 9)
    options = dict(d_model=d_model, d_vars=2, n_layers=n_layers)
    model = model_class(ssm, **options, ssm_first_layer=partial(ssm, n_steps=9))
    v = drawn(model_class(ssm, **options, training=False), 1, 1, *model.frame)
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
    reset = jnp.zeros((2, 10), bool).at[0, 3].set(True)
    y = apply(v, x, dt=dt, mask=mask, reset=reset)
    close(apply(v, x[1:], dt=dt[1], mask=mask[1], reset=reset[1]), y[1:])
    assert np.abs(apply(v, x, dt=dt[0])[1] - y[1]).max() > 1e-3


def test_bidirectional():
    "The backward pass is the forward pass of the reversed sequence; carried ways are refused."
    layer, u = S5SSM(5, 16, blocks=2, bidirectional=True), noise(30, 5)
    v, apply = drawn(layer, 1, 5), jax.jit(layer.apply)
    p = v["params"]
    swapped = {"params": {**p, "C1": p["C2"], "C2": p["C1"]}}
    close(apply(swapped, u[::-1])[::-1], apply(v, u))
    joined = {name: value for name, value in p.items() if name not in ("C1", "C2")} | {"C": jnp.concatenate([p["C1"], p["C2"]], 1)}
    close(apply({"params": joined}, u), apply(v, u))
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


@pytest.mark.parametrize("steps", (1, 50))
def test_lru_dynamics(steps):
    dyn = LRUDynamics(d_hidden=64, r_min=0.99, r_max=1.0, max_phase=jnp.pi * 2, clip_eigs=False)
    v = jax.jit(dyn.init, static_argnums=2)(KEY, jnp.ones(64), steps)
    orbit = jax.jit(dyn.apply, static_argnums=2)(v, jnp.ones((1, 64)), steps)
    assert orbit.shape == (steps, 64) and bool(jnp.isfinite(orbit).all())
    np.testing.assert_array_equal(orbit[0], np.ones(64))


BAD = {
    "rank": (lambda: S5SSM(4, 32).init(KEY, jnp.ones(4)), "expected \\(…, L, 4\\)"),
    "batch": (lambda: BatchStackedSSMModel(SMALL, 4, 1, 1).init(KEY, jnp.ones((5, 4, 1))), "expected \\(B, T, 4, 1\\)"),
    "time": (lambda: LRU(16, 4).init(KEY, jnp.ones((2, 5, 4)), axis=2), "axis"),
    "size": (lambda: LRU(16, 4).init(KEY, jnp.ones((5, 3))), "d_model"),
    "blocks": (lambda: S5SSM(4, 20), "divisible"),
    "odd": (lambda: S5SSM(4, 48), "odd"),
    "option": (lambda: S5SSM(4, 32, discretization="euler"), "'zoh', 'bilinear'"),
    "n_steps": (lambda: LRU(16, 4, n_steps=0), "≥ 1"),
    "dt_min": (lambda: S5SSM(4, 32, dt_min=0.0), "dt_min is 0.0; expected"),
    "activation": (lambda: SequenceLayer(SMALL, 4, activation="relu"), "half_glu1"),
    "d_model": (lambda: BatchStackedSSMModel(SMALL, 6, 1, 1).init(KEY, jnp.ones((2, 5, 7, 1))), "d_model"),
    "d_model 2d": (lambda: BatchStackedSSM2DModel(SMALL, 6, 1, 1), "H"),
    "integers": (lambda: LRU(16, 4).init(KEY, jnp.ones((5, 4), int)), "array of floats"),
}


@pytest.mark.parametrize("call, says", BAD.values(), ids=BAD)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
