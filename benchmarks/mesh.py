"""What a device computes, holds and sends where 1 to 1,024 share a field or a sequence, and what the cutting costs by the clock.

    python benchmarks/mesh.py            # what is missing in results/mesh.json; some twenty minutes on one core
    python benchmarks/mesh.py --quick    # one small program

A program is compiled for devices that are simulated, and never run ("paper"), or run on eight of them ("work", "weak"). How
many there are must be said before JAX begins, so each is a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from kept import run_missing
from speed import interleaved

from ssm_lib import LRU, S4D, S5SSM, Plan, SequenceLayer, next_frame_loss
from ssm_lib.mesh import batch_sharding, everywhere, make_mesh, messages
from ssm_lib.recipes import PointwisePoles, conv_s5

FILE = Path(__file__).parent / "results" / "mesh.json"
KEY = jax.random.PRNGKey(0)
GRID, FRAMES, WIDTH, POLES, BLOCKS = (1024, 1024), 4, 64, 64, 2
STEPS, FEATURES = 2**20, 64
COUNTS = (1, 4, 16, 64, 256, 1024)


def field_model(grid, plan):
    "A field with 64 features and 64 complex states a place; all frames of a window at once."
    model = conv_s5(grid, 1, width=WIDTH, d_hidden=POLES, n_layers=BLOCKS)
    return model.clone(ssm=partial(PointwisePoles, dt_min=1e-3, dt_max=0.1, plan=plan))


def shaped(tree, sharding):
    "Arrays that are none, and where they would lie."
    lies = sharding if callable(sharding) else lambda z: sharding
    return jax.tree.map(lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=lies(z)), tree)


def training(model, batch):
    "A gradient of the parameters, to be compiled."
    v = jax.eval_shape(model.init, KEY, batch)
    replicated = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    slope = jax.jit(jax.value_and_grad(partial(next_frame_loss, model)))
    return slope.lower(shaped(v, replicated), shaped(batch, batch_sharding(batch.shape)), shaped(KEY, replicated))


def rollout_step(model, batch):
    "A step from a state, to be compiled."
    v = jax.eval_shape(model.init, KEY, batch)
    replicated, frame = NamedSharding(jax.sharding.get_mesh(), PartitionSpec()), batch_sharding(batch.shape)
    cut = lambda z: NamedSharding(frame.mesh, PartitionSpec(*(frame.spec[:1] + frame.spec[2:])[: z.ndim]))
    carry, _ = jax.eval_shape(partial(model.apply, method="prefill"), v, batch)
    x = jax.ShapeDtypeStruct((batch.shape[0], *batch.shape[2:]), batch.dtype)
    step = jax.jit(partial(model.apply, method="step"), donate_argnums=1)
    return step.lower(shaped(v, replicated), shaped(carry, cut), shaped(x, cut))


def sequence(devices, steps=STEPS):
    "A training step of four S5 blocks on one long sequence."
    layer = partial(S5SSM, d_hidden=FEATURES, blocks=1, plan=Plan("associative", steps))
    blocks = [SequenceLayer(layer, FEATURES, norm="layer", activation="half_glu1") for _ in range(4)]
    x = jax.ShapeDtypeStruct((1, steps, FEATURES), jnp.float32)
    v = jax.eval_shape(lambda key, x: [block.init(key, x) for block in blocks], KEY, x)
    replicated = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())

    def loss(v, x):
        for block, own in zip(blocks, v):
            x = block.apply(own, x)
        return jnp.mean(x**2)

    lies = NamedSharding(replicated.mesh, PartitionSpec(None, "time" if devices > 1 else None))
    return jax.jit(jax.value_and_grad(loss)).lower(shaped(v, replicated), shaped(x, lies))


def told(lowered):
    "What XLA says of a program: operations, bytes read and written, held, and sent by each device."
    compiled = lowered.compile()
    assert " while(" not in compiled.as_text(), "XLA counts the body of a loop once"
    cost, held, sent = compiled.cost_analysis(), compiled.memory_analysis(), messages(compiled)
    at_once = {"arguments": held.argument_size_in_bytes, "temporary": held.temp_size_in_bytes}
    return {
        "flops": cost["flops"], "bytes": cost["bytes accessed"], **at_once,
        "sent": {kind: [len(sizes), sum(sizes), max(sizes)] for kind, sizes in sent.items()},
    }


@mock.patch.object(jax, "default_backend", lambda: "gpu")
def on_paper(what, n, by, grid=GRID):
    "One program for so many devices, traced as on an accelerator: a CPU would have loops that are fast there."
    if what == "sequence":
        with jax.set_mesh(make_mesh(time=n)):
            return told(sequence(n))
    space = (n, 1) if by == "rows" else (int(n**0.5), n // int(n**0.5))
    model, batch = field_model(grid, Plan("associative", FRAMES)), jax.ShapeDtypeStruct((1, FRAMES, *grid, 1), jnp.float32)
    with jax.set_mesh(make_mesh(space=space)):
        return told({"training": training, "rollout": rollout_step}[what](model, batch))


def processor_seconds(programs, seconds=20):
    "Medians of what programs take of the processors, in turns: {name: (compiled program, arguments)} → {name: seconds}."
    calls = {name: partial(program, *args) for name, (program, args) in programs.items()}
    times = interleaved({"": calls}, seconds, clock=time.process_time)[""]
    return {name: float(f"{median:.4g}") for name, (_, median, _) in times.items()}


LAYERS = {
    "S5": partial(S5SSM, d_hidden=32, blocks=1), "LRU": partial(LRU, d_hidden=32), "S4D": partial(S4D, d_hidden=32),
}


def on_mesh(mesh, program, *args):
    "A compiled program and what it runs on; arrays (batch, time, …) lie as the mesh cuts them, all else everywhere."
    with jax.set_mesh(mesh):
        cuts = [name if name in mesh.axis_names else None for name in ("batch", "time", "space", "space_1")]
        part = lambda z: jax.device_put(z, NamedSharding(mesh, PartitionSpec(*cuts[: z.ndim - 1])))
        args = tuple(part(z) if isinstance(z, jax.Array) and z.ndim > 2 else everywhere(z) for z in args)
        return jax.jit(program).lower(*args).compile(), args


def work(name, steps, batch=4):
    """A layer's recurrence and its gradient, on a device alone and where time is cut, all devices together.

    Alone twice: in segments, as it is run there, and all steps at once, as a device runs its stretch.
    """
    layer = LAYERS[name](d_model=32)
    u = jnp.asarray(np.random.default_rng(0).normal(size=(batch, steps, 32)), jnp.float32)
    v, found = jax.jit(layer.init)(KEY, u), {}
    for kind in ("run", "gradient"):
        programs = {}
        for n in (1, "at once", 2, 4, 8):
            own = layer.clone(plan=Plan(segment=steps)) if n == "at once" else layer
            run = lambda v, u, own=own: own.apply(v, u, method="prefill")[1]
            slope = jax.grad(lambda v, u, run=run: jnp.sum(run(v, u) ** 2), (0, 1))
            programs[n] = on_mesh(make_mesh(time=n if n != "at once" else 1), run if kind == "run" else slope, v, u)
        found[kind] = processor_seconds(programs)
    return found


def weak(side=48):
    "A training step where each device has 48 × 48 places, however many there are."
    programs = {}
    for rows, columns in (1, 1), (2, 1), (2, 2), (4, 2):
        grid = rows * side, columns * side
        model = conv_s5(grid, 1, width=16, d_hidden=16, n_layers=2)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, *grid, 1)), jnp.float32)
        slope = jax.grad(partial(next_frame_loss, model))
        programs[rows * columns] = on_mesh(make_mesh(space=(rows, columns)), slope, jax.jit(model.init)(KEY, x), x, KEY)
    return processor_seconds(programs)


KINDS = {
    **{f"training, {n}": partial(on_paper, "training", n, "squares") for n in COUNTS},
    **{f"training, {n} rows": partial(on_paper, "training", n, "rows") for n in (64, 512)},
    **{f"rollout, {n}": partial(on_paper, "rollout", n, "squares") for n in COUNTS},
    **{f"sequence, {n}": partial(on_paper, "sequence", n, "time") for n in COUNTS},
    **{f"work, {name}": partial(work, name, 2**12 if name == "S4D" else 2**15) for name in LAYERS},
    "weak": weak,
}
QUICK = {"rollout, 4": partial(on_paper, "rollout", 4, "squares", (16, 16))}


def apart(quick, kind, seed):
    "One of them in a process of its own, with as many devices as it wants."
    number = next((int(word) for word in kind.split() if word.isdecimal()), 8)
    flags = f"--xla_force_host_platform_device_count={number}"
    words = [sys.executable, __file__, "--one", kind, *(["--quick"] if quick else [])]
    made = subprocess.run(words, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True)
    return json.loads(made.stdout)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small program, kept under runs/")
    parser.add_argument("--one", metavar="KIND", help="one of them, in this process; prints JSON")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], help="some of them (default: all)")
    parser.add_argument("--out", type=Path, help="file of the results")
    args = parser.parse_args(args)
    kinds = QUICK if args.quick else KINDS
    if args.one:
        print(json.dumps(kinds[args.one]()))
        return
    file = args.out or (Path("runs/mesh.json") if args.quick else FILE)
    run_missing(file, args.kinds or kinds, 1, partial(apart, args.quick))


if __name__ == "__main__":
    main()
