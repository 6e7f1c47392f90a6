"""What a layer can remember: a delay, copying, and copying of what matters, to 65,536 steps, beside the bound of theory.

    python benchmarks/recall.py             # what is missing; two hours on two cores, can be stopped at any time
    python benchmarks/recall.py --quick     # three updates of each: that everything runs
    python benchmarks/recall.py --choose    # on other sequences: what is chosen is chosen here

*Delay* (after Voelker, Kajić & Eliasmith 2019, NeurIPS 32): a signal takes a new random value every so many steps, and the answer
is the one that began a given number of steps ago. A bare layer, one feature in, one out, 64 numbers of state. *Copying*
(Hochreiter & Schmidhuber 1997; Arjovsky, Shah & Bengio 2016): ten of eight symbols, blanks, then the symbols again. *Selective
copying* (Gu & Dao 2023, section 3.1): sixteen of sixteen symbols at random places among noise, then the symbols in their order.

Where an input does not change, a layer that takes `dt` is the same function of one long step as of many short ones, so
delays and copying are learnt on one step per value, with its length as `dt`; and scored on all steps, one by one. Every
finished run is written to `recall_<task>_<size>.json` at once.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import scipy.signal
from kept import in_order, read, run_missing, spread
from speed import table

from ssm_lib import DSS, LRU, S4, S4D, S5SSM, SequenceLayer, fit

UPDATES, RATE, SEEDS, STATE = 2000, 4e-3, 3, 64
DELAYS = [(16, 64), (16, 1024), (16, 65536), (64, 1024), (64, 65536), (256, 1024), (256, 65536)]  # values, steps
BLANKS = [16, 128, 1024, 65536]
LENGTHS = [64, 256]
FAR = 65536  # symbols among so much noise, for a net that is told what is noise
RESULTS = Path(__file__).parent / "results"


def recalled(poles, lags):
    """The share of a white input's variance, at each of so many lags, that a linear layer with these poles (N,) still holds.

    An all-pass filter with the same poles has an impulse response b of energy 1; what a layer can say of the input d steps
    ago is what comes of b after step d. So the share falls with d, and its sum over all lags is N: whatever the poles, and
    whatever B and C, the share at lag d is at most N/(d + 1).
    """
    b = scipy.signal.unit_impulse(lags).astype(complex)
    for pole in poles:
        b = scipy.signal.lfilter([-np.conj(pole), 1], [1, -pole], b)
    return 1 - np.cumsum(np.abs(b) ** 2)


def beginning(layer, dt=1.0):
    "The poles of a step of length dt that a layer begins with, one of each pair, its input gains and matrix; complex128."
    variables = layer.init(jax.random.PRNGKey(0), jnp.zeros((2, layer.d_model)))
    system = layer.bind(variables).system()
    poles, gains = (np.asarray(part, complex).ravel() for part in system.step(jnp.full(1, dt)))
    return poles, gains, np.asarray(system.B, complex)


def poles_of(layer, dt=1.0):
    "All its poles, (N,): both of each pair, real ones once."
    half = beginning(layer, dt)[0]
    return np.concatenate([half, half[half.imag != 0].conj()])


def faintest(layer, blanks, count=10, symbols=8):
    """The faintest over the strongest trace, in the state after so many blanks, of `count` symbols, as a layer begins that mixes features.

    Each symbol is one of the first `symbols` features; the least and the largest singular value of what can differ between
    sequences. Below 1e-7, float32 can't tell the faintest from rounding.
    """
    poles, gains, B = beginning(layer)
    differ = (gains[:, None] * B[:, :symbols]) @ scipy.linalg.helmert(symbols).T
    traces = poles[:, None, None] ** (blanks + np.arange(count))[:, None] * differ[:, None]
    traces = traces.reshape(len(poles), -1)
    values = np.linalg.svd(np.concatenate([traces.real, traces.imag]), compute_uv=False)
    return values[-1] / values[0]


class Contender(NamedTuple):
    "A layer, and how fast its poles learn beside the rest."

    net: nn.Module
    pole_rate: float = 1.0
    steps: float = np.inf  # longest delay, or blanks, it is run on: the others would take hours
    by_dt: bool = True  # whether one long step stands for many


class Gated(nn.Module):
    "A GRU and what is read from it."

    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.RNN(nn.GRUCell(self.width))(x))


class Told(nn.Module):
    "A layer, or a GRU, and a net of one hidden layer for what it shows at the end."

    layer: nn.Module
    last: int
    symbols: int

    @nn.compact
    def __call__(self, x, **times):
        return nn.Dense(self.symbols)(nn.gelu(nn.Dense(64)(self.layer(x, **times)[:, -self.last :])))


class Blocks(nn.Module):
    "Two blocks over symbols; with a mask, they pass over noise."

    ssm: Any
    masked: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(Selective.symbols + 2, 64)(ids)
        mask = ids != Selective.symbols if self.masked else None
        for _ in range(2):
            x = SequenceLayer(self.ssm, 64, activation="full_glu")(x, mask=mask)
        return nn.Dense(Selective.symbols)(x[:, -Selective.count :])


class GatedSymbols(nn.Module):
    "A GRU over symbols."

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(Selective.symbols + 2, 64)(ids)
        return Told(nn.RNN(nn.GRUCell(128)), Selective.count, Selective.symbols)(x)


def ring(turns, steps, size, d_model):
    "An LRU that still has a twentieth to a half of its state after so many steps."
    return LRU(size // 2, d_model, r_min=0.05 ** (1 / steps), r_max=0.5 ** (1 / steps), max_phase=turns)


class Delay(NamedTuple):
    "The value that began `steps` ago, of a signal that took `values` of them since."

    values: int
    steps: int
    batch = 32
    name = property(lambda self: f"delay_{self.values}_{self.steps}")
    title = property(lambda self: f"{self.values} values, {self.steps:,} steps")
    held = property(lambda self: self.steps // self.values)

    def nets(self):
        near = {"dt_min": 2 / self.steps, "dt_max": 2.001 / self.steps}
        return {
            "S5": Contender(S5SSM(1, STATE, blocks=1, dt_min=1 / self.steps, dt_max=20 / self.steps)),
            "S5 as it comes": Contender(S5SSM(1, STATE, blocks=1)),
            "LRU": Contender(ring(np.pi / self.held, self.steps, STATE, 1)),
            "LRU as it comes": Contender(LRU(STATE // 2, 1)),
            "S4D": Contender(S4D(1, STATE, **near)),
            "S4D, lin": Contender(S4D(1, STATE, poles="lin", **near)),
            "DSS": Contender(DSS(1, STATE, 4 * self.steps, kernel="exp", **near)),
            "S4": Contender(S4(1, STATE, 4 * self.steps, **near), steps=1024, by_dt=False),
            "GRU": Contender(Gated(STATE), steps=64, by_dt=False),
        }

    def batch_of(self, rng, n, by_dt):
        e = np.float32(rng.normal(size=(n, 4 * self.values)))
        truth = e[:, 2 * self.values + 1 : 3 * self.values + 1]
        if by_dt:
            return (e[..., None], {"dt": np.full(e.shape[1], self.held, np.float32)}), truth
        return (np.repeat(e, self.held, 1)[..., None], {}), truth

    def loss(self, y, truth):
        "Mean square error where a value has been held to its end, in the last quarter."
        held = y.shape[1] // (4 * self.values)
        return jnp.mean((y[:, held - 1 :: held, 0][:, 3 * self.values :] - truth) ** 2)

    score = loss


class Copy(NamedTuple):
    "Ten symbols again, after `steps` blanks."

    steps: int
    count, symbols, batch = 10, 8, 64
    name = property(lambda self: f"copy_{self.steps}")
    title = property(lambda self: f"{self.steps:,} blanks")

    def nets(self):
        told = partial(Told, last=self.count, symbols=self.symbols)
        slow = {"dt_min": 0.5 / self.steps, "dt_max": 20 / self.steps}
        width = self.symbols + 2
        return {
            "S5": Contender(told(S5SSM(width, 128, blocks=1, **slow)), 0.25),
            "S5, twice the state": Contender(told(S5SSM(width, 256, blocks=1, **slow)), 0.25),
            "LRU": Contender(told(ring(2 * np.pi, self.steps, 128, width)), 16 / self.steps),
            "S4D, lin": Contender(told(S4D(width, 32, poles="lin", **slow)), 0.25),
            "GRU": Contender(told(nn.RNN(nn.GRUCell(128))), steps=128, by_dt=False),
        }

    def batch_of(self, rng, n, by_dt):
        told = rng.integers(self.symbols, size=(n, self.count))
        ends = np.full((n, self.count), self.symbols + 1)
        ids = np.concatenate([told, np.full((n, 1 if by_dt else self.steps), self.symbols), ends], 1)
        x = np.eye(self.symbols + 2, dtype=np.float32)[ids]
        dt = np.ones(x.shape[1], np.float32)
        dt[self.count] = self.steps
        return (x, {"dt": dt} if by_dt else {}), told

    def loss(self, y, told):
        return optax.softmax_cross_entropy_with_integer_labels(y, told).mean()

    def score(self, y, told):
        return (y.argmax(-1) == told).mean()


class Selective(NamedTuple):
    "Sixteen symbols in their order, after `steps` in which they stood at random places among noise."

    steps: int
    count, symbols, batch = 16, 16, 32
    name = property(lambda self: f"selective_{self.steps}")
    title = property(lambda self: f"among {self.steps:,}")
    loss, score = Copy.loss, Copy.score

    def nets(self):
        slow = lambda steps: partial(S5SSM, d_hidden=128, blocks=1, dt_min=0.5 / steps, dt_max=20 / steps)
        of_ring = lambda d_model, steps: ring(2 * np.pi, steps, 128, d_model)
        return {
            "S5": Contender(Blocks(slow(self.steps)), by_dt=False),
            "LRU": Contender(Blocks(partial(of_ring, steps=self.steps)), by_dt=False),
            "GRU": Contender(GatedSymbols(), by_dt=False),
            "S5, noise masked": Contender(Blocks(slow(2 * self.count), True), by_dt=False),
            "LRU, noise masked": Contender(Blocks(partial(of_ring, steps=2 * self.count), True), by_dt=False),
        }

    def batch_of(self, rng, n, by_dt):
        told = rng.integers(self.symbols, size=(n, self.count))
        at = np.sort(np.argsort(rng.random((n, self.steps)), 1)[:, : self.count], 1)
        ids = np.full((n, self.steps + self.count), self.symbols, np.int32)
        ids[np.arange(n)[:, None], at], ids[:, self.steps :] = told, self.symbols + 1
        return (ids, {}), told


TASKS = [*(Delay(*size) for size in DELAYS), *map(Copy, BLANKS), *map(Selective, LENGTHS)]


def optimizer(pole_rate, updates):
    "Adam, with poles and steps at a rate of their own; S5's B is not among them, as it is in `make_optimizer`."
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, updates // 10, updates)
    poles = set(LRU.pole_parameters) | set(S4.pole_parameters)
    group = lambda path, _: "poles" if path[-1].key in poles else "rest"
    labels = partial(jax.tree_util.tree_map_with_path, group)
    rules = {"rest": optax.adam(schedule), "poles": optax.chain(optax.adam(schedule), optax.scale(pole_rate))}
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(rules, labels))


def scored(task, net, variables, rng, n, by_dt):
    "On n new sequences; of many steps few at a time."
    at_once = max(1, min(n, 2**20 // (4 * task.steps)))
    run, found = jax.jit(net.apply), []
    for _ in range(n // at_once):
        (x, times), truth = task.batch_of(rng, at_once, by_dt)
        found.append(float(task.score(run(variables, x, **times), truth)))
    return float(f"{np.mean(found):.4g}")


def one_run(task, updates, n, seed_of_test, kind, seed):
    "Train a net and score it step by step."
    net, pole_rate, _, by_dt = task.nets()[kind]
    rng = np.random.default_rng((3, seed))
    (x, times), _ = task.batch_of(rng, 1, by_dt)
    variables = jax.jit(net.init)(jax.random.PRNGKey(seed), x, **times)

    def loss(variables, batch, key):
        (x, times), wanted = batch
        return task.loss(net.apply(variables, x, **times), wanted)

    batches = (task.batch_of(rng, task.batch, by_dt) for _ in range(updates))
    variables, losses = fit(loss, variables, batches, optimizer(pole_rate, updates), updates)
    test = lambda task, by_dt, n: scored(task, net, variables, np.random.default_rng(seed_of_test), n, by_dt)
    parameters = sum(p.size for p in jax.tree.leaves(variables["params"]))
    told = {"loss": float(f"{losses[-updates // 20 - 1 :].mean():.4g}"), "score": test(task, False, n)}
    if by_dt:
        told["score by dt"] = test(task, True, n)
    if getattr(net, "masked", False):
        told[f"score among {FAR}"] = test(type(task)(FAR), False, min(n, 16))
    config = {"parameters": parameters, "updates": updates, "batch": task.batch, "rate": RATE, "pole_rate": pole_rate}
    return {"config": config} | told


def gathered(folder):
    "task → contender → its runs."
    files = {task: folder / f"recall_{task.name}.json" for task in TASKS}
    return {task: in_order(read(file)) for task, file in files.items() if file.exists()}


def scores(found, kind):
    "Markdown: the scores of one kind of task, median [quartiles] over seeds; of delays, the bound too."
    found = {task: runs for task, runs in found.items() if isinstance(task, kind)}
    names = list(dict.fromkeys(name for task in found for name in task.nets()))
    cell = lambda runs: spread([run["score"] for run in runs]) if runs else "–"
    rows = [[name, *[cell(runs.get(name)) for runs in found.values()]] for name in names]
    if kind is Delay:
        least = [max(0, 1 - STATE / (task.values - 1)) for task in found]  # the value of now passes by the state
        rows.append(["no linear layer below", *[f"{error:.3f}" for error in least]])
    return table(["", *[task.title for task in found]], rows)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=[task.name for task in TASKS], help="some of them (default: all)")
    parser.add_argument("--nets", nargs="+", help="some of the contenders (default: all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most so many")
    parser.add_argument("--quick", action="store_true", help="three updates, few sequences")
    parser.add_argument("--choose", action="store_true", help="score on other sequences (seed 1); the results go to runs/")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(args)
    folder = args.out or (RESULTS if not (args.quick or args.choose) else Path("runs/recall"))
    for task in TASKS:
        if args.tasks and task.name not in args.tasks:
            continue
        able = [name for name, net in task.nets().items() if task.steps <= net.steps]
        run = partial(one_run, task, 3 if args.quick else UPDATES, 4 if args.quick else 256, 1 if args.choose else 2)
        chosen = [name for name in able if name in (args.nets or able)]
        run_missing(folder / f"recall_{task.name}.json", chosen, 1 if args.quick else args.seeds, run)
    found = gathered(folder)
    print(*[scores(found, kind) for kind in (Delay, Copy, Selective)], sep="\n\n")


if __name__ == "__main__":
    main()
