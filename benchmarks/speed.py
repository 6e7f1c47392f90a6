"""How fast, and how small: S5 here against its published formulation.

    python benchmarks/speed.py            # under ten minutes on two cores
    python benchmarks/speed.py --quick    # a look, in six

The published formulation (complex promotion, `associative_scan` over (pole, input) pairs, autodiff through it) is written
here from its equations, on the same parameters, and must give the same numbers before anything is timed. Candidates run
interleaved in one process; the tables show medians with quartiles, ratios first. Memory is the temporary memory that XLA
plans for the compiled program, which is exact. Writes `speed.json` and `speed.md` under `--out`.
"""
import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssm_lib import LRU, S5SSM, BatchStackedSSMModel, Plan, linear_scan
from ssm_lib.scan import SCAN_BACKENDS, binary_operator
from ssm_lib.system import project, read_out, to_complex

SHAPES = ((8, 1024, 64, 64), (8, 1024, 128, 256), (4, 8192, 64, 64), (1, 65536, 64, 64))  # B, L, H, d_hidden
WAYS = {
    f"{loss}, {of}, {kind.__name__}": (loss, of, kind)
    for loss in ("Σ y·w", "Σ y²") for of in ("parameters and input", "parameters") for kind in (jax.value_and_grad, jax.grad)
}  # fmt: skip
GRADIENT = next(iter(WAYS))  # the way of the other tables: Σ y·w, parameters and input, with the value
KINDS = "forward", GRADIENT


class PublishedS5(S5SSM):
    "The same layer as it was published (Smith et al. 2023, S5, appendix A): the complex products and the parallel scan."

    def stretch(self, u, carry, times):
        one = self.sequence
        for _ in range(u.ndim - 2):
            one = jax.vmap(one)
        return None, one(u)

    def sequence(self, u):
        Delta = self.step_rescale * jnp.exp(self.log_step[:, 0])
        Lambda = self.Lambda_re + 1j * self.Lambda_im
        Lambda_bar = jnp.exp(Lambda * Delta)
        B_bar = (1 / Lambda * (Lambda_bar - 1))[:, None] * to_complex(self.B)
        elements = Lambda_bar * jnp.ones((u.shape[0], Lambda_bar.shape[0])), jax.vmap(lambda u_k: B_bar @ u_k)(u)
        x = jax.lax.associative_scan(binary_operator, elements)[1]
        y = jax.vmap(lambda x_k: 2 * (to_complex(self.Cs[0]) @ x_k).real)(x)
        return y + jax.vmap(lambda u_k: self.D * u_k)(u)


class ProductsAlone(S5SSM):
    "Only the two matrix products of the layer: what no recurrence can do without."

    def stretch(self, u, carry, times):
        return None, read_out(2 * to_complex(self.Cs[0]), project(to_complex(self.B), u)) + self.D * u


class RealProducts(PublishedS5):
    "The published layer with real matrix products, and with a scan to choose: λ̄ (P,), b (L, P) → x (L, P)."

    scan: Callable = None

    def sequence(self, u):
        system = self.system()
        Lambda_bar, gamma = system.step(None)
        return system.observe(self.scan(Lambda_bar, project(gamma[:, None] * system.B, u)), u) + self.D * u


LAYERS = {"published": PublishedS5, "ssm_lib": S5SSM, "products alone": ProductsAlone}


def compiled(apply, v, u, w, ways=(GRADIENT,)):
    "Forward and gradients over a batch, compiled and given their inputs; the temporary memory of each."
    made = {"forward": (jax.jit(apply), (v, u))}
    for way in ways:
        loss, of, kind = WAYS[way]
        total = {"Σ y·w": lambda v, u, w: jnp.sum(apply(v, u) * w), "Σ y²": lambda v, u, w: jnp.sum(apply(v, u) ** 2)}[loss]
        made[way] = jax.jit(kind(total, 0 if of == "parameters" else (0, 1))), (v, u, w)
    made = {name: (program.lower(*inputs).compile(), inputs) for name, (program, inputs) in made.items()}
    calls = {name: partial(program, *inputs) for name, (program, inputs) in made.items()}
    return calls, {name: program.memory_analysis().temp_size_in_bytes for name, (program, _) in made.items()}


def sequences(B, L, H):
    "Input and weights of the loss."
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(B, L, H)), jnp.float32) for _ in range(2))


