"""One rate to learn, others to be used at: filters trained at one sampling rate, tested at half, twice and irregular ones, with gaps.

    python benchmarks/timescales.py             # what is missing; half an hour on two cores, can be stopped at any time
    python benchmarks/timescales.py --quick     # a few updates of each: that everything runs
    python benchmarks/timescales.py --choose    # on other records: what is chosen is chosen here

Two damped oscillators are driven by white noise, and an instrument reports the mean of their sum over each interval, with white
noise: the longer the interval, the less of it (variance 1/dt). The task is the first oscillator's displacement at the interval's
end. What can be known is known: the Kalman filter for the same intervals is the best estimate there is, and, as intervals are
short against the oscillations, about as good at all these rates (Kalman & Bucy 1961). A score is a net's root mean square error
over the Kalman filter's. Nets see intervals of 0.1 in training, and in the test as their `dt` and `mask` what differs, nothing
else. Every finished run is written to `timescales.json` at once.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from kept import in_order, read, run_missing, spread
from speed import table

from ssm_lib import LRU, S5SSM, BatchStackedSSMModel, fit

DT, LENGTH, BATCH, UPDATES, RATE, SEEDS = 0.1, 256, 32, 3000, 4e-3, 3
NOISE, BURN = 0.1, 12.8  # spectral density of the instrument's noise; time before errors count
RESULTS = Path(__file__).parent / "results"


def oscillator(frequency, damping):
    return np.array([[0.0, 1.0], [-(frequency**2), -damping]])


A = scipy.linalg.block_diag(oscillator(1.0, 0.2), oscillator(3.0, 0.3))
DRIVE = np.diag([0.0, 0.5, 0.0, 2.5])  # spectral density of the noise on velocities
SUM = np.array([1.0, 0.0, 1.0, 0.0])


def step_of(dt):
    "Of an interval, for the state and the integral of the sum over it: transition (5, 5), covariance of what is added."
    big = np.zeros((5, 5))
    big[:4, :4], big[4, :4] = A, SUM
    Q = scipy.linalg.block_diag(DRIVE, NOISE)
    both = scipy.linalg.expm(np.block([[-big, Q], [np.zeros((5, 5)), big.T]]) * dt)  # Van Loan 1978
    transition = both[5:, 5:].T
    return transition, transition @ both[:5, 5:]


def records(intervals, n, seed):
    "Observations and displacements, (n, L) each, of the same intervals (L,) for all."
    rng, cache = np.random.default_rng(seed), {}
    start = np.linalg.cholesky(scipy.linalg.solve_continuous_lyapunov(A, -DRIVE) + 1e-12 * np.eye(4))
    x, seen, truth = rng.normal(size=(n, 4)) @ start.T, [], []
    for dt in intervals:
        F, Q = cache[dt] = cache.get(dt) or step_of(dt)
        new = np.c_[x, np.zeros(n)] @ F.T + rng.normal(size=(n, 5)) @ np.linalg.cholesky(Q + 1e-14 * np.eye(5)).T
        x = new[:, :4]
        seen.append(new[:, 4] / dt), truth.append(x[:, 0])
    return np.float32(np.stack(seen, 1)), np.float32(np.stack(truth, 1))


def kalman(seen, intervals, there):
    "The best estimate of the first displacement, (n, L), from what is there."
    n, cache = len(seen), {}
    x, P, made = np.zeros((n, 4)), scipy.linalg.solve_continuous_lyapunov(A, -DRIVE), []
    for k, dt in enumerate(intervals):
        F, Q = cache[dt] = cache.get(dt) or step_of(dt)
        both, cov = np.c_[x, np.zeros(n)] @ F.T, F @ scipy.linalg.block_diag(P, 0.0) @ F.T + Q
        if there[k]:
            gain = cov[:, 4] / cov[4, 4]
            both, cov = both + np.outer(seen[:, k] * dt - both[:, 4], gain), cov - np.outer(gain, cov[4])
        x, P = both[:, :4], cov[:4, :4]
        made.append(x[:, 0])
    return np.stack(made, 1)


def stationary(seen, intervals, there, free=False):
    """The filter whose gains are best without gaps and never change (Kalman & Bucy 1961), told what nets are told: after a gap,
    how long it was. Or free: while nothing is observed, the oscillators swing on by themselves."""
    P = scipy.linalg.solve_continuous_are(A.T, SUM[:, None], DRIVE, [[NOISE]])
    gain = P @ SUM / NOISE
    both = np.block([[A - np.outer(gain, SUM), gain[:, None]], [np.zeros((1, 5))]])  # an interval's mean, held for its length
    x, made, lengths = np.zeros((len(seen), 4)), [], intervals if free else DT * elapsed(intervals, there)
    for k in range(len(there)):
        if there[k]:
            x = np.c_[x, seen[:, k]] @ scipy.linalg.expm(both * lengths[k])[:4].T
        elif free:
            x = x @ scipy.linalg.expm(A * lengths[k]).T
        made.append(x[:, 0])
    return np.stack(made, 1)


def tests():
    "name → intervals and which of them were observed."
    rng, total = np.random.default_rng(5), LENGTH * DT
    uneven = np.round(np.exp(rng.uniform(np.log(0.5), np.log(2), 400)) * DT, 3)
    uneven = uneven[np.cumsum(uneven) < total]
    everywhere = lambda n: np.ones(n, bool)
    lost = np.ones(LENGTH, bool)
    for start in rng.choice(np.arange(4, LENGTH - 8), 16, replace=False):
        lost[start : start + rng.integers(1, 7)] = False
    return {
        "as trained": (np.full(LENGTH, DT), everywhere(LENGTH)),
        "twice as often": (np.full(2 * LENGTH, DT / 2), everywhere(2 * LENGTH)),
        "half as often": (np.full(LENGTH // 2, 2 * DT), everywhere(LENGTH // 2)),
        "irregular": (uneven, everywhere(len(uneven))),
        "with gaps": (np.full(LENGTH, DT), lost),
    }


class Gated(nn.Module):
    "A GRU; with dt beside the input, or without."

    width: int
    told: bool

    @nn.compact
    def __call__(self, z, dt, mask):
        z = jnp.where(mask[:, None], z, 0)
        z = jnp.concatenate([z, jnp.broadcast_to(dt[:, None], z.shape)], -1) if self.told else z
        return nn.Dense(1)(nn.RNN(nn.GRUCell(self.width))(z))


class Windowed(nn.Module):
    "Causal convolutions, each twice as far as the one before."

    width: int
    layers: int = 6

    @nn.compact
    def __call__(self, z, dt, mask):
        z = nn.Dense(self.width)(jnp.where(mask[:, None], z, 0))
        for k in range(self.layers):
            z = z + nn.Conv(self.width, (3,), kernel_dilation=2**k, padding=[(2 * 2**k, 0)])(nn.gelu(z))
        return nn.Dense(1)(z)


class Clocked(nn.Module):
    "A stack of state-space layers that is told dt and mask; with two outputs, the second is what is observed next."

    ssm: Callable
    width: int
    out: int = 1

    @nn.compact
    def __call__(self, z, dt, mask):
        net = BatchStackedSSMModel(self.ssm, d_model=1, d_vars=self.out, n_layers=2, width=self.width, activation="gelu", norm="none")
        return net(jnp.repeat(z[..., None], self.out, -1), dt=dt, mask=mask)[..., 0, :]


NETS = {
    "S5": Clocked(partial(S5SSM, d_hidden=32, blocks=1), 16),
    "S5, gaps by its own forecast": Clocked(partial(S5SSM, d_hidden=32, blocks=1), 16, out=2),
    "LRU": Clocked(partial(LRU, d_hidden=16), 16),
    "GRU": Gated(24, False),
    "GRU, dt beside": Gated(24, True),
    "convolutions": Windowed(16),
}


def elapsed(intervals, there):
    "Time since what was last observed, in units of DT; of what is lost, its own."
    since, made = 0.0, []
    for dt, here in zip(intervals, there):
        made.append((since + dt) / DT if here else dt / DT)
        since = 0.0 if here else since + dt
    return np.float32(made)


def answers(net, variables, z, intervals, there):
    "Displacements (n, L). Where an interval is lost, a net that forecasts what is observed next reads its own forecast."
    run = jax.jit(net.apply)
    if getattr(net, "out", 1) == 1:
        return run(variables, z[..., None], elapsed(intervals, there), there)[..., 0]
    longest = max((len([*stretch]) for here, stretch in groupby(there) if not here), default=0)
    read = np.where(there, z, 0)
    for _ in range(longest + 1):  # each time, one step of every gap is filled for good
        y = np.asarray(run(variables, read[..., None], np.float32(intervals / DT), np.ones_like(there)))
        read = np.where(there, z, np.concatenate([read[:, :1], y[:, :-1, 1]], 1))
    return y[..., 0]


def error_of(made, truth, intervals, there):
    "Root mean square, once the start is forgotten, of intervals that were observed."
    late = (np.cumsum(intervals) > BURN) & there
    return np.sqrt(np.mean((np.asarray(made, np.float64) - truth)[:, late] ** 2))


def one_run(updates, n, seed_of_test, kind, seed):
    "Train a net at one rate and score it at all."
    net = NETS[kind]
    seen, truth = records(np.full(LENGTH, DT), n, seed=0)
    always, ones = jnp.ones(LENGTH, bool), jnp.ones(LENGTH)
    variables = jax.jit(net.init)(jax.random.PRNGKey(seed), seen[:1, :, None], ones, always)
    skip = int(BURN / DT)

    def loss(variables, batch, key):
        z, x = batch
        y = net.apply(variables, z[..., None], ones, always)[:, skip:]
        ahead = jnp.mean((y[:, :-1, 1:] - z[:, skip + 1 :, None]) ** 2) if y.shape[-1] == 2 else 0.0
        return jnp.mean((y[..., 0] - x[:, skip:]) ** 2) + ahead

    rng = np.random.default_rng(seed)
    batches = ((seen[i], truth[i]) for i in (rng.integers(n, size=BATCH) for _ in range(updates)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, updates // 10, updates)
    variables, losses = fit(loss, variables, batches, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), updates)
    scores = {}
    for name, (intervals, there) in tests().items():
        z, x = records(intervals, n // 4, seed=seed_of_test)
        both = answers(net, variables, z, intervals, there), kalman(z, intervals, there)
        error, best = (error_of(made, x, intervals, there) for made in both)
        told = {"error": error, "best": best, "ratio": error / best}
        scores[name] = {key: float(f"{value:.4g}") for key, value in told.items()}
    parameters = sum(p.size for p in jax.tree.leaves(variables["params"]))
    return {"config": {"parameters": parameters, "updates": updates, "batch": BATCH, "rate": RATE, "records": n}, "scores": scores}


def gathered(folder):
    "contender → its runs."
    return in_order(read(folder / "timescales.json"))


FIXED = {"best gains without gaps": stationary, "the same, free in gaps": partial(stationary, free=True)}


def fixed(n=512, seed_of_test=2):
    "What filters of fixed gains reach: filter → test → error over the Kalman filter's."
    found = {kind: {} for kind in FIXED}
    for name, (intervals, there) in tests().items():
        z, x = records(intervals, n, seed=seed_of_test)
        best = error_of(kalman(z, intervals, there), x, intervals, there)
        for kind, filt in FIXED.items():
            found[kind][name] = error_of(filt(z, intervals, there), x, intervals, there) / best
    return found


def scores(found):
    "Markdown: error over the Kalman filter's, median [quartiles] over seeds; and that of filters with fixed gains."
    ratios = lambda runs, name: [run["scores"][name]["ratio"] for run in runs]
    rows = [[f"{kind}, {len(runs)}", *[spread(ratios(runs, name)) for name in tests()]] for kind, runs in found.items()]
    rows += [[kind, *[f"{ratio:.3f}" for ratio in reached.values()]] for kind, reached in fixed().items()]
    return table(["net, seeds", *tests()], rows)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most so many")
    parser.add_argument("--quick", action="store_true", help="three updates, few records")
    parser.add_argument("--choose", action="store_true", help="score on other records (seed 1); the results go to runs/")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(args)
    folder = args.out or (RESULTS if not (args.quick or args.choose) else Path("runs/timescales"))
    run = partial(one_run, 3 if args.quick else UPDATES, 32 if args.quick else 2048, 1 if args.choose else 2)
    run_missing(folder / "timescales.json", args.nets, 1 if args.quick else args.seeds, run)
    print(scores(gathered(folder)))


if __name__ == "__main__":
    main()
