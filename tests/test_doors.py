"""Every public name, given what is wrong: one line that names the argument, before anything is computed.

A new function or class needs one line in `VALID`: a call that is right. What is wrong for each of its arguments follows
from the kinds that it says it takes (`ssm_lib.checks`); arguments of no kind say here what is wrong for them.
"""

import dataclasses
import importlib
import pkgutil
import re
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import pytest
from sweep import KEY, LAYERS, noise

import ssm_lib
from ssm_lib import S5SSM, BatchStackedSSMModel, Forecaster, Run, SequenceLayer, fit, fit_inputs, open_fields, save_checkpoint, space
from ssm_lib.checks import Array, Choice, Each, FilePath, Flag, FloatType, Function, Made, Maybe, Names, Number, Size, Text
from ssm_lib.data import Normalizer
from ssm_lib.evaluation import Departures

MODULES = {m.name: importlib.import_module(f"ssm_lib.{m.name}") for m in pkgutil.iter_modules(ssm_lib.__path__) if m.name[0] != "_"}
PUBLIC = {f"{m}.{name}": getattr(module, name) for m, module in MODULES.items() for name in module.__all__}

P, H, L, N = 4, 3, 6, 4
poles = np.exp(1j * np.linspace(0.1, 1, P)).astype(np.complex64) * 0.9
z = lambda *shape: (np.ones(shape) + 0.5j).astype(np.complex64)
r = lambda *shape: np.linspace(0.1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
layer = partial(S5SSM, d_hidden=8, blocks=1)
model = BatchStackedSSMModel(layer, d_model=4, d_vars=1, n_layers=2, training=False)
fills = Forecaster(model, (0.0,), (1.0,), (1.0,), gaps=True)
frames = r(2, 5, 4, 1)
variables = jax.jit(model.init)(KEY, frames)
FOLDER = Path(tempfile.mkdtemp())
np.save(FOLDER / "x.npy", frames)
save_checkpoint(FOLDER / "x.msgpack", variables)
fit(lambda v, b, k: jnp.sum(v["params"]["w"] ** 2), {"params": {"w": jnp.ones(2)}}, [0], optax.sgd(0.1), 1, run=Run(FOLDER / "c"))

LRU_WEIGHTS = jax.jit(ssm_lib.LRU(4, 3).init)(KEY, r(2, 3))
ssm_lib.save_weights(FOLDER / "given.safetensors", LRU_WEIGHTS)

FIELDS = open_fields(frames)
DATA = ssm_lib.DataConfig(str(FOLDER / "x.npy"), train=0.5)
TRAINING = ssm_lib.TrainingConfig(updates=1, batch_size=1, rollout=1, history=1, validation=0.0)
CONFIG = ssm_lib.resolve(ssm_lib.Config(DATA, ssm_lib.ModelConfig(width=4, n_layers=1, d_hidden=16), TRAINING), FIELDS)
TRAINED = ssm_lib.train_run(FOLDER / "trained", CONFIG, fields=FIELDS)

VALID = {
    "blocks.SequenceLayer": dict(
        ssm=layer, d_model=H, dropout=0.1, norm="layer", activation="gelu", training=False, prenorm=True, dtype=jnp.bfloat16,
        space=space.Conv().at((4,), H), rezero=True,
    ),
    "causal_conv.CausalConv": dict(d_model=H, width=3, bias=True, n_steps=4, kernel_init=jax.nn.initializers.zeros, bias_init=None),
    "rglru.RGLRU": dict(d_model=4, n_heads=2, n_steps=4),
    "rglru.GriffinBlock": dict(d_model=H, d_hidden=4, n_heads=2, width=3),
    "rglru.input_scale": dict(log_a=-r(3)),
    "mamba.MambaBlock": dict(d_model=H, d_state=4, d_conv=3, expand=2, dt_rank=1, bias=True, conv_bias=False),
    "mamba.selective_scan": dict(
        u=r(L, H), delta=r(L, H), A=-r(H, N), B=r(L, N), C=r(L, N), D=r(H), z=r(L, H), delta_bias=r(H), delta_softplus=True,
        x0=r(H, N), mask=np.ones(L, bool), reset=np.zeros(L, bool),
    ),
    "linoss.LinOSS": dict(d_model=H, d_hidden=4, method="im", damped=True, n_steps=4, r_min=0.5, r_max=0.9, max_phase=1.0),
    "published.from_published": dict(layer=ssm_lib.LRU(4, 3), params=LRU_WEIGHTS),
    "published.to_published": dict(layer=ssm_lib.LRU(4, 3), variables=LRU_WEIGHTS),
    "published.save_weights": dict(path=FOLDER / "w.safetensors", variables=LRU_WEIGHTS),
    "published.load_weights": dict(path=FOLDER / "given.safetensors"),
    "checks.check_even": dict(size=2),
    "contract.inference": dict(module=model),
    "convolution.causal_convolution": dict(u=r(L), K=r(L), axis=0),
    "convolution.discretize_dense": dict(A=-np.eye(N), B=np.ones(N), Delta=0.1, method="zoh"),
    "convolution.kernel_dense": dict(A_bar=r(N, N), B_bar=r(N), C=r(N), L=L),
    "convolution.kernel_poles": dict(Lambda_bar=poles, w=poles, L=L),
    "convolution.powers": dict(Lambda_bar=poles, n=3),
    "convolution.run_dense": dict(A_bar=r(N, N), B_bar=r(N), C=r(N), u=r(L), x0=r(N)),
    "data.pde_trajectories": dict(
        pde="burgers", n_trajectories=1, n_frames=2, n_dims=1, n_points=16, domain_extent=1.0, dt=0.01, substeps=1, warmup=0,
        cutoff=2, seed=0,
    ),
    "data.window_batch": dict(x=frames, step=0, batch_size=1, length=2, shift=True, seed=0, share=(0, 1)),
    "data.random_shift": dict(rng=np.random.default_rng(0), batch=frames),
    "data.split_trajectories": dict(x=frames, test=0.5, seed=0),
    "data.fit_normalizer": dict(x=frames, gaps=True),
    "data.fit_band": dict(x=frames, boundary="reflect", cut=1e-6),
    "data.growth": dict(x=frames, steps=2),
    "data.curriculum": dict(steps=10, longest=4, history=2, share=0.5),
    "data.window_batches": dict(x=frames, batch_size=1, length=2, start=0),
    "data.windows": dict(x=frames, length=2, stride=1),
    "data.check_trajectories": dict(x=frames, frames=1),
    "discretization.bilinear": dict(Lambda=-poles, Delta=0.1),
    "discretization.clip_poles": dict(Lambda_re=-r(P), limit=-0.1),
    "discretization.discretize_bilinear": dict(Lambda=-poles, B_tilde=z(P, H), Delta=r(P)),
    "discretization.discretize_zoh": dict(Lambda=-poles, B_tilde=z(P, H), Delta=r(P)),
    "discretization.log_step_initializer": dict(dt_min=0.1, dt_max=1.0),
    "discretization.phi1": dict(z=poles),
    "discretization.zoh": dict(Lambda=-poles, Delta=0.1),
    "dss.complex_softmax": dict(x=poles, eps=1e-7),
    "dss.dss_kernel": dict(W=z(P), Lambda=-poles, L=L, step=0.1),
    "dss.dss_ssm": dict(W=z(P), Lambda=-poles, L=L, step=0.1),
    "dss.DSS": dict(d_model=H, d_hidden=4, l_max=8, kernel="exp", dt_min=0.1, dt_max=1.0, n_steps=3),
    "evaluation.baselines": dict(train=FIELDS, test=FIELDS, mean=r(1, 4, 1)),
    "evaluation.fading": dict(departures=Departures(FIELDS, (), np.zeros((1, 4, 1))), lead=1),
    "evaluation.share_of_yesterday": dict(departures=Departures(FIELDS, (), np.zeros((1, 4, 1))), day=1),
    "evaluation.climatology": dict(train=FIELDS, season=()),
    "evaluation.Departures": dict(fields=FIELDS, season=(), usual=r(1, 4, 1), day=1, share=r(1)),
    "evaluation.evaluate": dict(
        model=model, variables=variables, train=FIELDS, test=FIELDS, steps=2, inputs=None, history=1, every=1, batch_size=2
    ),
    "evaluation.mean_square_error": dict(prediction=frames, truth=frames, axes=1, weights=r(4)),
    "fields.area_weights": dict(fields=FIELDS),
    "fields.boundaries": dict(fields=FIELDS),
    "fields.open_fields": dict(source=r(5, 4), layout="TW"),
    "hippo.dplr": dict(measure="legs", N=N, conj_sym=True, n_blocks=1),
    "hippo.make_DPLR_HiPPO": dict(N=N),
    "hippo.make_HiPPO": dict(N=N),
    "hippo.make_NPLR_HiPPO": dict(N=N),
    "hippo.Hippo": dict(state_size=N, measure="legs", conj_sym=True, dplr=False, block_diagonal=True, n_blocks=2),
    "inputs.Inputs": dict(calendar=("day",), coordinates=["x"], season=[["day", 24]]),
    "inputs.WithInputs": dict(fields=FIELDS, inputs=fit_inputs(FIELDS)),
    "inputs.fit_inputs": dict(fields=FIELDS, coordinates=()),
    "inputs.season_of": dict(fields=FIELDS, days=2, years=3),
    "lru.apply_lru_dynamics": dict(inputs=r(L, H), discrete_lambda=poles, B_norm=z(P, H), C=z(H, P), D=r(H)),
    "lru.apply_lru_dynamics_from_ic": dict(ic=r(1, H), n_steps=3, discrete_lambda=poles, B_norm=z(P, H), C=z(H, P)),
    "forecaster.Seasonal": dict(
        model=model.clone(d_vars=1, d_inputs=1), phases=4, std=(1.0,), increment_std=(1.0,), keeps=(0.9,), day=2,
        share=(0.5,),
    ),
    "forecasts.as_dataset": dict(frames=r(2, 1, 3, 4, 1), fields=FIELDS, starts=(0,)),
    "forecasts.check_output": dict(path=FOLDER / "new.nc", size=10, overwrite=True),
    "forecasts.save_forecasts": dict(
        path=FOLDER / "next.nc", model=model, variables=variables, fields=FIELDS, steps=2, inputs=None, history=1, starts=(1, 3),
        batch_size=2, chunk=1, overwrite=True,
    ),
    "lru.log_poles": dict(nu_log=r(P), theta_log=r(P), clip_eigs=False),
    "lru.LRU": dict(d_model=H, d_hidden=P, r_min=0.1, r_max=0.9, max_phase=1.0, n_steps=3, dtype="bfloat16"),
    "lru.LRUDynamics": dict(d_hidden=P, r_min=0.1, r_max=0.9, max_phase=1.0, clip_eigs=True),
    "measures.nplr": dict(measure="legs", N=N),
    "measures.transition": dict(measure="legs", N=N),
    "metrics.fit_linear": dict(x=noise(4, 8, 4, 1), horizon=2),
    "metrics.band_errors": dict(prediction=frames, truth=frames, ends=("periodic",), bands=2),
    "metrics.spectrum": dict(x=frames, ends=("periodic",)),
    "metrics.nrmse": dict(prediction=frames, truth=frames),
    "metrics.persistence": dict(history=frames, n_steps=2),
    "forecaster.Forecaster": dict(model=model, mean=(0.0,), std=(1.0,), increment_std=(1.0,), gaps=True, band=None),
    "models.poles_of": dict(model=model, variables=variables),
    "models.on_grid": dict(model=model.clone(space=space.Conv(), width=4), grid=8),
    "plots.animate_rollout": dict(
        truth=frames[0], prediction=frames[0], path=FOLDER / "x.gif", fps=5, every=1, variable=0, start=0,
        dt=1.0, space=FIELDS.space, name="u", aspect=1.0,
    ),
    "plots.save_figure": dict(fig=matplotlib.figure.Figure(), path=FOLDER / "x.png", dpi=50),
    "plots.plot_errors": dict(errors={"model": r(4)}, dt=1.0),
    "plots.plot_rollout": dict(
        truth=frames[0], prediction=frames[0], dt=1.0, variable=0, start=0, space=FIELDS.space, name="u", aspect=1.0
    ),
    "projection.basis": dict(measure="legs", N=N, lag=r(3)),
    "projection.legs_step": dict(c=r(2, N), f=r(2), h=0.5, method="zoh"),
    "projection.project_online": dict(f=r(L), measure="legt", N=N, method="zoh", dt=0.1, c0=r(N), last=True),
    "projection.reconstruct": dict(c=r(2, N), measure="legs", lag=r(3)),
    "projection.HiPPOCell": dict(features=4, N=N, measure="legt", gate="gru", method="zoh", dt=0.1),
    "pipeline.Config": dict(data=DATA, model=CONFIG.model, training=TRAINING, found=CONFIG.found),
    "pipeline.DataConfig": dict(
        file="x.nc", train=0.5, by="time", variables=("u",), forcings=("sun",), layout="TW", key="a", time="t", samples="m",
        channels="c", space=("x",), known=("calendar",),
    ),
    "pipeline.Found": dataclasses.asdict(CONFIG.found),
    "pipeline.ModelConfig": dict(
        recipe="fno", width=4, n_layers=2, kernel=3, modes=2, d_hidden=4, boundary=("zero",), dtype="bfloat16", usual=True
    ),
    "pipeline.TrainingConfig": dict(
        updates=1, batch_size=1, learning_rate=0.1, history=1, rollout=1, one_step=0.5, noise=0.1, pushforward=True, average=0.5,
        accumulate=2, shift=False, validation=0.1, patience=1, seed=0, free_runs=True,
    ),
    "pipeline.build": dict(config=CONFIG),
    "pipeline.cut": dict(config=CONFIG, fields=FIELDS),
    "pipeline.evaluate_run": dict(trained=TRAINED, fields=FIELDS, steps=1, every=1, others={"same": lambda x, n: x[:, [-1] * n]}),
    "pipeline.judged": dict(config=CONFIG, fields=FIELDS),
    "pipeline.first_variables": dict(config=CONFIG),
    "pipeline.horizon": dict(config=CONFIG, fields=FIELDS),
    "pipeline.inputs_of": dict(config=CONFIG),
    "pipeline.open_data": dict(config=CONFIG, file=FOLDER / "x.npy"),
    "pipeline.open_run": dict(folder=FOLDER / "trained"),
    "pipeline.resolve": dict(config=CONFIG, fields=FIELDS),
    "pipeline.train_run": dict(folder=FOLDER / "trained", config=CONFIG, fields=FIELDS),
    "recipes.PointwisePoles": dict(d_model=4, dt_min=0.1, dt_max=1.0, n_steps=3),
    "recipes.conv_s5": dict(d_model=(4, 4), d_vars=1, width=4, d_hidden=4, n_layers=2, kernel=(3, 1), boundary="zero"),
    "recipes.conv_scan": dict(
        d_model=8, d_vars=1, width=4, n_layers=2, kernel=3, modes=2, boundary="reflect", mean=True,
    ),
    "recipes.conv_spectral": dict(
        d_model=(4, 4), d_vars=1, width=4, n_layers=2, kernel=3, modes=1, boundary="reflect", depthwise=False, gain=2.0,
        activation="silu",
    ),
    "recipes.dense_s5": dict(
        d_model=8, d_vars=1, width=4, d_hidden=8, n_layers=2, blocks=2, dt_min=0.1, dt_max=1.0
    ),
    "recipes.fno": dict(d_model=(4, 4), d_vars=1, width=4, n_layers=2, modes=(1, 2), boundary="reflect"),
    "recipes.residual_conv": dict(d_model=(4, 4, 4), d_vars=1, width=4, n_layers=2, kernel=3, boundary="periodic", gain=2.0, memory=4),
    "rollout.rollout": dict(
        model=model, variables=variables, history=frames, n_steps=3, return_carry=False, dt=1.0, teacher_forcing=1, segment=2,
        inputs=None,
    ),
    "rollout.rollout_stream": dict(model=model, variables=variables, history=frames, n_steps=3, chunk=2, dt=1.0, inputs=None),
    "rollout.write_rollout": dict(out=np.zeros((2, 3, 4, 1)), model=model, variables=variables, history=frames),
    "run.Plan": dict(backend="auto", segment=8),
    "runs.Run": dict(folder=FOLDER / "b", config={"a": 1}, every=1.0),
    "runs.check_folder": dict(folder=FOLDER),
    "runs.load_run": dict(folder=FOLDER / "c"),
    "s4.discretize_dplr": dict(Lambda=-poles, P=z(1, P), B=z(P), Delta=0.1),
    "s4.kernel_dplr": dict(Lambda=-poles, P=z(1, P), B=z(P), C=z(P), Delta=0.1, L=L, conj_sym=True),
    "s4.untruncate": dict(C_tilde=z(P), A_bar=0.1 * z(P, P), L=L),
    "s4.S4D": dict(d_model=H, d_hidden=4, poles="lin", discretization="zoh", dt_min=0.1, dt_max=1.0, step_rescale=1.0, n_steps=3),
    "s4.S4": dict(d_model=H, d_hidden=4, l_max=8, measure="legs", dt_min=0.1, dt_max=1.0, step_rescale=1.0, n_steps=3),
    "s5.apply_dynamics": dict(
        x0=r(1, H), steps=3, Lambda_bar=poles, B_bar=z(P, H), C_tilde=z(H, P), conj_sym=True, bidirectional=False
    ),
    "s5.apply_ssm": dict(
        Lambda_bar=poles, B_bar=z(P, H), C_tilde=z(H, P), input_sequence=r(L, H), conj_sym=True, bidirectional=False
    ),
    "s5.S5SSM": dict(
        d_model=H, d_hidden=8, C_init="lecun_normal", discretization="zoh", dt_min=0.1, dt_max=1.0, conj_sym=True,
        clip_eigs=True, bidirectional=False, step_rescale=1.0, blocks=2, n_steps=3, dtype=jnp.bfloat16,
    ),
    "scan.impulse": dict(x=r(1, P), L=L, reverse=False),
    "scan.linear_scan": dict(Lambda_bar=poles, Bu=z(L, P), x0=z(P), reverse=True, axis=-2, backend="sequential"),
    "scan.scan_in_segments": dict(f=lambda c, x: (c, x), state=r(P), xs=r(L, P), size=2, axis=0, reverse=True),
    "space.within": dict(h=r(3, 4, 1), band=space.Band((1,), (True,), ("reflect",))),
    "space.Around": dict(parts=(space.Conv(), space.Conv())),
    "space.Chain": dict(parts=(space.Conv(),)),
    "space.Conv": dict(kernel=(3, 1), features=4, depthwise=False, dilation=2, boundary="zero", gain=2.0),
    "space.Dense": {},
    "space.Map": dict(function=jnp.sin),
    "space.Mean": dict(features=4),
    "space.Scan": dict(modes=2, axes=(0, 1), boundary=("zero", "zero"), ssm=layer, native=(8, 8)),
    "space.Separable": dict(rank=2),
    "space.Space": {},
    "space.Spectral": dict(modes=(2, 3), features=4, boundary="reflect", depthwise=False, W_init=jax.nn.initializers.zeros),
    "space.Sum": dict(parts=[space.Space(), space.Conv()]),
    "space.convolve": dict(h=r(5, 4, 2), kernel=r(3, 3, 2, 1), boundary="reflect", dilation=(2, 1)),
    "space.extend": dict(h=r(5, 2), axis=0, n=2, boundary="zero"),
    "space.leading_patterns": dict(frames=noise(9, 4, 1), n=2, targets=noise(9, 4, 1)),
    "space.map_waves": dict(h=r(5, 2), W=z(3, 2, 1), boundary="periodic"),
    "space.scan_axis": dict(
        h=r(5, H), axis=-2, Lambda=z(2, H) / 2, C_right=z(2, H), C_left=z(2, H), boundary="zero", native=5
    ),
    "space.symbol": dict(Lambda=z(2, H) / 2, C_right=z(2, H), C_left=z(2, H), omega=r(3)),
    "space.waves": dict(N=5, m=2, boundary="periodic", half=True),
    "system.feed_through": dict(D=r(H), u=r(L, H)),
    "system.project": dict(B=z(P, H), u=r(L, H), dtype=jnp.bfloat16),
    "system.read_out": dict(C=z(H, P), x=z(L, P), dtype=jnp.bfloat16),
    "system.to_complex": dict(pairs=r(P, 2)),
    "system.to_pairs": dict(z=poles),
    "training.fit": dict(
        loss=lambda v, b, k: jnp.sum(v["params"]["w"] ** 2), variables={"params": {"w": jnp.ones(2)}}, batches=[0, 0],
        optimizer=optax.sgd(0.1), steps=2, seed=0, check_every=1, run=Run(FOLDER / "a"), validate=lambda v: 1.0, patience=2, average=0.5,
    ),
    "training.load_checkpoint": dict(path=FOLDER / "x.msgpack"),
    "training.parameter_groups": dict(model=model, params=variables["params"]),
    "training.save_checkpoint": dict(path=FOLDER / "y.msgpack", variables=variables),
    "training.make_optimizer": dict(
        model=model, learning_rate=1e-3, steps=10, ssm_learning_rate=1e-3, weight_decay=0.1, warmup=0.1, clip=1.0, accumulate=2
    ),
    "mesh.cut_axes": dict(n=2),
    "mesh.fitting": dict(size=3),
    "mesh.mesh_of": dict(said="batch=1"),
    "mesh.make_mesh": dict(batch=1, time=1, space=(1, 1)),
    "training.free_runs_loss": dict(
        model=fills, variables=fills.init(KEY, frames), x=frames, key=KEY, scale=1.0, longest=2, history=2, restarts=0.5
    ),
    "training.next_frame_loss": dict(model=model, variables=variables, x=frames, key=KEY, scale=1.0, noise=0.1),
    "training.rollout_loss": dict(model=model, variables=variables, x=frames, key=KEY, scale=1.0, history=2, noise=0.1, pushforward=True),
}
for name in ("StackedSSM", "BatchStackedSSMModel"):
    VALID[f"models.{name}"] = VALID["blocks.SequenceLayer"] | dict(
        d_model=4, d_vars=1, n_layers=1, n_steps=3, ssm_first_layer=layer, space=space.Conv(), width=4, segment=2, d_inputs=1
    )
for name in ("StackedSSM2D", "BatchStackedSSM2DModel"):
    VALID[f"models.{name}"] = VALID["models.StackedSSM"] | dict(d_model=(4, 4))
for name in ("StackedSSM3D", "BatchStackedSSM3DModel"):
    VALID[f"models.{name}"] = VALID["models.StackedSSM"] | dict(d_model=(4, 4, 4))

NO_DOOR = {  # public names that take nothing which could be wrong without a word, and why
    "made by the library, for the library": (
        "blocks.Gate", "causal_conv.WindowSystem", "contract.Recurrent", "contract.SSMLayer", "contract.carries_of",
        "run.run", "run.segment_steps", "run.whole",
        "s4.DPLRSystem", "space.along", "system.product", "mesh.handed_on", "mesh.is_end", "mesh.mesh_to_follow",
        "mesh.batch_sharding", "mesh.choices", "mesh.everywhere", "mesh.first_alone", "mesh.on_parts",
        "mesh.from_end", "mesh.messages", "mesh.on_host", "mesh.own_part", "mesh.parts_by", "mesh.placed",
        "scan.binary_operator", "scan.state_before", "scan.steps_before", "scan.varying_as", "scan.without_axis",
        "system.Diagonal", "system.DiagonalBank",
        "linoss.OscillatorSystem", "linoss.block_scan", "linoss.divided_powers", "linoss.stable_range", "linoss.stiffness",
        "mamba.SelectiveSystem", "rglru.GatedSystem", "rglru.capped_root", "training.write_whole",
        "system.DiagonalSystem", "system.System", "system.Times", "system.times_of", "training.train_step",
        "hippo.DPLRForm", "metrics.LinearForecast", "data.Normalizer", "space.Band",
        "discretization.common_dtype", "discretization.matched",
        "discretization.scaled", "evaluation.RangeWatch", "evaluation.Scores", "inputs.phases", "inputs.steps_of_day",
        "data.pieces", "fields.Axis", "fields.Fields", "fields.coastlines", "fields.date", "forecasts.where_observed",
        "fields.is_latitude", "fields.is_longitude", "fields.stretch_of",
        "inputs.known_before", "inputs.share_of",
        "pipeline.Recipe", "pipeline.Trained", "runs.Moment", "runs.digest", "runs.locked",
    ),
    "the doors themselves": (
        "checks.Array", "checks.Choice", "checks.Each", "checks.FilePath", "checks.Flag", "checks.FloatType", "checks.Function",
        "checks.Made", "checks.Maybe", "checks.Names", "checks.Number", "checks.Size", "checks.Text",
        "checks.check_choice", "checks.check_divides", "checks.check_fields", "checks.per_axis",
        "checks.check_length", "checks.check_steps", "checks.concrete", "checks.known", "checks.needs", "checks.shown", "checks.takes",
        "inputs.check_season", "lru.check_ring", "rollout.check_model",
    ),
    "initialisers, called by Flax": (
        "causal_conv.around_zero", "linoss.angle_init", "linoss.friction_init", "mamba.step_bias_init", "rglru.a_param_init",
        "lru.gamma_log_init", "lru.matrix_init", "lru.nu_init", "lru.theta_init", "s5.init_CV", "s5.init_VinvB",
        "s5.init_log_steps", "s5.trunc_standard_normal",
    ),
    "the command line; its files and words are tried in test_cli": tuple(n for n in PUBLIC if n.startswith("cli.")),
    "pictures of what the library made": ("plots.plot_losses", "plots.plot_poles", "plots.plot_spectra"),
    "exceptions": ("rollout.RolloutDivergedError", "runs.SaveError", "training.DivergedError", "training.ProcessLostError"),
}

NAN = float("nan")
SIZES, TEXTS = [-1, 2.5, 8.0, "8", True, NAN, 10**13, [4], np.ones(2)], [None, 3, "no such", ["zoh"]]
NUMBERS, FLAGS = [NAN, float("inf"), "1", 1j, True, [1.0], np.ones(2)], [1, "yes", np.ones(2)]


def wrong(kind):
    "What is wrong for a kind."
    if isinstance(kind, Maybe):
        return [value for value in wrong(kind.kind) if value is not None]
    if isinstance(kind, Each):
        return [value for value in wrong(kind.kind) if not isinstance(value, list)]
    if isinstance(kind, Made):
        return ["Conv", space.Conv, 3, layer]
    if isinstance(kind, Size):
        return [None, *(SIZES[1:] if kind.low is None else SIZES), *([0] if kind.low == 1 else [])]
    if isinstance(kind, Number):
        bounds = [kind.low - 1, kind.high + 1, kind.above, kind.below]
        return [None, *NUMBERS, *(bound for bound in bounds if np.isfinite(bound))]
    others = {
        Text: [3, "", b"text", []], Names: ["name", 3, [1], [""]],
        Choice: TEXTS[1:], Flag: FLAGS, Function: ["LRU", 3, model], FilePath: [3, "", []],
        FloatType: ["half a float", 16, int, jnp.complex64, True, object()],
    }
    if type(kind) in others:
        return [None, *others[type(kind)]]
    if isinstance(kind, Array):
        names = [axis for axis in kind.axes.strip("()").split(",") if axis.strip()]
        few = sum("…" not in axis and "*" not in axis for axis in names)
        found = [None, "text", object(), {"a": 1}, [[1.0], [1.0, 2.0]], *([np.float32(1)] if few else [])]
        found += [np.ones((2,) * few, bool)] if kind.of != "booleans" else [np.ones((2,) * few), np.full((2,) * few, NAN)]
        found += [np.ones((2,) * few, int)] if kind.of in ("floats", "numbers") and few else []
        found += [np.ones((2,) * few, complex)] if kind.of != "numbers" else []
        values = [NAN, np.inf] if kind.finite or kind.low is not None else []
        values += [] if kind.low is None else [kind.low - 1]
        found += [np.full((2,) * few, value, np.float32) for value in values]
        return found + ([np.ones((2,) * (few + 1), np.float32)] if len(names) == few else [])
    return []


OTHERS = {  # what is wrong for arguments that are of no kind
    "x": [None, "text", np.ones(3), frames.astype(int), frames + 1j],
    "test": [0, -0.5, 5, NAN, "half", None],
    "N": [0, -1, 2.5, "4", None, True], "state_size": [0, -1, 2.5, "4", None, True], "size": [0, -1, 2.5, 3.0, "4", True],
    "measure": [None, "no such", 3], "n_blocks": [0, 3, "2"],
    "dt_min": [0, -1.0, NAN, "1", None, 2.0], "dt_max": [0, NAN, float("inf"), "1", None],
    "r_min": [-0.1, NAN, "1", None, 0.95], "r_max": [0, 1.1, NAN, "1", None], "max_phase": [0, -1.0, NAN, float("inf"), None],
    "d_model": [None, 0, -1, 2.5, "4", True], "d_hidden": [None, 0, -1, 3, 2.5, "4", True],
    "mean": [None, (1.0, 2.0), (NAN,), "m"], "std": [None, (0.0,), (-1.0,), (NAN,), (1.0, 2.0)], "increment_std": [None, (0.0,), (NAN,)],
    "features": [None, 0, "4"], "gate": [None, "no such"], "method": [None, "no such"], "dt": [0.0, -1.0, NAN, "1"],
    "model": [None, "LRU", layer, S5SSM], "out": [None, 3, np.zeros(3), np.zeros((2, 3, 5, 1))],
    "mask": [1.0, r(L), "no", np.ones(3, bool)], "reset": [1.0, r(L), "no", np.ones(3, bool)],
    "inputs": [3, "day", ("day",)], "axes": [None, 0, "1", 2.5, -1],
    "calendar": [None, 3, "day"], "coordinates": [None, 3, "x"],
    "season": [3, "day", ("day",), (("day", 0),), (("week", 7),)],
    "config": [object(), {1j: 2}, {"a": np.ones(2)}, NAN],
    "source": [None, 3, object(), np.ones((3, 3, 3)), np.ones((3, 3), int)], "layout": ["TWX", "TWC", "WT!", 3],
    "length": [None, 0, "8", 2.5, 1000],
    "starts": [1.5, (), (-1,), (100,), ("a",)], "others": [3, "mine"],
    "share": [None, 3, (1, 1), (0,), ("a", 2), (-1, 2)],
    "space": [(), (FIELDS.time,)],
    "grid": [None, 0, "8", 6], "parts": [None, (), "Conv", (1,), (space.Conv,)],
    "backend": [None, "no such"], "conj_sym": FLAGS, "dplr": FLAGS, "block_diagonal": FLAGS,
}
FREE = {  # looked at by Flax, JAX, optax or matplotlib
    "variables", "params", "fig", "key", "rng", "state", "xs", "errors", "batches", "optimizer", "module",
}


def test_every_public_name_is_here():
    known = {*VALID, *(name for names in NO_DOOR.values() for name in names)}
    doors = {name for name, thing in PUBLIC.items() if callable(thing)}
    assert doors <= known, f"no line for {sorted(doors - known)}"
    assert known <= set(PUBLIC), f"lines for nothing: {sorted(known - set(PUBLIC))}"


def told(call, name, value):
    "Whether a call says in one line what is wrong with an argument."
    try:
        call()
    except (ValueError, TypeError) as error:
        text = str(error)
        assert "\n" not in text and len(text) < 300, f"{name} = {value!r}: {text[:400]}"
        named = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)  # as a word: "u" is in every sentence
        assert isinstance(error, ValueError) and named, f"{name} = {value!r} got {type(error).__name__}: {text}"
        return
    except Exception as error:
        raise AssertionError(f"{name} = {value!r} got {type(error).__name__}: {str(error)[:200]}") from error
    raise AssertionError(f"{name} = {value!r} was taken without a word")


