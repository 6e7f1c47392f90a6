"""Layers, blocks and models inside Flax's own tools: bridged to NNX, many as one by `nn.scan`, frugal by `nn.remat`, a step
exported, a carry on disk. As a user would write it (`nbs/tutorials/12_in_your_flax_model.ipynb`).
"""

import re
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export
from sweep import EQUAL_STEPS_ONLY, KEY, LAYERS, NO_IMPULSE, by_step, close, noise

from ssm_lib import LRU, S5SSM, BatchStackedSSMModel, Forecaster, Recurrent, SequenceLayer, rollout

each_layer = pytest.mark.parametrize("name", LAYERS)
s5 = partial(S5SSM, d_hidden=16, blocks=2)


def same(got, want, tolerance=1e-5):
    "Two trees of the same form whose leaves are close."
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: close(a, b, tolerance), got, want)


def power(y):
    return jnp.mean(y**2)


# --- NNX --------------------------------------------------------------------------------------------------------------


def bridge(module, x):
    return nnx.bridge.lazy_init(nnx.bridge.ToNNX(module), x, rngs=nnx.Rngs(0))


def params_of(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@each_layer
def test_a_bridged_layer_is_the_same_program(name):
    "Every method, with all that is said of the steps, and the gradient: the same equations, whatever the numbers."
    layer, u = LAYERS[name][0](d_model=4), jax.ShapeDtypeStruct((2, 24, 4), jnp.float32)
    graph, state = nnx.split(nnx.eval_shape(lambda: bridge(layer, jnp.zeros(u.shape))))
    v = jax.eval_shape(layer.init, KEY, u)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(state)) == jax.tree.map(jnp.shape, v["params"])

    said = {"mask": jnp.arange(24) % 5 > 0, "reset": jnp.arange(24) == 9}
    said |= {} if name in EQUAL_STEPS_ONLY else {"dt": jnp.linspace(0.5, 1.5, 24)}
    frame = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    carry = jax.eval_shape(lambda v: layer.apply(v, 2, method="initial_carry"), v)
    calls = {
        "whole": ((u,), said),
        "pieces": ((u, carry), said | {"method": "prefill"}),
        "a step": ((carry, frame), {"method": "step"}),
        "axis": ((u,), {"axis": 0}),
    }
    through = {"bridge": lambda state, *args, **said: nnx.merge(graph, state)(*args, **said), "Linen": layer.apply}
    text = lambda f, *args: re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(f)(*args)))
    for inputs, options in calls.values():
        f = {way: partial(call, **options) for way, call in through.items()}
        assert text(f["bridge"], state, *inputs) == text(f["Linen"], v, *inputs)


class Own(nnx.Module):
    "A layer of this library between two of NNX's."

    def __init__(self, rngs):
        self.lift = nnx.Linear(1, 4, rngs=rngs)
        self.memory = nnx.bridge.lazy_init(nnx.bridge.ToNNX(s5(d_model=4)), jnp.zeros((1, 4)), rngs=rngs)
        self.read = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, u):
        return self.read(self.memory(self.lift(u)))

    def step(self, carry, u_k):
        carry, h = self.memory(carry, self.lift(u_k), method="step")
        return carry, self.read(h)


def test_inside_a_network_of_nnx():
    "Its gradient is that of the same network by hand; updates along it lower the loss; step = whole, as it was trained."
    net, u = nnx.jit(lambda: Own(nnx.Rngs(0)))(), noise(3, 20, 1)
    target = jnp.cumsum(u, 1) / 4
    dense = lambda p, u: u @ p["kernel"] + p["bias"]
    by_hand = lambda p: dense(p["read"], s5(d_model=4).apply({"params": p["memory"]}, dense(p["lift"], u)))
    learn = nnx.jit(nnx.value_and_grad(lambda net: power(net(u) - target)))
    value, slopes = learn(net)
    want, of_hand = jax.jit(jax.value_and_grad(lambda p: power(by_hand(p) - target)))(params_of(net))
    close(value, want)
    same(nnx.to_pure_dict(slopes), of_hand, 1e-4)

    optimizer = optax.sgd(0.05)
    state = optimizer.init(nnx.state(net, nnx.Param))
    for _ in range(10):
        params = nnx.state(net, nnx.Param)
        moves, state = optimizer.update(learn(net)[1], state, params)
        nnx.update(net, optax.apply_updates(params, moves))
    assert learn(net)[0] < 0.9 * value
    zero = net.memory(3, method="initial_carry")
    steps = jax.lax.scan(net.step, zero, jnp.moveaxis(u, 1, 0))[1]  # no keys are drawn, so another trace may hold it
    close(jnp.moveaxis(steps, 0, 1), nnx.jit(lambda net: net(u))(net))


