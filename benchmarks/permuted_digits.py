"""Permuted digits: does the measure of a HiPPO memory matter?

    python benchmarks/permuted_digits.py                    # scikit-learn's 8 × 8 digits, 64 steps, minutes on a CPU
    python benchmarks/permuted_digits.py --sequential       # in the order of the rows instead: `sequential_digits`
    python benchmarks/permuted_digits.py --mnist mnist.npz  # the published setting: 784 steps, hidden size and memory 512

An image is read one pixel at a time, in one fixed random order, and classified at the end. Five models see it in the same
training loop: the HiPPO cell over LegS, LegT and LagT, a plain GRU, and a stack of S5 layers with mean pooling. Prints a
table of test accuracy, mean ± standard deviation over seeds, and writes it as `permuted_digits.json` and `.md` (or
`permuted_mnist.*`) under `--out`. `mnist.npz` holds x_train, y_train, x_test, y_test. The digits need scikit-learn.
"""
import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssm_lib import S5SSM, HiPPOCell, SequenceLayer

PUBLISHED = {"LegS": 98.3, "LagT": 98.2, "LegT": 98.0, "GRU": 93.0}  # permuted MNIST, Gu et al. 2020, HiPPO
PERMUTATION_SEED = 0


class Setting(NamedTuple):
    "Sizes and training of one data set; the models of a setting have about as many parameters, but for the published sizes."

    title: str
    features: int  # hidden size of the HiPPO cells
    memory: int  # their order N
    gru: int  # hidden size of the GRU
    d_model: int  # features of the S5 stack
    epochs: int
    batch: int
    learning_rate: float
    lagt_dt: float  # a pixel in the unit of time of LagT


# Learning rate and lagt_dt of the digits were chosen once, by `--validate` on seeds 100 and 101; nothing else was tuned.
DIGITS = Setting("permuted digits", 64, 64, 90, 64, epochs=60, batch=50, learning_rate=3e-3, lagt_dt=1.0)
MNIST = Setting("permuted MNIST", 512, 512, 512, 256, epochs=50, batch=100, learning_rate=1e-3, lagt_dt=1.0)


class Recurrent(nn.Module):
    "A recurrent cell over the pixels (B, L, 1), classified from its last output."

    cell: nn.RNNCellBase
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(nn.RNN(self.cell)(x)[:, -1])


class S5Stack(nn.Module):
    "S5 blocks over the pixels (B, L, 1), classified from the mean of their outputs."

    d_model: int
    n_layers: int = 2
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.d_model)(x)
        over_batch = nn.vmap(SequenceLayer, variable_axes={"params": None}, split_rngs={"params": False})
        for _ in range(self.n_layers):
            x = over_batch(partial(S5SSM, d_hidden=self.d_model, blocks=4, dt_min=0.001), self.d_model)(x)
        return nn.Dense(self.classes)(x.mean(1))


def models(s, L):
    "The five of a setting, for sequences of L pixels. The window of LegT is the whole sequence, as published."
    cell = partial(HiPPOCell, s.features, s.memory)
    return {
        "LegS": Recurrent(cell("legs")),
        "LagT": Recurrent(cell("lagt", dt=s.lagt_dt)),
        "LegT": Recurrent(cell("legt", dt=1 / L)),
        "GRU": Recurrent(nn.GRUCell(s.gru)),
        "S5": S5Stack(s.d_model),
    }


def digits(test_share=0.5):
    "scikit-learn's 1,797 digits, split once and for all, half for training: x (n, 64) in [0, 1], y (n,)."
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    return train_test_split(x / 16, y, test_size=test_share, random_state=0, stratify=y)


def mnist(path):
    with np.load(path) as data:
        x_train, x_test, y_train, y_test = (data[name] for name in ("x_train", "x_test", "y_train", "y_test"))
    flat = lambda x: x.reshape(len(x), -1) / max(x.max(), 1)
    return flat(x_train), flat(x_test), y_train, y_test


def sequences(data, sequential):
    "One order for all images, at random or row by row; pixels as sequences (n, L, 1)."
    x_train, x_test, y_train, y_test = data
    pixels = np.arange(x_train.shape[1])
    order = pixels if sequential else np.random.default_rng(PERMUTATION_SEED).permutation(pixels)
    sequence = lambda x: jnp.asarray(x[:, order, None], jnp.float32)
    return sequence(x_train), sequence(x_test), jnp.asarray(y_train, jnp.int32), jnp.asarray(y_test, jnp.int32)


