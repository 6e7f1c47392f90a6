"""Laws of programs on a mesh of eight simulated devices, each law a function; `test_mesh.py` runs them in processes of their own.

    python tests/mesh_laws.py layers     # one of them by hand
"""

import gc
import json
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from sweep import EQUAL_STEPS_ONLY, KEY, LAYERS, WHOLE_ONLY, noise

from ssm_lib import (
    LRU,
    S4,
    S5SSM,
    BatchStackedSSM2DModel,
    Forecaster,
    Plan,
    Recurrent,
    RolloutDivergedError,
    Run,
    SequenceLayer,
    cli,
    fit,
    linear_scan,
    make_optimizer,
    next_frame_loss,
    rollout,
    rollout_stream,
    space,
    window_batch,
    window_batches,
    write_rollout,
)
from ssm_lib.mesh import choices, first_alone, make_mesh, messages
from ssm_lib.recipes import conv_s5, conv_scan, conv_spectral, fno, residual_conv

gc.set_threshold(100_000, 50, 50)  # as in conftest.py
RNG = np.random.default_rng(0)
GRID = 8, 12


def on(cuts, program, *args):
    with jax.set_mesh(make_mesh(**cuts)):
        return jax.jit(program)(*args)


def like_one_device(program, args, cuts, tolerance=1e-5, sum_tolerance=None):
    """What a program gives on a mesh is what it gives on one device.

    With a `sum_tolerance` it gives two things, the second of which, a gradient, adds up many numbers.
    """
    want = jax.jit(program)(*args)
    for cut in cuts:
        made = on(cut, program, *args)
        parts = [(made, want, tolerance)] if sum_tolerance is None else zip(made, want, (tolerance, sum_tolerance), strict=True)
        for *trees, off in parts:
            for got, alone in zip(*map(jax.tree.leaves, trees), strict=True):
                np.testing.assert_allclose(got, alone, atol=off * max(np.abs(alone).max(), 1e-30), rtol=0, err_msg=str(cut))


def scans():
    scan_of_time()
    scan_of_space()


def scan_of_time():
    "`linear_scan` cut in two, four and eight: both ways, poles of all kinds, a start state, its gradient."
    L, P = 24, 5
    Lambda = jnp.asarray(RNG.uniform(0.6, 0.999, P) * np.exp(1j * RNG.uniform(0, np.pi, P)), jnp.complex64)
    u, x0 = (jnp.asarray(RNG.normal(size=s) + 1j * RNG.normal(size=s), jnp.complex64) for s in ((2, L, P), (2, P)))
    spec = lambda z: jax.P(*[None] * (z.ndim - 2), "time") if z.ndim > 1 else jax.P()
    for power in (1, RNG.uniform(0.5, 2, (L, 1)), RNG.uniform(0.5, 2, (2, L, 1))):
        a = (Lambda**power).astype(jnp.complex64)

        def run(a, u, x0, reverse, cut):
            scan = partial(linear_scan, reverse=reverse, axis_name="time" if cut else None)
            if not cut:
                return scan(a, u, x0)
            return jax.shard_map(scan, in_specs=(spec(a), spec(u), jax.P()), out_specs=spec(u))(a, u, x0)

        def both(a, u, x0, cut):
            square = lambda *z: jnp.sum(jnp.abs(run(*z, reverse, cut)) ** 2)
            made = []
            for reverse in (False, True):
                made += [run(a, u, x0, reverse, cut), jax.grad(square, (0, 1, 2))(a, u, x0)]
            return made

        want = jax.jit(partial(both, cut=False))(a, u, x0)
        for n in (2, 4, 8):
            got = on({"time": n}, partial(both, cut=True), a, u, x0)
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def scan_of_space():
    "Poles along a cut axis of the grid, whatever is beyond its edges; their gradient."
    h, P = noise(2, 24, 3), (2, 3)
    Lambda = jnp.asarray(RNG.uniform(0.3, 0.97, P) * np.exp(1j * RNG.uniform(0, np.pi / 2, P)), jnp.complex64)
    ways = [jnp.asarray(RNG.normal(size=P) + 1j * RNG.normal(size=P), jnp.complex64) for _ in range(2)]
    cut = jax.P(None, "space")

    def run(h, Lambda, *ways, boundary, name=None):
        scan = lambda h, *poles: space.scan_axis(h, -2, *poles, boundary, axis_name=name)
        parts = scan if name is None else jax.shard_map(scan, in_specs=(cut, *[jax.P()] * 3), out_specs=cut)
        square = lambda *z: jnp.sum(parts(*z) ** 2)
        return parts(h, Lambda, *ways), jax.grad(square, (0, 1, 2, 3))(h, Lambda, *ways)

    for boundary in space.BOUNDARIES:
        want = jax.jit(partial(run, boundary=boundary))(h, Lambda, *ways)
        for n in (2, 8):
            got = on({"space": n}, partial(run, boundary=boundary, name="space"), h, Lambda, *ways)
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), err_msg=f"{boundary}, {n}")