@pytest.mark.parametrize("name", sorted(VALID))
def test_wrong_arguments_are_told(name):
    thing, valid = PUBLIC[name], VALID[name]
    kinds = getattr(thing, "kinds", getattr(thing.__init__, "kinds", {}))
    call = partial(thing, **valid)
    jax.eval_shape(call) if name.endswith("_loss") else call()  # of a loss each operation would be compiled by itself
    for argument in valid:
        kind = kinds.get(argument)
        values = wrong(kind) or OTHERS.get(argument, [])
        assert values or argument in FREE, f"nothing is said of {argument}"
        for value in values:
            told(partial(thing, **valid | {argument: value}), argument, value)


@pytest.mark.parametrize("name", ("dss", "linoss_im", "lru", "mamba", "s4", "s4d_zoh", "s5_zoh"))
def test_wrong_calls_of_layers_are_told(name):
    wrong_calls(LAYERS[name][0](d_model=H), noise(2, L, H))


def test_wrong_calls_of_blocks_and_models_are_told():
    wrong_calls(SequenceLayer(layer, H, training=False), noise(2, L, H))
    wrong_calls(model, noise(2, L, 4, 1), "x")
    wrong_calls(Forecaster(model, (0.0,), (1.0,), (1.0,)), noise(2, L, 4, 1), "x")


