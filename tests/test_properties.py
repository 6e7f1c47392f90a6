"""Any layer, size, cut, time step, gap and reset, drawn at random: pieces and steps agree with the whole."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sweep import EQUAL_STEPS_ONLY, KEY, LAYERS, noise


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


@cache
def made(name, H):
    "`three_ways` of a layer, compiled, and the tolerance of its arithmetic."
    ssm, tolerance = LAYERS[name]
    layer = ssm(d_model=H)
    v = jax.jit(layer.init)(KEY, noise(1, H))
    return jax.jit(lambda cuts, *args: list(three_ways(layer, v, cuts, *args)), static_argnums=0), tolerance


def three_ways(layer, v, cuts, u, seen, times):
    "(carry, outputs) of the whole, of pieces, of steps, and of a call where it starts from zero: in one program."
    prefill, step = (partial(layer.apply, v, method=method) for method in ("prefill", "step"))
    start = None if seen is None else prefill(seen)[0]
    last, whole = prefill(u, start, **times)
    yield last, whole

    carry, pieces = start, []
    for a, b in zip([0, *cuts], [*cuts, len(u)]):
        carry, y = prefill(u[a:b], carry, **{key: t[a:b] for key, t in times.items()})
        pieces.append(y)
    yield carry, jnp.concatenate(pieces)

    carry = layer.apply(v, method="initial_carry") if start is None else start
    yield jax.lax.scan(lambda carry, now: step(carry, now[0], **now[1]), carry, (u, times))
    if start is None:
        yield last, layer.apply(v, u, **times)


@example(("dss_exp", noise(1, 1), {"dt": jnp.ones(1)}, [0], False))
@example(("s4d_zoh", noise(1, 1), {"dt": jnp.ones(1)}, [0], False))
@example(("s5_zoh", noise(1, 1), {"dt": jnp.ones(1)}, [0], False))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(runs())
def test_three_ways_agree(run):
    name, u, times, cuts, started = run
    ways, tolerance = made(name, u.shape[1])
    start = noise(3, u.shape[1], seed=7) if started else None
    (last, whole), *others = ways(tuple(cuts), u, start, times)
    scale = lambda z: max(np.abs(z).max(), 1e-3)
    for carry, y in others:
        assert y.shape == whole.shape
        np.testing.assert_allclose(y, whole, atol=tolerance * scale(whole))
        for got, want in zip(jax.tree.leaves(carry), jax.tree.leaves(last), strict=True):
            np.testing.assert_allclose(got, want, atol=tolerance * scale(want))
