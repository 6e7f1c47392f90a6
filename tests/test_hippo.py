"""The HiPPO toolkit against the published matrices, and its laws for every measure."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from sweep import enable_x64

import ssm_lib
from ssm_lib import DPLRForm, Hippo, dplr, make_DPLR_HiPPO, make_NPLR_HiPPO, nplr, transition
from ssm_lib.convolution import discretize_dense, run_dense
from ssm_lib.measures import MEASURES

with np.load(Path(__file__).parent / "golden/hippo_matrices.npz") as data:
    GOLDEN = {key: data[key] for key in data}

PUBLISHED = {"s4/legt": {"window": 2.0}}  # the options that make a published matrix, where its name alone does not
DENSE = sorted({key.rsplit("/", 2)[0] for key in GOLDEN if "nplr" not in key} - {"s4/diagonal"})
NPLR = sorted({key.rsplit("/", 1)[0] for key in GOLDEN if "nplr" in key})
KEY = jax.random.PRNGKey(0)

# Every measure with a normal form, with its options at and away from their defaults.
CASES = [(measure, {}) for measure in MEASURES if measure not in ("lmu", "diagonal")]
CASES += [("legt", {"window": 2.0}), ("fourier", {"window": 0.3}), ("fourier_decay", {"window": 5.0}), ("tlagt", {"beta": 0.3})]
CASES += [("glagt", {"beta": 1.7})]
RANKS = {"legs": 1, "legt": 2, "lagt": 1, "tlagt": 1, "glagt": 1, "fourier": 1, "fout": 1, "fourier2": 1, "fourier_decay": 1}
EVEN_ONLY = ("fourier", "fout", "foud", "s4d_")

each_case = pytest.mark.parametrize("measure, options", CASES, ids=lambda value: str(value).replace(" ", ""))
each_order = pytest.mark.parametrize("N", (1, 2, 3, 4, 16, 64))


def relative(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype, f"{got.shape} {got.dtype} is not {want.shape} {want.dtype}"
    return np.abs(got - want).max() / np.abs(want).max()


def defined(measure, N):
    return N % 2 == 0 or not measure.startswith(EVEN_ONLY)


# --- Against the published numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", (4, 16, 64))
@pytest.mark.parametrize("name", DENSE)
def test_published_matrices(name, N):
    A, B = transition(name.split("/")[1], N, **PUBLISHED.get(name, {}))
    assert relative(A, GOLDEN[f"{name}/N{N}/A"]) < 1e-10
    assert relative(B, GOLDEN[f"{name}/N{N}/B"][:, 0]) < 1e-10


@pytest.mark.parametrize("N", (4, 16, 64))
def test_published_diagonal_is_of_the_same_kind(N):
    """Its numbers are draws of an unknown generator; ours are draws of a seed."""
    A, B = transition("diagonal", N)
    for matrix in (A, GOLDEN[f"s4/diagonal/N{N}/A"]):
        np.testing.assert_array_equal(matrix, np.diag(np.diag(matrix)))
        assert np.all(np.diag(matrix) < 0) and abs(np.log(-np.diag(matrix)).mean()) < 4 / np.sqrt(N)
    assert B.shape == (N,) and A.dtype == B.dtype == np.float64
    np.testing.assert_array_equal(transition("diagonal", N, seed=0)[0], A)
    assert np.any(transition("diagonal", N, seed=1)[0] != A)


@pytest.mark.parametrize("name", NPLR)
def test_published_normal_forms(name):
    """Poles as sets, and the real normal part and correction that the published halves stand for.

    The published `foud` is left out of the reconstruction where it is wrong: of its two poles at −½ + 0i it keeps one
    vector that does not stand for both, so that the upper left 2×2 block is off by ½. Ours is right (below, and
    `test_rebuilt`).
    """
    _, _, measure, N = name.split("/")
    N, options = int(N[1:]), PUBLISHED.get(f"s4/{measure}", {})
    Lambda, P, B, V = (GOLDEN[f"{name}/{part}"] for part in ("Lambda", "P", "B", "V"))
    ours = dplr(measure, N, conj_sym=True, **options)
    order = lambda poles: np.sort(np.abs(poles.imag))
    np.testing.assert_allclose(order(ours.Lambda), order(Lambda), atol=1e-6 * np.abs(Lambda).max())
    np.testing.assert_allclose(ours.Lambda.real, Lambda.real, atol=1e-6 * np.abs(Lambda).max())

    normal, correction = 2 * ((V * Lambda) @ V.conj().T).real, 2 * (V @ P.T).real
    A, P_real, B_real = nplr(measure, N, **options)
    wrong = 2 if measure == "foud" else 0
    want = A + P_real.T @ P_real
    np.testing.assert_allclose(normal[wrong:, wrong:], want[wrong:, wrong:], atol=1e-6 * np.abs(want).max())
    np.testing.assert_allclose(correction @ correction.T, P_real.T @ P_real, atol=1e-6 * np.abs(A).max())
    if wrong:
        np.testing.assert_allclose(np.abs(normal - want).max(), 0.5, atol=1e-6)
    # Its B has the imaginary part clipped to ±2, in the phase of its own eigenvectors
    unclipped = V.conj().T @ B_real
    np.testing.assert_allclose(unclipped.real + 1j * unclipped.imag.clip(-2, 2), B, atol=1e-6 * np.abs(B_real).max())


@pytest.mark.parametrize("name", ("MEASURES", "nplr", "transition"))
def test_the_catalogue_imports_from_hippo_too(name):
    assert getattr(ssm_lib.hippo, name) is getattr(ssm_lib.measures, name)


# --- Laws of every measure --------------------------------------------------------------------------------------------


@each_order
@each_case
def test_rebuilt(measure, options, N):
    if not defined(measure, N):
        with pytest.raises(ValueError, match="odd"):
            nplr(measure, N, **options)
        return
    A, P, B = nplr(measure, N, **options)
    assert P.shape == (RANKS.get(measure, 0), N) and A.dtype == P.dtype == B.dtype == np.float64
    normal, scale = A + P.T @ P, max(np.abs(A).max(), 1)
    np.testing.assert_allclose(normal @ normal.T, normal.T @ normal, atol=1e-11 * scale**2)
    forms = [dplr(measure, N, **options)]
    if N % 2 == 0:
        forms.append(dplr(measure, N, conj_sym=True, **options))
    for form in forms:
        assert form.P.shape == (len(P), len(form.Lambda)) and form.V.shape == (N, len(form.Lambda))
        assert np.all(form.B >= 0)
        assert np.all(np.diff(form.Lambda.imag) > -1e-9 * scale)
        V = form.full().V
        np.testing.assert_allclose(V.conj().T @ V, np.eye(N), atol=1e-11)
        for got, want in zip(form.dense(), (A, B)):
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, want, atol=1e-11 * np.abs(want).max())
    full = np.sort_complex(np.concatenate([forms[-1].Lambda, forms[-1].Lambda.conj()])) if N % 2 == 0 else None
    if full is not None:
        np.testing.assert_allclose(full.imag, np.sort_complex(forms[0].Lambda).imag, atol=1e-9 * scale)


def halved_flow(form):
    "The halved system ẋ = Λ x − 2 Pᵀ Re(P̄ x) + B u as it stands, on [Re x, Im x]."
    flow = lambda x: form.Lambda * x - 2 * form.P.T @ (form.P.conj() @ x).real
    split = lambda x: np.concatenate([x.real, x.imag])
    units = np.concatenate([np.eye(len(form.Lambda)), 1j * np.eye(len(form.Lambda))])
    return np.stack([split(flow(unit)) for unit in units], 1), split(form.B + 0j)


@pytest.mark.parametrize("N", (2, 4, 16, 64))
@each_case
def test_half_the_kernel_is_the_whole(measure, options, N):
    A, P, B = nplr(measure, N, **options)
    half, full = dplr(measure, N, conj_sym=True, **options), dplr(measure, N, **options)
    assert half.Lambda.shape == (N // 2,) and np.all(half.Lambda.imag <= 0)
    C = np.random.default_rng(N).normal(size=(3, N))
    C_half = C @ half.V
    matrix, start = halved_flow(half)
    for t in (0.05, 0.4):
        want = C @ expm(t * A) @ B
        x = expm(t * matrix) @ start
        got = 2 * (C_half @ (x[: N // 2] + 1j * x[N // 2 :])).real
        np.testing.assert_allclose(got, want, atol=1e-9 * np.abs(C @ B).max())
        # without the correction, too: the diagonal kernel that S4D and S5 start from
        want = C @ expm(t * (A + P.T @ P)) @ B
        np.testing.assert_allclose(2 * (C_half @ (np.exp(t * half.Lambda) * half.B)).real, want, atol=1e-9 * np.abs(C @ B).max())
        np.testing.assert_allclose((C @ full.V @ (np.exp(t * full.Lambda) * full.B)).real, want, atol=1e-9 * np.abs(C @ B).max())


@pytest.mark.parametrize("measure", ("legs", "legt", "fourier", "foud", "s4d_lin"))
def test_blocks(measure):
    one, blocks = dplr(measure, 8, conj_sym=True), dplr(measure, 24, conj_sym=True, n_blocks=3)
    A, B = one.dense()
    got = blocks.dense()
    np.testing.assert_allclose(got[0], np.kron(np.eye(3), A), atol=1e-12 * np.abs(A).max())
    np.testing.assert_allclose(got[1], np.tile(B, 3), atol=1e-12 * np.abs(B).max())


@pytest.mark.parametrize("N", (2, 4, 64))
def test_s4d_poles(N):
    n = np.arange(N // 2)
    published = {"s4d_lin": np.pi * n, "s4d_inv": N / np.pi * (N / (2 * n + 1) - 1), "s4d_legs": make_DPLR_HiPPO(N)[0].imag[N // 2 :]}
    for measure, frequency in published.items():
        A, B = transition(measure, N)
        assert A.shape == (N, N) and A.dtype == B.dtype == np.complex128 and np.all(B == 1)
        np.testing.assert_array_equal(A, np.diag(np.diag(A)))
        poles = np.diag(A)
        np.testing.assert_allclose(poles[: N // 2], -0.5 + 1j * frequency, atol=1e-12 * N**2)
        np.testing.assert_array_equal(poles[N // 2 :], poles[: N // 2].conj())
        A_real, B_real = transition(measure, N, real=True)
        assert A_real.dtype == B_real.dtype == np.float64
        half = dplr(measure, N, conj_sym=True)
        np.testing.assert_allclose(np.sort(-half.Lambda.imag), np.sort(frequency), atol=1e-12 * N**2)
        np.testing.assert_allclose(half.B, 1, atol=1e-12)
        np.testing.assert_allclose(half.full().B.sum(), B.sum(), atol=1e-9)
        # same kernel of the same output: B* exp(tA) B
        np.testing.assert_allclose(B_real @ expm(0.1 * A_real) @ B_real, np.exp(0.1 * poles).sum().real, atol=1e-10 * N)


def test_legs_functions_are_the_toolkit():
    A, P, B = make_NPLR_HiPPO(16)
    for got, want in zip(nplr("legs", 16), (A, P[None], B)):
        np.testing.assert_array_equal(got, want)
    Lambda, P, B, V, _ = make_DPLR_HiPPO(16)
    form = dplr("legs", 16)
    np.testing.assert_allclose(form.Lambda, Lambda, atol=1e-12)
    np.testing.assert_allclose((form.V * form.Lambda) @ form.V.conj().T, (V * Lambda) @ V.conj().T, atol=1e-11)
    np.testing.assert_allclose(form.B, np.abs(B), atol=1e-12)


# --- Hippo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_blocks", (1, 2))
@pytest.mark.parametrize("with_dplr", (False, True))
@pytest.mark.parametrize("conj_sym", (False, True))
@pytest.mark.parametrize("measure", ("legs", "legt", "fourier", "foud", "s4d_inv"))
def test_hippo_arrays(measure, conj_sym, with_dplr, n_blocks):
    make = lambda: Hippo(16, measure, conj_sym=conj_sym, dplr=with_dplr, block_diagonal=n_blocks > 1, n_blocks=n_blocks)
    h, form = make(), dplr(measure, 16, conj_sym, n_blocks)
    p = h()
    if conj_sym or with_dplr:
        np.testing.assert_array_equal(p.state_matrix, form.Lambda)
        np.testing.assert_array_equal(p.input_matrix, form.B)
        np.testing.assert_array_equal(p.eigenvectors, form.V)
    else:
        A, B = transition(measure, 16 // n_blocks)
        np.testing.assert_array_equal(p.state_matrix, np.kron(np.eye(n_blocks), A))
        np.testing.assert_array_equal(p.input_matrix, np.tile(B, n_blocks))
        assert p.eigenvectors is None
    assert (p.low_rank is not None) == with_dplr
    again = make()()
    for name in ("state_matrix", "input_matrix", "low_rank", "eigenvectors"):
        np.testing.assert_array_equal(getattr(h(), name), getattr(p, name))
        np.testing.assert_array_equal(getattr(again, name), getattr(p, name))
    P = len(form.Lambda)
    for part, value in (("real", form.Lambda.real), ("imaginary", form.Lambda.imag)):
        got = h.lambda_initializer(part)(KEY, (P,))
        assert got.dtype == jnp.float32 and got.shape == (P,)
        np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6)
    for shape, dtype in (((P,), jnp.float32), ((P, 3), jnp.float32), ((P, 1), jnp.complex64), ((P,), jnp.bfloat16)):
        got = h.b_initializer()(KEY, shape, dtype)
        assert got.shape == shape and got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, complex).T, np.broadcast_to(form.B, shape[::-1]), rtol=1e-2)
    np.testing.assert_allclose(h.low_rank_initializer("imaginary")(KEY, form.P.shape), form.P.imag, rtol=1e-6, atol=1e-6)


def test_hippo_in_blocks_starts_as_s5_does():
    "The published construction: the half of a block's poles with negative imaginary part, side by side."
    Lambda, _, _, V, _ = make_DPLR_HiPPO(8)
    Lambda, V = np.tile(Lambda[:4], 4), np.kron(np.eye(4), V[:, :4])
    p = Hippo(32, conj_sym=True, block_diagonal=True, n_blocks=4)()
    np.testing.assert_allclose(p.state_matrix, Lambda, atol=1e-12)
    rebuilt = lambda Lambda, V: (V * Lambda) @ V.conj().T
    np.testing.assert_allclose(rebuilt(p.state_matrix, p.eigenvectors), rebuilt(Lambda, V), atol=1e-11)


def test_arrays_learn():
    """The gradient of a read-out of LegT, with respect to A and B, against finite differences in double precision."""
    u = np.convolve(np.random.default_rng(0).normal(size=220), np.hanning(21) / 10, "valid")
    with enable_x64(True):
        params = jax.tree.map(jnp.asarray, transition("legt", 16))
        reader = jnp.asarray(np.sqrt(2 * np.arange(16) + 1) * (-1.0) ** np.arange(16))  # the far edge of the window
        missed = lambda p: run_dense(*discretize_dense(*p, 1 / 50), reader, jnp.asarray(u))[1][50:] - u[:-50]
        loss = jax.jit(lambda p: jnp.mean(missed(p) ** 2))
        direction = jax.tree.map(lambda z: jnp.asarray(np.random.default_rng(1).normal(size=z.shape)), params)
        along = lambda h: float(loss(jax.tree.map(lambda z, d: z + h * d, params, direction)))
        gradient = jax.tree.leaves(jax.grad(loss)(params))
        slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, jax.tree.leaves(direction)))
        np.testing.assert_allclose(slope, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-5)


def test_dplr_is_a_pytree():
    form = dplr("legt", 8, conj_sym=True)
    moved = jax.tree.map(lambda z: jnp.asarray(z, jnp.complex64), form)
    assert isinstance(moved, DPLRForm) and len(jax.tree.leaves(moved)) == 4


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: transition("legendre", 4), "expected one of"),
        (lambda: transition("legs", 0), "integer ≥ 1"),
        (lambda: transition("legs", 4, window=2.0), "no options"),
        (lambda: transition("legt", 4, theta=2.0), r"none but \['window'\]"),
        (lambda: transition("legt", 4, window=0.0), "positive"),
        (lambda: transition("glagt", 4, alpha=1.0), "alpha < 1"),
        (lambda: transition("fourier", 5), "Use N = 6"),
        (lambda: transition("s4d_lin", 5), "Use N = 6"),
        (lambda: nplr("legendre", 4), "expected one of"),
        (lambda: nplr("lmu", 4), "Use 'legt'"),
        (lambda: dplr("glagt", 4, alpha=0.5), "alpha = 0"),
        (lambda: dplr("legs", 5, conj_sym=True), "odd"),
        (lambda: dplr("diagonal", 4, conj_sym=True), "real poles"),
        (lambda: dplr("legs", 8, n_blocks=3), "not divisible"),
        (lambda: dplr("legs", 12, conj_sym=True, n_blocks=4), "odd"),
        (lambda: Hippo(8, "lmu", dplr=True), "Use 'legt'"),
        (lambda: Hippo(8, "lmu").lambda_initializer("real"), "Use 'legt'"),
        (lambda: Hippo(7, conj_sym=True), "odd"),
        (lambda: Hippo(8, n_blocks=2), "block_diagonal=True"),
        (lambda: Hippo(8, block_diagonal=True, n_blocks=3), "not divisible"),
        (lambda: Hippo(8, block_diagonal=True, n_blocks=0), "integer ≥ 1"),
        (lambda: Hippo(0), "integer ≥ 1"),
        (lambda: Hippo(8).lambda_initializer("phase"), "expected one of"),
        (lambda: Hippo(8, conj_sym=True).lambda_initializer("real")(KEY, (8,)), r"expected \(4,\)"),
        (lambda: Hippo(8).b_initializer()(KEY, (3, 8)), r"expected \(8,\) or \(8, H\)"),
        (lambda: Hippo(8).low_rank_initializer("real")(KEY, (8,)), r"expected \(1, 8\)"),
    ],
)
def test_errors_are_one_line(call, words):
    with pytest.raises(ValueError, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_measures_without_a_normal_form_still_have_their_matrices():
    for measure, options in (("lmu", {}), ("glagt", {"alpha": 0.5})):
        p = Hippo(6, measure, **options)()
        np.testing.assert_array_equal(p.state_matrix, transition(measure, 6, **options)[0])


def test_real_poles_have_a_diagonal_form():
    form = dplr("diagonal", 5)
    A, B = transition("diagonal", 5)
    np.testing.assert_allclose(form.dense()[0], A, atol=1e-15)
    np.testing.assert_allclose(form.dense()[1], B, atol=1e-15)
