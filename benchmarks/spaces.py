"""What each space learns: the same budget of parameters, the same data, the same training.

    python benchmarks/spaces.py               # all of it, hours on two cores; stop it at any time, run it again to go on
    python benchmarks/spaces.py --quick       # a few updates of each, a minute: that everything runs
    python benchmarks/spaces.py --cases ks_1d --spaces conv spectral --seeds 1

Frames of a periodic PDE are made by exponax on twice the points, in the difficulties of APEBench (Koehler et al. 2024), and
seen on every second one. Each net predicts u + s·f(u) with s the deviation of one-step differences, is trained one step ahead
and rolled out for 100 frames from a single one. The score is the geometric mean over these of the mean relative error. What was
trained on N points then runs on 2N and on N/2 where `on_grid` lets it, against the same truth. Every finished run is written
to `spaces_<case>.json` at once, so that nothing is lost and cases can run beside each other; `spaces.md` holds the tables.
"""
import argparse
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import exponax as ex
import jax
import numpy as np
import optax
from kept import in_order, read, run_missing
from speed import table

from ssm_lib import Forecaster, fit, fit_normalizer, next_frame_loss, nrmse, on_grid, rollout, window_batches
from ssm_lib.recipes import BATCH_MODELS, conv_s5, conv_scan, fno, residual_conv
from ssm_lib.space import Around, Chain, Conv, Mean, Scan, Separable, Space, Sum

BUDGET, LEADS = 33_000, 100
RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    "A PDE and how it is learned. Difficulties are those of APEBench on so many points."

    title: str
    axes: int
    points: int
    linear: tuple
    nonlinear: tuple
    warmup: int  # frames thrown away
    updates: int
    batch: int  # frames predicted in an update
    rate: float
    seeds: int


CASES = {
    "ks_1d": Case("Kuramoto–Sivashinsky", 1, 160, (0, 0, -1.2, 0, -15), (0, 0, -6), 500, 2000, 20, 2e-3, 5),
    "kdv_1d": Case("Korteweg–de Vries", 1, 160, (0, 0, 0, -14, -9), (0, -2, 0), 0, 2000, 20, 2e-3, 5),
    "burgers_1d": Case("Burgers", 1, 160, (0, 0, 1.5, 0, 0), (0, -1.5, 0), 0, 2000, 20, 2e-3, 5),
    "ks_2d": Case("Kuramoto–Sivashinsky, 2D", 2, 32, (0, 0, -1.2, 0, -15), (0, 0, -6), 500, 2500, 10, 2e-3, 3),
}


def trajectories(case, n, frames, seed):
    "(n, frames, *space, 1) on twice the points: a difficulty of order j grows as the number of points to the j."
    finer = lambda values: tuple(v * 2**j for j, v in enumerate(values))
    stepper = ex.stepper.generic.DifficultyNonlinearStepper(
        case.axes, 2 * case.points, linear_difficulties=finer(case.linear), nonlinear_difficulties=finer(case.nonlinear)
    )
    waves = ex.ic.RandomTruncatedFourierSeries(case.axes, cutoff=5, max_one=True)
    start = ex.build_ic_set(waves, num_points=2 * case.points, num_samples=n, key=jax.random.PRNGKey(seed))

    def run(u):
        u = ex.repeat(stepper, case.warmup)(u) if case.warmup else u
        return ex.rollout(stepper, frames - 1, include_init=True)(u)

    return np.moveaxis(np.asarray(jax.jit(jax.vmap(run))(start), np.float32), 2, -1)


def coarser(x, every):
    return x[(slice(None), slice(None), *[slice(None, None, every)] * (x.ndim - 3))]


def stack(grid, space, width, n_layers, activation="gelu", ssm=None, norm="none"):
    return BATCH_MODELS[len(grid)](
        ssm, d_model=grid, d_vars=1, n_layers=n_layers, space=space, width=width, norm=norm, activation=activation
    )


def nets(grid):
    "The contenders by name, each as wide as the budget lets it be."
    line = len(grid) == 1
    pointwise = partial(Conv, 1)
    scans = Around((Chain((pointwise(), Sum((Space(), Scan(4))))), pointwise()))
    means = Around((Chain((Conv(3), Sum((Space(), Mean())))), Conv(3)))
    return {
        "conv": residual_conv(grid, 1, width=30 if line else 16, n_layers=6 if line else 7),
        "conv + mean": stack(grid, means, 27 if line else 16, 6),
        "conv + scan": conv_scan(grid, 1, width=29 if line else 16),
        "conv + scan + mean": conv_scan(grid, 1, width=26 if line else 16, mean=True),
        "scan": stack(grid, scans, 46 if line else 41, 6),
        "spectral": fno(grid, 1, width=17 if line else 7, n_layers=4 if line else 5, modes=12 if line else 5),
        "separable": stack(grid, Separable(16 if line else None), 26 if line else 56, 5 if line else 6),
        "dense": stack(grid, None, 63 if line else 14, 3, "half_glu1"),
        "conv, S5 in time": conv_s5(grid, 1, width=26 if line else 16, d_hidden=25 if line else 13, boundary="periodic"),
    }


