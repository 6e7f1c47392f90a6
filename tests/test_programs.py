"""Layers and models as parts of other people's programs: strict about dtypes and ranks, in double precision, with products
in half precision, exported with a length left open, bridged to NNX. (Inside `jax.shard_map`: `test_guests.py`.)
"""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from sweep import EQUAL_STEPS_ONLY, KEY, LAYERS, WHOLE_ONLY, close, enable_x64, noise

from ssm_lib import LRU, S5SSM, BatchStackedSSM2DModel, BatchStackedSSMModel, Forecaster, rollout
from ssm_lib.recipes import residual_conv

each_layer = pytest.mark.parametrize("name", LAYERS | WHOLE_ONLY)
ssm = partial(S5SSM, d_hidden=16, blocks=2)
MODELS = {
    "line": (BatchStackedSSMModel(ssm, d_model=6, d_vars=2, n_layers=2, activation="full_glu"), (3, 9, 6, 2)),
    "grid": (BatchStackedSSM2DModel(ssm, d_model=(3, 2), d_vars=2, n_layers=2, activation="half_glu2", norm="batch"), (3, 9, 3, 2, 2)),
    "increment": (
        Forecaster(BatchStackedSSMModel(ssm, d_model=6, d_vars=2, n_layers=1), (0.0, 0.0), (1.0, 1.0), (0.1, 0.1)),
        (3, 9, 6, 2),
    ),
}


def traced(module, x, said, carried=True):
    "Everything that the contract offers, traced: promotion is refused, or not, before anything is compiled."
    v = jax.eval_shape(module.init, KEY, x)
    ways = {
        "whole": lambda v, x: module.apply(v, x, **said),
        "equal steps": lambda v, x: module.apply(v, x, dt=0.5),
        "gradient": jax.grad(lambda v, x: jnp.sum(module.apply(v, x) ** 2)),
    }
    if carried:
        lead = module.apply(v, x, method=lambda m, x: x.shape[: m.batch_axes if m.batch_axes is not None else x.ndim - 2])
        frame = jax.eval_shape(lambda x: x[:, 0] if lead else x[0], x)
        carry = jax.eval_shape(lambda v: module.apply(v, lead, method="initial_carry"), v)
        ways["pieces"] = lambda v, x: module.apply(v, x, method="prefill", **said)
        jax.eval_shape(lambda v, c, x: module.apply(v, c, x, method="step"), v, carry, frame)
    return {way: jax.eval_shape(f, v, x) for way, f in ways.items()}


