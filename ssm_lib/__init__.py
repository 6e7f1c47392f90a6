"""Deep state-space-model layers for spatiotemporal data in JAX and Flax."""

__version__ = "0.1.0"

from ssm_lib.blocks import SequenceLayer
from ssm_lib.diagonal import DiagonalSSM, DiagonalSystem
from ssm_lib.discretization import bilinear, discretize_bilinear, discretize_zoh, zoh
from ssm_lib.hippo import make_DPLR_HiPPO, make_HiPPO, make_NPLR_HiPPO
from ssm_lib.lru import LRU, LRUDynamics
from ssm_lib.models import (
    BatchStackedSSM2DModel,
    BatchStackedSSMModel,
    IncrementModel,
    StackedSSM,
    StackedSSM2D,
)
from ssm_lib.rollout import rollout
from ssm_lib.s5 import S5SSM
from ssm_lib.scan import linear_scan