def layers():
    "Each kind of system whole and carried where time is cut, irregular, with gaps and new starts, of no even length; gradients."
    u, dt = noise(2, 21, 3), jnp.asarray(RNG.uniform(0.5, 2, (2, 21)), jnp.float32)
    said = {"mask": RNG.random((2, 21)) < 0.8, "reset": RNG.random((2, 21)) < 0.15, "dt": dt}
    same = ("s5_bilinear", "s5_no_conj", "dss_exp", "s4d_bilinear", "s4_legt", "causal_conv", "linoss_damped")  # systems as others
    for name, (make, tolerance) in (LAYERS | WHOLE_ONLY).items():
        if name in same:
            continue
        layer = make(d_model=3)
        v = jax.jit(layer.init)(KEY, u)
        one_of_a_kind = name in ("s5_zoh", "dss", "s4", "s5_both", "mamba")  # the others have the same systems, of other poles
        for told, cut in [({}, {"time": 8})] * (name in ("s5_both", "s4")) + [(said, {"batch": 2, "time": 4})]:
            told = {k: z for k, z in told.items() if k != "dt" or name not in EQUAL_STEPS_ONLY}
            plan = Plan(segment=2 if not told or name in ("dss", "lru") else None)  # a device's stretch in pieces, or at once
            layer = layer.clone(plan=plan)

            def ways(v, u, layer=layer, told=told, sloped=one_of_a_kind):
                def square(v, u):
                    y = layer.apply(v, u, **told)
                    return jnp.sum(y**2), y

                carried = () if layer.whole_only else layer.apply(v, u, **told, method="prefill")
                slopes, y = jax.grad(square, (0, 1), has_aux=True)(v, u) if sloped else ((), square(v, u)[1])
                return (y, carried), slopes

            like_one_device(ways, (v, u), [cut], tolerance, 10 * tolerance)


def blocks():
    "Batch statistics are those of the whole batch, wherever it lies; dropout differs from device to device."
    u = noise(8, 8, 3)
    block = SequenceLayer(partial(S5SSM, d_hidden=8, blocks=1), 3, norm="batch")
    v = jax.jit(block.init)(KEY, u)
    renew = lambda v, u: block.apply(v, u, mutable=["batch_stats"])
    like_one_device(renew, (v, u), [{"batch": 4}, {"batch": 2, "time": 4}])
    odd = lambda v, u: block.apply(v, u[:, :7], mutable=["batch_stats"])
    try:
        on({"time": 4}, odd, v, u)
        raise AssertionError("padding was counted")
    except ValueError as error:
        assert "expected a multiple, for batch statistics" in str(error)
    drops = SequenceLayer(partial(S5SSM, d_hidden=8, blocks=1), 3, norm="none", dropout=0.5, prenorm=False)
    v = jax.jit(drops.init)({"params": KEY, "dropout": KEY}, u)
    same = jnp.broadcast_to(u[:1], u.shape)
    y = on({"batch": 8}, lambda v, u: drops.apply(v, u, rngs={"dropout": KEY}), v, same)
    assert len({np.asarray(row).tobytes() for row in y}) > 2  # of few features, some are alike by chance


class Differences(Recurrent):
    "Written by somebody who knows nothing of meshes."

    frame = (3,)

    def stretch(self, x, carry, times):
        before = jnp.zeros_like(x[:, :1]) if carry is None else carry
        return x[:, -1:], x - jnp.concatenate([before, x[:, :-1]], 1)


