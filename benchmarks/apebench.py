"""Scores on APEBench's protocol (Koehler, Niedermayr, Westermann & Thuerey 2024, arXiv 2411.00180).

    python benchmarks/apebench.py                        # what is missing; hours on two cores, can be stopped at any time
    python benchmarks/apebench.py --quick                # a few updates of each, on a few trajectories: that everything runs
    python benchmarks/apebench.py --cases kdv --nets ssm_lib --seeds 1
    python benchmarks/apebench.py --choose --nets ssm_lib  # on other trajectories: what is chosen is chosen here

Exponax makes the data: 50 trajectories of 50 steps to learn from (seed 0), 30 of 200 to be tested on (seed 773), beginning with
five random Fourier modes. Each net has at most 33,000 parameters and sees 10,000 batches of 20 pairs of consecutive frames, with
Adam, a learning rate that rises to 1e-3 over the first 2,000 and falls as a cosine. The score is the geometric mean over the
first 100 steps of a rollout of the relative error, averaged over trajectories. `OTHERWISE` holds what is trained in other ways;
its scores go to files of their own. Every finished run is written to `apebench_<case>.json` at once.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import exponax as ex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from kept import digits, in_order, read, run_missing, spread
from speed import table

from ssm_lib import Forecaster, Recurrent, fit, fit_band, fit_normalizer, next_frame_loss, nrmse, rollout, window_batches
from ssm_lib.recipes import conv_spectral, residual_conv
from ssm_lib.space import Spectral

BUDGET, LEADS, UPDATES, BATCH, RATE = 33_000, 100, 10_000, 20, 1e-3
TOLD = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)  # leads whose errors are kept
RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    "An equation in difficulties, as APEBench has it, and its published medians."

    title: str
    axes: int
    points: int
    linear: tuple  # difficulties, from order 0
    nonlinear: tuple  # of u², of (u²)ₓ/2, of |∇u|²/2
    conserving: bool  # the second in conservation form, which is a stepper of its own
    warmup: int  # frames thrown away
    seeds: int
    published: dict  # net: median; those of "ks" and "ks_2d" are read from a figure, within 0.003


CASES = {
    "burgers": Case(
        "Burgers", 1, 160, (0, 0, 1.5), (0, -1.5, 0), True, 0, 5,
        {"Conv": 0.0265, "Res": 0.0128, "UNet": 0.0649, "FNO": 0.0698, "Dil": 0.0571},
    ),
    "kdv": Case(
        "Korteweg–de Vries", 1, 160, (0, 0, 0, -14, -9), (0, -2, 0), False, 0, 5,
        {"Conv": 0.1225, "Res": 0.876, "UNet": 0.0963, "FNO": 0.210, "Dil": 0.0769},
    ),
    "ks_cons": Case(
        "Kuramoto–Sivashinsky, conservative", 1, 160, (0, 0, -2, 0, -18), (0, -1, 0), True, 500, 5,
        {"Conv": 0.343, "Res": 0.242, "UNet": 0.411, "FNO": 1.04, "Dil": 0.284},
    ),
    "ks": Case(
        "Kuramoto–Sivashinsky", 1, 160, (0, 0, -1.2, 0, -15), (0, 0, -6), False, 500, 5,
        {"Conv": 0.270, "Res": 0.262, "UNet": 0.193, "FNO": 0.537, "Dil": 0.157},
    ),
    "ks_2d": Case(
        "Kuramoto–Sivashinsky, 32 × 32", 2, 32, (0, 0, -1.2, 0, -15), (0, 0, -6), False, 500, 3,
        {"Conv": 0.479, "Res": 0.450, "UNet": 0.331, "FNO": 0.303, "Dil": 0.291},
    ),
}  # fmt: skip


def trajectories(case, n, frames, seed):
    "(n, frames, *space, 1) float32."
    if case.conserving:
        stepper = ex.stepper.generic.DifficultyConvectionStepper(
            case.axes, case.points, linear_difficulties=case.linear, convection_difficulty=-case.nonlinear[1], conservative=True
        )
    else:
        stepper = ex.stepper.generic.DifficultyNonlinearStepper(
            case.axes, case.points, linear_difficulties=case.linear, nonlinear_difficulties=case.nonlinear
        )
    waves = ex.ic.RandomTruncatedFourierSeries(case.axes, cutoff=5, offset_range=(0.0, 0.0), max_one=True)
    start = ex.build_ic_set(waves, num_points=case.points, num_samples=n, key=jax.random.PRNGKey(seed))

    def run(u):
        u = ex.repeat(stepper, case.warmup)(u) if case.warmup else u
        return ex.rollout(stepper, frames - 1, include_init=True)(u)

    return np.moveaxis(np.asarray(jax.jit(jax.vmap(run))(start), np.float32), 2, -1)


def arrays_of(net):
    "What a net of Equinox learns, and the rest of it."
    import equinox as eqx

    return eqx.partition(net, eqx.is_inexact_array)


class Equinox(Recurrent):
    "A net of Equinox, (C, *space) → (C, *space), as a model of this library without memory."

    make: Callable  # of a key
    frame: tuple
    has_memory = False

    def setup(self):
        self.net = self.param("net", lambda key: arrays_of(self.make(key))[0])

    def stretch(self, x, carry, times):
        import equinox as eqx

        rest = arrays_of(self.make(jax.random.PRNGKey(0)))[1]
        flat = jnp.moveaxis(x.reshape(-1, *self.frame), -1, 1)
        y = jax.vmap(eqx.combine(self.net, rest))(flat)
        return carry, jnp.moveaxis(y, 1, -1).reshape(x.shape)


def published(case, kind, **sizes):
    "A net of pdequinox, as APEBench has it on a line; on a grid with the same budget."
    import pdequinox as pdeqx

    make = partial(getattr(pdeqx.arch, kind), case.axes, 1, 1, activation=nn.relu, **sizes)
    return Equinox(lambda key: make(key=key), (case.points,) * case.axes + (1,))


def conv(case):
    return published(case, "ConvNet", **({"hidden_channels": 34, "depth": 10} if case.axes == 1 else {"hidden_channels": 21, "depth": 9}))


def res(case):
    sizes = {"hidden_channels": 26, "num_blocks": 8} if case.axes == 1 else {"hidden_channels": 16, "num_blocks": 7}
    return published(case, "ClassicResNet", **sizes)


def ours(case, **changed):
    "Convolutions with filters of the lowest waves."
    own = {"width": 31, "modes": 32} if case.axes == 1 else {"width": 14, "modes": 8}
    own |= {"n_layers": 4, "depthwise": True, "gain": 3.0, "activation": "silu"}
    return conv_spectral((case.points,) * case.axes, 1, **own | changed)


def local(case):
    "The same without filters."
    net = residual_conv((case.points,) * case.axes, 1, width=36 if case.axes == 1 else 20, n_layers=4, gain=3.0)
    return net.clone(activation="silu")


def increments(net, train, banded=True):
    "The net's answers as increments in units of those in the data; within the band in which the data change."
    return Forecaster(net, *fit_normalizer(train), band=fit_band(train) if banded else None)


def at_random(net):
    "The same with filters that begin as random numbers."
    def mend(space):
        if isinstance(space, Spectral):
            return space.clone(W_init=None)
        parts = getattr(space, "parts", None)
        return space.clone(parts=tuple(map(mend, parts))) if parts else space

    return net.clone(space=mend(net.space))


NETS = {  # (case, train) → a model; trained as the protocol says
    "ssm_lib": lambda case, train: increments(ours(case), train),
    "ssm_lib, gain 1": lambda case, train: increments(ours(case, gain=1.0), train),
    "ssm_lib, gelu": lambda case, train: increments(ours(case, activation="gelu"), train),
    "ssm_lib without a band": lambda case, train: increments(ours(case), train, banded=False),
    "ssm_lib without filters": lambda case, train: increments(local(case), train),
    "ssm_lib, filters begin at random": lambda case, train: increments(at_random(ours(case)), train),
    "Res": lambda case, train: res(case),
    "Res, increments": lambda case, train: increments(res(case), train, banded=False),
    "Res, increments in the band": lambda case, train: increments(res(case), train),
    "Conv": lambda case, train: conv(case),
    "Conv, increments": lambda case, train: increments(conv(case), train, banded=False),
    "Conv, increments in the band": lambda case, train: increments(conv(case), train),
}


class Training(NamedTuple):
    "What differs from the protocol."

    net: str
    rate: float = RATE
    average: float | None = None  # share of the past in averaged weights


OTHERWISE = {
    "ssm_lib, averaged weights": Training("ssm_lib", average=0.999),
    "ssm_lib, gain 1, rate 3e-3": Training("ssm_lib, gain 1", rate=3e-3),
    "Res, rate 3e-3": Training("Res", rate=3e-3),
    "Res, increments, rate 3e-3": Training("Res, increments", rate=3e-3),
    "Res, increments in the band, rate 3e-3": Training("Res, increments in the band", rate=3e-3),
    "Conv, rate 3e-3": Training("Conv", rate=3e-3),
}


def score(model, variables, test):
    "Errors of rollouts from the first frame, and their geometric mean."
    truth = test[:, 1 : LEADS + 1]
    made = np.asarray(rollout(model, variables, test[:, :1], truth.shape[1], check=False), np.float64)
    errors = nrmse(np.clip(np.nan_to_num(made, nan=1e30), -1e30, 1e30), truth)
    told = {str(k): float(f"{errors[k - 1]:.4g}") for k in TOLD if k <= len(errors)}
    return {"score": float(f"{np.exp(np.log(errors).mean()):.4g}"), "errors": told}


def one_run(case, trainings, train, test, updates, kind, seed):
    "Train a net and score it."
    training = trainings[kind]
    model = NETS[training.net](case, train)
    variables = jax.jit(model.init)(jax.random.PRNGKey(seed), train[:1, :1])
    parameters = sum(p.size for p in jax.tree.leaves(variables["params"]))
    schedule = optax.warmup_cosine_decay_schedule(0.0, training.rate, updates // 5, updates)
    units = getattr(model, "increment_std", (1.0,))[0]
    loss = partial(next_frame_loss, model, scale=units)
    batches = window_batches(train, BATCH, 2, seed=seed)
    variables, losses = fit(loss, variables, batches, optax.adam(schedule), updates, seed=seed, average=training.average)
    last = float(f"{losses[-updates // 20 - 1 :].mean():.4g}")
    config = training._asdict() | {"parameters": parameters, "updates": updates, "batch": BATCH}
    return {"config": config, "loss": last} | score(model, variables, test)


def gathered(folder, ending=""):
    "case → contender → its runs."
    files = {name: folder / f"apebench_{name}{ending}.json" for name in CASES}
    return {name: in_order(read(file)) for name, file in files.items() if file.exists()}


def scores(found, kinds, peers=False):
    "Markdown: what contenders reached, median [quartiles] and how many seeds; and the published medians."
    head = ["", *[CASES[name].title for name in found]]
    rows = []
    for kind in kinds:
        runs = [case.get(kind, []) for case in found.values()]
        cells = [f"{spread([r['score'] for r in some])}, {len(some)}" if some else "–" for some in runs]
        rows += [[kind, *cells]] if any(runs) else []
    if peers:
        for kind in ("Conv", "Res", "UNet", "FNO", "Dil"):
            rows.append([f"{kind}, published", *[digits(CASES[name].published[kind]) for name in found]])
    return table(head, rows)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--nets", nargs="+", choices=[*NETS, *OTHERWISE], help="some of the contenders (default: all)")
    parser.add_argument("--seeds", type=int, help="at most so many")
    parser.add_argument("--quick", action="store_true", help="ten updates, few trajectories")
    parser.add_argument("--choose", action="store_true", help="score on other trajectories (seed 1); the results go to runs/")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(args)
    usual = RESULTS if not (args.quick or args.choose) else Path("runs/apebench")
    folder, updates = args.out or usual, 10 if args.quick else UPDATES
    chosen = args.nets or [*NETS, *OTHERWISE]
    for name in args.cases:
        case = CASES[name]
        seeds = 1 if args.quick else min(args.seeds or case.seeds, case.seeds)
        train = trajectories(case, 2 if args.quick else 50, 11 if args.quick else 51, seed=0)
        test = trajectories(case, 2 if args.quick else 30, 11 if args.quick else 201, seed=1 if args.choose else 773)
        for ending, known in ("", {kind: Training(kind) for kind in NETS}), ("_otherwise", OTHERWISE):
            run = partial(one_run, case, known, train, test, updates)
            run_missing(folder / f"apebench_{name}{ending}.json", [kind for kind in known if kind in chosen], seeds, run)
    print(scores(gathered(folder), NETS, peers=True), scores(gathered(folder, "_otherwise"), OTHERWISE), sep="\n\n")


if __name__ == "__main__":
    main()
