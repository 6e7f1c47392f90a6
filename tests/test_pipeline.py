"""From every kind of file to a forecast: what the pages show of one file, held to on others."""

import contextlib
import dataclasses
import json
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import xarray as xr

from ssm_lib import Config, DataConfig, ModelConfig, TrainingConfig, cli, open_run, pipeline, rollout, train_run
from ssm_lib.evaluation import climatology

RNG = np.random.default_rng(0)
T = 60


def waves(*shape):
    """A wave along every axis of space."""
    phase = sum(2 * np.pi * g / n for g, n in zip(np.meshgrid(*map(np.arange, shape), indexing="ij"), shape))
    return np.sin(phase - 0.2 * np.arange(T).reshape(-1, *[1] * len(shape))).astype("f4")


def dated(x, dims, **coords):
    time = np.datetime64("2020-01-01", "ns") + np.arange(T) * np.timedelta64(6, "h")
    return xr.Dataset({"a": (("time", *dims), x), "b": (("time", *dims), 2 * x)}, {"time": time, **coords})


def series(at):
    np.save(at / "x.npy", waves(1)[:, 0])
    return at / "x.npy", ["--d-hidden", "16", "--history", "4"]


def line(at):
    np.savez(at / "x.npz", waves(20))
    return at / "x.npz", []


def trajectories(at):
    import zarr

    zarr.save(str(at / "x.zarr"), np.stack([waves(16, 18)[..., None]] * 5))
    return at / "x.zarr", ["--recipe", "conv_s5", "--d-hidden", "4", "--history", "4"]


def volume(at):
    np.save(at / "x.npy", waves(4, 5, 6)[None, ..., None])
    return at / "x.npy", ["--recipe", "residual_conv", "--dtype", "bfloat16"]


def holes(at):
    x = np.where(RNG.random((T, 6, 8)) < 0.2, np.nan, waves(6, 8))
    x[:, 0, :3] = np.nan
    dated(x, ("latitude", "longitude"), latitude=np.arange(50.0, 44, -1), longitude=np.arange(8.0)).to_netcdf(at / "x.nc")
    return at / "x.nc", ["--recipe", "residual_conv", "--variables", "a", "b"]  # four frames a day, twelve days


@pytest.mark.parametrize("kind", [series, line, trajectories, volume, holes])
def test_from_a_file_to_a_forecast(kind, tmp_path, monkeypatch, capsys):
    """Inspect, train, evaluate and roll out; the file holds what a rollout in memory gives; the same again trains no more."""
    monkeypatch.chdir(tmp_path)
    file, options = kind(tmp_path)
    size = ["--width", "4", "--updates", "8", "--rollout", "2", "--batch-size", "2", "--n-layers", "1", "--quiet"]
    train = ["train", str(file), "--out", "run", *size, *options]
    assert cli.main(["inspect", str(file)]) == 0
    assert cli.main(train) == 0
    log = (tmp_path / "run/log.jsonl").read_text()
    drawn = kind in (series, trajectories, holes)
    if drawn:
        assert cli.main(train) == 0 and (tmp_path / "run/log.jsonl").read_text() == log
    assert cli.main(["evaluate", "run", "--steps", "4", "--every", "20", *([] if drawn else ["--no-pictures"])]) == 0
    assert cli.main(["inspect", "run"]) == 0
    said = json.loads((tmp_path / "run/metrics.json").read_text())
    assert said["leads"] == [1, 2, 3, 4] and {"model", "persistence", "climatology"} <= said["nrmse"].keys()
    assert all(len(values) == 4 for values in said["nrmse"].values())
    pictures = {p.name for p in (tmp_path / "run").glob("*.png")}
    assert kind is not series or "poles.png" in pictures
    assert not drawn or {"errors.png", "loss.png"} <= pictures and (tmp_path / "run/forecast.gif").exists()

    assert cli.main(["rollout", "run", str(file), "--steps", "5", "--out", "next.nc", "--start", "40"]) == 0
    model, variables, config = open_run(tmp_path / "run")
    fields, inputs, h = pipeline.open_data(config), pipeline.inputs_of(config), config.training.history
    assert config.training.free_runs == (config.model.recipe in pipeline.MEMORY)
    beside = inputs.read(fields, 0, 41 - h, 45)[None]
    made = rollout(model, variables, fields[0, 41 - h : 41][None], 5, inputs=beside if beside.shape[-1] else None)[0]
    if config.found.gaps:
        assert config.model.usual and h == 5
        made = np.where(variables["fixed"]["observed"], made, np.nan)
        assert np.isnan(made[:, 0, :3]).all() and np.isfinite(made[:, 1:]).all()
    with xr.open_dataset(tmp_path / "next.nc", decode_timedelta=True) as stored:
        first = stored.isel(sample=0) if "sample" in stored.dims else stored
        for c, name in enumerate(config.found.variables):
            np.testing.assert_allclose(first[name].isel(time=0), np.asarray(made)[..., c], rtol=1e-5, atol=1e-6)