def programs(layer, B, L, H, ways=(GRADIENT,)):
    u, w = sequences(B, L, H)
    return compiled(layer.apply, jax.jit(layer.init)(jax.random.PRNGKey(0), u[0, :1]), u, w, ways)


def interleaved(groups, seconds, turns=4, clock=time.perf_counter):
    """Quartiles of times, for so many seconds in each group {name: call}: {group: {name: quartiles}}.

    The calls of a group alternate; each follows itself, not what another left. A group comes back for several turns,
    so that a bad stretch of a shared machine falls on a part of every group and not on all of one.
    """
    times = {key: {name: [] for name in calls} for key, calls in groups.items()}
    for _ in range(turns):
        for key, calls in groups.items():
            end, rounds = time.perf_counter() + seconds / turns, 0
            while not rounds or time.perf_counter() < end:
                for name, call in calls.items():
                    jax.block_until_ready(call())
                    start = clock()
                    jax.block_until_ready(call())
                    times[key][name].append(clock() - start)
                rounds += 1
    quartiles = lambda t: [float(q) for q in np.quantile(t, (0.25, 0.5, 0.75))]
    return {key: {name: quartiles(t) for name, t in group.items()} for key, group in times.items()}


def timed_rows(made, seconds, kinds=KINDS):
    "A row {shape, and times of each kind} for each shape of {shape: {name: programs}}."
    groups = {
        (at, kind): {name: calls[kind] for name, calls in by_name.items() if kind in calls}
        for at, by_name in made.items() for kind in kinds
    }
    times = interleaved(groups, seconds)
    return [{"shape": list(at), **{kind: times[at, kind] for kind in kinds}} for at in made]


def against_published(seconds):
    "Time and memory at each shape, the gradient asked for in all ways; beside it plain products of the same size."
    made, known = {}, []
    for at in SHAPES:
        B, L, *size = at
        ways = lambda name: (GRADIENT,) if name == "products alone" else WAYS
        layers = {name: programs(cls(*size, blocks=8), B, L, size[0], ways(name)) for name, cls in LAYERS.items()}
        outputs = {name: np.asarray(layers[name][0]["forward"]()) for name in ("published", "ssm_lib")}
        difference = np.abs(outputs["ssm_lib"] - outputs["published"]).max() / np.abs(outputs["published"]).max()
        if not difference < 1e-4:
            raise AssertionError(f"the two formulations differ by {difference:.1e} at {at}")
        made[at] = {name: calls for name, (calls, _) in layers.items()}
        known.append({"difference": float(difference), "memory": {name: memory for name, (_, memory) in layers.items()}})
    rows = timed_rows(made, seconds, ("forward", *WAYS))
    plain = interleaved({at: {"product": plain_product(*at)} for at in SHAPES}, seconds / 4)
    rows = [{**row, **more, "product": plain[tuple(row["shape"])]["product"]} for row, more in zip(rows, known)]
    for row in rows:
        print(f"  {row['shape']}: forward × {ratio(row, 'forward'):.1f}, gradient × {ratio(row, GRADIENT):.1f}", flush=True)
    return rows


def plain_product(B, L, H, d_hidden):
    "One real product of the layer's size, of which it needs two forwards and six with the gradient of everything."
    u, _ = sequences(1, B * L, H)
    M = jnp.ones((H, d_hidden), jnp.float32)
    return partial(jax.jit(jnp.matmul).lower(u[0], M).compile(), u[0], M)


def ratio(row, kind, other="published"):
    return row[kind][other][1] / row[kind]["ssm_lib"][1]


def techniques(seconds):
    "What each technique brings, one after the other, at two shapes."
    plain = lambda a, b: jax.lax.associative_scan(binary_operator, (jnp.broadcast_to(a, b.shape), b))[1]  # differentiated by JAX
    tree, loop = (partial(linear_scan, backend=backend) for backend in ("associative", "sequential"))
    published, chosen, ours = (partial(cls, blocks=8) for cls in (PublishedS5, RealProducts, S5SSM))
    steps = {
        "as published": published, "real products": partial(chosen, scan=plain), "a derivative that is a scan": partial(chosen, scan=tree),
        "a loop for the tree, in place": partial(chosen, scan=loop), "in segments": partial(ours, plan=Plan("sequential")),
        "lanes in long segments": ours,
    }  # fmt: skip
    made, memory = {}, []
    for at in SHAPES[2:]:
        B, L, *size = at
        layers = {name: programs(layer(*size), B, L, size[0]) for name, layer in steps.items()}
        made[at] = {name: calls for name, (calls, _) in layers.items()}
        memory.append({name: planned[GRADIENT] for name, (_, planned) in layers.items()})
    return [{**row, "memory": planned} for row, planned in zip(timed_rows(made, seconds), memory)]