def wrong_calls(module, u, name="u"):
    "Inputs, dt, mask, reset and carries that are wrong, called, prefilled and stepped."
    zeros = lambda f, *args: jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), jax.eval_shape(f, *args))  # nothing is compiled
    v = zeros(module.init, KEY, u)
    ones = np.ones((2, L), np.float32)
    inputs = [None, "u", u.astype(int), u + 1j, u > 0, u[..., None], u[0, 0, 0], [[1.0], [1.0, 2.0]]]
    said = {
        "dt": [-1.0, NAN, float("inf"), 1j, "1", ones[:, :4], -ones, np.where(ones > 0, NAN, 1), np.ones((3, L))],
        "mask": [1.0, ones, np.full((2, L), NAN), "no", ones[:, :3] > 0, ones[:1, :3] > 0, np.ones(3, bool)],
        "reset": [1.0, ones, "no", ones[:, :3] > 0, np.ones(3, bool)],
    }
    carry = zeros(lambda v: module.apply(v, 2, method="initial_carry"), v)
    state = lambda f: jax.tree.map(f, carry)
    carries = [0.0, (), np.ones(1), state(lambda c: c[:1]), state(lambda c: c[..., :1]), state(lambda c: c[0]), "zero", [carry] * 3]
    call = lambda *args, **said: lambda: jax.eval_shape(lambda: module.apply(v, *args, **said))  # the door is all that runs
    for method in ("__call__", "prefill"):
        for value in inputs:
            told(call(value, method=method), name, value)
        for argument, values in said.items():
            for value in values:
                told(call(u, method=method, **{argument: value}), argument, value)
    for value in carries:
        told(call(u, value, method="prefill"), "carry", value)
        told(call(value, u[:, 0], method="step"), "carry", value)
    for argument, values in {"dt": [-1.0, NAN, 1j, np.ones(3)], "mask": [1.0, np.ones(2), np.ones(3, bool)]}.items():
        for value in values:
            told(call(carry, u[:, 0], method="step", **{argument: value}), argument, value)


