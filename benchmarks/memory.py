"""When memory pays: the Kuramoto–Sivashinsky equation seen on few points, by nets with a memory and without.

    python benchmarks/memory.py                    # what is missing; hours on two cores, can be stopped at any time
    python benchmarks/memory.py --quick            # a few updates of each, on a few trajectories: that everything runs
    python benchmarks/memory.py --points 64 --nets memory --seeds 1
    python benchmarks/memory.py --choose           # on other trajectories: what is chosen is chosen here

After MemNO (Buitrago Ruiz, Marwah, Gu & Risteski 2024, arXiv 2409.02313): u_t + u u_x + u_xx + ν u_xxxx = 0 on a ring of length
64, from twenty waves of up to eight periods, made on 512 points and seen on 32, 64 or 128 of them; 26 frames 0.1 apart, 2,048
trajectories to learn from and 256 to be tested on. The nets have the same convolutions and as many parameters; one has an LRU at
every place in each block. They are taught with stretches of frames hidden (`free_runs_loss`), or one step ahead. Three scores,
geometric means over frames of the relative error: of a rollout of frames 5 to 25 after five true ones, of the same after frame 4
alone, and one step ahead after six true frames or more. Every finished run is written to `memory_<ν>_<points>.json` at once.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import exponax as ex
import jax
import numpy as np
import optax
from kept import in_order, read, run_missing, spread
from speed import table

from ssm_lib import Forecaster, fit, fit_normalizer, free_runs_loss, next_frame_loss, nrmse, rollout, window_batches
from ssm_lib.recipes import residual_conv

FRAMES, KNOWN, BATCH, UPDATES, RATE = 26, 5, 8, 5000, 6e-3
VISCOSITIES, POINTS, SEEDS = (0.075, 0.1, 0.15), (32, 64, 128), 3
RESULTS = Path(__file__).parent / "results"


def trajectories(viscosity, n, seed):
    "(n, FRAMES, 512, 1) float32."
    equation = partial(ex.stepper.KuramotoSivashinskyConservative, convection_scale=1.0, second_order_scale=1.0)
    stepper = ex.RepeatedStepper(equation(1, 64.0, 512, 0.01, fourth_order_scale=viscosity), 10)
    rng, x = np.random.default_rng(seed), np.arange(512) / 512
    size, periods, phase = rng.uniform(-0.5, 0.5, (20, n, 1)), rng.integers(1, 9, (20, n, 1)), rng.uniform(0, 2 * np.pi, (20, n, 1))
    start = np.float32(sum(a * np.sin(2 * np.pi * k * x + p) for a, k, p in zip(size, periods, phase)))[:, None]
    run = jax.jit(jax.vmap(ex.rollout(stepper, FRAMES - 1, include_init=True)))
    made = [np.asarray(run(start[i : i + 64]), np.float32) for i in range(0, n, 64)]
    return np.moveaxis(np.concatenate(made), 2, -1)


class Contender(NamedTuple):
    "A net and how it is taught."

    memory: bool
    rezero: bool = True
    free_runs: bool = True
    restarts: float = 0.0  # in free runs


NETS = {
    "memory": Contender(True, restarts=0.05),
    "no memory": Contender(False),
    "memory, one step": Contender(True, free_runs=False),
    "no memory, one step": Contender(False, free_runs=False),
    "memory, no restarts": Contender(True),
    "memory, no restarts, open from the start": Contender(True, rezero=False),
}


def net(points, contender):
    "Residual convolutions; with a memory at each place narrower, so that parameters are as many."
    if not contender.memory:
        return residual_conv(points, 1, width=29, n_layers=4)
    return residual_conv(points, 1, width=24, n_layers=4, memory=16).clone(rezero=contender.rezero)


def by_lead(x):
    "Root mean square of x[k + lead] − x[k], (leads, 1)."
    return np.array([[np.sqrt(np.mean(np.square(x[:, lead:] - x[:, :-lead])))] for lead in range(1, x.shape[1])], np.float32)


def middle(errors):
    "Geometric mean."
    return float(f"{np.exp(np.log(errors).mean()):.4g}")


def score(model, variables, test):
    "Errors of rollouts with a history and without, and one step ahead."
    truth, bounded = test[:, KNOWN:], lambda y: np.clip(np.nan_to_num(np.asarray(y, np.float64), nan=1e30), -1e30, 1e30)
    run = lambda history: nrmse(bounded(rollout(model, variables, history, truth.shape[1], check=False)), truth)
    five, one = run(test[:, :KNOWN]), run(test[:, KNOWN - 1 : KNOWN])
    ahead = nrmse(bounded(jax.jit(model.apply)(variables, test[:, :-1]))[:, KNOWN:], test[:, KNOWN + 1 :])
    told = {str(k): float(f"{five[k - 1]:.4g}") for k in (1, 2, 3, 5, 10, 15, 20) if k <= len(five)}
    return {"five": middle(five), "one": middle(one), "step": middle(ahead), "errors": told}


def one_run(points, train, test, updates, kind, seed):
    "Train a net and score it."
    contender = NETS[kind]
    model = Forecaster(net(points, contender), *fit_normalizer(train), gaps=contender.free_runs)
    variables = jax.jit(model.init)(jax.random.PRNGKey(seed), train[:1, :2])
    units = by_lead(train[:256])
    freely = partial(free_runs_loss, scale=units, longest=20, restarts=contender.restarts)
    taught = freely if contender.free_runs else partial(next_frame_loss, scale=units[0])
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, updates // 10, updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    batches = window_batches(train, BATCH, FRAMES, seed=seed)
    variables, losses = fit(partial(taught, model), variables, batches, optimizer, updates, seed=seed)
    parameters = sum(p.size for p in jax.tree.leaves(variables["params"]))
    sizes = {"rate": RATE, "parameters": parameters, "updates": updates, "batch": BATCH, "trajectories": len(train)}
    last = float(f"{losses[-updates // 20 - 1 :].mean():.4g}")
    return {"config": contender._asdict() | sizes, "loss": last} | score(model, variables, test)


def gathered(folder):
    "(viscosity, points) → contender → its runs."
    files = {(nu, n): folder / f"memory_{nu:g}_{n}.json" for nu in VISCOSITIES for n in POINTS}
    return {key: in_order(read(file)) for key, file in files.items() if file.exists()}


def scores(found, viscosity):
    "Markdown: the three scores of each net, median [quartiles] and how many seeds."
    rows = []
    for points in POINTS:
        for kind in NETS:
            if runs := found.get((viscosity, points), {}).get(kind):
                cells = [spread([run[name] for run in runs]) for name in ("five", "one", "step")]
                rows.append([str(points), f"{kind}, {len(runs)}", *cells])
    return table(["points", "net, seeds", "after five true frames", "after one", "one step ahead"], rows)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--viscosities", nargs="+", type=float, choices=VISCOSITIES, default=VISCOSITIES)
    parser.add_argument("--points", nargs="+", type=int, choices=POINTS, default=POINTS)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most so many")
    parser.add_argument("--quick", action="store_true", help="three updates, few trajectories")
    parser.add_argument("--choose", action="store_true", help="score on other trajectories (seed 1); the results go to runs/")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(args)
    usual = RESULTS if not (args.quick or args.choose) else Path("runs/memory")
    folder, updates, seeds = args.out or usual, 3 if args.quick else UPDATES, 1 if args.quick else args.seeds
    for viscosity in args.viscosities:
        train = trajectories(viscosity, 8 if args.quick else 2048, seed=0)
        test = trajectories(viscosity, 4 if args.quick else 256, seed=1 if args.choose else 2)
        for points in args.points:
            apart = 512 // points
            run = partial(one_run, points, train[:, :, ::apart], test[:, :, ::apart], updates)
            run_missing(folder / f"memory_{viscosity:g}_{points}.json", args.nets, seeds, run)
        print(scores(gathered(folder), viscosity))


if __name__ == "__main__":
    main()
