"""The layers that every sweep runs over, and the three ways to run one.

A new layer is tested by adding one line to LAYERS: its factory and the tolerance of its arithmetic in float32,
1e-5 of the largest value for a scan, 3e-4 for a convolution. In float64 it is 1e-10 for all.
"""

from functools import partial

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

from ssm_lib import DSS, LRU, RGLRU, S4, S4D, S5SSM, CausalConv, GriffinBlock, LinOSS, MambaBlock

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
    "causal_conv": (CausalConv, 1e-5),
    "rglru": (partial(RGLRU, n_heads=1), 1e-5),
    "griffin": (partial(GriffinBlock, d_hidden=6, n_heads=2), 1e-5),
    "mamba": (partial(MambaBlock, d_state=4), 1e-5),
    "linoss_im": (partial(LinOSS, d_hidden=8), 1e-5),
    "linoss_damped": (partial(LinOSS, d_hidden=8, method="imex", damped=True, max_phase=2.0), 1e-5),
}
WHOLE_ONLY = {"s5_both": (partial(S5SSM, d_hidden=16, blocks=2, bidirectional=True), 1e-5)}  # cannot be carried
NO_IMPULSE = ("griffin", "mamba")  # no initial-condition form: behind frame 0 their gates are closed
EQUAL_STEPS_ONLY = ("dss",)  # no dt per step: its kernel is normalised over l_max equal ones
KEY = jax.random.PRNGKey(0)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


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