def guests():
    "A module that doesn't say that time may be cut has all of it; in a `shard_map` of one's own a model sees whole frames."
    u, x = noise(4, 10, 3), noise(4, 3, *GRID, 2)
    like_one_device(lambda u: Differences().apply({}, u), (u,), [{"batch": 2, "time": 4}])
    block = SequenceLayer(lambda d_model: Differences(), 3, norm="none", activation="none")
    like_one_device(lambda u: block.apply({}, u), (u,), [{"batch": 2, "time": 4}])
    limited = S4(d_model=3, d_hidden=8, l_max=10)
    v = jax.jit(limited.init)(KEY, u)
    like_one_device(limited.apply, (v, u), [{"time": 4}], 3e-4)
    model = residual_conv(GRID, 2, width=4, n_layers=1, boundary="reflect")
    v = jax.jit(model.init)(KEY, x)
    whole, cut = jax.P(), jax.P(("batch", "space"))
    own = lambda v, x: jax.shard_map(lambda v, x: model.apply(v, x), in_specs=(whole, cut), out_specs=cut)(v, x)
    np.testing.assert_allclose(on({"batch": 2, "space": 2}, own, v, x), jax.jit(model.apply)(v, x), atol=1e-5)
    one = rollout(model, v, x[:1], 3)
    np.testing.assert_allclose(on({"batch": 2, "space": 4}, lambda v, x: rollout(model, v, x, 3), v, x[:1]), one, atol=1e-5)


def models():
    "Models on a grid: call, gradient and rollout as on one device, cut where the field is, whatever is beyond its edges."
    x = noise(2, 6, *GRID, 2)
    field = conv_s5(GRID, 2, width=4, d_hidden=4, n_layers=2, boundary="reflect")
    increments = partial(Forecaster, field, (0.1, 0.2), (1.0, 2.0), (0.1, 0.1))
    tried = {
        "conv_s5": field,
        "edges": conv_scan(GRID, 2, width=2, n_layers=1, boundary=("replicate", "zero")),
        "waves": conv_spectral(GRID, 2, width=4, n_layers=1, modes=3),
        "mirrors": fno(GRID, 2, width=4, n_layers=1, modes=3, boundary=("reflect", "periodic")),
        "band": increments(band=space.Band((2, 3), (False, True), ("periodic", "reflect"))),
        "mean": BatchStackedSSM2DModel(partial(LRU, d_hidden=4), GRID, 2, 1, width=4, space=space.Sum((space.Space(), space.Mean()))),
    }
    for name, model in tried.items():
        v = jax.jit(model.init)(KEY, x)

        all_ways = name == "conv_s5"

        def ways(v, x, model=model, all_ways=all_ways):
            slope = jax.grad(lambda v: next_frame_loss(model, v, x, KEY))(v)["params"]
            return model.apply(v, x), slope, rollout(model, v, x[:, :2], 3) if all_ways else ()

        cuts = [{"batch": 2, "space": (2, 2)}, {"time": 2, "space": 4}] if all_ways else [{"space": (4, 2)}]
        like_one_device(ways, (v, x), cuts)
    gaps, holes = increments(gaps=True), jnp.where(jnp.asarray(RNG.random(x.shape)) < 0.1, jnp.nan, x)
    v = jax.jit(gaps.init)(KEY, x)
    v["fixed"]["observed"] = jnp.asarray(RNG.random((*GRID, 2)) < 0.8)
    like_one_device(lambda v, x: (gaps.apply(v, x), rollout(gaps, v, x[:, :3], 2)), (v, holes), [{"batch": 2, "space": (2, 2)}])


