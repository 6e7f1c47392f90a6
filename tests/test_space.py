"""Every space × some layers, through models: the laws of time, and those of space."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep import KEY, LAYERS, by_step, close, noise

from ssm_lib import (
    BatchStackedSSM2DModel,
    BatchStackedSSM3DModel,
    BatchStackedSSMModel,
    SequenceLayer,
    on_grid,
    recipes,
    rollout,
    space,
)

BOUNDARIES = space.BOUNDARIES
CONVS = {f"conv_{edge}": space.Conv(3, boundary=edge) for edge in BOUNDARIES}
SCANS = {f"scan_{edge}": space.Scan(2, boundary=edge) for edge in BOUNDARIES}
CHAIN = space.Chain((space.Conv(3), space.Sum((space.Space(), space.Scan(1))), space.Map(nn.gelu), space.Conv(3)))
SPACES = {  # a new space is tested by one line here
    "dense": None,
    "few": space.Dense(),
    "separable": space.Separable(),
    "low_rank": space.Separable(rank=2),
    **CONVS,
    "depthwise": space.Conv((3, 1), depthwise=True, dilation=2, gain=2.0),
    "spectral": space.Spectral(2),
    "filters": space.Spectral(2, depthwise=True),
    "cosine": space.Spectral(1, boundary="reflect"),
    "mean": space.Sum((space.Space(), space.Mean())),
    **SCANS,
    "scan_by_a_layer": space.Scan(ssm=LAYERS["lru"][0], boundary="zero"),
    "chain": CHAIN,
    "sum": space.Sum((space.Spectral(1), space.Conv(1))),
    "around": space.Around((space.Conv(3, features=6), space.Conv(1, features=4))),
}
COMMUTES = ("conv_periodic", "depthwise", "spectral", "filters", "scan_periodic", "mean", "chain", "sum")  # with turning a ring
NO_GRID = {name: one for name, one in SPACES.items() if name not in ("dense", "few", "separable", "low_rank")}
TWINS = [f"{kind}_{edge}" for kind in ("conv", "scan") for edge in ("reflect", "replicate")]  # in time as the others of their kind
PAIRS = [(name, "lru") for name in SPACES if name not in ("dense", *TWINS)]
PAIRS += [("conv_zero", "s5_zoh"), ("scan_periodic", "s4"), ("chain", None), ("spectral", None)]
MODELS = {1: BatchStackedSSMModel, 2: BatchStackedSSM2DModel, 3: BatchStackedSSM3DModel}


def model_of(name, layer="lru", grid=(6, 5), n_layers=1, **options):
    ssm = None if layer is None else LAYERS[layer][0]
    sized = {} if name == "dense" else {"space": SPACES[name], "width": 4}
    return MODELS[len(grid)](ssm, d_model=grid, d_vars=2, n_layers=n_layers, training=False, **sized | options)


def one_step(sized, **times):
    "A model without memory on a line of 8 places, asked for its parameters."
    return BatchStackedSSMModel(None, 8, 1, 1, space=sized, width=2).init(KEY, noise(1, 2, 8, 1), **times)


def made(model, B=2, T=6, seed=0):
    x = noise(B, T, *model.grid, 2, seed=seed)
    variables = jax.jit(model.init)(KEY, x[:1, :1])
    is_gate = lambda path: getattr(path[-1], "key", None) == "memory"  # closed to begin with: open, it shows what is behind
    return jax.tree_util.tree_map_with_path(lambda path, p: p + 0.5 if is_gate(path) else p, variables), x


RECIPES = {
    "conv_s5": recipes.conv_s5((6, 5), 2, width=4, d_hidden=3, n_layers=1),
    "conv_scan": recipes.conv_scan((6, 5), 2, width=4, n_layers=1, mean=True),
    "conv_spectral": recipes.conv_spectral((6, 5), 2, width=4, n_layers=1, modes=1),
    "conv_filters": recipes.conv_spectral((6, 5), 2, width=4, n_layers=1, modes=1, depthwise=True, gain=3.0, activation="silu"),
    "dense_s5": recipes.dense_s5((6, 5), 2, d_hidden=8, n_layers=1, blocks=2),
    "fno": recipes.fno((6, 5), 2, width=4, n_layers=1, modes=1),
    "residual_conv": recipes.residual_conv((6, 5), 2, width=4, n_layers=1),
    "residual_conv with memory": recipes.residual_conv((6, 5), 2, width=4, n_layers=1, memory=4),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    model = RECIPES[name]
    assert on_grid(model, (6, 5)) is model
    if name != "dense_s5":  # its maps belong to their grid
        assert on_grid(model, (12, 10)).grid == (12, 10)
    laws_of_time(model, 1e-5)


@pytest.mark.parametrize("name, layer", PAIRS)
def test_laws_of_time(name, layer):
    laws_of_time(model_of(name, layer), 1e-5 if layer is None else LAYERS[layer][1])


def laws_of_time(model, tolerance):
    "Whole = pieces = steps, where some places have gaps; no other sample counts; every parameter moves the output."
    v, x = made(model)
    mask = jnp.asarray(np.random.default_rng(1).random((2, 6, 6, 5)) < 0.8)

    @jax.jit
    def ways(v, x):
        def loss(v):
            y = model.apply(v, x, mask=mask)
            return jnp.sum(jnp.sin(y)), y

        (_, whole), grads = jax.value_and_grad(loss, has_aux=True)(v)
        front = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (x, mask))
        steps = jnp.moveaxis(by_step(model, v, front[0], {"mask": front[1]}, batch=(2,))[1], 0, 1)
        carry, head = model.apply(v, x[:, :2], method="prefill", mask=mask[:, :2])
        tail = model.apply(v, x[:, 2:], carry, method="prefill", mask=mask[:, 2:])[1]
        return whole, grads, jnp.concatenate([head, tail], 1), steps

    whole, grads, pieces, steps = ways(v, x)
    close(pieces, whole, tolerance)
    close(steps, whole, tolerance)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(g).all()) and np.abs(g).max() > 0, path
    hidden = jnp.where(mask[..., None], x, jnp.nan).at[1].multiply(2)  # neither a masked place nor another sample counts
    np.testing.assert_array_equal(ways(v, hidden)[0][0], whole[0])


def test_segments_of_a_model_change_nothing():
    "Values, gradients, carries; with gaps, irregular time and new starts; the last segment is shorter."
    whole, rng = RECIPES["conv_s5"], np.random.default_rng(0)
    v, x = made(whole, T=7)
    said = {"mask": jnp.asarray(rng.random((2, 7, 6, 5)) < 0.7), "reset": jnp.asarray(rng.random((2, 7)) < 0.2)}
    said["dt"] = jnp.asarray(rng.uniform(0.5, 2, (2, 7)), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def ways(model, v, x):
        loss = lambda v, x, **said: jnp.sum(jnp.sin(model.apply(v, x, **said)))
        return jax.value_and_grad(loss, (0, 1))(v, x, **said), model.apply(v, x, method="prefill", dt=0.5)

    got, want = (jax.tree.leaves(ways(model, v, x)) for model in (whole.clone(segment=3), whole))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    with pytest.raises(ValueError, match="segment is 3"):
        model = whole.clone(segment=3, norm="batch", training=True)
        model.apply(jax.jit(model.init)(KEY, x), x, mutable=["batch_stats"])


@pytest.mark.parametrize("name", ("conv_periodic", "scan_zero", "spectral"))
def test_a_carry_is_a_field_and_rolls_out(name):
    model = model_of(name, n_layers=2)
    v, x = made(model)
    assert jax.tree.map(jnp.shape, model.apply(v, 2, method="initial_carry")) == ((2, 6, 5, 16),) * 2
    whole = jax.jit(model.apply)(v, x)
    naive = jax.jit(model.apply)(v, jnp.concatenate([x, whole[:, -1:]], 1))[:, -1:]
    close(rollout(model, v, x, 2), jnp.concatenate([whole[:, -1:], naive], 1), 2e-5)


def test_places_have_clocks_and_starts_of_their_own():
    "Without mixing, a place with its own dt and reset does what a lone place does with them."
    model = BatchStackedSSMModel(LAYERS["lru"][0], d_model=4, d_vars=1, n_layers=2, space=space.Space(), width=3)
    x, rng = noise(2, 7, 4, 1), np.random.default_rng(0)
    v = jax.jit(model.init)(KEY, x)
    dt, reset = jnp.asarray(rng.uniform(0.5, 2, (2, 7, 4)), jnp.float32), jnp.asarray(rng.random((2, 7, 4)) < 0.3)
    y = jax.jit(model.apply)(v, x, dt=dt, reset=reset)
    alone = jax.jit(model.clone(d_model=1).apply)
    for place in range(4):
        close(alone(v, x[:, :, [place]], dt=dt[..., [place]], reset=reset[..., [place]]), y[:, :, [place]])


def mixed(name, grid=(6, 5), seed=0):
    "A mixer alone, its variables, and a field."
    one = SPACES[name].at(grid, 4, d_vars=1)
    h = noise(3, *grid, 4, seed=seed)
    v = jax.jit(partial(one.init, method="mix"))(KEY, h)
    return jax.jit(partial(one.apply, method="mix")), v, h


@pytest.mark.parametrize("name", COMMUTES)
def test_rings_have_no_first_place(name):
    mix, v, h = mixed(name)
    close(mix(v, jnp.roll(h, (2, 3), (1, 2))), jnp.roll(mix(v, h), (2, 3), (1, 2)))


@pytest.mark.parametrize("name", ("conv_zero", "scan_zero", "scan_by_a_layer"))
def test_nothing_comes_round_zero_ends(name):
    "A field on the left half answers as on a grid twice as wide, where the right half has room for itself."
    mix, v, h = mixed(name)
    wide = SPACES[name].at((12, 5), 4, d_vars=1)
    more = jnp.concatenate([h, jnp.zeros_like(h)], 1)
    close(jax.jit(partial(wide.apply, method="mix"))(v, more)[:, :6], mix(v, h))


@pytest.mark.parametrize("name", ("conv_reflect", "scan_reflect", "cosine"))
def test_mirrors(name):
    "Between mirrors a field answers as its picture does: on a ring of field and picture, the same numbers."
    mix, v, h = mixed(name)
    if name == "cosine":  # a map of even waves: a mirrored field gives the mirrored answer
        close(mix(v, jnp.flip(h, 1)), jnp.flip(mix(v, h), 1))
        return
    ring = SPACES[name.replace("reflect", "periodic")].at((12, 10), 4, d_vars=1)
    both = jnp.concatenate([h, jnp.flip(h, 1)], 1)
    both = jnp.concatenate([both, jnp.flip(both, 2)], 2)
    close(jax.jit(partial(ring.apply, method="mix"))(v, both)[:, :6, :5], mix(v, h))


@pytest.mark.parametrize("name", COMMUTES)
def test_a_finer_grid_of_the_same_domain(name):
    "Waves that both grids carry are answered alike where both have a place."
    _, v, h = mixed(name, (12, 10))
    numbers = np.fft.fftfreq(12, 1 / 12)[:, None], np.fft.fftfreq(10, 1 / 10)
    low = ((np.abs(numbers[0]) < 3) & (np.abs(numbers[1]) < 2.5))[..., None]
    h = jnp.asarray(np.fft.ifft2(np.fft.fft2(h, axes=(1, 2)) * low, axes=(1, 2)).real, jnp.float32)
    coarse = SPACES[name].at((6, 5), 4, d_vars=1)
    fine = coarse.on((6, 5), (12, 10)).at((12, 10), 4, d_vars=1)
    apply = lambda sized: jax.jit(partial(sized.apply, method="mix"))
    close(apply(fine)(v, h)[:, ::2, ::2], apply(coarse)(v, h[:, ::2, ::2]))


@pytest.mark.parametrize("name", NO_GRID)
@pytest.mark.parametrize("grid", ((1, 7), (3, 1)))
def test_axes_of_one_point_and_odd_ones(name, grid):
    mix, v, h = mixed(name, grid)
    assert bool(jnp.isfinite(mix(v, h)).all()) and np.abs(mix(v, h)).max() > 0


@pytest.mark.parametrize("name", ("conv_periodic", "chain", "spectral"))
@pytest.mark.parametrize("grid", ((8,), (3, 4, 5)))
def test_lines_and_volumes(name, grid):
    one = {"conv_periodic": space.Conv(3), "chain": CHAIN, "spectral": space.Spectral(1)}[name]
    model = MODELS[len(grid)](None, d_model=grid if len(grid) > 1 else 8, d_vars=2, n_layers=1, space=one, width=4)
    v, x = made(model)
    y = jax.jit(model.apply)(v, x)
    turn = tuple(range(2, 2 + len(grid)))
    close(jax.jit(model.apply)(v, jnp.roll(x, (1,) * len(grid), turn)), jnp.roll(y, (1,) * len(grid), turn))


BAD = {
    "width": (lambda: BatchStackedSSMModel(None, 8, 1, 1, space=space.Conv(3)), "width is None"),
    "space": (lambda: BatchStackedSSMModel(None, 8, 1, 1, space=space.Conv), "expected a Space"),
    "boundary": (lambda: space.Conv(3, boundary="open"), "'periodic', 'zero', 'reflect', 'replicate'"),
    "axes": (lambda: one_step(space.Conv((3, 3))), "one for each axis"),
    "even": (lambda: one_step(space.Conv(4)), "odd"),
    "waves": (lambda: space.Spectral(2, boundary="zero"), "'periodic', 'reflect'"),
    "ends": (lambda: one_step(space.Scan(ssm=LAYERS["lru"][0])), "'zero'"),
    "features": (lambda: one_step(space.Conv(3, features=3)), "Around"),
    "depthwise": (lambda: one_step(space.Conv(3, features=3, depthwise=True)), "3 features of 2, feature by feature"),
    "filters": (lambda: one_step(space.Spectral(3, features=3, depthwise=True)), "3 features of 2, feature by feature"),
    "unsized": (lambda: SequenceLayer(None, 4, space=space.Conv(3)).init(KEY, noise(6, 4)), "space has no grid"),
    "parts": (lambda: space.Chain(()), "expected spaces"),
    "dt": (lambda: one_step(space.Conv(3), dt=0.5), "no clock"),
    "place": (lambda: model_of("dense").init(KEY, noise(1, 2, 6, 5, 2), dt=noise(1, 2, 6, 5) ** 2), "another space"),
}


@pytest.mark.parametrize("call, says", BAD.values(), ids=BAD)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
