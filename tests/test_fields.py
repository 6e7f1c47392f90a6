"""Files, inputs and scores where they are awkward: what is in them is read, and what is missing is not made up."""

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import optax
import pytest
import xarray as xr

from ssm_lib import Run, fit, fit_inputs, open_fields, plot_rollout
from ssm_lib import evaluation as ev
from ssm_lib.fields import Axis, coastlines
from ssm_lib.inputs import season_of

RNG = np.random.default_rng(0)


def line(times, n=3, **more):
    "A dataset on a line of n points."
    u = RNG.normal(size=(len(times), n)).astype("f4")
    return xr.Dataset({"u": (("time", "x"), u), **more}, {"time": times, "x": np.arange(n) * 1.0})


def hours(n, step=1):
    return np.datetime64("2020-01-01") + np.arange(0, n * step, step) * np.timedelta64(1, "h")


@pytest.mark.parametrize("order", (("member", "time", "y", "x"), ("x", "time", "member", "y"), ("y", "x", "member", "time")))
def test_axes_are_found_whatever_their_order(order, tmp_path):
    sizes = {"member": 2, "time": 5, "y": 3, "x": 4}
    u = RNG.normal(size=[sizes[name] for name in order]).astype("f4")
    data = xr.Dataset({"u": (order, u), "crs": ((), 1.0)}, {"time": hours(5)})
    data.to_netcdf(tmp_path / "u.nc")
    data.to_zarr(tmp_path / "u.zarr", consolidated=False)
    want = data.u.transpose("member", "time", "y", "x").values[1, 2:4, ..., None]
    for source in (data, tmp_path / "u.nc", tmp_path / "u.zarr"):
        np.testing.assert_array_equal(open_fields(source, space=("y", "x"))[1, 2:4], want)


def test_masks_and_whole_numbers_are_kept():
    masked = np.ma.masked_array(np.full((4, 3), 1e20), mask=False)
    masked[1, 1] = np.ma.masked
    assert np.isnan(open_fields(masked)[0, 1:2][0, 1, 0])
    data = line(hours(4), land=("x", np.array([True, False, True])), soil=("x", np.array([1, 5, 2])))
    inputs = fit_inputs(open_fields(data))
    assert inputs.static == ("land", "soil")


def test_parts_keep_what_belongs_to_them():
    data = xr.Dataset(
        {"u": (("sample", "time", "x"), RNG.normal(size=(4, 6, 3)).astype("f4")), "nu": ("sample", np.arange(4.0)),
         "f": (("sample", "time"), RNG.normal(size=(4, 6)))},
        {"time": hours(6)},
    )  # fmt: skip
    part = open_fields(data, variables="u", forcings=["f"]).part(slice(1, 3), slice(2, 5))
    inputs = fit_inputs(part, calendar=(), coordinates=())
    scale = {name: (mean, deviation) for name, mean, deviation in inputs.scales}
    nu, f = np.moveaxis(inputs.read(part, 1, 1, 3), -1, 0)
    np.testing.assert_allclose(nu * scale["nu"][1] + scale["nu"][0], 2.0, rtol=1e-5)
    np.testing.assert_allclose(f[:, 0] * scale["f"][1] + scale["f"][0], data.f.values[2, 3:5], rtol=1e-5)
    np.testing.assert_array_equal(part[1, 1:3][..., 0], data.u.values[2, 3:5])


def test_coasts_are_those_in_the_window(monkeypatch):
    """cartopy's reader, played here: one coast of two pieces, over Greenwich and at 350 degrees east as -10."""
    pieces = [SimpleNamespace(coords=[(0.0, 50.0), (1.0, 51.0)]), SimpleNamespace(coords=[(-10.0, 52.0), (-9.0, 52.0), (-9.0, 80.0)])]
    shape = SimpleNamespace(geoms=pieces)
    reader = SimpleNamespace(natural_earth=lambda *which: which, Reader=lambda path: SimpleNamespace(geometries=lambda: [shape]))
    monkeypatch.setitem(sys.modules, "cartopy", SimpleNamespace(io=SimpleNamespace(shapereader=reader)))
    monkeypatch.setitem(sys.modules, "cartopy.io", SimpleNamespace(shapereader=reader))
    window = lambda west, east: (Axis("latitude", np.array([55.0, 45.0])), Axis("longitude", np.array([west, east])))
    assert [line.tolist() for line in coastlines(window(-2, 2))] == [[[0.0, 1.0], [50.0, 51.0]]]
    assert [line[0].tolist() for line in coastlines(window(340, 355))] == [[350.0, 351.0, 351.0]]
    assert coastlines(window(100, 120)) == coastlines(window(-2, 2)[:1]) == []
    frames = RNG.normal(size=(2, 2, 2, 1))
    figure = plot_rollout(frames, frames, space=window(-2, 2), lines=coastlines(window(-2, 2)))
    assert all(len(ax.lines) == 1 for ax in figure.axes if ax.get_label() != "<colorbar>")
    assert figure.axes[0].get_xlim() == (-4, 4)
    monkeypatch.setitem(sys.modules, "cartopy.io", None)
    assert coastlines(window(-2, 2)) == []


