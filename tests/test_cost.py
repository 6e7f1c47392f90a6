"""What can be said of cost without a clock: planned memory, arrays that must not exist, work that is hoisted, compilations."""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from sweep import KEY, LAYERS, WHOLE_ONLY, close, noise

from ssm_lib import S5SSM, BatchStackedSSMModel, Plan, rollout, rollout_stream
from ssm_lib.run import segment_steps

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import newer
from speed import SHAPES, PublishedS5, geometric_mean


def planned(layer, B, L):
    "Temporary memory of the benchmark's gradient, Σ y·w by parameters and input with the value: compiled from shapes alone."
    u = jax.ShapeDtypeStruct((B, L, layer.d_model), jnp.float32)
    loss = lambda v, u, w: jnp.sum(layer.apply(v, u) * w)
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(jax.eval_shape(layer.init, KEY, u), u, u)
    quick = {"xla_backend_optimization_level": 0}  # memory is planned before there is any code
    return program.compile(compiler_options=quick).memory_analysis().temp_size_in_bytes


def test_memory_of_the_gradient():
    "Planned by XLA, so the same on every run: over the benchmark's shapes, at most a sixth of the published formulation's."
    saved = []
    for B, L, H, d_hidden in SHAPES:
        ours, published = (planned(cls(H, d_hidden, blocks=8), B, L) for cls in (S5SSM, PublishedS5))
        saved.append(published / ours)
    assert geometric_mean(saved) > 6, saved


@pytest.mark.parametrize("name", ("s5_zoh", "s5_bilinear", "s5_both", "lru"))
def test_no_state_of_a_whole_sequence(name):
    "Neither forward nor in the gradient is there a complex array with an axis of the length of the sequence."
    L = 2**15 + 3  # long enough for the library's own segments
    segment = segment_steps(L, 8)
    assert segment < L / 8
    layer = (LAYERS | WHOLE_ONLY)[name][0](d_model=5)
    v = jax.jit(layer.init)(KEY, noise(8, 5))
    loss = lambda v, u: jnp.sum(layer.apply(v, u) ** 2)
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(v, noise(L, 5)).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"c64\[([\d,]+)\]", text)}
    assert shapes
    elements = segment * 16 * 2  # of a segment of states, both directions
    assert max(map(math.prod, shapes)) <= elements, shapes


def test_profilers_show_names():
    model = BatchStackedSSMModel(partial(S5SSM, d_hidden=8, blocks=1), d_model=4, d_vars=1, n_layers=1, training=False)
    x = noise(2, 9, 4, 1)
    text = jax.jit(model.apply).lower(jax.eval_shape(model.init, KEY, x), x).compile().as_text()
    assert "blocks_0.stretch/seq.stretch/recurrence" in text


def copies(text, elements):
    """Instructions of an HLO module that move so many elements or more: transposes and copies.

    Not one that only changes the place of an axis of length one in the layout: nothing moves there.
    """
    order = lambda shape, layout: [k for k in layout.split(",") if shape.split(",")[int(k)] != "1"]
    layouts = dict(re.findall(r"(%[\w.\-]+) = \w+\[[\d,]+\]\{([\d,]*)", text))
    moved = []
    for shape, layout, kind, operand in re.findall(r"= \w+\[([\d,]+)\]\{([\d,]*)\S* (transpose|copy)\((%[\w.\-]+)", text):
        before = layouts.get(operand, layout)
        still = kind == "copy" and before != layout and order(shape, before) == order(shape, layout)
        if math.prod(map(int, shape.split(","))) >= elements and not still:
            moved.append((shape, layout, kind))
    return moved


@pytest.mark.parametrize("name", ("s5_zoh", "lru"))
def test_a_field_is_not_moved(name):
    """A layer at every place of (B, T, H, W, F): called, prefilled and stepped without a transpose or copy of a segment.

    With the gradient no transpose either; what is copied there are zeros to begin with.
    """
    B, T, space, F = 2, 64, (8, 8), 5
    layer, field = LAYERS[name][0](d_model=F, plan=Plan(segment=16)), noise(B, T, *space, F)
    v = jax.jit(layer.init)(KEY, field[0, :, 0, 0])
    carry = jax.jit(lambda v: layer.apply(v, (B, *space), method="initial_carry"))(v)
    programs = {
        "call": jax.jit(partial(layer.apply, axis=1)).lower(v, field),
        "prefill": jax.jit(partial(layer.apply, axis=1, method="prefill")).lower(v, field),
        "gradient": jax.jit(jax.grad(lambda v, u: jnp.sum(layer.apply(v, u, axis=1) ** 2), (0, 1))).lower(v, field),
        "step": jax.jit(partial(layer.apply, method="step")).lower(v, carry, field[:, 0]),
    }
    for kind, program in programs.items():
        moved = copies(program.compile().as_text(), (1 if kind == "step" else 16) * math.prod((B, *space, F)))
        assert not [m for m in moved if kind != "gradient" or m[2] == "transpose"], (kind, moved)