@pytest.mark.parametrize("scale", ((NAN,), (1.0, 2.0), (), None))
def test_wrong_scales_are_told(scale):
    "Of a named tuple, which has no door of its own: by its methods."
    for name in ("mean", "std"):
        for method in ("normalize", "denormalize"):
            scales = Normalizer((0.0,), (1.0,), (1.0,))._replace(**{name: scale})
            told(partial(getattr(scales, method), frames), name, scale)
    told(lambda: Normalizer((0.0,), (1.0,), (1.0,)).normalize(frames.astype(int)), "x", "integers")


@pytest.mark.parametrize(
    "name, values",
    {
        "waves": [(-1,), (2.5,), ("2",), (1, 1), (), 1, None], "mean": [(1,), (None,), (True, True), (), True],
        "boundary": [("zero",), ("periodic",) * 2, (), "periodic"],
    }.items(),
)  # fmt: skip
def test_wrong_bands_are_told(name, values):
    right = space.Band((1,), (True,), ("reflect",))
    assert Forecaster(model, (0.0,), (1.0,), (1.0,), band=right).band == right
    for value in values:
        told(partial(Forecaster, model, (0.0,), (1.0,), (1.0,), band=right._replace(**{name: value})), name, value)
    told(partial(Forecaster, model, (0.0,), (1.0,), (1.0,), gaps=True, band=right), "band", right)
