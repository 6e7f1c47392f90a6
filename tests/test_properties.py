"""Any layer, size, cut, time step, gap and reset, drawn at random: pieces and steps agree with the whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sweep import EQUAL_STEPS_ONLY, KEY, LAYERS, noise

pytestmark = pytest.mark.usefixtures("quick_compilation")


@st.composite
def runs(draw):
    "A layer, a sequence, its times, where it is cut and whether it starts from a state of its own."
    name, L, H = draw(st.sampled_from(sorted(LAYERS))), draw(st.sampled_from((1, 2, 5, 9))), draw(st.sampled_from((1, 3)))
    bools = lambda: jnp.asarray(draw(st.lists(st.booleans(), min_size=L, max_size=L)), bool)
    times = {}
    if draw(st.booleans()):
        times["mask"] = bools()
    if draw(st.booleans()):
        times["reset"] = bools()
    if name not in EQUAL_STEPS_ONLY and draw(st.booleans()):
        steps = st.floats(0.0625, 8.0, width=32)
        times["dt"] = jnp.asarray(draw(st.lists(steps, min_size=L, max_size=L)), jnp.float32)
    cuts = sorted(draw(st.sets(st.integers(0, L), max_size=3)))
    return name, noise(L, H, seed=draw(st.integers(0, 99))), times, cuts, draw(st.booleans())


@example(("dss_exp", noise(1, 1), {"dt": jnp.ones(1)}, [0], False))
@example(("s4d_zoh", noise(1, 1), {"dt": jnp.ones(1)}, [0], False))
@example(("s5_zoh", noise(1, 1), {"dt": jnp.ones(1)}, [0], False))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(runs())
def test_three_ways_agree(run):
    name, u, times, cuts, started = run
    ssm, tolerance = LAYERS[name]
    layer = ssm(d_model=u.shape[1])
    v = jax.jit(layer.init)(KEY, u)
    prefill, step = (jax.jit(partial(layer.apply, method=method)) for method in ("prefill", "step"))
    start = prefill(v, noise(3, u.shape[1], seed=7))[0] if started else None
    last, whole = prefill(v, u, start, **times)

    carry, pieces = start, []
    for a, b in zip([0, *cuts], [*cuts, len(u)]):
        carry, y = prefill(v, u[a:b], carry, **{key: t[a:b] for key, t in times.items()})
        pieces.append(y)
    state, steps = layer.apply(v, method="initial_carry") if start is None else start, []
    for k, u_k in enumerate(u):
        state, y = step(v, state, u_k, **{key: t[k] for key, t in times.items()})
        steps.append(y)
    at_once = whole if started else jax.jit(layer.apply)(v, u, **times)

    scale = max(np.abs(whole).max(), 1e-3)
    for got in (np.concatenate(pieces), np.stack(steps), at_once):
        assert got.shape == whole.shape
        np.testing.assert_allclose(got, whole, atol=tolerance * scale)
    for other in (carry, state):
        np.testing.assert_allclose(other, last, atol=tolerance * max(np.abs(last).max(), 1e-3))
