"""What each space costs: time and memory against the number of places, and beside the same nets in another library.

    python benchmarks/space_cost.py               # twenty minutes on two cores
    python benchmarks/space_cost.py --quick       # the smallest sizes only
    python benchmarks/space_cost.py --only scale  # one of scale, rollout, peers, training

- scale: one mixing with 32 features and its gradient, on 32² to 512² places and on 32³. Memory is the temporary memory that XLA
  plans for the gradient, which is exact. Where the plan is over 8 GiB a size is left out.
- rollout: a step of a rollout of 256 × 256 places with 32 features, against the matrix products that it cannot do without.
- peers: a training step (prediction, gradient, Adam) of the residual net and of the Fourier net of pdequinox (Equinox), of the
  same sizes and on the same frames, in one process, interleaved. Needs pdequinox: the extra `bench`.
- training: updates of large nets on a field that moves on by one place a frame, and the greatest memory of the process: ConvS5
  with 64 states at 64 × 64 places on (4, 64) frames, and conv_scan with 32 features at 256 × 256 places on 4 pairs of frames.

Times are medians of interleaved runs, with quartiles. Writes `space_cost.json` and `space_cost.md` under `--out`.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from speed import interleaved, machine, ms, table

from ssm_lib import space
from ssm_lib.recipes import conv_s5, conv_scan, fno, residual_conv

WIDTH, LIMIT = 32, 8 * 2**30
GRIDS = ((32, 32), (64, 64), (128, 128), (256, 256), (512, 512), (32, 32, 32))
SPACES = {
    "Conv(3)": space.Conv(3),
    "Spectral(8)": space.Spectral(8),
    "Scan(2)": space.Scan(2),
    "Scan(2), zero ends": space.Scan(2, boundary="zero"),
    "Separable(16)": space.Separable(16),
    "Separable()": space.Separable(),
    "Mean()": space.Mean(),
    "conv_scan": conv_scan((8, 8), 1, width=WIDTH).space,
}


def places(grid):
    return " × ".join(map(str, grid))


def planned(program, *inputs):
    "A compiled program and its temporary memory."
    made = program.lower(*inputs).compile()
    return made, made.memory_analysis().temp_size_in_bytes


def scale(grids, seconds):
    "Rows {space, grid, forward and gradient: quartiles, memory of the gradient}."
    rows, groups = [], {}
    for name, one in SPACES.items():
        for grid in grids:
            sized = one.at(grid, WIDTH, d_vars=1)
            h = jax.random.normal(jax.random.PRNGKey(0), (1, *grid, WIDTH))
            v = jax.jit(partial(sized.init, method="mix"))(jax.random.PRNGKey(1), h)
            mix = lambda v, h, sized=sized: sized.apply(v, h, method="mix")
            calls = {"forward": mix, "gradient": jax.grad(lambda v, h, mix=mix: jnp.sum(jnp.sin(mix(v, h))), (0, 1))}
            row = {"space": name, "grid": grid}
            for kind, call in calls.items():
                program, memory = planned(jax.jit(call), v, h)
                row[f"{kind} memory"] = memory
                if memory < LIMIT:
                    groups[name, grid, kind] = {"it": partial(program, v, h)}
            rows.append(row)
    for (name, grid, kind), times in interleaved(groups, seconds).items():
        row = next(row for row in rows if (row["space"], row["grid"]) == (name, grid))
        row[kind] = times["it"]
    return rows


def rollout_steps(n, seconds):
    "A step of a rollout of n × n places, and the products that it cannot do without."
    rows = []
    for recipe in (residual_conv, conv_scan, fno):
        model = recipe((n, n), 1, width=WIDTH, n_layers=4)
        x = jax.random.normal(jax.random.PRNGKey(0), (1, n, n, 1))
        v = jax.jit(model.init)(jax.random.PRNGKey(1), x[:, None])
        step = jax.jit(lambda v, x, model=model: model.apply(v, (None,) * 4, x, method="step")[1])
        h = jax.random.normal(jax.random.PRNGKey(0), (1, n, n, WIDTH))
        kernel, waves = jnp.ones((WIDTH, WIDTH)), jnp.ones((17, 9, WIDTH, WIDTH), jnp.complex64)
        product = lambda h, kernel, _: space.product(h, kernel)
        ring = [(lambda h, _, __, axis=axis: jnp.fft.irfft(jnp.fft.rfft(h, axis=axis), n, axis=axis), 4) for axis in (1, 2)]
        parts = {
            residual_conv: [(product, 8 * 9)],
            conv_scan: [(product, 8 * 9), *ring],
            fno: [(product, 4), (lambda h, _, waves: space.map_waves(h, waves), 4)],
        }[recipe]
        made = {f"part {i}": partial(jax.jit(part), h, kernel, waves) for i, (part, _) in enumerate(parts)}
        calls = {"step": partial(step, v, x), **made}
        times = interleaved({"": calls}, seconds)[""]
        own = sum(count * times[f"part {i}"][1] for i, (_, count) in enumerate(parts))
        rows.append({"net": recipe.__name__, "step": times["step"], "own": own, "ratio": times["step"][1] / own})
    return rows


NETS = {  # title: grid, frames in a batch, width, blocks, modes; a Fourier net where there are modes
    "residual, 160 points": ((160,), 20, 32, 6, None),
    "residual, 32 × 32": ((32, 32), 10, 16, 6, None),
    "residual, 64 × 64": ((64, 64), 10, 32, 6, None),
    "residual, 256 × 256": ((256, 256), 1, 32, 6, None),
    "Fourier, 160 points": ((160,), 20, 32, 4, 12),
    "Fourier, 32 × 32": ((32, 32), 10, 16, 4, 5),
    "Fourier, 64 × 64": ((64, 64), 10, 32, 4, 12),
}


def trainer(predict, params, x, y):
    "One update of parameters by Adam, as a call of (params, state) → (params, state, loss), and the state to begin with."
    optimizer = optax.adam(1e-3)

    @jax.jit
    def update(params, state):
        loss, slope = jax.value_and_grad(lambda p: jnp.mean((predict(p, x) - y) ** 2))(params)
        changes, state = optimizer.update(slope, state)
        return optax.apply_updates(params, changes), state, loss

    return update, optimizer.init(params)


def timed_update(predict, params, x, y):
    "The same update again and again, and the number of parameters."
    update, state = trainer(predict, params, x, y)
    return partial(update, params, state), sum(p.size for p in jax.tree.leaves(params))


def ours_trains(grid, batch, width, blocks, modes):
    "Our net of these sizes."
    model = (partial(fno, modes=modes) if modes else residual_conv)(grid, 1, width=width, n_layers=blocks)
    x = jax.random.normal(jax.random.PRNGKey(0), (batch, 2, *grid, 1))
    return timed_update(model.apply, jax.jit(model.init)(jax.random.PRNGKey(1), x[:, :1]), x[:, :1], x[:, 1:])


def theirs_trains(grid, batch, width, blocks, modes):
    "The same with pdequinox: it counts the mean as a mode, and keeps channels first."
    import equinox as eqx
    import pdequinox as pdeqx

    kind = partial(pdeqx.arch.ClassicFNO, num_modes=modes + 1) if modes else partial(pdeqx.arch.ClassicResNet, activation=nn.gelu)
    net = kind(len(grid), 1, 1, hidden_channels=width, num_blocks=blocks, key=jax.random.PRNGKey(1))
    x = jax.random.normal(jax.random.PRNGKey(0), (batch, 2, 1, *grid))
    params, rest = eqx.partition(net, eqx.is_inexact_array)
    return timed_update(lambda p, x: jax.vmap(eqx.combine(p, rest))(x), params, x[:, 0], x[:, 1])


def peers(seconds):
    "Rows {net, times of both, parameters of both, theirs over ours}."
    made = {title: {"ssm_lib": ours_trains(*net), "pdequinox": theirs_trains(*net)} for title, net in NETS.items()}
    times = interleaved({title: {name: call for name, (call, _) in pair.items()} for title, pair in made.items()}, seconds)
    sizes = {title: {name: size for name, (_, size) in pair.items()} for title, pair in made.items()}
    return [{"net": t, "times": times[t], "parameters": sizes[t], "ratio": times[t]["pdequinox"][1] / times[t]["ssm_lib"][1]} for t in NETS]


TRAINED = {  # name: net of n × n places, n, batch, frames, updates
    "conv_s5": (lambda n: conv_s5((n, n), 1, width=WIDTH, d_hidden=64, n_layers=4).clone(segment=4), 64, 4, 64, 3),
    "conv_scan": (lambda n: conv_scan((n, n), 1, width=WIDTH), 256, 4, 1, 10),
}


def train(name, quick=False):
    "Updates of a net: losses, seconds of each, and the greatest memory of this process, which should do nothing else."
    make, n, batch, frames, updates = TRAINED[name]
    n, frames = (8, min(frames, 8)) if quick else (n, frames)
    model = make(n)
    first = jax.random.normal(jax.random.PRNGKey(0), (batch, n, n, 1))
    x = jnp.stack([jnp.roll(first, k, axis=2) for k in range(frames + 1)], 1)
    variables = jax.jit(model.init)(jax.random.PRNGKey(1), x[:1, :1])
    update, state = trainer(model.apply, variables, x[:, :-1], x[:, 1:])
    losses, seconds = [], []
    for _ in range(updates):
        began = time.perf_counter()
        variables, state, loss = update(variables, state)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - began)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"net": name, "shape": [batch, frames, n, n], "losses": losses, "seconds": seconds, "memory": most}


def in_a_process_of_its_own(*args):
    "`train` where nothing else takes memory."
    return json.loads(subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True, check=True).stdout)


def tables(result):
    "Markdown by name."
    made = {}
    if "scale" in result:
        grids = list(dict.fromkeys(tuple(row["grid"]) for row in result["scale"]))
        cell = {(row["space"], tuple(row["grid"])): row for row in result["scale"]}
        each = lambda r: f"{1e3 * r['gradient'][1]:.3g} ms, {r['gradient memory'] / 1e6:.3g} MB" if "gradient" in r else "–"
        rows = [[name, *[each(cell[name, grid]) for grid in grids]] for name in dict.fromkeys(row["space"] for row in result["scale"])]
        made["scale"] = table(["gradient", *map(places, grids)], rows)
    if "rollout" in result:
        rows = [[r["net"], ms(r["step"]), f"{1e3 * r['own']:.3g}", f"{r['ratio']:.2f}"] for r in result["rollout"]]
        made["rollout"] = table(["net", "step, ms", "its products alone, ms", "ratio"], rows)
    if "peers" in result:
        rows = [
            [r["net"], *[ms(r["times"][name]) for name in ("ssm_lib", "pdequinox")], f"{r['ratio']:.2f}",
             " and ".join(f"{n:,}" for n in r["parameters"].values())]
            for r in result["peers"]
        ]  # fmt: skip
        made["peers"] = table(["net", "ssm_lib, ms", "pdequinox, ms", "theirs ÷ ours", "parameters"], rows)
    if "training" in result:
        rows = [
            [r["net"], places(r["shape"]), f"{r['losses'][0]:.3g}, {r['losses'][-1]:.3g}", f"{len(r['losses'])}",
             f"{sorted(r['seconds'])[len(r['seconds']) // 2]:.3g}", f"{r['memory'] / 2**30:.2f} GiB"]
            for r in result["training"]
        ]  # fmt: skip
        made["training"] = table(["net", "B, T, H, W", "first and last loss", "updates", "seconds each", "memory of the process"], rows)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, short timings; writes nothing unless --out is given")
    parser.add_argument("--only", nargs="+", choices=("scale", "rollout", "peers", "training"), help="the rest is kept as it was")
    parser.add_argument("--train", choices=tuple(TRAINED), help="what `training` runs in a process of its own")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    args = parser.parse_args()
    if args.train:
        print(json.dumps(train(args.train, args.quick)))
        return
    seconds = 0.2 if args.quick else 3
    jobs = {
        "scale": lambda: scale(GRIDS[:2] if args.quick else GRIDS, seconds),
        "rollout": lambda: rollout_steps(32 if args.quick else 256, 4 * seconds),
        "peers": lambda: peers(4 * seconds),
        "training": lambda: [in_a_process_of_its_own("--train", name, *["--quick"][: args.quick]) for name in TRAINED],
    }
    out = args.out or (None if args.quick else Path(__file__).parent / "results")
    file = out and out / "space_cost.json"
    result = json.loads(file.read_text()) if file and file.exists() else {}
    for name in args.only or jobs:
        result |= {name: jobs[name](), "machine": machine()}
        print(tables(result)[name], flush=True)
        if file:
            out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            text = "\n\n".join(f"## {name}\n\n{made}" for name, made in tables(result).items())
            file.with_suffix(".md").write_text(f"# Cost of spaces\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