def small(tmp_path, **training):
    np.save(tmp_path / "x.npy", waves(16))
    options = {"updates": 12, "rollout": 2, "batch_size": 4, "validation": 0.0} | training
    data, model = DataConfig(str(tmp_path / "x.npy")), ModelConfig("residual_conv", width=4, n_layers=1)
    return pipeline.resolve(Config(data, model, TrainingConfig(**options)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    at = tmp_path_factory.mktemp("plain")
    return train_run(at / "run", small(at, average=0.0, one_step=0.0)).variables


@pytest.mark.parametrize(
    "option",
    [{"noise": 0.1}, {"pushforward": True}, {"accumulate": 2}, {"average": 0.9}, {"one_step": 1.0}, {"free_runs": True}, {"seed": 1}],
)
def test_options_of_the_training_count(option, plain, tmp_path):
    other = train_run(tmp_path / "other", small(tmp_path, **{"average": 0.0, "one_step": 0.0} | option)).variables
    differ = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain, other)
    assert max(jax.tree.leaves(differ)) > 1e-5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(other))


def test_free_runs_are_for_networks_that_remember(tmp_path):
    """With what is usual around them, too; not where one frame is given, or rollouts are asked for."""
    dated(waves(6), ("x",)).to_netcdf(tmp_path / "x.nc")
    data, model = DataConfig(str(tmp_path / "x.nc")), ModelConfig("dense_s5", width=8, n_layers=1)
    resolved = lambda **training: pipeline.resolve(Config(data, model, TrainingConfig(updates=2, rollout=3, **training)))
    trained = train_run(tmp_path / "run", resolved())
    assert trained.config.model.usual and trained.config.training.free_runs
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.variables))
    for other in ({"history": 1}, {"noise": 0.1}, {"pushforward": True}, {"free_runs": False}):
        assert not resolved(**other).training.free_runs
    for wrong in ({"noise": 0.1}, {"one_step": 0.5}):
        with pytest.raises(ValueError, match=f"free_runs is True with {list(wrong)[0]}"):
            resolved(free_runs=True, **wrong)