def test_a_bridged_block_in_training():
    "Batch statistics are renewed in place, to Linen's; dropout takes the keys of the call."
    block, x = SequenceLayer(s5, 4, norm="batch", dropout=0.4), noise(3, 20, 4)
    bridged = nnx.jit(lambda: bridge(block, x))()
    stats = lambda: jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(bridged, nnx.BatchStat)))
    v, before, key = {"params": params_of(bridged)}, stats(), jax.random.PRNGKey(3)
    train = nnx.jit(lambda m, x, rngs: m(x, rngs=rngs, mutable=["batch_stats"]))
    outs = [train(bridged, x, nnx.Rngs(dropout=seed)) for seed in (1, 1, 2)]
    close(outs[0], outs[1])
    assert np.abs(outs[0] - outs[2]).max() > 0.1
    of_linen = jax.jit(partial(block.apply, mutable=["batch_stats"]))
    for _ in range(3):
        before = of_linen(v | {"batch_stats": before}, x, rngs={"dropout": key})[1]["batch_stats"]
    same(stats(), before)


# --- Many blocks as one -----------------------------------------------------------------------------------------------


class Blocks(Recurrent):
    "Equal blocks: one after the other, or one that is scanned over parameters stacked along axis 0."

    ssm: partial
    depth: int
    scanned: bool
    block: type = SequenceLayer
    options: tuple = ()
    d_model: int = 4

    frame = property(lambda self: (self.d_model,))

    def setup(self):
        make = lambda: self.block(self.ssm, self.d_model, **dict(self.options))
        self.blocks = make() if self.scanned else [make() for _ in range(self.depth)]

    def stretch(self, x, carry, times):
        def one(block, x, carry):
            carry, x = block.stretch(x, carry, times)
            return x, carry

        if self.scanned:
            axes, keys = {"params": 0, "batch_stats": 0}, {"params": True, "dropout": True}
            x, carry = nn.scan(one, variable_axes=axes, split_rngs=keys, length=self.depth)(self.blocks, x, carry)
            return carry, x
        carries = []
        for block, c in zip(self.blocks, carry or [None] * self.depth):
            x, c = one(block, x, c)
            carries.append(c)
        return tuple(carries), x


def cut(variables, depth):
    "The slices of stacked variables, under the names that blocks one after the other have."
    part = lambda tree, i: jax.tree.map(lambda p: p[i], tree["blocks"])
    return {kind: {f"blocks_{i}": part(tree, i) for i in range(depth)} for kind, tree in variables.items()}


def in_steps(m, v, u, said, start):
    "A stretch, and then steps from where it ends."
    part = lambda at: {name: s[at] for name, s in said.items()}
    carry, head = m.apply(v, u[:start], method="prefill", **part(slice(start)))
    one = lambda carry, at: m.apply(v, carry, at[0], method="step", **at[1])
    return jnp.concatenate([head, jax.lax.scan(one, carry, (u[start:], part(slice(start, None))))[1]])


SAID = {"mask": jnp.arange(20) % 5 > 0, "reset": jnp.arange(20) == 9, "dt": jnp.linspace(0.5, 1.5, 20)}


