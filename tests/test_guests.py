"""Three guests, written as a user would: a spatial mixer, a layer that looks at its input, a mesh of devices.

Each needs nothing of the library but its public names, and no change in it.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_contract
from sweep import KEY, LAYERS, by_step, close, in_pieces, noise

from ssm_lib import LRU, Recurrent, SequenceLayer, SSMLayer, System, linear_scan, rollout

# --- A spatial mixer: a state at every point of a ring, neighbours mixed within each frame ----------------------------


class Ring(Recurrent):
    "Frames (W, C), a state at every point: (…, T, W, C) → (…, T, W, C)."

    n_points: int
    d_vars: int
    width: int
    ssm: partial

    frame = property(lambda self: (self.n_points, self.d_vars))

    def setup(self):
        self.lift, self.read = nn.Dense(self.width), nn.Dense(self.d_vars)
        self.mix = nn.Conv(self.width, (3,), padding="CIRCULAR")
        self.block = SequenceLayer(self.ssm, self.width)

    def stretch(self, x, carry, times):
        h = self.mix(nn.gelu(self.lift(times.see(x))))
        carry, h = self.block.stretch(h, carry, times)
        return carry, self.read(h)


def ring(**options):
    model, x = Ring(8, 2, 5, partial(LRU, d_hidden=6), **options), noise(3, 9, 8, 2)
    return model, jax.jit(model.init)(KEY, x), x


def test_a_spatial_mixer():
    "Whole = pieces = steps, a carry that is a field, a rollout that is the naive loop, and no place that is special."
    model, v, x = ring()

    @jax.jit
    def ways(v, x):
        steps = by_step(model, v, jnp.moveaxis(x, 1, 0), batch=(3,))[1]
        return model.apply(v, x), in_pieces(model, v, x, [1, 5], axis=1), jnp.moveaxis(steps, 0, 1)

    whole, (carry, pieces), steps = ways(v, x)
    close(pieces, whole)
    close(steps, whole)
    assert jax.tree.map(jnp.shape, carry) == (3, 8, 6)
    close(jax.jit(model.apply)(v, jnp.roll(x, 3, 2)), jnp.roll(whole, 3, 2))
    seen = jnp.concatenate([x, whole[:, -1:]], 1)
    naive = jnp.concatenate([whole[:, -1:], jax.jit(model.apply)(v, seen)[:, -1:]], 1)
    close(rollout(model, v, x, 2), naive, 2e-5)


def test_a_cloud_over_one_place():
    "A masked place is a place without a sample, whatever it holds; a place restarts, and runs on a clock of its own."
    model, v, x = ring()
    mask, reset = jnp.ones((3, 9, 8), bool).at[1, 3, 4].set(False), jnp.zeros((3, 9, 8), bool).at[0, 5, 2].set(True)
    dt = jnp.ones((3, 9, 8)).at[2, :, 7].set(0.5)
    apply = jax.jit(partial(model.apply, v))
    clouded = apply(jnp.where(mask[..., None], x, jnp.nan), mask=mask)
    assert bool(jnp.isfinite(clouded).all())
    close(clouded[jnp.array([0, 2])], apply(x)[jnp.array([0, 2])])
    far = np.setdiff1d(np.arange(8), (3, 4, 5))
    close(clouded[1][:, far], apply(x)[1][:, far])  # neighbours alone are mixed within a frame
    for said in (dict(mask=mask), dict(reset=reset), dict(dt=dt), dict(dt=dt, mask=mask, reset=reset)):
        carry, out = None, []
        for a, b in ((0, 4), (4, 9)):
            part = {name: value[:, a:b] for name, value in said.items()}
            carry, y = jax.jit(partial(model.apply, method="prefill"))(v, x[:, a:b], carry, **part)
            out.append(y)
        close(jnp.concatenate(out, 1), apply(x, **said))
        assert np.abs(apply(x, **said) - apply(x)).max() > 1e-4


# --- A layer whose poles depend on its input, with a carry of two parts ------------------------------------------------


@dataclass(frozen=True)
class Gated(System):
    "A window of inputs, weighted; then an average that decides from it how much to keep."

    kernel: jax.Array  # (width, H)
    gate: jax.Array  # (H, H)
    rate: jax.Array  # (H,)
    D: jax.Array

    def zero_state(self, lead):
        return {"window": jnp.zeros((*lead, *self.kernel.shape)), "x": jnp.zeros((*lead, len(self.rate)))}

    def states(self, u, x, times, **options):
        def slide(window, at):
            u_k, mask_k, reset_k = at
            window = window if reset_k is None else jnp.where(reset_k[..., None, None], 0, window)
            new = jnp.concatenate([window[..., 1:, :], u_k[..., None, :]], -2)
            window = new if mask_k is None else jnp.where(mask_k[..., None, None], new, window)
            return window, window

        front = lambda z: jnp.moveaxis(z, times.axis, 0)
        windows = jax.lax.scan(slide, x["window"], jax.tree.map(front, (u, times.mask, times.reset)))[1]
        windows = jnp.moveaxis(windows, 0, times.axis)
        seen = jnp.sum(windows * self.kernel, -2)
        dt = 1.0 if times.dt is None else times.dt[..., None]
        a = jnp.exp(-dt * jax.nn.softplus(self.rate) * jax.nn.sigmoid(seen @ self.gate))
        return {"window": windows, "x": linear_scan(*times.fold(a, (1 - a) * seen), x["x"], axis=times.axis, **options)}

    def observe(self, x, u):
        return x["x"]


class Selective(SSMLayer):
    d_model: int
    n_steps: int | None = None

    pole_parameters = ("rate",)

    def setup(self):
        normal, H = nn.initializers.normal(0.5), self.d_model
        shapes = {"kernel": (3, H), "gate": (H, H), "rate": (H,), "D": (H,)}
        self.parts = {name: self.param(name, normal, shape) for name, shape in shapes.items()}

    def system(self):
        return Gated(**self.parts)


@pytest.fixture
def selective(monkeypatch):
    monkeypatch.setitem(LAYERS, "selective", (Selective, 1e-5))
    return "selective"


@pytest.mark.parametrize("law", ("layer_pieces_and_steps", "layer_times", "layer_dtypes", "initial_condition_layer"))
def test_a_selective_layer_keeps_the_contract(selective, law):
    getattr(test_contract, f"test_{law}")(selective)


@pytest.mark.parametrize("grid", ("1d", "2d"))
def test_a_selective_layer_in_models(selective, grid):
    test_contract.test_model(grid, selective)
    test_contract.test_initial_condition_model(grid, selective)


# --- Eight devices ----------------------------------------------------------------------------------------------------

MESH = '''
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssm_lib import LRU, S4, BatchStackedSSMModel, rollout

assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()), ("batch",))
cut, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
x = np.random.default_rng(0).normal(size=(40, 24, 6, 1)).astype(np.float32)
model = BatchStackedSSMModel(partial(LRU, d_hidden=16), d_model=6, d_vars=1, n_layers=1, norm="layer", training=False)
v = jax.jit(model.init)(jax.random.PRNGKey(0), x)
loss = lambda v, x: jnp.mean((model.apply(v, x)[:, :-1] - x[:, 1:]) ** 2)
programs = {"call": model.apply, "gradient": jax.grad(loss, (0, 1)), "rollout": lambda v, x: rollout(model, v, x, 12)}
for name, program in programs.items():
    compiled = jax.jit(program).lower(jax.device_put(v, whole), jax.device_put(x, cut)).compile()
    out = compiled(jax.device_put(v, whole), jax.device_put(x, cut))
    for leaf in jax.tree.leaves(out):
        if leaf.shape[:1] == (40,):
            assert leaf.sharding.is_equivalent_to(cut, leaf.ndim), (name, leaf.sharding)
    moved = re.findall(r".*\\b(?:all-gather|all-to-all|collective-permute)(?:-start)?\\(.*", compiled.as_text())
    assert not moved, (name, moved)
    alone = jax.jit(program)(v, x)
    for got, want in zip(jax.tree.leaves(out), jax.tree.leaves(alone)):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), err_msg=name)
    if name != "gradient":  # the same program for each device's part
        parts = (PartitionSpec(), PartitionSpec("batch"))
        each = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=parts, out_specs=parts[1]))
        np.testing.assert_allclose(each(v, x), alone, atol=2e-5 * np.abs(alone).max(), err_msg=name)

gradient = jax.grad(lambda v, x: jnp.sum(model.apply(v, x) ** 2))
sums = jax.shard_map(gradient, mesh=mesh, in_specs=parts, out_specs=parts[0])
for got, want in zip(jax.tree.leaves(jax.jit(sums)(v, x)), jax.tree.leaves(jax.jit(gradient)(v, x))):
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
layer, u = S4(d_model=2, d_hidden=8), x[:8, :, :2, 0]
v = jax.jit(layer.init)(jax.random.PRNGKey(0), u)
pieces = lambda v, u: layer.apply(v, u, method="prefill", mask=u[..., 0] > 0)[1]
each = jax.jit(jax.shard_map(pieces, mesh=mesh, in_specs=parts, out_specs=parts[1]))
np.testing.assert_allclose(each(v, u), jax.jit(pieces)(v, u), atol=1e-5)
print("sharded")
'''


def test_eight_devices():
    "The batch sharded: call, gradient and rollout stay so, move no activation between devices, and equal one device."
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", MESH], cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "sharded", run.stderr[-3000:]