def score(model, variables, test):
    "Mean relative error at each lead, and how many of the trajectories end far off or not finite."
    truth = test[:, 1 : LEADS + 1]
    made = np.asarray(rollout(model, variables, test[:, :1], LEADS, check=False), np.float64)
    lost = ~np.isfinite(made).all(axis=tuple(range(1, made.ndim)))
    size = lambda x: np.sqrt((x.reshape(len(x), -1) ** 2).sum(-1))
    lost |= np.nan_to_num(size(made[:, -1]), nan=np.inf) > 5 * size(truth[:, -1])
    errors = nrmse(np.nan_to_num(made, nan=1e30, posinf=1e30, neginf=-1e30), truth)
    return {"mean": float(np.exp(np.log(errors).mean())), "errors": errors[[0, 9, 49, 99]].tolist(), "lost": int(lost.sum())}


def one_run(case, net, train, test, seed, updates):
    "Train a net and score it on its own grid, on a finer one and on a coarser one."
    scales = fit_normalizer(train)
    model = Forecaster(net, *scales)
    variables = jax.jit(model.init)(jax.random.PRNGKey(seed), train[:1, :2])
    memory = net.ssm is not None  # a net with a memory learns from stretches of a trajectory, as many frames in all
    length = 11 if memory else 2
    batches = window_batches(train, case.batch // (length - 1), length, seed=seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, case.rate, max(1, updates // 10), updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    loss = partial(next_frame_loss, model, scale=scales.increment_std[0])
    variables, losses = fit(loss, variables, batches, optimizer, updates, seed=seed)
    told = {"loss": float(losses[-updates // 20 - 1 :].mean())}
    for name, (points, every) in {"N": (case.points, 2), "2N": (2 * case.points, 1), "N/2": (case.points // 2, 4)}.items():
        try:
            told[name] = score(on_grid(model, (points,) * case.axes), variables, coarser(test, every))
        except ValueError as reason:
            told[name] = str(reason)
    return told


def run(case, spaces, seeds, updates, file):
    "All runs of a case that the file does not hold yet, seed after seed."
    train, test = trajectories(case, 50, 51, seed=0), trajectories(case, 30, LEADS + 1, seed=773)
    made = nets((case.points,) * case.axes)

    def one(kind, seed):
        net = made[kind]
        shapes = jax.eval_shape(net.init, jax.random.PRNGKey(0), np.zeros((1, 2, *net.frame), np.float32))
        parameters = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes["params"]))
        if not 0.85 * BUDGET < parameters <= BUDGET:
            raise ValueError(f"{kind} has {parameters} parameters on {net.grid}; expected {BUDGET} or a little less.")
        return {"parameters": parameters, "updates": updates, **one_run(case, net, coarser(train, 2), test, seed, updates)}

    run_missing(file, [kind for kind in made if kind in (spaces or made)], seeds, one)


def gathered(folder):
    "case → contender → its runs, in order of their seeds, from the files of a folder."
    files = {name: folder / f"spaces_{name}.json" for name in CASES}
    return {name: in_order(read(file)) for name, file in files.items() if file.exists()}


def spread(values):
    "Median, and the least and the greatest."
    if not np.isfinite(values).all() or np.median(values) > 1e3:
        return "blows up"
    digits = lambda v: f"{v:.4f}" if v < 0.01 else f"{v:.3f}" if v < 10 else f"{v:.0f}" if v < 1e3 else "∞"
    return f"{digits(np.median(values))} [{digits(min(values))}, {digits(max(values))}]"


def tables(found):
    "Markdown by name, of what `gathered` gives: the comparison, and the resolutions."
    rows, finer = [], []
    head = ["space", *[f"{CASES[c].title}, {max(map(len, found[c].values()))} seeds" for c in found]]
    kinds = list(dict.fromkeys(kind for case in found.values() for kind in case))
    for kind in kinds:
        row, more = [kind], [kind]
        for case in found.values():
            runs = case.get(kind, [])
            means = {grid: [r[grid]["mean"] for r in runs if isinstance(r[grid], dict)] for grid in ("N/2", "N", "2N")}
            lost = sum(r["N"]["lost"] for r in runs)
            row.append(spread(means["N"]) + (f", {lost} lost" if lost else "") if runs else "–")
            more.append(" / ".join(spread(each).split(" [")[0] if each else "–" for each in means.values()))
        rows.append(row)
        finer.append(more)
    return {"comparison": table(head, rows), "resolution": table(head, finer)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--spaces", nargs="+", help="some of the contenders, by name")
    parser.add_argument("--seeds", type=int, help="at most so many")
    parser.add_argument("--updates", type=int, help="instead of those of each case; then written to runs/spaces, if not to an --out")
    parser.add_argument("--quick", action="store_true", help="ten updates, one seed")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    folder = args.out or (RESULTS if not (args.quick or args.updates) else Path("runs/spaces"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.cases:
        case = CASES[name]
        seeds = 1 if args.quick else min(args.seeds or case.seeds, case.seeds)
        updates = 10 if args.quick else args.updates or case.updates
        run(case, args.spaces, seeds, updates, folder / f"spaces_{name}.json")
    made = tables(gathered(folder))
    print("\n\n".join(made.values()))
    text = f"# Spaces compared\n\n{made['comparison']}\n\n## N/2, N and 2N points\n\n{made['resolution']}\n"
    (folder / "spaces.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
