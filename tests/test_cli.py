"""A hundred wrong files, folders, configs and words, and what each is told: one line and exit code 2, nothing computed.

A command line is used by people who made a small mistake. Each line here is such a mistake.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from ssm_lib import cli, training

T, LAT, LON = 120, np.arange(50.0, 44.0, -1.0), np.arange(0.0, 8.0)


def dataset(**changes):
    """A small field with dates, a mask beside it and a forcing, some of it changed."""
    rng = np.random.default_rng(0)
    x = 280 + np.cumsum(rng.normal(size=(T, 6, 8)), 0).astype("f4")
    parts = {
        "t2m": (("time", "latitude", "longitude"), x, {"units": "K"}),
        "land": (("latitude", "longitude"), (x[0] > 280).astype("f4")),
        "sun": (("time",), np.sin(np.arange(T)).astype("f4")),
    }
    time = np.datetime64("2020-01-01", "ns") + np.arange(T) * np.timedelta64(6, "h")
    coordinates = {"time": time, "latitude": LAT, "longitude": LON} | changes.pop("coords", {})
    return xr.Dataset(parts | changes, coordinates)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with files that are wrong, each in its way, one that is right, and a run of it."""
    at = tmp_path_factory.mktemp("cli")
    good = dataset()
    good.to_netcdf(at / "good.nc")
    x = good.t2m.values
    words = ["train", at / "good.nc", "--out", at / "run", "--updates", 10, "--rollout", 2, "--quiet", "--recipe", "residual_conv"]
    assert cli.main([str(word) for word in words]) == 0

    np.save(at / "good.npy", x)
    np.save(at / "infinite.npy", np.where(x > 285, np.inf, x))
    np.save(at / "gap.npy", np.where(x > 290, np.nan, x))
    np.save(at / "empty.npy", x[:0])
    np.save(at / "one.npy", x[:1])
    np.save(at / "integers.npy", x.astype(int))
    np.save(at / "complex.npy", x + 1j)
    np.save(at / "number.npy", np.float32(1))
    np.save(at / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    np.save(at / "seven.npy", x.reshape(T, 1, 1, 6, 8, 1, 1))
    np.save(at / "narrow.npy", x[:, :, :5])
    np.savez(at / "two.npz", a=x, b=x)
    np.savez(at / "none.npz")
    (at / "text.npy").write_text("hello")
    (at / "text.nc").write_text("hello")
    (at / "text.npz").write_text("hello")
    (at / "table.csv").write_text("1,2\n")
    (at / "half.nc").write_bytes((at / "good.nc").read_bytes()[:3000])
    (at / "half.npy").write_bytes((at / "good.npy").read_bytes()[:500])
    (at / "folder.nc").mkdir()
    (at / "empty.zarr").mkdir()
    (at / "a folder").mkdir()

    time = good.time.values
    dataset(coords={"time": time[::-1]}).to_netcdf(at / "backwards.nc")
    dataset(coords={"time": np.sort(np.r_[time[: T // 2], time[: T // 2]])}).to_netcdf(at / "twice.nc")
    dataset(coords={"time": np.r_[time[: T // 2], time[T // 2 :] + np.timedelta64(9, "D")]}).to_netcdf(at / "jump.nc")
    dataset(coords={"time": np.r_[time[:-1], np.datetime64("NaT", "ns")]}).to_netcdf(at / "missing.nc")
    good.rename(time="row").drop_vars("row").to_netcdf(at / "timeless.nc")
    good[["land"]].to_netcdf(at / "still.nc")
    good.isel(time=slice(0, 3)).to_netcdf(at / "short.nc")
    good.isel(time=slice(0, 1)).to_netcdf(at / "moment.nc")
    good.isel(longitude=slice(0, 5)).to_netcdf(at / "narrow.nc")
    good.rename(t2m="temperature").to_netcdf(at / "other.nc")
    good.isel(time=slice(None, None, 2)).to_netcdf(at / "slow.nc")
    (good.t2m * np.nan).to_dataset(name="t2m").to_netcdf(at / "nothing.nc")

    configs = {
        "null": None, "list": [], "number": 3, "text": "fast", "no_data": {"training": None, "data": []},
        "unknown": {"layers": 3}, "unknown_key": {"training": {"epochs": 3}}, "other_layer": {"model": {"recipe": "mamba"}},
        "words": {"training": {"updates": "many"}}, "negative": {"training": {"updates": -5}}, "real": {"model": {"width": 2.5}},
        "null_part": {"model": 3}, "list_part": {"training": [1]}, "flag": {"training": {"shift": "yes"}},
        "rate": {"training": {"learning_rate": 0}}, "share": {"data": {"train": 2}}, "dtype": {"model": {"dtype": "int8"}},
        "nan": {"training": {"noise": float("nan")}}, "seed": {"training": {"seed": -1}},
        "names": {"data": {"variables": "t2m"}}, "average": {"training": {"average": 1.0}},
    }  # fmt: skip
    for name, config in configs.items():
        (at / f"{name}.json").write_text(json.dumps(config))
    (at / "broken.json").write_text("{")
    (at / "binary.json").write_bytes(b"\xff\xfe\x00")

    changes = {
        "run_null": lambda c: None, "run_list": lambda c: [], "run_empty": lambda c: {}, "run_config_null": lambda c: c | {"config": None},
        "run_config_list": lambda c: c | {"config": []}, "run_unknown": lambda c: c | {"config": c["config"] | {"layers": 2}},
        "run_wider": lambda c: c | {"config": c["config"] | {"model": c["config"]["model"] | {"width": 32}}},
        "run_other": lambda c: c | {"config": c["config"] | {"model": c["config"]["model"] | {"recipe": "conv_scan", "modes": 2}}},
        "run_deeper": lambda c: c | {"config": c["config"] | {"model": c["config"]["model"] | {"n_layers": 2}}},
        "run_unresolved": lambda c: c | {"config": {k: v for k, v in c["config"].items() if k != "found"}},
        "run_later": lambda c: c | {"ssm_lib": "99.0"}, "run_no_version": lambda c: {"config": c["config"]},
    }  # fmt: skip
    for name, change in changes.items():
        shutil.copytree(at / "run", at / name)
        config = json.loads((at / "run/config.json").read_text())
        (at / name / "config.json").write_text(json.dumps(change(config)))
    for name in ("run_empty_folder", "run_no_weights"):
        (at / name).mkdir()
    shutil.copy(at / "run/config.json", at / "run_no_weights")
    shutil.copytree(at / "run", at / "run_no_json")
    (at / "run_no_json/config.json").write_text("{")
    shutil.copytree(at / "run", at / "run_flipped")
    for which in ("last", "best"):
        for file in (at / "run_flipped" / which).rglob("*"):
            if file.is_file() and file.parent.name == "d":
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 255
                file.write_bytes(bytes(data))
    return at


FILES = [
    "absent.nc", "infinite.npy", "empty.npy", "one.npy", "integers.npy", "complex.npy", "number.npy", "objects.npy", "seven.npy",
    "two.npz", "none.npz", "text.npy", "text.nc", "text.npz", "table.csv", "half.nc", "half.npy", "folder.nc", "empty.zarr", "a folder",
    "backwards.nc", "twice.nc", "jump.nc", "missing.nc", "timeless.nc", "still.nc", "short.nc", "moment.nc", "nothing.nc", "good.npy",
]  # fmt: skip
CONFIGS = [
    "null", "list", "number", "text", "no_data", "unknown", "unknown_key", "other_layer", "words", "negative", "real", "null_part",
    "list_part", "flag", "rate", "share", "dtype", "nan", "seed", "names", "average", "broken", "binary", "absent",
]  # fmt: skip
RUNS = [
    "absent", "good.nc", "a folder", "run_null", "run_list", "run_empty", "run_config_null", "run_config_list", "run_unknown",
    "run_wider", "run_other", "run_deeper", "run_unresolved", "run_later", "run_no_version", "run_empty_folder", "run_no_weights",
    "run_no_json", "run_flipped",
]  # fmt: skip
WORDS = [
    "", "trian", "train", "evaluate", "rollout", "rollout run", "train good.nc --updates many", "train good.nc --updtes 3",
    "train good.nc --updates 0", "train good.nc --train 1.5", "train good.nc --train 0.01 --by time", "train good.nc --by nothing",
    "train good.nc --by trajectories", "train good.nc --recipe transformer", "train good.nc --width 0",
    "train good.nc --recipe dense_s5 --kernel 3", "train good.nc --kernel 4 --recipe residual_conv", "train good.nc --modes 0 --recipe fno",
    "train good.nc --boundary nowhere --recipe residual_conv", "train good.nc --boundary periodic zero replicate",
    "train good.nc --variables no_such", "train good.nc --forcings no_such", "train good.nc --time no_such",
    "train good.nc --space latitude", "train good.nc --layout THW", "train good.npy --layout TT", "train two.npz --key c",
    "train good.nc --key c",
    "train good.npy --variables u", "train good.nc --history 100", "train good.nc --rollout 1000", "train good.nc --known moon",
    "train good.nc --seed -1", "train good.nc --batch-size 2.5", "train good.nc --dtype float8", "train good.nc --config",
    "train good.nc --out good.nc", "train good.nc --out good.nc/run", "train good.nc --out run", "evaluate run --steps 1000",
    "evaluate run --steps 0", "evaluate run --file narrow.nc", "evaluate run --file absent.nc", "evaluate run --every 0",
    "rollout run narrow.nc --out new.nc", "rollout run other.nc --out new.nc", "rollout run slow.nc --out new.nc",
    "rollout run moment.nc --out new.nc", "rollout run gap.npy --out new.nc", "rollout run good.nc --out good.nc",
    "rollout run good.nc --out good.nc --overwrite", "rollout run good.nc --out new.txt", "rollout run good.nc --out folder.nc",
    "rollout run good.nc --out good.npy/new.nc", "rollout run good.nc --out new.nc --steps 0",
    "rollout run good.nc --out new.nc --steps 10000000000000", "rollout run good.nc --out new.nc --steps 2000000000",
    "rollout run good.nc --out new.nc --steps ten", "rollout run good.nc --out new.nc --start 1999-01-01",
    "rollout run good.nc --out new.nc --start 1000", "rollout run absent.nc --out new.nc", "demo --pde heat", "demo --updates 0",
    "demo --out good.nc", "demo --seed -1", "inspect absent", "inspect a_folder", "inspect",
]  # fmt: skip


@pytest.fixture
def told(place, monkeypatch, capfd):
    """Runs a command in the folder and holds it to the rule: one line, exit code 2, nothing computed, nothing left behind."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(training, "_update", lambda *args: pytest.fail("it began to train"))
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file() and file.name != ".lock"}

    def tell(words):
        assert cli.main(words) == 2, f"{words} was taken"
        out, err = capfd.readouterr()
        errors = [line for line in err.splitlines() if not line.startswith("ssm_lib: warning: ")]
        assert len(errors) == 1 and errors[0].startswith("ssm_lib: ") and len(errors[0]) < 500, f"{words} was told {err!r}"
        assert not out.strip() or words[0] in ("train", "demo"), f"{words} said {out!r} first"
        after = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file() and file.name != ".lock"}
        assert after == before, f"{words} left {sorted(map(str, set(after.items()) ^ set(before.items())))}"
        return err

    return tell


@pytest.mark.parametrize("name", FILES)
def test_wrong_files(told, name):
    layout = {".npy": ["--layout", "THW"], ".npz": ["--layout", "THW"]}.get(Path(name).suffix, []) if name != "good.npy" else []
    told(["train", name, "--out", "new", *layout])


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_configs(told, name):
    told(["train", "good.nc", "--out", "new", "--config", f"{name}.json"])


@pytest.mark.parametrize("name", RUNS)
def test_wrong_runs(told, name):
    told(["rollout", name, "good.nc", "--out", "new.nc"])


@pytest.mark.parametrize("words", WORDS)
def test_wrong_words(told, words):
    told(words.split())


def test_there_are_a_hundred():
    assert len(FILES) + len(CONFIGS) + len(RUNS) + len(WORDS) >= 100