def what_is_sent():
    "What is sent at once is no more than a row of features, or a state; gradients are added up. Samples alone send nothing."
    x = noise(8, 64, 16, 16, 2)
    model = conv_s5((16, 16), 2, width=8, d_hidden=8, n_layers=2)
    v = jax.jit(model.init)(KEY, x)
    parameters = 4 * sum(p.size for p in jax.tree.leaves(v))
    programs = {"call": model.apply, "gradient": jax.grad(lambda v, x: jnp.mean(model.apply(v, x) ** 2))}
    for cut in ({"batch": 8}, {"space": 4}, {"batch": 2, "space": (2, 2)}, {"time": 8}, {"batch": 2, "time": 2, "space": 2}):
        row = 4 * 16 * x[..., 0].size // (cut.get("batch", 1) * cut.get("time", 1)) // 16
        if isinstance(cut.get("space"), tuple):
            row = row // 2 * 10 // 8  # of half a field, with the margins it already has
        state = 8 * 8 * x[:, 0, ..., 0].size // cut.get("batch", 1)
        for name, program in programs.items():
            with jax.set_mesh(make_mesh(**cut)):
                sent = messages(jax.jit(program).lower(v, x).compile())
            assert set(sent) <= {"collective-permute", "all-reduce"}, (cut, name, set(sent))
            assert max(sent.get("collective-permute", [0])) <= max(row, state), (cut, name, sent)
            assert sum(sent.get("all-reduce", [0])) <= parameters, (cut, name, sent)
            assert not sent or cut != {"batch": 8} or name == "gradient"
    looped = lambda x: jax.lax.scan(lambda x, _: (jax.lax.ppermute(x, "space", [(0, 1), (1, 0)]), None), x, None, 5)[0]
    with jax.set_mesh(make_mesh(space=2)):
        parts = jax.shard_map(looped, in_specs=jax.P("space"), out_specs=jax.P("space"))
        assert messages(jax.jit(parts).lower(jnp.ones((2, 3))).compile()) == {"collective-permute": [12] * 5}


def small():
    "A field, a model and its variables."
    x = np.asarray(noise(16, 20, *GRID, 2)).cumsum(1)
    model = conv_s5(GRID, 2, width=4, d_hidden=4, n_layers=1)
    return x, model, jax.jit(model.init)(KEY, x[:1])


def trained(steps, folder=None, lost=None):
    "A small training, to so many steps, in a run; `lost`: the step before which the last of several processes is killed."
    x, model, v = small()

    def batches(start):
        for step, batch in enumerate(window_batches(x, 8, 4, start=start, shift=True), start + 1):
            if step == lost and choices(True).all() and jax.process_index() == jax.process_count() - 1:
                time.sleep(1)  # while the others wait for it
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    run = Run(folder, {}, every=0) if folder else None
    loss, optimizer = partial(next_frame_loss, model), make_optimizer(model, 1e-3, 12)
    return fit(loss, v, batches, optimizer, steps, run=run, check_every=2)


def training():
    "A run is the same on every mesh, and goes on from where it was stopped on another one; batches lie cut, frames stay so."
    folder = tempfile.mkdtemp()
    x, model, _ = small()
    v, losses = trained(12)
    for steps, cut in (4, {"batch": 4, "space": 2}), (8, {"space": 2}), (12, {}):
        with jax.set_mesh(make_mesh(**cut)):
            again, told = trained(steps, folder)
            np.testing.assert_allclose(told, losses[:steps], rtol=1e-5)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(v), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    with jax.set_mesh(make_mesh(batch=4, space=2)):
        batch, alone = next(window_batches(x, 8, 4, shift=True)), window_batch(x, 0, 8, 4, shift=True)
        np.testing.assert_array_equal(batch, alone)
        assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 4, 4, 12, 2)}
        frames = rollout(model, v, x[:8, :2], 6)
        assert {shard.data.shape for shard in frames.addressable_shards} == {(2, 6, 4, 12, 2)}
        np.testing.assert_allclose(np.concatenate([*rollout_stream(model, v, x[:8, :2], 6, chunk=4)], 1), frames, atol=1e-5)