def over_length(lengths, seconds):
    "Gradient of one sequence, H = d_hidden = 64, against its length."
    made = {L: programs(S5SSM(64, 64, blocks=8), 1, L, 64) for L in lengths}
    times = interleaved({L: {"ssm_lib": calls[GRADIENT]} for L, (calls, _) in made.items()}, seconds)
    return [{"L": L, "time": times[L]["ssm_lib"], "memory": memory[GRADIENT]} for L, (_, memory) in made.items()]


def scan_backends(seconds):
    "The bare recurrence and its gradient over lengths and numbers of poles, beside one pass over the same input and output."
    rng, made = np.random.default_rng(0), {}
    for L, P in ((1024, 8), (1024, 32), (4096, 16), (8192, 32), (8192, 128), (131_072, 1), (131_072, 16), (131_072, 128)):
        poles = jnp.asarray(0.99 * np.exp(1j * rng.uniform(0, 3, P)), jnp.complex64)
        Bu = jnp.asarray(rng.normal(size=(L, P)) + 1j * rng.normal(size=(L, P)), jnp.complex64)
        runs = {**{backend: partial(linear_scan, backend=backend) for backend in SCAN_BACKENDS}, "one pass": jnp.multiply}
        made[L, P] = {}
        for name, run in runs.items():
            loss = lambda a, b, run=run: jnp.sum(jnp.abs(run(a, b)) ** 2)
            made[L, P][name] = {k: partial(jax.jit(f), poles, Bu) for k, f in zip(KINDS, (run, jax.grad(loss, (0, 1))))}
    return timed_rows(made, seconds)


def scans_in_layers(seconds):
    "A layer and its gradient with each backend, over shapes: what the choice brings where products and segments surround the scan."
    made = {}
    for at in ((1, 1024, 32, 32), (8, 1024, 64, 64), (1, 4096, 32, 32), (8, 4096, 64, 64), (1, 4096, 128, 256)):
        B, L, *size = at
        made[at] = {}
        for backend in SCAN_BACKENDS:
            made[at][backend] = programs(S5SSM(*size, blocks=4, plan=Plan(backend)), B, L, size[0])[0]
    return timed_rows(made, seconds)


def segment_sizes(seconds):
    "Gradient with segments of other sizes than the library's own choice."
    calls, memory = {}, {}
    for at in SHAPES:
        B, L, *size = at
        calls[at] = {}
        for steps in (128, 256, 512, 1024, 2048, 4096):
            if steps > L:
                break
            made, planned = programs(S5SSM(*size, blocks=8, plan=Plan(segment=steps)), B, L, size[0])
            calls[at][steps], memory[at, steps] = made[GRADIENT], planned[GRADIENT]
    times = interleaved(calls, seconds)
    return [{"shape": list(at), "size": steps, "time": times[at][steps], "memory": m} for (at, steps), m in memory.items()]


def peers(H, P):
    "LRU layers of other libraries that can be imported: name → (apply, variables) of one sequence, H features and P poles."
    found, key, u = {}, jax.random.PRNGKey(0), jnp.zeros((8, H))
    try:
        from memax.linen.semigroups.lru import LRU as Memax

        memax = Memax(algebra=Memax.default_algebra(recurrent_size=P), scan=Memax.default_scan(), hidden_size=H, recurrent_size=P)
        inputs = lambda u: (memax.zero_carry(), (u, jnp.zeros(len(u), bool)))
        run = lambda v, u: memax.apply(v, *inputs(u))[1]
        found[f"memax {version('memax')}"] = run, jax.jit(memax.init)(key, *inputs(u))
    except ImportError:
        pass
    try:
        import equinox as eqx
        from rnn_jax.ssm import LinearRecurrentUnit

        arrays, rest = eqx.partition(LinearRecurrentUnit(H, P, H, nonlinearity=lambda y: y, key=key), eqx.is_inexact_array)
        found[f"rnn-jax {version('rnn-jax')}"] = lambda v, u: eqx.combine(v, rest)(u), arrays
    except ImportError:
        pass
    return found


