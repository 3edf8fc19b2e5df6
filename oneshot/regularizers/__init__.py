"""Terms of the loss besides the task: costs of the architecture, and norms of the weights."""

from .base import Regularizer as Regularizer
from .base import gradient_share as gradient_share
from .costs import DUCCIO as DUCCIO
from .costs import BaseRegularizer as BaseRegularizer
from .coupled import coupled_channels as coupled_channels
from .coupled import coupled_inputs as coupled_inputs
from .group_lasso import GroupLasso as GroupLasso
from .groups import Family as Family
from .lambda_max import lambda_max as lambda_max
from .layer_groups import blocks as blocks
from .layer_groups import families as families
from .layer_groups import strided as strided
from .removal import Removed as Removed
from .removal import remove_zero_channels as remove_zero_channels
from .schedule import Schedule as Schedule
from .sparsity import SparsityReport as SparsityReport
from .sparsity import sparsity as sparsity
from .thresholds import HeldZeros as HeldZeros
from .thresholds import Zeroed as Zeroed
from .thresholds import hold_zeros as hold_zeros
from .thresholds import threshold_ as threshold_
from .weights import L1 as L1
from .weights import L2 as L2
from .weights import l1 as l1
