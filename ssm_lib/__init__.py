"""Deep state-space-model layers for spatiotemporal data in JAX and Flax."""

__version__ = "0.1.0"

from ssm_lib.blocks import SequenceLayer
from ssm_lib.causal_conv import CausalConv
from ssm_lib.contract import Recurrent, SSMLayer
from ssm_lib.convolution import causal_convolution, discretize_dense, kernel_dense, run_dense
from ssm_lib.data import (
    curriculum,
    fit_band,
    fit_normalizer,
    pde_trajectories,
    split_trajectories,
    window_batch,
    window_batches,
    windows,
)
from ssm_lib.discretization import bilinear, discretize_bilinear, discretize_zoh, zoh
from ssm_lib.dss import DSS, complex_softmax, dss_kernel, dss_ssm
from ssm_lib.evaluation import Scores, evaluate
from ssm_lib.fields import Fields, area_weights, open_fields
from ssm_lib.forecaster import Forecaster, Seasonal
from ssm_lib.forecasts import save_forecasts
from ssm_lib.hippo import DPLRForm, Hippo, dplr, make_DPLR_HiPPO, make_HiPPO, make_NPLR_HiPPO
from ssm_lib.inputs import Inputs, WithInputs, fit_inputs
from ssm_lib.linoss import LinOSS
from ssm_lib.lru import LRU, LRUDynamics
from ssm_lib.mamba import MambaBlock, selective_scan
from ssm_lib.measures import nplr, transition
from ssm_lib.metrics import fit_linear, nrmse, persistence
from ssm_lib.mesh import make_mesh
from ssm_lib.models import (
    BatchStackedSSM2DModel,
    BatchStackedSSM3DModel,
    BatchStackedSSMModel,
    StackedSSM,
    StackedSSM2D,
    StackedSSM3D,
    on_grid,
    poles_of,
)
from ssm_lib.pipeline import (
    Config,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    evaluate_run,
    open_run,
    resolve,
    train_run,
)
from ssm_lib.plots import animate_rollout, plot_errors, plot_rollout
from ssm_lib.projection import HiPPOCell, project_online, reconstruct
from ssm_lib.published import from_published, load_weights, save_weights, to_published
from ssm_lib.rglru import RGLRU, GriffinBlock
from ssm_lib.rollout import RolloutDivergedError, rollout, rollout_stream, write_rollout
from ssm_lib.run import Plan
from ssm_lib.runs import Run, SaveError, load_run
from ssm_lib.s4 import S4, S4D, DPLRSystem
from ssm_lib.s5 import S5SSM
from ssm_lib.scan import linear_scan, scan_in_segments
from ssm_lib.system import DiagonalBank, DiagonalSystem, System
from ssm_lib.training import (
    DivergedError,
    ProcessLostError,
    fit,
    free_runs_loss,
    load_checkpoint,
    make_optimizer,
    next_frame_loss,
    rollout_loss,
    save_checkpoint,
)

# What `from ssm_lib import *` brings: functions and classes, not the modules, whose names are everyday words.
__all__ = sorted(name for name, thing in list(globals().items()) if getattr(thing, "__module__", "").startswith("ssm_lib"))