def test_scanned_blocks_are_the_blocks():
    "Whole and in steps, with what is said of the steps; each block begins with parameters of its own."
    u = noise(20, 4)
    deep, row = (Blocks(s5, 2, scanned) for scanned in (True, False))
    v = jax.jit(deep.init)(KEY, u)
    assert {p.shape[0] for p in jax.tree.leaves(v)} == {2}
    assert np.abs(np.diff(v["params"]["blocks"]["seq"]["C"], axis=0)).max() > 0.1
    y = jax.jit(row.apply)(cut(v, 2), u, **SAID)
    for way in jax.jit(lambda v: (deep.apply(v, u, **SAID), in_steps(deep, v, u, SAID, 6)))(v):
        close(way, y, 3e-5)


def test_the_gradient_of_scanned_blocks():
    deep, row = (Blocks(partial(LRU, d_hidden=6), 2, scanned) for scanned in (True, False))
    u = noise(20, 4)
    v = jax.jit(deep.init)(KEY, u)
    slopes = lambda m, v: jax.jit(jax.grad(lambda v, u: power(m.apply(v, u)), (0, 1)))(v, u)
    of_deep, at_u = slopes(deep, v)
    same((cut(of_deep, 2), at_u), slopes(row, cut(v, 2)), 1e-3)


def test_scanned_blocks_keep_statistics_of_their_own():
    x, options = noise(3, 20, 4), (("norm", "batch"),)
    deep, row = (Blocks(partial(LRU, d_hidden=6), 2, scanned, options=options) for scanned in (True, False))
    v = jax.jit(deep.init)(KEY, x)
    y, stats = jax.jit(partial(deep.apply, mutable=["batch_stats"]))(v, x)
    want, of_row = jax.jit(partial(row.apply, mutable=["batch_stats"]))(cut(v, 2), x)
    close(y, want)
    same(cut(stats, 2), of_row)
    assert np.abs(np.diff(stats["batch_stats"]["blocks"]["normalize"]["mean"], axis=0)).max() > 1e-4


def equations(jaxpr):
    "How many equations a program is made of, those of inner programs included."
    program = lambda p: getattr(p, "jaxpr", p)
    parts = jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns], is_leaf=lambda p: hasattr(program(p), "eqns"))
    return len(jaxpr.eqns) + sum(equations(program(p)) for p in parts if hasattr(program(p), "eqns"))


@each_layer
def test_scanned_blocks_cost_one_block_to_compile(name):
    "As many equations for three blocks as for two; written out, more for each."
    u = jax.ShapeDtypeStruct((20, 4), jnp.float32)

    def size(depth, scanned):
        stack = Blocks(LAYERS[name][0], depth, scanned)
        v = jax.eval_shape(stack.init, KEY, u)
        return equations(jax.make_jaxpr(stack.apply)(v, u).jaxpr)

    assert size(2, True) == size(3, True) < size(3, False) / 2


def test_steps_scanned_over_time():
    "`nn.scan` over time takes `step` as it is, as it takes the cells of Linen."
    over = nn.scan(S5SSM, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1, methods=["step"])
    layer, u = s5(d_model=4), noise(3, 20, 4)
    v = jax.jit(layer.init)(KEY, u)
    carry, head = jax.jit(partial(layer.apply, method="prefill"))(v, u[:, :8])
    rest = jax.jit(partial(over(4, 16, blocks=2).apply, method="step"))(v, carry, u[:, 8:])[1]
    close(jnp.concatenate([head, rest], 1), jax.jit(layer.apply)(v, u))


# --- Memory for time --------------------------------------------------------------------------------------------------

DOORS = ["__call__", "step", "prefill"]
WAYS = {
    "whole": lambda m, v, u: m.apply(v, u, mask=jnp.arange(len(u)) % 5 > 0),
    "pieces": lambda m, v, u: m.apply(v, u, method="prefill")[1],
    "steps": lambda m, v, u: by_step(m, v, u)[1],
}