def test_coordinates_mean_the_same_in_another_file():
    wide, narrow = (open_fields(line(hours(4), n).assign_coords(x=x)) for n, x in ((5, np.linspace(0, 40, 5)), (3, np.linspace(20, 40, 3))))
    inputs = fit_inputs(wide, calendar=())
    np.testing.assert_allclose(inputs.read(narrow, 0, 0, 1)[0, :, 0], inputs.read(wide, 0, 0, 1)[0, 2:, 0])


@pytest.mark.parametrize("calendar, length", (("standard", 365), ("noleap", 365), ("360_day", 360)))
def test_months_and_years_close_in_every_calendar(calendar, length):
    times = xr.date_range("2001-01-01", periods=2 * length, freq="D", calendar=calendar, use_cftime=calendar != "standard")
    fields = open_fields(line(times))
    assert season_of(fields) == (("month", 12),)
    year = fit_inputs(fields, coordinates=()).read(fields, 0, 0, length + 1)[:, 0]
    np.testing.assert_allclose(year[length], year[0], atol=1e-6)


@pytest.mark.parametrize("step, per_day", ((1, 24), (2, 12), (3, 8), (6, 4)))
def test_a_day_before_is_a_day_before(step, per_day):
    fields = open_fields(line(hours(5 * per_day, step)))
    mean, _ = ev.climatology(fields)
    made = ev.baselines(fields, fields, mean)(0, per_day + 1, per_day + 2)["a day before"]
    np.testing.assert_array_equal(made[:per_day], fields[0, 1 : per_day + 1])
    np.testing.assert_array_equal(made[per_day:], fields[0, 1:3])


def test_what_is_no_number_is_wrong_and_what_was_not_seen_is_left_out():
    truth = RNG.normal(size=(2, 4, 1))
    lost = truth.copy()
    lost[0, 1] = np.nan
    np.testing.assert_array_equal(ev.mean_square_error(lost, truth, 1), [[np.inf], [0.0]])
    np.testing.assert_array_equal(ev.mean_square_error(truth, lost, 1), [[0.0], [0.0]])
    np.testing.assert_array_equal(np.isnan(ev._correlation(truth, np.full_like(truth, np.nan), 1, None)), [[True], [True]])
    seen = line(hours(48))
    seen.u[:, 2] = np.where(np.arange(48) % 24 == 12, 300.0, np.nan)
    np.testing.assert_allclose(ev.climatology(open_fields(seen))[0][:, 2], 300.0)


def loss(v, batch, key):
    return (v["params"]["w"] - batch) ** 2


again = partial(fit, loss, {"params": {"w": np.float32(0)}}, [np.float32(1)] * 20, steps=20, check_every=5)


def test_a_run_of_another_kind_is_not_called_damaged(tmp_path):
    again(optimizer=optax.adam(0.1), run=Run(tmp_path / "run", every=0), average=0.9)
    for other in (dict(optimizer=optax.adam(0.1)), dict(optimizer=optax.sgd(0.1), average=0.9)):
        with pytest.raises(ValueError, match="holds the training of another model, optimiser or average"):
            again(run=Run(tmp_path / "run", every=0), **other)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4


def test_variables_are_returned_whatever_the_score():
    with pytest.warns(UserWarning, match="no look had a score"):
        variables, _ = again(optimizer=optax.adam(0.1), validate=lambda v: float("nan"))
    assert np.isfinite(variables["params"]["w"])