def against_peers(seconds, B=4, L=2048, H=64, P=64):
    "An LRU of the same size here and there (memax wants H = P): empty where no other library is installed."
    u, w = sequences(B, L, H)
    here = LRU(P, H)
    layers = {"ssm_lib": (here.apply, jax.jit(here.init)(jax.random.PRNGKey(0), u[0])), **peers(H, P)}
    if len(layers) == 1:
        return {}
    over = lambda name, apply: apply if name == "ssm_lib" else jax.vmap(apply, (None, 0))
    made = {name: compiled(over(name, apply), v, u, w) for name, (apply, v) in layers.items()}
    (row,) = timed_rows({(B, L, H, P): {name: calls for name, (calls, _) in made.items()}}, seconds)
    return {**row, "memory": {name: memory[GRADIENT] for name, (_, memory) in made.items()}}


def compile_times(repeats):
    "Seconds to trace and compile the training step of a stack of six layers."
    x = jnp.zeros((4, 128, 32, 1))
    times = {}
    for _ in range(repeats):
        for name in ("published", "ssm_lib"):
            model = BatchStackedSSMModel(partial(LAYERS[name], d_hidden=64, blocks=8), d_model=32, d_vars=1, n_layers=6)
            v = jax.eval_shape(model.init, jax.random.PRNGKey(0), x)
            optimizer = optax.adam(1e-3)
            state = jax.eval_shape(optimizer.init, v)

            def step(v, state, x, model=model, optimizer=optimizer):
                loss, grads = jax.value_and_grad(lambda v: jnp.mean((model.apply(v, x)[:, :-1] - x[:, 1:]) ** 2))(v)
                updates, state = optimizer.update(grads, state, v)
                return optax.apply_updates(v, updates), state, loss

            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(step).lower(v, state, x).compile()
            times.setdefault(name, []).append(time.perf_counter() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def machine():
    "What this ran on, without its name."
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0].device_kind
    return {"cpu": model, "cores": cores, "device": device, "jax": jax.__version__, "python": platform.python_version()}


def geometric_mean(values):
    return float(np.exp(np.mean(np.log(values))))


def table(head, rows):
    "Markdown."
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def ms(quartiles):
    low, median, high = (1e3 * q for q in quartiles)
    return f"{median:.3g} [{low:.3g}, {high:.3g}]"


def saved(row, way=GRADIENT):
    "How many times less temporary memory than the published formulation."
    return row["memory"]["published"][way] / row["memory"]["ssm_lib"][way]


def means(rows):
    "Geometric means over shapes, of the gradient over shapes and ways: published over ours; the worst gradient of a row."
    over = lambda value: geometric_mean([value(row, way) for row in rows for way in WAYS])
    worst = min(ratio(row, way) for row in rows for way in WAYS)
    return geometric_mean([ratio(row, "forward") for row in rows]), over(ratio), worst, over(saved)


def published_table(rows):
    head = ["B, L, H, d_hidden", "forward ×", "gradient ×", "worst ×", "memory ÷", "forward ms", "gradient ms", "memory MB"]
    lines = []
    for row in rows:
        share = lambda kind, n, row=row: f"{n * row['product'][1] / row[kind]['ssm_lib'][1]:.0%}"
        lines.append([
            shape(row), *(f"{mean:.1f}" for mean in means([row])), ms(row["forward"]["ssm_lib"]), ms(row[GRADIENT]["ssm_lib"]),
            f"{row['memory']['ssm_lib'][GRADIENT] / 1e6:.1f}", f"{1 / ratio(row, GRADIENT, 'products alone'):.2f}",
            f"{share('forward', 2)}, {share(GRADIENT, 6)}",
        ])  # fmt: skip
    last = ["**geometric mean; worst**", *(f"**{mean:.1f}**" for mean in means(rows)), "", "", "", "", ""]
    return table([*head, "gradient ÷ products alone", "share of plain products"], [*lines, last])


def ways_table(rows):
    "Gradient by the way it is asked for: published over ours in time and memory, at each shape."
    lines = [[way, *(f"{ratio(row, way):.1f} × ÷ {saved(row, way):.1f}" for row in rows)] for way in WAYS]
    return table(["gradient of", *map(shape, rows)], lines)