def test_a_run_can_be_moved_with_or_without_its_data(tmp_path):
    """Elsewhere it opens, goes on, and is judged, told where the data are; a run that has them inside needs no word."""
    (tmp_path / "a").mkdir()
    trained = train_run(tmp_path / "a/run", small(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    model, variables, config = open_run(tmp_path / "b/run")
    jax.tree.map(np.testing.assert_array_equal, variables, trained.variables)
    assert cli.main(["evaluate", str(tmp_path / "b/run"), "--no-pictures"]) == 2
    assert cli.main(["evaluate", str(tmp_path / "b/run"), "--no-pictures", "--file", str(tmp_path / "b/x.npy")]) == 0
    again = train_run(tmp_path / "b/run", small(tmp_path / "b"))
    jax.tree.map(np.testing.assert_array_equal, again.variables, trained.variables)

    inside = tmp_path / "c"
    inside.mkdir()
    train_run(inside, small(inside))
    shutil.move(inside, tmp_path / "d")
    assert cli.main(["evaluate", str(tmp_path / "d"), "--no-pictures"]) == 0


def test_one_frame_is_an_initial_condition(tmp_path):
    """A file with the first frame alone, of several trajectories, goes on as the frame does in memory."""
    model, variables, config = train_run(tmp_path / "run", small(tmp_path))
    frames = np.stack([waves(16)[:1, :, None], -waves(16)[:1, :, None]])
    np.save(tmp_path / "first.npy", frames)
    words = ["rollout", str(tmp_path / "run"), str(tmp_path / "first.npy"), "--steps", "4", "--out", str(tmp_path / "next.npy")]
    assert cli.main(words) == 0
    beside = pipeline.inputs_of(config).read(pipeline.open_data(config), 0, 0, 4)[None]
    made = rollout(model, variables, frames, 4, inputs=np.repeat(beside, 2, 0))
    np.testing.assert_allclose(np.load(tmp_path / "next.npy")[:, 0], made, rtol=1e-5, atol=1e-6)


def test_no_two_runs_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.time, "strftime", lambda form: "20200101-000000")  # all in one second
    assert len({cli._folder(None, "x") for _ in range(3)}) == 3


def test_events_for_tensorboard(tmp_path):
    np.save(tmp_path / "x.npy", waves(16))
    words = ["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), "--updates", "20", "--rollout", "1", "--quiet"]
    assert cli.main([*words, "--tensorboard"]) == 0
    assert any(file.stat().st_size > 100 for file in (tmp_path / "run/events").iterdir())


def test_demo(tmp_path, monkeypatch, capsys):
    """Too short to win, and says so by its exit code; told the same folder again it does not begin anew."""
    pde, model = {"n_trajectories": 6, "n_frames": 22, "n_points": 12}, ModelConfig("residual_conv", width=4, n_layers=1)
    training = TrainingConfig(updates=5, batch_size=2, rollout=1, validation=0.0)
    monkeypatch.setitem(cli.DEMOS, "kolmogorov_flow", cli._Show(pde, 0.7, model, training, leads=(1, 4), every=9))
    words = ["demo", "--pde", "kolmogorov_flow", "--out", str(tmp_path / "demo"), "--quiet"]
    assert cli.main(words) == 1 and "does not beat" in capsys.readouterr().out
    run = tmp_path / "demo/kolmogorov_flow"
    log, kept = (run / "log.jsonl").read_text(), sorted(p.name for p in (run / "last").iterdir())
    data = (run / "data.npy").read_bytes()
    assert cli.main(words) == 1 and (run / "log.jsonl").read_text() == log
    assert sorted(p.name for p in (run / "last").iterdir()) == kept
    assert cli.main([*words, "--seed", "1"]) == 2 and "expected the same" in capsys.readouterr().err  # another run's folder
    assert (run / "data.npy").read_bytes() == data
    assert cli.main(["evaluate", str(run), "--steps", "3", "--no-pictures"]) == 0


def test_a_disk_that_is_full_while_it_writes(tmp_path):
    """One line, and nothing half written is left."""
    train_run(tmp_path / "run", small(tmp_path))
    words = ["rollout", str(tmp_path / "run"), str(tmp_path / "x.npy"), "--steps", "3000", "--out", str(tmp_path / "next.npy")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    code = "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from ssm_lib.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, preexec_fn=limit)
    told = [line for line in done.stderr.splitlines() if not line.startswith("WARNING:absl")]  # orbax 0.11.0 logs as it reads
    assert done.returncode == 2 and len(told) == 1 and told[0].startswith("ssm_lib: "), done.stderr
    assert not list(tmp_path.glob("*next*"))


def test_days_that_are_all_alike_and_a_variable_at_rest(tmp_path):
    """What is usual says all: scales stay above rounding, and an untrained network says the usual course, nearly."""
    x = np.repeat(np.tile(np.sin(np.arange(4) * np.pi / 2), T // 4)[:, None], 6, 1).astype("f4")
    data = dated(x, ("x",))
    data["b"] = 0 * data.b + 3
    data.to_netcdf(tmp_path / "x.nc")
    config = pipeline.resolve(Config(DataConfig(str(tmp_path / "x.nc")), ModelConfig("residual_conv", width=4, n_layers=1)))
    found = config.found
    assert config.model.usual and np.isfinite([*found.share, *found.keeps]).all()
    assert 0 < found.departure_std[0] < 1e-3 and found.departure_std[1] == found.increment_std[1] == 1
    model, fields = pipeline.build(config), pipeline.open_data(config)
    usual = climatology(fields, pipeline.inputs_of(config).season)[0]
    variables = pipeline.first_variables(config) | pipeline._fixed(config, fields, usual)
    both = pipeline.WithInputs(fields, pipeline.inputs_of(config))[0, :12][None]
    np.testing.assert_allclose(model.apply(variables, both)[0, :-1, :, 0], x[1:12], atol=0.01)


def test_places_that_differ_are_not_shifted(tmp_path):
    """Windows go round a ring where all places are alike; not where each has a usual course, or some were never observed."""
    ring = dated(waves(8), ("x",)).assign_coords(x=np.arange(8.0))
    plain = ring.assign_coords(time=np.arange(T) * 0.1)
    blind = plain.where(plain.x > 1)
    for name, data, shifts in (("plain", plain, True), ("blind", blind, False), ("dated", ring, False)):
        data.to_netcdf(tmp_path / f"{name}.nc")
        config = Config(DataConfig(str(tmp_path / f"{name}.nc")), ModelConfig("residual_conv", boundary=("periodic",)))
        assert pipeline.resolve(config).training.shift is shifts
        wished = dataclasses.replace(config, training=TrainingConfig(shift=True))
        with contextlib.nullcontext() if shifts else pytest.raises(ValueError, match="^shift is True; expected False"):
            pipeline.resolve(wished)