def kept(f, *args):
    "Bytes that the gradient of f for its first argument keeps of the way forward."
    tree = jax.eval_shape(lambda first, *rest: jax.vjp(lambda first: f(first, *rest), first)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_block_that_is_worked_out_again():
    "`nn.remat`: the same values and gradients, and of what a gradient needs a third at most is kept, in all ways."
    block, u = SequenceLayer(partial(LRU, d_hidden=16), 4), noise(20, 4)
    v, long = jax.jit(block.init)(KEY, u), jax.ShapeDtypeStruct((4096, 4), jnp.float32)
    by_stretch, by_doors = (nn.remat(SequenceLayer, methods=m)(block.ssm, 4) for m in (["stretch"], DOORS))

    def learn(m):
        outs = lambda v: [WAYS[way](m, v, u) for way in ("whole", "steps")]
        loss = lambda v: (lambda ys: (sum(map(power, ys)), ys))(outs(v))
        return jax.jit(outs if m is by_doors else jax.grad(loss, has_aux=True))(v)

    slopes, ys = learn(block)
    same(learn(by_stretch), (slopes, ys), 1e-4)
    same(learn(by_doors), ys)
    for way in WAYS.values():
        for frugal in (by_stretch, by_doors):
            assert kept(partial(way, frugal), v, long) < kept(partial(way, block), v, long) / 3


@pytest.mark.parametrize("name", ("s5_zoh", "dss"))
def test_options_stay_python_values_in_a_wrapped_stretch(name):
    block = nn.remat(SequenceLayer, methods=["stretch"])(LAYERS[name][0], 4)
    u = jax.ShapeDtypeStruct((24, 3, 4), jnp.float32)
    v = jax.eval_shape(partial(block.init, axis=0), KEY, u)
    assert jax.eval_shape(lambda v, u: block.apply(v, u, axis=0), v, u) == u
    every = lambda v, u: block.apply(v, u, axis=0, all_carries=True, method="prefill")
    carry = jax.tree.leaves(jax.eval_shape(every, v, u)[0])[0]
    assert carry.shape[:2] == (24, 3)


def test_scanned_and_worked_out_again():
    "Both together: the gradient of the blocks, and a plan of memory that is a half at most of that without `nn.remat`."
    u = noise(4096, 4)
    blocks = nn.remat(SequenceLayer, methods=["stretch"]), SequenceLayer
    frugal, plain = (Blocks(partial(LRU, d_hidden=16), 4, True, block) for block in blocks)
    v = jax.jit(plain.init)(KEY, u[:20])
    learn = lambda m: jax.jit(jax.grad(lambda v, u: power(m.apply(v, u)))).lower(v, u).compile()
    frugal, plain = learn(frugal), learn(plain)
    same(frugal(v, u), plain(v, u), 1e-4)
    planned = lambda program: program.memory_analysis().temp_size_in_bytes
    assert planned(frugal) < planned(plain) / 2


# --- A step that leaves Python ----------------------------------------------------------------------------------------

MODELS = {
    "line": BatchStackedSSMModel(s5, d_model=6, d_vars=2, n_layers=1),
    "increment": Forecaster(
        BatchStackedSSMModel(partial(LRU, d_hidden=8), d_model=6, d_vars=2, n_layers=2), (0.0, 0.1), (1.0, 2.0), (0.1, 0.2)
    ),
}


def exported(module, v, carry, frame):
    "One step, for any batch, with the variables inside."
    batch = export.symbolic_shape("B")
    left_open = lambda z: jax.ShapeDtypeStruct((*batch, *z.shape[1:]), z.dtype)
    step = jax.jit(partial(module.apply, v, method="step"))
    return export.export(step)(*jax.tree.map(left_open, (carry, frame)))


@pytest.mark.parametrize("name", ("s5_no_conj", "lru", "dss", "s4"))
def test_an_exported_step_of_a_layer(name):
    ssm, tolerance = LAYERS[name]
    layer, u = ssm(d_model=4), noise(3, 12, 4)
    v = jax.jit(layer.init)(KEY, u)
    carry = layer.apply(v, 3, method="initial_carry")
    step, ys = jax.jit(exported(layer, v, carry, u[:, 0]).call), []
    for k in range(12):
        carry, y = step(carry, u[:, k])
        ys.append(y)
    close(jnp.stack(ys, 1), jax.jit(layer.apply)(v, u), tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_step_of_a_model(name):
    "Fed with its own answers by a loop that knows no model, it is the rollout."
    model, x = MODELS[name], noise(3, 9, 6, 2)
    v = jax.jit(model.init)(KEY, x)
    carry, y = jax.jit(partial(model.apply, method="prefill"))(v, x)
    step, frames = jax.jit(exported(model, v, carry, x[:, 0]).call), [y[:, -1]]
    for _ in range(4):
        carry, frame = step(carry, frames[-1])
        frames.append(frame)
    close(jnp.stack(frames, 1), rollout(model, v, x, 5))


SERVER = """
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export

folder = Path(sys.argv[1])
program = export.deserialize(bytearray((folder / "step.bin").read_bytes()))
(carry, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
step, inputs, answers = jax.jit(program.call), np.load(folder / "inputs.npy"), []
carry = jax.tree.map(lambda z: jax.numpy.zeros((len(inputs), *z.shape[1:]), z.dtype), carry)
for k in range(inputs.shape[1]):
    carry, answer = step(carry, inputs[:, k])
    answers.append(answer)
np.save(folder / "answers.npy", np.stack(answers, 1))
print(*sorted({"ssm_lib", "flax", "jax"} & set(sys.modules)))
"""


def test_a_server_without_this_library(tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export writes bytes with it")
    layer, u = LRU(d_model=4, d_hidden=16), noise(3, 9, 4)
    v = jax.jit(layer.init)(KEY, u)
    carry = layer.apply(v, 3, method="initial_carry")
    (tmp_path / "step.bin").write_bytes(exported(layer, v, carry, u[:, 0]).serialize())
    np.save(tmp_path / "inputs.npy", u)
    run = subprocess.run([sys.executable, "-c", SERVER, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == ["jax"], run.stdout + run.stderr[-3000:]
    close(np.load(tmp_path / "answers.npy"), jax.jit(layer.apply)(v, u))


# --- A carry on disk --------------------------------------------------------------------------------------------------


def saved_and_restored(tree, like, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "carries", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "carries", like)


def filled(tree):
    "Other numbers, of the same shapes and dtypes; True where there is a bool."
    rng = np.random.default_rng(1)
    number = lambda z: rng.normal(size=z.shape) + (1j * rng.normal(size=z.shape) if z.dtype.kind == "c" else 0)
    return jax.tree.map(lambda z: jnp.asarray(number(z)).astype(z.dtype) if z.dtype != bool else ~z, tree)


def test_carries_of_every_layer_on_disk(tmp_path):
    "To the same bits; those of an initial-condition layer, which remember whether the frame was read, too."
    u, zeros = jax.ShapeDtypeStruct((3, 24, 4), jnp.float32), {}
    for name, (ssm, _) in LAYERS.items():
        kinds = {"": ssm(d_model=4)} if name in NO_IMPULSE else {"": ssm(d_model=4), " from a frame": ssm(d_model=4, n_steps=8)}
        for kind, layer in kinds.items():
            v = jax.eval_shape(layer.init, KEY, u)
            carry = jax.eval_shape(partial(layer.apply, method=lambda m: m.initial_carry(3)), v)
            zeros[name + kind] = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), carry)
    carries = filled(zeros)
    found = saved_and_restored(carries, zeros, tmp_path)
    assert jax.tree.structure(found) == jax.tree.structure(carries)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(carries)):
        assert got.dtype == want.dtype and np.any(np.asarray(want))
        np.testing.assert_array_equal(got, want)


def test_going_on_from_a_carry_on_disk(tmp_path):
    model, x = MODELS["increment"], noise(3, 12, 6, 2)
    v = jax.jit(model.init)(KEY, x)
    prefill = jax.jit(partial(model.apply, method="prefill"))
    zero = model.apply(v, 3, method="initial_carry")
    carry, head = prefill(v, x[:, :6], zero)
    restored = saved_and_restored({"carry": carry}, {"carry": zero}, tmp_path)["carry"]
    rest, y = prefill(v, x[:, 6:], restored)[1], jax.jit(model.apply)(v, x)
    close(jnp.concatenate([head, rest], 1), y)
    assert np.abs(prefill(v, x[:, 6:], zero)[1] - rest).max() > 1e-3  # it is the carry that makes it so