def train(model, data, s, seed):
    "Adam for a fixed number of epochs; returns the test accuracy in percent and the number of parameters."
    x, x_test, y, y_test = data
    batch = min(s.batch, len(x))
    key_init, key_order = jax.random.split(jax.random.PRNGKey(seed))
    params = model.init(key_init, x[:batch])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(s.learning_rate))

    def loss(params, rows):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x[rows]), y[rows]).mean()

    def update(state, rows):
        params, opt = state
        value, grads = jax.value_and_grad(loss)(params, rows)
        changes, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, changes), opt), value

    @jax.jit
    def epoch(state, key):
        order = jax.random.permutation(key, len(x))[: len(x) // batch * batch]
        return jax.lax.scan(update, state, order.reshape(-1, batch))

    state = params, optimizer.init(params)
    for key in jax.random.split(key_order, s.epochs):
        state, losses = epoch(state, key)
    predict = jax.jit(lambda x: model.apply(state[0], x).argmax(-1))
    guess = jnp.concatenate([predict(x_test[i : i + 500]) for i in range(0, len(x_test), 500)])
    return 100 * float((guess == y_test).mean()), sum(p.size for p in jax.tree.leaves(params)), float(losses.mean())


def table(results, s, sizes, seeds, published):
    order = "in a fixed permutation" if published else "row after row"
    lines = [
        f"# {s.title.capitalize()}",
        "",
        f"{sizes[0]:,} training and {sizes[1]:,} test images, {sizes[2]} pixels one by one {order}; {s.epochs} epochs "
        f"of Adam at {s.learning_rate:g}, batch {s.batch}; seeds {', '.join(map(str, seeds))} (initial values and order of batches).",
        "",
        "| model | test accuracy, % | per seed | parameters | seconds per run |" + " published, permuted MNIST |" * bool(published),
        "|---|---|---|---|---|" + "---|" * bool(published),
    ]
    for name, r in results.items():
        each = ", ".join(f"{a:.1f}" for a in r["accuracy"])
        told = f" {published.get(name, '–')} |" if published else ""
        lines.append(f"| {name} | {r['mean']:.1f} ± {r['sd']:.1f} | {each} | {r['parameters']:,} | {r['seconds']:.0f} |{told}")
    if published and published.keys() <= results.keys():
        lines += ["", verdict(results, sizes[1])]
    return "\n".join([*lines, ""])


def verdict(results, n_test):
    "The order of the measures beside the published one, and how far the differences can be trusted."
    best = sorted(PUBLISHED, key=lambda name: -results[name]["mean"])
    mean = np.mean([results[name]["mean"] for name in PUBLISHED]) / 100
    noise = 100 * np.sqrt(max(mean * (1 - mean), 0) / n_test)
    hippo = [results[name]["mean"] for name in ("LegS", "LagT", "LegT")]
    spread = max(hippo) - min(hippo)
    return (
        f"Order here: {' > '.join(best)}; published: {' > '.join(PUBLISHED)}. The three measures lie within {spread:.1f} points of "
        f"each other; one accuracy on {n_test:,} images has a sampling error of about {noise:.1f} points, besides the spread over seeds. "
        f"{'Their order is within that noise' if spread < 2 * noise else 'Their distance is beyond that noise'}. The GRU is "
        f"{min(hippo) - results['GRU']['mean']:.1f} points below the least of them (published: 5.0)."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="path to an .npz with x_train, y_train, x_test, y_test: the published setting")
    parser.add_argument("--sequential", action="store_true", help="pixels in the order of the rows")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="the others follow it")
    parser.add_argument("--models", nargs="+", help="some of LegS LagT LegT GRU S5; written only to an --out")
    for name in ("epochs", "batch", "features", "memory", "gru", "d_model"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"instead of the setting's {name}")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--lagt-dt", type=float)
    parser.add_argument("--validate", action="store_true", help="score on a fifth of the training images, to tune; likewise")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results for a whole run")
    args = parser.parse_args()

    base = MNIST if args.mnist else DIGITS
    s = base._replace(**{k: v for k, v in vars(args).items() if k in Setting._fields and v is not None})
    if args.sequential:
        s = s._replace(title=s.title.replace("permuted", "sequential"))
    data = mnist(args.mnist) if args.mnist else digits()
    if args.validate:
        x, _, y, _ = data
        cut = len(x) * 4 // 5
        data = x[:cut], x[cut:], y[:cut], y[cut:]
    data = sequences(data, args.sequential)
    sizes = len(data[0]), len(data[1]), data[0].shape[1]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    results = {}
    for name, model in models(s, sizes[2]).items():
        if args.models and name not in args.models:
            continue
        accuracy, started = [], time.time()
        for seed in seeds:
            score, parameters, loss = train(model, data, s, seed)
            accuracy.append(score)
            print(f"{name}, seed {seed}: {score:.2f} % (training loss {loss:.4f}, {time.time() - started:.0f} s)", flush=True)
        results[name] = {
            "accuracy": accuracy, "mean": float(np.mean(accuracy)), "sd": float(np.std(accuracy, ddof=min(1, len(accuracy) - 1))),
            "parameters": parameters, "seconds": round((time.time() - started) / len(accuracy), 1),
        }
    published = {} if args.sequential else PUBLISHED
    text = table(results, s, sizes, seeds, published)
    print(text)
    if args.out is None and (args.models or args.validate):
        return
    out = args.out or Path(__file__).parent / "results"
    out.mkdir(parents=True, exist_ok=True)
    path = out / s.title.replace(" ", "_").lower()
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    record = {"setting": s._asdict(), "seeds": list(seeds), "results": results, "published": published}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
