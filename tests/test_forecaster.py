"""A forecaster with inputs, gaps and seasons: one answer in every way of running it, and losses that see what is there to see."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from ssm_lib import (
    LRU,
    BatchStackedSSM2DModel,
    BatchStackedSSMModel,
    Forecaster,
    Seasonal,
    WithInputs,
    fit_inputs,
    free_runs_loss,
    next_frame_loss,
    on_grid,
    open_fields,
    rollout,
    rollout_loss,
    rollout_stream,
)
from ssm_lib.evaluation import Departures, climatology
from ssm_lib.inputs import season_of
from ssm_lib.space import Band, Conv

KEY, RNG = jax.random.PRNGKey(0), np.random.default_rng(0)
B, T, W, C, K = 2, 9, 5, 2, 3
INNER = BatchStackedSSMModel(partial(LRU, d_hidden=6), d_model=W, d_vars=C, n_layers=1, d_inputs=K)
MODEL = Forecaster(INNER, (1.0, -2.0), (2.0, 0.5), (0.1, 0.2), gaps=True)
X = jnp.asarray(RNG.normal(size=(B, T, W, C)), jnp.float32)
HOLES = jnp.where(jnp.asarray(RNG.random(X.shape) < 0.3), jnp.nan, X)
INPUTS = jnp.asarray(RNG.normal(size=(B, T + 6, W, K)), jnp.float32)
BOTH = jnp.concatenate([HOLES, INPUTS[:, :T]], -1)
VARIABLES = MODEL.init(KEY, BOTH)


@partial(jax.jit, static_argnames=("method", "all_carries"))
def apply(*args, **options):
    return MODEL.apply(VARIABLES, *args, **options)


def test_pieces_steps_and_the_whole_are_one_with_gaps_masks_and_resets():
    chance = lambda: jnp.asarray(RNG.random((B, T)), jnp.float32)
    said = dict(mask=chance() < 0.8, reset=chance() < 0.2, dt=chance())
    whole = apply(BOTH, **said)
    assert whole.shape == X.shape and bool(jnp.isfinite(whole).all())
    part = lambda a, b: {name: value[:, a:b] for name, value in said.items()}
    carry, head = apply(BOTH[:, :4], method="prefill", **part(0, 4))
    _, tail = apply(BOTH[:, 4:], carry, method="prefill", **part(4, T))
    np.testing.assert_allclose(jnp.concatenate([head, tail], 1), whole, atol=1e-5)
    carry, every = MODEL.apply(VARIABLES, 2, method="initial_carry"), apply(BOTH, method="prefill", all_carries=True, **said)[0]
    for k in range(T):
        carry, y = apply(carry, BOTH[:, k], method="step", **{name: value[:, k] for name, value in said.items()})
        np.testing.assert_allclose(y, whole[:, k], atol=1e-5)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), carry, jax.tree.map(lambda c, k=k: c[:, k], every))


def test_a_rollout_and_its_stream_take_inputs_of_the_past_and_the_future():
    history, steps = HOLES[:, :4], 6
    future = rollout(MODEL, VARIABLES, history, steps, inputs=INPUTS[:, : 4 + steps - 1])
    carry, y = apply(jnp.concatenate([history, INPUTS[:, :4]], -1), method="prefill")
    frame, by_hand = y[:, -1], [y[:, -1]]
    for k in range(4, 4 + steps - 1):
        carry, frame = apply(carry, jnp.concatenate([frame, INPUTS[:, k]], -1), method="step")
        by_hand.append(frame)
    np.testing.assert_allclose(future, jnp.stack(by_hand, 1), atol=1e-5)
    stream = rollout_stream(MODEL, VARIABLES, history, steps, chunk=4, inputs=INPUTS[:, : 4 + steps - 1])
    np.testing.assert_allclose(np.concatenate(list(stream), 1), future, atol=1e-5)
    steady = jnp.broadcast_to(INPUTS[:, :1], (B, 4 + steps - 1, W, K))
    always = rollout(MODEL, VARIABLES, history, steps, inputs=INPUTS[:, :1])
    np.testing.assert_allclose(always, rollout(MODEL, VARIABLES, history, steps, inputs=steady), atol=1e-5)


@pytest.mark.parametrize("inputs", (None, INPUTS, INPUTS[:, :9, :2], INPUTS[:, :9, ..., :2], INPUTS[:, :9].at[0, 0].set(np.nan)))
def test_wrong_inputs_are_told(inputs):
    with pytest.raises(ValueError, match=r"^inputs .*expected"):
        rollout(MODEL, VARIABLES, X[:, :4], 6, inputs=inputs)


def test_free_runs_leave_gaps_out_and_weigh_leads():
    "Nothing is compared with a gap, the slope is finite, and a unit for each lead is that of its lead."
    loss = lambda p, **options: free_runs_loss(MODEL.clone(model=INNER.clone(dropout=0.5)), VARIABLES | {"params": p}, BOTH, KEY, **options)
    value, slope = jax.jit(jax.value_and_grad(loss))(VARIABLES["params"])
    assert bool(jnp.isfinite(value)) and all(bool(jnp.isfinite(g).all()) and bool(jnp.any(g != 0)) for g in jax.tree.leaves(slope))
    halves, first = np.full((T - 1, C), 0.5), np.ones((T - 1, C)) * np.where(np.arange(T - 1) < 1, 1, 1e9)[:, None]
    np.testing.assert_allclose(loss(VARIABLES["params"], scale=halves), 4 * value, rtol=1e-5)
    alone = loss(VARIABLES["params"], scale=first)  # first steps alone
    assert 0.05 * value < alone < 0.95 * value
    with pytest.raises(ValueError, match="gaps=True"):
        free_runs_loss(MODEL.clone(gaps=False), VARIABLES, BOTH, KEY)


@pytest.mark.parametrize("loss", (next_frame_loss, partial(rollout_loss, history=3)))
def test_losses_leave_gaps_out_and_their_slopes_are_finite(loss):
    value, slope = jax.jit(jax.value_and_grad(lambda p: loss(MODEL, VARIABLES | {"params": p}, BOTH, KEY)))(VARIABLES["params"])
    assert bool(jnp.isfinite(value)) and all(bool(jnp.isfinite(g).all()) and bool(jnp.any(g != 0)) for g in jax.tree.leaves(slope))
    first = 1 if loss is next_frame_loss else 3
    predicted = apply(BOTH)[:, :-1] if first == 1 else rollout(MODEL, VARIABLES, HOLES[:, :3], T - 3, inputs=INPUTS[:, : T - 1])
    error = np.asarray(predicted) - np.asarray(HOLES)[:, first:]
    np.testing.assert_allclose(value, np.nanmean(error**2), rtol=1e-5)


def test_what_a_season_leaves_to_learn_is_what_its_forecast_gets_wrong():
    """A silent network: it errs by what is left of departures when the usual, a share of yesterday and what fades are taken off."""
    days, per_day = 6, 4
    time = np.datetime64("2024-01-01", "ns") + np.arange(days * per_day) * np.timedelta64(6, "h")
    fields = open_fields(xr.Dataset({"u": (("time", "x"), RNG.normal(5, 2, (len(time), 3)))}, {"time": time}))
    season = season_of(fields)
    inputs, (usual, std) = fit_inputs(fields, season=season, coordinates=()), climatology(fields, season)
    left = Departures(fields, season, usual, per_day, share=0.3)
    net = BatchStackedSSMModel(None, 3, 1, 1, space=Conv(), width=2, norm="none", d_inputs=3)
    model = Forecaster(Seasonal(net, per_day, std / 2, (1.0,), (0.8,), per_day, share=(0.3,)), (5.0,), (2.0,), (2.0,))
    x = WithInputs(fields, inputs)[0, :][None]
    variables = jax.tree.map(jnp.zeros_like, model.init(KEY, x))
    variables |= {"fixed": {"model": {"usual": jnp.asarray((usual - 5) / 2, jnp.float32)}}}
    y = model.apply(variables, x)[0, :-1]
    np.testing.assert_allclose((x[0, 1:, :, :1] - y)[per_day:], left[0, 1:] - 0.8 * left[0, :-1], atol=1e-4)


def test_a_band_projects_increments_and_is_one_in_every_way_of_running():
    "Against NumPy's FFT: waves to 1 along a ring of 5 and to 2 along one of 6, without the mean of the first variable."
    inner = BatchStackedSSM2DModel(partial(LRU, d_hidden=6), d_model=(5, 6), d_vars=C, n_layers=1, space=Conv(3), width=4)
    free = Forecaster(inner, (1.0, -2.0), (2.0, 0.5), (0.1, 0.2))
    held = free.clone(band=Band((1, 2), (False, True), ("periodic", "periodic")))
    x = jnp.asarray(RNG.normal(size=(B, T, 5, 6, C)), jnp.float32)
    v = jax.jit(free.init)(KEY, x)
    whole = jax.jit(held.apply)(v, x)
    k, m = np.abs(np.fft.fftfreq(5, 1 / 5)), np.abs(np.fft.fftfreq(6, 1 / 6))
    kept = np.repeat(((k[:, None] <= 1) & (m <= 2))[..., None], C, -1)
    kept[0, 0] = False, True
    change = np.fft.fftn(np.float64(jax.jit(free.apply)(v, x)) - np.float64(x), axes=(2, 3)) * kept
    np.testing.assert_allclose(whole, x + np.fft.ifftn(change, axes=(2, 3)).real, atol=1e-5)
    carry, head = held.apply(v, x[:, :4], method="prefill")
    np.testing.assert_allclose(head, whole[:, :4], atol=1e-5)
    np.testing.assert_allclose(held.apply(v, carry, x[:, 4], method="step")[1], whole[:, 4], atol=1e-5)
    finer = on_grid(free.clone(model=inner.clone(ssm=None, norm="none")), (10, 12))
    finer = finer.clone(band=held.band)
    fine = jnp.asarray(RNG.normal(size=(1, 1, 10, 12, C)), jnp.float32)
    made = np.fft.fftn(finer.apply(jax.jit(finer.init)(KEY, fine), fine) - fine, axes=(2, 3))
    np.testing.assert_allclose(made[0, 0, 2:9], 0, atol=1e-4)  # the same waves on a finer grid
    np.testing.assert_allclose(made[0, 0, :, 3:10], 0, atol=1e-4)