@pytest.mark.parametrize("name", ("s5_zoh", "lru", "dss", "s4d_zoh", "s4d_bilinear"))
def test_a_step_is_no_dearer_than_by_hand(name):
    "Against the recurrence written out for one step: no loop, and not a twentieth more arithmetic."
    layer, u = LAYERS[name][0](d_model=32), noise(4, 32)
    v = jax.jit(layer.init)(KEY, u)

    def by_hand(v, x, u):
        system = layer.apply(v, method="system")
        Lambda_bar, Bu = system.drive(system.step(None), u)
        x = Lambda_bar * x + Bu
        return x, system.observe(x, u) + system.D * u

    carry = jax.jit(lambda v: layer.apply(v, 4, method="initial_carry"))(v)
    ours = jax.jit(partial(layer.apply, method="step")).lower(v, carry, u).compile()
    plain = jax.jit(by_hand).lower(v, carry, u).compile()
    assert " while(" not in ours.as_text()
    assert ours.cost_analysis()["flops"] <= 1.05 * plain.cost_analysis()["flops"]
    for got, want in zip(ours(v, carry, u), plain(v, carry, u)):
        close(got, want)


def loop_bodies(text):
    "The text of each while loop's body in an HLO module, with all that it calls."
    parts = {c.split(" ", 1)[0].lstrip("%"): c for c in re.split(r"\n(?=%|ENTRY)", text)}

    def reach(name, seen):
        if name in parts and name not in seen:
            seen.add(name)
            for inner in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", parts[name]):
                reach(inner, seen)
        return seen

    return ["\n".join(parts[n] for n in reach(body, set())) for body in re.findall(r"body=%?([\w.\-]+)", text)]


def test_a_rollout_discretises_once():
    "e^{λΔ} takes a cosine and a sine; there are some in the program, and none in the loop over steps."
    model = BatchStackedSSMModel(partial(S5SSM, d_hidden=16, blocks=2), d_model=4, d_vars=1, n_layers=2)
    history = noise(2, 1, 4, 1)
    v = jax.jit(lambda key: model.clone(training=False).init(key, history))(KEY)
    text = jax.jit(lambda v, h: rollout(model, v, h, 50)).lower(v, history).compile().as_text()
    assert " cosine(" in text
    bodies = loop_bodies(text)
    assert bodies and not any(" cosine(" in body or " sine(" in body for body in bodies)


def test_a_rollout_compiles_once():
    _next_piece, _rollout = (sys.modules["ssm_lib.rollout"].__dict__[name] for name in ("_next_piece", "_rollout"))
    model = BatchStackedSSMModel(partial(S5SSM, d_hidden=8, blocks=1), d_model=4, d_vars=1, n_layers=1)
    history = noise(2, 1, 4, 1)
    v = jax.jit(lambda key: model.clone(training=False).init(key, history))(KEY)
    before = _rollout._cache_size(), _next_piece._cache_size()
    for seed in range(3):
        rollout(model, v, noise(2, 1, 4, 1, seed=seed), 5)
        list(rollout_stream(model, v, noise(2, 1, 4, 1, seed=seed), 20, chunk=5))
    assert (_rollout._cache_size() - before[0], _next_piece._cache_size() - before[1]) == (1, 1)


def test_newer_layers_in_short(tmp_path, capsys):
    "The benchmark behind the page's table: what is compared gives the same numbers."
    newer.main(["--quick", "--layers", "CausalConv", "RGLRU", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "newer.json").read_text())["layers"]
    assert all(run["memory"]["ssm_lib"] > 0 for runs in found.values() for run in runs)
    assert "| RGLRU | 2, 64, 16 |" in capsys.readouterr().out
