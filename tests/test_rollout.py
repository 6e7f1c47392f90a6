"""Rollouts: every way in, off by none; long ones with flat memory; gradients; what stops them."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from ssm_lib import (
    DSS,
    LRU,
    S5SSM,
    BatchStackedSSM2DModel,
    BatchStackedSSMModel,
    RolloutDivergedError,
    rollout,
    rollout_stream,
    write_rollout,
)

KEY = jax.random.PRNGKey(0)
RNG = np.random.default_rng(0)
W, C = 4, 2
MODEL = BatchStackedSSMModel(partial(S5SSM, d_hidden=8, blocks=1), d_model=W, d_vars=C, n_layers=2, dropout=0.1)
RECORD = jnp.asarray(RNG.normal(size=(2, 8, W, C)), jnp.float32)
VARIABLES = jax.jit(lambda key: MODEL.clone(training=False).init(key, RECORD))(KEY)


@partial(jax.jit, static_argnames=("method", "all_carries"))
def apply(*args, **options):
    return MODEL.clone(training=False).apply(*args, **options)


@partial(jax.jit, static_argnums=2)
@partial(jax.grad, argnums=(0, 1))
def gradient(v, h, segment):
    return jnp.mean(rollout(MODEL, v, h, 8, segment=segment) ** 2)


def naive(history, n_steps, dt=None):
    """The definition: the whole model again for every frame; dt None, a scalar or (B, frames read).

    On arrays of one length, to compile once: frames that are not yet there are zeros, and no output looks at them.
    """
    (B, T0), most = history.shape[:2], 20
    seen = np.zeros((B, most, W, C), np.float32)
    seen[:, :T0] = history
    if dt is not None:
        dt_read, dt = dt, np.ones((B, most), np.float32)
        dt[:, : T0 + n_steps - 1] = dt_read
    for k in range(T0, T0 + n_steps):
        seen[:, k] = apply(VARIABLES, seen, dt=dt)[:, k - 1]
    return seen[:, T0 : T0 + n_steps]


def close(got, want, tolerance=2e-5):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("T0", (1, 2, 8))
@pytest.mark.parametrize("n_steps", (1, 4))
def test_from_a_history(T0, n_steps):
    close(rollout(MODEL, VARIABLES, RECORD[:, :T0], n_steps), naive(RECORD[:, :T0], n_steps))


@pytest.mark.parametrize("k", (1, 3, 7))
def test_from_any_moment(k):
    "The state before frame k, out of one prefill over the record, and frame k."
    carries, y = apply(VARIABLES, RECORD, None, method="prefill", all_carries=True)
    close(y, apply(VARIABLES, RECORD))
    before = jax.tree.map(lambda c: c[:, k - 1], carries)
    close(rollout(MODEL, VARIABLES, RECORD[:, k : k + 1], 3, carry=before), rollout(MODEL, VARIABLES, RECORD[:, : k + 1], 3))
    stored = serialization.msgpack_restore(serialization.msgpack_serialize(serialization.to_state_dict(before)))
    jax.tree.map(np.testing.assert_array_equal, serialization.from_state_dict(before, stored), before)


def test_going_on():
    whole = rollout(MODEL, VARIABLES, RECORD, 6)
    part, carry = rollout(MODEL, VARIABLES, RECORD, 2, return_carry=True)
    close(rollout(MODEL, VARIABLES, part[:, -1:], 4, carry=carry), whole[:, 2:])


@pytest.mark.parametrize("k", (0, 1, 7))
def test_teacher_forcing(k):
    "Frames 0 … k from true frames, the others from predictions."
    forced = rollout(MODEL, VARIABLES, RECORD, 9, teacher_forcing=k)
    truth = apply(VARIABLES, RECORD)[:, 7 - k :]
    close(forced[:, : k + 1], truth)
    close(forced[:, k:], naive(RECORD, 9 - k))


def test_dt():
    "A scalar, one per frame read, one per sample and frame read."
    close(rollout(MODEL, VARIABLES, RECORD[:, :3], 3, dt=0.5), naive(RECORD[:, :3], 3, 0.5))
    dt = jnp.asarray(RNG.uniform(0.3, 2, (2, 5)), jnp.float32)
    each = rollout(MODEL, VARIABLES, RECORD[:, :3], 3, dt=dt)
    for b in range(2):
        close(each[b : b + 1], rollout(MODEL, VARIABLES, RECORD[b : b + 1, :3], 3, dt=dt[b]))
    close(each, naive(RECORD[:, :3], 3, dt))
    streamed = np.concatenate(list(rollout_stream(MODEL, VARIABLES, RECORD[:, :3], 3, chunk=2, dt=dt)), 1)
    close(streamed, each)


def test_inside_jit_vmap_and_grad():
    histories = jnp.stack([RECORD, RECORD[::-1]])
    each = jnp.stack([rollout(MODEL, VARIABLES, h, 3) for h in histories])
    close(jax.jit(jax.vmap(lambda h: rollout(MODEL, VARIABLES, h, 3)))(histories), each)
    close(jax.jit(lambda v: rollout(MODEL, v, RECORD, 3))(VARIABLES), each[0])


@pytest.mark.parametrize("segment", (1, 3, 7, 100))
def test_segments_do_not_change_the_gradient(segment):
    jax.tree.map(partial(close, tolerance=1e-5), gradient(VARIABLES, RECORD, segment), gradient(VARIABLES, RECORD, None))


def test_memory_of_a_long_gradient():
    "1,000 steps in segments of 32 need a fifth of the memory, or less."
    model = MODEL.clone(n_layers=1, training=False)
    loss = lambda v, segment: jnp.mean(rollout(model, v, RECORD[:, :1], 1000, segment=segment) ** 2)
    shapes, program = jax.eval_shape(model.init, KEY, RECORD), jax.jit(jax.grad(loss), static_argnums=1)
    needed = [program.lower(shapes, segment).compile().memory_analysis() for segment in (None, 32)]
    assert needed[1].temp_size_in_bytes < 0.2 * needed[0].temp_size_in_bytes


@pytest.mark.parametrize("ssm", (partial(LRU, d_hidden=8), partial(DSS, d_hidden=8, l_max=16)), ids=("lru", "dss"))
def test_gradient_of_a_start_state(ssm):
    "Reverse mode against central differences in double precision."
    x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with x64(True):
        model, x = BatchStackedSSMModel(ssm, d_model=W, d_vars=C, n_layers=1), RECORD[:, :2].astype(jnp.float64)
        v = jax.tree.map(lambda p: p.astype(jnp.float64), jax.jit(model.init)(KEY, RECORD[:, :2]))
        carry = jax.jit(partial(model.apply, method="prefill"))(v, x)[0]
        loss = jax.jit(lambda c: jnp.sum(jnp.sin(rollout(model, v, x, 3, carry=c))))
        grad = jax.jit(jax.grad(loss))(carry)
        leaves, tree = jax.tree.flatten(carry)
        for direction in (1.0, 1j):
            kick = [direction * jnp.asarray(RNG.normal(size=z.shape)) for z in leaves]
            shift = lambda eps, kick=kick: loss(tree.unflatten([z + eps * k for z, k in zip(leaves, kick)]))
            # JAX's gradient of a real function of z = a + ib is ∂a − i ∂b
            along = sum(jnp.sum(g * k).real for g, k in zip(jax.tree.leaves(grad), kick))
            np.testing.assert_allclose(along, (shift(1e-5) - shift(-1e-5)) / 2e-5, rtol=1e-6)


def test_a_carry_is_sharded_and_vmapped():
    carry, _ = apply(VARIABLES, RECORD, method="prefill")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    placed = jax.device_put(carry, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch")))
    whole = rollout(MODEL, VARIABLES, RECORD[:, -1:], 3, carry=placed)
    one = jax.tree.map(lambda c: c[:, None], carry)
    each = jax.jit(jax.vmap(lambda h, c: rollout(MODEL, VARIABLES, h[None], 3, carry=c)[0]))(RECORD[:, -1:], one)
    close(each, whole)


@pytest.mark.parametrize("chunk", (1, 3, 7, 50))
def test_stream(chunk):
    pieces = list(rollout_stream(MODEL, VARIABLES, RECORD, 7, chunk=chunk))
    assert [piece.shape[1] for piece in pieces] == [min(chunk, 7 - done) for done in range(0, 7, chunk)]
    close(np.concatenate(pieces, 1), rollout(MODEL, VARIABLES, RECORD, 7))


def test_stream_holds_flat_memory_and_stays_bounded():
    "At 10,000 steps no more lives on the device than at 100, within 5 %; a stable model's frames stay where they were."
    model = MODEL.clone(prenorm=False)  # every frame comes out of a norm
    v = jax.jit(lambda key: model.clone(training=False, dropout=0.0).init(key, RECORD))(KEY)
    live = lambda: sum(array.nbytes for array in jax.live_arrays())

    def peak(n_steps):
        before, most, largest = live(), 0, 0.0
        for piece in rollout_stream(model, v, RECORD, n_steps, chunk=50):
            most, largest = max(most, live() - before), max(largest, np.abs(piece).max())
        return most, largest

    peak(100)  # compiles
    (short, bound), (long, largest) = peak(100), peak(10_000)
    assert long <= 1.05 * short
    assert largest < 2 * bound


def wild():
    v = jax.tree.map(lambda p: p, VARIABLES)
    v["params"]["mixing"]["decoder"]["kernel"] = 1e8 * v["params"]["mixing"]["decoder"]["kernel"]
    return v


@pytest.mark.parametrize("chunk", (1, 4, 100))
def test_stream_stops_at_the_first_bad_frame(chunk):
    "The error names it, all frames before it were passed on, and a plain rollout agrees which it is."
    frames = np.asarray(rollout(MODEL, wild(), RECORD, 30, check=False))
    first = int(np.argmin(np.isfinite(frames).all((0, 2, 3))))
    assert 0 < first < 29
    passed = []
    with pytest.raises(RolloutDivergedError, match=f"frame {first} ") as caught:
        for piece in rollout_stream(MODEL, wild(), RECORD, 30, chunk=chunk):
            passed.append(piece)
    assert caught.value.step == first
    kept = np.concatenate(passed, 1)
    assert kept.shape[1] == first and np.isfinite(kept).all()
    with pytest.raises(RolloutDivergedError, match=f"frame {first} ") as caught:
        rollout(MODEL, wild(), RECORD, 30)
    np.testing.assert_array_equal(caught.value.frames, frames)


def test_models_that_were_made_alike_compile_once():
    "From partials of their own, and from options that are lists, as a config read from a file has them."
    make = lambda sizes: BatchStackedSSM2DModel(partial(S5SSM, d_hidden=8, blocks=1), d_model=sizes, d_vars=1, n_layers=1)
    x = jnp.ones((1, 1, 2, 2, 1))
    v = jax.jit(make((2, 2)).init)(jax.random.PRNGKey(0), x)
    compiled = sys.modules["ssm_lib.rollout"].__dict__["_rollout"]._cache_size
    rollout(make((2, 2)), v, x, 3)
    before = compiled()
    for sizes in ((2, 2), [2, 2]):
        rollout(make(sizes), v, x, 3)
    assert compiled() == before


@pytest.mark.parametrize("kind", ("memmap", "zarr"))
def test_writing(kind, tmp_path):
    shape = (2, 10, W, C)
    if kind == "memmap":
        out = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape)
    else:
        out = pytest.importorskip("zarr").open_array(tmp_path / "x.zarr", mode="w", shape=shape, chunks=(2, 4, W, C), dtype="float32")
    write_rollout(out, MODEL, VARIABLES, RECORD, chunk=4)
    close(np.asarray(out[:]), np.asarray(rollout(MODEL, VARIABLES, RECORD, 10)))
    with pytest.raises(ValueError, match="out has shape"):
        write_rollout(np.zeros((2, 10, W)), MODEL, VARIABLES, RECORD)


BAD = {
    "n_steps": (lambda: rollout(MODEL, VARIABLES, RECORD, 0), "≥ 1"),
    "rank": (lambda: rollout(MODEL, VARIABLES, RECORD[0], 3), "T0"),
    "empty": (lambda: rollout(MODEL, VARIABLES, RECORD[:, :0], 3), "T0 ≥ 1"),
    "nan": (lambda: rollout(MODEL, VARIABLES, RECORD.at[1, 2, 3, 0].set(jnp.nan), 3), r"\(1, 2, 3, 0\)"),
    "dt": (lambda: rollout(MODEL, VARIABLES, RECORD, 3, dt=jnp.ones(3)), "dt has shape"),
    "forced": (lambda: rollout(MODEL, VARIABLES, RECORD, 3, teacher_forcing=3), "teacher_forcing"),
    "segment": (lambda: rollout(MODEL, VARIABLES, RECORD, 3, segment=0), "segment"),
    "stream": (lambda: rollout_stream(MODEL, VARIABLES, RECORD, 3, chunk=0), "chunk"),
}


@pytest.mark.parametrize("call, says", BAD.values(), ids=BAD)
def test_bad_input(call, says):
    "One line, and at once: a stream complains when it is made, not when it is read."
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