def command_line():
    "`--mesh` changes nothing but where it runs."
    at = Path(tempfile.mkdtemp())
    np.save(at / "x.npy", np.sin(np.linspace(0, 20, 60)[:, None] + np.linspace(0, 2 * np.pi, 16, endpoint=False)).astype("f4"))
    sizes = "--recipe residual_conv --width 4 --n-layers 1 --updates 6 --rollout 2 --batch-size 4 --quiet".split()
    for name, mesh in ("alone", []), ("cut", ["--mesh", "batch=2,space=4"]):
        assert cli.main(["train", str(at / "x.npy"), "--out", str(at / name), *sizes, *mesh]) == 0
        words = ["rollout", str(at / name), str(at / "x.npy"), "--steps", "5", "--out", str(at / f"{name}.npy")]
        assert cli.main(words + (["--mesh", "space=8"] if mesh else [])) == 0
    np.testing.assert_allclose(np.load(at / "cut.npy"), np.load(at / "alone.npy"), atol=1e-5)
    errors = []
    for mesh in [], ["--mesh", "batch=3,space=2"]:
        assert cli.main(["evaluate", str(at / "cut"), "--steps", "3", "--no-pictures", *mesh]) == 0
        errors.append(json.loads((at / "cut" / "metrics.json").read_text())["rmse"]["model"])
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-4)
    assert cli.main([*words, "--overwrite", "--mesh", "space=9"]) == 2 and cli.main([*words, "--overwrite", "--mesh", "width=2"]) == 2


def refusals():
    "What can't be cut says so in a line, before any compute."
    layer = partial(LRU, d_hidden=4)
    dense = BatchStackedSSM2DModel(layer, GRID, 1, 1)
    seen = lambda **said: BatchStackedSSM2DModel(layer, GRID, 1, 1, width=4, **said)
    x = noise(2, 6, *GRID, 1)
    for model, cut, words in (
        (dense, {"space": 2}, "Dense has one state for the whole frame"),
        (seen(space=space.Separable()), {"space": 2}, "Separable has a matrix"),
        (seen(space=space.Scan(ssm=layer, boundary="zero")), {"space": (1, 2)}, "cuts space_1, axis 1 of the grid, and Scan has a layer"),
        (seen(space=space.Scan(native=(16, 24))), {"space": 2}, "Scan has poles of another grid"),
        (seen(space=space.Conv(3)), {"batch": 4}, "expected a multiple of 4 on axis 0"),
        (seen(space=space.Conv(3)), {"space": (1, 8)}, "expected a multiple of 8 on axis 3"),
        (seen(space=space.Conv(5)), {"space": 8}, "2 places beyond an edge are read, and a device has 1"),
    ):
        v = jax.eval_shape(model.init, KEY, x)
        with jax.set_mesh(make_mesh(**cut)):
            try:
                jax.eval_shape(model.apply, v, x)
            except ValueError as error:
                assert words in str(error) and "\n" not in str(error), error
                continue
        raise AssertionError(f"{words}: was taken without a word")


def make_forecast(folder, chunks, name="forecast"):
    zarr.create_array(folder / f"{name}.zarr", shape=(8, 6, *GRID, 2), chunks=chunks, dtype="float32", overwrite=True)


def process(folder):
    """One of several processes with eight devices in all: some updates of a run, each reading the samples of its own devices.

    Two forecast into one file, each its part, and of two one is killed before the fifth update; four go on.
    """
    at, two = Path(folder), jax.process_count() == 2
    with jax.set_mesh(make_mesh(batch=4, space=2)):
        if two:
            x, model, v = small()
            batch = next(window_batches(x, 8, 4, shift=True))
            assert sum(shard.data.size for shard in batch.addressable_shards) == batch.size // 2
            first_alone(lambda: make_forecast(at, (2, 3, 4, 12, 2)))
            write_rollout(zarr.open_array(at / "forecast.zarr"), model, v, x[:8, :2], chunk=4)
            first_alone(lambda: make_forecast(at, (2, 3, 5, 12, 2), "refused"))
            with pytest.raises(ValueError, match="out has chunks of 5 on axis 2, where a device has 4"):
                write_rollout(zarr.open_array(at / "refused.zarr"), model, v, x[:8, :2])
            with pytest.raises(RolloutDivergedError, match="frame 0"):
                rollout(model, jax.tree.map(lambda p: p * np.inf, v), x[:8, :2], 2)  # which no process has whole
        trained(8, at / "run", lost=5 if two else None)


def processes(folder):
    "What several processes did goes on in one, to the same losses; their forecast is that of one."
    at = Path(folder)
    np.testing.assert_allclose(trained(12, at / "run")[1], trained(12)[1], rtol=1e-5)
    x, model, v = small()
    np.testing.assert_allclose(zarr.open_array(at / "forecast.zarr")[:], rollout(model, v, x[:8, :2], 6), atol=1e-5)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print("holds")
