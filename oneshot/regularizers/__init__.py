"""Terms of the loss besides the task: costs of the architecture, and norms of the weights."""

from .base import Regularizer as Regularizer
from .base import gradient_share as gradient_share
from .costs import DUCCIO as DUCCIO
from .costs import BaseRegularizer as BaseRegularizer
from .schedule import Schedule as Schedule
