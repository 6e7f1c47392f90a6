"""The scores: every protocol runs, in its short mode, and goes on from where it was stopped."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import apebench
import kept
import memory
import recall
import timescales

CONTENDERS = "ssm_lib", "Res, increments in the band", "Conv", "ssm_lib, averaged weights"


def test_apebench_in_short_and_again(tmp_path, capsys):
    quick = ["--quick", "--cases", "burgers", "--out", str(tmp_path), "--nets"]
    apebench.main([*quick, *CONTENDERS[:2]])
    first = json.loads((tmp_path / "apebench_burgers.json").read_text())
    apebench.main([*quick, *CONTENDERS])
    both = json.loads((tmp_path / "apebench_burgers.json").read_text())
    assert list(both) == [*CONTENDERS[:3]] and {kind: both[kind] for kind in first} == first  # what was done is not done again
    (run,) = json.loads((tmp_path / "apebench_burgers_otherwise.json").read_text())[CONTENDERS[3]].values()
    assert run["config"]["average"] == 0.999 and run["config"]["updates"] == 10 and run["seconds"] > 0 and run["jax"]
    assert all(np.isfinite(run["0"]["score"]) and 0 < run["0"]["score"] < 10 for run in both.values())
    told = capsys.readouterr().out
    assert all(f"| {name} |" in told for name in (*CONTENDERS, "Dil, published"))


def test_memory_in_short(tmp_path, capsys):
    kinds = "memory", "no memory, one step"
    memory.main(["--quick", "--viscosities", "0.1", "--points", "32", "--out", str(tmp_path), "--nets", *kinds])
    runs = json.loads((tmp_path / "memory_0.1_32.json").read_text())
    with_memory, without = (runs[kind]["0"] for kind in kinds)
    assert all(np.isfinite(run[name]) for run in (with_memory, without) for name in ("five", "one", "step"))
    assert without["five"] == without["one"] and with_memory["five"] != with_memory["one"]
    assert abs(with_memory["config"]["parameters"] / without["config"]["parameters"] - 1) < 0.01
    told = capsys.readouterr().out
    assert all(f"| 32 | {kind}, 1 |" in told for kind in kinds)


def test_timescales_in_short(tmp_path, capsys):
    timescales.main(["--quick", "--out", str(tmp_path), "--nets", "GRU, dt beside", "S5, gaps by its own forecast"])
    runs = json.loads((tmp_path / "timescales.json").read_text())
    assert all(score["ratio"] > 0.99 for run in runs.values() for score in run["0"]["scores"].values())  # Kalman's is the best
    assert "| GRU, dt beside, 1 |" in capsys.readouterr().out


def test_the_best_estimate_is_the_stationary_one():
    "Kalman's error, of many short intervals, is that of Kalman and Bucy's equation."
    P = scipy.linalg.solve_continuous_are(timescales.A.T, timescales.SUM[:, None], timescales.DRIVE, [[timescales.NOISE]])
    intervals = np.full(2000, 0.02)
    seen, truth = timescales.records(intervals, 300, seed=0)
    made = timescales.kalman(seen, intervals, np.ones(2000, bool))
    np.testing.assert_allclose(np.mean((made - truth)[:, 640:] ** 2), P[0, 0], rtol=0.05)
    same = timescales.stationary(seen, intervals, np.ones(2000, bool))
    assert np.sqrt(np.mean((same - made)[:, 640:] ** 2)) < 0.01 * np.sqrt(P[0, 0])  # its gains don't change there
    reached = [of["with gaps"] for of in timescales.fixed(n=64).values()]
    assert 1 < reached[1] < reached[0] < 1.1  # with gaps they do, and to swing freely is the better part of it


def test_recall_in_short(tmp_path, capsys):
    quick = ["--quick", "--out", str(tmp_path), "--tasks"]
    recall.main([*quick, "delay_16_64", "copy_16", "--nets", "LRU"])
    recall.main([*quick, "selective_64", "--nets", "LRU, noise masked"])
    (by_dt,) = json.loads((tmp_path / "recall_delay_16_64.json").read_text())["LRU"].values()
    np.testing.assert_allclose(by_dt["score"], by_dt["score by dt"], rtol=1e-3)  # one long step is many short ones
    (masked,) = json.loads((tmp_path / "recall_selective_64.json").read_text())["LRU, noise masked"].values()
    assert f"score among {recall.FAR}" in masked
    told = capsys.readouterr().out
    assert told.count("| LRU |") == 5 and "| LRU, noise masked | 0" in told and "| no linear layer below | 0.000 |" in told


def test_tasks_ask_for_what_was_shown():
    "The value that began so many steps ago, to the step; symbols where they stood, and the answer at the end."
    delay, rng = recall.Delay(4, 20), np.random.default_rng(0)
    (x, _), truth = delay.batch_of(rng, 2, by_dt=False)
    late = np.arange(60, 80).reshape(4, 5)[:, -1]  # the last step of each value that counts
    np.testing.assert_array_equal(truth, x[:, late - (delay.steps - 1), 0])
    assert (x[:, late - delay.steps, 0] != truth).all()  # one step earlier it was another
    assert delay.loss(jnp.roll(x, delay.steps - 1, 1), truth) == 0
    (one_hot, _), told = recall.Copy(7).batch_of(rng, 2, by_dt=False)
    assert one_hot.shape == (2, 10 + 7 + 10, 10) and (one_hot[:, :10].argmax(-1) == told).all()
    (ids, _), told = recall.Selective(32).batch_of(rng, 2, by_dt=False)
    np.testing.assert_array_equal(ids[ids < 16].reshape(2, 16), told)


def test_masked_noise_leaves_no_trace():
    "The same symbols among less and among more noise: the same answers."
    few, many = (recall.Selective(steps).batch_of(np.random.default_rng(0), 2, by_dt=False)[0][0] for steps in (20, 60))
    for masked in (True, False):
        net = recall.Blocks(partial(recall.LRU, 8), masked)
        run = jax.jit(net.apply)
        variables = jax.jit(net.init)(jax.random.PRNGKey(0), few)
        apart = np.abs(run(variables, few) - run(variables, many)).max()
        assert apart < 1e-4 if masked else apart > 1e-2


def test_what_a_linear_layer_can_hold():
    "Shares by all-pass filters against those by the Gramian; they fall, and add up to the number of poles."
    rng = np.random.default_rng(0)
    half = rng.uniform(0.3, 0.95, 3) * np.exp(1j * rng.uniform(0.2, 3, 3))
    poles = np.concatenate([half, half.conj()])
    share = recall.recalled(poles, 2000)
    gram = 1 / (1 - np.outer(poles, poles.conj()))
    traces = poles[:, None] ** np.arange(40)
    want = np.einsum("id,ij,jd->d", traces.conj(), np.linalg.inv(gram), traces).real
    np.testing.assert_allclose(share[:40], want, atol=1e-9)
    np.testing.assert_allclose(share.sum(), 6, atol=1e-9)
    layer = recall.S4D(1, 8, poles="lin")
    assert len(recall.poles_of(layer)) == 7  # the first is real
    assert (np.diff(share) < 1e-12).all() and (share <= 6 / np.arange(1, 2001) + 1e-12).all()


def test_a_run_that_fails_keeps_what_was_done(tmp_path):
    file = tmp_path / "a.json"

    def run(kind, seed):
        if (kind, seed) == ("b", 1):
            raise KeyboardInterrupt
        return {"score": seed}

    with pytest.raises(KeyboardInterrupt):
        kept.run_missing(file, ["a", "b"], 3, run)
    assert {kind: [r["score"] for r in runs] for kind, runs in kept.in_order(kept.read(file)).items()} == {"a": [0, 1], "b": [0]}


def test_nets_of_others_are_what_they_are_there():
    "A net of pdequinox within the contract, against itself with its channels first."
    case = apebench.CASES["burgers"]
    model, u = apebench.res(case), jax.random.normal(jax.random.PRNGKey(0), (2, 3, 160, 1))
    variables = model.init(jax.random.PRNGKey(1), u)
    net = model.make(jax.random.PRNGKey(2))
    given = {"params": {"net": apebench.arrays_of(net)[0]}}
    want = jax.vmap(jax.vmap(net))(jnp.swapaxes(u, -1, -2))
    np.testing.assert_allclose(model.apply(given, u), jnp.swapaxes(want, -1, -2), atol=1e-5)
    assert sum(p.size for p in jax.tree.leaves(variables)) == 32_943  # as published


def test_every_contender_keeps_to_the_budget():
    for case in apebench.CASES.values():
        train = apebench.trajectories(case._replace(warmup=0), 1, 3, seed=0)
        for name, make in apebench.NETS.items():
            model = make(case, train)
            shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), train[:, :1])["params"]
            parameters = sum(p.size for p in jax.tree.leaves(shapes))
            assert 0.85 * apebench.BUDGET < parameters <= apebench.BUDGET, (case.title, name, parameters)