@each_layer
def test_a_layer_in_a_strict_program(name):
    layer, u = (LAYERS | WHOLE_ONLY)[name][0](d_model=4), jax.ShapeDtypeStruct((2, 24, 4), jnp.float32)
    said = {"mask": jnp.arange(24) % 5 > 0, "reset": jnp.zeros((2, 24), bool)}
    said |= {} if name in EQUAL_STEPS_ONLY else {"dt": jnp.linspace(0.5, 1.5, 24)}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        traced(layer, u, said, carried=name in LAYERS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_a_strict_program(name):
    model, shape = MODELS[name]
    model = model.clone(training=False) if hasattr(model, "training") else model
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        traced(model, x, {"mask": jnp.arange(9) != 4})
        v = jax.eval_shape(model.init, KEY, x)
        assert jax.eval_shape(lambda v, x: rollout(model, v, x, 5), v, x).shape == (3, 5, *shape[2:])


@each_layer
def test_parameters_begin_in_single_precision(name):
    layer = (LAYERS | WHOLE_ONLY)[name][0](d_model=4)
    with enable_x64(True):
        v = jax.eval_shape(layer.init, KEY, jnp.zeros((3, 4)))
    assert {p.dtype for p in jax.tree.leaves(v)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ("s5_zoh", "s5_both", "lru", "dss", "s4d_zoh", "s4"))
def test_export_with_a_length_left_open(name):
    ssm, tolerance = (LAYERS | WHOLE_ONLY)[name]
    layer, u = ssm(d_model=4), noise(3, 37, 4)
    v = jax.jit(layer.init)(KEY, u)
    way = layer.apply if name in WHOLE_ONLY else partial(layer.apply, method="prefill")
    for f in (layer.apply, way):
        program = export.export(jax.jit(partial(f, v)))(jax.ShapeDtypeStruct(export.symbolic_shape("B, L, 4"), jnp.float32))
        for got, want in zip(jax.tree.leaves(program.call(u)), jax.tree.leaves(jax.jit(f)(v, u))):
            close(got, want, tolerance)


VOLUME = residual_conv((3, 4, 2), d_vars=1, width=4, n_layers=1), (2, 3, 3, 4, 2, 1)


@pytest.mark.parametrize("model, shape", (MODELS["line"], VOLUME), ids=("line", "volume"))
def test_export_of_a_rollout(model, shape):
    x, frame = noise(*shape), shape[2:]
    v = jax.jit(model.init)(KEY, x)
    open_ends = jax.ShapeDtypeStruct((*export.symbolic_shape("B, T"), *frame), jnp.float32)
    program = export.export(jax.jit(lambda x: rollout(model, v, x, 5)))(open_ends)
    close(program.call(x), rollout(model, v, x, 5))
    assert program.call(x[:1, :1]).shape == (1, 5, *frame)


def products(jaxpr):
    "The dtypes of all matrix products in a program."
    inner = lambda p: getattr(p, "jaxpr", p)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(v.aval.dtype.name for v in eqn.invars)
        for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda p: hasattr(inner(p), "eqns")):
            if hasattr(inner(value), "eqns"):
                yield from products(inner(value))


@pytest.mark.parametrize("name", ("S5SSM", "LRU", "model"))
def test_products_in_half_precision(name):
    layers = {"S5SSM": ssm, "LRU": partial(LRU, d_hidden=16)}
    half = jnp.bfloat16
    if name == "model":
        make = lambda dtype: MODELS["line"][0].clone(ssm=partial(ssm, dtype=dtype), dtype=dtype)
        x = noise(*MODELS["line"][1])
    else:
        make, x = lambda dtype: layers[name](d_model=6, dtype=dtype), noise(2, 40, 6)
    v = jax.jit(make(None).init)(KEY, x)
    loss = lambda dtype: lambda v, x: jnp.mean(make(dtype).apply(v, x) ** 2)
    counts = {dtype: Counter(products(jax.make_jaxpr(jax.grad(loss(dtype)))(v, x).jaxpr)) for dtype in (None, half)}
    both = ("float32", "float32"), ("bfloat16", "bfloat16")
    assert not counts[None][both[1]] and not counts[half].keys() - {*both}
    left = counts[half][both[0]]  # D, spread over the rows by a product, and its derivative
    assert left <= 2 * (2 if name == "model" else 1) and sum(counts[half].values()) == sum(counts[None].values())
    y, rough = (jax.jit(make(dtype).apply)(v, x) for dtype in (None, half))
    assert rough.dtype == y.dtype and 0 < np.abs(rough - y).max() < 0.03 * np.abs(y).max()
    if name != "model":
        carry = jax.eval_shape(lambda v: make(half).apply(v, method="initial_carry"), v)
        assert {c.dtype for c in jax.tree.leaves(carry)} == {jnp.dtype("complex64")}


def test_a_model_bridged_to_nnx():
    from flax import nnx

    model, shape = MODELS["grid"]
    x = noise(*shape)
    bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), x)
    state = nnx.state(bridged)
    future = rollout(bridged, state, x, 4)
    params = {name: part for name, part in nnx.to_pure_dict(state).items() if not name.endswith("rngs")}
    stats = {n: {"normalize": {s: p["normalize"].pop(s) for s in ("mean", "var")}} for n, p in params.items() if "normalize" in p}
    close(future, rollout(model, {"params": params, "batch_stats": stats}, x, 4))
