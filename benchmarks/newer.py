"""How fast, and how small: the newer layers against their published formulations.

    python benchmarks/newer.py            # some ten minutes on two cores
    python benchmarks/newer.py --quick    # a look

Each published formulation (`associative_scan` over what its authors scan, autodiff through it) is written here from its
equations, on the same parameters, and must give the same numbers before anything is timed. Candidates run interleaved in
one process. Writes `newer.json` under `--out`; the page on speed has the table.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from speed import GRADIENT, compiled, interleaved, machine, sequences, table

from ssm_lib import RGLRU, CausalConv, GriffinBlock, LinOSS, MambaBlock
from ssm_lib.scan import binary_operator

SHAPES = ((8, 512, 64), (1, 4096, 64), (4, 2048, 256))  # B, L, H: two small enough for a cache, one that is not


def over_batch(one, u):
    for _ in range(u.ndim - 2):
        one = jax.vmap(one)
    return one(u)


def published_conv(layer, u):
    "recurrentgemma, `Conv1D`: a sum of shifted copies."
    shifted = lambda u, s: jnp.pad(u, ((s, 0), (0, 0)))[: len(u)] * layer.w[-1 - s]
    return over_batch(lambda u: sum(shifted(u, s) for s in range(layer.width)) + layer.b, u)


def published_rglru(layer, u):
    "recurrentgemma, `RGLRU` (De et al. 2024), with the parallel scan."
    heads, width, _ = layer.a_gate["w"].shape

    def gate(p, u):
        y = jnp.einsum("thi,hij->thj", u.reshape(-1, heads, width), p["w"]) + p["b"]
        return nn.sigmoid(y.reshape(u.shape))

    def one(u):
        log_a = -8.0 * gate(layer.a_gate, u) * nn.softplus(layer.a_param)
        b = jnp.sqrt(1 - jnp.exp(2 * log_a)) * gate(layer.input_gate, u) * u
        return jax.lax.associative_scan(binary_operator, (jnp.exp(log_a), b))[1]

    return over_batch(one, u)


class PublishedConv(CausalConv):
    def stretch(self, u, carry, times):
        return None, published_conv(self, u)


class PublishedRGLRU(RGLRU):
    def stretch(self, u, carry, times):
        return None, published_rglru(self, u)


class PublishedGriffin(GriffinBlock):
    "recurrentgemma, `RecurrentBlock`."

    def stretch(self, u, carry, times):
        x = published_rglru(self.rg_lru, published_conv(self.conv_1d, self.linear_x(u)))
        return None, self.linear_out(x * nn.gelu(self.linear_y(u)))


class PublishedMamba(MambaBlock):
    "mamba_ssm, `Mamba` by its slow path, with the scan of all states in parallel (Gu & Dao 2023, section 3.3)."

    def stretch(self, u, carry, times):
        x, z = jnp.split(self.in_proj(u), 2, -1)
        x = nn.silu(published_conv(self.conv1d, x))
        made, N = self.x_proj.features, self.d_state
        Delta, B, C = jnp.split(self.x_proj(x), (made - 2 * N, made - N), -1)
        Delta, A = nn.softplus(self.dt_proj(Delta)), -jnp.exp(self.A_log)
        elements = jnp.exp(Delta[..., None] * A), (Delta * x)[..., None] * B[..., None, :]
        h = jax.lax.associative_scan(binary_operator, elements, axis=u.ndim - 2)[1]
        y = jnp.einsum("...dn,...n->...d", h, C) + self.D * x
        return None, self.out_proj(y * nn.silu(z))


class PublishedLinOSS(LinOSS):
    "tk-rusch/linoss, `apply_linoss_imex`: 2 × 2 blocks in the parallel scan, complex forces (Rusch & Rus 2025)."

    def stretch(self, u, carry, times):
        A, Delta = nn.relu(self.A_diag), nn.sigmoid(self.steps)
        B, C = (M[..., 0] + 1j * M[..., 1] for M in (self.B, self.C))
        blocks = jnp.stack([jnp.ones_like(A), -Delta * A, Delta, 1 - Delta**2 * A])

        def compose(first, second):
            (a, b), (m, n) = first, second
            product = jnp.stack([
                m[:, 0] * a[:, 0] + m[:, 1] * a[:, 2], m[:, 0] * a[:, 1] + m[:, 1] * a[:, 3],
                m[:, 2] * a[:, 0] + m[:, 3] * a[:, 2], m[:, 2] * a[:, 1] + m[:, 3] * a[:, 3],
            ], 1)  # fmt: skip
            moved = jnp.stack([m[:, 0] * b[:, 0] + m[:, 1] * b[:, 1], m[:, 2] * b[:, 0] + m[:, 3] * b[:, 1]], 1)
            return product, moved + n

        def one(u):
            force = jax.vmap(lambda u_k: B @ u_k)(u.astype(jnp.complex64))
            v = jnp.stack([force * Delta, force * Delta**2], 1)
            x = jax.lax.associative_scan(compose, (jnp.broadcast_to(blocks, (len(u), *blocks.shape)), v))[1][:, 1]
            return jax.vmap(lambda x_k: (C @ x_k).real)(x) + self.D * u

        return None, over_batch(one, u)


LAYERS = {
    "CausalConv": (CausalConv, PublishedConv, {}),
    "RGLRU": (RGLRU, PublishedRGLRU, {"n_heads": 4}),
    "GriffinBlock": (GriffinBlock, PublishedGriffin, {"d_hidden": 96, "n_heads": 4}),
    "MambaBlock": (MambaBlock, PublishedMamba, {}),
    "LinOSS": (LinOSS, PublishedLinOSS, {"d_hidden": 64, "method": "imex"}),
}


def compared(name, shape, seconds):
    "Quartiles of times, planned memory and seconds to compile of a layer and of its published form."
    made, memory, compiling, outputs = {}, {}, {}, []
    B, L, H = shape
    here, published, options = LAYERS[name]
    v = jax.jit(here(d_model=H, **options).init)(jax.random.PRNGKey(0), jnp.zeros((1, H)))
    u, w = sequences(B, L, H)
    for who, cls in (("ssm_lib", here), ("published", published)):
        layer = cls(d_model=H, **options)
        jax.clear_caches()
        began = time.perf_counter()
        made[who], memory[who] = compiled(layer.apply, v, u, w)
        compiling[who] = round(time.perf_counter() - began, 2)
        outputs.append(np.asarray(made[who]["forward"]()))
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-4 * np.abs(outputs[1]).max(), name
    groups = {kind: {who: calls[kind] for who, calls in made.items()} for kind in ("forward", GRADIENT)}
    times = interleaved(groups, seconds)
    of = lambda kind: {who: [float(f"{q:.4g}") for q in quartiles] for who, quartiles in times[kind].items()}
    planned = {who: each[GRADIENT] for who, each in memory.items()}
    return {"shape": list(shape), "forward": of("forward"), "gradient": of(GRADIENT), "memory": planned, "compile": compiling}


def newer_table(found):
    "Markdown: how many times faster, smaller and sooner compiled than as published, and what it takes."
    rows = []
    for name, results in found["layers"].items():
        for r in results:
            over = lambda kind, r=r: f"{r[kind]['published'][1] / r[kind]['ssm_lib'][1]:.1f}"
            part = lambda kind, r=r: f"{r[kind]['published'] / r[kind]['ssm_lib']:.1f}"
            ms = lambda kind, r=r: f"{1e3 * r[kind]['ssm_lib'][1]:.3g}"
            rows.append([
                name, ", ".join(map(str, r["shape"])), over("forward"), over("gradient"), part("memory"), part("compile"),
                ms("forward"), ms("gradient"), f"{r['memory']['ssm_lib'] / 1e6:.1f}",
            ])  # fmt: skip
    head = ["layer", "B, L, H", "forward ×", "gradient ×", "memory ÷", "compiling ×", "forward ms", "gradient ms", "memory MB"]
    return table(head, rows)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short timings of short sequences; writes nothing unless --out is given")
    parser.add_argument("--layers", nargs="+", choices=[*LAYERS], default=[*LAYERS])
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(args)
    shapes, seconds = (((2, 64, 16),), 0.2) if args.quick else (SHAPES, 8)
    run = partial(compared, seconds=seconds)
    found = {"machine": machine(), "layers": {name: [run(name, shape) for shape in shapes] for name in args.layers}}
    print(newer_table(found))
    out = args.out or (None if args.quick else Path(__file__).parent / "results")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "newer.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