def shape(row):
    return ", ".join(map(str, row["shape"]))


def named_table(r):
    "Rows by name: forward, gradient, memory of the gradient."
    rows = [[name, ms(r["forward"][name]), ms(r[GRADIENT][name]), f"{r['memory'][name] / 1e6:.1f}"] for name in r["memory"]]
    return table([shape(r), "forward ms", "gradient ms", "memory MB"], rows)


def length_table(rows):
    grows = [""] + [f"{(b['time'][1] / a['time'][1]) ** (1 / np.log2(b['L'] / a['L'])):.2f}" for a, b in zip(rows, rows[1:])]
    lines = [[f"{row['L']:,}", ms(row["time"]), g, f"{row['memory'] / 1e6:.1f}"] for row, g in zip(rows, grows)]
    return table(["L", "gradient ms", "× per doubling", "memory MB"], lines)


def backends_table(head, rows):
    names = dict(zip(KINDS, ("forward", "gradient")))
    lines = [[shape(row), names[kind], *map(ms, row[kind].values())] for row in rows for kind in KINDS]
    return table([head, "ms", *rows[0]["forward"]], lines)


def tables(r):
    "Every table of the results, by name, in Markdown."
    chunks = [[shape(row), row["size"], ms(row["time"]), f"{row['memory'] / 1e6:.1f}"] for row in r["segment sizes"]]
    made = {
        "against published": published_table(r["against published"]), "ways": ways_table(r["against published"]),
        "techniques": "\n\n".join(map(named_table, r["techniques"])),
        "over length": length_table(r["over length"]), "scan": backends_table("L, P", r["scan"]),
        "scan in a layer": backends_table("B, L, H, d_hidden", r["scan in a layer"]),
        "segment sizes": table(["B, L, H, d_hidden", "steps in a segment", "gradient ms", "memory MB"], chunks),
    }  # fmt: skip
    return made | ({"peers": named_table(r["peers"])} if r["peers"] else {})


NOTES = {
    "against published": "Times (×) and temporary memory of the gradient (÷) of the published formulation over ours; gradients in "
    "the mean over all ways of asking for one, and the worst. The other columns: of Σ y·w, parameters and input, with the value.",
    "ways": "The same by what is summed, what is differentiated, and whether the value is wanted too.",
    "techniques": "B, L, H, d_hidden as said; each row adds one technique to the row above.",
    "over length": "Gradient of one sequence, H = d_hidden = 64.",
    "scan": "The bare recurrence; *one pass* multiplies by the poles instead: the same input and output, no states kept.",
    "scan in a layer": "The same choice inside an S5 layer of d_hidden / 2 poles.",
    "segment sizes": "Other lengths of segments than the library's own.",
    "peers": "An LRU through other libraries; B, L, H, P as said.",
}


def report(r):
    m, c = r["machine"], r["compile"]
    where = f"{m['cpu']}, {m['cores']} cores; device {m['device']}; jax {m['jax']}, Python {m['python']}. Medians, [quartiles]."
    parts = [f"{NOTES[name]}\n\n{text}" for name, text in tables(r).items()]
    last = f"Compiling the training step of six layers: {c['ssm_lib']:.1f} s here, {c['published']:.1f} s as published."
    return "\n\n".join(["# Speed", where, *parts, last]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short timings; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    args = parser.parse_args()
    seconds, lengths = (1, (4096, 16_384)) if args.quick else (11, tuple(2**k for k in range(12, 19)))
    result = {"machine": machine()}
    print("against the published formulation", flush=True)
    result["against published"] = against_published(seconds / 2)
    result["techniques"] = techniques(seconds / 2)
    print("over length", flush=True)
    result["over length"] = over_length(lengths, seconds / 2)
    print("scans, segments, peers", flush=True)
    result["scan"] = scan_backends(seconds / 5)
    result["scan in a layer"] = scans_in_layers(seconds / 5)
    result["segment sizes"] = segment_sizes(seconds / 4)
    result["peers"] = against_peers(seconds)
    print("compile time", flush=True)
    result["compile"] = compile_times(1 if args.quick else 3)
    print(report(result))
    out = args.out or (None if args.quick else Path(__file__).parent / "results")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "speed.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / "speed.md").write_text(report(result), encoding="utf-8")


if __name__ == "__main__":
    main()
